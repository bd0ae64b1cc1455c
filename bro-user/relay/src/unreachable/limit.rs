//! How many clients are told, and how often one: as the kernel bounds such messages of its own (icmp(7), icmp_ratelimit,
//! icmp_msgs_per_sec and icmp_msgs_burst), for what goes out by a raw socket it does not.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::peer::Source;

/// All of them together: a thousand a second, fifty at once.
const EVERY: Duration = Duration::from_millis(1);
const BURST: u32 = 50;

/// One source: one a second, six at once.
const EVERY_OF_ONE: Duration = Duration::from_secs(1);
const BURST_OF_ONE: u32 = 6;

/// More sources than can have been told within the time that one is remembered for.
const SOURCES: usize = 8192;

/// What may still be sent. A source's share, and the one of all, is whole again at an instant, which each message puts off.
#[derive(Debug, Default)]
pub struct UnreachableLimit {
    all: Option<Instant>,
    sources: HashMap<Source, Instant>,
}

impl UnreachableLimit {
    /// May this source be told one more now? If so, it counts.
    pub fn allows(&mut self, source: Source, now: Instant) -> bool {
        let of_one = one_more(self.sources.get(&source).copied(), now, EVERY_OF_ONE, BURST_OF_ONE);
        let (Some(of_one), Some(all)) = (of_one, one_more(self.all, now, EVERY, BURST)) else { return false };
        if self.sources.len() >= SOURCES {
            self.sources.retain(|_, whole| *whole > now);
        }
        self.all = Some(all);
        let _before = self.sources.insert(source, of_one);
        true
    }
}

/// When a share is whole again after one more message, if that is in it.
fn one_more(whole: Option<Instant>, now: Instant, every: Duration, burst: u32) -> Option<Instant> {
    let whole = whole.map_or(now, |whole| whole.max(now));
    (whole - now <= every * (burst - 1)).then(|| whole + every)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(limit: &mut UnreachableLimit, source: u32, now: Instant) -> usize {
        (0..100).filter(|_| limit.allows(Source::User(source), now)).count()
    }

    #[test]
    fn one_source_is_told_six_times_and_then_once_a_second() {
        let (mut limit, start) = (UnreachableLimit::default(), Instant::now());
        assert_eq!(told(&mut limit, 1, start), 6);
        assert_eq!(told(&mut limit, 2, start), 6, "another is told all the same");
        assert_eq!(told(&mut limit, 1, start + Duration::from_millis(999)), 0);
        assert_eq!(told(&mut limit, 1, start + Duration::from_secs(1)), 1);
        assert_eq!(told(&mut limit, 1, start + Duration::from_secs(60)), 6);
    }

    #[test]
    fn a_flood_of_sources_is_bounded_in_messages_and_in_memory() {
        let (mut limit, start, mut all) = (UnreachableLimit::default(), Instant::now(), 0);
        for millisecond in 0..20_000 {
            let now = start + Duration::from_millis(millisecond);
            for source in 0..3 {
                all += usize::from(limit.allows(Source::User(millisecond as u32 * 3 + source), now));
            }
            assert!(limit.sources.len() <= SOURCES, "{}", limit.sources.len());
        }
        assert!((20_000..=20_050).contains(&all), "{all}");
    }
}
