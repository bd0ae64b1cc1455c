//! The clients of listeners that services accept at: no byte of theirs comes by bro, so the kernel's own tables are asked (sock_diag(7)).
//!
//! Two questions. How many wait in an accept queue ([`queued`]) costs two system calls a listener. Who is being served ([`look`]) takes a walk of the
//! kernel through all TCP connections of the namespace, or all unix sockets, of which it tells those of the listener's port. Once a minute that is
//! nothing.
//!
//! Neither takes a right. Both have to be asked in the network namespace of the listeners, and fail elsewhere rather than answer with
//! that one's clients: a unit with `PrivateNetwork=` cannot ask.
//!
//! **Which connections are clients** (`clients/tcp.rs`): those that the service holds a descriptor of and that are not over.
//!
//! | state | counts, because |
//! |---|---|
//! | ESTABLISHED | both sides may send |
//! | CLOSE_WAIT | the client has said its last and may wait for the answer |
//! | FIN_WAIT1, FIN_WAIT2 | the service has half-closed, and still hears the client |
//!
//! | state | does not, because |
//! |---|---|
//! | any of these without a descriptor | it waits in the accept queue, and is counted there; or the service has closed it, and what is still to be sent the kernel sends without the service: the socket is of this namespace, and outlives the container |
//! | LAST_ACK, CLOSING, TIME_WAIT | both sides have said their last |
//! | SYN_RECV | there is no client yet that could be told from a forged packet; it comes to the accept queue |
//!
//! Clients that come and go between two questions are in no answer. Of TCP's the kernel tells by itself when their sockets are destroyed
//! ([`EndedClients`]).
//!
//! Two kinds of a unix socket's clients are not seen at all, for the kernel tells of neither: those that come and go between two questions, and those that
//! connected from another network namespace, in whose table the service's end of them is (`unix_stream_connect`), except while they wait in the queue.
//!
//! A service that forgets to close a connection whose client has gone stays awake by it (CLOSE_WAIT), as it would behind the relay.

mod ended;
mod tcp;
mod udp;
mod unix;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::SockDiagMessage;
use nix::libc;
use nix::sys::socket::{SockaddrStorage, getsockname};

use crate::family::Family;
use crate::{socket, sys};

pub use ended::{EndedClient, EndedClients};
pub(crate) use udp::is_shut_down;

/// A client's own end of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClientEnd {
    /// Its address, an IPv4 one also where it came to an IPv6 listener, with its port.
    Tcp(SocketAddr),
    /// The inode of its unix socket; 0 where that is gone.
    Unix(u32),
}

impl ClientEnd {
    /// The end of a connection that this socket is.
    pub(crate) fn of(socket: BorrowedFd<'_>) -> Option<Self> {
        let own = getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
        if let Some(address) = bro_relay::sockaddr::tcp(&own) {
            return Some(Self::Tcp(address));
        }
        // The kernel numbers sockets with 32 bits (`get_next_ino`).
        nix::sys::stat::fstat(socket).ok().map(|stat| Self::Unix(stat.st_ino as u32))
    }

    /// The address, if it has one.
    #[must_use]
    pub const fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
            Self::Unix(_) => None,
        }
    }
}

/// A client that a service serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServedClient {
    /// The place of its listener among those that were asked about. One that may have come by several is told of for each.
    pub listener: usize,
    /// The connection's own number: its socket's cookie, or of a unix socket its inode.
    pub number: u64,
    /// Where it connects from.
    pub end: ClientEnd,
    /// How many bytes have come from it and how many it has acknowledged, in all (`tcpi_bytes_received`, `tcpi_bytes_acked`), ends (FIN) not among them.
    /// None where they were not asked for, and of a unix socket's, of which the kernel counts none.
    pub bytes: Option<u64>,
}

/// Whether bytes are asked for. The kernel's answers are three times as long then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WithBytes {
    /// They are.
    Yes,
    /// They are not.
    No,
}

/// Why clients cannot be counted.
#[derive(Debug, thiserror::Error)]
pub enum Uncountable {
    /// The kernel may have been built without the table (INET_DIAG, UNIX_DIAG), or a unit may forbid AF_NETLINK (`RestrictAddressFamilies=`).
    #[error("the kernel does not tell of sockets: {0}")]
    Table(#[from] io::Error),
    /// `PrivateNetwork=`, or a listener that was made elsewhere.
    #[error(
        "a listener is of another network namespace than this process, where the kernel does not tell of its clients"
    )]
    Elsewhere,
}

/// How many wait in the accept queue, of whatever client. Of a TCP listener in any namespace, of a unix one in this process's.
///
/// # Errors
/// [`Uncountable`]; a socket that is no listener has none.
pub fn queued(listener: BorrowedFd<'_>) -> Result<u32, Uncountable> {
    match socket::look(listener).map(|seen| seen.family) {
        Some(Family::Unix | Family::UnixPackets) => {
            Ok(unix::UnixName::of(listener)?.map_or(0, |name| name.queued))
        }
        _ => Ok(tcp::queued(listener).unwrap_or(0)),
    }
}

/// Looks at the clients of these listeners: hands over each that is served, and returns how many wait at each, in their order. What is no stream socket has
/// none: datagrams have no connection ([`crate::datagrams`]). Any process of the listeners' network namespace may ask. It keeps nothing: the kernel's answer is
/// read in parts of 32 KiB.
///
/// # Errors
/// [`Uncountable`].
pub fn look(
    listeners: &[BorrowedFd<'_>],
    bytes: WithBytes,
    each: &mut dyn FnMut(&ServedClient),
) -> Result<Vec<u32>, Uncountable> {
    let waiting = listeners.iter().map(|listener| queued(*listener)).collect::<Result<_, _>>()?;
    tcp::served(listeners, bytes, each)?;
    unix::served(listeners, each)?;
    Ok(waiting)
}

/// Would [`look`] have an answer? Only listeners are asked about: the walk through all connections takes the kernel some 2 ms (the table had 262,144
/// places, which depends on the memory and not on how many are taken), and a first client waits meanwhile.
///
/// # Errors
/// [`Uncountable`].
pub fn are_countable(listeners: &[BorrowedFd<'_>]) -> Result<(), Uncountable> {
    // Of a unix socket the queue's length comes from the table.
    listeners.iter().try_for_each(|listener| queued(*listener).map(drop))?;
    tcp::are_countable(listeners)
}

/// A socket for one question.
fn table(listeners: &[BorrowedFd<'_>]) -> Result<OwnedFd, Uncountable> {
    let table = bro_relay::sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
    // Before Linux 5.14 no socket tells its namespace.
    if let Ok(here) = namespace(table.as_fd())
        && listeners.iter().any(|listener| namespace(*listener).is_ok_and(|its| its != here))
    {
        return Err(Uncountable::Elsewhere);
    }
    Ok(table)
}

/// SO_NETNS_COOKIE (Linux 5.14).
fn namespace(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    let mut cookie = [0; 8];
    sys::option(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE, &mut cookie)?;
    Ok(u64::from_ne_bytes(cookie))
}

/// Asks for a list.
fn dump(
    table: &OwnedFd,
    request: SockDiagMessage,
    each: impl FnMut(SockDiagMessage),
) -> Result<(), Uncountable> {
    Ok(bro_relay::netns::netlink::ask(table, NLM_F_REQUEST | NLM_F_DUMP, request, each)?)
}
