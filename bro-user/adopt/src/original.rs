//! The sockets that a service made itself, kept for clients inside the container: health checks, other containers of its pod, the
//! service's own tools. They are bound where such clients look, so the agent listens at them and relays to the host's listener.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::sys::socket::{Backlog, listen};

use crate::family::Family;
use crate::options::set_nonblocking;
use crate::socket::{Place, Seen};

/// The most that are kept: a service with a socket for each of its workers has several at one place.
pub const MOST: usize = 32;

/// Their queues: for clients inside alone.
const BACKLOG: i32 = 128;

/// A socket that was replaced.
#[derive(Debug)]
pub struct Original {
    /// The socket.
    pub socket: OwnedFd,
    /// Where it is bound, in the container.
    pub place: Place,
    /// What it is.
    pub seen: Seen,
    /// Which of the listeners has taken its place.
    pub listener: usize,
    /// Its name in the store, which it keeps if the agent ends.
    pub name: String,
    /// It listens.
    pub open: bool,
}

impl Original {
    /// Listens at it from now on, or has its datagrams. It becomes non-blocking: whatever it is shared with has a listener of the host's instead.
    ///
    /// # Errors
    /// listen(2)'s: EADDRINUSE when another one listens there.
    pub fn open(&mut self) -> io::Result<()> {
        set_nonblocking(self.socket.as_fd(), true)?;
        if !self.seen.family.is_datagrams() {
            listen(&self.socket, Backlog::new(BACKLOG)?)?;
        }
        self.open = true;
        Ok(())
    }

    /// A client.
    ///
    /// # Errors
    /// accept4(2)'s.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        bro_relay::sys::accept(self.socket.as_fd()).map(|(client, _)| client)
    }

    /// What to poll.
    pub fn polled(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Would a bind(2) of a socket of this family at this address find it in the way? (`inet_rcv_saddr_equal`)
    #[must_use]
    pub fn is_in_the_way_of(&self, family: Family, wanted: SocketAddr) -> bool {
        let (Place::Tcp(here) | Place::Udp(here)) = self.place else { return false };
        if self.seen.family.is_datagrams() != family.is_datagrams() {
            return false;
        }
        let same_version = self.seen.family.is_v6() == family.is_v6()
            || [self.seen.family, family].into_iter().any(Family::is_dual);
        let (one, other) = (here.ip().to_canonical(), wanted.ip().to_canonical());
        here.port() == wanted.port()
            && same_version
            && (one == other || one.is_unspecified() || other.is_unspecified())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_by_its_own_kind_alone() {
        let original = |family: Family, place: &str| Original {
            socket: std::fs::File::open("/dev/null").unwrap().into(),
            place: if family.is_datagrams() {
                Place::Udp(place.parse().unwrap())
            } else {
                Place::Tcp(place.parse().unwrap())
            },
            seen: Seen { cookie: 1, family },
            listener: 0,
            name: String::new(),
            open: false,
        };
        for (here, at, family, wanted, expected) in [
            (Family::V4, "0.0.0.0:80", Family::V4, "0.0.0.0:80", true),
            (Family::V4, "0.0.0.0:80", Family::V4, "127.0.0.1:80", true),
            (Family::V4, "127.0.0.1:80", Family::V4, "10.0.0.1:80", false),
            (Family::V4, "0.0.0.0:80", Family::V4, "0.0.0.0:81", false),
            // nginx binds both, one after the other.
            (Family::V4, "0.0.0.0:80", Family::V6Only, "[::]:80", false),
            (Family::V4, "0.0.0.0:80", Family::Dual, "[::]:80", true),
            (Family::Dual, "[::]:80", Family::V4, "0.0.0.0:80", true),
            // TCP's ports are not UDP's.
            (Family::V4, "0.0.0.0:53", Family::UdpV4, "0.0.0.0:53", false),
            (Family::UdpV4, "0.0.0.0:53", Family::UdpV4, "0.0.0.0:53", true),
            (Family::UdpV4, "0.0.0.0:53", Family::UdpV6Only, "[::]:53", false),
            (Family::UdpV4, "0.0.0.0:53", Family::UdpDual, "[::]:53", true),
        ] {
            let found = original(here, at).is_in_the_way_of(family, wanted.parse().unwrap());
            assert_eq!(found, expected, "{here:?} {at} and {family:?} {wanted}");
        }
    }
}
