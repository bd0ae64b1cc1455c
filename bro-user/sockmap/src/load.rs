//! Loads the embedded programs: their offsets, the sizes of their maps, and every refusal with its reason.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use aya::maps::{Map, MapError, SockHash};
use aya::programs::{ProgramError, SchedClassifier, SkMsg, SockOps};
use aya::{Ebpf, EbpfError, EbpfLoader};
use bro_ebpf::{Owners, SEATS};
use nix::libc;

use super::Config;
use super::btf::Offsets;
use super::maps::{Descriptors, Share};
use super::programs::Programs;
use super::sys::OwnersValue;
use super::trace::{self, Tracer};
use super::unavailable::{Unavailable, chain, damaged, errno_within};

/// The programs as `cargo xtask build-ebpf` made them; aya wants them aligned.
static OBJECT: &[u8] = aya::include_bytes_aligned!("bro.bpf.o");

/// How many ports can be watched at once.
const MOST_WATCHED: u32 = 1024;

/// What the programs are loaded for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// The users that own the sockets to be hooked.
    pub owners: Owners,
    /// How many forwarders may use them at once.
    pub seats: usize,
    /// How many records each forwarder has.
    pub records: u32,
    /// The size of each one's ring buffer, in bytes.
    pub ring: u32,
    /// Whether sockets in blocking mode are hooked too.
    pub hook_blocking: bool,
    /// Whether they say what they do.
    pub trace: bool,
}

impl Shape {
    /// For a forwarder that loads for itself.
    pub(super) fn own(config: &Config) -> Self {
        let records = config.connections.max(1).saturating_mul(2).saturating_add(SELF_TEST_LANES);
        let Config { hook_blocking, trace, .. } = *config;
        let seats = super::handoff::seats(records) as usize;
        Self { owners: Owners::EVERYBODY, seats, records, ring: OWN_RING, hook_blocking, trace }
    }
}

/// Loaded programs, attached nowhere but to the senders' map, and every map that is used.
pub(super) struct Loaded {
    pub(super) programs: Programs,
    /// As the first seat uses them.
    pub(super) descriptors: Descriptors,
    pub(super) share: Share,
    /// The other seats' ring buffers.
    pub(super) more_events: Vec<OwnedFd>,
    /// What is written down about them.
    pub(super) about: OwnedFd,
}

/// Loads the programs and attaches `bro_send` to the senders' map.
pub(super) fn load(shape: &Shape) -> Result<Loaded, Unavailable> {
    // Asked first: the kernel's types are megabytes, and to read them for nothing was half of a user's wake.
    if !crate::capabilities::may_load_programs() {
        return Err(Unavailable::NotPermitted("make BPF maps", io::Error::from_raw_os_error(libc::EPERM)));
    }
    let btf = std::fs::read("/sys/kernel/btf/vmlinux").map_err(Unavailable::UnreadableBtf)?;
    let offsets = Offsets::find(&btf).map_err(Unavailable::NoBtf)?;
    let mut ebpf = open(shape, &offsets)?;

    let senders = SockHash::<_, u64>::try_from(take(&mut ebpf, "SENDERS")?).map_err(damaged)?;
    let send: &mut SkMsg = program(&mut ebpf, "bro_send")?;
    send.load().map_err(|error| refused("bro_send", error))?;
    send.attach(senders.fd()).map_err(|error| refused("bro_send", error))?;
    let watch: &mut SockOps = program(&mut ebpf, "bro_watch")?;
    watch.load().map_err(|error| refused("bro_watch", error))?;
    let hook: &mut SchedClassifier = program(&mut ebpf, "bro_hook")?;
    hook.load().map_err(|error| refused("bro_hook", error))?;
    let hook = own(hook.fd().map_err(|error| refused("bro_hook", error))?.as_fd())?;

    let descriptors = Descriptors {
        records: descriptor(&mut ebpf, "RECORDS")?,
        totals: descriptor(&mut ebpf, "TOTALS")?,
        watched: descriptor(&mut ebpf, "WATCHED")?,
        routes: descriptor(&mut ebpf, "ROUTES")?,
        senders: own(senders.fd().as_fd())?,
        targets: descriptor(&mut ebpf, "TARGETS")?,
        events: descriptor(&mut ebpf, RINGS[0])?,
        hook,
    };
    let more_events = RINGS[1..shape.seats].iter().map(|ring| descriptor(&mut ebpf, ring));
    let more_events = more_events.collect::<Result<_, _>>()?;
    let about = descriptor(&mut ebpf, "ABOUT")?;
    let tracer = shape.trace.then(|| Tracer::start(&mut ebpf)).transpose()?;
    // FIONREAD until the self-test has seen better.
    let share =
        Share { seat: 0, records: shape.records, hook_blocking: shape.hook_blocking, fionread_lies: true };
    Ok(Loaded { programs: Programs::new(ebpf, tracer), descriptors, share, more_events, about })
}

