//! The kernel relay from user space: load the programs, attach them, open lanes, hear events; available, or unavailable and
//! why. What the programs decide is in the library of `bro-ebpf`.
//!
//! It has two halves, which may be in different processes: [`Programs`], which take rights to load and attach, and [`Maps`],
//! which take none to use. A forwarder that may load does so for itself ([`Programs`]), and nothing of that is pinned: when the
//! last process that holds them ends, however it ends, the kernel closes the links, maps and programs, and every socket goes back
//! to ordinary TCP. For one that may not, `bro loader` has done it ([`pin`], [`pinned`]).

pub mod btf;
pub mod capabilities;
pub mod fence;
mod handoff;
mod lane;
mod load;
mod maps;
mod other_users;
pub mod pin;
pub mod pinned;
mod programs;
mod seat;
mod selftest;
mod sys;
mod trace;
mod unavailable;

pub use sys::try_bpf;

use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;
use std::path::Path;

use bro_ebpf::kind;
use handoff::Estate;

pub use bro_ebpf::{Event, Flow, HookRequest, Reason};
pub use btf::BtfError;
pub use handoff::Bequest;
pub use lane::{Granted, Lane, LaneCounters, LaneId, SenderAddress};
pub use maps::{Descriptors, Maps, Share};
pub use other_users::{Foreign, ForeignNews};
pub use programs::Programs;
pub use sys::{SendMemory, Sent, fionread, netns_cookie, send_memory, sent};
pub use trace::wanted as trace_wanted;
pub use unavailable::{LaneRefused, Unavailable};

/// What made the embedded programs: for `bro --version` and `bro doctor`.
pub const OBJECT: &str = include_str!("bro.bpf.txt");

/// The unit that has the kernel relay loaded for a user at each boot.
pub const LOADER_UNIT: &str = "bro-loader@.service";

/// Is [`LOADER_UNIT`] here? The packages bring it, and `cargo install` does not.
#[must_use]
pub fn loader_unit_is_installed() -> bool {
    const WHERE: [&str; 5] = [
        "/etc/systemd/system",
        "/run/systemd/system",
        "/usr/local/lib/systemd/system",
        "/usr/lib/systemd/system",
        "/lib/systemd/system",
    ];
    WHERE.iter().any(|directory| Path::new(directory).join(LOADER_UNIT).exists())
}

/// How long a request to hook a sender is ([`HookRequest::packet`]).
pub const HOOK_REQUEST: usize = bro_ebpf::REQUEST_OFFSET + size_of::<HookRequest>();

/// Asks the program for it to put a sender of this thread's network namespace into the senders' map. That it is gone meanwhile, or
/// blocks by now, is no error.
///
/// # Errors
/// When the program cannot be run.
pub fn hook(program: BorrowedFd<'_>, request: &[u8; HOOK_REQUEST]) -> std::io::Result<()> {
    sys::run(program, request).map(drop)
}

/// How to load.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// How many connections at once may have lanes (two each).
    pub connections: u32,
    /// Hook sockets in blocking mode too, although their owners may then see an error they would not see on plain TCP.
    pub hook_blocking: bool,
    /// Take it even where hooked sockets answer FIONREAD wrongly ([`Unavailable::FionreadLies`]).
    pub bear_fionread: bool,
    /// Have the programs say what becomes of single sockets, in this process's log.
    pub trace: bool,
}

/// Which end of a connection at a watched port is the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SenderRole {
    /// The end that accepts: the service lane.
    Service,
    /// The end that connects from this host: the client lane.
    Client,
}

/// What kind of sockets a watched service uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SenderKind {
    /// Not known yet.
    Unknown,
    /// Non-blocking ones, as far as was seen.
    Fit,
    /// Blocking ones: spliced.
    Blocking,
    /// Ones that ask for MSG_ZEROCOPY completions: spliced.
    Zerocopy,
}

