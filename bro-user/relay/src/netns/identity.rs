//! The user as which the agent connects to a unix socket. The service sees that user (unix(7) SO_PEERCRED), and may trust it:
//! MariaDB's `unix_socket` and PostgreSQL's `peer` ask for nothing else. The forwarder's own user is mostly the container's owner,
//! root inside, so every client of the forwarder would come as the owner. Instead the connection is made as a user of the container
//! that owns nothing, unless the administrator names another one.

use std::collections::HashSet;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::str::FromStr;

use caps::CapSet;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat, stat};
use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};

use crate::read_bounded::{self, Link};
use crate::sys;

/// `--unix-identity`: the user that connects to the service's unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Identity {
    /// An id of the container's that no entry of its user database has.
    #[default]
    Unused,
    /// The forwarder's own user and groups.
    Forwarder,
    /// These, as the container numbers them.
    User {
        /// The user.
        uid: u32,
        /// The only group.
        gid: u32,
    },
}

impl FromStr for Identity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The largest number means “leave it as it is” to the kernel.
        let id = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u32>().ok().filter(|&id| digits && id != u32::MAX)
        };
        let (user, group) = text.split_once(':').unwrap_or((text, text));
        match (text, id(user), id(group)) {
            ("unused", ..) => Ok(Self::Unused),
            ("forwarder", ..) => Ok(Self::Forwarder),
            (_, Some(uid), Some(gid)) => Ok(Self::User { uid, gid }),
            _ => Err(format!(
                "“{text}” is neither UID, UID:GID (numbers inside the container), unused nor forwarder"
            )),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unused => f.write_str("unused"),
            Self::Forwarder => f.write_str("forwarder"),
            Self::User { uid, gid } => write!(f, "{uid}:{gid}"),
        }
    }
}

/// The forwarder may not become another user.
pub const NOT_PERMITTED: Errno = Errno::EPERM;
/// The id that was asked for is none of the container's.
pub const UNMAPPED: Errno = Errno::EOVERFLOW;
/// Every id of the container's is taken.
pub const NONE_UNUSED: Errno = Errno::EUSERS;

/// What to say when the agent refuses to connect to unix sockets for one of these reasons.
#[must_use]
pub fn refusal(errno: Errno, wish: Identity) -> Option<String> {
    const OWN: &str = "with --unix-identity=forwarder every client has the rights that the service gives to this forwarder's user";
    Some(match errno {
        NOT_PERMITTED => format!(
            "this forwarder may not connect to a unix socket as another user than its own (CAP_SETUID and CAP_SETGID; where \
             `bro activate` wrote the unit, run it again); {OWN}"
        ),
        UNMAPPED => format!("--unix-identity={wish}: that is no id of the container's user namespace"),
        NONE_UNUSED => format!(
            "no id of the container's is free to connect to its unix socket; name one by --unix-identity; {OWN}"
        ),
        _ => return None,
    })
}

/// May this process become another user? Where nothing has to be entered first, that shows at the start.
#[must_use]
pub fn may_become_another() -> bool {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    has(caps::Capability::CAP_SETUID) && has(caps::Capability::CAP_SETGID)
}

/// Ids that systemd, Debian and the distributions' user databases leave alone, between the ones of dynamic users and `nobody`,
/// without those that images are known to use (65532 is “nonroot”).
const FREE: std::ops::RangeInclusive<u32> = 65520..=65531;

/// The most that is read of a container's user database, and of a table of its ids.
const DATABASE: u64 = 1024 * 1024;

/// The most ids that are looked at in one range of a container's.
const TRIES: u32 = 65536;

/// The user that connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Actor {
    /// This process as it is.
    Itself,
    /// This user with this group and no other, as this process's user namespace numbers them.
    Other {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
}

impl Actor {
    /// Decides, for the container of the process with the folder `process` in /proc. The container's files start at `root` (this
    /// process's own, where there is none).
    ///
    /// # Errors
    /// [`NOT_PERMITTED`], [`UNMAPPED`] or [`NONE_UNUSED`]; or the files' own.
    pub fn decide(
        wish: Identity,
        process: BorrowedFd<'_>,
        root: Option<BorrowedFd<'_>>,
    ) -> nix::Result<Self> {
        if wish == Identity::Forwarder {
            return Ok(Self::Itself);
        }
        let (mut users, mut groups) =
            (Ids::parse(&text(process, "uid_map")?), Ids::parse(&text(process, "gid_map")?));
        if is_in_ours(process)? {
            // Then the tables show the ids as the user namespace around both has them.
            users.are_ours();
            groups.are_ours();
        }
        let (uid, gid) = match wish {
            Identity::User { uid, gid } => (uid, gid),
            Identity::Forwarder | Identity::Unused => {
                let id = users.unused(&groups, &taken(root)).ok_or(NONE_UNUSED)?;
                (id, id)
            }
        };
        let (uid, gid) = (users.seen_here(uid).ok_or(UNMAPPED)?, groups.seen_here(gid).ok_or(UNMAPPED)?);
        // For good: nothing that an agent does needs the groups, and in another user namespace they could not be named again.
        setgroups(&[]).map_err(|_| NOT_PERMITTED)?;
        let actor = Self::Other { uid, gid };
        actor.act(|| Ok(()))?;
        Ok(actor)
    }

