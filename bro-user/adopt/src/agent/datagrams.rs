//! bind(2) of a socket for datagrams, which never listens: from then on they come, so that is when it gets systemd's.
//!
//! The address is in the caller's memory, which is read once. The agent binds the service's own socket to what it has read, which so is kept for clients
//! inside as a stream's is, and answers; the call is never continued after that. Whatever the memory says by then, the container has got nothing
//! but the one socket that is for the place it named.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{SockaddrStorage, bind, getsockopt, setsockopt, sockopt};

use super::{Adoptable, Agent};
use crate::caller::Caller;
use crate::family::Family;
use crate::notification::{Answer, Raw};
use crate::original::Original;
use crate::socket::{Place, Seen};
use crate::surroundings::{Misfit, Step, Surroundings};

impl<S: Surroundings> Agent<S> {
    /// Is there a socket for datagrams that a service could get?
    pub(super) fn has_datagrams(&self) -> bool {
        self.listeners.iter().any(|listener| listener.seen.family.is_datagrams())
    }

    /// A bind(2) by one of the container's own processes of this socket of its own.
    pub(super) fn bind_datagrams(
        &mut self,
        by: u64,
        caller: &Caller<'_>,
        notification: &Raw,
        (socket, seen): (OwnedFd, Seen),
    ) -> Option<Answer> {
        let [number, address, length, ..] = notification.arguments;
        if let Some(index) = self.listener_of(socket.as_fd()) {
            // The call was interrupted after all was done, and comes again.
            self.is_held_by(index, by);
            return Some(Answer::Done);
        }
        // The kernel itself finds what is wrong with it.
        let Some(address) = caller.address_at(address, length) else { return Some(Answer::Continue) };
        if address.is_ipv6() != seen.family.is_v6() {
            return Some(Answer::Continue);
        }
        let seen = Seen { family: family_when_bound(seen.family, address), ..seen };
        let chosen = self.choose(&Place::Udp(address), seen.family);
        let _any = self.clear_the_way(&seen, address);
        let index = match chosen {
            None => return Some(Answer::Continue),
            Some(Err(listener)) => return Some(self.not_adopted(listener, Misfit::Family)),
            Some(Ok(index)) => index,
        };
        if !self.surroundings.claim(index) {
            return Some(self.not_adopted(index, Misfit::Relayed));
        }
        let adopted = match self.bind_itself(index, &socket, address) {
            Ok(place) => {
                self.surroundings.reached(Step::Bound);
                self.adopt(index, caller, (number as RawFd, by), socket, (place, seen))
            }
            // Where this process may not, the container's own may: its clients inside find nothing there then, and those outside do.
            Err(Errno::EACCES) => {
                let place = Place::Udp(address);
                self.adopt(index, caller, (number as RawFd, by), socket, (place, seen))
            }
            Err(errno) => {
                self.leave(index);
                return Some(Answer::Failed(errno));
            }
        };
        match adopted {
            Ok(()) => Some(Answer::Done),
            // The call was interrupted, and comes again.
            Err(Misfit::Replacing(error)) if error.raw_os_error() == Some(libc::ENOENT) => {
                self.leave(index);
                None
            }
            Err(why) => {
                self.leave(index);
                let _continued = self.not_adopted(index, why);
                // Of the kernel it would hear that the socket is bound already.
                let bound =
                    caller.duplicate(number as RawFd).ok().and_then(|socket| Place::of(socket.as_fd()));
                let is_bound = bound.is_some_and(|place| place.is_bound());
                Some(if is_bound { Answer::Done } else { Answer::Continue })
            }
        }
    }

    /// Binds the service's socket, where that was not done before; where it is.
    fn bind_itself(&self, index: usize, socket: &OwnedFd, address: SocketAddr) -> nix::Result<Place> {
        let bind = || bind(socket.as_raw_fd(), &SockaddrStorage::from(address));
        let bound = match bind() {
            // Perhaps by one that this agent has let go, and that the service manager closes later ([`Original::make_way`]).
            Err(Errno::EADDRINUSE) if !getsockopt(socket, sockopt::ReuseAddr)? => {
                setsockopt(socket, sockopt::ReuseAddr, &true)?;
                let bound = bind();
                setsockopt(socket, sockopt::ReuseAddr, &false)?;
                bound
            }
            bound => bound,
        };
        match bound {
            // By this agent or its predecessor, if it is for this listener.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
        let place = Place::of(socket.as_fd()).filter(Place::is_bound).ok_or(Errno::EINVAL)?;
        let is_meant = |listener: &Adoptable| place.serves(&listener.target);
        if self.listeners.get(index).is_some_and(is_meant) { Ok(place) } else { Err(Errno::EINVAL) }
    }

    /// An original of another socket at this address would be in the way of the next. Says whether there was one.
    pub(super) fn clear_the_way(&mut self, seen: &Seen, address: SocketAddr) -> bool {
        let (in_the_way, kept) =
            std::mem::take(&mut self.originals).into_iter().partition(|original: &Original| {
                original.seen.cookie != seen.cookie && original.is_in_the_way_of(seen.family, address)
            });
        self.originals = kept;
        let any = !in_the_way.is_empty();
        self.let_go(in_the_way);
        any
    }

    fn leave(&mut self, index: usize) {
        if !self.listeners.get(index).is_some_and(Adoptable::is_held) {
            self.surroundings.unclaim(index);
        }
    }
}

/// A socket that is bound to one IPv6 address has no IPv4 clients any more (`__inet6_bind`).
const fn family_when_bound(family: Family, address: SocketAddr) -> Family {
    match (family, address) {
        (Family::UdpDual, SocketAddr::V6(v6))
            if !v6.ip().is_unspecified() && v6.ip().to_ipv4_mapped().is_none() =>
        {
            Family::UdpV6Only
        }
        _ => family,
    }
}
