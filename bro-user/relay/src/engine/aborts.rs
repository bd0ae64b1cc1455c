//! Aborts on their way from one side to the other: they overtake no byte, and do not wait for ever.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Engine;
use crate::connection::{End, Verdict};
use crate::relay::Side;

/// When which connections are to be looked at: the kernel does not tell when all that was sent has been acknowledged. A
/// connection that has ended meanwhile is recognised by its number.
#[derive(Debug, Default)]
pub(super) struct Looks(BinaryHeap<Reverse<(Instant, usize, u64)>>);

impl Looks {
    /// How long until the next one; `None` if there is none.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.0.peek().map(|Reverse((when, ..))| when.saturating_duration_since(Instant::now()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn push(&mut self, when: Instant, index: usize, number: u64) {
        self.0.push(Reverse((when, index, number)));
    }

    /// One that is due.
    fn pop(&mut self, now: Instant) -> Option<(usize, u64)> {
        let Reverse((when, index, number)) = *self.0.peek()?;
        if when > now {
            return None;
        }
        let _due = self.0.pop();
        Some((index, number))
    }
}

impl Engine {
    /// One side has aborted: what it had sent is delivered, then the other side is told. `errno` is what a call on its socket
    /// failed with; without, the kernel is still to be asked.
    pub(super) fn side_aborted(&mut self, index: usize, side: Side, errno: Option<Errno>) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let (number, is_new) = (connection.number, !connection.is_aborted());
        if !connection.abort(side, errno, &mut self.tools) {
            // Both have aborted: the first abort is the reason.
            return self.finish(index, End::Eof);
        }
        self.pump(index, true, true);
        if is_new {
            self.look_at_abort(index, number, Instant::now());
        }
    }

    /// After bytes have moved: passes on an abort that has nothing in front of it any more, or tells epoll what to wait for now.
    pub(super) fn settle(&mut self, index: usize) {
        let Some(connection) = self.connections.get(index) else { return };
        if connection.is_aborted() && connection.owed().is_none() {
            return self.finish(index, End::Eof);
        }
        self.register(index);
    }

    /// Looks at the connections that are due.
    pub(super) fn look_at_aborts(&mut self) {
        if self.looks.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some((index, number)) = self.looks.pop(now) {
            self.look_at_abort(index, number, now);
        }
    }

    fn look_at_abort(&mut self, index: usize, number: u64, now: Instant) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        if connection.number != number {
            return;
        }
        let owed = connection.owed();
        let (Some(abort), Some(progress)) = (connection.abort_mut(), owed) else { return self.settle(index) };
        let verdict = abort.look(now, progress);
        connection.active = abort.progressed();
        match verdict {
            Verdict::Wait(when) => self.looks.push(when, index, number),
            Verdict::Overdue => {
                tracing::info!(
                    conn = number,
                    "not all that was sent before the reset could be delivered: the other side does not take it"
                );
                self.finish(index, End::Eof);
            }
        }
    }
}
