//! The set of programs and maps that `bro loader` has left for a user, as that user's forwarders open it: without any right but
//! that to its files.
//!
//! Below the folder of a user there are the maps and the link that keeps the programs attached (the user's files, mode 0600), and a
//! folder for each seat (the user's, mode 0700). All but that is root's, so no user can put anything else in their place.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use aya::maps::{Array, Map};
use bro_ebpf::{About, Counter, SEATS};
use nix::libc;

use super::maps::{Descriptors, Share, data};
use super::seat::{self, Seat, SeatPlace};
use super::sys::{Mapping, open_pinned};
use super::unavailable::Unavailable;

/// Where the folders of users are: a BPF file system of bro's own, because only root may pass through /sys/fs/bpf.
pub const ROOT: &str = "/run/bro/bpf";

/// The link that keeps the programs attached.
pub(super) const LINK: &str = "link";
/// The program that hooks a client.
pub(super) const HOOK: &str = "hook";
/// What the loader wrote down.
pub(super) const ABOUT: &str = "about";
/// The folder of the seats.
pub(super) const SEATS_FOLDER: &str = "seats";

/// How often a set is opened that is just being replaced.
const TRIES: usize = 3;

/// The folder of a user's set.
#[must_use]
pub fn folder(user: u32) -> PathBuf {
    Path::new(ROOT).join(user.to_string())
}

/// The file of a seat's ring buffer.
pub(super) fn events(seat: usize) -> String {
    format!("events-{seat:02}")
}

/// Which programs these are: the beginning of the embedded object's digest. Whatever is changed about them or about what they share
/// with user space makes another object.
pub(super) fn version() -> Result<u64, Unavailable> {
    let digest = super::OBJECT.lines().find_map(|line| line.strip_prefix("sha256 "));
    let digest = digest.and_then(|digest| u64::from_str_radix(digest.get(..16)?, 16).ok());
    digest.ok_or_else(|| Unavailable::Object("it is not written down which programs they are".into()))
}

/// A place in the set, with all it takes to use it.
#[derive(Debug)]
pub struct Pinned {
    /// The maps.
    pub descriptors: Descriptors,
    /// What there is to know about them.
    pub share: Share,
    /// To be held for as long as they are used.
    pub seat: Seat,
    /// Whether clients can be hooked.
    pub clients: bool,
}

/// What `bro doctor` says about a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// How many connections each seat has lanes for.
    pub connections: u64,
    /// How many seats are taken.
    pub taken: usize,
    /// Whether this kernel says 0 to FIONREAD.
    pub fionread_lies: bool,
    /// Whether local clients can have lanes.
    pub clients: bool,
    /// Sockets that were taken hold of so far.
    pub hooked: u64,
    /// Sockets at watched ports that were left alone, because they belong to another user.
    pub foreign: u64,
}

/// Opens the set in `folder` and takes a seat; `None` when there is no set.
///
/// # Errors
/// When there is one that this process cannot use.
pub fn open(folder: &Path) -> Result<Option<Pinned>, Unavailable> {
    with(folder, |set| {
        let (number, claim) = Seat::claim(&set.path(SEATS_FOLDER))?;
        let share = Share { seat: number, ..set.share };
        let descriptors = Descriptors {
            records: set.open("records")?,
            totals: set.open("totals")?,
            watched: set.open("watched")?,
            routes: set.open("routes")?,
            senders: set.open("senders")?,
            targets: set.open("targets")?,
            events: set.open(&events(number as usize))?,
            hook: set.open(HOOK)?,
        };
        let seats = set.path(SEATS_FOLDER);
        seat::tidy(&descriptors, &share, |seat| seat::is_free(&seats, seat))?;
        let link = set.open(LINK)?;
        let place = place(&link)?;
        Ok(Pinned { descriptors, share, seat: Seat::new(claim, link, place), clients: set.clients })
    })
}

/// Looks at the set in `folder`; `None` when there is none.
///
/// # Errors
/// As [`open`].
pub fn look(folder: &Path) -> Result<Option<Summary>, Unavailable> {
    with(folder, |set| {
        let _place = place(&set.open(LINK)?)?;
        let taken = seat::taken(&set.path(SEATS_FOLDER))?;
        let Share { records, fionread_lies, .. } = set.share;
        let totals =
            Mapping::of_numbers(set.open("totals")?.as_fd(), Counter::COUNT).map_err(Unavailable::Mapping)?;
        let total = |counter: Counter| totals.get(counter as usize).map_or(0, |total| total.load(Relaxed));
        let (hooked, foreign) = (total(Counter::Hooked), total(Counter::Foreign));
        let clients = set.clients;
        Ok(Summary { connections: u64::from(records / 2), taken, fionread_lies, clients, hooked, foreign })
    })
}

