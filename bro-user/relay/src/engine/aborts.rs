//! Aborts on their way from one side to the other: they overtake no byte, and do not wait for ever.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

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

    pub(super) fn push(&mut self, when: Instant, index: usize, number: u64) {
        self.0.push(Reverse((when, index, number)));
    }

    /// One that is due.
    pub(super) fn pop(&mut self, now: Instant) -> Option<(usize, u64)> {
        let Reverse((when, index, number)) = *self.0.peek()?;
        if when > now {
            return None;
        }
        let _due = self.0.pop();
        Some((index, number))
    }
}
