//! What a forwarder counts: the engine keeps a tally per listener; a few numbers are shared with the control process all the
//! time.

use std::ops::Deref;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::sys::SharedMemory;

/// What STATUS= and the idle exit need. Written by the engine alone; in memory that a forked process shares.
#[derive(Debug)]
pub struct Stats {
    counters: SharedMemory<Counters>,
    /// When counting began. The clock is the same for all processes (CLOCK_MONOTONIC).
    start: Instant,
}

/// The numbers of [`Stats`].
#[derive(Debug, Default)]
#[repr(C)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections that exist now, held ones included.
    pub open: AtomicU64,
    /// Those of them that keep the service awake: all but the ones of `--idle-ignore`.
    pub keeping: AtomicU64,
    /// Clients that wait for the service now.
    pub held: AtomicU64,
    /// When the last connection ended (or, by bytes, the last byte moved), in milliseconds since the start.
    pub idle_since: AtomicU64,
}

impl Deref for Stats {
    type Target = Counters;

    fn deref(&self) -> &Counters {
        self.counters.get()
    }
}

impl Stats {
    /// Zeros.
    ///
    /// # Errors
    /// mmap's.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { counters: SharedMemory::new()?, start: Instant::now() })
    }

    /// Idleness counts from now on: the last connection has just ended, or a byte has moved. A store, not a message: waking the control side for each of a series of short
    /// connections would cost more than relaying them.
    pub fn now_idle(&self) {
        Self::set(&self.idle_since, u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX));
    }

    /// Since when there has been no connection that keeps the service awake; `None` while there is one, or while a client waits for the
    /// service.
    #[must_use]
    pub fn idle_from(&self) -> Option<Instant> {
        // In this order: a count of zero comes with the instant that was stored before it.
        let idle = Self::get(&self.keeping) == 0 && Self::get(&self.held) == 0;
        idle.then(|| self.start + Duration::from_millis(Self::get(&self.idle_since)))
    }

    /// Since when nothing has moved, whoever is connected; `None` while a client waits for the service.
    #[must_use]
    pub fn quiet_from(&self) -> Option<Instant> {
        let waited_for = Self::get(&self.held) > 0;
        (!waited_for).then(|| self.start + Duration::from_millis(Self::get(&self.idle_since)))
    }

    /// How long ago [`Stats::now_idle`] was.
    #[must_use]
    pub fn since_active(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(Self::get(&self.idle_since)))
    }

    /// The current value of a counter.
    #[must_use]
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Acquire)
    }

    /// Sets a counter that only the caller writes.
    pub fn set(counter: &AtomicU64, value: u64) {
        counter.store(value, Release);
    }
}

/// One listener's figures, or all listeners' together.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Connections now, held ones included.
    pub open: u64,
    /// Clients that wait for the service now.
    pub held: u64,
    /// Clients that a sleeping service has, and that have not said anything yet (`--wake-on=data`).
    #[serde(default)]
    pub silent: u64,
    /// Times a client found the service asleep.
    pub cold_starts: u64,
    /// Bytes that took a kernel lane: the forwarder never woke up for them.
    pub kernel: u64,
    /// Bytes moved by splice.
    pub spliced: u64,
    /// Bytes moved by copying.
    pub copied: u64,
    /// Messages that a hooked sender gave to ordinary TCP, because the lane was shut at that moment.
    pub passes: u64,
    /// Times the forwarder granted a lane credit.
    pub grants: u64,
}

impl std::ops::AddAssign<&Self> for Tally {
    fn add_assign(&mut self, other: &Self) {
        self.accepted += other.accepted;
        self.open += other.open;
        self.held += other.held;
        self.silent += other.silent;
        self.cold_starts += other.cold_starts;
        self.kernel += other.kernel;
        self.spliced += other.spliced;
        self.copied += other.copied;
        self.passes += other.passes;
        self.grants += other.grants;
    }
}