impl SenderKind {
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
    /// Senders let go at their half-close or close, if they were hooked then.
    pub unhooked: u64,
    /// Sockets left alone because they are in blocking mode.
    pub blocking: u64,
    /// Sockets left alone because they ask for MSG_ZEROCOPY.
    pub zerocopy: u64,
    /// Sockets left alone because they sent data in their SYN.
    pub fast_open: u64,
    /// Sockets noted because they may come to be hooked.
    pub watched: u64,
    /// Events that did not fit the ring buffer.
    pub events_lost: u64,
    /// Sockets left alone because they belong to another user than the one for which the programs were loaded.
    pub foreign: u64,
    /// Lanes open now.
    pub open_lanes: usize,
    /// What the closed lanes did.
    pub closed_lanes: LaneCounters,
}

/// The loaded kernel relay, both halves in one process. Dropping it detaches everything; lanes that are still open keep their
/// maps, but no program.
#[derive(Debug)]
pub struct Kernel {
    // The links go first, so that no socket is hooked while the rest is taken apart.
    /// What took rights to load.
    pub programs: Programs,
    /// What connections use.
    pub maps: Maps,
    descriptors: Descriptors,
}

impl Kernel {
    /// Loads the programs into the kernel. Takes some tens of milliseconds (reading BTF, the verifier); nothing is attached
    /// yet. May be done on another thread: a `Kernel` can be sent.
    ///
    /// # Errors
    /// When this kernel, or this process's rights, do not allow it.
    pub fn load(config: &Config) -> Result<Self, Unavailable> {
        let shape = load::Shape::own(config);
        let loaded = match load::load(&shape) {
            // A relay that is not traced is better than none.
            Err(Unavailable::Verifier { name, verifier }) if shape.trace => {
                tracing::warn!("the kernel relay is not traced, this kernel refuses {name} then: {verifier}");
                load::load(&load::Shape { trace: false, ..shape })
            }
            loaded => loaded,
        };
        Self::of(loaded?)
    }

    fn of(loaded: load::Loaded) -> Result<Self, Unavailable> {
        let load::Loaded { mut programs, descriptors, share, more_events, .. } = loaded;
        let own = descriptors.events.try_clone().map_err(Unavailable::Mapping)?;
        let rings = std::iter::once(own).chain(more_events).collect();
        let watch = programs.watch_descriptor()?;
        let all = descriptors.try_clone().map_err(Unavailable::Mapping)?;
        programs.keep(Estate { descriptors: all, rings, watch, share, older: Vec::new(), no_clients: None });
        Ok(Self { programs, maps: Maps::new(&descriptors, share)?, descriptors })
    }

    /// The kernel relay, from where there is one: `bro loader` for this user, else a predecessor, else loaded and tested here.
    ///
    /// # Errors
    /// When there is none, or only one that a service could notice ([`Config::bear_fionread`]).
    pub fn obtain(config: &Config, bequest: Option<Bequest>) -> Result<Self, Unavailable> {
        let kernel = Self::from_where_it_is(config, bequest)?;
        if kernel.fionread_lies() && !config.bear_fionread {
            return Err(Unavailable::FionreadLies);
        }
        Ok(kernel)
    }

    fn from_where_it_is(config: &Config, bequest: Option<Bequest>) -> Result<Self, Unavailable> {
        let pinned = if config.hook_blocking {
            // The loader's programs are for non-blocking sockets.
            Ok(None)
        } else {
            pinned::open(&pinned::folder(nix::unistd::geteuid().as_raw()))
        };
        if !matches!(pinned, Ok(Some(_)))
            && let Some(bequest) = bequest
        {
            match Self::inherited(bequest, config) {
                Ok(Some(kernel)) => return Ok(kernel),
                Ok(None) => {
                    tracing::info!("the predecessor's kernel relay is another version's, and is not used")
                }
                Err(reason) => tracing::warn!("the predecessor's kernel relay cannot be used: {reason}"),
            }
        }
        match pinned {
            Ok(Some(pinned)) => {
                if config.trace {
                    tracing::info!(
                        "bro loader's programs are not traced; those that a forwarder loads for itself can be"
                    );
                }
                Self::pinned(pinned)
            }
            Ok(None) => Self::load(config).and_then(Self::tested),
            Err(reason) => match Self::load(config).and_then(Self::tested) {
                Err(Unavailable::NotPermitted(..)) => Err(reason),
                loaded => {
                    tracing::info!("not through bro loader: {reason} ({})", reason.mend());
                    loaded
                }
            },
        }
    }

