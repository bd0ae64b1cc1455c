//! How much traffic counts: `--idle-below=1K/1min`, and a connection's traffic measured by it.

use std::fmt;
use std::time::{Duration, Instant};

/// Bytes within a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// So many; not 0.
    pub bytes: u64,
    /// Within so long; [`SHORTEST`] to [`LONGEST`].
    pub within: Duration,
}

/// In a shorter time, one look at all connections would hardly be over before the next.
pub const SHORTEST: Duration = Duration::from_millis(100);

/// No idle time is meant to be longer than this.
pub const LONGEST: Duration = Duration::from_secs(86_400);

/// The suffixes of systemd.syntax(7)'s sizes.
pub const SUFFIXES: [(char, u64); 3] = [('K', 1 << 10), ('M', 1 << 20), ('G', 1 << 30)];

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |factor: u64| self.bytes.is_multiple_of(factor);
        match SUFFIXES.into_iter().rev().find(|(_, factor)| of(*factor)) {
            Some((suffix, factor)) => write!(f, "{}{suffix}/", self.bytes / factor)?,
            None => write!(f, "{}/", self.bytes)?,
        }
        match (self.within.as_secs(), self.within.subsec_nanos()) {
            (seconds, 0) if seconds % 3600 == 0 => write!(f, "{}h", seconds / 3600),
            (seconds, 0) if seconds % 60 == 0 => write!(f, "{}min", seconds / 60),
            _ => write!(f, "{:?}", self.within),
        }
    }
}

impl Rate {
    /// How often a connection's traffic is looked at, so that it is known to a part.
    #[must_use]
    pub fn step(self) -> Duration {
        self.within / PARTS as u32
    }
}

/// How many parts the time of a [`Rate`] is looked at in.
const PARTS: usize = 8;

/// One connection's traffic of the last while. It never reaches its rate while fewer bytes have moved within the time, and always
/// does when as many have moved within seven eighths of it.
#[derive(Debug)]
pub struct Meter {
    rate: Rate,
    /// What moved in each part, the present one last.
    parts: [u64; PARTS],
    /// When the present part began.
    since: Instant,
    /// How much had moved at the last look.
    total: u64,
}

impl Meter {
    /// One that has seen nothing yet.
    #[must_use]
    pub const fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, parts: [0; PARTS], since: now, total: 0 }
    }

    /// So much has moved by now, all in all: does that reach the rate?
    pub fn reaches(&mut self, total: u64, now: Instant) -> bool {
        let step = self.rate.step();
        let passed = now.saturating_duration_since(self.since).as_nanos() / step.as_nanos();
        if passed >= PARTS as u128 {
            (self.parts, self.since) = ([0; PARTS], now);
        } else if let Ok(passed) = u32::try_from(passed) {
            self.parts.rotate_left(passed as usize);
            self.parts[PARTS - passed as usize..].fill(0);
            self.since += step * passed;
        }
        let moved = total.saturating_sub(std::mem::replace(&mut self.total, total));
        let present = &mut self.parts[PARTS - 1];
        *present = present.saturating_add(moved);
        self.parts.iter().fold(0_u64, |sum, part| sum.saturating_add(*part)) >= self.rate.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a heartbeat and a request look like, in milliseconds from one look to the next and bytes between.
    fn traffic() -> impl Strategy<Value = Vec<(u64, u64)>> {
        proptest::collection::vec((1_u64..300, 0_u64..400), 1..200)
    }

    /// The most that moved in any stretch of `within` that ends with a look; a look's bytes came at that look.
    fn most(looks: &[(u64, u64)], within: u64) -> Vec<u64> {
        let mut at = 0;
        let times: Vec<(u64, u64)> = looks
            .iter()
            .map(|&(step, bytes)| {
                at += step;
                (at, bytes)
            })
            .collect();
        let sum = |end: u64| -> u64 {
            times.iter().filter(|(at, _)| *at <= end && at + within > end).map(|(_, bytes)| bytes).sum()
        };
        times.iter().map(|&(at, _)| sum(at)).collect()
    }

    proptest! {
        /// What stays below it never reaches it; what moves in an eighth less always does.
        #[test]
        fn a_rate_is_known_to_an_eighth(looks in traffic()) {
            let rate = Rate { bytes: 1000, within: Duration::from_secs(1) };
            let start = Instant::now();
            let (mut meter, mut at, mut total) = (Meter::new(rate, start), 0, 0);
            let (surely, at_most) = (most(&looks, 875), most(&looks, 1000));
            for (number, &(step, bytes)) in looks.iter().enumerate() {
                at += step;
                total += bytes;
                let reached = meter.reaches(total, start + Duration::from_millis(at));
                prop_assert!(reached || surely[number] < rate.bytes, "look {}", number);
                prop_assert!(!reached || at_most[number] >= rate.bytes, "look {}", number);
            }
        }
    }
}
