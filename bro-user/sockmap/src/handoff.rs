//! What a forwarder that has loaded the programs for itself leaves to its successor (`systemctl reload`): the same programs and
//! maps, by descriptor, so that the successor needs no right that its predecessor has given up. They are parted as `bro loader`'s
//! are: each process has a seat, and the next one a free one.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::maps::{Descriptors, Share};
use super::pinned::version;
use super::unavailable::Unavailable;

/// How many processes may use a set at once: one, and the ones it has replaced that still have connections.
const MOST_SEATS: u32 = 4;

/// The most records of a set, 12 MiB: one for many connections has fewer seats.
const MOST_RECORDS: u32 = 1 << 16;

/// How many seats a set has if each forwarder has so many records.
pub(super) fn seats(records: u32) -> u32 {
    (MOST_RECORDS / records.max(1)).clamp(1, MOST_SEATS)
}

/// All there is of a set, as each process that uses it keeps it.
#[derive(Debug)]
pub(super) struct Estate {
    /// The maps, and the program that hooks a client; the events are the seat's.
    pub(super) descriptors: Descriptors,
    /// Every seat's ring buffer.
    pub(super) rings: Vec<OwnedFd>,
    /// The program to attach.
    pub(super) watch: OwnedFd,
    pub(super) share: Share,
    /// The seats of predecessors, which may have connections yet.
    pub(super) older: Vec<u32>,
    /// Why clients are not hooked.
    pub(super) no_clients: Option<String>,
}

/// What goes with the descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Letter {
    version: u64,
    /// Of the successor.
    share: Share,
    /// The seats that other processes have.
    older: Vec<u32>,
    no_clients: Option<String>,
    rings: usize,
    /// Where the programs are attached, for each of the last descriptors.
    cgroups: Vec<PathBuf>,
}

/// As it is sent.
#[derive(Debug)]
pub struct Bequest {
    /// What it is, in words.
    pub letter: Vec<u8>,
    /// The descriptors of it.
    pub descriptors: Vec<OwnedFd>,
}

impl Estate {
    /// What the successor gets; `None` when every seat is taken. `older`: predecessors have connections yet.
    pub(super) fn bequest<'a>(
        &'a self,
        links: impl Iterator<Item = (&'a PathBuf, &'a OwnedFd)>,
        older: bool,
    ) -> Result<Option<Bequest>, Unavailable> {
        let mut taken = vec![self.share.seat];
        taken.extend(self.older.iter().filter(|_| older));
        let Some(seat) = (0..self.rings.len() as u32).find(|seat| !taken.contains(seat)) else {
            tracing::warn!(
                "there is no place for the successor in the kernel relay: {} processes have theirs, which is all there can be",
                taken.len()
            );
            return Ok(None);
        };
        let (cgroups, links): (Vec<PathBuf>, Vec<&OwnedFd>) =
            links.map(|(cgroup, link)| (cgroup.clone(), link)).unzip();
        let letter = Letter {
            version: version()?,
            share: Share { seat, ..self.share },
            older: taken,
            no_clients: self.no_clients.clone(),
            rings: self.rings.len(),
            cgroups,
        };
        let own = self.descriptors.as_array();
        let all = own.into_iter().chain([self.watch.as_fd()]).chain(self.rings.iter().map(OwnedFd::as_fd));
        let all = all.chain(links.into_iter().map(OwnedFd::as_fd));
        let descriptors = all.map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>();
        Ok(Some(Bequest {
            // Paths that are no text have no form in JSON.
            letter: serde_json::to_vec(&letter).map_err(|error| Unavailable::Mapping(error.into()))?,
            descriptors: descriptors.map_err(Unavailable::Mapping)?,
        }))
    }
}

impl Bequest {
    /// All of it, with where the programs are attached; `None` when it is another version's or makes no sense.
    pub(super) fn open(self) -> Option<(Estate, Vec<(PathBuf, OwnedFd)>)> {
        let letter: Letter = serde_json::from_slice(&self.letter).ok()?;
        let mut descriptors = self.descriptors.into_iter();
        let maps: Vec<OwnedFd> = descriptors.by_ref().take(Descriptors::COUNT).collect();
        let maps = Descriptors::from_array(maps.try_into().ok()?);
        let watch = descriptors.next()?;
        let rings: Vec<OwnedFd> = descriptors.by_ref().take(letter.rings).collect();
        let fits = rings.len() == letter.rings && descriptors.len() == letter.cgroups.len();
        if version().ok()? != letter.version || !fits {
            return None;
        }
        let events = rings.get(letter.share.seat as usize)?.try_clone().ok()?;
        let estate = Estate {
            descriptors: Descriptors { events, ..maps },
            rings,
            watch,
            share: letter.share,
            older: letter.older,
            no_clients: letter.no_clients,
        };
        Some((estate, letter.cgroups.into_iter().zip(descriptors).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_connections_leave_room_for_fewer_successors() {
        assert_eq!(seats(514), 4);
        assert_eq!(seats(1 << 15), 2);
        assert_eq!(seats(2_000_002), 1);
    }

    fn estate(seat: u32, older: &[u32]) -> Estate {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        Estate {
            descriptors: Descriptors::from_array(std::array::from_fn(|_| null())),
            rings: (0..3).map(|_| null()).collect(),
            watch: null(),
            share: Share { seat, records: 8, hook_blocking: false, fionread_lies: true },
            older: older.to_vec(),
            no_clients: None,
        }
    }

    #[test]
    fn a_successor_gets_the_seat_that_is_free() {
        let (cgroup, link) =
            (PathBuf::from("/sys/fs/cgroup/x"), std::fs::File::open("/dev/null").unwrap().into());
        let heir = |seat, older: &[u32], alive| {
            let bequest = estate(seat, older).bequest(std::iter::once((&cgroup, &link)), alive).unwrap()?;
            let (heir, links) = bequest.open().unwrap();
            assert!(links.len() == 1 && links[0].0 == cgroup && heir.rings.len() == 3);
            Some((heir.share.seat, heir.older))
        };
        assert_eq!(heir(0, &[], false), Some((1, vec![0])));
        assert_eq!(heir(1, &[0], true), Some((2, vec![1, 0])));
        assert_eq!(heir(1, &[0], false), Some((0, vec![1])));
        assert_eq!(heir(2, &[1, 0], true), None);
    }

    #[test]
    fn what_makes_no_sense_is_not_taken() {
        let none = std::iter::empty();
        let bequest = estate(0, &[]).bequest(none, false).unwrap().unwrap();
        let Bequest { letter, mut descriptors } = bequest;
        let other = String::from_utf8(letter.clone()).unwrap().replace("\"version\":", "\"version\":1");
        let empty = Bequest { letter: other.into_bytes(), descriptors: Vec::new() };
        assert!(empty.open().is_none());
        descriptors.pop();
        assert!(Bequest { letter, descriptors }.open().is_none());
    }
}
