//! The kernel relay from user space: load the programs, attach them, open lanes, hear events; available, or unavailable and
//! why. What the programs decide is in the library of `bro-ebpf`.
//!
//! Nothing here is pinned: when the process ends, however it ends, the kernel closes the links, maps and programs, and
//! every socket goes back to ordinary TCP.

pub mod cgroup;
mod lane;
mod load;
pub(crate) mod offsets;
mod selftest;
mod sys;
mod unavailable;

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use aya::Ebpf;
use aya::maps::{MapData, RingBuf, SockHash};
use aya::programs::sock_ops::SockOpsLink;
use aya::programs::{CgroupAttachMode, SockOps};
use bro_ebpf::{Counter, Watch, WatchKey, kind, role};
use nix::libc;

pub use bro_ebpf::{Event, Reason};
pub use lane::{Granted, Lane, LaneCounters, LaneId, SenderAddress};
pub use offsets::BtfError;
pub use sys::{SendMemory, netns_cookie, send_memory};
pub use unavailable::{Refused, Unavailable};

use sys::{PortKey, WatchValue};

/// What made the embedded programs: for `bro --version` and `bro doctor`.
pub const OBJECT: &str = include_str!("kernel/bro.bpf.txt");

/// How to load.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// How many connections at once may have lanes (two each).
    pub connections: u32,
    /// Hook sockets in blocking mode too, whose owners may then see an error they would not see on plain TCP.
    pub hook_blocking: bool,
}

/// Which end of a connection at a watched port is the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The end that accepts: the service lane.
    Service,
    /// The end that connects from this host: the client lane.
    Client,
}

/// What kind of sockets a watched service uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Not known yet: its next connection is watched, and spliced.
    Unknown,
    /// Non-blocking ones: its connections get the service lane.
    Fit,
    /// Blocking ones: spliced.
    Blocking,
    /// Ones that ask for MSG_ZEROCOPY completions: spliced.
    Zerocopy,
}

impl Kind {
    /// The kind that [`Event::Learned`] names.
    #[must_use]
    pub fn of(number: u32) -> Self {
        match number {
            kind::FIT => Self::Fit,
            kind::BLOCKING => Self::Blocking,
            kind::ZEROCOPY => Self::Zerocopy,
            _ => Self::Unknown,
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Unknown => kind::UNKNOWN,
            Self::Fit => kind::FIT,
            Self::Blocking => kind::BLOCKING,
            Self::Zerocopy => kind::ZEROCOPY,
        }
    }
}

/// What the programs did in all, since they were loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Senders put into the senders' map.
    pub hooked: u64,
    /// Senders the kernel refused there.
    pub hook_refused: u64,
    /// Senders let go at their half-close or close.
    pub unhooked: u64,
    /// Sockets left alone because they are in blocking mode.
    pub blocking: u64,
    /// Sockets left alone because they ask for MSG_ZEROCOPY.
    pub zerocopy: u64,
    /// Sockets left alone because they sent data in their SYN.
    pub fast_open: u64,
    /// First connections that were watched to learn the service's kind.
    pub watched: u64,
    /// Events that did not fit the ring buffer.
    pub events_lost: u64,
    /// Lanes open now.
    pub open_lanes: usize,
    /// What the lanes did that are closed by now.
    pub closed_lanes: LaneCounters,
}

/// The loaded kernel relay. Dropping it detaches everything; lanes that are still open keep their maps, but no program.
pub struct Kernel {
    // The links go first, so that no socket is hooked while the rest is taken apart.
    links: HashMap<PathBuf, SockOpsLink>,
    watched: aya::maps::HashMap<MapData, PortKey, WatchValue>,
    senders: SockHash<MapData, u64>,
    events: RingBuf<MapData>,
    totals: sys::Mapping<std::sync::atomic::AtomicU64>,
    lanes: Arc<lane::Lanes>,
    ebpf: Ebpf,
    fionread_lies: bool,
    hook_blocking: bool,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("cgroups", &self.links.keys()).finish_non_exhaustive()
    }
}

impl Kernel {
    /// Loads the programs into the kernel. Takes some tens of milliseconds (reading BTF, the verifier); nothing is attached
    /// yet. May be done on another thread: a `Kernel` can be sent.
    ///
    /// # Errors
    /// When this kernel, or this process's rights, do not allow it.
    pub fn load(config: &Config) -> Result<Self, Unavailable> {
        let loaded = load::load(config)?;
        Ok(Self {
            links: HashMap::new(),
            watched: loaded.watched,
            senders: loaded.senders,
            events: loaded.events,
            totals: loaded.totals,
            lanes: Arc::new(loaded.lanes),
            ebpf: loaded.ebpf,
            // Until the self-test has seen better.
            fionread_lies: true,
            hook_blocking: config.hook_blocking,
        })
    }

