//! shutdown(2): must not end systemd's listening for every later instance.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::Shutdown;

use super::Agent;
use crate::caller::Caller;
use crate::inside::{ClientPlace, connect_to};
use crate::notification::{Answer, Raw};
use crate::options::{is_nonblocking, set_nonblocking};
use crate::surroundings::{Event, Surroundings};

impl<S: Surroundings> Agent<S> {
    /// The agent shuts its own duplicate of the socket down, which is the same socket, and returns what comes of it. The call is never
    /// continued: another thread could have put a listener at the descriptor by then. `None` when the caller waits no longer.
    pub(super) fn shutdown(&mut self, notify: BorrowedFd<'_>, notification: &Raw) -> Option<Answer> {
        let [number, how, ..] = notification.arguments;
        let number = number as RawFd;
        let how = match how as i32 {
            0 => Shutdown::Read,
            // No notification is made of it, and a listening socket takes it without effect (`inet_shutdown`).
            1 => return Some(Answer::Continue),
            2 => Shutdown::Both,
            _ => return Some(Answer::Failed(Errno::EINVAL)),
        };
        let (caller, duplicate) = match self.duplicate_of(notify, notification, number) {
            Ok(found) => found,
            Err(error) => {
                let errno = bro_relay::sys::errno_of(&error);
                return (errno != Errno::ESRCH).then_some(Answer::Failed(errno));
            }
        };
        let socket = match duplicate {
            Ok(socket) => socket,
            Err(error) => return Some(Answer::Failed(bro_relay::sys::errno_of(&error))),
        };
        Some(match self.listener_of(socket.as_fd()) {
            Some(listener) => self.give_back(listener, &caller, notification, number, how),
            None => shut(&socket, how),
        })
    }

    /// The caller, and a duplicate of its descriptor. A service shuts down each connection that it ends, so this is as short as can be.
    fn duplicate_of<'a>(
        &mut self,
        notify: BorrowedFd<'a>,
        notification: &Raw,
        number: RawFd,
    ) -> io::Result<(Caller<'a>, io::Result<OwnedFd>)> {
        if let Some(caller) = self.late.of(notify, notification) {
            let duplicate = caller.duplicate(number);
            let has_ended = |error: &io::Error| bro_relay::sys::errno_of(error) == Errno::ESRCH;
            if !duplicate.as_ref().is_err_and(has_ended) {
                return Ok((caller, duplicate));
            }
        }
        let caller = self.late.look_up(notify, notification)?;
        let duplicate = caller.duplicate(number);
        Ok((caller, duplicate))
    }

    /// The service gets its own socket again, shut down as it wants. A thread that is blocked in accept(2) at the listener is not woken by
    /// that, so a connection is made that wakes it; its next accept(2) fails with EINVAL, as without adoption.
    fn give_back(
        &mut self,
        index: usize,
        caller: &Caller<'_>,
        notification: &Raw,
        number: RawFd,
        how: Shutdown,
    ) -> Answer {
        let Some(listener) = self.listeners.get(index) else { return Answer::Done };
        let is_datagrams = listener.seen.family.is_datagrams();
        let Some(at) = self.originals.iter().position(|original| original.listener == index) else {
            // What the kernel says of a socket without a peer.
            return if is_datagrams { Answer::Failed(Errno::ENOTCONN) } else { Answer::Done };
        };
        let original = self.originals.remove(at);
        let flag = is_nonblocking(listener.socket.as_fd())
            .and_then(|nonblocking| set_nonblocking(original.socket.as_fd(), nonblocking));
        let close_on_exec = caller.closes_on_exec(number).unwrap_or(true);
        let replaced = flag
            .map_err(io::Error::from)
            .and_then(|()| caller.replace(original.socket.as_fd(), number, close_on_exec));
        if let Err(error) = replaced {
            tracing::debug!(%error, id = notification.id, "a service keeps the listener that it has shut down");
            self.originals.insert(at, original);
            return Answer::Done;
        }
        let answer = shut(&original.socket, how);
        // What waits for a datagram goes on waiting for the next: one that is sent for it would stay and wake the service again if nothing waits.
        if !is_datagrams && let Err(error) = connect_to(listener.socket.as_fd(), ClientPlace::Here) {
            tracing::debug!(%error, "whatever waits in accept(2) goes on waiting");
        }
        self.let_go(vec![original]);
        self.surroundings.tell(Event::GivenBack { listener: index });
        answer
    }
}

fn shut(socket: &OwnedFd, how: Shutdown) -> Answer {
    match nix::sys::socket::shutdown(socket.as_raw_fd(), how) {
        Ok(()) => Answer::Done,
        Err(errno) => Answer::Failed(errno),
    }
}