    fn pinned(pinned: pinned::Pinned) -> Result<Self, Unavailable> {
        let pinned::Pinned { descriptors, share, seat, clients } = pinned;
        let mut maps = Maps::new(&descriptors, share)?;
        // Events that an earlier holder of the seat has not read.
        maps.drain_events(|_| {});
        tracing::info!("the kernel relay is bro loader's (seat {} of {})", share.seat + 1, bro_ebpf::SEATS);
        Ok(Self { programs: Programs::seated(seat, clients), maps, descriptors })
    }

    /// The relay of this process's predecessor, which has tested it; `None` if it is another version's.
    fn inherited(bequest: Bequest, config: &Config) -> Result<Option<Self>, Unavailable> {
        let Some((estate, links)) = bequest.open() else { return Ok(None) };
        if estate.share.hook_blocking != config.hook_blocking {
            return Ok(None);
        }
        let descriptors = estate.descriptors.try_clone().map_err(Unavailable::Mapping)?;
        let share = estate.share;
        seat::tidy(&descriptors, &share, |seat| !estate.older.contains(&seat))?;
        let mut maps = Maps::new(&descriptors, share)?;
        maps.drain_events(|_| {});
        if config.trace {
            tracing::info!(
                "what the predecessor's programs do is told by the predecessor, as long as it is there"
            );
        }
        tracing::info!(
            "the kernel relay is the predecessor's (seat {} of {})",
            share.seat + 1,
            estate.rings.len()
        );
        Ok(Some(Self { programs: Programs::inherited(estate, links), maps, descriptors }))
    }

    fn tested(mut self) -> Result<Self, Unavailable> {
        self.selftest()?;
        self.programs.tested(self.maps.share);
        Ok(self)
    }

    /// The programs, and what another process needs to use their maps in this one's place.
    #[must_use]
    pub fn into_parts(self) -> (Programs, Descriptors, Share) {
        (self.programs, self.descriptors, self.maps.share)
    }

    /// As [`Programs::attach`].
    ///
    /// # Errors
    /// As there.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), Unavailable> {
        self.programs.attach(cgroup)
    }

    /// As [`Programs::detach`].
    pub fn detach(&mut self, cgroup: &Path) {
        self.programs.detach(cgroup);
    }

    /// As [`Programs::ids`].
    ///
    /// # Errors
    /// As there.
    pub fn program_ids(&self) -> std::io::Result<[u32; 3]> {
        self.programs.ids()
    }

    /// Sends real bytes through the real programs, over loopback connections of this process, with a half-close and a full
    /// send buffer, and has a client hooked. Attaches to this process's own cgroup for that time. Takes a few milliseconds; bounded
    /// by 10 s.
    ///
    /// That no client can be hooked takes the lanes of local clients away and nothing else ([`Programs::hook_clients`]).
    ///
    /// # Errors
    /// When anything is not as the relay needs it.
    pub fn selftest(&mut self) -> Result<(), Unavailable> {
        let clients = selftest::run(self).map_err(Unavailable::SelfTest)?;
        self.programs.tested_with_clients(clients);
        Ok(())
    }
}

impl Deref for Kernel {
    type Target = Maps;

    fn deref(&self) -> &Maps {
        &self.maps
    }
}

impl DerefMut for Kernel {
    fn deref_mut(&mut self) -> &mut Maps {
        &mut self.maps
    }
}
