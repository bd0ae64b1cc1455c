//! A connection from inside a container to the service there, which no longer listens there: relayed to the host's listener.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    MsgFlags, Shutdown, SockaddrLike as _, SockaddrStorage, connect, getsockname, recv, send, shutdown,
};

use crate::bound;
use crate::socket::{self, Place};
use nix::libc;

/// The most that one direction holds.
const PART: usize = 16 * 1024;

/// A connection with both its ends.
#[derive(Debug)]
pub struct Inside {
    client: OwnedFd,
    host: OwnedFd,
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
        let host = connect_to(listener)?;
        Ok(Self {
            client,
            host,
            connected: false,
            to_host: InsideWay::default(),
            to_client: InsideWay::default(),
        })
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

/// A non-blocking connection, perhaps still on its way, to where this socket of the host's listens.
///
/// # Errors
/// connect(2)'s.
pub fn connect_to(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let number = |name| socket::number(listener, libc::SOL_SOCKET, name);
    let host = bro_relay::sys::socket(number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?, 0)?;
    let address = match bound::place(listener) {
        Some(Place::Tcp(address)) => SockaddrStorage::from(address),
        _ => getsockname::<SockaddrStorage>(listener.as_raw_fd())?,
    };
    let connected = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) if v4.ip().is_unspecified() => {
            let here = std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, v4.port());
            connect(host.as_raw_fd(), &nix::sys::socket::SockaddrIn::from(here))
        }
        (_, Some(v6)) if v6.ip().is_unspecified() => {
            let here = std::net::SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, v6.port(), 0, 0);
            connect(host.as_raw_fd(), &nix::sys::socket::SockaddrIn6::from(here))
        }
        _ if address.len() == 0 => Err(Errno::EADDRNOTAVAIL),
        _ => connect(host.as_raw_fd(), &address),
    };
    match connected {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(host),
        Err(errno) => Err(errno.into()),
    }
}
