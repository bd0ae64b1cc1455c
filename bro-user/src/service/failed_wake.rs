//! The last wake that failed, and why: noted by the forwarder in a small file beside its notes of ownership, so that it is known
//! after the forwarder's exit; forgotten by a wake that succeeds, by `bro activate --remove` and by a reboot.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bro_relay::read_bounded::{self, Link};
use bro_relay::target::Target;
use serde::{Deserialize, Serialize};

use crate::control_socket;
use crate::exit::on_one_line;
use crate::installed::Installed;
use crate::service::use_lock;
use crate::systemd::scope::RuntimeScope;

/// How many characters of a cause are kept.
const LONGEST_CAUSE: usize = 1000;

/// The longest note that is read: so many characters, none of which takes more bytes than this.
const LONGEST_NOTE: u64 = 16 * 1024;

/// Such a wake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedWake {
    /// When, in seconds since 1970.
    pub at: u64,
    /// The target of the clients that were reset.
    pub target: String,
    /// The cause, in words.
    pub why: String,
}

impl FailedWake {
    /// How long ago it was.
    #[must_use]
    pub fn since(&self) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
        crate::systemd::time_span::roughly(Duration::from_secs(now.saturating_sub(self.at)))
    }

    fn now(target: &Target, why: &str) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
        Self { at: now, target: target.to_string(), why: why.chars().take(LONGEST_CAUSE).collect() }
    }
}

/// What a forwarder knows of its targets' last wakes.
#[derive(Debug)]
pub(crate) struct Failures {
    /// The unit that it starts; without one nothing outlives it.
    unit: Option<String>,
    /// Of each target.
    each: Vec<Option<FailedWake>>,
}

impl Failures {
    /// Takes up what a predecessor has noted.
    pub fn of(unit: Option<&str>, targets: &[Target]) -> Self {
        let mut each = vec![None; targets.len()];
        if let Some(noted) = unit.and_then(|unit| read(&control_socket::base_directory(), unit)) {
            // A failure of a target that is gone is forgotten with the first target's.
            let at = targets.iter().position(|target| target.to_string() == noted.target).unwrap_or(0);
            if let Some(place) = each.get_mut(at) {
                *place = Some(noted);
            }
        }
        Self { unit: unit.map(str::to_owned), each }
    }

    /// The last failure that no successful wake has followed.
    pub fn last(&self) -> Option<&FailedWake> {
        self.each.iter().flatten().max_by_key(|failed| failed.at)
    }

    /// Notes a failure.
    pub fn failed(&mut self, index: usize, target: &Target, why: &str) {
        self.each[index] = Some(FailedWake::now(target, why));
        self.keep();
    }

    /// Forgets the failure of a target that has been woken since.
    pub fn woken(&mut self, index: usize) {
        if self.each[index].take().is_some() {
            self.keep();
        }
    }

    fn keep(&self) {
        let Some(unit) = &self.unit else { return };
        if let Err(error) = write(&control_socket::base_directory(), unit, self.last()) {
            tracing::debug!(%error, "the last wake's failure is not known after this process's end");
        }
    }
}

/// What a forwarder, perhaps a user's, has noted of an activated service.
pub(crate) fn noted(installed: &Installed) -> Option<FailedWake> {
    let (directory, _acting) = place(installed)?;
    read(&directory, &installed.unit)
}

/// The service is activated no more: neither this note is kept, nor the one about its runs.
pub(crate) fn forget(installed: &Installed) {
    if let Some((directory, _acting)) = place(installed) {
        std::fs::remove_file(file(&directory, &installed.unit)).ok();
        use_lock::clear(&directory, &installed.unit);
    }
}

/// Where its forwarder notes things, to be read with the rights of the forwarder's user.
pub(crate) fn place(installed: &Installed) -> Option<(PathBuf, Option<crate::run_as::Acting>)> {
    match (&installed.run_as, installed.scope) {
        (Some(owner), _) if owner.is_gone() => None,
        (Some(owner), _) => {
            let acting = owner.act().ok()?;
            Some((control_socket::base_directory(), Some(acting)))
        }
        (None, RuntimeScope::System) => Some((control_socket::SYSTEM.into(), None)),
        (None, RuntimeScope::User) => Some((control_socket::base_directory(), None)),
    }
}

fn file(directory: &Path, unit: &str) -> PathBuf {
    directory.join(format!("failed-{unit}"))
}

fn read(directory: &Path, unit: &str) -> Option<FailedWake> {
    let text = read_bounded::read(&file(directory, unit), LONGEST_NOTE, Link::Refuse).ok()?;
    let mut noted: FailedWake = serde_json::from_str(&text).ok()?;
    // The file may hold anything by now.
    noted.target = on_one_line(&noted.target);
    noted.why = on_one_line(&noted.why.chars().take(LONGEST_CAUSE).collect::<String>());
    Some(noted)
}

/// Writes all of it or nothing, since other processes may read it meanwhile.
fn write(directory: &Path, unit: &str, last: Option<&FailedWake>) -> std::io::Result<()> {
    let path = file(directory, unit);
    let Some(last) = last else { return std::fs::remove_file(path) };
    std::fs::create_dir_all(directory)?;
    let new = directory.join(format!(".failed-{unit}.{}", std::process::id()));
    std::fs::write(&new, serde_json::to_vec(last)?)?;
    std::fs::rename(&new, path).inspect_err(|_| drop(std::fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_back_bounded_and_harmless_and_forgotten() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-failed-XXXXXX")).unwrap();
        assert_eq!(read(&folder, "web.service"), None);
        let target: Target = "127.0.0.1:80".parse().unwrap();
        let why = format!("\u{1b}[2J\n{}", "\u{10ffff}".repeat(2 * LONGEST_CAUSE));
        let failed = FailedWake::now(&target, &why);
        write(&folder, "web.service", Some(&failed)).unwrap();
        let noted = read(&folder, "web.service").unwrap();
        assert_eq!((noted.at, &*noted.target), (failed.at, "127.0.0.1:80"));
        assert!(noted.why.starts_with("\\u{1b}[2J\\n") && !noted.why.contains(char::is_control));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "something is left beside it");
        // What another process might write as a note.
        std::fs::write(file(&folder, "web.service"), "x".repeat(100_000)).unwrap();
        assert_eq!(read(&folder, "web.service"), None);
        write(&folder, "web.service", None).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", file(&folder, "web.service")).unwrap();
        assert_eq!(read(&folder, "web.service"), None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_target_is_forgotten_when_it_has_been_woken_and_no_other() {
        let targets: Vec<Target> = ["127.0.0.1:80", "127.0.0.1:81"].map(|text| text.parse().unwrap()).into();
        let mut failures = Failures::of(None, &targets);
        assert_eq!(failures.last(), None);
        failures.failed(1, &targets[1], "no");
        failures.woken(0);
        assert_eq!(failures.last().map(|failed| &*failed.why), Some("no"));
        failures.woken(1);
        assert_eq!(failures.last(), None);
    }
}
