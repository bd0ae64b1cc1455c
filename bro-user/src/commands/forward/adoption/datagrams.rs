//! A socket for datagrams that the service has: no client of it is in any table, so it is asked when the last datagram came. That counts as a client for as long as
//! a flow of the relay's would (`--flow-timeout`), and one that waits to be received does too. What the service sends without having received is not seen.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, SystemTime};

use bro_adopt::datagrams::{LastReceived, Traffic, traffic};
use tokio::time::Instant;

use super::SocketAdoption;
use crate::commands::status::DatagramsReport;

/// What was seen of them, at one socket.
#[derive(Debug, Default)]
pub(super) struct SeenDatagrams {
    last: Option<SystemTime>,
    /// By when it counts: the wall clock may jump.
    since: Option<Instant>,
    /// It cannot be seen, which was said.
    blind: bool,
    /// It counted as a client at the last look.
    come: bool,
}

impl SeenDatagrams {
    /// Takes account of a look: does it count as a client?
    fn look(&mut self, traffic: Traffic, now: Instant, clock: SystemTime, timeout: Duration) -> bool {
        self.come = match traffic.received {
            LastReceived::Unseen => true,
            LastReceived::At(at) if self.last != Some(at) => {
                self.last = Some(at);
                let age = clock.duration_since(at).unwrap_or_default();
                self.since = now.checked_sub(age);
                false
            }
            LastReceived::At(_) | LastReceived::Never => false,
        };
        let is_fresh = self.since.is_some_and(|since| now.saturating_duration_since(since) < timeout);
        self.come |= traffic.waits || is_fresh;
        self.come
    }

    /// For a status.
    pub(super) fn report(&self) -> DatagramsReport {
        let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |at| at.as_secs());
        match self.last {
            _ if self.blind => DatagramsReport::Unseen,
            Some(at) => DatagramsReport::Last { at: seconds(at) },
            None => DatagramsReport::None,
        }
    }
}

impl SocketAdoption {
    /// Whether datagrams counted as clients before, and do now.
    pub(super) fn look_for_datagrams(&mut self, adopted: &[usize]) -> (bool, bool) {
        let (mut before, mut now) = (false, false);
        let timeout = self.flow_timeout;
        for index in adopted {
            let Some(listener) = self.listeners.get_mut(*index) else { continue };
            let Some(seen) = &mut listener.datagrams else { continue };
            before |= seen.come;
            let asked = traffic(listener.socket.as_fd()).unwrap_or_else(|error| {
                tracing::debug!(%error, socket = %listener.name, "the socket does not tell what has come to it");
                Traffic { waits: false, received: LastReceived::Unseen }
            });
            if asked.received == LastReceived::Unseen && !std::mem::replace(&mut seen.blind, true) {
                tracing::warn!(
                    socket = %listener.name,
                    "the service has the times of its datagrams itself (SO_TIMESTAMP), so it cannot be seen whether any come, and it is not put to sleep for idleness"
                );
            }
            now |= seen.look(asked, Instant::now(), SystemTime::now(), timeout);
        }
        (before, now)
    }
}

/// Has the kernel note of each datagram where it came in, from now on. That is for whatever receives it later: it is noted as it comes, so a service that asks only
/// after its bind(2) would learn nothing of those that have woken it (`ipv4_pktinfo_prepare`).
pub(super) fn note_where_they_come_in(socket: &OwnedFd) {
    if let Err(error) = bro_relay::engine::datagrams::prepare(socket) {
        tracing::warn!(%error, "the socket does not tell to which address a datagram was sent");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_counts_as_long_as_a_flow() {
        const TIMEOUT: Duration = Duration::from_secs(60);
        let (start, clock) = (Instant::now() + Duration::from_secs(1000), SystemTime::now());
        let after = |seconds| (start + Duration::from_secs(seconds), clock + Duration::from_secs(seconds));
        let mut seen = SeenDatagrams::default();
        let mut look =
            |waits, received, (now, clock)| seen.look(Traffic { waits, received }, now, clock, TIMEOUT);
        assert!(!look(false, LastReceived::Never, after(0)));
        assert!(look(true, LastReceived::Never, after(1)));
        assert!(!look(false, LastReceived::Never, after(2)));
        let at = |seconds| LastReceived::At(clock + Duration::from_secs(seconds));
        assert!(look(false, at(5), after(6)));
        assert!(look(false, at(5), after(64)));
        assert!(!look(false, at(5), after(65)));
        // The wall clock was set back, and is not asked of a datagram that is known.
        assert!(!look(false, at(5), (start + Duration::from_secs(66), clock)));
        assert!(look(false, at(70), (start + Duration::from_secs(70), clock)));
        // A predecessor has seen it, long ago.
        let mut later = SeenDatagrams::default();
        let (now, clock) = after(500);
        assert!(!later.look(Traffic { waits: false, received: at(5) }, now, clock, TIMEOUT));
        assert!(later.look(Traffic { waits: false, received: LastReceived::Unseen }, now, clock, TIMEOUT));
    }
}