/// A set's folder, held so that all that is opened is of the same set, whatever the loader puts in its place meanwhile.
struct Set<'a> {
    name: &'a Path,
    folder: OwnedFd,
    share: Share,
    clients: bool,
}

impl Set<'_> {
    /// A file of it, by a path that leads through the held folder.
    fn path(&self, file: &str) -> PathBuf {
        through(&self.folder, file)
    }

    /// What is pinned there.
    fn open(&self, file: &str) -> Result<OwnedFd, Unavailable> {
        open_pinned(&self.path(file)).map_err(|error| Unavailable::Pin(self.name.join(file), error))
    }
}

fn through(folder: &OwnedFd, file: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{file}", folder.as_raw_fd()).into()
}

fn with<T>(
    folder: &Path,
    then: impl Fn(&Set<'_>) -> Result<T, Unavailable>,
) -> Result<Option<T>, Unavailable> {
    let mut last = None;
    for _ in 0..TRIES {
        let outcome = match hold(folder) {
            Ok(None) => return Ok(None),
            Ok(Some(set)) => then(&set),
            Err(error) => Err(error),
        };
        match outcome {
            // It was replaced or removed while we opened it.
            Err(Unavailable::Pin(path, error)) if error.raw_os_error() == Some(libc::ENOENT) => {
                last = Some(Unavailable::Pin(path, error));
            }
            outcome => return outcome.map(Some),
        }
    }
    last.map_or(Ok(None), Err)
}

/// Opens the folder and reads what is written down there.
fn hold(name: &Path) -> Result<Option<Set<'_>>, Unavailable> {
    use nix::fcntl::{OFlag, open};
    use nix::sys::stat::Mode;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let folder = match open(name, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(nix::errno::Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(Unavailable::Pin(name.into(), errno.into())),
    };
    let share = Share { seat: 0, records: 0, hook_blocking: false, fionread_lies: true };
    let set = Set { name, folder, share, clients: false };
    let about: Array<_, u64> =
        Array::try_from(Map::Array(data(&set.open(ABOUT)?)?)).map_err(|_| Unavailable::OtherVersion)?;
    let read = |what: About| about.get(&(what as u32), 0).map_err(|_| Unavailable::OtherVersion);
    if read(About::Version)? != version()? {
        return Err(Unavailable::OtherVersion);
    }
    let records = u32::try_from(read(About::Records)?).ok().filter(|records| *records > 0);
    // Their number is the user's to change; beyond a map's end the kernel refuses.
    let records = records.filter(|records| records.checked_mul(SEATS as u32).is_some());
    let share = Share {
        records: records.ok_or(Unavailable::OtherVersion)?,
        fionread_lies: read(About::FionreadLies)? != 0,
        ..set.share
    };
    let clients = read(About::NoClients)? == 0;
    Ok(Some(Set { share, clients, ..set }))
}

/// The cgroup that a link is attached to.
fn place(link: &OwnedFd) -> Result<SeatPlace, Unavailable> {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd()));
    let about = about.map_err(|error| Unavailable::Pin(LINK.into(), error))?;
    let id = about.lines().find_map(|line| line.strip_prefix("cgroup_id:"));
    match id.and_then(|id| id.trim().parse().ok()) {
        // The kernel detaches from a cgroup that is removed.
        None | Some(0) => Err(Unavailable::Detached),
        Some(id) => Ok(SeatPlace::of(id, nix::unistd::geteuid().as_raw())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_programs_have_a_version() {
        // 0 stands for a set that is not finished.
        assert_ne!(version().unwrap(), 0);
    }

    #[test]
    fn where_there_is_no_set_there_is_none() {
        let nowhere = std::env::temp_dir().join(format!("bro-no-set-{}", std::process::id()));
        assert!(open(&nowhere).unwrap().is_none());
        std::fs::create_dir(&nowhere).unwrap();
        let empty = open(&nowhere);
        std::fs::remove_dir(&nowhere).unwrap();
        // It may have been removed this moment: so it is as if there were none.
        assert!(empty.is_err(), "{empty:?}");
    }
}
