//! The loaded programs and where they are attached: the half of the kernel relay that takes rights (CAP_BPF, CAP_NET_ADMIN,
//! CAP_PERFMON).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::sock_ops::SockOpsLink;
use aya::programs::{CgroupAttachMode, SchedClassifier, SockOps};
use nix::libc;

use super::load;
use super::seat::Seat;
use super::trace::Tracer;
use super::unavailable::Unavailable;

/// The loaded programs. Dropping them detaches them, if it was this process that loaded them.
pub struct Programs {
    links: HashMap<PathBuf, SockOpsLink>,
    whose: Whose,
    /// Why clients are not hooked.
    no_clients: Option<String>,
    /// Last, when nobody has anything to say any more.
    _tracer: Option<Tracer>,
}

/// Who loaded them.
enum Whose {
    /// This process.
    Own(Box<Ebpf>),
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
        let whose = Whose::Own(Box::new(ebpf));
        Self { links: HashMap::new(), whose, no_clients: None, _tracer: tracer }
    }

    /// Those of `bro loader`; whether its self-test could hook a client.
    pub(super) fn seated(seat: Seat, clients: bool) -> Self {
        let no_clients = (!clients).then(|| "bro loader could not hook a client".to_owned());
        Self { links: HashMap::new(), whose: Whose::Loader(seat), no_clients, _tracer: None }
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
        let ebpf = match &mut self.whose {
            Whose::Own(ebpf) => ebpf,
            Whose::Loader(seat) => return seat.covers(cgroup),
        };
        if self.links.contains_key(cgroup) {
            return Ok(());
        }
        let folder =
            std::fs::File::open(cgroup).map_err(|error| Unavailable::Cgroup(cgroup.into(), error))?;
        let program: &mut SockOps = match ebpf.program_mut("bro_watch").map(TryInto::try_into) {
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

    /// Pins the program that hooks a client.
    pub(super) fn pin_hook(&mut self, path: &Path) -> Result<(), Unavailable> {
        let Whose::Own(ebpf) = &mut self.whose else { return Err(Unavailable::Object("not ours".into())) };
        let hook: Option<Result<&mut SchedClassifier, _>> =
            ebpf.program_mut("bro_hook").map(TryInto::try_into);
        let Some(Ok(hook)) = hook else { return Err(Unavailable::Object("no program bro_hook".into())) };
        hook.pin(path).map_err(|error| load::not_pinned(path, &error))
    }

    /// Takes the link to a cgroup, for it to outlive this process.
    pub(super) fn take_link(&mut self, cgroup: &Path) -> Option<SockOpsLink> {
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
        let Whose::Own(ebpf) = &self.whose else { return Err(std::io::ErrorKind::Unsupported.into()) };
        let id = |name: &str| {
            let program = ebpf.program(name).ok_or(std::io::ErrorKind::NotFound)?;
            program.info().map(|info| info.id()).map_err(std::io::Error::other)
        };
        Ok([id("bro_send")?, id("bro_watch")?, id("bro_hook")?])
    }
}
