//! Finding a Podman container's process: through conmon, which runs for as long as the container does and says on its command
//! line whose it is; podman itself, which takes tens of milliseconds, is asked only when that shows nothing.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::bounded::{self, Link};
use crate::exit::Failure;
use crate::owner::Owner;

/// How long `podman inspect` may take.
const PODMAN: Duration = Duration::from_secs(20);

/// The most that is read of a file with a process's number in it.
const NUMBER: u64 = 32;

/// What a running conmon says of its container.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conmon {
    name: String,
    pidfile: String,
}

impl Conmon {
    /// Reads a conmon's command line (NUL-separated): `-n NAME`, `-p PIDFILE`.
    pub(crate) fn parse(cmdline: &[u8]) -> Option<Self> {
        let mut words =
            cmdline.split(|&byte| byte == 0).map(|word| std::str::from_utf8(word).unwrap_or_default());
        if !words.next()?.ends_with("conmon") {
            return None;
        }
        let (mut name, mut pidfile) = (None, None);
        while let Some(word) = words.next() {
            match word {
                "-n" | "--name" => name = words.next(),
                "-p" | "--container-pidfile" => pidfile = words.next(),
                // Here conmon's own options end and podman's clean-up command begins.
                "--exit-command" => break,
                _ => {}
            }
        }
        Some(Self { name: name?.to_owned(), pidfile: pidfile?.to_owned() })
    }
}

/// The main process of this user's running container `name`, without running podman.
#[must_use]
pub fn running(name: &str) -> Option<i32> {
    find(nix::unistd::geteuid().as_raw(), name)
}

/// The same of the user `owner`, for root who looks after that user's service: as that user, who may have written whatever stands
/// there.
#[must_use]
pub fn running_of(owner: &Owner, name: &str) -> Option<i32> {
    let _acting = owner.act().ok()?;
    find(owner.uid, name)
}

fn find(owner: u32, name: &str) -> Option<i32> {
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    for process in processes.filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit()) {
        // The names of a process and its owner are cheap to read; its command line only follows for a conmon of ours.
        let path = process.path();
        if !std::fs::read(path.join("comm")).is_ok_and(|comm| comm == b"conmon\n") || !owned_by(&path, owner)
        {
            continue;
        }
        let Ok(cmdline) = std::fs::read(path.join("cmdline")) else { continue };
        let Some(conmon) = Conmon::parse(&cmdline).filter(|conmon| conmon.name == name) else { continue };
        // Written once the container's namespaces exist.
        let pid = number_in(Path::new(&conmon.pidfile));
        let child_of_conmon =
            |pid: &i32| parent(*pid).map(|pid| pid.to_string()) == process.file_name().into_string().ok();
        if let Some(pid) = pid.filter(child_of_conmon) {
            return Some(pid);
        }
    }
    None
}

/// A process is called conmon, and names any file, as its owner likes: one that never ends, or a pipe that nobody writes into.
fn number_in(pidfile: &Path) -> Option<i32> {
    bounded::read(pidfile, NUMBER, Link::Refuse).ok()?.trim().parse().ok()
}

fn owned_by(process: &Path, uid: u32) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(process).is_ok_and(|metadata| metadata.uid() == uid)
}

/// A process's parent: the fourth field of proc_pid_stat(5), after a name that may hold spaces and parentheses.
fn parent(pid: i32) -> Option<i32> {
    parent_in(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

pub(crate) fn parent_in(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// What podman says of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inspected {
    /// It runs; its main process.
    Running(i32),
    /// It exists, and does not run.
    Stopped,
    /// There is none of that name.
    Unknown,
}

/// Asks podman.
///
/// # Errors
/// When podman cannot be run or fails for another reason than that.
pub async fn inspect(name: &str) -> anyhow::Result<Inspected> {
    let mut podman = Command::new("podman");
    let _same = podman
        .args(["container", "inspect", "--format", "{{.State.Pid}}", "--", name])
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = match tokio::time::timeout(PODMAN, podman.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Failure::NotFound(
                "podman is not installed, so --container cannot be looked up".into(),
            )
            .into());
        }
        Ok(Err(error)) => anyhow::bail!("cannot run podman: {error}"),
        Err(_) => anyhow::bail!("podman inspect did not answer within {PODMAN:?}"),
    };
    if output.status.success() {
        return Ok(match String::from_utf8_lossy(&output.stdout).trim().parse() {
            Ok(pid) if pid > 0 => Inspected::Running(pid),
            _ => Inspected::Stopped,
        });
    }
    let words = String::from_utf8_lossy(&output.stderr);
    if words.contains("no such") {
        return Ok(Inspected::Unknown);
    }
    anyhow::bail!("podman inspect failed: {}", words.trim().lines().last().unwrap_or("without a word"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_conmon_command_line() {
        let line = b"/usr/bin/conmon\0--api-version\x001\0-c\0abc\0-n\0systemd-web\0-p\0/run/x/pidfile\0--exit-command\0/usr/bin/podman\0\
                     --exit-command-arg\0-n\0";
        let conmon = Conmon::parse(line).unwrap();
        assert_eq!(conmon, Conmon { name: "systemd-web".into(), pidfile: "/run/x/pidfile".into() });
        assert_eq!(Conmon::parse(b"/usr/bin/podman\0-n\0x\0-p\0y"), None);
        assert_eq!(Conmon::parse(b""), None);
    }

    #[test]
    fn a_pidfile_is_a_short_regular_file() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-pidfile-XXXXXX")).unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(folder.join(name), text).unwrap();
            number_in(&folder.join(name))
        };
        assert_eq!(write("good", "4711\n"), Some(4711));
        assert_eq!(write("long", &" ".repeat(100)), None);
        let pipe = folder.join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!((number_in(&pipe), number_in(Path::new("/dev/zero"))), (None, None));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn knows_its_own_parent() {
        assert_eq!(parent(std::process::id() as i32), Some(nix::unistd::getppid().as_raw()));
    }
}
