//! `sockops`: notes the senders, looks whether they are non-blocking ones, and lets them go. It hooks none: only the forwarder knows
//! which connections are its own and have a lane (`hook.rs`).

use core::arch::asm;
use core::ffi::c_void;
use core::mem::offset_of;

use aya_ebpf::bindings::{
    BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, BPF_TCP_FIN_WAIT1, BPF_TCP_LAST_ACK, bpf_sock_ops,
};
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_map_delete_elem, bpf_setsockopt, bpf_sk_storage_get,
    bpf_sock_ops_cb_flags_set,
};
use bro_ebpf::{
    Counter, Flow, RawEvent, RawProved, Route, Sender, SenderState, Watch, WatchKey, kind, role, v4_mapped,
};

use crate::kernel::{TcpSock, hook_blocking, seat_of};
use crate::maps::{ROUTES, SENDER, SENDERS, WATCHED, count, raw, tell, tell_proved};
use crate::trace;

/// Reads a word of the context. In assembly, because the verifier wants every access to the context to be one load at a
/// constant offset from the untouched pointer, and the compiler would rather compute addresses.
#[inline(always)]
fn word_at<const OFFSET: usize>(ops: *mut bpf_sock_ops) -> u32 {
    let value: u64;
    // SAFETY: the kernel passes a valid context; the verifier checks the access.
    unsafe {
        asm!(
            "{value} = *(u32 *)({ops} + {offset})",
            ops = in(reg) ops,
            value = out(reg) value,
            offset = const OFFSET,
            options(readonly, nostack, preserves_flags),
        );
    }
    value as u32
}

macro_rules! context {
    ($ops:expr, $field:ident) => {
        word_at::<{ offset_of!(bpf_sock_ops, $field) }>($ops)
    };
}

/// `AF_INET`.
const INET: u32 = 2;

/// One callback of one socket. Each kind has a function, and so a stack, of its own: 512 bytes have to hold all that one needs,
/// tracing included.
#[inline(always)]
pub fn event(ops: *mut bpf_sock_ops) {
    match context!(ops, op) {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => established(ops, role::SERVICE),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(ops, role::CLIENT),
        BPF_SOCK_OPS_RTT_CB => acknowledged(ops),
        BPF_SOCK_OPS_STATE_CB => state_changed(ops),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listening(ops),
        _ => {}
    }
}

/// The socket of the context, when it is a full one.
#[inline(always)]
fn socket(ops: *mut bpf_sock_ops) -> Option<*mut c_void> {
    const SK: usize = offset_of!(bpf_sock_ops, __bindgen_anon_2);
    let sk: *mut c_void;
    // SAFETY: as in `word_at`; the kernel hands out a pointer here.
    unsafe {
        asm!(
            "{sk} = *(u64 *)({ops} + {offset})",
            ops = in(reg) ops,
            sk = out(reg) sk,
            offset = const SK,
            options(readonly, nostack, preserves_flags),
        );
    }
    (!sk.is_null()).then_some(sk)
}

/// What is known of a socket seen before.
#[inline(always)]
fn known(ops: *mut bpf_sock_ops) -> Option<&'static mut Sender> {
    let sk = socket(ops)?;
    // SAFETY: `sk` is the context's own and not null.
    let sender = unsafe { bpf_sk_storage_get(raw(&SENDER), sk, core::ptr::null_mut(), 0) };
    // SAFETY: the storage lives as long as the socket, which is locked while its callbacks run.
    unsafe { sender.cast::<Sender>().as_mut() }
}

#[inline(always)]
fn watch_key(ops: *mut bpf_sock_ops, port: u32) -> WatchKey {
    // SAFETY: the context is the kernel's own.
    WatchKey { netns: unsafe { bpf_get_netns_cookie(ops.cast()) }, port, zero: 0 }
}

