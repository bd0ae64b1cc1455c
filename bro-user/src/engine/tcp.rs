//! The options that every TCP socket of a connection gets.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::connection::closing_aborts;

/// `--keepalive-*`, in the units of tcp(7). What is not given stays as the host has it (net.ipv4.tcp_keepalive_*).
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    /// Seconds without traffic before the first probe.
    pub time: Option<u32>,
    /// Seconds between probes.
    pub interval: Option<u32>,
    /// Unanswered probes before the connection is aborted.
    pub probes: Option<u32>,
}

impl Keepalive {
    /// Rounded up to seconds; [`crate::timespan::keepalive`] lets nothing pass that tcp(7) does not accept.
    #[must_use]
    pub fn new(time: Option<Duration>, interval: Option<Duration>, probes: Option<u32>) -> Self {
        let seconds = |span: Duration| {
            let seconds = span.as_secs() + u64::from(span.subsec_nanos() > 0);
            u32::try_from(seconds).unwrap_or(u32::MAX)
        };
        Self { time: time.map(seconds), interval: interval.map(seconds), probes }
    }
}

/// Sets the options of a socket whose other end is `peer`, where that is known. A failure is no reason to refuse a client, and a unix socket has none of them but the first.
pub fn set_options(socket: &impl AsFd, peer: Option<IpAddr>, keepalive: Keepalive) {
    closing_aborts(socket, true);
    if setsockopt(socket, sockopt::TcpNoDelay, &true).is_err() {
        return;
    }
    super::unpaced::unpace(socket.as_fd(), peer);
    setsockopt(socket, sockopt::KeepAlive, &true).ok();
    if let Some(time) = keepalive.time {
        setsockopt(socket, sockopt::TcpKeepIdle, &time).ok();
    }
    if let Some(interval) = keepalive.interval {
        setsockopt(socket, sockopt::TcpKeepInterval, &interval).ok();
    }
    if let Some(probes) = keepalive.probes {
        setsockopt(socket, sockopt::TcpKeepCount, &probes).ok();
    }
    // An urgent byte stays in its place in the stream, where recv finds it (tcp(7), “Sockets API”).
    setsockopt(socket, sockopt::OobInline, &true).ok();
}
