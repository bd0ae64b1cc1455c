//! The other end of an accepted connection.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::BorrowedFd;

use nix::sys::socket::{SockaddrStorage, sockopt};

use crate::sockaddr::describe_vsock;

/// The other end of an accepted connection.
#[derive(Debug, Clone)]
pub enum Peer {
    /// Over TCP, from this address (an IPv4 address even if it came through an IPv6 socket).
    Tcp(std::net::SocketAddr),
    /// Over a unix socket (unix(7) SO_PEERCRED).
    Unix {
        /// The user.
        uid: u32,
        /// The process, as this pid namespace sees it.
        pid: i32,
    },
    /// Over vsock(7).
    Vsock {
        /// The context identifier of its machine: a virtual one, 2 for the host of one, 1 for this very machine.
        cid: u32,
        /// Its port there.
        port: u32,
    },
}

/// What `--connections-per-source` counts by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A host: an IPv4 address, or the /64 of an IPv6 one, since a host has the choice of all addresses in it.
    Address(IpAddr),
    /// A user of this host.
    User(u32),
    /// A machine, by its context identifier (vsock(7)).
    Machine(u32),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address @ IpAddr::V4(_)) => address.fmt(f),
            Self::Address(address @ IpAddr::V6(_)) => write!(f, "{address}/64"),
            Self::User(uid) => write!(f, "user {uid}"),
            Self::Machine(cid) => write!(f, "vsock:{cid}"),
        }
    }
}

impl Peer {
    /// Reads which peer is at the other end.
    #[must_use]
    pub fn of(socket: BorrowedFd<'_>, address: Option<SockaddrStorage>) -> Self {
        if let Some(address) = address.as_ref().and_then(crate::sockaddr::tcp) {
            return Self::Tcp(address);
        }
        if let Some(vsock) = address.as_ref().and_then(SockaddrStorage::as_vsock_addr) {
            return Self::Vsock { cid: vsock.cid(), port: vsock.port() };
        }
        match nix::sys::socket::getsockopt(&socket, sockopt::PeerCredentials) {
            Ok(credentials) => Self::Unix { uid: credentials.uid(), pid: credentials.pid() },
            Err(_) => Self::Unix { uid: u32::MAX, pid: 0 },
        }
    }

    /// Its address, where it has one.
    #[must_use]
    pub const fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
            Self::Unix { .. } | Self::Vsock { .. } => None,
        }
    }

    /// The source that limits count it under.
    #[must_use]
    pub const fn source(&self) -> Source {
        match self {
            Self::Tcp(address) => Source::Address(host(address.ip())),
            Self::Unix { uid, .. } => Source::User(*uid),
            Self::Vsock { cid, .. } => Source::Machine(*cid),
        }
    }
}

/// An IPv4 address as it is, the first address of an IPv6 one's /64.
const fn host(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { uid, pid } => write!(f, "unix:uid={uid},pid={pid}"),
            Self::Vsock { cid, port } => f.write_str(&describe_vsock(*cid, *port)),
        }
    }
}
