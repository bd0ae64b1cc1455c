//! What the kernel says about a running process: its memory, its descriptors, its processor time, its session.

use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::peers::wait_for;
use crate::sys;

/// The id of the user `nobody`, who has no rights.
pub const NOBODY: u32 = 65534;

/// One open descriptor: its number and what it leads to (`socket:[123]`, `pipe:[456]`, a path).
pub type Descriptor = (i32, String);

/// The open descriptors of `pid`.
pub fn descriptors(pid: i32) -> Result<Vec<Descriptor>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // A descriptor may be closed while we look.
        if let Ok(link) = std::fs::read_link(entry.path()) {
            let number = entry.file_name().to_string_lossy().parse()?;
            all.push((number, link.to_string_lossy().into_owned()));
        }
    }
    Ok(all)
}

/// How many pipe ends `pid` holds.
pub fn pipe_ends(pid: i32) -> Result<usize> {
    Ok(descriptors(pid)?.iter().filter(|(_, what)| what.starts_with("pipe:")).count())
}

/// Of how many pipes both ends are among `descriptors`: a process's own, unlike those that it was given.
#[must_use]
pub fn own_pipes(descriptors: &[Descriptor]) -> usize {
    let mut ends: Vec<&str> = descriptors.iter().map(|(_, what)| what.as_str()).collect();
    ends.retain(|what| what.starts_with("pipe:"));
    ends.sort_unstable();
    ends.chunk_by(|one, other| one == other).filter(|ends| ends.len() > 1).count()
}

/// The sockets of `pid`, as descriptors of our own that lead to the same sockets.
pub fn sockets(pid: i32) -> Result<Vec<OwnedFd>> {
    let pidfd = sys::pidfd_open(pid)?;
    let mut sockets = Vec::new();
    for (number, what) in descriptors(pid)? {
        if what.starts_with("socket:") {
            sockets.extend(sys::pidfd_getfd(pidfd.as_fd(), number).ok());
        }
    }
    Ok(sockets)
}

/// The memory of `pid` in KiB: what it has allocated (RssAnon). The program's own pages, which it shares with every other
/// instance, do not depend on what it does.
pub fn memory_kib(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).context("no RssAnon line")?;
    Ok(line.split_whitespace().nth(1).context("RssAnon has no value")?.parse()?)
}

/// Pages that no other process has (proc_pid_smaps(5)), in KiB.
pub fn private_kib(pid: i32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let values =
        text.lines().filter(|line| line.starts_with("Private_Clean:") || line.starts_with("Private_Dirty:"));
    values
        .map(|line| line.split_whitespace().nth(1).context("a size")?.parse::<u64>().context("in KiB"))
        .sum()
}

/// The processor time that `pid` has used, user and system together.
pub fn cpu_time(pid: i32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = after_name(&stat)?;
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // USER_HZ is 100 on every architecture that a container host has.
    Ok(Duration::from_millis(ticks * 10))
}

/// The processor time that the first thread of `pid` has had, to the nanosecond (the first number of its schedstat).
pub fn first_thread_time(pid: i32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
    Ok(Duration::from_nanos(text.split_whitespace().next().context("a number")?.parse()?))
}

/// The time of the clock that all processes of this machine share.
pub fn monotonic() -> Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?.into())
}

/// The fields of /proc/PID/stat from the third (state) on: the name before them may hold anything.
fn after_name(stat: &str) -> Result<Vec<&str>> {
    let (_, rest) = stat.rsplit_once(')').context("stat without a name")?;
    Ok(rest.split_whitespace().collect())
}

/// The program name of `pid`, as the kernel knows it.
#[must_use]
pub fn name(pid: i32) -> Option<String> {
    Some(std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned())
}

/// The children of `pid`.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

/// The relay process of the forwarder `pid`, which holds its connections; itself, while it has none.
#[must_use]
pub fn relay(pid: i32) -> i32 {
    children(pid).into_iter().find(|child| name(*child).as_deref() == Some("bro-relay")).unwrap_or(pid)
}

/// The living processes of the session `session`.
#[must_use]
pub fn members(session: i32) -> Vec<i32> {
    let Ok(proc) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = proc.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        after_name(&stat).is_ok_and(|fields| {
            fields.get(3).is_some_and(|id| id.parse() == Ok(session)) && !matches!(fields[0], "Z" | "X")
        })
    })
    .collect()
}

/// Whether `pid` has ended within `within`.
pub fn ends(pid: i32, within: Duration) -> Result<bool> {
    match sys::pidfd_open(pid) {
        Ok(pidfd) => Ok(!wait_for(pidfd.as_fd(), PollFlags::POLLIN, within)?.is_empty()),
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Asks `what` again and again, a few milliseconds apart, until it says yes or `within` has passed.
pub fn eventually(within: Duration, mut what: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + within;
    loop {
        if what() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A service's processes, in a session of their own. Dropping it ends them all.
#[derive(Debug)]
pub struct Session(pub Child);

impl Drop for Session {
    fn drop(&mut self) {
        let session = self.0.id().cast_signed();
        // At once and in good order, which for PostgreSQL is SIGQUIT and for the others SIGTERM; then SIGKILL for what is left.
        for signal in [Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGKILL] {
            for pid in members(session) {
                kill(Pid::from_raw(pid), signal).ok();
            }
            if eventually(Duration::from_secs(2), || members(session).is_empty()) {
                break;
            }
        }
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
