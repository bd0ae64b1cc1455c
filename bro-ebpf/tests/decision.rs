//! The decision and the credit arithmetic, case by case and over random values.

use bro_ebpf::{
    BULK, Event, Flow, HookRequest, MESSAGE_OVERHEAD, REQUEST_OFFSET, RawEvent, Reason, SEGMENT, Snapshot,
    Verdict, charge, credit_for, decide, grant, regrant, v4_mapped, watermark,
};
use proptest::prelude::*;

const OPEN: Snapshot =
    Snapshot { on: true, forwarded: 0, spent: 0, granted: 1 << 20, low: 1 << 19, notified: false, burst: 0 };

#[test]
fn the_first_message_of_a_fresh_lane_is_redirected() {
    let verdict = decide(&OPEN, 77, 77, 64);
    assert_eq!(verdict, Verdict::Redirect { charge: 64 + MESSAGE_OVERHEAD, notify: false });
}

#[test]
fn one_byte_not_yet_forwarded_passes() {
    let verdict = decide(&OPEN, 78, 77, 64);
    assert_eq!(verdict, Verdict::Pass { reason: Reason::Order, notify: false });
}

#[test]
fn order_holds_across_the_wrap_of_both_counters() {
    let record = Snapshot { forwarded: (1 << 32) + 10, ..OPEN };
    assert!(matches!(decide(&record, 4, u32::MAX - 5, 1), Verdict::Redirect { .. }));
    assert!(matches!(decide(&record, 5, u32::MAX - 5, 1), Verdict::Pass { reason: Reason::Order, .. }));
}

#[test]
fn a_lane_that_is_off_passes_everything_and_tells_nothing() {
    let record = Snapshot { on: false, granted: 0, ..OPEN };
    assert_eq!(decide(&record, 0, 0, 1), Verdict::Pass { reason: Reason::Off, notify: false });
}

/// As much as that and no more, whatever the sizes of the messages.
#[test]
fn a_sender_in_bulk_passes() {
    let whole = |burst, size| decide(&Snapshot { burst, ..OPEN }, 0, 0, size);
    assert!(matches!(whole(0, BULK as u32), Verdict::Redirect { .. }));
    assert!(matches!(whole(BULK - 1, 1), Verdict::Redirect { .. }));
    for (burst, size) in [(BULK, 1), (0, BULK as u32 + 1), (u64::MAX, u32::MAX)] {
        assert_eq!(whole(burst, size), Verdict::Pass { reason: Reason::Bulk, notify: false });
    }
}

#[test]
fn the_event_of_low_credit_is_sent_once() {
    let record = Snapshot { spent: 1 << 19, ..OPEN };
    assert!(matches!(decide(&record, 0, 0, 1), Verdict::Redirect { notify: true, .. }));
    let told = Snapshot { notified: true, ..record };
    assert!(matches!(decide(&told, 0, 0, 1), Verdict::Redirect { notify: false, .. }));
    let empty = Snapshot { spent: 1 << 20, ..OPEN };
    assert_eq!(decide(&empty, 0, 0, 1), Verdict::Pass { reason: Reason::Credit, notify: true });
}

#[test]
fn every_event_survives_the_ring_buffer() {
    let raw = |what| RawEvent { what, record: 1, serial: 7, port: 8080, netns: 0x1_0000_0002, socket: 99 };
    let bytes = |raw: RawEvent| {
        let mut bytes = Vec::new();
        for word in [raw.what, raw.record, raw.serial, raw.port] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(raw.netns.to_ne_bytes());
        bytes.extend(raw.socket.to_ne_bytes());
        bytes
    };
    let parse = |what| Event::parse(&bytes(raw(what)));
    let (netns, port) = (0x1_0000_0002, 8080);
    assert_eq!(parse(RawEvent::LOW_CREDIT), Some(Event::LowCredit { record: 1, serial: 7 }));
    assert_eq!(parse(RawEvent::BLOCKING_SENDER), Some(Event::BlockingSender { socket: 99, netns, port }));
    assert_eq!(parse(RawEvent::LISTENING), Some(Event::Listening { netns, port }));
    assert_eq!(parse(RawEvent::LEARNED), Some(Event::Learned { netns, port, kind: 1 }));
    assert_eq!(parse(200), None);
    // A flow follows this one, and it is also how a request to hook the socket begins.
    let flow = Flow::new(9, v4_mapped([127, 0, 0, 1]), 40_000, v4_mapped([127, 0, 0, 2]), 80);
    let packet = HookRequest { flow, cookie: 99 }.packet();
    let mut proved = bytes(raw(RawEvent::PROVED));
    proved.extend(&packet[REQUEST_OFFSET..]);
    assert_eq!(Event::parse(&proved), Some(Event::Proved { record: 1, serial: 7, socket: 99, flow }));
    assert_eq!(parse(RawEvent::PROVED), None);
    assert_eq!(Event::parse(&[1, 0, 0]), None);
}

