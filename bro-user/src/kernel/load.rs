//! Loads the embedded programs: their offsets, the sizes of their maps, and every refusal with its reason.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use aya::maps::{Map, MapError, SockHash};
use aya::programs::{ProgramError, SkMsg, SockOps};
use aya::{Ebpf, EbpfError, EbpfLoader};
use nix::libc;

use super::Config;
use super::maps::{Descriptors, Share};
use super::offsets::Offsets;
use super::programs::Programs;
use super::unavailable::Unavailable;

/// The programs as `cargo xtask build-ebpf` made them; aya wants them aligned.
static OBJECT: &[u8] = aya::include_bytes_aligned!("bro.bpf.o");

/// How many ports can be watched at once.
const MOST_WATCHED: u32 = 1024;

/// Loads the programs and attaches `bro_send` to the senders' map.
pub(super) fn load(config: &Config) -> Result<(Programs, Descriptors, Share), Unavailable> {
    let btf = std::fs::read("/sys/kernel/btf/vmlinux").map_err(Unavailable::UnreadableBtf)?;
    let offsets = Offsets::find(&btf).map_err(Unavailable::NoBtf)?;
    let lanes = config.connections.max(1).saturating_mul(2).saturating_add(SELF_TEST_LANES);
    let mut ebpf = open(config, &offsets, lanes)?;

    let senders = SockHash::<_, u64>::try_from(take(&mut ebpf, "SENDERS")?).map_err(damaged)?;
    let send: &mut SkMsg = program(&mut ebpf, "bro_send")?;
    send.load().map_err(|error| refused("bro_send", error))?;
    send.attach(senders.fd()).map_err(|error| refused("bro_send", error))?;
    let watch: &mut SockOps = program(&mut ebpf, "bro_watch")?;
    watch.load().map_err(|error| refused("bro_watch", error))?;

    let descriptors = Descriptors {
        records: descriptor(&mut ebpf, "RECORDS")?,
        totals: descriptor(&mut ebpf, "TOTALS")?,
        watched: descriptor(&mut ebpf, "WATCHED")?,
        routes: descriptor(&mut ebpf, "ROUTES")?,
        senders: own(senders.fd().as_fd())?,
        targets: descriptor(&mut ebpf, "TARGETS")?,
        events: descriptor(&mut ebpf, "EVENTS")?,
    };
    // Until the self-test has seen better.
    let share = Share { records: lanes, hook_blocking: config.hook_blocking, fionread_lies: true };
    Ok((Programs::new(ebpf), descriptors, share))
}

/// The self-test needs lanes even while all connections have theirs.
const SELF_TEST_LANES: u32 = 2;

fn open(config: &Config, offsets: &Offsets, lanes: u32) -> Result<Ebpf, Unavailable> {
    let nonblock = libc::O_NONBLOCK as u32;
    let hook_blocking = u32::from(config.hook_blocking);
    let globals = [
        ("WRITE_SEQ", &offsets.write_seq),
        ("ULP_OPS", &offsets.ulp_ops),
        ("SK_SOCKET", &offsets.sk_socket),
        ("SOCKET_FILE", &offsets.socket_file),
        ("FILE_FLAGS", &offsets.file_flags),
        ("SK_FLAGS", &offsets.sk_flags),
        ("ZEROCOPY_BIT", &offsets.zerocopy_bit),
        ("SK_PROT", &offsets.sk_prot),
        ("MEMORY_PRESSURE", &offsets.memory_pressure),
        ("NONBLOCK", &nonblock),
        ("HOOK_BLOCKING", &hook_blocking),
    ];
    let mut loader = EbpfLoader::new();
    for (name, value) in globals {
        loader.override_global(name, value, true);
    }
    // Twice as many senders as lanes: connections to the service that do not come through the forwarder are hooked as well.
    for (map, entries) in
        [("RECORDS", lanes), ("ROUTES", lanes), ("TARGETS", lanes), ("SENDERS", lanes.saturating_mul(2))]
    {
        loader.map_max_entries(map, entries);
    }
    loader.map_max_entries("WATCHED", MOST_WATCHED);
    loader.load(OBJECT).map_err(|error| match error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => match io_error.raw_os_error() {
            Some(libc::EPERM) => Unavailable::NotPermitted("make BPF maps", io_error),
            _ => Unavailable::Map { name, source: io_error },
        },
        other => match errno_within(&other) {
            Some(libc::EPERM) => {
                Unavailable::NotPermitted("use bpf(2)", io::Error::from_raw_os_error(libc::EPERM))
            }
            _ => Unavailable::Object(chain(&other)),
        },
    })
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, Unavailable> {
    ebpf.take_map(name).ok_or_else(|| Unavailable::Object(format!("no map {name}")))
}

/// A map's descriptor, to keep or to send.
fn descriptor(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, Unavailable> {
    match &take(ebpf, name)? {
        Map::Array(data) | Map::HashMap(data) | Map::SockHash(data) | Map::RingBuf(data) => {
            own(data.fd().as_fd())
        }
        _ => Err(Unavailable::Object(format!("the map {name} is of another type"))),
    }
}

fn own(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, Unavailable> {
    descriptor.try_clone_to_owned().map_err(Unavailable::Mapping)
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, Unavailable>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or_else(|| Unavailable::Object(format!("no program {name}")))?;
    program.try_into().map_err(|error| Unavailable::Object(format!("{name}: {error}")))
}

pub(super) fn damaged(error: MapError) -> Unavailable {
    Unavailable::Object(chain(&error))
}

fn refused(name: &'static str, error: ProgramError) -> Unavailable {
    match error {
        ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EPERM) => {
            Unavailable::NotPermitted("load BPF programs", io_error)
        }
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().rev().filter(|line| !line.is_empty()).take(4).collect();
            let said: Vec<&str> = lines.into_iter().rev().collect();
            Unavailable::Verifier { name, verifier: format!("{io_error}: {}", said.join("; ")) }
        }
        other => Unavailable::Verifier { name, verifier: chain(&other) },
    }
}

/// The first error number in an error's chain of causes.
pub(super) fn errno_within(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// An error with its causes, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        line = format!("{line}: {error}");
        next = error.source();
    }
    line
}
