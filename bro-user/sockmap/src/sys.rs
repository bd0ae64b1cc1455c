//! The kernel relay's unsafe code: memory shared with the programs, socket options that no library wraps, and the types
//! that go through bpf(2) as plain bytes.
#![allow(
    unsafe_code,
    reason = "this is the one place for it in the kernel relay; every block says why it is sound"
)]

use std::ffi::{CString, c_void};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use bro_ebpf::{Flow, Owners, Record, Route, Watch, WatchKey};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A type that user space and the programs may share in mapped memory.
///
/// # Safety
/// It must consist of atomics alone (every bit pattern is valid, and others may change it at any time), need no drop, and its size
/// must be a multiple of 8, so that it has the array map's own stride.
unsafe trait Shared: Sync {}
// SAFETY: 24 `AtomicU64`s and unused words of them, 192 bytes.
unsafe impl Shared for Record {}
// SAFETY: one atomic of 8 bytes.
unsafe impl Shared for AtomicU64 {}

/// The memory of a `BPF_F_MMAPABLE` array map.
#[derive(Debug)]
pub struct Mapping<T> {
    start: NonNull<T>,
    count: usize,
    length: NonZeroUsize,
}

// SAFETY: the memory is not tied to a thread.
unsafe impl<T: Sync> Send for Mapping<T> {}
// SAFETY: only `&T` of a `Shared`, hence `Sync`, type is ever given out.
unsafe impl<T: Sync> Sync for Mapping<T> {}

impl Mapping<Record> {
    /// Maps the records.
    ///
    /// # Errors
    /// mmap's.
    pub fn of_records(map: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        Self::new(map, count)
    }
}

impl Mapping<AtomicU64> {
    /// Maps an array of numbers.
    ///
    /// # Errors
    /// mmap's.
    pub fn of_numbers(map: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        Self::new(map, count)
    }
}

impl<T> Mapping<T> {
    fn new(map: BorrowedFd<'_>, count: usize) -> io::Result<Self>
    where
        T: Shared,
    {
        let length = NonZeroUsize::new(size_of::<T>() * count).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice. The kernel checks the length against the map's.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { start: start.cast(), count, length })
    }

    /// One element; `None` beyond the end.
    pub fn get(&self, index: usize) -> Option<&T> {
        if index >= self.count {
            return None;
        }
        // SAFETY: within the mapping.
        let element = unsafe { self.start.add(index) };
        // SAFETY: page alignment is enough for T, the memory is mapped as long as `self` lives, any bits are a valid T, and every
        // other writer of that memory uses atomics or whole words.
        Some(unsafe { element.as_ref() })
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and no reference outlives `self`.
        let _unmapped = unsafe { munmap(self.start.cast::<c_void>(), self.length.get()) };
    }
}

/// [`Flow`] as a map's key.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct FlowKey(pub Flow);
/// [`Route`] as a map's key or value.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct RouteValue(pub Route);
/// [`WatchKey`] as a map's key.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct PortKey(pub WatchKey);
/// [`Watch`] as a map's value.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct WatchValue(pub Watch);
/// [`Owners`] as a program's constant.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct OwnersValue(pub Owners);
// SAFETY: integers and arrays of them, without padding (asserted in bro-ebpf), valid in every bit pattern.
unsafe impl aya::Pod for FlowKey {}
// SAFETY: as above.
unsafe impl aya::Pod for OwnersValue {}
// SAFETY: as above.
unsafe impl aya::Pod for RouteValue {}
// SAFETY: as above.
unsafe impl aya::Pod for PortKey {}
// SAFETY: as above.
unsafe impl aya::Pod for WatchValue {}

fn option<T: Copy>(socket: BorrowedFd<'_>, level: i32, name: i32, initial: T) -> io::Result<T> {
    let mut value = initial;
    let mut length = size_of::<T>() as libc::socklen_t;
    let into = (&raw mut value).cast();
    // SAFETY: `value` is `length` writable bytes of plain integers.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, into, &raw mut length) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// What SO_MEMINFO tells of a socket's send side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendMemory {
    /// Its send buffer's size.
    pub sndbuf: u64,
    /// What is queued in it.
    pub queued: u64,
}

/// A socket's send memory (`SO_MEMINFO`).
///
/// # Errors
/// getsockopt's.
pub fn send_memory(socket: BorrowedFd<'_>) -> io::Result<SendMemory> {
    // The order of SK_MEMINFO_*: RMEM_ALLOC, RCVBUF, WMEM_ALLOC, SNDBUF, FWD_ALLOC, WMEM_QUEUED, OPTMEM, BACKLOG, DROPS.
    const SO_MEMINFO: i32 = 55;
    let info = option(socket, libc::SOL_SOCKET, SO_MEMINFO, [0u32; 9])?;
    Ok(SendMemory { sndbuf: info[3].into(), queued: info[5].into() })
}

/// What TCP_INFO tells of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Segments that are not acknowledged.
    pub in_flight: u32,
    /// Probes of a closed window that nothing was heard after.
    pub probes: u8,
    /// How long ago a byte was sent, also once more.
    pub last_sent: std::time::Duration,
    /// How long ago an acknowledgement came, of anything.
    pub last_heard: std::time::Duration,
}