#[test]
fn only_flows_within_this_host_are_local() {
    let flow = |local, remote| Flow::new(1, local, 1, remote, 2);
    let six = |last: u8| {
        let mut address = [0; 16];
        address[15] = last;
        address
    };
    let four = |v4| v4_mapped(v4);
    assert!(flow(four([127, 0, 0, 1]), four([127, 0, 0, 1])).is_local());
    assert!(flow(four([10, 0, 0, 1]), four([127, 0, 0, 9])).is_local());
    assert!(flow(four([10, 0, 0, 1]), four([10, 0, 0, 1])).is_local());
    assert!(flow(six(9), six(1)).is_local());
    assert!(flow(six(7), six(7)).is_local());
    assert!(!flow(four([10, 0, 0, 1]), four([10, 0, 0, 2])).is_local());
    assert!(!flow(four([127, 0, 0, 1]), four([128, 0, 0, 1])).is_local());
    assert!(!flow(six(1), six(2)).is_local());
}

proptest! {
    #[test]
    fn never_redirects_out_of_order(
        forwarded in any::<u64>(), base in any::<u32>(), ahead in any::<u32>(), size in any::<u32>(),
    ) {
        let record = Snapshot { forwarded, granted: i64::MAX as u64, ..OPEN };
        let write_seq = base.wrapping_add(forwarded as u32).wrapping_add(ahead);
        let redirected = matches!(decide(&record, write_seq, base, size), Verdict::Redirect { .. });
        prop_assert_eq!(redirected, ahead == 0);
    }

    #[test]
    fn never_spends_beyond_the_grant(
        spent in any::<u64>(), credit in 0u64..1 << 40, sizes in prop::collection::vec(1u32..1 << 21, 1..50),
    ) {
        let mut record = Snapshot { spent, granted: regrant(spent, credit), ..OPEN };
        for size in sizes {
            if let Verdict::Redirect { charge, .. } = decide(&record, 9, 9, size) {
                record.spent = record.spent.wrapping_add(charge);
            }
        }
        prop_assert!(record.spent.wrapping_sub(spent) <= credit);
    }

    #[test]
    fn a_grant_only_ever_raises(spent in any::<u64>(), before in 0u64..1 << 40, credit in 0u64..1 << 40) {
        let old = spent.wrapping_add(before);
        let new = grant(spent, credit, old);
        prop_assert_eq!(new.wrapping_sub(spent), before.max(credit));
    }

    #[test]
    fn a_charge_covers_every_skb_the_kernel_may_make(size in 1u32..1 << 24) {
        // An skb holds at least SEGMENT bytes before the next is begun, and costs no more than MESSAGE_OVERHEAD.
        let skbs = u64::from(size.div_ceil(SEGMENT));
        prop_assert!(charge(size) >= u64::from(size) + skbs * MESSAGE_OVERHEAD);
    }

    #[test]
    fn credit_leaves_half_of_the_room_in_reserve(sndbuf in 0u64..1 << 32, queued in 0u64..1 << 33) {
        let credit = credit_for(sndbuf, queued);
        prop_assert!(credit * 2 <= sndbuf.saturating_sub(queued));
        prop_assert!(watermark(credit).low <= credit);
    }
}
