//! Sides that have vanished while something that was sent to them is not acknowledged (`--user-timeout`). Keepalive is silent then,
//! and the kernel alone gives up after a quarter of an hour (net.ipv4.tcp_retries2).
//!
//! The kernel's own TCP_USER_TIMEOUT also ends the connection of a slow reader: one that keeps its window closed for so long,
//! although it answers each probe of it. So its acknowledgements are looked at here, and it is ended only if there are none.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use bro_sockmap::{Sent, sent};
use slab::Slab;

use crate::connection::{Acknowledged, Amount, Connection, Stage};
use crate::relay::Side;

/// Between two looks at a connection: a part of the limit, within these.
const STEPS: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(15)];

/// The most connections that are looked at in a row; other connections' bytes wait meanwhile.
const AT_ONCE: usize = 4096;

/// The connection that is looked at next, and when.
#[derive(Debug)]
pub(super) struct Answers {
    limit: Option<Duration>,
    next: Instant,
    place: usize,
}

impl Answers {
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self { limit, next: Instant::now(), place: 0 }
    }

    /// How long a round through all connections takes.
    fn round(&self) -> Option<Duration> {
        self.limit.map(|limit| (limit / 8).clamp(STEPS[0], STEPS[1]))
    }

    /// How long until the next look, where there is anything to look at.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.limit.map(|_| self.next.saturating_duration_since(Instant::now()))
    }
}

/// Since when a side has answered nothing, if it is to answer something: `before` is what was known of that.
fn silent_since(before: Option<Instant>, sent: Sent, ended: bool, now: Instant) -> Option<Instant> {
    // What it has acknowledged since the last byte was sent: it does not take what it is sent, but it is there. (The end of a
    // stream is no byte.)
    let unanswered = sent.last_sent < sent.last_heard || ended;
    if sent.probes == 0 && (sent.in_flight == 0 || !unanswered) {
        return None;
    }
    let heard = now.checked_sub(sent.last_heard);
    Some(before.map_or(now, |before| heard.map_or(before, |heard| heard.clamp(before, now))))
}

/// The side of a connection that has answered nothing for so long.
fn vanished(connection: &mut Connection, limit: Duration, now: Instant) -> Option<Side> {
    let Stage::Relaying { service, up, down, .. } = connection.stage() else { return None };
    // Before the kernel is asked: what is sent between the two is looked at the next time.
    let ends = [down.half().is_over(), up.half().is_over()];
    let amount = Amount { bytes: connection.totals(), ends };
    let before = connection.answers;
    let is_new = before.sent != amount;
    if before.settled && !is_new {
        return None;
    }
    let mut since = [None; 2];
    for side in [Side::Client, Side::Service] {
        let socket = if side == Side::Client { connection.client.as_fd() } else { service.as_fd() };
        // A unix socket has nothing to acknowledge.
        let Ok(sent) = sent(socket) else { continue };
        since[side as usize] = silent_since(before.since[side as usize], sent, ends[side as usize], now);
    }
    connection.answers = Acknowledged { sent: amount, settled: !is_new && since == [None; 2], since };
    [Side::Client, Side::Service]
        .into_iter()
        .find(|side| since[*side as usize].is_some_and(|since| now.duration_since(since) >= limit))
}

impl Answers {
    /// Looks at some of the connections, if it is time; says of which ones a side has vanished.
    pub(super) fn look(&mut self, connections: &mut Slab<Connection>) -> Vec<(usize, Side)> {
        let mut gone = Vec::new();
        let (Some(limit), Some(round)) = (self.limit, self.round()) else { return gone };
        let now = Instant::now();
        if now < self.next || connections.is_empty() {
            return gone;
        }
        let (all, turns) = (connections.capacity(), connections.len().div_ceil(AT_ONCE));
        let mut looked = 0;
        while looked < AT_ONCE && self.place < all {
            let index = self.place;
            self.place += 1;
            // Places of connections that have ended cost next to nothing.
            let Some(connection) = connections.get_mut(index) else { continue };
            looked += 1;
            gone.extend(vanished(connection, limit, now).map(|side| (index, side)));
        }
        if self.place >= all {
            self.place = 0;
        }
        self.next = now + round / u32::try_from(turns).unwrap_or(u32::MAX).max(1);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn only_what_is_not_answered_counts() {
        let now = Instant::now();
        let sent = |in_flight, probes, last_sent: u32, last_heard: u32| Sent {
            in_flight,
            probes,
            last_sent: SECOND * last_sent,
            last_heard: SECOND * last_heard,
        };
        let before = now - SECOND * 30;
        // All is acknowledged, however long ago.
        assert_eq!(silent_since(Some(before), sent(0, 0, 900, 900), false, now), None);
        // Sent a second ago, after an hour of silence.
        assert_eq!(silent_since(None, sent(1, 0, 1, 3600), false, now), Some(now));
        assert_eq!(silent_since(Some(before), sent(1, 0, 1, 3600), false, now), Some(before));
        // An acknowledgement of something since.
        let heard = silent_since(Some(before), sent(1, 0, 1, 10), false, now);
        assert_eq!(heard, Some(now - SECOND * 10));
        // Its window is closed, and probes are answered, or are not.
        assert_eq!(silent_since(Some(before), sent(0, 0, 500, 100), false, now), None);
        assert_eq!(silent_since(Some(before), sent(0, 3, 500, 400), false, now), Some(before));
        // It answers each byte that is sent again, and takes none.
        assert_eq!(silent_since(Some(before), sent(1, 0, 60, 60), false, now), None);
        // The end of the stream alone is in flight.
        assert_eq!(silent_since(Some(before), sent(1, 0, 60, 59), true, now), Some(before));
    }
}
