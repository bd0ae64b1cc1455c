//! A lane: one direction of one connection whose bytes the kernel may move past the forwarder.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData, MapError, SockHash};
use bro_ebpf::{Flow, Reason, Record, Route, credit_for, grant, regrant, v4_mapped, watermark};

use super::sys::{FlowKey, Mapping, RouteValue, lift_notsent_lowat, send_memory};
use super::unavailable::LaneRefused;

/// A sender as its own socket sees itself: for the service lane that is (peer address, own address) of the forwarder's
/// socket in the container, for the client lane (peer address, own address) of the accepted socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SenderAddress {
    /// The cookie of the network namespace it lives in ([`super::netns_cookie`] of any socket of that namespace).
    pub netns: u64,
    /// Its own address.
    pub local: SocketAddr,
    /// The address it is connected to.
    pub remote: SocketAddr,
}

impl SenderAddress {
    fn flow(&self) -> Flow {
        let ip = |address: SocketAddr| match address.ip() {
            IpAddr::V4(v4) => v4_mapped(v4.octets()),
            IpAddr::V6(v6) => v6.octets(),
        };
        Flow::new(self.netns, ip(self.local), self.local.port(), ip(self.remote), self.remote.port())
    }
}

/// Which lane an event is about. A slot is used again, its serial number is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LaneId {
    /// The record's index: below twice the capacity, so it can index a table.
    pub record: u32,
    /// Which use of that record.
    pub serial: u32,
}

/// What a lane has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneCounters {
    /// Payload bytes the kernel moved.
    pub bytes: u64,
    /// Messages the kernel moved.
    pub messages: u64,
    /// Messages left to the forwarder, by [`Reason`].
    pub passed: [u64; Reason::COUNT],
    /// How often credit was granted.
    pub grants: u64,
}

impl LaneCounters {
    /// Messages left to the forwarder for this reason.
    #[must_use]
    pub fn passed(&self, reason: Reason) -> u64 {
        self.passed[reason as usize]
    }
}

impl std::ops::AddAssign for LaneCounters {
    fn add_assign(&mut self, more: Self) {
        self.bytes += more.bytes;
        self.messages += more.messages;
        self.grants += more.grants;
        for (sum, passed) in self.passed.iter_mut().zip(more.passed) {
            *sum += passed;
        }
    }
}

/// What a grant came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Socket memory that may now be spent.
    pub credit: u64,
    /// That is so little that the program will send no event: worth another [`Lane::grant`] once the target polls writable.
    pub scarce: bool,
}

/// The maps and records, shared by all lanes.
#[derive(Debug)]
pub(super) struct Lanes {
    records: Mapping<Record>,
    tables: Mutex<Tables>,
}

struct Tables {
    routes: HashMap<MapData, FlowKey, RouteValue>,
    targets: SockHash<MapData, RouteValue>,
    /// Free records with the serial number of their next use. First in, first out, so that a slot rests as long as it can.
    free: VecDeque<Route>,
    /// Closed ones with targets that are still in the map, since when.
    resting: VecDeque<(Instant, Route)>,
    closed: LaneCounters,
    capacity: usize,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").field("free", &self.free.len()).finish_non_exhaustive()
    }
}

