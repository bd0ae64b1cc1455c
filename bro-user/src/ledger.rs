//! What a unit's forwarders have counted since the host was booted, one after the other. A forwarder ends when it is idle, so its
//! own numbers alone would always begin anew: each keeps them in a small file beside its notes of ownership, as a part with a
//! number of its own, and bro shows the sum. A killed process loses what it has counted since it last kept it: a minute's at most.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use serde::{Deserialize, Serialize};

use crate::control_socket;
use crate::exit::on_one_line;
use crate::fallback::FallbackKind;
use crate::installed::Installed;
use crate::service::failed_wake;
use bro_relay::stats::Tally;

/// The longest file that is read: a forwarder's own part is below 1 KiB for each of its sockets.
const LONGEST: u64 = 4 * 1024 * 1024;

/// So many processes that have ended have a part of their own; older ones are added up.
const MOST_ENDED: usize = 4;

/// So many sockets are told apart by name.
const MOST_LISTENERS: usize = 1024;

/// How often a forwarder that goes on keeps what it has counted.
const EVERY: Duration = Duration::from_secs(60);

/// How often, and after what pause, a forwarder asks for a lock that another one has for a moment.
const TRIES: (usize, Duration) = (20, Duration::from_millis(1));

/// What is counted. All of it only grows.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Times the service was woken for a client.
    pub woken_by_clients: u64,
    /// Times it was woken by `bro wake`.
    pub woken_by_hand: u64,
    /// Times it was woken since the time of `--keep-awake` had begun.
    pub woken_by_clock: u64,
    /// Wakes that failed.
    pub start_failures: u64,
    /// Wakes that took longer than clients are held.
    pub start_timeouts: u64,
    /// Times it was stopped since no client was there.
    pub idle_stops: u64,
    /// Times it was stopped by `bro sleep`.
    pub told_stops: u64,
    /// Times a successor took over.
    pub reloads: u64,
    /// Times no successor took over, although one was to.
    pub failed_reloads: u64,
    /// Times a service got a socket of its forwarder's (`--adopt`).
    pub adoptions: u64,
    /// Times it did not, by the reason.
    pub fallbacks: BTreeMap<FallbackKind, u64>,
    /// What its sockets have seen, by their names.
    pub listeners: BTreeMap<String, Tally>,
}

impl Counts {
    /// Adds what the sockets have counted, without their present state.
    #[must_use]
    pub fn with<'a>(&self, listeners: impl IntoIterator<Item = (&'a str, &'a Tally)>) -> Self {
        let mut counts = self.clone();
        for (name, tally) in listeners {
            *counts.listeners.entry(name.to_owned()).or_default() += &tally.lasting();
        }
        counts
    }
}

impl std::ops::AddAssign<&Self> for Counts {
    fn add_assign(&mut self, other: &Self) {
        self.woken_by_clients += other.woken_by_clients;
        self.woken_by_hand += other.woken_by_hand;
        self.woken_by_clock += other.woken_by_clock;
        self.start_failures += other.start_failures;
        self.start_timeouts += other.start_timeouts;
        self.idle_stops += other.idle_stops;
        self.told_stops += other.told_stops;
        self.reloads += other.reloads;
        self.failed_reloads += other.failed_reloads;
        self.adoptions += other.adoptions;
        for (kind, count) in &other.fallbacks {
            *self.fallbacks.entry(*kind).or_default() += count;
        }
        for (name, tally) in &other.listeners {
            *self.listeners.entry(name.clone()).or_default() += tally;
        }
    }
}

/// What one forwarder's process has counted, and the number of its part of the file.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    /// Its number, which no other has had.
    pub part: String,
    /// What it has counted.
    pub counts: Counts,
}

/// The file.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Kept {
    /// Of processes that have ended long ago.
    before: Counts,
    /// Of the others, the oldest first.
    parts: Vec<Own>,
}