    /// Does `connect` as this user, and without a capability. For a process without threads; it ends if it cannot change back.
    ///
    /// # Errors
    /// [`NOT_PERMITTED`], or what `connect` fails with.
    pub fn act<T>(self, connect: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
        let Self::Other { uid, gid } = self else { return connect() };
        let (user, group) = (geteuid(), getegid());
        let rights = caps::read(None, CapSet::Effective).map_err(|_| NOT_PERMITTED)?;
        // The real and the saved ids stay, so that there is a way back.
        let same = (Uid::from_raw(u32::MAX), Gid::from_raw(u32::MAX));
        let became =
            setresgid(same.1, gid.into(), same.1).and_then(|()| setresuid(same.0, uid.into(), same.0));
        // A former root has no capability left by that; any other user still has them.
        let bare = caps::clear(None, CapSet::Effective);
        let done = match (became, bare) {
            (Ok(()), Ok(())) => connect(),
            // EINVAL: an id that this user namespace does not have.
            (Err(Errno::EINVAL), _) => Err(UNMAPPED),
            _ => Err(NOT_PERMITTED),
        };
        // Without capabilities: then nothing but this process's own ids can be meant. A user namespace that does not have these
        // (`UserNS=nomap`) knows no way back: there it stays the other user, which nothing trusts, and has its capabilities again.
        let back = |done: nix::Result<()>| matches!(done, Ok(()) | Err(Errno::EPERM | Errno::EINVAL));
        let restored = back(setresuid(same.0, user, same.0))
            && back(setresgid(same.1, group, same.1))
            && caps::set(None, CapSet::Effective, &rights).is_ok();
        if !restored {
            // Whatever it did next, it would do as the wrong user.
            sys::exit_now(1);
        }
        done
    }

    /// Is it the user that listens at the other end of `socket`?
    #[must_use]
    pub fn is_the_listener(self, socket: &impl AsFd) -> bool {
        let Self::Other { uid, .. } = self else { return false };
        nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials)
            .is_ok_and(|listener| listener.uid() == uid)
    }
}

/// Is the process in this one's user namespace?
fn is_in_ours(process: BorrowedFd<'_>) -> nix::Result<bool> {
    let theirs = fstatat(process, "ns/user", AtFlags::empty())?;
    let ours = stat("/proc/self/ns/user")?;
    Ok((theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino))
}

/// A file of a process's in /proc.
fn text(process: BorrowedFd<'_>, name: &str) -> nix::Result<String> {
    use std::io::Read as _;
    let file = openat(process, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut text = String::new();
    let read = std::fs::File::from(file).take(DATABASE).read_to_string(&mut text);
    read.map_err(|error| sys::errno_of(&error))?;
    Ok(text)
}

/// The ids in the user database: of users, of their groups, and of groups. What cannot be read names none.
fn taken(root: Option<BorrowedFd<'_>>) -> HashSet<u32> {
    let read = |path: &str| match root {
        None => read_bounded::read(Path::new(path), DATABASE, Link::Follow).ok(),
        Some(root) => {
            let file = sys::open_in_root(root, Path::new(path)).ok()?;
            let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
            read_bounded::read(Path::new(&opened), DATABASE, Link::Follow).ok()
        }
    };
    let texts = [read("/etc/passwd"), read("/etc/group")];
    texts.iter().flatten().flat_map(|text| text.lines()).flat_map(ids_in).collect()
}

/// The numbers of a line of passwd(5) or group(5).
fn ids_in(line: &str) -> impl Iterator<Item = u32> {
    line.split(':').skip(2).take(2).filter_map(|field| field.parse().ok())
}

/// A table of ids (user_namespaces(7), uid_map): the ids of another user namespace, and what this one calls them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ids(Vec<Range>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    inside: u32,
    here: u32,
    count: u32,
}

impl Ids {
    fn parse(text: &str) -> Self {
        let range = |line: &str| {
            let mut numbers = line.split_whitespace().map(|word| word.parse::<u32>().ok());
            let mut next = || numbers.next().flatten();
            Some(Range { inside: next()?, here: next()?, count: next()? })
        };
        Self(text.lines().filter_map(range).collect())
    }