/// What a TCP socket has sent, and whether that was acknowledged (`TCP_INFO`).
///
/// # Errors
/// getsockopt's, for every other socket.
pub fn sent(socket: BorrowedFd<'_>) -> io::Result<Sent> {
    // struct tcp_info begins with eight bytes, the fourth of which is tcpi_probes; then come tcpi_rto, tcpi_ato, tcpi_snd_mss,
    // tcpi_rcv_mss, tcpi_unacked, tcpi_sacked, tcpi_lost, tcpi_retrans, tcpi_fackets, tcpi_last_data_sent, tcpi_last_ack_sent,
    // tcpi_last_data_recv and tcpi_last_ack_recv, the times in milliseconds.
    let info = option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, [0u32; 15])?;
    let span = |milliseconds: u32| std::time::Duration::from_millis(milliseconds.into());
    Ok(Sent {
        in_flight: info[6],
        probes: info[0].to_ne_bytes()[3],
        last_sent: span(info[11]),
        last_heard: span(info[14]),
    })
}

/// The cookie of the network namespace a socket belongs to.
///
/// # Errors
/// ENOPROTOOPT before Linux 5.14.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    option(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE, 0u64)
}

/// What FIONREAD says waits at a socket. Of one in a sockmap, many kernels say 0 whatever waits.
///
/// # Errors
/// ioctl's.
pub fn fionread(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let mut count: libc::c_int = 0;
    // SAFETY: the kernel writes one int.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result == 0 { Ok(count) } else { Err(io::Error::last_os_error()) }
}

/// Takes a host-wide net.ipv4.tcp_notsent_lowat out of the way: with it a socket counts as full long before its send
/// buffer is.
///
/// # Errors
/// setsockopt's.
pub fn lift_notsent_lowat(socket: BorrowedFd<'_>) -> io::Result<()> {
    const TCP_NOTSENT_LOWAT: i32 = 25;
    let most: u32 = i32::MAX as u32;
    let value = (&raw const most).cast();
    let length = size_of::<u32>() as libc::socklen_t;
    // SAFETY: `value` points to `length` readable bytes.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT, value, length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A descriptor for what is pinned at `path` (bpf(2), `BPF_OBJ_GET`), which needs no right but that to the file.
///
/// # Errors
/// open(2)'s for the file; EPERM where the kernel or a seccomp filter keeps ordinary users from bpf(2) altogether.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    const BPF_OBJ_GET: libc::c_int = 7;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let get = AtPath { path: path.as_ptr() as u64, descriptor: 0, flags: 0 };
    // SAFETY: `get` is readable for its size and points to a string with an end, both of which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, size_of::<AtPath>()) };
    made(result)
}

/// Attaches a sockops program to a cgroup's folder (bpf(2), `BPF_LINK_CREATE`). Takes no right but the program's descriptor.
///
/// # Errors
/// E2BIG when there are as many as may be, EPERM when another program is attached there exclusively.
pub fn attach_to_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    const BPF_CGROUP_SOCK_OPS: u32 = 3;
    /// The part of `union bpf_attr` that this command reads.
    #[repr(C)]
    struct LinkAttributes {
        program: u32,
        target: u32,
        kind: u32,
        flags: u32,
    }
    let (program, target) = (program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32);
    let link = LinkAttributes { program, target, kind: BPF_CGROUP_SOCK_OPS, flags: 0 };
    // SAFETY: `link` is readable for its size.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const link, size_of::<LinkAttributes>())
    };
    made(result)
}