impl Kept {
    /// The sum, with the words of running processes in place of what they have kept.
    fn total<'a>(&self, running: impl Iterator<Item = &'a Own> + Clone) -> Counts {
        let mut total = self.before.clone();
        let runs = |part: &Own| running.clone().any(|own| own.part == part.part);
        for part in self.parts.iter().filter(|part| !runs(part)) {
            total += &part.counts;
        }
        for own in running.clone() {
            total += &own.counts;
        }
        total
    }

    /// Takes `own` in.
    fn keep(&mut self, own: &Own) {
        match self.parts.iter_mut().find(|part| part.part == own.part) {
            Some(part) => part.counts = own.counts.clone(),
            None => self.parts.push(own.clone()),
        }
        while self.parts.len() > MOST_ENDED
            && let Some(at) =
                self.parts.iter().position(|part| part.part != own.part && has_ended(&part.part))
        {
            self.before += &self.parts.remove(at).counts;
        }
    }

    /// The file may hold anything by now.
    fn tame(mut self) -> Self {
        let parts = self.parts.iter_mut().map(|part| &mut part.counts);
        for counts in parts.chain([&mut self.before]) {
            let listeners = std::mem::take(&mut counts.listeners).into_iter().take(MOST_LISTENERS);
            counts.listeners = listeners.map(|(name, tally)| (on_one_line(&name), tally)).collect();
        }
        self
    }
}

/// Has the process of that part ended? If another process has its number by now, the part only stays for longer.
fn has_ended(part: &str) -> bool {
    let pid = part.split('-').next().and_then(|pid| pid.parse::<u32>().ok());
    pid.is_none_or(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// One forwarder's access to the file.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Its path; without a `--unit` there is none, since nothing outlives the forwarder.
    path: Option<PathBuf>,
    part: String,
    /// What was kept last.
    kept: Option<Counts>,
    /// When the forwarder last looked for something new, and how many clients there had been.
    looked: (Instant, u64),
}

impl Ledger {
    /// Of the forwarder that starts `unit`.
    pub fn of(unit: Option<&str>) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let part = format!("{}-{}", std::process::id(), now.as_millis());
        Self {
            path: unit.map(|unit| file(&control_socket::base_directory(), unit)),
            part,
            kept: None,
            looked: (Instant::now(), 0),
        }
    }

    /// Whether there is a file at all.
    pub const fn keeps(&self) -> bool {
        self.path.is_some()
    }

    /// Whether it is time again to keep the counts, in case this process is killed. So far `accepted` clients have come, `open` of
    /// them are connected: where no client has come or is connected, nothing has changed.
    pub fn is_due(&mut self, accepted: u64, open: u64) -> bool {
        if !self.keeps() || self.looked.0.elapsed() < EVERY {
            return false;
        }
        let before = std::mem::replace(&mut self.looked, (Instant::now(), accepted)).1;
        before != accepted || open > 0
    }

    /// This process's own part.
    pub fn own(&self, counts: Counts) -> Own {
        Own { part: self.part.clone(), counts }
    }

    /// Keeps the counts, if they have changed.
    pub fn keep(&mut self, counts: Counts) {
        let Some(path) = &self.path else { return };
        if self.kept.as_ref() == Some(&counts) {
            return;
        }
        let own = self.own(counts);
        match keep(path, &own) {
            Ok(()) => self.kept = Some(own.counts),
            Err(error) => {
                tracing::debug!(%error, "what was counted is not known after this process's end");
            }
        }
    }
}

/// What all forwarders of `unit` have counted; those that run report the rest themselves. In the same directory as this process's
/// own notes.
pub(crate) fn total(unit: Option<&str>, running: &[&Own]) -> Counts {
    let kept = unit.and_then(|unit| read(&file(&control_socket::base_directory(), unit)).ok());
    kept.unwrap_or_default().total(running.iter().copied())
}

/// The same of an activated service; its forwarders may be a user's.
pub(crate) fn total_of(installed: &Installed, running: &[&Own]) -> Counts {
    let kept = failed_wake::place(installed)
        .and_then(|(directory, _acting)| read(&file(&directory, &installed.unit)).ok());
    kept.unwrap_or_default().total(running.iter().copied())
}

/// The service is activated no more.
pub(crate) fn forget(installed: &Installed) {
    if let Some((directory, _acting)) = failed_wake::place(installed) {
        std::fs::remove_file(file(&directory, &installed.unit)).ok();
    }
}

fn file(directory: &Path, unit: &str) -> PathBuf {
    directory.join(format!("counts-{unit}"))
}