    /// They are this user namespace's own.
    fn are_ours(&mut self) {
        for range in &mut self.0 {
            range.here = range.inside;
        }
    }

    /// What this user namespace calls the id `inside`.
    fn seen_here(&self, inside: u32) -> Option<u32> {
        let offset = |range: &Range| inside.checked_sub(range.inside).filter(|offset| *offset < range.count);
        self.0
            .iter()
            .find_map(|range| range.here.checked_add(offset(range)?))
            // An id that this user namespace does not have is shown so.
            .filter(|&id| id != u32::MAX)
    }

    /// An id that both tables have, and that is not taken.
    fn unused(&self, groups: &Self, taken: &HashSet<u32>) -> Option<u32> {
        let mut ranges = self.0.clone();
        ranges.sort_by_key(|range| std::cmp::Reverse(range.inside));
        let highest_first = |range: &Range| {
            let end = range.inside.saturating_add(range.count);
            (range.inside.max(end.saturating_sub(TRIES))..end).rev()
        };
        let others = ranges.iter().flat_map(highest_first).filter(|id| *id != 0 && *id < 65532);
        let usable = |id: &u32| {
            !taken.contains(id) && self.seen_here(*id).is_some() && groups.seen_here(*id).is_some()
        };
        FREE.rev().chain(others).find(usable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_identity_is_read_as_it_is_written() {
        let read = |text: &str| text.parse::<Identity>();
        assert_eq!(read("unused"), Ok(Identity::Unused));
        assert_eq!(read("forwarder"), Ok(Identity::Forwarder));
        assert_eq!(read("33"), Ok(Identity::User { uid: 33, gid: 33 }));
        assert_eq!(read("33:0"), Ok(Identity::User { uid: 33, gid: 0 }));
        for wrong in ["", ":", "33:", ":33", "www-data", "-1", "+1", "4294967295", "1:2:3"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        for identity in [Identity::Unused, Identity::Forwarder, Identity::User { uid: 1, gid: 2 }] {
            assert_eq!(read(&identity.to_string()), Ok(identity));
        }
    }

    fn unused(users: &str, groups: &str, database: &str) -> Option<u32> {
        let taken = database.lines().flat_map(ids_in).collect();
        Ids::parse(users).unused(&Ids::parse(groups), &taken)
    }

    #[test]
    fn an_unused_id_is_one_that_the_container_has_and_no_user_in_it() {
        let whole = "0 0 4294967295";
        assert_eq!(
            unused(whole, whole, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:::\n"),
            Some(65531)
        );
        assert_eq!(unused(whole, whole, "a:x:65531:1:::\nb:x:1:65530:::\nc:x:65529:\n"), Some(65528));
        // As `UserNS=auto` maps them, of an image with few users, and as `keep-id` does.
        let auto = "0 2147483647 1024";
        assert_eq!(unused(auto, auto, "a:x:1023:1023:::"), Some(1022));
        let kept = "0 1 1000\n1000 0 1\n1001 1001 64536";
        assert_eq!(unused(kept, kept, ""), Some(65531));
        // The group has to be there as well; and root is never unused.
        assert_eq!(unused(auto, "0 2147483647 10", ""), Some(9));
        assert_eq!(unused("0 1000 1", "0 1000 1", ""), None);
        // Ids that the container has and this user namespace does not.
        assert_eq!(unused("0 4294967295 1", whole, ""), None);
    }

    #[test]
    fn an_id_is_what_this_user_namespace_calls_it() {
        let kept = Ids::parse("0 1 1000\n1000 0 1\n1001 1001 64536");
        assert_eq!(
            (kept.seen_here(0), kept.seen_here(1000), kept.seen_here(65531)),
            (Some(1), Some(0), Some(65531))
        );
        let mut own = Ids::parse("0 1000 1\n1 100000 65536");
        own.are_ours();
        assert_eq!(
            (own.seen_here(0), own.seen_here(65531), own.seen_here(65537)),
            (Some(0), Some(65531), None)
        );
        assert_eq!((kept.seen_here(65537), Ids::parse("nonsense").seen_here(0)), (None, None));
    }

    proptest! {
        #[test]
        fn whatever_a_container_says_of_its_ids_is_borne(
            users in "([0-9]{1,10} [0-9]{1,10} [0-9]{1,10}\n){0,4}", groups in "\\PC{0,60}", database in "(\\PC{0,9}:){0,9}"
        ) {
            if let Some(id) = unused(&users, &groups, &database) {
                prop_assert!(Ids::parse(&users).seen_here(id).is_some());
            }
        }
    }
}
