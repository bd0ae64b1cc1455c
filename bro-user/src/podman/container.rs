//! Finding a Podman container's process: through conmon, which runs for as long as the container does and names it on its command
//! line; podman itself, which takes tens of milliseconds, is asked only when that shows nothing.
//!
//! A container's process may call itself conmon and say the same, and root in a container is the same user outside as the
//! container's owner. What it cannot forge is where it is: a container has a process namespace of its own (unless it was given the
//! host's), and no way into another unit's cgroup.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bro_relay::read_bounded::{self, Link};
use tokio::process::Command;

use crate::exit::Failure;
use crate::run_as::RunAsUser;
use crate::systemd::manager::Residence;

/// How long `podman inspect` may take.
const PODMAN: Duration = Duration::from_secs(20);

/// The most that is read of a file with a process's number in it.
const NUMBER: u64 = 32;

/// The most that is read of a command line. Podman puts name and pidfile near its start; a process may have megabytes of it.
const COMMAND_LINE: u64 = 4096;

/// The most that is read of a cgroup's list of processes, and the most cgroups that are looked into below a unit's.
const PROCESSES: u64 = 64 * 1024;
const CGROUPS: usize = 16;

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

/// The same for the user `owner`, when root looks after that user's service: with that user's rights, since the user may have
/// written anything there.
#[must_use]
pub fn running_of(owner: &RunAsUser, name: &str) -> Option<i32> {
    let _acting = owner.act().ok()?;
    find(owner.uid, name)
}

fn find(owner: u32, name: &str) -> Option<i32> {
    bro_proc::processes().find_map(|(pid, _)| of_conmon(pid, owner, name))
}

/// What a look at a unit has shown of its container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sighting {
    /// Its main process.
    Running(i32),
    /// Its own cgroup is there, beside another, or a conmon in the unit's: the container is about to be.
    Near,
    /// Nothing.
    Nothing,
}

/// This user's container `name` that the unit has started: its conmon is the unit's main process, or in the unit's cgroup. bro looks
/// at as many files as the unit has processes, however many the host has.
#[must_use]
pub fn sighted_in(residence: &Residence, name: &str) -> Sighting {
    let owner = nix::unistd::geteuid().as_raw();
    let main = i32::try_from(residence.main).ok().filter(|&main| main > 0);
    if let Some(pid) = main.and_then(|main| of_conmon(main, owner, name)) {
        return Sighting::Running(pid);
    }
    let Some(cgroup) = residence.cgroup.as_deref() else { return Sighting::Nothing };
    let below = cgroups_below(cgroup);
    let mut near = below.len() > 1;
    for conmon in processes_in(cgroup).into_iter().filter(|&pid| is_conmon(pid, owner)) {
        near = true;
        if let Some(pid) = of_conmon(conmon, owner, name) {
            return Sighting::Running(pid);
        }
    }
    let found =
        below.iter().flat_map(|folder| processes_in(folder)).find_map(|pid| of_conmon(pid, owner, name));
    match found {
        Some(pid) => Sighting::Running(pid),
        None if near => Sighting::Near,
        None => Sighting::Nothing,
    }
}

/// The cgroups right below a unit's: with --cgroups=split conmon has one beside the container's; the container may make as many as it
/// likes below its own.
fn cgroups_below(cgroup: &Path) -> Vec<PathBuf> {
    // The kernel counts folders below as links, and to list one takes longer than all the rest of a look.
    let is_split = std::fs::metadata(cgroup).is_ok_and(|metadata| metadata.nlink() > 2);
    let below = is_split.then(|| std::fs::read_dir(cgroup)).into_iter().flatten().flatten().flatten();
    let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).take(CGROUPS);
    below.map(|entry| entry.path()).collect()
}

fn processes_in(cgroup: &Path) -> BTreeSet<i32> {
    let mut text = String::new();
    let Ok(list) = std::fs::File::open(cgroup.join("cgroup.procs")) else { return BTreeSet::new() };
    // A cgroup with threads alone has no such list.
    match list.take(PROCESSES).read_to_string(&mut text) {
        Ok(_length) => text.lines().filter_map(|pid| pid.parse::<i32>().ok()).collect(),
        Err(_) => BTreeSet::new(),
    }
}

/// Does a process of this user's call itself conmon?
fn is_conmon(pid: i32, owner: u32) -> bool {
    let path = PathBuf::from(format!("/proc/{pid}"));
    std::fs::read(path.join("comm")).is_ok_and(|comm| comm == b"conmon\n") && owned_by(&path, owner)
}

/// The container's main process, if `pid` is the conmon of this user's container `name`.
fn of_conmon(pid: i32, owner: u32, name: &str) -> Option<i32> {
    let path = PathBuf::from(format!("/proc/{pid}"));
    // A process's name and owner are cheap to read; the rest follows only for a conmon of this user's.
    if !is_conmon(pid, owner) || !is_in_own_namespace(&path) {
        return None;
    }
    let conmon = Conmon::parse(&command_line(&path)?).filter(|conmon| conmon.name == name)?;
    // Written once the container's namespaces exist.
    number_in(Path::new(&conmon.pidfile)).filter(|&child| parent(child) == Some(pid))
}

/// Is the process in the process namespace of this /proc? A process in a namespace below has a number in each (NSpid).
fn is_in_own_namespace(process: &Path) -> bool {
    std::fs::read_to_string(process.join("status")).is_ok_and(|status| has_one_number(&status))
}

pub(crate) fn has_one_number(status: &str) -> bool {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    // A kernel without process namespaces shows none.
    numbers.is_none_or(|numbers| numbers.split_whitespace().count() == 1)
}

/// The start of its command line, in whole words.
fn command_line(process: &Path) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    let _length =
        std::fs::File::open(process.join("cmdline")).ok()?.take(COMMAND_LINE).read_to_end(&mut line).ok()?;
    line.truncate(line.iter().rposition(|&byte| byte == 0)?);
    Some(line)
}

/// The owner of a process may call it conmon, and have it name any file: an endless one, or a pipe without a writer.
fn number_in(pidfile: &Path) -> Option<i32> {
    read_bounded::read(pidfile, NUMBER, Link::Refuse).ok()?.trim().parse().ok()
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

/// What podman says about the container.
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
/// When podman cannot be run or fails for another reason than an unknown name.
pub async fn inspect(name: &str) -> anyhow::Result<Inspected> {
    let mut podman = Command::new("podman");
    podman
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
