//! A connection from inside a container to the service there, which no longer listens there: relayed to the host's listener.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    MsgFlags, Shutdown, SockaddrLike as _, SockaddrStorage, bind, connect, getpeername, getsockname, recv,
    send, shutdown,
};

use crate::bound;
use crate::clients::ClientEnd;
use crate::socket::{self, Place};
use nix::libc;

/// The most that one direction holds.
const PART: usize = 16 * 1024;

/// A connection with both its ends.
#[derive(Debug)]
pub struct Inside {
    client: OwnedFd,
    host: OwnedFd,
    /// What the host's tables know it by.
    end: Option<ClientEnd>,
    connected: bool,
    to_host: InsideWay,
    to_client: InsideWay,
}

/// One direction: bytes that were read and not yet written, and how far the end is.
#[derive(Debug, Default)]
struct InsideWay {
    held: Vec<u8>,
    at: usize,
    end: WayEnd,
}

#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
enum WayEnd {
    #[default]
    Open,
    /// The FIN was read, and is passed on after the last byte.
    Read,
    PassedOn,
}

/// Whether there is more to come.
#[derive(Debug, PartialEq, Eq)]
pub enum Then {
    /// Poll again.
    On,
    /// Both directions have ended, or the connection is broken.
    Over,
}

impl InsideWay {
    const fn wants_to_read(&self) -> bool {
        self.held.is_empty() && matches!(self.end, WayEnd::Open)
    }

    const fn wants_to_write(&self) -> bool {
        !self.held.is_empty()
    }

