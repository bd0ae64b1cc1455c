//! The loaded programs and where they are attached: the half of the kernel relay that takes rights (CAP_BPF, CAP_NET_ADMIN,
//! CAP_PERFMON).

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{SchedClassifier, SockOps};
use nix::libc;

use super::handoff::{Bequest, Estate};
use super::maps::Share;
use super::seat::Seat;
use super::sys;
use super::trace::Tracer;
use super::unavailable::{self, Unavailable};

/// The loaded programs. Dropping them detaches them, if it was this process that loaded them.
pub struct Programs {
    links: HashMap<PathBuf, OwnedFd>,
    whose: ProgramsOwner,
    /// Why clients are not hooked.
    no_clients: Option<String>,
    /// What a successor will need, where this process has it to give.
    estate: Option<Estate>,
    /// Last, when no program has anything to say any more.
    _tracer: Option<Tracer>,
}

/// The process that loaded them.
enum ProgramsOwner {
    /// This process.
    Own(Box<Ebpf>),
    /// This one's predecessor.
    Predecessor,
    /// `bro loader`, which has attached them as well; what this process has is a seat.
    Loader(Seat),
}

impl std::fmt::Debug for Programs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Programs").field("cgroups", &self.links.keys()).finish_non_exhaustive()
    }
}

impl Programs {
    /// Programs that are attached nowhere yet.
    pub(super) fn new(ebpf: Ebpf, tracer: Option<Tracer>) -> Self {
        let whose = ProgramsOwner::Own(Box::new(ebpf));
        Self { links: HashMap::new(), whose, no_clients: None, estate: None, _tracer: tracer }
    }

    /// A predecessor's, with where it has attached them.
    pub(super) fn inherited(estate: Estate, links: impl IntoIterator<Item = (PathBuf, OwnedFd)>) -> Self {
        Self {
            links: links.into_iter().collect(),
            whose: ProgramsOwner::Predecessor,
            no_clients: estate.no_clients.clone(),
            estate: Some(estate),
            _tracer: None,
        }
    }

    /// Keeps what a successor will need.
    pub(super) fn keep(&mut self, estate: Estate) {
        self.estate = Some(estate);
    }

    /// What the self-test has seen, for the successor.
    pub(super) fn tested(&mut self, share: Share) {
        if let Some(estate) = &mut self.estate {
            estate.share = share;
            estate.no_clients.clone_from(&self.no_clients);
        }
    }

    /// What the successor gets, if there is something to get; `older`: predecessors of this process have connections yet.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn bequest(&self, older: bool) -> Result<Option<Bequest>, Unavailable> {
        self.estate.as_ref().map_or(Ok(None), |estate| estate.bequest(self.links.iter(), older))
    }

    /// Leaves them to the successor: they stay attached when this process ends.
    pub fn leave(self) {
        // Dropped, they would be taken off the senders' map. What is held here ends with this process.
        std::mem::forget(self);
    }

    /// The ones of `bro loader`; whether its self-test could hook a client.
    pub(super) fn seated(seat: Seat, clients: bool) -> Self {
        let no_clients = (!clients).then(|| "bro loader could not hook a client".to_owned());
        Self {
            links: HashMap::new(),
            whose: ProgramsOwner::Loader(seat),
            no_clients,
            estate: None,
            _tracer: None,
        }
    }

    /// What came of hooking a client in the self-test.
    pub(super) fn tested_with_clients(&mut self, outcome: Result<(), String>) {
        self.no_clients = outcome.err();
    }

    /// Whether clients can be hooked, as far as the self-test has seen.
    ///
    /// # Errors
    /// When they cannot.
    pub fn hook_clients(&self) -> Result<(), Unavailable> {
        self.no_clients.as_ref().map_or(Ok(()), |why| Err(Unavailable::SelfTest(why.clone())))
    }

    /// Whether they look at this cgroup.
    pub(super) fn is_attached(&self, cgroup: &Path) -> bool {
        self.links.contains_key(cgroup)
    }

    /// Looks at the TCP sockets that are made in this cgroup (a container's, or the clients') and below from now on. Once for
    /// each cgroup: a second time is nothing. A nested cgroup of an attached one needs no attachment, and having it is no harm.
    ///
    /// # Errors
    /// When the cgroup cannot be opened or the kernel refuses the link; of `bro loader`'s programs, when they do not look there.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), Unavailable> {
        if let ProgramsOwner::Loader(seat) = &self.whose {
            return seat.covers(cgroup);
        }
        if self.links.contains_key(cgroup) {
            return Ok(());
        }
        let folder =
            std::fs::File::open(cgroup).map_err(|error| Unavailable::Cgroup(cgroup.into(), error))?;
        let attached = sys::attach_to_cgroup(self.watch()?, folder.as_fd());
        let link = attached.map_err(|error| match error.raw_os_error() {
            Some(libc::E2BIG) => Unavailable::CgroupFull(cgroup.into()),
            Some(libc::EPERM) => Unavailable::CgroupExclusive(cgroup.into()),
            _ => Unavailable::Attach(cgroup.into(), error),
        })?;
        self.links.insert(cgroup.into(), link);
        Ok(())
    }

    /// The program to attach.
    fn watch(&self) -> Result<BorrowedFd<'_>, Unavailable> {
        let missing = || Unavailable::Object("no program bro_watch".into());
        match (&self.whose, &self.estate) {
            (_, Some(estate)) => Ok(estate.watch.as_fd()),
            (ProgramsOwner::Own(ebpf), None) => {
                let program: &SockOps =
                    ebpf.program("bro_watch").ok_or_else(missing)?.try_into().map_err(|_| missing())?;
                program.fd().map(|fd| fd.as_fd()).map_err(|_| missing())
            }
            _ => Err(missing()),
        }
    }

    /// The program to attach, to be kept.
    pub(super) fn watch_descriptor(&self) -> Result<OwnedFd, Unavailable> {
        self.watch()?.try_clone_to_owned().map_err(Unavailable::Mapping)
    }

    /// Pins the program that hooks a client.
    pub(super) fn pin_hook(&mut self, path: &Path) -> Result<(), Unavailable> {
        let ProgramsOwner::Own(ebpf) = &mut self.whose else {
            return Err(Unavailable::Object("not ours".into()));
        };
        let hook: Option<Result<&mut SchedClassifier, _>> =
            ebpf.program_mut("bro_hook").map(TryInto::try_into);
        let Some(Ok(hook)) = hook else { return Err(Unavailable::Object("no program bro_hook".into())) };
        hook.pin(path).map_err(|error| unavailable::not_pinned(path, &error))
    }

    /// Takes the link to a cgroup, for it to outlive this process.
    pub(super) fn take_link(&mut self, cgroup: &Path) -> Option<OwnedFd> {
        self.links.remove(cgroup)
    }

    /// Detaches from a cgroup (the container restarted in another one). Sockets hooked so far stay hooked until they close.
    pub fn detach(&mut self, cgroup: &Path) {
        self.links.remove(cgroup);
    }

    /// The kernel's numbers of the programs, as `bpftool prog show id` takes them: bro_send, bro_watch and bro_hook.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn ids(&self) -> std::io::Result<[u32; 3]> {
        let ProgramsOwner::Own(ebpf) = &self.whose else {
            return Err(std::io::ErrorKind::Unsupported.into());
        };
        let id = |name: &str| {
            let program = ebpf.program(name).ok_or(std::io::ErrorKind::NotFound)?;
            program.info().map(|info| info.id()).map_err(std::io::Error::other)
        };
        Ok([id("bro_send")?, id("bro_watch")?, id("bro_hook")?])
    }
}
