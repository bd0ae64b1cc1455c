//! The options that every TCP socket of a connection gets.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

/// `--keepalive-*`, in the units of tcp(7).
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    /// Seconds without traffic before the first probe.
    pub time: u32,
    /// Seconds between probes.
    pub interval: u32,
    /// Unanswered probes before the connection is aborted.
    pub probes: u32,
}

/// The largest that tcp(7) accepts for keepalive times, in seconds.
const LONGEST: u64 = 32_767;

impl Keepalive {
    /// Rounded up to seconds, and cut to what tcp(7) accepts.
    #[must_use]
    pub fn new(time: Duration, interval: Duration, probes: u32) -> Self {
        let seconds = |span: Duration| {
            let seconds = span.as_secs() + u64::from(span.subsec_nanos() > 0);
            u32::try_from(seconds.clamp(1, LONGEST)).unwrap_or(LONGEST as u32)
        };
        Self { time: seconds(time), interval: seconds(interval), probes }
    }
}

/// Sets the options. A failure is no reason to refuse a client, and a unix socket has none of them.
pub fn set_options(socket: &impl AsFd, keepalive: Keepalive) {
    if setsockopt(socket, sockopt::TcpNoDelay, &true).is_err() {
        return;
    }
    setsockopt(socket, sockopt::KeepAlive, &true).ok();
    setsockopt(socket, sockopt::TcpKeepIdle, &keepalive.time).ok();
    setsockopt(socket, sockopt::TcpKeepInterval, &keepalive.interval).ok();
    setsockopt(socket, sockopt::TcpKeepCount, &keepalive.probes).ok();
    // An urgent byte stays in its place in the stream, where recv finds it (tcp(7), “Sockets API”).
    setsockopt(socket, sockopt::OobInline, &true).ok();
}