/// Waits for other forwarders, which hold the lock while they write, and for no other process any longer.
fn lock(mut file: File, how: FlockArg) -> io::Result<Flock<File>> {
    for _ in 0..TRIES.0 {
        match Flock::lock(file, how) {
            Ok(locked) => return Ok(locked),
            Err((again, Errno::EWOULDBLOCK)) => file = again,
            Err((_, errno)) => return Err(errno.into()),
        }
        std::thread::sleep(TRIES.1);
    }
    Err(Errno::EWOULDBLOCK.into())
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file =
        options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

fn parse(file: &mut File) -> io::Result<Kept> {
    let mut text = String::new();
    let length = file.take(LONGEST + 1).read_to_string(&mut text)?;
    if length as u64 > LONGEST {
        return Err(io::Error::other(format!("it has more than {LONGEST} bytes")));
    }
    Ok(serde_json::from_str::<Kept>(&text)?.tame())
}

fn read(path: &Path) -> io::Result<Kept> {
    let mut file = lock(open(path, &mut OpenOptions::new())?, FlockArg::LockSharedNonblock)?;
    parse(&mut file)
}

fn keep(path: &Path, own: &Own) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600);
    let mut file = lock(open(path, &mut options)?, FlockArg::LockExclusiveNonblock)?;
    // A file that makes no sense, or that was just made, begins anew.
    let mut kept = parse(&mut file).unwrap_or_default();
    kept.keep(own);
    let text = serde_json::to_vec(&kept)?;
    if text.len() as u64 > LONGEST {
        return Err(io::Error::other("it would be too long"));
    }
    file.rewind()?;
    file.write_all(&text)?;
    // A process that is killed in between leaves the rest of the longer text behind this one; no reader finds sense in that.
    file.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bro_relay::connection::End;

    fn own(part: &str, accepted: u64) -> Own {
        let mut tally = Tally { accepted, open: 3, ..Tally::default() };
        tally.ended.add(End::Eof);
        let counts = Counts { woken_by_clients: 1, ..Counts::default() };
        Own { part: part.into(), counts: counts.with([("web", &tally)]) }
    }

    #[test]
    fn what_ended_processes_have_counted_stays_and_what_runs_says_the_rest() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-ledger-XXXXXX")).unwrap();
        let path = file(&folder, "web.service");
        read(&path).unwrap_err();
        // None of them runs: the number is beyond any process's.
        for (number, accepted) in [(0, 5), (1, 7), (2, 11), (3, 13), (4, 17), (5, 19)] {
            keep(&path, &own(&format!("99999999-{number}"), accepted)).unwrap();
        }
        let kept = read(&path).unwrap();
        assert_eq!(kept.parts.len(), MOST_ENDED);
        let total = kept.total([].iter());
        assert_eq!((total.woken_by_clients, total.listeners["web"].accepted), (6, 72));
        assert_eq!(total.listeners["web"].open, 0, "what is so now is not kept");
        // One of them still runs, and has counted more.
        let running = [own("99999999-5", 100)];
        assert_eq!(kept.total(running.iter()).listeners["web"].accepted, 72 - 19 + 100);
        // It keeps its counts, a shorter text than the present one.
        keep(&path, &Own { counts: Counts::default(), ..running[0].clone() }).unwrap();
        assert_eq!(read(&path).unwrap().total([].iter()).listeners["web"].accepted, 72 - 19);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "something is left beside it");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn one_that_runs_is_not_added_to_those_before() {
        let mut kept = Kept::default();
        let alive = format!("{}-1", std::process::id());
        kept.keep(&own(&alive, 1));
        for number in 0..10 {
            kept.keep(&own(&format!("99999999-{number}"), 1));
        }
        assert!(kept.parts.iter().any(|part| part.part == alive), "{kept:?}");
        assert_eq!(kept.total([].iter()).listeners["web"].accepted, 11);
    }

    #[test]
    fn what_others_have_put_there_is_nothing() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-ledger-XXXXXX")).unwrap();
        let path = file(&folder, "web.service");
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        read(&path).unwrap_err();
        keep(&path, &own("1-1", 1)).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        read(&path).unwrap_err();
        keep(&path, &own("1-1", 1)).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, r#"{"parts":[{"part":"1-1","counts":{"listeners":{"a\nb":{}}}}]}"#).unwrap();
        read(&path).unwrap_err();
        keep(&path, &own("1-1", 4)).unwrap();
        assert_eq!(read(&path).unwrap().total([].iter()).listeners["web"].accepted, 4);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
