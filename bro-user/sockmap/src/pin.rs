//! The other side of [`super::pinned`]: loads a user's programs, attaches them to the user's cgroup and leaves them pinned for that
//! user alone. A set that was there before is replaced in one step, and goes on for the forwarders that use it until the last has
//! ended.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map};
use bro_ebpf::{About, Owners, SEATS};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, RenameFlags, renameat2};
use nix::mount::{MsFlags, mount};

use super::load::{self, Loaded, Shape};
use super::maps::data;
use super::pinned::{ABOUT, HOOK, LINK, ROOT, SEATS_FOLDER, events, folder, version};
use super::unavailable::{self, Unavailable, not_pinned};
use super::{Config, Kernel, seat, sys};

/// A seat's ring buffer, in bytes: some 800 events.
const RING: u32 = 32 * 1024;

/// How a user was named. `bro-loader@alice` and `bro-loader@1000` are two units for one set: whichever stopped would take away what
/// the other stands for, so the second is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// By name.
    Name,
    /// By number.
    Number,
}

impl Named {
    /// The folder that says so in a set.
    const fn folder(self) -> &'static str {
        match self {
            Self::Name => "by-name",
            Self::Number => "by-number",
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Name => Self::Number,
            Self::Number => Self::Name,
        }
    }

    /// Refuses for a user with a set that was made under the other designation.
    fn check(self, set: &Path) -> Result<(), Unavailable> {
        let other = match self.other() {
            Self::Name => "by name",
            Self::Number => "by number",
        };
        if set.join(self.other().folder()).exists() { Err(Unavailable::Named(other)) } else { Ok(()) }
    }
}

/// The user for which a set is made, and how.
#[derive(Debug, Clone)]
pub struct Order {
    /// How the user was designated.
    pub named: Named,
    /// The user that gets the set.
    pub user: u32,
    /// The user's ranges of subordinate user ids, first and count: the users of that user's containers.
    pub subordinate: Vec<(u32, u32)>,
    /// The cgroup that the programs are to look at.
    pub cgroup: PathBuf,
    /// How many connections each forwarder may have lanes for.
    pub connections: u32,
}

/// Loads, tests, attaches and pins.
///
/// # Errors
/// When any of it is refused; the set that was there before is then still there.
pub fn install(order: &Order) -> Result<(), Unavailable> {
    mounted()?;
    let seen = tested()?;
    let shape = Shape {
        owners: Owners::of(order.user, &order.subordinate),
        seats: SEATS,
        records: order.connections.saturating_mul(2),
        ring: RING,
        hook_blocking: false,
        // A reader of these lines would read them for every forwarder.
        trace: false,
    };
    let loaded = load::load(&shape)?;
    write_down(&loaded, &shape, &seen)?;

    let draft = Draft::begin(order.user)?;
    order.named.check(&folder(order.user))?;
    pin(draft.path(), loaded, &order.cgroup, order.user)?;
    make(&draft.path().join(order.named.folder()), 0o700)?;
    draft.publish(&folder(order.user))?;
    if seen.fionread_lies {
        let defect = Unavailable::FionreadLies;
        tracing::warn!(
            "loaded, but forwarders with --relay=auto do not use it: {defect} ({})",
            defect.mend()
        );
    }
    Ok(())
}

/// Takes a user's set away; false when there was none. Forwarders that use it go on.
///
/// # Errors
/// When the files cannot be removed, or were made for another unit.
pub fn remove(user: u32, named: Named) -> Result<bool, Unavailable> {
    let set = folder(user);
    if !set.exists() {
        return Ok(false);
    }
    named.check(&set)?;
    clear(&set).map_err(|error| Unavailable::Pin(set, error))?;
    Ok(true)
}

/// What the self-test has seen of this kernel.
struct SeenSet {
    fionread_lies: bool,
    no_clients: bool,
}

/// Tests programs of the same kind, that hook this process's own sockets.
fn tested() -> Result<SeenSet, Unavailable> {
    let config = Config { connections: 1, hook_blocking: false, bear_fionread: true, trace: false };
    let own = Owners::of(nix::unistd::geteuid().as_raw(), &[]);
    let mut kernel = Kernel::of(load::load(&Shape { owners: own, ..Shape::own(&config) })?)?;
    kernel.selftest()?;
    let clients = kernel.programs.hook_clients();
    if let Err(why) = &clients {
        tracing::warn!("no lane for local clients: {why} ({})", why.mend());
    }
    Ok(SeenSet { fionread_lies: kernel.fionread_lies(), no_clients: clients.is_err() })
}

fn write_down(loaded: &Loaded, shape: &Shape, seen: &SeenSet) -> Result<(), Unavailable> {
    let mut about: Array<_, u64> =
        Array::try_from(Map::Array(data(&loaded.about)?)).map_err(unavailable::damaged)?;
    let facts = [
        (About::Records, u64::from(shape.records)),
        (About::FionreadLies, u64::from(seen.fionread_lies)),
        (About::NoClients, u64::from(seen.no_clients)),
        (About::Version, version()?),
    ];
    for (what, value) in facts {
        about.set(what as u32, value, 0).map_err(unavailable::damaged)?;
    }
    Ok(())
}

