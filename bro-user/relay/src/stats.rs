//! What a forwarder counts: the engine keeps a tally per listener; a few numbers are shared with the control process all the
//! time.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::connection::End;
use crate::counters::Counters;
use crate::flows::DatagramTally;
use crate::sys::SharedMemory;

/// What STATUS= and the idle exit need. Written by the engine alone; in memory that a forked process shares.
#[derive(Debug)]
pub struct Stats {
    counters: SharedMemory<Counters>,
    /// When counting began. The clock is the same for all processes (CLOCK_MONOTONIC).
    start: Instant,
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

    /// Idleness counts from now on: the last connection has just ended, or a byte has moved. A store, not a message: to wake the
    /// control process for each of a series of short connections would cost more than relaying them.
    pub fn now_idle(&self) {
        Self::set(&self.idle_since, u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX));
    }

    /// Since when there has been no connection that keeps the service awake; `None` while there is one, or while a client waits for
    /// the service.
    #[must_use]
    pub fn idle_from(&self) -> Option<Instant> {
        // In this order: a count of zero comes with the instant that was stored before it.
        let idle = Self::get(&self.keeping) == 0 && Self::get(&self.held) == 0;
        idle.then(|| self.start + Duration::from_millis(Self::get(&self.idle_since)))
    }

    /// Since when nothing has moved, no matter which clients are connected; `None` while a client waits for the service.
    #[must_use]
    pub fn quiet_from(&self) -> Option<Instant> {
        let waited_for = Self::get(&self.held) > 0;
        (!waited_for).then(|| self.start + Duration::from_millis(Self::get(&self.idle_since)))
    }

    /// Connections and flows now.
    #[must_use]
    pub fn guests(&self) -> u64 {
        Self::get(&self.open) + Self::get(&self.flows)
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
    /// Of those bytes, the ones that went from clients to the service; the others went to clients.
    #[serde(default)]
    pub to_service: Moved,
    /// From accept to the connection with the service, of clients that woke it.
    #[serde(default)]
    pub cold_start_times: Times,
    /// Connections that have ended, by the `reason` of their log lines.
    #[serde(default)]
    pub ended: EndCounts,
    /// Times there were as many connections as `--connections-max` allows.
    #[serde(default)]
    pub full: u64,
    /// Times the kernel had no descriptor or memory for one more.
    #[serde(default)]
    pub exhausted: u64,
    /// Datagrams, of a socket that takes them.
    #[serde(default, skip_serializing_if = "DatagramTally::is_empty")]
    pub datagrams: DatagramTally,
}

/// Bytes, by what moved them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// By a kernel lane.
    pub kernel: u64,
    /// By splice.
    pub spliced: u64,
    /// By copying.
    pub copied: u64,
}

impl Moved {
    /// All of them.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.kernel + self.spliced + self.copied
    }
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.kernel += other.kernel;
        self.spliced += other.spliced;
        self.copied += other.copied;
    }
}

/// How many bounds a histogram has.
const BOUNDS: usize = 12;

/// How long something took, each time, as a histogram.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// All of it together, in milliseconds.
    pub sum_ms: u64,
    /// For each of [`Times::BOUNDS_MS`], how many took at most that and more than the bound before; the last ones took longer.
    counts: [u64; BOUNDS + 1],
}

impl Times {
    /// From a container that is there at once to one that is pulled, or that loads a model.
    pub const BOUNDS_MS: [u64; BOUNDS] =
        [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 120_000, 600_000];

    /// Counts one more.
    pub fn add(&mut self, span: Duration) {
        let ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        // What took 50.9 ms took more than 50.
        let over = |bound: &u64| span > Duration::from_millis(*bound);
        let bucket = Self::BOUNDS_MS.iter().position(|bound| !over(bound)).unwrap_or(Self::BOUNDS_MS.len());
        self.counts[bucket] += 1;
        self.sum_ms = self.sum_ms.saturating_add(ms);
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Each bound in milliseconds with how many took at most that and more than the one before; the last has none.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        let bounds = Self::BOUNDS_MS.into_iter().map(Some).chain([None]);
        bounds.zip(self.counts)
    }
}

impl std::ops::AddAssign<&Self> for Times {
    fn add_assign(&mut self, other: &Self) {
        self.sum_ms = self.sum_ms.saturating_add(other.sum_ms);
        for (mine, its) in self.counts.iter_mut().zip(other.counts) {
            *mine = mine.saturating_add(its);
        }
    }
}

