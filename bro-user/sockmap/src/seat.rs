//! One forwarder's place in a set of programs that `bro loader` has left for its user: claimed by a lock that ends with the
//! process, and tidied of what a forwarder that died has left there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Relaxed, Release};

use aya::maps::{HashMap, Map, MapData, SockHash};
use bro_ebpf::{SEATS, seat_of};
use bro_proc::cgroup;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::maps::{Descriptors, Share, data};
use super::sys::{FlowKey, Mapping, PortKey, RouteValue, WatchValue};
use super::unavailable::{self, Unavailable};

/// How often all seats are tried: a process that tidies holds, for a moment, a seat that it does not use.
const ROUNDS: usize = 3;

/// A seat. Dropping it gives it back.
#[derive(Debug)]
pub struct Seat {
    _claim: Flock<File>,
    /// Keeps the programs attached when the loader replaces or removes the set.
    _link: OwnedFd,
    place: SeatPlace,
}

/// Where the set's programs look.
#[derive(Debug)]
pub(super) struct SeatPlace {
    /// The cgroup's number, which is its folder's inode.
    pub(super) id: u64,
    /// Its folder, if it is one that this process can find.
    pub(super) path: Option<PathBuf>,
}

impl SeatPlace {
    /// The cgroup with this number: a user's slice, or whatever this process is in.
    pub(super) fn of(id: u64, user: u32) -> Self {
        let is = |path: &&Path| std::fs::metadata(path).is_ok_and(|found| found.ino() == id);
        let slice = cgroup::of_user(user).ok().filter(|path| is(&path.as_path()));
        let around = || {
            let own = cgroup::of_self().ok()?;
            own.ancestors().find(is).map(Path::to_owned)
        };
        Self { id, path: slice.or_else(around) }
    }
}

impl Seat {
    /// Claims a seat of the set, from its folder of seats; returns the seat's number and the lock on it.
    pub(super) fn claim(seats: &Path) -> Result<(u32, Flock<File>), Unavailable> {
        for _ in 0..ROUNDS {
            for seat in 0..SEATS {
                if let Some(claim) = lock(seats, seat)? {
                    return Ok((u32::try_from(seat).unwrap_or(0), claim));
                }
            }
        }
        Err(Unavailable::NoSeat)
    }

    pub(super) const fn new(claim: Flock<File>, link: OwnedFd, place: SeatPlace) -> Self {
        Self { _claim: claim, _link: link, place }
    }

    /// Whether the programs can see anything of this cgroup.
    ///
    /// # Errors
    /// When they cannot.
    pub fn covers(&self, cgroup: &Path) -> Result<(), Unavailable> {
        let is = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.ino() == self.place.id);
        let below = cgroup.ancestors().any(is);
        // Of a larger one they see this user's part, which is the only one that matters to this user's forwarders.
        let above = self.place.path.as_ref().is_some_and(|own| own.starts_with(cgroup));
        if below || above { Ok(()) } else { Err(Unavailable::Outside(cgroup.into())) }
    }
}

/// The folder that stands for a seat, below the folder of seats.
pub(super) fn folder(seats: &Path, seat: usize) -> PathBuf {
    seats.join(format!("{seat:02}"))
}

/// Takes the lock of a seat, unless another process has it.
fn lock(seats: &Path, seat: usize) -> Result<Option<Flock<File>>, Unavailable> {
    let path = folder(seats, seat);
    let failed = |error: io::Error| Unavailable::Pin(path.clone(), error);
    let folder = File::open(&path).map_err(failed)?;
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(claim) => Ok(Some(claim)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

/// How many seats are taken.
pub(super) fn taken(seats: &Path) -> Result<usize, Unavailable> {
    let all = (0..SEATS).map(|seat| lock(seats, seat).map(|claim| usize::from(claim.is_none())));
    all.sum()
}

/// Whether no process has this seat.
pub(super) fn is_free(seats: &Path, seat: u32) -> bool {
    lock(seats, seat as usize).is_ok_and(|claim| claim.is_some())
}

/// Takes away what a forwarder that is gone has left: in this seat everything, in other seats that are free (`free`) the ports that
/// it watched.
pub(super) fn tidy(
    descriptors: &Descriptors,
    share: &Share,
    free: impl Fn(u32) -> bool,
) -> Result<(), Unavailable> {
    let dead = |seat: u32| seat == share.seat || free(seat);
    let mut watched: HashMap<MapData, PortKey, WatchValue> =
        HashMap::try_from(Map::HashMap(data(&descriptors.watched)?)).map_err(unavailable::damaged)?;
    let left: Vec<PortKey> = watched
        .iter()
        .flatten()
        .filter(|(_, watch)| (watch.0.seat as usize) < SEATS && dead(watch.0.seat))
        .map(|(key, _)| key)
        .collect();
    for key in left {
        let _gone = watched.remove(&key);
    }

    let ours = |route: &RouteValue| seat_of(route.0.record, share.records) == share.seat;
    let mut routes: HashMap<MapData, FlowKey, RouteValue> =
        HashMap::try_from(Map::HashMap(data(&descriptors.routes)?)).map_err(unavailable::damaged)?;
    let left: Vec<FlowKey> =
        routes.iter().flatten().filter(|(_, route)| ours(route)).map(|(flow, _)| flow).collect();
    for key in left {
        let _gone = routes.remove(&key);
    }
    // Its sockets left this map when they were closed, but for the ones that it had shared with another process.
    let mut targets: SockHash<MapData, RouteValue> =
        SockHash::try_from(Map::SockHash(data(&descriptors.targets)?)).map_err(unavailable::damaged)?;
    let left: Vec<RouteValue> = targets.keys().flatten().filter(ours).collect();
    for key in left {
        let _gone = targets.remove(&key);
    }

    let first = share.first_record() as usize;
    let records = Mapping::of_records(descriptors.records.as_fd(), first + share.records as usize);
    let records = records.map_err(Unavailable::Mapping)?;
    for record in (first..first + share.records as usize).filter_map(|index| records.get(index)) {
        record.on.store(0, Relaxed);
        record.serial.store(0, Release);
    }
    Ok(())
}