/// Attaches a program to a cgroup's folder, beside others, for as long as the group is there (bpf(2), `BPF_PROG_ATTACH` with
/// `BPF_F_ALLOW_MULTI`): no process has to hold it. `place` is one of `enum bpf_attach_type`.
///
/// # Errors
/// E2BIG when there are as many as may be, EPERM when another program is attached there exclusively, or without CAP_NET_ADMIN.
pub fn leave_attached(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, place: u32) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    /// The part of `union bpf_attr` that this command reads.
    #[repr(C)]
    struct AttachAttributes {
        target: u32,
        program: u32,
        place: u32,
        flags: u32,
    }
    let (program, target) = (program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32);
    let attach = AttachAttributes { target, program, place, flags: BPF_F_ALLOW_MULTI };
    // SAFETY: `attach` is readable for its size.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<AttachAttributes>())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many programs are attached to a cgroup's folder at `place` (bpf(2), `BPF_PROG_QUERY`), its ancestors' not among them.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN or, on newer kernels, CAP_BPF.
pub fn attached(cgroup: BorrowedFd<'_>, place: u32) -> io::Result<u32> {
    const BPF_PROG_QUERY: libc::c_int = 16;
    /// The part of `union bpf_attr` that every kernel with this command reads and writes.
    #[repr(C)]
    struct QueryAttributes {
        target: u32,
        place: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
    }
    let target = cgroup.as_raw_fd() as u32;
    let mut query =
        QueryAttributes { target, place, query_flags: 0, attach_flags: 0, programs: 0, count: 0, padding: 0 };
    // SAFETY: `query` is readable and writable for its size; without room for their numbers the kernel writes how many there are.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<QueryAttributes>()) };
    if result == 0 { Ok(query.count) } else { Err(io::Error::last_os_error()) }
}

/// Pins what is behind a descriptor at `path` (bpf(2), `BPF_OBJ_PIN`).
///
/// # Errors
/// As of any file that is made.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    const BPF_OBJ_PIN: libc::c_int = 6;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let pin = AtPath { path: path.as_ptr() as u64, descriptor: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: `pin` is readable for its size and points to a string with an end, both of which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const pin, size_of::<AtPath>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The part of `union bpf_attr` that is read for pinning, and for opening what is pinned.
#[repr(C)]
struct AtPath {
    path: u64,
    descriptor: u32,
    flags: u32,
}

/// The descriptor that bpf(2) returned.
fn made(result: libc::c_long) -> io::Result<OwnedFd> {
    let number =
        i32::try_from(result).ok().filter(|number| *number >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made it, for us alone. (With close-on-exec, as all of bpf(2)'s.)
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Runs a program on one packet (bpf(2) BPF_PROG_TEST_RUN), and says what it returned. Takes no rights from Linux 5.19 on.
///
/// # Errors
/// bpf(2)'s.
pub fn run(program: BorrowedFd<'_>, packet: &[u8]) -> io::Result<u32> {
    /// The part of `union bpf_attr` for this command.
    #[repr(C)]
    #[derive(Default)]
    struct TestRunAttributes {
        program: u32,
        returned: u32,
        size_in: u32,
        size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
    }
    const BPF_PROG_TEST_RUN: libc::c_int = 10;
    let mut test = TestRunAttributes {
        program: program.as_raw_fd() as u32,
        size_in: packet.len() as u32,
        data_in: packet.as_ptr() as u64,
        repeat: 1,
        ..TestRunAttributes::default()
    };
    let attribute = &raw mut test;
    // SAFETY: the attribute is of the size given and its padding-free fields are those of this command; the kernel reads
    // `size_in` bytes of the packet and writes to the attribute alone.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, attribute, size_of::<TestRunAttributes>()) };
    if result == 0 { Ok(test.returned) } else { Err(io::Error::last_os_error()) }
}

/// Calls bpf(2) as a forwarder does that loads programs, or one that opens existing ones. Nothing is left of it.
///
/// # Errors
/// bpf's, or that of a filter.
pub fn try_bpf(loads: bool) -> io::Result<()> {
    const MAP_CREATE: libc::c_long = 0;
    const OBJ_GET: libc::c_long = 7;
    // An array of one number; a path that does not exist.
    let (command, start): (_, [u32; 4]) = if loads { (MAP_CREATE, [2, 4, 8, 1]) } else { (OBJ_GET, [0; 4]) };
    let mut attributes = [0_u32; 32];
    attributes[..4].copy_from_slice(&start);
    let size: libc::c_long = size_of_val(&attributes) as libc::c_long;
    // SAFETY: the kernel reads so many bytes of them and no more, and writes nothing for these commands.
    let made = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size) };
    if made >= 0 {
        // SAFETY: the kernel has just made it for this process, and nothing else knows of it.
        drop(unsafe { OwnedFd::from_raw_fd(made as i32) });
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if !loads && error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        error => Err(error),
    }
}
