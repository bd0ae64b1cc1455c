//! A service that has closed its listener while it lives, or shut it down: systemd's goes on listening, so its clients would wait for ever. Without
//! adoption they would be refused.
//!
//! A listener at which clients wait, and that no process of another network namespace has had for a while, is given up: a supervisor inside
//! the container has that long to start the service again. Only the socket's own number is looked for: what the container says of itself
//! has no part in it.

use std::fs::{read_dir, read_link, read_to_string};
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;

use super::{Adoptable, Agent, ListenerState};
use crate::surroundings::{Event, Surroundings};

/// Between two looks.
const STEP: Duration = Duration::from_secs(1);

/// How long clients wait before it is asked who has the listener: a service that is busy takes them in this time.
const PATIENCE: Duration = STEP;

/// How long no process has the listener before it is given up. A supervisor's next process, which may start as slowly as Java does, takes
/// those that wait meanwhile.
const GAP: Duration = Duration::from_secs(10);

/// When to look next.
#[derive(Debug, Default)]
pub(super) struct QueueLooks(Option<Instant>);

impl QueueLooks {
    /// For as long as a service has a listener.
    pub(super) fn next(&mut self, any: bool, now: Instant) -> Option<Instant> {
        self.0 = any.then(|| self.0.unwrap_or(now + STEP));
        self.0
    }

    /// Is it time for one?
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = self.0.is_some_and(|at| at <= now);
        if due {
            self.0 = None;
        }
        due
    }
}

/// Clients that wait at an adopted listener, as the looks have found it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    since: Option<Instant>,
    /// Who had it at the last look.
    holder: QueueHolder,
}

#[derive(Debug, Default)]
enum QueueHolder {
    #[default]
    Unknown,
    /// A descriptor of the listener, in /proc.
    Process(PathBuf),
    NoneSince(Instant),
}

impl<S: Surroundings> Agent<S> {
    /// Gives up what no service has any more.
    pub(super) fn look_who_has_it(&mut self, now: Instant) {
        for index in 0..self.listeners.len() {
            let Some(listener) = self.listeners.get_mut(index).filter(|listener| listener.is_held()) else {
                continue;
            };
            if listener.is_closed(now) {
                self.give_up(index);
            }
        }
    }

    /// The service listens there no longer. Its clients are not its own to wait for.
    fn give_up(&mut self, index: usize) {
        if let Some(ListenerState::Adopted { by, .. }) =
            self.listeners.get_mut(index).map(|listener| &mut listener.state)
        {
            by.clear();
        }
        self.release(index);
        self.surroundings.unclaim(index);
        self.surroundings.tell(Event::Closed { listener: index });
    }
}

impl Adoptable {
    /// Do clients wait, and has no process of a container the listener?
    fn is_closed(&mut self, now: Instant) -> bool {
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let waits = poll(&mut polled, PollTimeout::ZERO).is_ok()
            && polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
        if !waits {
            self.queue = Queue::default();
            return false;
        }
        let since = *self.queue.since.get_or_insert(now);
        if now.saturating_duration_since(since) < PATIENCE {
            return false;
        }
        let Ok(inode) = fstat(&self.socket).map(|status| status.st_ino) else { return false };
        let holder = match std::mem::take(&mut self.queue.holder) {
            QueueHolder::Process(path) if leads_to(&path, inode) => QueueHolder::Process(path),
            before => match (elsewhere(inode), before) {
                (Some(path), _) => QueueHolder::Process(path),
                (None, QueueHolder::NoneSince(since)) => QueueHolder::NoneSince(since),
                (None, QueueHolder::Unknown | QueueHolder::Process(_)) => QueueHolder::NoneSince(now),
            },
        };
        let gone =
            matches!(holder, QueueHolder::NoneSince(since) if now.saturating_duration_since(since) >= GAP);
        self.queue.holder = holder;
        gone
    }
}