/// Pins all of it in the folder `to`, and hands the files to the user.
fn pin(to: &Path, loaded: Loaded, cgroup: &Path, user: u32) -> Result<(), Unavailable> {
    let Loaded { mut programs, descriptors, more_events, about, .. } = loaded;
    let mut files: Vec<(String, &OwnedFd)> = [
        ("records", &descriptors.records),
        ("totals", &descriptors.totals),
        ("watched", &descriptors.watched),
        ("routes", &descriptors.routes),
        ("senders", &descriptors.senders),
        ("targets", &descriptors.targets),
        (ABOUT, &about),
    ]
    .map(|(name, map)| (name.to_owned(), map))
    .into();
    files.extend(
        std::iter::once(&descriptors.events)
            .chain(&more_events)
            .enumerate()
            .map(|(at, ring)| (events(at), ring)),
    );
    for (name, map) in files {
        let path = to.join(name);
        data(map)?.pin(&path).map_err(|error| not_pinned(&path, &error))?;
        hand_over(&path, user, 0o600)?;
    }

    let path = to.join(HOOK);
    programs.pin_hook(&path)?;
    hand_over(&path, user, 0o600)?;
    programs.attach(cgroup)?;
    let path = to.join(LINK);
    let link =
        programs.take_link(cgroup).ok_or_else(|| Unavailable::Object("no link to the cgroup".into()))?;
    sys::pin(link.as_fd(), &path).map_err(|error| Unavailable::Pin(path.clone(), error))?;
    hand_over(&path, user, 0o600)?;
    programs.leave();

    let seats = to.join(SEATS_FOLDER);
    make(&seats, 0o711)?;
    for number in 0..SEATS {
        let path = seat::folder(&seats, number);
        make(&path, 0o700)?;
        hand_over(&path, user, 0o700)?;
    }
    Ok(())
}

/// The mode first: afterwards the file is another user's.
fn hand_over(path: &Path, user: u32, mode: u32) -> Result<(), Unavailable> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))
        .and_then(|()| chown(path, Some(user), None))
        .map_err(|error| Unavailable::Pin(path.into(), error))
}

fn make(path: &Path, mode: u32) -> Result<(), Unavailable> {
    let made =
        std::fs::create_dir(path).and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)));
    made.map_err(|error| Unavailable::Pin(path.into(), error))
}

/// A folder in which a set is made, beside the one that is in use. Its lock keeps a second loader out. What it holds is taken away
/// when it is dropped: an unfinished set, or the one that was replaced.
struct Draft {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Draft {
    fn begin(user: u32) -> Result<Self, Unavailable> {
        // A dot has no place in the name of a file here.
        let path = Path::new(ROOT).join(format!("{user}-new"));
        let failed = |error: io::Error| Unavailable::Pin(path.clone(), error);
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        let folder = File::open(&path).map_err(failed)?;
        let inode = folder.metadata().map_err(failed)?.ino();
        let lock =
            Flock::lock(folder, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                Errno::EWOULDBLOCK => failed(io::Error::other("another bro loader is at work for this user")),
                errno => failed(errno.into()),
            })?;
        if std::fs::metadata(&path).map_err(failed)?.ino() != inode {
            return Err(failed(io::Error::other("another bro loader has just been at work for this user")));
        }
        // One that was killed may have left something.
        empty(&path).map_err(failed)?;
        Ok(Self { path, _lock: lock })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// Puts it in the place of `set`; what was there is in its own place afterwards.
    fn publish(self, set: &Path) -> Result<(), Unavailable> {
        let here = nix::fcntl::AT_FDCWD;
        let exchanged = renameat2(here, &self.path, here, set, RenameFlags::RENAME_EXCHANGE);
        let published = match exchanged {
            Err(Errno::ENOENT) => std::fs::rename(&self.path, set),
            other => other.map_err(Into::into),
        };
        published.map_err(|error| Unavailable::Pin(set.into(), error))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        match clear(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "cannot remove {}", self.path.display());
            }
            _ => {}
        }
    }
}

/// Removes a set. The seats are the user's, and the user may have put something there. In a folder that is not its own, a loader
/// without CAP_DAC_OVERRIDE has no more rights than any process, so it takes each back first. From then on no process changes what
/// is in it.
fn clear(set: &Path) -> io::Result<()> {
    empty(set)?;
    std::fs::remove_dir(set)
}

fn empty(folder: &Path) -> io::Result<()> {
    lchown(folder, Some(0), None)?;
    std::fs::set_permissions(folder, Permissions::from_mode(0o711))?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { clear(&entry.path())? } else { std::fs::remove_file(entry.path())? }
    }
    Ok(())
}

/// Sees to the BPF file system: a system service has it from a unit (run-bro-bpf.mount); by hand it is mounted here.
fn mounted() -> Result<(), Unavailable> {
    let root = Path::new(ROOT);
    let parent = root.parent().unwrap_or(root);
    let failed = |path: &Path, error: io::Error| Unavailable::Pin(path.into(), error);
    std::fs::create_dir_all(root).map_err(|error| failed(root, error))?;
    // Another user that could write there could put a file system of its own in this one's place.
    let about = std::fs::symlink_metadata(parent).map_err(|error| failed(parent, error))?;
    if !about.is_dir() || about.uid() != 0 || about.mode() & 0o022 != 0 {
        return Err(failed(parent, io::Error::other("it must be a directory that only root can write to")));
    }
    if is_bpf(root).map_err(|error| failed(root, error))? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), root, Some("bpf"), flags, Some("mode=0711")).map_err(|errno| {
        failed(root, io::Error::other(format!("mounting a BPF file system there: {}", errno.desc())))
    })
}

fn is_bpf(path: &Path) -> io::Result<bool> {
    Ok(nix::sys::statfs::statfs(path)?.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}
