//! `sk_msg`: one message of a hooked sender, before its own TCP sees it.

use aya_ebpf::bindings::sk_msg_md;
use aya_ebpf::helpers::{bpf_msg_redirect_hash, bpf_sk_storage_get};
use bro_ebpf::{
    Counter, RawEvent, Reason, Record, Sender, SenderState, Snapshot, TargetKey, Verdict, decide, kind, role,
};

use crate::kernel::{TcpSock, hook_blocking, seat_of};
use crate::maps::{
    RECORDS, ROUTES, SENDER, TARGETS, WATCHED, count, load, load_with_barrier, raw, store, tell,
};

/// `SK_PASS`. `SK_DROP` is never returned: it would make an error of what ordinary TCP can carry. A redirect is `SK_PASS`
/// too, after the helper has noted the target.
const PASS: u32 = 1;

/// The verdict. The kernel holds the sender's socket lock, so messages of one sender come one after the other.
#[inline(always)]
pub fn message(msg: *mut sk_msg_md) -> u32 {
    // SAFETY: the kernel passes a valid context; the verifier checks each access.
    let (sk, size) = unsafe { ((*msg).__bindgen_anon_3.sk, (*msg).size) };
    if sk.is_null() {
        return PASS;
    }
    // SAFETY: `sk` is the context's own and not null; without the create flag no value is needed.
    let sender = unsafe { bpf_sk_storage_get(raw(&SENDER), sk.cast(), core::ptr::null_mut(), 0) };
    let sender = sender.cast::<Sender>();
    // SAFETY: not null, so it points to this socket's storage, which lives as long as the socket, and no other code writes
    // to it while the socket is locked.
    let Some(sender) = (unsafe { sender.as_mut() }) else { return PASS };
    let Some(tcp) = TcpSock::of(sk.cast()) else { return PASS };

    let blocking = !hook_blocking() && tcp.nonblocking() == Some(false);
    if blocking {
        report(sender);
    }
    let Some(record) = route(sender) else { return PASS };
    if blocking {
        return pass(record, Reason::Blocking);
    }
    if tcp.has_ulp() {
        return pass(record, Reason::Ulp);
    }
    if tcp.memory_pressure() {
        return pass(record, Reason::Pressure);
    }

    let read = tcp.copied_seq();
    if sender.read != read {
        (sender.read, sender.burst) = (read, 0);
    }
    let (on, forwarded) = (load(&record.on) != 0, load(&record.forwarded));
    // A full barrier: what is read below is at least as new as `forwarded` above (see `Snapshot`).
    let spent = load_with_barrier(&record.spent);
    let snapshot = Snapshot {
        on,
        forwarded,
        spent,
        granted: load(&record.granted),
        low: load(&record.low),
        notified: load(&record.notified) != 0,
        burst: sender.burst,
    };
    match decide(&snapshot, tcp.write_seq(), sender.base, size) {
        Verdict::Pass { reason, notify } => {
            if notify {
                low_credit(record, sender);
            }
            pass(record, reason)
        }
        Verdict::Redirect { charge, notify } => {
            let mut target: TargetKey = sender.route;
            let key = core::ptr::from_mut(&mut target).cast();
            // SAFETY: the context is the kernel's, the key is of the map's key type. Flags 0: the target's egress.
            let found = unsafe { bpf_msg_redirect_hash(msg, raw(&TARGETS), key, 0) };
            if found as u32 != PASS {
                return pass(record, Reason::Gone);
            }
            sender.burst += u64::from(size);
            store(&record.spent, spent.wrapping_add(charge));
            store(&record.bytes, load(&record.bytes).wrapping_add(u64::from(size)));
            store(&record.messages, load(&record.messages).wrapping_add(1));
            if notify {
                low_credit(record, sender);
            }
            PASS
        }
    }
}

/// The sender's record, if the forwarder has a lane open for it. The route is looked up once and kept with the socket, until
/// the record's serial number says that the lane is another's by now.
#[inline(always)]
fn route(sender: &mut Sender) -> Option<&'static Record> {
    if let Some(record) = fitting(sender) {
        return Some(record);
    }
    // SAFETY: the value is copied at once. If the entry is removed meanwhile, its serial number no longer fits.
    sender.route = *unsafe { ROUTES.get(&sender.flow) }?;
    fitting(sender)
}

#[inline(always)]
fn fitting(sender: &Sender) -> Option<&'static Record> {
    let serial = u64::from(sender.route.serial);
    // 0 is no serial number, and what a closed lane's record has.
    if serial == 0 {
        return None;
    }
    RECORDS.get(sender.route.record).filter(|record| load(&record.serial) == serial)
}

#[inline(always)]
fn pass(record: &Record, reason: Reason) -> u32 {
    let passed = &record.passed[reason as usize];
    store(passed, load(passed).wrapping_add(1));
    PASS
}

#[inline(always)]
fn low_credit(record: &Record, sender: &Sender) {
    store(&record.notified, 1);
    let event = RawEvent {
        what: RawEvent::LOW_CREDIT,
        record: sender.route.record,
        serial: sender.route.serial,
        port: sender.watch.port,
        netns: sender.watch.netns,
        socket: sender.cookie,
    };
    tell(seat_of(event.record), &event);
}

/// A blocking socket was hooked: its service is none to hook, and the forwarder takes the socket out of the map.
#[inline(always)]
fn report(sender: &mut Sender) {
    if sender.state & SenderState::REPORTED != 0 {
        return;
    }
    sender.state |= SenderState::REPORTED;
    count(Counter::Blocking);
    // The port is not watched any more: nothing takes the socket out of the map either, and it passes for the rest of its life.
    let Some(watch) = WATCHED.get_ptr_mut(&sender.watch) else { return };
    // SAFETY: the verifier checks the access; a concurrent writer stores one whole word too.
    let seat = unsafe {
        if (*watch).role == role::SERVICE {
            (*watch).kind = kind::BLOCKING;
        }
        (*watch).seat
    };
    let event = RawEvent {
        what: RawEvent::BLOCKING_SENDER,
        record: 0,
        serial: 0,
        port: sender.watch.port,
        netns: sender.watch.netns,
        socket: sender.cookie,
    };
    tell(seat, &event);
}
