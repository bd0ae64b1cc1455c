//! The clients of listeners that services accept at: no byte of theirs comes by bro, so the kernel's own tables are asked (sock_diag(7)).
//!
//! Two questions. Who waits in an accept queue ([`queued`]) costs two system calls a listener. Who is being served ([`count`],
//! [`any`]) takes a walk of the kernel through all TCP connections of the namespace, or all unix sockets, of which it tells those of the
//! listener's port. Once a minute that is nothing.
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
//! A service that forgets to close a connection whose client has gone stays awake by it (CLOSE_WAIT), as it would behind the relay.

mod ended;
mod tcp;
mod udp;
mod unix;

use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::SockDiagMessage;
use nix::libc;

use crate::family::Family;
use crate::{socket, sys};

pub use ended::EndedClients;
pub(crate) use udp::is_shut_down;

/// One listener's clients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AdoptedClients {
    /// Those that wait to be accepted. Never those of [`Counting::ignores`]: they are not known by their addresses.
    pub queued: u32,
    /// Those that the service serves.
    pub served: u64,
    /// The bytes that have come from the served ones and that they have acknowledged (`tcpi_bytes_received`, `tcpi_bytes_acked`), in all.
    /// It gets smaller with each client that leaves: any change means that something has happened. `None` for a unix listener, whose bytes the kernel does not
    /// count, and where they were not asked for.
    pub bytes: Option<u64>,
}

impl AdoptedClients {
    /// Is there none?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.queued == 0 && self.served == 0
    }
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

/// What is asked about served clients.
#[derive(Clone, Copy)]
pub struct Counting<'a> {
    /// Are their bytes asked for? The kernel's answers are three times as long then.
    pub bytes: bool,
    /// Clients that do not count, by the address that they connect from. An IPv4 client of an IPv6 listener is asked about by its IPv4 address.
    pub ignores: &'a dyn Fn(IpAddr) -> bool,
    /// The service's processes, if there is a unix listener: its clients from other network namespaces are found at their descriptors alone. Takes
    /// the right to trace them, as adoption does; one that may not be traced or has ended is passed over.
    pub processes: &'a [i32],
}

impl std::fmt::Debug for Counting<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Counting")
            .field("bytes", &self.bytes)
            .field("processes", &self.processes)
            .finish_non_exhaustive()
    }
}

impl Counting<'_> {
    /// All clients, without their bytes.
    pub const ALL: Self = Self { bytes: false, ignores: &|_| false, processes: &[] };
}

/// How many wait in the accept queue. Of a TCP listener in any namespace, of a unix one in this process's.
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

/// The clients of each of these listeners, in their order. What is no stream socket has none: datagrams have no connection ([`crate::datagrams`]).
///
/// # Errors
/// [`Uncountable`].
pub fn count(
    listeners: &[BorrowedFd<'_>],
    counting: &Counting<'_>,
) -> Result<Vec<AdoptedClients>, Uncountable> {
    let mut clients: Vec<AdoptedClients> = Vec::with_capacity(listeners.len());
    for listener in listeners {
        let bytes = counting.bytes.then_some(0).filter(|_| is_tcp(*listener));
        clients.push(AdoptedClients { queued: queued(*listener)?, served: 0, bytes });
    }
    let _all = served(listeners, counting, &mut |index, bytes| {
        if let Some(clients) = clients.get_mut(index) {
            clients.served += 1;
            clients.bytes = clients.bytes.map(|sum| sum.wrapping_add(bytes));
        }
        ControlFlow::Continue(())
    })?;
    Ok(clients)
}

/// Has one of these listeners a client? Accept queues are looked at first, and the kernel is asked no further than to the first client.
///
/// # Errors
/// [`Uncountable`].
pub fn any(listeners: &[BorrowedFd<'_>], counting: &Counting<'_>) -> Result<bool, Uncountable> {
    for listener in listeners {
        if queued(*listener)? > 0 {
            return Ok(true);
        }
    }
    let counting = Counting { bytes: false, ..*counting };
    Ok(served(listeners, &counting, &mut |_, _| ControlFlow::Break(()))?.is_break())
}

fn is_tcp(listener: BorrowedFd<'_>) -> bool {
    socket::look(listener).is_some_and(|seen| seen.family.is_tcp())
}

/// Hands over each served client, as its listener's place with its bytes.
fn served(
    listeners: &[BorrowedFd<'_>],
    counting: &Counting<'_>,
    each: &mut dyn FnMut(usize, u64) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, Uncountable> {
    let first = tcp::served(listeners, counting, each)?;
    if first.is_break() { Ok(first) } else { unix::served(listeners, counting.processes, each) }
}

/// A fresh socket for one question: one that was not heard to the end is of no use for the next.
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
    each: impl FnMut(SockDiagMessage) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, Uncountable> {
    Ok(bro_relay::netns::netlink::ask_until(table, NLM_F_REQUEST | NLM_F_DUMP, request, each)?)
}
