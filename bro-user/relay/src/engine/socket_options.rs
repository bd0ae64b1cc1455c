//! The options that every TCP socket of a connection gets.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::connection::closing_aborts;

/// `--keepalive-*`, in the units of tcp(7). The host's own (net.ipv4.tcp_keepalive_*) would find a client with a broken link only
/// after more than two hours, in which it keeps the service awake.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    /// Seconds without traffic before the first probe.
    pub time: u32,
    /// Seconds between probes.
    pub interval: u32,
    /// Unanswered probes before the connection is aborted.
    pub probes: u32,
}

impl Keepalive {
    /// Rounded up to seconds; the parser of that option lets nothing pass that tcp(7) does not accept.
    #[must_use]
    pub fn new(time: Duration, interval: Duration, probes: u32) -> Self {
        let seconds = |span: Duration| {
            let seconds = span.as_secs() + u64::from(span.subsec_nanos() > 0);
            u32::try_from(seconds).unwrap_or(u32::MAX)
        };
        Self { time: seconds(time), interval: seconds(interval), probes }
    }
}

/// Sets the options of a socket. `peer` is its other end, where that is known. A failure is no reason to refuse a client, and a
/// unix socket, or one of vsock(7), has none of the options but the first.
pub fn set_options(socket: &impl AsFd, peer: Option<IpAddr>, keepalive: Keepalive) {
    closing_aborts(socket, true);
    if setsockopt(socket, sockopt::TcpNoDelay, &true).is_err() {
        return;
    }
    super::congestion::unpace(socket.as_fd(), peer);
    setsockopt(socket, sockopt::KeepAlive, &true).ok();
    setsockopt(socket, sockopt::TcpKeepIdle, &keepalive.time).ok();
    setsockopt(socket, sockopt::TcpKeepInterval, &keepalive.interval).ok();
    setsockopt(socket, sockopt::TcpKeepCount, &keepalive.probes).ok();
    // An urgent byte stays in its place in the stream, where recv finds it (tcp(7), “Sockets API”).
    setsockopt(socket, sockopt::OobInline, &true).ok();
}
