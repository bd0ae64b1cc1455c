//! The programs' maps, as a forwarder with lanes uses them: by descriptor, and without any rights.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use aya::maps::{HashMap, Map, MapData, MapError, RingBuf, SockHash};
use bro_ebpf::{Counter, Event, Flow, HookRequest, Watch, WatchKey, kind, role};
use serde::{Deserialize, Serialize};

use super::lane::{self, Lane, Lanes, SenderAddress};
use super::sys::{Mapping, PortKey, WatchValue};
use super::unavailable::{self, LaneRefused, Unavailable};
use super::{SenderKind, SenderRole, Totals};

/// The maps by their descriptors, to be used here or sent to another process.
#[derive(Debug)]
pub struct Descriptors {
    /// The lanes' records.
    pub records: OwnedFd,
    /// What the programs count in all.
    pub totals: OwnedFd,
    /// Which ports to watch.
    pub watched: OwnedFd,
    /// Which record a flow's sender uses.
    pub routes: OwnedFd,
    /// The hooked senders.
    pub senders: OwnedFd,
    /// The sockets that senders may be redirected to.
    pub targets: OwnedFd,
    /// Events.
    pub events: OwnedFd,
    /// The program that hooks a sender, to be run.
    pub hook: OwnedFd,
}

impl Descriptors {
    /// How many there are.
    pub const COUNT: usize = 8;

    /// As they are sent.
    #[must_use]
    pub fn into_array(self) -> [OwnedFd; Self::COUNT] {
        let Self { records, totals, watched, routes, senders, targets, events, hook } = self;
        [records, totals, watched, routes, senders, targets, events, hook]
    }

    /// As they are looked at.
    pub(super) fn as_array(&self) -> [BorrowedFd<'_>; Self::COUNT] {
        let Self { records, totals, watched, routes, senders, targets, events, hook } = self;
        [records, totals, watched, routes, senders, targets, events, hook].map(OwnedFd::as_fd)
    }

    /// The same once more.
    pub(super) fn try_clone(&self) -> std::io::Result<Self> {
        let Self { records, totals, watched, routes, senders, targets, events, hook } = self;
        Ok(Self {
            records: records.try_clone()?,
            totals: totals.try_clone()?,
            watched: watched.try_clone()?,
            routes: routes.try_clone()?,
            senders: senders.try_clone()?,
            targets: targets.try_clone()?,
            events: events.try_clone()?,
            hook: hook.try_clone()?,
        })
    }

    /// As they were sent.
    #[must_use]
    pub fn from_array(array: [OwnedFd; Self::COUNT]) -> Self {
        let [records, totals, watched, routes, senders, targets, events, hook] = array;
        Self { records, totals, watched, routes, senders, targets, events, hook }
    }
}

/// What there is to know about the maps beside their descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Which part of the set is this forwarder's; 0 when it loaded the programs for itself.
    pub seat: u32,
    /// How many records each part has.
    pub records: u32,
    /// Whether sockets in blocking mode are hooked too.
    pub hook_blocking: bool,
    /// Whether this kernel says 0 when a hooked socket's owner asks how much waits to be read. True until the self-test has shown
    /// otherwise.
    pub fionread_lies: bool,
}

impl Share {
    /// The first of this forwarder's records.
    pub(super) const fn first_record(&self) -> u32 {
        self.seat.saturating_mul(self.records)
    }
}

/// The maps in use.
pub struct Maps {
    watched: HashMap<MapData, PortKey, WatchValue>,
    senders: SockHash<MapData, u64>,
    events: RingBuf<MapData>,
    hook: OwnedFd,
    totals: Mapping<AtomicU64>,
    lanes: Arc<Lanes>,
    pub(super) share: Share,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").field("share", &self.share).finish_non_exhaustive()
    }
}

impl Maps {
    /// Uses the maps from now on. One process at a time: the seat's lanes and events belong to no other process.
    ///
    /// # Errors
    /// When they are not the maps of this version of the programs.
    pub fn new(descriptors: &Descriptors, share: Share) -> Result<Self, Unavailable> {
        let Descriptors { records, totals, watched, routes, senders, targets, events, hook } = descriptors;
        let first = share.first_record();
        let records = Mapping::of_records(records.as_fd(), (first + share.records) as usize);
        let totals = Mapping::of_numbers(totals.as_fd(), Counter::COUNT);
        let routes = HashMap::try_from(Map::HashMap(data(routes)?)).map_err(unavailable::damaged)?;
        let targets = SockHash::try_from(Map::SockHash(data(targets)?)).map_err(unavailable::damaged)?;
        let lanes = Lanes::new(records.map_err(Unavailable::Mapping)?, routes, targets, first, share.records);
        Ok(Self {
            watched: HashMap::try_from(Map::HashMap(data(watched)?)).map_err(unavailable::damaged)?,
            senders: SockHash::try_from(Map::SockHash(data(senders)?)).map_err(unavailable::damaged)?,
            events: RingBuf::try_from(Map::RingBuf(data(events)?)).map_err(unavailable::damaged)?,
            hook: hook.try_clone().map_err(Unavailable::Mapping)?,
            totals: totals.map_err(Unavailable::Mapping)?,
            lanes: Arc::new(lanes),
            share,
        })
    }

