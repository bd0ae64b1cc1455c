//! Which clients of an adopted service keep it awake: `--idle-ignore`, `--idle-by=bytes` and `--idle-below`, with the meaning that they have for clients
//! of the relay's. What the relay sees pass, the kernel tells here of each connection (TCP_INFO), at each look.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bro_adopt::clients::{ClientEnd, EndedClient, ServedClient, WithBytes};
use bro_relay::peer::Peer;
use bro_relay::proxy_protocol::Trusted;
use bro_relay::rate::{Meter, Rate};

use crate::cli::idle::Idle;

/// The most connections of which bytes are remembered, in some 100 bytes each, and with `--idle-below` some 230. With more the service is busy.
const MOST_TRACED: usize = 16_384;

/// A client that has just connected is about to say something. One that does not keeps nothing awake for longer than that.
const ABOUT_TO_SPEAK: Duration = Duration::from_secs(1);

/// The ends (FIN) that may be counted with a connection's bytes when it has gone.
const ENDS: u64 = 2;

/// What keeps the service awake, and what is remembered for that.
#[derive(Debug)]
pub(super) struct GuestTraffic {
    ignores: Vec<Trusted>,
    counting: TrafficCounting,
    /// Counts looks.
    looks: u64,
}

#[derive(Debug)]
enum TrafficCounting {
    Connections,
    Bytes { below: Option<Rate>, traced: HashMap<u64, TracedClient> },
}

/// A connection, as the last look has seen it.
#[derive(Debug)]
struct TracedClient {
    bytes: u64,
    /// When a look saw it first.
    since: Instant,
    /// The number of the last look that saw it.
    look: u64,
    meter: Option<Box<Meter>>,
}

/// What a look has found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct TrafficSeen {
    /// How many clients there are that are not ignored, with those that wait to be accepted.
    pub(super) present: u64,
    /// One of them keeps the service awake.
    pub(super) keeps_awake: bool,
    /// One has come since the look before, or a byte of one, however few those are.
    pub(super) stirs: bool,
    /// One has come of late, and may be about to say something, until then.
    pub(super) fresh_until: Option<Instant>,
}

impl TrafficSeen {
    /// So many wait to be accepted. They wait for the service, and their addresses are not known.
    pub(super) fn wait(&mut self, waiting: u32) {
        self.present += u64::from(waiting);
        self.keeps_awake |= waiting > 0;
        self.stirs |= waiting > 0;
    }
}

impl GuestTraffic {
    pub(super) fn of(idle: &Idle) -> Self {
        let by_bytes = idle.counts_bytes() && idle.exit_idle_time.finite().is_some();
        let counting = if by_bytes {
            TrafficCounting::Bytes { below: idle.idle_below, traced: HashMap::new() }
        } else {
            TrafficCounting::Connections
        };
        Self { ignores: idle.idle_ignore.clone(), counting, looks: 0 }
    }

    /// Are bytes to be asked for?
    pub(super) const fn with_bytes(&self) -> WithBytes {
        if self.counts_bytes() { WithBytes::Yes } else { WithBytes::No }
    }

    /// How soon to look again where bytes count: as often as the relay looks, so that idleness is noticed as late at most.
    pub(super) fn step(&self, idle_time: Duration) -> Option<Duration> {
        let TrafficCounting::Bytes { below, .. } = &self.counting else { return None };
        let step = (idle_time / 8).clamp(Duration::from_millis(10), Duration::from_secs(5));
        Some(below.map_or(step, |rate| step.min(rate.step())))
    }

    /// Do bytes count, and not connections?
    pub(super) const fn counts_bytes(&self) -> bool {
        matches!(self.counting, TrafficCounting::Bytes { .. })
    }

    /// Begins a look.
    pub(super) fn begin(&mut self) -> TrafficSeen {
        self.looks += 1;
        TrafficSeen::default()
    }

    fn ignores(&self, client: ClientEnd) -> bool {
        let peer = match client {
            ClientEnd::Tcp(address) => Peer::Tcp(address),
            ClientEnd::Unix(_) => Peer::Unix { uid: u32::MAX, pid: 0 },
        };
        self.ignores.iter().any(|ignored| ignored.is(&peer))
    }