/// The seats' ring buffers, as the object calls them.
const RINGS: [&str; SEATS] = [
    "EVENTS_00",
    "EVENTS_01",
    "EVENTS_02",
    "EVENTS_03",
    "EVENTS_04",
    "EVENTS_05",
    "EVENTS_06",
    "EVENTS_07",
    "EVENTS_08",
    "EVENTS_09",
    "EVENTS_10",
    "EVENTS_11",
    "EVENTS_12",
    "EVENTS_13",
    "EVENTS_14",
    "EVENTS_15",
];

/// The ring buffer of a forwarder that loads for itself.
const OWN_RING: u32 = 64 * 1024;
/// A ring that is never read: the kernel's least is a page, and aya rounds up to it.
const NO_RING: u32 = 4096;

/// The self-test needs lanes even while all connections have theirs.
const SELF_TEST_LANES: u32 = 2;

fn open(shape: &Shape, offsets: &Offsets) -> Result<Ebpf, Unavailable> {
    let nonblock = libc::O_NONBLOCK as u32;
    let hook_blocking = u32::from(shape.hook_blocking);
    let seat_records = if shape.seats > 1 { shape.records } else { 0 };
    let lanes = shape.records.saturating_mul(u32::try_from(shape.seats).unwrap_or(u32::MAX));
    let globals = [
        ("WRITE_SEQ", &offsets.write_seq),
        ("COPIED_SEQ", &offsets.copied_seq),
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
        ("SK_UID", &offsets.sk_uid),
        ("SEAT_RECORDS", &seat_records),
    ];
    let (owners, level) = (OwnersValue(shape.owners), trace::level(shape.trace));
    let mut loader = EbpfLoader::new();
    loader.override_global("OWNERS", &owners, true);
    loader.override_global(trace::LEVEL, &level, true);
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
    for (seat, ring) in RINGS.into_iter().enumerate() {
        loader.map_max_entries(ring, if seat < shape.seats { shape.ring } else { NO_RING });
    }
    loader.map_max_entries(trace::LINES, if shape.trace { trace::RING } else { NO_RING });
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

pub(super) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, Unavailable>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or_else(|| Unavailable::Object(format!("no program {name}")))?;
    program.try_into().map_err(|error| Unavailable::Object(format!("{name}: {error}")))
}

pub(super) fn refused(name: &'static str, error: ProgramError) -> Unavailable {
    match error {
        ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EPERM) => {
            Unavailable::NotPermitted("load BPF programs", io_error)
        }
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            Unavailable::Verifier { name, verifier: format!("{io_error}: {}", verdict(&log)) }
        }
        other => Unavailable::Verifier { name, verifier: chain(&other) },
    }
}

/// The line of the verifier's log that says why: the last one but for its statistics.
fn verdict(log: &str) -> &str {
    let statistics = ["verification time", "stack depth", "processed "];
    let says = |line: &&str| !line.is_empty() && !statistics.iter().any(|begin| line.starts_with(begin));
    log.lines().map(str::trim).rev().find(says).unwrap_or("without a word")
}

#[cfg(test)]
mod tests {
    use super::verdict;

    #[test]
    fn the_verifiers_reason_is_told_from_its_statistics() {
        let log = "8: (85) call bpf_get_netns_cookie#122\nunknown func bpf_get_netns_cookie#122\n\
                   verification time 152 usec\nstack depth 0\nprocessed 9 insns (limit 1000000)\n\n";
        assert_eq!(verdict(log), "unknown func bpf_get_netns_cookie#122");
        assert_eq!(verdict(""), "without a word");
    }
}
