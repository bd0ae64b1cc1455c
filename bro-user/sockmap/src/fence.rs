//! The fence around sockets of the host's that a container is given: listeners that it adopts, and what it accepts at them.
//!
//! A container that is taken over can dissolve such a socket (connect(2) with AF_UNSPEC) and lead it anywhere in the host's network, which
//! is what `Network=none` is to prevent. Programs of the control group in which systemd made the listener forbid that ([`put_up`]). They
//! need no memory, no pins and no process: the kernel keeps them for as long as the group is there.
//!
//! systemd makes the listeners of a system unit in that unit's own group, so the unit puts its fence up itself, by `ExecStartPre=`, and does not listen if that
//! fails. A user's manager makes all listeners in its own group (`init.scope`), where root puts one up for the user.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::programs::CgroupSockAddr;
use aya::{Ebpf, EbpfLoader};

use super::load;
use super::sys;
use super::unavailable::{Unavailable, chain};

/// The programs as `cargo xtask build-ebpf` made them.
static OBJECT: &[u8] = aya::include_bytes_aligned!("fence.bpf.o");

/// A program by its name in the object, with the kernel's number of the place where it belongs (`enum bpf_attach_type`).
type Slot = (&'static str, u32);

const WALL: [Slot; 4] = [("bro_connect4", 10), ("bro_connect6", 11), ("bro_bind4", 8), ("bro_bind6", 9)];
const PEERS: [Slot; 2] = [("bro_getpeername4", 29), ("bro_getpeername6", 30)];
const PORTS: [Slot; 2] = [("bro_getsockname4", 31), ("bro_getsockname6", 32)];

/// What a service that accepts at the host's listener is told instead.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// By which addresses it sees a client of this host's loopback interface. `None`: as it is, so that the service takes it for one of its own host.
    pub this_host: Option<(Ipv4Addr, Ipv6Addr)>,
    /// External ports, each with the internal port in the place of which a service sees it (getsockname(2)). Some compare it with the one that they bound: Node's
    /// cluster module, dnsmasq.
    pub ports: Vec<(u16, u16)>,
}

/// Why there is no fence.
#[derive(Debug, thiserror::Error)]
pub enum Unfenced {
    /// The programs cannot be loaded.
    #[error(transparent)]
    Load(#[from] Unavailable),
    /// There is no such control group.
    #[error("the control group {} cannot be opened", .0.display())]
    Group(PathBuf, #[source] io::Error),
    /// E2BIG: there are 64 already. EPERM: one is there that allows no others.
    #[error("{program} cannot be attached to the control group {}", group.display())]
    Attach {
        /// The program.
        program: &'static str,
        /// The group.
        group: PathBuf,
        /// bpf(2)'s.
        #[source]
        source: io::Error,
    },
}

/// Puts the fence up around the sockets of a control group, those that are there as well. Takes CAP_BPF and CAP_NET_ADMIN; Linux 5.7, and 5.8
/// for what services are told. Done twice it is there twice, which the kernel bears up to 64 times.
///
/// # Errors
/// [`Unfenced`]; what was attached before the failure stays.
pub fn put_up(group: &Path, told: &Told) -> Result<(), Unfenced> {
    let failed = |error: io::Error| Unfenced::Group(group.into(), error);
    let folder = std::fs::File::open(group).map_err(failed)?;
    // A control group's number is its folder's.
    let home = folder.metadata().map_err(failed)?.ino();
    may_load()?;
    let (v4, v6) = told.this_host.unwrap_or((Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED));
    let peers = told.this_host.is_some().then_some(PEERS);
    let first = WALL.into_iter().chain(peers.into_iter().flatten()).collect::<Vec<_>>();
    let each_port = told.ports.iter().map(|ports| (*ports, PORTS.to_vec()));
    for ((external, internal), places) in std::iter::once(((0, 0), first)).chain(each_port) {
        let constants = Constants {
            home,
            this_host_v4: u32::from_ne_bytes(v4.octets()),
            this_host_v6: words(v6),
            external: external.to_be().into(),
            internal: internal.to_be().into(),
        };
        let mut programs = constants.open()?;
        for place in places {
            attach(&mut programs, place, folder.as_fd(), group)?;
        }
    }
    Ok(())
}

/// Whether this kernel takes the programs that [`put_up`] attaches without anything to tell services, from this process. Takes the same
/// capabilities. A control group may still refuse them.
///
/// # Errors
/// Why it does not.
pub fn check() -> Result<(), Unavailable> {
    may_load()?;
    let constants = Constants { home: 0, this_host_v4: 0, this_host_v6: [0; 4], external: 0, internal: 0 };
    let mut programs = constants.open()?;
    for (name, _) in WALL {
        load::program::<CgroupSockAddr>(&mut programs, name)?
            .load()
            .map_err(|error| load::refused(name, error))?;
    }
    Ok(())
}

/// Whether a fence, or what takes its place, stands around the sockets of a control group: programs are attached to it for each of the four calls.
/// Takes CAP_NET_ADMIN or CAP_BPF, by the kernel's version.
///
/// # Errors
/// bpf(2)'s, and those of opening the group.
pub fn stands(group: &Path) -> io::Result<bool> {
    let folder = std::fs::File::open(group)?;
    for (_, place) in WALL {
        if sys::attached(folder.as_fd(), place)? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

fn may_load() -> Result<(), Unavailable> {
    if crate::capabilities::may_load_programs() {
        return Ok(());
    }
    let error = io::Error::from_raw_os_error(nix::libc::EPERM);
    Err(Unavailable::NotPermitted("load BPF programs", error))
}

fn words(address: Ipv6Addr) -> [u32; 4] {
    let octets = address.octets();
    let word = |at: usize| u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

/// Of the programs.
struct Constants {
    home: u64,
    this_host_v4: u32,
    this_host_v6: [u32; 4],
    external: u32,
    internal: u32,
}

impl Constants {
    fn open(&self) -> Result<Ebpf, Unavailable> {
        EbpfLoader::new()
            .override_global("HOME", &self.home, true)
            .override_global("THIS_HOST_V4", &self.this_host_v4, true)
            .override_global("THIS_HOST_V6", &self.this_host_v6, true)
            .override_global("EXTERNAL", &self.external, true)
            .override_global("INTERNAL", &self.internal, true)
            .load(OBJECT)
            .map_err(|error| Unavailable::Object(chain(&error)))
    }
}

fn attach(
    programs: &mut Ebpf,
    (name, place): Slot,
    folder: BorrowedFd<'_>,
    group: &Path,
) -> Result<(), Unfenced> {
    let program: &mut CgroupSockAddr = load::program(programs, name)?;
    program.load().map_err(|error| load::refused(name, error))?;
    let descriptor = program.fd().map_err(|error| load::refused(name, error))?;
    sys::leave_attached(descriptor.as_fd(), folder, place).map_err(|source| Unfenced::Attach {
        program: name,
        group: group.into(),
        source,
    })
}