    /// A client that is served at this look.
    pub(super) fn served(
        &mut self,
        client: &ServedClient,
        seen: &mut TrafficSeen,
        now: Instant,
        idle_time: Duration,
    ) {
        if self.ignores(client.end) {
            return;
        }
        seen.present += 1;
        let (TrafficCounting::Bytes { below, traced }, Some(bytes)) = (&mut self.counting, client.bytes)
        else {
            // Also of a unix socket's, of whose bytes nothing is known.
            (seen.keeps_awake, seen.stirs) = (true, true);
            return;
        };
        let is_new = !traced.contains_key(&client.number);
        if is_new && traced.len() >= MOST_TRACED {
            (seen.keeps_awake, seen.stirs) = (true, true);
            return;
        }
        let meter = || below.map(|rate| Box::new(Meter::new(rate, now)));
        let known = traced.entry(client.number).or_insert_with(|| TracedClient {
            bytes: 0,
            since: now,
            look: 0,
            meter: meter(),
        });
        known.look = self.looks;
        let moved = std::mem::replace(&mut known.bytes, bytes) != bytes;
        seen.stirs |= moved || is_new;
        seen.keeps_awake |= known.meter.as_mut().map_or(moved, |meter| meter.reaches(bytes, now));
        let about = known.since + ABOUT_TO_SPEAK.min(idle_time);
        if now < about {
            seen.fresh_until = seen.fresh_until.max(Some(about));
        }
    }

    /// The look is over: what it has not seen is gone.
    pub(super) fn end(&mut self) {
        if let TrafficCounting::Bytes { traced, .. } = &mut self.counting {
            let look = self.looks;
            traced.retain(|_, known| known.look == look);
            if traced.capacity() > 4 * traced.len().max(64) {
                traced.shrink_to_fit();
            }
        }
    }

