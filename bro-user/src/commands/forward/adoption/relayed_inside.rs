//! Connections that the agent relays from inside a container to the host's listeners, where the service accepts them beside the host's clients: commands that are
//! executed in it, health checks, and clients that the engine has connected there. They come by no socket of systemd's, so they are not counted: a health
//! check would keep its service awake for ever.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bro_adopt::clients::ClientEnd;

/// How long one that is over is remembered: the kernel may tell late that the service has let go of it, and gives its port to another client later.
const AFTER: Duration = Duration::from_secs(60);

/// The most of those. Of more a part is counted.
const MOST_OVER: usize = 1024;

/// All of them, by the end that the host's tables know.
#[derive(Debug, Default)]
pub(super) struct RelayedInside(Mutex<InsideEnds>);

#[derive(Debug, Default)]
struct InsideEnds {
    /// Those that are there or were, and when they ended.
    ends: HashMap<ClientEnd, Option<Instant>>,
    /// Those that are over, in order.
    over: VecDeque<(Instant, ClientEnd)>,
}

impl RelayedInside {
    fn lock(&self) -> MutexGuard<'_, InsideEnds> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One begins.
    pub(super) fn begins(&self, end: ClientEnd) {
        let _before = self.lock().ends.insert(end, None);
    }

    /// One is over.
    pub(super) fn is_over(&self, end: ClientEnd, now: Instant) {
        let mut inside = self.lock();
        let _before = inside.ends.insert(end, Some(now));
        inside.over.push_back((now, end));
        inside.forget(now);
    }

    /// Is it one of them?
    pub(super) fn has(&self, end: ClientEnd, now: Instant) -> bool {
        let inside = self.lock();
        match inside.ends.get(&end) {
            Some(Some(ended)) => now.saturating_duration_since(*ended) < AFTER,
            Some(None) => true,
            None => false,
        }
    }
}

impl InsideEnds {
    /// Forgets what was over long ago, and the first of too many.
    fn forget(&mut self, now: Instant) {
        while let Some((at, end)) = self.over.front().copied() {
            if now.saturating_duration_since(at) < AFTER && self.over.len() <= MOST_OVER {
                return;
            }
            self.over.pop_front();
            // Unless another one has its port by now.
            if self.ends.get(&end) == Some(&Some(at)) {
                self.ends.remove(&end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_known_for_a_while_after_its_end_and_not_for_ever() {
        let (inside, start) = (RelayedInside::default(), Instant::now());
        let end = |port| ClientEnd::Tcp(([127, 0, 0, 1], port).into());
        inside.begins(end(1));
        assert!(inside.has(end(1), start + 2 * AFTER) && !inside.has(end(2), start));
        inside.is_over(end(1), start);
        assert!(inside.has(end(1), start + AFTER / 2) && !inside.has(end(1), start + AFTER));
        // Another one, from the same port.
        inside.begins(end(1));
        for port in 2..3 + MOST_OVER as u16 {
            inside.begins(end(port));
            inside.is_over(end(port), start);
        }
        assert!(inside.has(end(1), start) && !inside.has(end(2), start) && inside.has(end(3), start));
        let inside = inside.lock();
        assert_eq!((inside.ends.len(), inside.over.len()), (MOST_OVER + 1, MOST_OVER));
    }
}
