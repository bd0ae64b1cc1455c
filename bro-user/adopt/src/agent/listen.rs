//! listen(2): the moment in which a service is ready, its socket bound and its options set. That is when it gets systemd's listener.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd};

use nix::libc;

use super::{Adoptable, Agent, ListenerState};
use crate::caller::Caller;
use crate::family::Family;
use crate::notification::{Answer, Raw};
use crate::options::Before;
use crate::original::Original;
use crate::socket::{Place, Seen, look};
use crate::store::Kind;
use crate::surroundings::{Event, Misfit, Step, Surroundings};
use crate::{epoll, health, options};

impl<S: Surroundings> Agent<S> {
    /// A listen(2) of one of the container's own processes. What is not for any listener, or does not fit, the kernel does itself.
    pub(super) fn listen(&mut self, by: u64, caller: &Caller<'_>, notification: &Raw) -> Option<Answer> {
        let number = notification.arguments[0] as RawFd;
        let Ok(socket) = caller.duplicate(number) else { return Some(Answer::Continue) };
        if let Some(index) = self.listener_of(socket.as_fd()) {
            self.is_held_by(index, by);
            return Some(Answer::Done);
        }
        let bound = Place::of(socket.as_fd()).zip(look(socket.as_fd()));
        let Some((place, seen)) = bound else { return Some(Answer::Continue) };
        // The kernel says that such a socket does not listen.
        if seen.family.is_datagrams() {
            return Some(Answer::Continue);
        }
        let index = match self.choose(&place, seen.family) {
            None => return Some(Answer::Continue),
            Some(Err(listener)) => return Some(self.not_adopted(listener, Misfit::Family)),
            Some(Ok(index)) => index,
        };
        let number = (number, by);
        if !self.surroundings.claim(index) {
            return Some(self.not_adopted(index, Misfit::Relayed));
        }
        let adopted = self.adopt(index, caller, number, socket, (place, seen));
        if adopted.is_err() && !self.listeners.get(index).is_some_and(Adoptable::is_held) {
            self.surroundings.unclaim(index);
        }
        match adopted {
            Ok(()) => Some(Answer::Done),
            // The call was interrupted, and comes again.
            Err(Misfit::Replacing(error)) if error.raw_os_error() == Some(libc::ENOENT) => None,
            Err(why) => Some(self.not_adopted(index, why)),
        }
    }

    /// A listen(2) of a command that was executed in the container, which has nothing to adopt: done already if it is at a listener of systemd's, or
    /// else its backlog would be the command's.
    pub(super) fn listen_again(&self, caller: &Caller<'_>, notification: &Raw) -> Option<Answer> {
        let socket = caller.duplicate(notification.arguments[0] as RawFd).ok();
        let listener = socket.and_then(|socket| self.listener_of(socket.as_fd()));
        Some(if listener.is_some() { Answer::Done } else { Answer::Continue })
    }

    pub(super) fn not_adopted(&mut self, listener: usize, why: Misfit) -> Answer {
        self.surroundings.tell(Event::NotAdopted { listener, why });
        Answer::Continue
    }

    /// Puts listener `index` in the place of the caller's descriptor. Everything before that may be done again, and is without effect if it is the last.
    pub(super) fn adopt(
        &mut self,
        index: usize,
        caller: &Caller<'_>,
        (number, by): (RawFd, u64),
        socket: OwnedFd,
        (place, seen): (Place, Seen),
    ) -> Result<(), Misfit> {
        let last = self.last + 1;
        // A predecessor may have stored it before it was killed.
        let known = self.originals.iter().any(|original| original.seen.cookie == seen.cookie);
        let is_bound = Place::of(socket.as_fd()).is_some_and(|place| place.is_bound());
        let may_keep = self.may_keep() && seen.family != Family::UnixPackets && !known && is_bound;
        let Some(listener) = self.listeners.get_mut(index) else { return Ok(()) };
        health::check(listener.socket.as_fd())?;
        let close_on_exec = caller.closes_on_exec(number).map_err(Misfit::Replacing)?;

        if matches!(listener.state, ListenerState::Free) {
            let before = Before::of(listener.socket.as_fd(), listener.seen.family);
            let before = before.map_err(|errno| Misfit::Options(errno.into()))?;
            listener.state = ListenerState::Adopted { by: Vec::new(), before };
            // Before anything is set.
            self.note();
        }
        let Some(listener) = self.listeners.get(index) else { return Ok(()) };
        // An original's flag is this agent's: workers that listen one after the other at what they have inherited share it.
        let flag = if known {
            Ok(())
        } else {
            options::carry_nonblocking(socket.as_fd(), listener.socket.as_fd(), !listener.is_held())
        };
        let carried = flag
            .map_err(Into::into)
            .and_then(|()| options::carry(socket.as_fd(), seen.family, listener.socket.as_fd()));
        let options_refused = carried.map_err(|error| self.undo(index, Misfit::Options(error)))?;
        self.surroundings.reached(Step::Carried);

        let moved = self.watch_instead(index, caller, number, socket.as_fd());
        moved.map_err(|error| self.undo(index, Misfit::Epoll(error)))?;
        self.surroundings.reached(Step::Watched);

        let name = Kind::Original.name(last);
        if may_keep {
            self.last = last;
            self.surroundings.store(&name, socket.as_fd(), false);
        }
        self.surroundings.reached(Step::Kept);

        let Some(listener) = self.listeners.get(index) else { return Ok(()) };
        if let Err(error) = caller.replace(listener.socket.as_fd(), number, close_on_exec) {
            // Back to the service's own: the one that watches now is not its.
            if let Err(error) = epoll::watch_instead(caller, number, listener.socket.as_fd(), socket.as_fd())
            {
                tracing::debug!(%error, "a listener that was not adopted is watched by epoll");
            }
            if may_keep {
                self.surroundings.forget(&name);
            }
            return Err(self.undo(index, Misfit::Replacing(error)));
        }
        self.surroundings.reached(Step::Replaced);

        self.is_held_by(index, by);
        let mut inside = None;
        if may_keep {
            let mut original = Original { socket, place, seen, listener: index, name, open: false };
            inside = original.open().err();
            self.originals.push(original);
        }
        self.surroundings.tell(Event::Adopted { listener: index, options_refused, inside });
        Ok(())
    }

    fn watch_instead(
        &self,
        index: usize,
        caller: &Caller<'_>,
        number: RawFd,
        socket: BorrowedFd<'_>,
    ) -> std::io::Result<usize> {
        let Some(listener) = self.listeners.get(index) else { return Ok(0) };
        epoll::watch_instead(caller, number, socket, listener.socket.as_fd())
    }

    /// A listener that no service has after all is as it was.
    fn undo(&mut self, index: usize, why: Misfit) -> Misfit {
        if self.listeners.get(index).is_some_and(|listener| !listener.is_held()) {
            self.release(index);
        }
        why
    }
}