    /// Watches a port of a network namespace: connections accepted there (service) or made towards it by local clients
    /// (client). A port watched before keeps the kind that was learned.
    ///
    /// # Errors
    /// When the kernel refuses (1,024 ports can be watched).
    pub fn watch(&mut self, netns: u64, port: u16, as_: SenderRole) -> std::io::Result<()> {
        let role = match as_ {
            SenderRole::Service => role::SERVICE,
            SenderRole::Client => role::CLIENT,
        };
        let key = key(netns, port);
        // Other forwarders of this user may watch it too, such as the one that this one is about to replace. Each opens lanes for
        // its own connections; the one that came last hears of the port.
        let known = self.watched.get(&key, 0).ok().filter(|found| found.0.role == role);
        let kind = known.map_or(kind::UNKNOWN, |found| found.0.kind);
        let value = WatchValue(Watch { role, kind, seat: self.share.seat, zero: 0 });
        self.watched.insert(key, value, 0).map_err(lane::errno)
    }

    /// Watches a port no longer, unless another forwarder has come to watch it.
    pub fn unwatch(&mut self, netns: u64, port: u16) {
        let key = key(netns, port);
        if self.watched.get(&key, 0).is_ok_and(|found| found.0.seat == self.share.seat) {
            let _absent = self.watched.remove(&key);
        }
    }

    /// What is known of the service at a watched port; `None` when it is not watched.
    #[must_use]
    pub fn kind(&self, netns: u64, port: u16) -> Option<SenderKind> {
        self.watched.get(&key(netns, port), 0).ok().map(|found| SenderKind::of(found.0.kind))
    }

    /// Sets what is known of the service at a watched port; `Unknown` forgets it, for a container that restarted in the same
    /// network namespace.
    ///
    /// # Errors
    /// When the port is not watched.
    pub fn set_kind(&mut self, netns: u64, port: u16, kind: SenderKind) -> std::io::Result<()> {
        const EXIST: u64 = 2;
        let key = key(netns, port);
        let mut value = self.watched.get(&key, 0).map_err(lane::errno)?;
        value.0.kind = kind.number();
        self.watched.insert(key, value, EXIST).map_err(lane::errno)
    }

    /// Opens a lane from `sender` into `target`'s transmit queue. `forwarded` is what the forwarder has already written to
    /// `target` of the sender's bytes; bytes of its own that it put before them (a proxy header) do not count, and must be
    /// written before this. May be called at any time in a connection's life, before the sender was hooked.
    ///
    /// # Errors
    /// When there is no lane for this connection: relay it by splice.
    pub fn open_lane(
        &self,
        sender: &SenderAddress,
        target: BorrowedFd<'_>,
        forwarded: u64,
    ) -> Result<Lane, LaneRefused> {
        self.lanes.open(sender, target, forwarded)
    }

    /// Takes a sender, by its socket cookie, out of the senders' map: from now on it is ordinary TCP's.
    pub fn release(&mut self, cookie: u64) {
        let _gone_meanwhile = self.senders.remove(&cookie);
    }

    /// Does this kernel say 0 when a hooked socket's owner asks how much waits to be read (FIONREAD)? Seen by the self-test.
    /// A program that asks may then wait for bytes that are there: nginx does when a request fills its buffer.
    #[must_use]
    pub const fn fionread_lies(&self) -> bool {
        self.share.fionread_lies
    }

    /// Polls readable (level-triggered) while there are events.
    #[must_use]
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Puts a sender that has proved to be a non-blocking one into the senders' map. One of another network namespace than this
    /// thread's is not found: for that, a process there runs the program ([`super::hook`]).
    pub fn hook(&self, flow: Flow, socket: u64) {
        if let Err(error) = super::hook(self.hook.as_fd(), &HookRequest { flow, cookie: socket }.packet()) {
            tracing::debug!(%error, "a sender could not be hooked and is spliced");
        }
    }

    /// Hands over every event there is. A blocking sender has already been taken out of the senders' map.
    pub fn drain_events(&mut self, mut each: impl FnMut(Event)) {
        while let Some(bytes) = self.events.next() {
            let Some(event) = Event::parse(&bytes) else { continue };
            drop(bytes);
            if let Event::BlockingSender { socket, .. } = event {
                let _closed_meanwhile = self.senders.remove(&socket);
            }
            each(event);
        }
    }

    /// What the programs did in all.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let total =
            |counter: Counter| self.totals.get(counter as usize).map_or(0, |total| total.load(Relaxed));
        let (closed_lanes, open_lanes) = self.lanes.closed();
        Totals {
            hooked: total(Counter::Hooked),
            hook_refused: total(Counter::HookRefused),
            unhooked: total(Counter::Unhooked),
            blocking: total(Counter::Blocking),
            zerocopy: total(Counter::Zerocopy),
            fast_open: total(Counter::FastOpen),
            watched: total(Counter::Watched),
            events_lost: total(Counter::EventsLost),
            foreign: total(Counter::Foreign),
            open_lanes,
            closed_lanes,
        }
    }

    /// How many sockets are in the senders' map right now (walks it: for tests and `bro doctor`).
    #[must_use]
    pub fn hooked_now(&self) -> usize {
        self.senders.keys().filter(Result::is_ok).count()
    }
}

/// A map of this descriptor.
pub(super) fn data(map: &OwnedFd) -> Result<MapData, Unavailable> {
    let map = map.try_clone().map_err(Unavailable::Mapping)?;
    MapData::from_fd(map).map_err(|error: MapError| unavailable::damaged(error))
}

fn key(netns: u64, port: u16) -> PortKey {
    PortKey(WatchKey { netns, port: port.into(), zero: 0 })
}
