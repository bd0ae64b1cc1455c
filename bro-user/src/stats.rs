//! The forwarder's counters: written by the engine, read by STATUS=, logs and tests. Relaxed atomics: each is a figure of its own.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Totals since the start, and what is now.
#[derive(Debug, Default)]
pub struct Stats {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections that exist now, held ones included.
    pub open: AtomicU64,
    /// Clients that wait for the service now.
    pub held: AtomicU64,
    /// Times a client found the service asleep.
    pub cold_starts: AtomicU64,
    /// Bytes moved by splice.
    pub spliced: AtomicU64,
    /// Bytes moved by copying.
    pub copied: AtomicU64,
}

impl Stats {
    /// The current value of a counter.
    #[must_use]
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Relaxed)
    }

    /// Sets a counter that only the caller writes.
    pub fn set(counter: &AtomicU64, value: u64) {
        counter.store(value, Relaxed);
    }
}