impl Lanes {
    pub(super) fn new(
        records: Mapping<Record>,
        routes: HashMap<MapData, FlowKey, RouteValue>,
        targets: SockHash<MapData, RouteValue>,
        first: u32,
        capacity: u32,
    ) -> Self {
        // After a forwarder that died, old senders may still know the numbers it gave.
        let last =
            |record: u32| records.get(record as usize).map_or(0, |record| record.last.load(Acquire) as u32);
        let free = (first..first + capacity)
            .map(|record| next_use(Route { record, serial: last(record) }))
            .collect();
        let tables = Tables {
            routes,
            targets,
            free,
            resting: VecDeque::new(),
            closed: LaneCounters::default(),
            capacity: capacity as usize,
        };
        Self { records, tables: Mutex::new(tables) }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sum over the lanes that were closed, and how many are open.
    pub(super) fn closed(&self) -> (LaneCounters, usize) {
        let tables = self.tables();
        (tables.closed, tables.capacity - tables.free.len() - tables.resting.len())
    }

    /// Opens a lane: see [`super::Kernel::open_lane`].
    pub(super) fn open(
        self: &Arc<Self>,
        sender: &SenderAddress,
        target: BorrowedFd<'_>,
        forwarded: u64,
    ) -> Result<Lane, LaneRefused> {
        let mut tables = self.tables();
        tables.reclaim(Instant::now());
        let route = tables.free.pop_front().ok_or(LaneRefused::NoSlot)?;
        match tables.open(&self.records, route, sender, target, forwarded) {
            Ok(()) => Ok(Lane { lanes: Arc::clone(self), route, flow: sender.flow(), hooked: None }),
            Err(refused) => {
                tables.free.push_back(next_use(route));
                Err(refused)
            }
        }
    }
}

/// How long a send may take from the program's decision to the target's queue. It does nothing in between but wait for its turn.
const REST: Duration = Duration::from_secs(1);

/// The serial number after this one; never 0, which means "no route" to the programs.
fn next_use(route: Route) -> Route {
    Route { record: route.record, serial: route.serial.checked_add(1).unwrap_or(1) }
}

impl Tables {
    fn open(
        &mut self,
        records: &Mapping<Record>,
        route: Route,
        sender: &SenderAddress,
        target: BorrowedFd<'_>,
        forwarded: u64,
    ) -> Result<(), LaneRefused> {
        const NO_EXIST: u64 = 1;
        let record = records.get(route.record as usize).ok_or(LaneRefused::NoSlot)?;
        lift_notsent_lowat(target).map_err(LaneRefused::Memory)?;
        reset(record);
        record.forwarded.store(forwarded, Relaxed);
        give(record, target, |spent, credit, _| regrant(spent, credit)).map_err(LaneRefused::Memory)?;
        record.grants.store(0, Relaxed);
        record.last.store(route.serial.into(), Relaxed);
        record.on.store(1, Relaxed);
        record.serial.store(route.serial.into(), Release);
        let inserted = self.targets.insert(RouteValue(route), target, NO_EXIST).map_err(errno);
        inserted.map_err(|error| match error.raw_os_error() {
            Some(nix::libc::EOPNOTSUPP) => LaneRefused::NotEstablished,
            _ => LaneRefused::Socket(error),
        })?;
        // Any older route of the same address pair belongs to a connection that is gone.
        let routed = self.routes.insert(FlowKey(sender.flow()), RouteValue(route), 0).map_err(errno);
        routed.map_err(|error| {
            let _gone = self.targets.remove(&RouteValue(route));
            LaneRefused::Route(error)
        })
    }

    fn close(&mut self, record: &Record, route: Route, flow: Flow) {
        // From here on the program passes: it compares the serial number with every message.
        record.on.store(0, Relaxed);
        record.serial.store(0, Release);
        // A message that passed that check already still finds the target or not; either is in order. Not so one that has found it:
        // the kernel fails its send with EPIPE when the target leaves the map before it is queued there (`tcp_bpf_sendmsg_redir`).
        // So the target rests for a while.
        let ours = self.routes.get(&FlowKey(flow), 0).is_ok_and(|found| found.0 == route);
        if ours {
            let _gone = self.routes.remove(&FlowKey(flow));
        }
        self.closed += counters(record);
        let now = Instant::now();
        self.resting.push_back((now, route));
        self.reclaim(now);
    }

    /// Takes targets out of the map once they have rested or their slots are needed, and frees the slots. A target with a closed
    /// socket has left the map by itself.
    fn reclaim(&mut self, now: Instant) {
        while let Some(&(since, route)) = self.resting.front()
            && (now - since >= REST || self.free.is_empty())
        {
            let _rested = self.resting.pop_front();
            let _gone = self.targets.remove(&RouteValue(route));
            self.free.push_back(next_use(route));
        }
    }
}

/// The error number within aya's error.
pub(super) fn errno(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(call) => call.io_error,
        MapError::IoError(error) => error,
        MapError::KeyNotFound | MapError::ElementNotFound => io::ErrorKind::NotFound.into(),
        other => io::Error::other(other),
    }
}

fn reset(record: &Record) {
    let Record {
        forwarded, granted, low, grants, serial, on, notified, spent, bytes, messages, passed, ..
    } = record;
    // The serial number goes first: a message of the slot's earlier use that is being decided right now may still write one
    // count too many below, but it can no longer be redirected.
    serial.store(0, Release);
    for field in
        [forwarded, granted, low, grants, on, notified, spent, bytes, messages].into_iter().chain(passed)
    {
        field.store(0, Relaxed);
    }
}