    /// Does a client that has gone since the last look move the idle time?
    pub(super) fn counts_gone(&mut self, gone: &EndedClient, now: Instant) -> bool {
        if self.ignores(gone.end) {
            return false;
        }
        let (TrafficCounting::Bytes { below, traced }, Some(bytes)) = (&mut self.counting, gone.bytes) else {
            return true;
        };
        let known = traced.get_mut(&gone.number);
        let before = known.as_ref().map_or(0, |known| known.bytes);
        if bytes <= before + ENDS {
            return false;
        }
        match (known.and_then(|known| known.meter.as_mut()), below) {
            (Some(meter), _) => meter.reaches(bytes, now),
            (None, Some(below)) => bytes >= below.bytes,
            (None, None) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::net::SocketAddr;

    #[derive(Parser)]
    struct Given {
        #[command(flatten)]
        idle: Idle,
    }

    const LIMIT: Duration = Duration::from_secs(60);

    fn traffic(options: &[&str]) -> GuestTraffic {
        let words = ["bro", "--exit-idle-time=1min"].into_iter().chain(options.iter().copied());
        GuestTraffic::of(&Given::try_parse_from(words).unwrap().idle)
    }

    fn end(address: &str) -> ClientEnd {
        address.parse().map_or(ClientEnd::Unix(1), |ip| ClientEnd::Tcp(SocketAddr::new(ip, 1)))
    }

    fn client(number: u64, address: &str, bytes: Option<u64>) -> ServedClient {
        ServedClient { listener: 0, number, end: end(address), bytes }
    }

    fn look(traffic: &mut GuestTraffic, clients: &[ServedClient], now: Instant) -> TrafficSeen {
        let mut seen = traffic.begin();
        for client in clients {
            traffic.served(client, &mut seen, now, LIMIT);
        }
        traffic.end();
        seen
    }

    #[test]
    fn whom_it_ignores_keeps_nothing_awake() {
        let mut traffic = traffic(&["--idle-ignore=10.0.0.0/8"]);
        let now = Instant::now();
        let monitor = client(1, "10.1.2.3", None);
        assert_eq!(look(&mut traffic, &[monitor], now), TrafficSeen::default());
        let seen = look(&mut traffic, &[monitor, client(2, "192.0.2.1", None)], now);
        assert!(seen.keeps_awake && seen.present == 1, "{seen:?}");
        let gone = |address: &str| EndedClient { number: 3, end: end(address), bytes: None };
        assert!(!traffic.counts_gone(&gone("10.0.0.1"), now) && traffic.counts_gone(&gone("11.0.0.1"), now));
        // Who waits to be accepted is not known.
        let mut seen = traffic.begin();
        seen.wait(1);
        assert!(seen.keeps_awake && seen.stirs && seen.present == 1, "{seen:?}");
    }

    #[test]
    fn a_unix_socket_is_ignored_by_that_word_and_has_no_bytes() {
        let now = Instant::now();
        let at_unix = client(1, "unix", None);
        assert_eq!(look(&mut traffic(&["--idle-ignore=unix"]), &[at_unix], now).present, 0);
        for options in [&[][..], &["--idle-by=bytes"]] {
            assert!(look(&mut traffic(options), &[at_unix], now).keeps_awake, "{options:?}");
        }
    }

    #[test]
    fn by_bytes_a_connection_counts_when_one_has_moved() {
        let mut traffic = traffic(&["--idle-by=bytes"]);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let of = |bytes| [client(7, "192.0.2.1", Some(bytes))];
        // It may be about to speak, and has not spoken.
        let seen = look(&mut traffic, &of(0), at(0));
        assert_eq!(
            seen,
            TrafficSeen { present: 1, keeps_awake: false, stirs: true, fresh_until: Some(at(1000)) }
        );
        assert_eq!(
            look(&mut traffic, &of(0), at(1000)),
            TrafficSeen { present: 1, ..TrafficSeen::default() }
        );
        let seen = look(&mut traffic, &of(1), at(2000));
        assert!(seen.keeps_awake && seen.stirs, "{seen:?}");
        assert!(!look(&mut traffic, &of(1), at(3000)).keeps_awake);
        let gone = |number, bytes| EndedClient { number, end: end("192.0.2.1"), bytes: Some(bytes) };
        for (number, bytes, counts) in [(7, 3, false), (7, 4, true), (8, 2, false), (8, 3, true)] {
            assert_eq!(traffic.counts_gone(&gone(number, bytes), at(3000)), counts, "{number} {bytes}");
        }
        // A connection that is gone is forgotten.
        assert_eq!(look(&mut traffic, &[], at(4000)), TrafficSeen::default());
        assert!(look(&mut traffic, &of(1), at(5000)).stirs);
    }

    #[test]
    fn below_a_rate_bytes_stir_and_keep_nothing_awake() {
        let mut traffic = traffic(&["--idle-below=1K/1s"]);
        assert_eq!(traffic.step(LIMIT), Some(Duration::from_millis(125)));
        let start = Instant::now();
        for beat in 0..20 {
            let beating = [client(1, "192.0.2.1", Some(100 * beat))];
            let seen = look(&mut traffic, &beating, start + Duration::from_millis(125 * beat));
            assert!(!seen.keeps_awake && seen.stirs, "{beat}: {seen:?}");
        }
        let much = [client(1, "192.0.2.1", Some(4000))];
        assert!(look(&mut traffic, &much, start + Duration::from_millis(125 * 20)).keeps_awake);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut traffic = traffic(&["--idle-below=1K/1s"]);
        let now = Instant::now();
        let most = MOST_TRACED as u64;
        let all: Vec<_> = (0..=most).map(|number| client(number, "192.0.2.1", Some(0))).collect();
        assert!(!look(&mut traffic, &all[1..], now).keeps_awake);
        let seen = look(&mut traffic, &all, now);
        assert!(seen.keeps_awake && seen.present == most + 1, "{seen:?}");
        let TrafficCounting::Bytes { traced, .. } = &traffic.counting else { panic!("by bytes") };
        assert_eq!(traced.len(), MOST_TRACED);
        assert_eq!(look(&mut traffic, &[], now), TrafficSeen::default());
        let TrafficCounting::Bytes { traced, .. } = &traffic.counting else { panic!("by bytes") };
        assert!(traced.capacity() < MOST_TRACED / 4, "{}", traced.capacity());
    }
}