    /// Looks at the TCP sockets that are made in this cgroup (a container's, or the clients') and below from now on. Once for
    /// each cgroup: a second time is nothing. A nested cgroup of an attached one needs no attachment, and having it is no harm.
    ///
    /// # Errors
    /// When the cgroup cannot be opened or the kernel refuses the link.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), Unavailable> {
        if self.links.contains_key(cgroup) {
            return Ok(());
        }
        let folder =
            std::fs::File::open(cgroup).map_err(|error| Unavailable::Cgroup(cgroup.into(), error))?;
        let program: &mut SockOps = match self.ebpf.program_mut("bro_watch").map(TryInto::try_into) {
            Some(Ok(program)) => program,
            _ => return Err(Unavailable::Object("no program bro_watch".into())),
        };
        // A bpf_link stands beside others' programs by nature; the kernel refuses it the flag that says so.
        let attached = program.attach(&folder, CgroupAttachMode::Single).and_then(|id| program.take_link(id));
        let link = attached.map_err(|error| match load::errno_within(&error) {
            Some(libc::E2BIG) => Unavailable::CgroupFull(cgroup.into()),
            Some(libc::EPERM) => Unavailable::CgroupExclusive(cgroup.into()),
            Some(number) => Unavailable::Attach(cgroup.into(), std::io::Error::from_raw_os_error(number)),
            None => Unavailable::Attach(cgroup.into(), std::io::Error::other(error.to_string())),
        })?;
        self.links.insert(cgroup.into(), link);
        Ok(())
    }

    /// Detaches from a cgroup (the container restarted in another one). Sockets hooked so far stay hooked until they close.
    pub fn detach(&mut self, cgroup: &Path) {
        self.links.remove(cgroup);
    }

    /// Watches a port of a network namespace: connections accepted there (service) or made towards it by local clients
    /// (client). A port watched before keeps the kind that was learned.
    ///
    /// # Errors
    /// When the kernel refuses (1,024 ports can be watched).
    pub fn watch(&mut self, netns: u64, port: u16, as_: Role) -> std::io::Result<()> {
        let role = match as_ {
            Role::Service => role::SERVICE,
            Role::Client => role::CLIENT,
        };
        let key = key(netns, port);
        if self.watched.get(&key, 0).is_ok_and(|found| found.0.role == role) {
            return Ok(());
        }
        let value = WatchValue(Watch { role, kind: kind::UNKNOWN });
        self.watched.insert(key, value, 0).map_err(lane::errno)
    }

    /// Watches a port no longer.
    pub fn unwatch(&mut self, netns: u64, port: u16) {
        let _absent = self.watched.remove(&key(netns, port));
    }

    /// What is known of the service at a watched port; `None` when it is not watched.
    #[must_use]
    pub fn kind(&self, netns: u64, port: u16) -> Option<Kind> {
        self.watched.get(&key(netns, port), 0).ok().map(|found| Kind::of(found.0.kind))
    }

    /// Sets what is known of the service at a watched port; `Unknown` forgets it, for a container that restarted in the same
    /// network namespace.
    ///
    /// # Errors
    /// When the port is not watched.
    pub fn set_kind(&mut self, netns: u64, port: u16, kind: Kind) -> std::io::Result<()> {
        const EXIST: u64 = 2;
        let key = key(netns, port);
        let mut value = self.watched.get(&key, 0).map_err(lane::errno)?;
        value.0.kind = kind.number();
        self.watched.insert(key, value, EXIST).map_err(lane::errno)
    }

    /// Opens a lane from `sender` into `target`'s transmit queue. `forwarded` is what the forwarder has already written to
    /// `target` of the sender's bytes; bytes of its own that it put before them (a proxy header) do not count, and must be
    /// written before this. May be called right after connect, before or after the sender was hooked. Messages of more than
    /// `largest` bytes do not take the lane.
    ///
    /// # Errors
    /// When there is no lane for this connection: relay it by splice.
    pub fn open_lane(
        &self,
        sender: &SenderAddress,
        target: BorrowedFd<'_>,
        forwarded: u64,
        largest: Option<u32>,
    ) -> Result<Lane, Refused> {
        self.lanes.open(sender, target, forwarded, largest.map_or(u64::MAX, u64::from))
    }

    /// Takes a sender, by its socket cookie, out of the senders' map for good: from now on it is ordinary TCP's.
    pub fn release(&mut self, cookie: u64) {
        let _gone_meanwhile = self.senders.remove(&cookie);
    }

    /// Does this kernel say 0 when a hooked socket's owner asks how much waits to be read (FIONREAD)? Seen by the self-test.
    /// A program that asks may then wait for bytes that are there: nginx does when a request fills its buffer.
    #[must_use]
    pub const fn fionread_lies(&self) -> bool {
        self.fionread_lies
    }

    /// Polls readable (level-triggered) while there are events.
    #[must_use]
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
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
            open_lanes,
            closed_lanes,
        }
    }

    /// The kernel's numbers of the two programs, as `bpftool prog show id` takes them: bro_send and bro_watch.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn program_ids(&self) -> std::io::Result<[u32; 2]> {
        let id = |name: &str| {
            let program = self.ebpf.program(name).ok_or(std::io::ErrorKind::NotFound)?;
            program.info().map(|info| info.id()).map_err(std::io::Error::other)
        };
        Ok([id("bro_send")?, id("bro_watch")?])
    }

    /// How many sockets are in the senders' map right now (walks it: for tests and `bro doctor`).
    #[must_use]
    pub fn hooked_now(&self) -> usize {
        self.senders.keys().filter(Result::is_ok).count()
    }

    /// Sends real bytes through the real programs, over loopback connections of this process, with a half-close and a full
    /// send buffer. Attaches to this process's own cgroup for that time. Takes a few milliseconds; bounded by 10 s.
    ///
    /// # Errors
    /// When anything is not as the relay needs it.
    pub fn selftest(&mut self) -> Result<(), Unavailable> {
        selftest::run(self).map_err(Unavailable::SelfTest)
    }
}

fn key(netns: u64, port: u16) -> PortKey {
    PortKey(WatchKey { netns, port: port.into(), zero: 0 })
}
