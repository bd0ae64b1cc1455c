//! How much may be done: a bucket that fills again with time. Callers wait for their answers, so to answer them later bounds what a
//! container can make its agent do.

use std::time::{Duration, Instant};

/// So much at once, and one more each `EVERY`.
#[derive(Debug)]
pub struct Budget {
    left: i64,
    since: Instant,
}

const MOST: i64 = 8192;
const EVERY: Duration = Duration::from_micros(50);

impl Budget {
    /// A full one.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self { left: MOST, since: now }
    }

    /// How long there is to wait until there is something to spend; `None` when there is.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.since);
        let gained = i64::try_from(passed.as_nanos() / EVERY.as_nanos()).unwrap_or(i64::MAX);
        if gained >= MOST - self.left {
            (self.left, self.since) = (MOST, now);
        } else {
            self.left += gained;
            self.since += EVERY * u32::try_from(gained).unwrap_or(u32::MAX);
        }
        let missing = u32::try_from(1 - self.left).ok().filter(|missing| *missing > 0)?;
        Some((EVERY * missing).saturating_sub(now.saturating_duration_since(self.since)))
    }

    /// Spends, perhaps more than there is.
    pub const fn spend(&mut self, cost: u32) {
        self.left = self.left.saturating_sub(cost as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_spent_and_fills_again() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert_eq!(budget.wait(start), None);
        budget.spend(8191);
        assert_eq!(budget.wait(start), None);
        budget.spend(20);
        assert_eq!(budget.wait(start), Some(EVERY * 20));
        assert_eq!(budget.wait(start + EVERY * 19 + EVERY / 2), Some(EVERY / 2));
        assert_eq!(budget.wait(start + EVERY * 20), None);
        // Never more than it holds, however long nothing was spent.
        let later = start + Duration::from_secs(3600);
        assert_eq!(budget.wait(later), None);
        budget.spend(8192);
        assert_eq!(budget.wait(later), Some(EVERY));
    }
}