    /// Reads once and writes as much as goes.
    fn turn(&mut self, from: &OwnedFd, to: &OwnedFd) -> nix::Result<()> {
        if self.wants_to_read() {
            let mut part = [0; PART];
            match recv(from.as_raw_fd(), &mut part, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => self.end = WayEnd::Read,
                Ok(got) => {
                    self.held = part.get(..got).unwrap_or_default().to_owned();
                    self.at = 0;
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        while let Some(rest) = self.held.get(self.at..).filter(|rest| !rest.is_empty()) {
            match send(to.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => self.at += sent,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        self.held = Vec::new();
        if self.end == WayEnd::Read {
            shutdown(to.as_raw_fd(), Shutdown::Write)?;
            self.end = WayEnd::PassedOn;
        }
        Ok(())
    }
}

impl Inside {
    /// One that was accepted inside, on its way to the host's `listener`.
    ///
    /// # Errors
    /// When that cannot be connected to; a full queue of a unix socket is one.
    pub fn new(client: OwnedFd, listener: BorrowedFd<'_>) -> io::Result<Self> {
        let host = connect_to(listener, ClientPlace::of(client.as_fd()))?;
        Ok(Self {
            end: ClientEnd::of(host.as_fd()),
            client,
            host,
            connected: false,
            to_host: InsideWay::default(),
            to_client: InsideWay::default(),
        })
    }

    /// Its end towards the host's listener.
    pub const fn end(&self) -> Option<ClientEnd> {
        self.end
    }

    /// What to poll, and for what. A side that nothing is wanted of is not polled: its end would be told again and again.
    pub fn polled(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let wanted = |reads: bool, writes: bool| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, reads);
            flags.set(PollFlags::POLLOUT, writes);
            flags
        };
        let sides = if self.connected {
            [
                (self.client.as_fd(), wanted(self.to_host.wants_to_read(), self.to_client.wants_to_write())),
                (self.host.as_fd(), wanted(self.to_client.wants_to_read(), self.to_host.wants_to_write())),
            ]
        } else {
            [(self.client.as_fd(), PollFlags::empty()), (self.host.as_fd(), PollFlags::POLLOUT)]
        };
        sides.into_iter().filter(|(_, flags)| !flags.is_empty())
    }

    /// Moves what there is, without waiting.
    pub fn turn(&mut self) -> Then {
        if !self.connected {
            match socket::number(self.host.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR) {
                Ok(0) => self.connected = true,
                Ok(_) | Err(_) => return Then::Over,
            }
        }
        let moved = self.to_host.turn(&self.client, &self.host);
        let moved = moved.and_then(|()| self.to_client.turn(&self.host, &self.client));
        let ended = [self.to_host.end, self.to_client.end] == [WayEnd::PassedOn; 2];
        if moved.is_err() || ended { Then::Over } else { Then::On }
    }
}

/// Where a client is, seen from where it was accepted. What a service grants its own host it is to grant those alone that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientPlace {
    /// At the loopback interface, or at a unix socket.
    Here,
    /// At another one: beside the container in its network, or it is a forwarder, for a client that may be anywhere.
    Elsewhere,
}

impl ClientPlace {
    fn of(client: BorrowedFd<'_>) -> Self {
        Self::of_address(getpeername::<SockaddrStorage>(client.as_raw_fd()).ok().as_ref())
    }

    /// Of a client with this address; of one of the kernel's other families, this host.
    pub fn of_address(client: Option<&SockaddrStorage>) -> Self {
        let address = client.and_then(bro_relay::sockaddr::tcp);
        let here = address.is_none_or(|address| address.ip().to_canonical().is_loopback());
        if here { Self::Here } else { Self::Elsewhere }
    }

    /// The address of this host's that a connection to one of its listeners at any address comes from.
    fn own_address(self, loopback: IpAddr) -> IpAddr {
        let fits = |ip: &IpAddr| {
            let is_link_local = match ip {
                IpAddr::V4(ip) => ip.is_link_local(),
                IpAddr::V6(ip) => ip.is_unicast_link_local(),
            };
            ip.is_ipv4() == loopback.is_ipv4() && !ip.is_loopback() && !is_link_local
        };
        let own = || {
            let all = nix::ifaddrs::getifaddrs().ok()?.filter_map(|interface| interface.address);
            all.filter_map(|address| Some(bro_relay::sockaddr::tcp(&address)?.ip())).find(fits)
        };
        match self {
            Self::Here => loopback,
            // A host without another one has no client that is elsewhere.
            Self::Elsewhere => own().unwrap_or(loopback),
        }
    }
}

/// A non-blocking connection, perhaps still on its way, to where this socket of the host's listens.
///
/// # Errors
/// connect(2)'s.
pub fn connect_to(listener: BorrowedFd<'_>, client: ClientPlace) -> io::Result<OwnedFd> {
    let number = |name| socket::number(listener, libc::SOL_SOCKET, name);
    let host = bro_relay::sys::socket(number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?, 0)?;
    let address = match bound::place(listener) {
        Some(Place::Tcp(address) | Place::Udp(address)) => SockaddrStorage::from(address),
        _ => getsockname::<SockaddrStorage>(listener.as_raw_fd())?,
    };
    let any = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) if v4.ip().is_unspecified() => Some((Ipv4Addr::LOCALHOST.into(), v4.port())),
        (_, Some(v6)) if v6.ip().is_unspecified() => Some((Ipv6Addr::LOCALHOST.into(), v6.port())),
        _ => None,
    };
    let connected = match any {
        // To the loopback address in either case: to another one the forwarder's service may not send (IPAddressDeny=).
        Some((loopback, port)) => {
            let from = SocketAddr::new(client.own_address(loopback), 0);
            bind(host.as_raw_fd(), &SockaddrStorage::from(from)).and_then(|()| {
                connect(host.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(loopback, port)))
            })
        }
        _ if address.len() == 0 => Err(Errno::EADDRNOTAVAIL),
        _ => connect(host.as_raw_fd(), &address),
    };
    match connected {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(host),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn one_that_is_elsewhere_does_not_come_from_the_loopback_interface() {
        for any in ["0.0.0.0:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(any) else { continue };
            let loopback: IpAddr =
                if any.starts_with('0') { [127, 0, 0, 1].into() } else { Ipv6Addr::LOCALHOST.into() };
            for place in [ClientPlace::Here, ClientPlace::Elsewhere] {
                let own = place.own_address(loopback);
                let Ok(_client) = connect_to(listener.as_fd(), place) else { continue };
                let (_accepted, seen) = listener.accept().unwrap();
                assert_eq!(seen.ip(), own, "{place:?}");
                assert!(place == ClientPlace::Elsewhere || own == loopback, "{place:?} {own}");
            }
        }
    }

    #[test]
    fn where_a_client_is_shows_by_its_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(ClientPlace::of(accepted.as_fd()), ClientPlace::Here);
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(ClientPlace::of(unix.as_fd()), ClientPlace::Here);
        let own = ClientPlace::Elsewhere.own_address(Ipv4Addr::LOCALHOST.into());
        if !own.is_loopback() {
            let listener = TcpListener::bind((own, 0)).unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            assert_eq!(ClientPlace::of(listener.accept().unwrap().0.as_fd()), ClientPlace::Elsewhere);
        }
    }
}
