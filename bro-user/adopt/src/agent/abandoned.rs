//! A service that has closed its listener while it lives, or shut it down: systemd's goes on listening, so its clients would wait for ever. Without
//! adoption they would be refused.
//!
//! A listener at which clients wait at two looks in a row, and that no process of another network namespace has, is given up. Only the
//! socket's own number is looked for: what the container says of itself has no part in it.

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

/// When to look next.
#[derive(Debug, Default)]
pub(super) struct Looks(Option<Instant>);

impl Looks {
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
    /// A descriptor of the listener, in /proc, by which it was held at the last look.
    holder: Option<PathBuf>,
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
        let link = format!("socket:[{inode}]");
        let leads_there =
            |path: &Path| std::fs::read_link(path).is_ok_and(|target| target.as_os_str() == link.as_str());
        if !self.queue.holder.as_deref().is_some_and(leads_there) {
            self.queue.holder = elsewhere(leads_there);
        }
        self.queue.holder.is_none()
    }
}

/// A descriptor for which `is_it` holds, of a process in another network namespace than this one. What may not be looked at is none: an agent that
/// could not look at the container's processes could not have given them the listener either (ptrace(2), PTRACE_MODE_READ_FSCREDS).
fn elsewhere(is_it: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let here = std::fs::read_link("/proc/self/ns/net").ok()?;
    bro_proc::processes()
        .filter(|(_, process)| std::fs::read_link(process.join("ns/net")).is_ok_and(|its| its != here))
        .flat_map(|(_, process)| std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten())
        .map(|descriptor| descriptor.path())
        .find(|path| is_it(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_go_on_while_there_is_something_to_look_at() {
        let (mut looks, now) = (Looks::default(), Instant::now());
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
        let link = format!("socket:[{}]", fstat(&own).unwrap().st_ino);
        let is_it = |path: &Path| std::fs::read_link(path).is_ok_and(|it| it.as_os_str() == link.as_str());
        assert_eq!(elsewhere(is_it), None);
    }
}
