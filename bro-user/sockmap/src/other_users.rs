//! Sockets that the programs met at watched ports and left alone, since they belong to another user: counted by the programs, and
//! told now and then by the forwarders that watch.

use std::os::fd::AsFd as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bro_ebpf::Counter;

use super::maps::Descriptors;
use super::sys::Mapping;

/// At most one line in this time: the owner of such sockets decides how many there are.
const STEP: Duration = Duration::from_secs(60);

/// The count, and how much of it has been told.
#[derive(Debug)]
pub struct Foreign {
    totals: Mapping<AtomicU64>,
    told: Announced,
}

/// What there is to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForeignNews {
    /// How many since the last time.
    pub new: u64,
    /// How many since the programs were loaded.
    pub total: u64,
}

impl Foreign {
    /// Begins with what has not been counted yet.
    ///
    /// # Errors
    /// mmap's.
    pub fn of(descriptors: &Descriptors) -> std::io::Result<Self> {
        let totals = Mapping::of_numbers(descriptors.totals.as_fd(), Counter::COUNT)?;
        let mut foreign = Self { totals, told: Announced::default() };
        foreign.told.total = foreign.count();
        Ok(foreign)
    }

    fn count(&self) -> u64 {
        self.totals.get(Counter::Foreign as usize).map_or(0, |count| count.load(Relaxed))
    }

    /// What there is to tell at `now`, if it is time to.
    pub fn news(&mut self, now: Instant) -> Option<ForeignNews> {
        self.told.news(self.count(), now)
    }

    /// What has not been told, at the end.
    #[must_use]
    pub fn rest(&self) -> Option<ForeignNews> {
        self.told.rest(self.count())
    }
}

#[derive(Debug, Default)]
struct Announced {
    total: u64,
    last: Option<Instant>,
}

impl Announced {
    fn rest(&self, total: u64) -> Option<ForeignNews> {
        // The maps are the user's, and the user may have made it less.
        let new = total.saturating_sub(self.total);
        (new > 0).then_some(ForeignNews { new, total })
    }

    fn news(&mut self, total: u64, now: Instant) -> Option<ForeignNews> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < STEP) {
            return None;
        }
        let news = self.rest(total)?;
        *self = Self { total, last: Some(now) };
        Some(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_others_together() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut told = Announced { total: 5, last: None };
        assert_eq!(told.news(5, at(0)), None);
        assert_eq!(told.news(6, at(1)), Some(ForeignNews { new: 1, total: 6 }));
        assert_eq!(told.news(1000, at(2)), None);
        assert_eq!(told.rest(1000), Some(ForeignNews { new: 994, total: 1000 }));
        assert_eq!(told.news(1000, at(61)), Some(ForeignNews { new: 994, total: 1000 }));
        assert_eq!(told.news(1000, at(200)), None);
        assert_eq!(told.news(1001, at(201)), Some(ForeignNews { new: 1, total: 1001 }));
        assert_eq!(told.news(0, at(300)), None);
    }
}
