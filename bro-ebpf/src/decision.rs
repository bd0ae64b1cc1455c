//! The decision and the arithmetic of credit: pure functions, no memory shared, no time, no kernel.
//!
//! Units. `size` is bytes of payload. `spent`, `granted`, credit and room are bytes of *socket memory* (what the kernel
//! calls truesize): payload plus the overhead that [`charge`] adds. `forwarded` is bytes of payload.

use crate::record::Reason;

/// Socket memory that one segment costs the target beside its payload: an upper bound of a transmit skb's own truesize
/// (head, `struct sk_buff`, `struct skb_shared_info`), which the kernel adds to `sk_wmem_queued`.
pub const MESSAGE_OVERHEAD: u64 = 1536;

/// A message is charged one overhead for each of these many bytes it begins: the kernel may cut it into several skbs.
pub const SEGMENT: u32 = 16 * 1024;

/// With less credit than this after a grant, the program sends no event: the next pass wakes the forwarder anyway, and a
/// wake-up for each of the last few messages would cost more than it saves.
pub const QUIET_CREDIT: u64 = 16 * 1024;

/// A sender that has put so many bytes into its lane without having read anything itself is in bulk: it passes until it reads. Lanes
/// pay where one side waits for the other; a stream is faster through a pipe of the forwarder, which takes the lane away then.
pub const BULK: u64 = 256 * 1024;

/// What the program read from the lane's record before it decides.
///
/// `forwarded` must have been read before `granted`: the forwarder publishes them in the other order, so a program that
/// sees a new `forwarded` also sees the grant that was measured after those bytes were queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// The forwarder wants the lane open.
    pub on: bool,
    /// Payload bytes the forwarder itself has written to the target, in total.
    pub forwarded: u64,
    /// Socket memory charged so far, in total.
    pub spent: u64,
    /// Socket memory that may be charged, in total.
    pub granted: u64,
    /// Once `granted - spent` falls under this, the forwarder wants an event.
    pub low: u64,
    /// That event was sent and not yet answered.
    pub notified: bool,
    /// Payload bytes redirected since the sender read something.
    pub burst: u64,
}

/// What to do with one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Push it into the target's transmit queue.
    Redirect {
        /// What to add to `spent`.
        charge: u64,
        /// Send the event of low credit.
        notify: bool,
    },
    /// Leave it to ordinary TCP and the forwarder.
    Pass {
        /// Why.
        reason: Reason,
        /// Send the event of low credit.
        notify: bool,
    },
}

/// What a message of `size` bytes is charged.
#[inline(always)]
#[must_use]
pub const fn charge(size: u32) -> u64 {
    size as u64 + MESSAGE_OVERHEAD * (1 + (size / SEGMENT) as u64)
}

/// The decision.
///
/// `write_seq - base` is what the sender ever gave to ordinary TCP, modulo 2^32 (redirected bytes never enter its own
/// sequence space). Only when the forwarder has written exactly that much to the target is the target's queue the right
/// place for the next byte. Fewer than 2^32 bytes can be on the way, so equality modulo 2^32 is equality.
#[inline(always)]
#[must_use]
pub const fn decide(record: &Snapshot, write_seq: u32, base: u32, size: u32) -> Verdict {
    if !record.on {
        return Verdict::Pass { reason: Reason::Off, notify: false };
    }
    if write_seq.wrapping_sub(base) != record.forwarded as u32 {
        return Verdict::Pass { reason: Reason::Order, notify: false };
    }
    if record.burst.saturating_add(size as u64) > BULK {
        return Verdict::Pass { reason: Reason::Bulk, notify: false };
    }
    let charge = charge(size);
    let credit = record.granted.wrapping_sub(record.spent) as i64;
    if credit < charge as i64 {
        return Verdict::Pass { reason: Reason::Credit, notify: !record.notified };
    }
    let notify = !record.notified && (credit - charge as i64) < record.low as i64;
    Verdict::Redirect { charge, notify }
}

/// How much credit a target's free room is worth: half of it. The other half is the reserve for what credit cannot see: a
/// message that is charged but not yet queued while the room is measured, and a send buffer that the kernel shrinks.
#[inline(always)]
#[must_use]
pub const fn credit_for(sndbuf: u64, wmem_queued: u64) -> u64 {
    sndbuf.saturating_sub(wmem_queued) / 2
}

/// The new `granted` while the lane may be in use: never lower than before. `spent_before` must have been read before
/// `credit` was measured, so that what is spent meanwhile is counted twice rather than not at all.
#[inline(always)]
#[must_use]
pub const fn grant(spent_before: u64, credit: u64, granted: u64) -> u64 {
    let fresh = spent_before.wrapping_add(credit);
    if fresh.wrapping_sub(granted) as i64 > 0 { fresh } else { granted }
}

/// The new `granted` after the forwarder's own write: exactly the credit measured, lower than before if need be, because
/// that write took room that no charge stands for. Right only while no message can be redirected: after the write and
/// before `forwarded` is published, when the order check still fails.
#[inline(always)]
#[must_use]
pub const fn regrant(spent: u64, credit: u64) -> u64 {
    spent.wrapping_add(credit)
}

/// What the forwarder stores with a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watermark {
    /// The record's new `low`.
    pub low: u64,
    /// The record's new `notified`.
    pub notified: bool,
}

/// The low mark that goes with `credit`: half of it, so that against a slow reader events come each time half of the rest is
/// used up, not with every message.
#[inline(always)]
#[must_use]
pub const fn watermark(credit: u64) -> Watermark {
    Watermark { low: credit / 2, notified: credit < QUIET_CREDIT }
}