/// A descriptor of this socket, of a process in another network namespace than this one: its file in fd or fdinfo, or the process's folder where the kernel does
/// not tell. A process whose namespace may not be looked at is none: the agent could not have given it the listener (ptrace(2), PTRACE_MODE_READ_FSCREDS).
fn elsewhere(inode: u64) -> Option<PathBuf> {
    let here = read_link("/proc/self/ns/net").ok()?;
    bro_proc::processes()
        .map(|(_, process)| process)
        .filter(|process| read_link(process.join("ns/net")).is_ok_and(|its| its != here))
        .find_map(|process| match read_dir(process.join("fd")) {
            Ok(all) => all.flatten().map(|descriptor| descriptor.path()).find(|path| leads_to(path, inode)),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => by_information(&process, inode),
            // It has ended.
            Err(_) => None,
        })
}

/// The same of a process of another user than the one whom the container belongs to, whose descriptors are not for others to follow.
fn by_information(process: &Path, inode: u64) -> Option<PathBuf> {
    let all = match read_dir(process.join("fdinfo")) {
        Ok(all) => all.flatten().map(|descriptor| descriptor.path()),
        Err(error) => return (error.kind() == ErrorKind::PermissionDenied).then(|| process.to_owned()),
    };
    for path in all {
        match number_of(&path) {
            Ok(Some(number)) if number == inode => return Some(path),
            // Linux before 5.14 does not tell.
            Ok(None) => return Some(process.to_owned()),
            Ok(Some(_)) | Err(_) => {}
        }
    }
    None
}

/// The number of what a file in fdinfo is about (`seq_show` in fs/proc/fd.c).
fn number_of(information: &Path) -> std::io::Result<Option<u64>> {
    let text = read_to_string(information)?;
    Ok(text.lines().find_map(|line| line.strip_prefix("ino:")?.trim().parse().ok()))
}

/// Is this file in fd or fdinfo about that socket?
fn leads_to(path: &Path, inode: u64) -> bool {
    match read_link(path) {
        Ok(target) => target.as_os_str() == format!("socket:[{inode}]").as_str(),
        Err(_) => number_of(path).is_ok_and(|number| number == Some(inode)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn looks_go_on_while_there_is_something_to_look_at() {
        let (mut looks, now) = (QueueLooks::default(), Instant::now());
        assert_eq!(looks.next(false, now), None);
        assert_eq!(looks.next(true, now), Some(now + STEP));
        assert_eq!(looks.next(true, now + STEP / 2), Some(now + STEP));
        assert!(!looks.is_due(now) && looks.is_due(now + STEP) && !looks.is_due(now + STEP));
        assert_eq!(looks.next(true, now + STEP), Some(now + 2 * STEP));
        assert_eq!(looks.next(false, now + STEP), None);
    }

    #[test]
    fn what_this_namespace_has_counts_for_nothing() {
        let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(elsewhere(fstat(&own).unwrap().st_ino), None);
    }

    #[test]
    fn a_descriptor_is_found_by_either_folder() {
        let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = fstat(&own).unwrap().st_ino;
        let process = Path::new("/proc/self");
        let of = |folder: &str| process.join(folder).join(own.as_raw_fd().to_string());
        assert!(leads_to(&of("fd"), inode) && leads_to(&of("fdinfo"), inode));
        assert!(!leads_to(&of("fd"), inode + 1) && !leads_to(&of("fdinfo"), inode + 1));
        assert_eq!(by_information(process, inode), Some(of("fdinfo")));
        drop(own);
        assert_eq!(by_information(process, inode), None);
    }

    #[test]
    fn where_the_kernel_does_not_tell_the_service_is_taken_to_have_it() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-fdinfo-XXXXXX")).unwrap();
        std::fs::create_dir(folder.join("fdinfo")).unwrap();
        std::fs::write(folder.join("fdinfo/3"), "pos:\t0\nflags:\t02\nmnt_id:\t9\n").unwrap();
        assert_eq!(by_information(&folder, 1), Some(folder.clone()));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
