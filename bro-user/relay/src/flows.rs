//! Flows: what stands beside connections for datagrams, which have none. A flow is a client that writes to one of this host's
//! addresses, and a socket in the service's namespace that is its own. All in here is pure; `engine/datagrams.rs` has the sockets.

mod held;
mod queue;
mod runs;
mod table;
mod tally;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nix::sys::socket::UnixAddr;

pub use held::{HeldDatagram, HeldDatagrams};
pub use queue::FlowQueue;
pub use runs::{Piece, together};
pub use table::{FlowTable, NewFlow};
pub use tally::{Amounts, DatagramTally, DropCounts, Dropped};

/// The address of this host's that a client wrote to, and that it has to be answered from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LocalAddress {
    /// The address, mapped into IPv6 where the listener's family says so.
    pub ip: IpAddr,
    /// The interface, where the address alone does not say it (an IPv6 link-local one); else 0.
    pub interface: u32,
    /// It is not the one that was written to, which was several hosts' (multicast, broadcast).
    pub group: bool,
}

/// Where a client sends from, and is answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum FlowClient {
    /// A UDP address, as the listener's family writes it.
    Inet(SocketAddr),
    /// A unix socket that is bound to this path or abstract name.
    Unix(Arc<UnixAddr>),
    /// A unix socket that is bound to nothing. All of them are one client, for they cannot be told apart, and none can be answered.
    Unbound,
}

/// What tells flows apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FlowEnds {
    /// The listener's number.
    pub listener: usize,
    /// The client.
    pub client: FlowClient,
    /// The address that it wrote to; none where the kernel did not say.
    pub local: Option<LocalAddress>,
}

/// A flow's place in the table, and which of those that have had it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowId {
    /// The place.
    pub index: usize,
    /// It wraps at [`FlowId::GENERATIONS`].
    pub generation: u32,
}

impl FlowId {
    /// As many as an epoll token has room for; a batch of events never spans so many.
    pub const GENERATIONS: u32 = 1 << 24;
}
