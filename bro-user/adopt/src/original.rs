//! The sockets that a service made itself, kept for clients inside the container: health checks, other containers of its pod, the
//! service's own tools. They are bound where such clients look, so the agent listens at them and relays to the host's listener.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::sys::socket::{Backlog, Shutdown, listen, setsockopt, shutdown, sockopt};

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

    /// Has its address free for a socket with SO_REUSEADDR, although others have this one open still: the service manager closes what it keeps no longer in
    /// a thread of its own, at any later time. Two such sockets may have one address as long as none of them listens there (socket(7), `inet_bind_conflict`).
    pub fn make_way(&self) {
        if !matches!(self.place, Place::Tcp(_) | Place::Udp(_)) {
            return;
        }
        // It listens no more, and keeps its address. ENOTCONN: it did not listen, or is for datagrams, and is shut down all the same (`inet_shutdown`).
        shutdown(self.socket.as_raw_fd(), Shutdown::Both).ok();
        if let Err(error) = setsockopt(&self.socket, sockopt::ReuseAddr, &true) {
            tracing::debug!(%error, "an address inside is not free until all have closed its socket");
        }
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
    fn a_socket_that_is_open_elsewhere_makes_way_for_the_next() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, socket};
        let first = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = first.local_addr().unwrap();
        let elsewhere = first.try_clone().unwrap();
        let seen = Seen { cookie: 1, family: Family::V4 };
        let place = Place::Tcp(address);
        let original =
            Original { socket: first.into(), place, seen, listener: 0, name: String::new(), open: true };
        let next = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let bound = || bind(next.as_raw_fd(), &SockaddrStorage::from(address));
        assert_eq!(bound(), Err(nix::errno::Errno::EADDRINUSE));
        setsockopt(&next, sockopt::ReuseAddr, &true).unwrap();
        assert_eq!(bound(), Err(nix::errno::Errno::EADDRINUSE));
        original.make_way();
        drop(original);
        bound().unwrap();
        listen(&next, Backlog::new(1).unwrap()).unwrap();
        assert_eq!(elsewhere.local_addr().unwrap(), address);
        let _client = std::net::TcpStream::connect(address).unwrap();
    }

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
