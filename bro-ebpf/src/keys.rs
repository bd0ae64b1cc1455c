//! Keys and values of the maps. All are plain bytes without padding, because the kernel compares keys byte by byte.

/// A TCP socket by its network namespace and full address pair, as the sender itself sees it. IPv4 is written as
/// v4-mapped IPv6, so that a dual-stack socket and a plain one agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Flow {
    /// The namespace's cookie: every container uses 127.0.0.1.
    pub netns: u64,
    /// The sender's own address, network byte order.
    pub local: [u8; 16],
    /// The address it is connected to, network byte order.
    pub remote: [u8; 16],
    /// The sender's own port, host byte order.
    pub local_port: u16,
    /// The port it is connected to, host byte order.
    pub remote_port: u16,
    /// Always 0.
    pub zero: u32,
}

/// Which record a flow's sender uses, written by the forwarder right after it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Route {
    /// The record's index.
    pub record: u32,
    /// The serial number the record must have. Never 0.
    pub serial: u32,
}

/// A target in the targets' map: the serial number makes a slot that is used again another target.
pub type TargetKey = Route;

/// A port to watch in one network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct WatchKey {
    /// The namespace's cookie.
    pub netns: u64,
    /// The port, host byte order.
    pub port: u32,
    /// Always 0.
    pub zero: u32,
}

/// What is done about a watched port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Watch {
    /// One of [`role`].
    pub role: u32,
    /// One of [`kind`]; the programs change it.
    pub kind: u32,
    /// Who watches it: the seat whose ring buffer hears of it.
    pub seat: u32,
    /// Always 0.
    pub zero: u32,
}

/// Which end of a connection at a watched port is a sender of ours.
pub mod role {
    /// The end that accepts: the service of the service lane.
    pub const SERVICE: u32 = 1;
    /// The end that connects: clients on this host, the client lane.
    pub const CLIENT: u32 = 2;
}

/// What kind of sockets the service at a watched port uses.
pub mod kind {
    /// Not known.
    pub const UNKNOWN: u32 = 0;
    /// Non-blocking ones, as far as was seen. Each one is looked at all the same before it is hooked.
    pub const FIT: u32 = 1;
    /// Blocking ones: never hooked.
    pub const BLOCKING: u32 = 2;
    /// Ones that ask for MSG_ZEROCOPY completions: never hooked.
    pub const ZEROCOPY: u32 = 3;
}

/// Where a watched socket stands. Bits of [`Sender::state`].
pub struct SenderState;

impl SenderState {
    /// It is in the senders' map.
    pub const HOOKED: u32 = 1;
    /// The event that it is a blocking one was sent.
    pub const REPORTED: u32 = 2;
    /// It is looked at with each acknowledgement: whether it stays a non-blocking one.
    pub const PROVING: u32 = 8;
    /// It has stayed one, and the forwarder was asked to have it hooked.
    pub const PROVED: u32 = 16;
}

/// What the programs keep with a watched socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Sender {
    /// Itself, as the key of its route.
    pub flow: Flow,
    /// The port it is watched for.
    pub watch: WatchKey,
    /// Its socket cookie, the key in the senders' map.
    pub cookie: u64,
    /// Its route, once looked up; serial 0 before.
    pub route: Route,
    /// Its `write_seq` when it was established.
    pub base: u32,
    /// Bits of [`SenderState`].
    pub state: u32,
    /// Its `write_seq` when it was first seen non-blocking after it had sent something; `base` before.
    pub seen: u32,
    /// Its `copied_seq` when it sent last: it differs once its owner has read.
    pub read: u32,
    /// Payload bytes redirected since then.
    pub burst: u64,
}

impl Sender {
    /// A sender at this port of which nothing else is known yet.
    #[inline(always)]
    #[must_use]
    pub const fn unknown(watch: WatchKey) -> Self {
        let flow = Flow::new(watch.netns, [0; 16], 0, [0; 16], 0);
        let route = Route { record: 0, serial: 0 };
        Self { flow, watch, cookie: 0, route, base: 0, state: 0, seen: 0, read: 0, burst: 0 }
    }
}

/// What `bro_hook` is asked: to put this sender into the senders' map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct HookRequest {
    /// Its addresses.
    pub flow: Flow,
    /// Its socket cookie.
    pub cookie: u64,
}

/// What stands in front of a [`HookRequest`] in the packet that it is handed over as: the length of an Ethernet header.
pub const REQUEST_OFFSET: usize = 14;

const _: () = assert!(core::mem::size_of::<Flow>() == 48);
const _: () = assert!(core::mem::size_of::<WatchKey>() == 16);
const _: () = assert!(core::mem::size_of::<Sender>() == 104);
const _: () = assert!(core::mem::size_of::<HookRequest>() == 56);

/// The v4-mapped form of an IPv4 address given as its four bytes.
#[inline(always)]
#[must_use]
pub const fn v4_mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

impl Flow {
    /// A flow from what a socket of the namespace `netns` says of itself.
    #[inline(always)]
    #[must_use]
    pub const fn new(
        netns: u64,
        local: [u8; 16],
        local_port: u16,
        remote: [u8; 16],
        remote_port: u16,
    ) -> Self {
        Self { netns, local, remote, local_port, remote_port, zero: 0 }
    }

    /// The IPv4 address of one that is written as v4-mapped.
    #[inline(always)]
    #[must_use]
    pub const fn v4(address: [u8; 16]) -> Option<[u8; 4]> {
        match address {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }

    /// True when both ends must be on this host: it talks to itself or to a loopback address.
    #[inline(always)]
    #[must_use]
    pub const fn is_local(&self) -> bool {
        let remote = u128::from_ne_bytes(self.remote);
        let local = u128::from_ne_bytes(self.local);
        let mapped_loopback = matches!(self.remote, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, _, _, _]);
        local == remote || remote == 1u128.to_be() || mapped_loopback
    }
}

impl HookRequest {
    /// The bytes of the packet it is handed over as.
    #[must_use]
    pub fn packet(&self) -> [u8; REQUEST_OFFSET + 56] {
        let Flow { netns, local, remote, local_port, remote_port, zero } = self.flow;
        let mut packet = [0; REQUEST_OFFSET + 56];
        let mut at = REQUEST_OFFSET;
        let mut put = |bytes: &[u8]| {
            packet[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&netns.to_ne_bytes());
        put(&local);
        put(&remote);
        put(&local_port.to_ne_bytes());
        put(&remote_port.to_ne_bytes());
        put(&zero.to_ne_bytes());
        put(&self.cookie.to_ne_bytes());
        packet
    }
}
