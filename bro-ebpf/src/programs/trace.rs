//! Log lines about single sockets, for people who want to see what the programs do (aya-log). The level is a constant that the loader
//! sets before it loads (`AYA_LOG_LEVEL`): while it is off, the verifier knows so and takes all of this out of the programs.
//!
//! `bro_watch` and `bro_hook` say what becomes of a socket, a few times in its life. `bro_send` says nothing, on purpose: it runs with
//! every message, and what it does is counted in the lane's record instead.

use aya_log_ebpf::macro_support::{Level, level_enabled};
use bro_ebpf::{Flow, Sender, WatchKey};

/// Something happened at a watched port.
#[inline(always)]
pub fn port(what: &'static str, key: &WatchKey) {
    if level_enabled(Level::Trace) {
        line(what, key.netns, u64::from(key.port) << 16, 0);
    }
}

/// Something happened to a socket that is no sender of ours, or not yet.
#[inline(always)]
pub fn socket(what: &'static str, flow: &Flow) {
    if level_enabled(Level::Trace) {
        line(what, flow.netns, ports(flow), 0);
    }
}

/// Something happened to a sender.
#[inline(always)]
pub fn sender(what: &'static str, sender: &Sender) {
    if level_enabled(Level::Trace) {
        line(what, sender.flow.netns, ports(&sender.flow), sender.cookie);
    }
}

#[inline(always)]
fn ports(flow: &Flow) -> u64 {
    u64::from(flow.local_port) << 16 | u64::from(flow.remote_port)
}

/// Once for all of them, and with a stack of its own: what the formatting takes must not add up.
#[inline(never)]
fn line(what: &'static str, netns: u64, ports: u64, socket: u64) {
    let (local, remote) = (ports as u32 >> 16, ports as u32 & 0xffff);
    aya_log_ebpf::trace!(
        (),
        target: "bro_ebpf",
        "{}: netns {} port {} peer {} socket {}",
        what,
        netns,
        local,
        remote,
        socket
    );
}
