//! Every interleaving of the sender, the program, the forwarder and the target's ACKs, explored exhaustively over a small
//! connection: no byte is reordered, repeated or lost, the target's send buffer is never found full by a redirect, and the
//! lane always reopens.
//!
//! Each step of [`State::steps`] is what one party does without the others being able to get in between: one load or store
//! of the shared record, one system call, one push under a socket's lock.

use std::collections::{HashSet, VecDeque};

use bro_ebpf::{Reason, Snapshot, Verdict, credit_for, decide, grant, regrant, watermark};

/// What a segment costs the target beside its payload in the model: less than is charged, as in the kernel.
const SEGMENT_MEMORY: u64 = 1280;
/// The sender's first sequence number: it wraps while the model runs.
const BASE: u32 = u32::MAX - 5000;

/// A run of the stream's content: positions `.0 .. .0 + .1`.
type Run = (u32, u32);

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Sender {
    Idle,
    /// The program runs on a message of this size; it has read `on` and `forwarded`.
    ReadForwarded {
        size: u32,
        on: bool,
        forwarded: u64,
    },
    /// It let the message be redirected and charged it; the push into the target is still to come.
    InFlight {
        size: u32,
    },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Forwarder {
    Idle,
    /// Wrote `total` bytes to the target so far; read `spent` next.
    Wrote {
        total: u64,
    },
    WroteReadSpent {
        total: u64,
        spent: u64,
    },
    WroteGranted {
        total: u64,
    },
    /// Takes care of an event of low credit.
    Event {
        spent: u64,
    },
    EventMeasured {
        spent: u64,
        credit: u64,
    },
    EventGranted {
        credit: u64,
    },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    // The record.
    on: bool,
    forwarded: u64,
    granted: u64,
    spent: u64,
    low: u64,
    notified: bool,
    /// Events in the ring buffer.
    events: u8,
    // The sender.
    /// In the senders' map: what it sends is asked about.
    hooked: bool,
    /// How often it may yet be hooked or let go.
    hooks: u8,
    sender: Sender,
    write_seq: u32,
    position: u32,
    sends: u8,
    // The way through the forwarder.
    forwarder: Forwarder,
    passed: VecDeque<Run>,
    pipe: VecDeque<Run>,
    written: u64,
    toggles: u8,
    // The target.
    delivered: u32,
    segments: VecDeque<u64>,
}

/// What a partial send or write takes of `size`; 0 for what is small enough to be taken whole (else the model never ends).
fn part_of(size: u32) -> u32 {
    if size >= 20_000 { size - 12_000 } else { 0 }
}

/// One set-up to explore.
struct Setup {
    sndbuf: u64,
    /// What the kernel lets the sender put into its own send buffer.
    own_sndbuf: u32,
    sizes: &'static [u32],
    sends: u8,
    toggles: u8,
    /// How often the sender is hooked or let go, at any moment but within a message of its own; it begins unhooked if it is.
    hooks: u8,
}

impl State {
    fn new(setup: &Setup) -> Self {
        let credit = credit_for(setup.sndbuf, 0);
        Self {
            on: true,
            forwarded: 0,
            granted: credit,
            spent: 0,
            low: watermark(credit).low,
            notified: watermark(credit).notified,
            events: 0,
            hooked: setup.hooks == 0,
            hooks: setup.hooks,
            sender: Sender::Idle,
            write_seq: BASE,
            position: 0,
            sends: setup.sends,
            forwarder: Forwarder::Idle,
            passed: VecDeque::new(),
            pipe: VecDeque::new(),
            written: 0,
            toggles: setup.toggles,
            delivered: 0,
            segments: VecDeque::new(),
        }
    }

    fn queued(&self) -> u64 {
        self.segments.iter().sum()
    }

    /// The target's transmit queue takes a run: here every reordered, repeated or lost byte would show.
    fn deliver(&mut self, run: Run) {
        assert_eq!(run.0, self.delivered, "out of order: {self:?}");
        self.delivered += run.1;
        self.segments.push_back(u64::from(run.1) + SEGMENT_MEMORY * u64::from(1 + run.1 / 65536));
    }

    /// The program ran to its end on a message of `size`.
    fn decided(&mut self, setup: &Setup, size: u32, on: bool, forwarded: u64, out: &mut Vec<Self>) {
        let seen = Snapshot {
            on,
            forwarded,
            spent: self.spent,
            granted: self.granted,
            low: self.low,
            notified: self.notified,
            burst: 0,
        };
        match decide(&seen, self.write_seq, BASE, size) {
            Verdict::Redirect { charge, notify } => {
                let mut next = self.clone();
                next.notify(notify);
                next.spent += charge;
                next.sender = Sender::InFlight { size };
                out.push(next);
            }
            Verdict::Pass { notify, .. } => self.pass(setup, size, notify, out),
        }
    }

    /// Ordinary TCP takes all of a message, some of it, or nothing (EAGAIN); what is left is sent again.
    fn pass(&self, setup: &Setup, size: u32, notify: bool, out: &mut Vec<Self>) {
        let own = self.passed.iter().map(|run| run.1).sum::<u32>();
        for taken in [size, part_of(size), 0] {
            if taken > 0 && own + taken > setup.own_sndbuf {
                continue;
            }
            let mut next = self.clone();
            next.notify(notify);
            next.sender = Sender::Idle;
            if taken > 0 {
                next.passed.push_back((next.position, taken));
                next.position += taken;
                next.write_seq = next.write_seq.wrapping_add(taken);
            }
            out.push(next);
        }
    }

    fn notify(&mut self, notify: bool) {
        if notify {
            self.notified = true;
            self.events += 1;
        }
    }

    /// Every step any party can take next.
    fn steps(&self, setup: &Setup) -> Vec<Self> {
        let mut out = Vec::new();
        self.sender_steps(setup, &mut out);
        self.forwarder_steps(setup, &mut out);
        if !self.segments.is_empty() {
            let mut next = self.clone();
            next.segments.pop_front();
            out.push(next);
        }
        out
    }

    fn sender_steps(&self, setup: &Setup, out: &mut Vec<Self>) {
        if self.hooks > 0 && matches!(self.sender, Sender::Idle) {
            // The socket's lock keeps this out of a message that the program was asked about.
            let mut next = self.clone();
            next.hooks -= 1;
            next.hooked = !next.hooked;
            out.push(next);
        }
        match self.sender {
            Sender::Idle if self.sends > 0 && !self.hooked => {
                for &size in setup.sizes {
                    let mut next = self.clone();
                    next.sends -= 1;
                    next.pass(setup, size, false, out);
                }
            }
            Sender::Idle if self.sends > 0 => {
                for &size in setup.sizes {
                    let mut next = self.clone();
                    next.sends -= 1;
                    next.sender = Sender::ReadForwarded { size, on: self.on, forwarded: self.forwarded };
                    out.push(next);
                }
            }
            Sender::Idle => {}
            Sender::ReadForwarded { size, on, forwarded } => {
                self.clone().decided(setup, size, on, forwarded, out);
            }
            Sender::InFlight { size } => {
                let mut next = self.clone();
                next.deliver((next.position, size));
                assert!(next.queued() <= setup.sndbuf, "a redirect met a full send buffer: {self:?}");
                next.position += size;
                next.sender = Sender::Idle;
                out.push(next);
            }
        }
    }

    fn forwarder_steps(&self, setup: &Setup, out: &mut Vec<Self>) {
        let mut next = self.clone();
        match self.forwarder {
            Forwarder::Idle => {
                if let Some(run) = self.passed.front().copied() {
                    let mut read = self.clone();
                    read.passed.pop_front();
                    read.pipe.push_back(run);
                    out.push(read);
                }
                if let Some(run) = self.pipe.front().copied()
                    && self.queued() < setup.sndbuf
                {
                    for taken in [run.1, part_of(run.1)] {
                        if taken == 0 {
                            continue;
                        }
                        let mut wrote = self.clone();
                        wrote.pipe.pop_front();
                        if taken < run.1 {
                            wrote.pipe.push_front((run.0 + taken, run.1 - taken));
                        }
                        wrote.deliver((run.0, taken));
                        wrote.written += u64::from(taken);
                        wrote.forwarder = Forwarder::Wrote { total: wrote.written };
                        out.push(wrote);
                    }
                }
                if self.events > 0 {
                    let mut event = self.clone();
                    event.events -= 1;
                    event.forwarder = Forwarder::Event { spent: self.spent };
                    out.push(event);
                }
                if self.toggles > 0 {
                    let mut toggled = self.clone();
                    toggled.toggles -= 1;
                    toggled.on = !toggled.on;
                    out.push(toggled);
                }
                return;
            }
            Forwarder::Wrote { total } => {
                next.forwarder = Forwarder::WroteReadSpent { total, spent: self.spent };
            }
            Forwarder::WroteReadSpent { total, spent } => {
                let credit = credit_for(setup.sndbuf, self.queued());
                next.granted = regrant(spent, credit);
                next.low = watermark(credit).low;
                next.notified = watermark(credit).notified;
                next.forwarder = Forwarder::WroteGranted { total };
            }
            Forwarder::WroteGranted { total } => {
                next.forwarded = total;
                next.forwarder = Forwarder::Idle;
            }
            Forwarder::Event { spent } => {
                let credit = credit_for(setup.sndbuf, self.queued());
                next.forwarder = Forwarder::EventMeasured { spent, credit };
            }
            Forwarder::EventMeasured { spent, credit } => {
                next.granted = grant(spent, credit, self.granted);
                next.forwarder = Forwarder::EventGranted { credit };
            }
            Forwarder::EventGranted { credit } => {
                next.low = watermark(credit).low;
                next.notified = watermark(credit).notified;
                next.forwarder = Forwarder::Idle;
            }
        }
        out.push(next);
    }

    /// The sender pauses: the others do all there is to do, and the reader reads everything.
    fn settle(mut self, setup: &Setup) -> Self {
        loop {
            let mut steps = Vec::new();
            let busy = !matches!(self.sender, Sender::Idle);
            if busy {
                self.sender_steps(setup, &mut steps);
            } else {
                self.segments.clear();
                let mut quiet = self.clone();
                quiet.toggles = 0;
                quiet.forwarder_steps(setup, &mut steps);
            }
            match steps.into_iter().next() {
                Some(next) => self = next,
                None => return self,
            }
        }
    }

    fn verdict(&self, size: u32) -> Verdict {
        let seen = Snapshot {
            on: self.on,
            forwarded: self.forwarded,
            spent: self.spent,
            granted: self.granted,
            low: self.low,
            notified: self.notified,
            burst: 0,
        };
        decide(&seen, self.write_seq, BASE, size)
    }

    /// After a pause, at most one more message takes the ordinary way; the next is redirected.
    fn reopens(&self, setup: &Setup) {
        let mut settled = self.clone().settle(setup);
        settled.on = true;
        assert_eq!(settled.delivered, settled.position, "bytes are stuck: {settled:?}");
        for size in setup.sizes.iter().copied() {
            let mut state = settled.clone();
            if let Verdict::Pass { reason, .. } = state.verdict(size) {
                assert_eq!(reason, Reason::Credit, "order must hold after a pause: {state:?}");
                let mut out = Vec::new();
                state.clone().decided(setup, size, true, state.forwarded, &mut out);
                state = out.into_iter().next().expect("a pass has an outcome").settle(setup);
            }
            let verdict = state.verdict(size);
            assert!(matches!(verdict, Verdict::Redirect { .. }), "shut for ever ({verdict:?}): {state:?}");
        }
    }
}

fn explore(setup: &Setup) -> usize {
    let mut seen = HashSet::new();
    let mut queue = vec![State::new(setup)];
    let (mut redirected_after_pass, mut ended) = (false, 0usize);
    while let Some(state) = queue.pop() {
        for next in state.steps(setup) {
            redirected_after_pass |= matches!(next.sender, Sender::InFlight { .. }) && next.written > 0;
            if !seen.contains(&next) {
                next.reopens(setup);
                ended += usize::from(next.sends == 0 && next.delivered == next.position);
                seen.insert(next.clone());
                queue.push(next);
            }
        }
    }
    assert!(ended > 0, "no run came to its end");
    assert!(redirected_after_pass, "the model never reached a redirect after a pass");
    seen.len()
}

#[test]
fn small_and_large_messages_against_a_small_send_buffer() {
    let states = explore(&Setup {
        sndbuf: 87_040,
        own_sndbuf: 60_000,
        sizes: &[1, 20_000],
        sends: 4,
        toggles: 0,
        hooks: 0,
    });
    assert!(states > 10_000, "only {states} states: the model lost its interleavings");
}

#[test]
fn messages_that_use_up_the_credit_at_once() {
    let states = explore(&Setup {
        sndbuf: 65_536,
        own_sndbuf: 60_000,
        sizes: &[28_000],
        sends: 4,
        toggles: 0,
        hooks: 0,
    });
    assert!(states > 10_000, "only {states} states: the model lost its interleavings");
}

#[test]
fn the_lane_is_opened_and_shut_while_bytes_flow() {
    let states = explore(&Setup {
        sndbuf: 87_040,
        own_sndbuf: 60_000,
        sizes: &[3000],
        sends: 5,
        toggles: 3,
        hooks: 0,
    });
    assert!(states > 10_000, "only {states} states: the model lost its interleavings");
}

/// A client is hooked when it has sent some messages, let go, and (never so in fact) hooked again: what it sent meanwhile is
/// counted all the same, by the bytes it gave to TCP since it was established.
#[test]
fn a_sender_that_is_hooked_late_and_let_go() {
    let states = explore(&Setup {
        sndbuf: 87_040,
        own_sndbuf: 60_000,
        sizes: &[1, 20_000],
        sends: 3,
        toggles: 0,
        hooks: 2,
    });
    assert!(states > 10_000, "only {states} states: the model lost its interleavings");
}