/// A connection at a watched port exists: `wanted` says which end of it this is.
#[inline(never)]
fn established(ops: *mut bpf_sock_ops, wanted: u32) {
    let (local_port, remote_port) = (context!(ops, local_port), u32::from_be(context!(ops, remote_port)));
    let service = wanted == role::SERVICE;
    let key = watch_key(ops, if service { local_port } else { remote_port });
    let Some(watch) = WATCHED.get_ptr_mut(&key) else { return };
    // SAFETY: the verifier checks the access; each word is written whole.
    let Watch { role, kind, .. } = unsafe { *watch };
    if role != wanted {
        return;
    }
    if service && !hook_blocking() && (kind == kind::BLOCKING || kind == kind::ZEROCOPY) {
        trace::port("not hooked, the service's sockets are known to be none to hook", &key);
        return;
    }
    let mut new = Sender::unknown(key);
    flow(ops, local_port as u16, remote_port as u16, &mut new.flow);
    if !service && !new.flow.is_local() {
        // A client of another process's server at the same port.
        return;
    }
    let Some(sk) = socket(ops) else { return };
    let Some(tcp) = TcpSock::of(sk) else { return };
    if !tcp.is_ours() {
        count(Counter::Foreign);
        trace::socket("not hooked, another user's", &new.flow);
        return;
    }
    let base = tcp.write_seq();
    if context!(ops, data_segs_out) != 0 || context!(ops, snd_nxt) != base {
        // It sent data in its SYN: `base` would count bytes that may still be on their way.
        count(Counter::FastOpen);
        trace::socket("not hooked, it sent data in its SYN", &new.flow);
        return;
    }
    if tcp.zerocopy() {
        if service {
            // SAFETY: as above.
            unsafe { (*watch).kind = kind::ZEROCOPY };
        }
        count(Counter::Zerocopy);
        trace::socket("not hooked, it asks for MSG_ZEROCOPY", &new.flow);
        return;
    }
    // A client's socket has its file already; the service's has none before it is accepted, so the service is learned. That a
    // client connects without blocking is not enough (many turn to blocking then), but one that blocks now is left alone.
    if !service && !hook_blocking() && tcp.nonblocking() != Some(true) {
        count(Counter::Blocking);
        trace::socket("not hooked, the client blocks", &new.flow);
        return;
    }
    // SAFETY: the context is the kernel's own.
    new.cookie = unsafe { bpf_get_socket_cookie(ops.cast()) };
    (new.base, new.seen, new.read) = (base, base, tcp.copied_seq());
    let create = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    let value = core::ptr::from_mut(&mut new).cast();
    // SAFETY: `sk` is the context's own and not null, `value` is of the storage's type.
    let sender = unsafe { bpf_sk_storage_get(raw(&SENDER), sk, value, create) }.cast::<Sender>();
    // SAFETY: the storage lives as long as the socket, which is locked while its callbacks run.
    let Some(sender) = (unsafe { sender.as_mut() }) else { return };
    if sender.state != 0 {
        // The program is attached to a parent cgroup as well and saw this connection already.
        return;
    }
    sender.state = SenderState::PROVING;
    count(Counter::Watched);
    trace::sender("seen, it has to prove itself", sender);
    set_flags(ops, BPF_SOCK_OPS_RTT_CB_FLAG, 0);
}

/// The kernel hands what a hooked sender passes to TCP page by page. With Nagle's algorithm the last piece of a message that
/// lies in two pages would wait for the acknowledgement of the first, which the receiver delays (40 ms).
#[inline(always)]
fn send_at_once(ops: *mut bpf_sock_ops) {
    const IPPROTO_TCP: i32 = 6;
    const TCP_NODELAY: i32 = 1;
    let mut yes = 1i32;
    let value = core::ptr::from_mut(&mut yes).cast();
    // SAFETY: the context is the kernel's own, the value is an int. Kernels that do not take the option leave the delay.
    unsafe { bpf_setsockopt(ops.cast(), IPPROTO_TCP, TCP_NODELAY, value, size_of::<i32>() as i32) };
}

