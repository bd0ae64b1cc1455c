//! The numbers that the relay process and the control process share all the time, in memory of both ([`crate::stats::Stats`]).

use std::sync::atomic::AtomicU64;

/// The numbers of [`crate::stats::Stats`].
#[derive(Debug, Default)]
#[repr(C)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections that exist now, held ones included.
    pub open: AtomicU64,
    /// Flows of datagrams that exist now, waiting ones included.
    pub flows: AtomicU64,
    /// The open connections and flows that keep the service awake: all but the ones of `--idle-ignore`.
    pub keeping: AtomicU64,
    /// Clients that wait for the service now.
    pub held: AtomicU64,
    /// When the last connection ended (or, by bytes, the last byte moved), in milliseconds since the start.
    pub idle_since: AtomicU64,
}