fn counters(record: &Record) -> LaneCounters {
    LaneCounters {
        bytes: record.bytes.load(Relaxed),
        messages: record.messages.load(Relaxed),
        passed: std::array::from_fn(|reason| record.passed[reason].load(Relaxed)),
        grants: record.grants.load(Relaxed),
    }
}

/// Measures the target's room and grants from it. The order of the steps is the one the model check explores: `spent` before
/// the room, `granted` before the watermark.
fn give(
    record: &Record,
    target: BorrowedFd<'_>,
    arithmetic: fn(u64, u64, u64) -> u64,
) -> io::Result<Granted> {
    let spent = record.spent.load(Acquire);
    let memory = send_memory(target)?;
    let credit = credit_for(memory.sndbuf, memory.queued);
    let watermark = watermark(credit);
    record.granted.store(arithmetic(spent, credit, record.granted.load(Relaxed)), Release);
    record.low.store(watermark.low, Relaxed);
    record.notified.store(watermark.notified.into(), Release);
    record.grants.store(record.grants.load(Relaxed) + 1, Relaxed);
    Ok(Granted { credit, scarce: watermark.notified })
}

/// An open lane. Dropping it closes the lane at once and frees its record; bytes that were redirected stay in the
/// target's transmit queue, so it may be dropped before or after `shutdown(target, SHUT_WR)`.
#[derive(Debug)]
pub struct Lane {
    lanes: Arc<Lanes>,
    route: Route,
    flow: Flow,
    /// The cookie of its sender's socket, once that was hooked.
    hooked: Option<u64>,
}

impl Lane {
    fn record(&self) -> &Record {
        let record = self.lanes.records.get(self.route.record as usize);
        record.expect("a lane's record is within the mapping it was taken from")
    }

    /// Which lane an event means.
    #[must_use]
    pub fn id(&self) -> LaneId {
        LaneId { record: self.route.record, serial: self.route.serial }
    }

    /// To be called after every write of the forwarder to the target that came from this lane's sender: `total` payload bytes
    /// have been written so far, since the connection began. Grants afresh from the room that the write left, then lets the
    /// lane reopen if the forwarder has caught up.
    ///
    /// # Errors
    /// When the target's send memory cannot be read; the lane then stays shut.
    pub fn forwarded(&self, total: u64, target: BorrowedFd<'_>) -> io::Result<Granted> {
        let record = self.record();
        // While bytes were on their way through the forwarder no message could be redirected, so credit may be lowered here.
        // If a write of nothing is reported, the lane may be open, and lowering would not be safe.
        if record.forwarded.load(Relaxed) == total {
            return self.grant(target);
        }
        let granted = give(record, target, |spent, credit, _| regrant(spent, credit))?;
        record.forwarded.store(total, Release);
        Ok(granted)
    }

    /// Grants anew from the target's room: the answer to [`super::Event::LowCredit`].
    ///
    /// # Errors
    /// When the target's send memory cannot be read.
    pub fn grant(&self, target: BorrowedFd<'_>) -> io::Result<Granted> {
        give(self.record(), target, grant)
    }

    /// Notes that its sender's socket, with this cookie, was asked to be hooked.
    pub const fn set_hooked(&mut self, socket: u64) {
        self.hooked = Some(socket);
    }

    /// The cookie of its sender's socket, if that may be hooked.
    #[must_use]
    pub const fn hooked(&self) -> Option<u64> {
        self.hooked
    }

    /// Has its sender been found to be in bulk, for which lanes are not meant?
    #[must_use]
    pub fn is_in_bulk(&self) -> bool {
        self.record().passed[Reason::Bulk as usize].load(Relaxed) > 0
    }

    /// Opens or shuts it. What is shut takes the ordinary way; nothing is lost or reordered at any time.
    pub fn enable(&self, on: bool) {
        self.record().on.store(on.into(), Release);
    }

    /// Payload bytes the kernel has moved so far; cheap enough for every look at an idle timer.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.record().bytes.load(Relaxed)
    }

    /// What the lane has done so far.
    #[must_use]
    pub fn snapshot(&self) -> LaneCounters {
        counters(self.record())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.lanes.tables().close(self.record(), self.route, self.flow);
    }
}