/// Something that a watched socket had sent was acknowledged.
#[inline(never)]
fn acknowledged(ops: *mut bpf_sock_ops) {
    if context!(ops, data_segs_out) == 0 {
        return;
    }
    let Some(sender) = known(ops) else { return };
    if sender.state & SenderState::PROVING != 0 {
        prove(ops, sender);
    }
}

/// A sender may be hooked once it has been non-blocking at two messages, each time after it sent it, and has a lane. A process that connects
/// without blocking, or greets, and then turns to blocking (hiredis, for one) does so in between. From then on it is looked at
/// whenever it has passed something, and one that blocks is let go.
#[inline(always)]
fn prove(ops: *mut bpf_sock_ops, sender: &mut Sender) {
    let Some(tcp) = socket(ops).and_then(TcpSock::of) else { return };
    let unfit = match (tcp.nonblocking(), tcp.zerocopy()) {
        // Its owner has closed it, or not accepted it yet.
        (None, _) => return,
        (_, true) => kind::ZEROCOPY,
        (Some(false), false) if !hook_blocking() => kind::BLOCKING,
        _ => kind::UNKNOWN,
    };
    if unfit != kind::UNKNOWN {
        if unfit == kind::BLOCKING {
            count(Counter::Blocking);
            trace::sender("given up, it blocks", sender);
        } else {
            count(Counter::Zerocopy);
            trace::sender("given up, it asks for MSG_ZEROCOPY", sender);
        }
        learn(sender, unfit);
        set_flags(ops, 0, BPF_SOCK_OPS_RTT_CB_FLAG);
        return let_go(sender);
    }
    let has_proved = sender.state & (SenderState::PROVED | SenderState::HOOKED) != 0;
    let write_seq = tcp.write_seq();
    if sender.seen == sender.base {
        sender.seen = write_seq;
        return;
    }
    if sender.seen == write_seq && !has_proved {
        return;
    }
    // Without a route it is not the forwarder's, or has no lane: then nothing about it is changed.
    // SAFETY: the value is copied at once.
    let Some(route) = (unsafe { ROUTES.get(&sender.flow) }) else { return };
    let Route { record, serial } = *route;
    if has_proved && serial == sender.route.serial && record == sender.route.record {
        // The forwarder knows.
        return;
    }
    learn(sender, kind::FIT);
    set_flags(ops, BPF_SOCK_OPS_STATE_CB_FLAG, 0);
    send_at_once(ops);
    let event = RawEvent {
        what: RawEvent::PROVED,
        record,
        serial,
        port: sender.watch.port,
        netns: sender.watch.netns,
        socket: sender.cookie,
    };
    // First: the forwarder may be quick.
    sender.state |= SenderState::PROVED;
    sender.route = Route { record, serial };
    // Not the seat that watches the port: the one whose lane it is.
    if !tell_proved(seat_of(record), &RawProved { event, flow: sender.flow }) {
        // Once more at the next message.
        sender.route.serial = 0;
        return;
    }
    trace::sender("proved to be a non-blocking one", sender);
}

/// Notes what kind of sockets the service at this port uses, and tells the forwarder if that is news.
#[inline(never)]
fn learn(sender: &Sender, kind: u32) {
    let Some(watch) = WATCHED.get_ptr_mut(&sender.watch) else { return };
    // SAFETY: the verifier checks the accesses; each word is written whole.
    let seat = unsafe {
        if (*watch).role != role::SERVICE || (*watch).kind == kind {
            return;
        }
        (*watch).kind = kind;
        (*watch).seat
    };
    let event = RawEvent {
        what: RawEvent::LEARNED,
        record: kind,
        serial: 0,
        port: sender.watch.port,
        netns: sender.watch.netns,
        socket: sender.cookie,
    };
    tell(seat, &event);
}

