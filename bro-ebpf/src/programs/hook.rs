//! `bro_hook`: puts a sender into the senders' map after it has proved to be a non-blocking one and its lane is open.

use core::ffi::c_void;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{
    bpf_map_update_elem, bpf_sk_lookup_tcp, bpf_sk_release, bpf_sk_storage_get, bpf_skb_load_bytes,
};
use bro_ebpf::{Counter, Flow, HookRequest, REQUEST_OFFSET, Sender, SenderState, v4_mapped};

use crate::kernel::{TcpSock, hook_blocking};
use crate::maps::{SENDER, SENDERS, count, raw};
use crate::trace;

/// What the forwarder reads: the sender is hooked.
const HOOKED: i32 = 1;
/// It is not: gone, half-closed, in blocking mode by now, or the map is full.
const NOT_HOOKED: i32 = 0;
/// `-EOPNOTSUPP`: it is half-closed or closed by now, which is no refusal.
const GONE: i64 = -95;
/// `-EEXIST`: it is hooked already.
const HOOKED_ALREADY: i64 = -17;
/// `BPF_NOEXIST`.
const NOEXIST: u64 = 1;
/// `BPF_F_CURRENT_NETNS`: the namespace of the thread that runs this.
const CURRENT_NETNS: u64 = u64::MAX;

/// An IPv4 connection as `bpf_sk_lookup_tcp` takes it: as a packet that comes to the socket, in network byte order.
#[repr(C)]
struct Tuple4 {
    from: [u8; 4],
    to: [u8; 4],
    from_port: u16,
    to_port: u16,
}

/// The same for IPv6.
#[repr(C)]
struct Tuple6 {
    from: [u8; 16],
    to: [u8; 16],
    from_port: u16,
    to_port: u16,
}

/// One request.
#[inline(always)]
pub fn request(skb: *mut __sk_buff) -> i32 {
    let flow = Flow::new(0, v4_mapped([0; 4]), 0, v4_mapped([0; 4]), 0);
    let mut request = HookRequest { flow, cookie: 0 };
    let into = core::ptr::from_mut(&mut request).cast();
    let size = size_of::<HookRequest>() as u32;
    // SAFETY: the context is the kernel's own, `into` is plain bytes of the size given.
    if unsafe { bpf_skb_load_bytes(skb.cast(), REQUEST_OFFSET as u32, into, size) } != 0 {
        return NOT_HOOKED;
    }
    let sk = find(skb, &request.flow);
    if sk.is_null() {
        trace::socket("not hooked, there is no such socket here", &request.flow);
        return NOT_HOOKED;
    }
    let hooked = hook(sk, &request);
    // SAFETY: the reference that the look-up took.
    unsafe { bpf_sk_release(sk) };
    hooked
}

#[inline(always)]
fn find(skb: *mut __sk_buff, flow: &Flow) -> *mut c_void {
    let (from_port, to_port) = (flow.remote_port.to_be(), flow.local_port.to_be());
    let sk = if let (Some(from), Some(to)) = (Flow::v4(flow.remote), Flow::v4(flow.local)) {
        let mut tuple = Tuple4 { from, to, from_port, to_port };
        let at = core::ptr::from_mut(&mut tuple).cast();
        // SAFETY: the context is the kernel's own, the tuple is plain bytes of the size given.
        unsafe { bpf_sk_lookup_tcp(skb.cast(), at, size_of::<Tuple4>() as u32, CURRENT_NETNS, 0) }
    } else {
        let mut tuple = Tuple6 { from: flow.remote, to: flow.local, from_port, to_port };
        let at = core::ptr::from_mut(&mut tuple).cast();
        // SAFETY: the context is the kernel's own, the tuple is plain bytes of the size given.
        unsafe { bpf_sk_lookup_tcp(skb.cast(), at, size_of::<Tuple6>() as u32, CURRENT_NETNS, 0) }
    };
    sk.cast()
}

#[inline(always)]
fn hook(sk: *mut c_void, request: &HookRequest) -> i32 {
    // SAFETY: `sk` is not null; without the create flag no value is needed.
    let sender = unsafe { bpf_sk_storage_get(raw(&SENDER), sk, core::ptr::null_mut(), 0) }.cast::<Sender>();
    // SAFETY: the storage lives as long as the socket, which is held. It is not locked: `state` is read and written as a whole
    // word, and the worst that a callback at the same time can do is that the socket stays hooked until it closes.
    let Some(sender) = (unsafe { sender.as_mut() }) else { return NOT_HOOKED };
    if sender.cookie != request.cookie || sender.state & (SenderState::PROVED | SenderState::HOOKED) == 0 {
        return NOT_HOOKED;
    }
    let Some(tcp) = TcpSock::of(sk) else { return NOT_HOOKED };
    if !(hook_blocking() || tcp.nonblocking() == Some(true)) || tcp.zerocopy() {
        trace::sender("not hooked, it blocks by now or asks for MSG_ZEROCOPY", sender);
        return NOT_HOOKED;
    }
    sender.state = SenderState::PROVING | SenderState::HOOKED;
    let mut key = request.cookie;
    let key = core::ptr::from_mut(&mut key).cast();
    // SAFETY: the key is of the map's key type, the value is a socket, which is what this kind of map takes. The kernel refuses
    // one that is no longer established.
    let refused = unsafe { bpf_map_update_elem(raw(&SENDERS), key, sk, NOEXIST) };
    if refused == 0 {
        count(Counter::Hooked);
        trace::sender("hooked", sender);
        return HOOKED;
    }
    if refused == HOOKED_ALREADY {
        return HOOKED;
    }
    sender.state = 0;
    if refused == GONE {
        trace::sender("not hooked, it is half-closed or closed", sender);
    } else {
        count(Counter::HookRefused);
        trace::sender("not hooked, the kernel refuses it", sender);
    }
    NOT_HOOKED
}