/// Connections that have ended, by why. Only what bro itself gives as a reason is one, whatever the relay process says.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<String, u64>", into = "BTreeMap<&'static str, u64>")]
pub struct EndCounts([u64; End::WORDS.len()]);

impl EndCounts {
    /// One more.
    pub fn add(&mut self, end: End) {
        if let Some(at) = End::WORDS.iter().position(|word| *word == end.word()) {
            self.0[at] += 1;
        }
    }

    /// Every reason with how many there were.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
        End::WORDS.into_iter().zip(self.0)
    }
}

impl From<BTreeMap<String, u64>> for EndCounts {
    fn from(said: BTreeMap<String, u64>) -> Self {
        Self(End::WORDS.map(|word| said.get(word).copied().unwrap_or(0)))
    }
}

impl From<EndCounts> for BTreeMap<&'static str, u64> {
    fn from(ended: EndCounts) -> Self {
        ended.each().filter(|(_, count)| *count > 0).collect()
    }
}

impl std::ops::AddAssign<&Self> for EndCounts {
    fn add_assign(&mut self, other: &Self) {
        for (mine, its) in self.0.iter_mut().zip(other.0) {
            *mine = mine.saturating_add(its);
        }
    }
}

impl Tally {
    /// The bytes that went to clients.
    #[must_use]
    pub const fn to_clients(&self) -> Moved {
        Moved {
            kernel: self.kernel.saturating_sub(self.to_service.kernel),
            spliced: self.spliced.saturating_sub(self.to_service.spliced),
            copied: self.copied.saturating_sub(self.to_service.copied),
        }
    }

    /// Connections and flows now.
    #[must_use]
    pub const fn guests(&self) -> u64 {
        self.open + self.datagrams.open
    }

    /// The figures that only grow, without those of this moment.
    #[must_use]
    pub fn lasting(&self) -> Self {
        Self { open: 0, held: 0, silent: 0, datagrams: self.datagrams.lasting(), ..self.clone() }
    }
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
        self.to_service += other.to_service;
        self.cold_start_times += &other.cold_start_times;
        self.ended += &other.ended;
        self.full += other.full;
        self.exhausted += other.exhausted;
        self.datagrams += &other.datagrams;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_its_bucket() {
        let mut times = Times::default();
        for ms in [0, 50, 51, 600_000, 600_001] {
            times.add(Duration::from_millis(ms));
        }
        times.add(Duration::from_micros(50_001));
        let buckets: Vec<_> = times.buckets().collect();
        assert_eq!((buckets[0], buckets[1]), ((Some(50), 2), (Some(100), 2)));
        assert_eq!((buckets[11], buckets[12]), ((Some(600_000), 1), (None, 1)));
        assert_eq!((times.count(), times.sum_ms), (6, 50 + 51 + 1_200_001 + 50));
        let mut twice = times.clone();
        twice += &times;
        assert_eq!((twice.count(), twice.sum_ms), (12, 2 * times.sum_ms));
    }

    #[test]
    fn a_tally_of_an_older_forwarder_is_read() {
        let old = r#"{"accepted":3,"open":1,"held":0,"cold_starts":1,"kernel":0,"spliced":7,"copied":0,"passes":0,"grants":0}"#;
        let tally: Tally = serde_json::from_str(old).unwrap();
        assert_eq!(
            (tally.accepted, tally.to_service, &tally.ended),
            (3, Moved::default(), &EndCounts::default())
        );
        // It did not tell the directions, so all went the one way that is not told.
        assert_eq!(tally.to_clients().spliced, 7);
    }

    #[test]
    fn sums_keep_every_reason() {
        let (mut one, mut other) = (Tally::default(), Tally { open: 4, ..Tally::default() });
        one.ended.add(End::Eof);
        other.ended.add(End::Eof);
        other.ended.add(End::ClientReset(nix::errno::Errno::ECONNRESET));
        one += &other;
        let json = serde_json::to_value(&one.ended).unwrap();
        assert_eq!(json, serde_json::json!({ "eof": 2, "client-reset": 1 }));
        assert_eq!(serde_json::from_value::<EndCounts>(json).unwrap(), one.ended);
        assert_eq!((one.open, one.lasting().open), (4, 0));
    }

    #[test]
    fn a_reason_of_another_program_is_none() {
        let ended: EndCounts = serde_json::from_str(r#"{"eof":1,"x\"} 1\n":7}"#).unwrap();
        assert_eq!(ended.each().filter(|(_, count)| *count > 0).collect::<Vec<_>>(), [("eof", 1)]);
    }
}