/// A hooked sender that can send no more is let go: its later reads are ordinary TCP's again.
#[inline(never)]
fn state_changed(ops: *mut bpf_sock_ops) {
    // The callback's second argument, args[1]. (`offset_of` cannot look into an array.)
    let new = {
        const NEW_STATE: usize = offset_of!(bpf_sock_ops, __bindgen_anon_1) + 4;
        word_at::<NEW_STATE>(ops)
    };
    if new != BPF_TCP_FIN_WAIT1 && new != BPF_TCP_LAST_ACK && new != BPF_TCP_CLOSE {
        return;
    }
    let Some(sender) = known(ops) else { return };
    let_go(sender);
}

/// Takes a sender out of the senders' map, if it is there, and has it never come back.
#[inline(always)]
fn let_go(sender: &mut Sender) {
    let hooked = sender.state & SenderState::HOOKED != 0;
    sender.state &= !(SenderState::HOOKED | SenderState::PROVING | SenderState::PROVED);
    if !hooked {
        return;
    }
    let mut key = sender.cookie;
    let key = core::ptr::from_mut(&mut key).cast();
    // SAFETY: the key is of the map's key type.
    if unsafe { bpf_map_delete_elem(raw(&SENDERS), key) } == 0 {
        count(Counter::Unhooked);
    }
    trace::sender("let go", sender);
}

/// Something called listen().
#[inline(never)]
fn listening(ops: *mut bpf_sock_ops) {
    let key = watch_key(ops, context!(ops, local_port));
    let Some(watch) = WATCHED.get_ptr_mut(&key) else { return };
    // SAFETY: as above.
    let Watch { role, seat, .. } = unsafe { *watch };
    if role != role::SERVICE {
        return;
    }
    if !socket(ops).and_then(TcpSock::of).is_some_and(TcpSock::is_ours) {
        trace::port("another user's process listens", &key);
        return;
    }
    trace::port("the service listens", &key);
    let event = RawEvent {
        what: RawEvent::LISTENING,
        record: 0,
        serial: 0,
        port: key.port,
        netns: key.netns,
        socket: 0,
    };
    tell(seat, &event);
}

/// Switches callbacks on and off, leaving alone what other programs asked for.
#[inline(always)]
fn set_flags(ops: *mut bpf_sock_ops, on: u32, off: u32) {
    let flags = context!(ops, bpf_sock_ops_cb_flags);
    // SAFETY: the context is the kernel's own. It fails for sockets that have no callbacks, which is no loss.
    unsafe { bpf_sock_ops_cb_flags_set(ops, (flags & !off | on) as i32) };
}

/// Writes down the addresses of the context's socket, but for the namespace. In place, and with a stack of its own for the pieces.
#[inline(never)]
fn flow(ops: *mut bpf_sock_ops, local_port: u16, remote_port: u16, into: &mut Flow) {
    (into.local_port, into.remote_port) = (local_port, remote_port);
    (into.local, into.remote) = if context!(ops, family) == INET {
        let (local, remote) = (context!(ops, local_ip4), context!(ops, remote_ip4));
        (v4_mapped(local.to_ne_bytes()), v4_mapped(remote.to_ne_bytes()))
    } else {
        const LOCAL: usize = offset_of!(bpf_sock_ops, local_ip6);
        const REMOTE: usize = offset_of!(bpf_sock_ops, remote_ip6);
        (
            six(
                word_at::<LOCAL>(ops),
                word_at::<{ LOCAL + 4 }>(ops),
                word_at::<{ LOCAL + 8 }>(ops),
                word_at::<{ LOCAL + 12 }>(ops),
            ),
            six(
                word_at::<REMOTE>(ops),
                word_at::<{ REMOTE + 4 }>(ops),
                word_at::<{ REMOTE + 8 }>(ops),
                word_at::<{ REMOTE + 12 }>(ops),
            ),
        )
    };
}

#[inline(always)]
fn six(a: u32, b: u32, c: u32, d: u32) -> [u8; 16] {
    // SAFETY: four words are sixteen bytes.
    unsafe { core::mem::transmute([a, b, c, d]) }
}
