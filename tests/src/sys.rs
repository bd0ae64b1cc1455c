//! The harness's own unsafe code: three system calls that have no safe wrapper, and the place where inherited descriptors
//! get their numbers.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use bro_adopt::Call;
use bro_adopt::profile::SHUT_WR;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// A descriptor that stands for the process `pid` and polls readable once it has ended.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// A duplicate of descriptor `fd` of the process behind `pidfd`: lets a test ask the kernel about the program's own sockets.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(fd)
}

/// A system call as it is given, to see what becomes of it. For one that touches no memory of ours.
pub fn ask(call: libc::c_long, words: [i64; 3]) -> io::Result<libc::c_long> {
    // SAFETY: the caller sees to it that none of the words is taken for a place in memory.
    let result = unsafe { libc::syscall(call, words[0], words[1], words[2]) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the program that `command` starts inherit `fds` as 3, 4, ... in this order, as systemd passes sockets.
pub fn pass_fds(command: &mut Command, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    // Sources far above the destinations: else one dup2 could overwrite the source of the next.
    let sources: Vec<OwnedFd> = fds
        .iter()
        .map(|fd| {
            let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(500))?;
            // SAFETY: fcntl has just made this descriptor for us and nothing else knows it.
            Ok(unsafe { OwnedFd::from_raw_fd(raw) })
        })
        .collect::<io::Result<_>>()?;
    let place = move || {
        for (source, number) in sources.iter().zip(3..) {
            // SAFETY: both are plain numbers; in the forked child no one else uses 3.. (all else is close-on-exec).
            if unsafe { libc::dup2(source.as_raw_fd(), number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only calls dup2, which is async-signal-safe.
    unsafe { command.pre_exec(place) };
    Ok(())
}

/// Bytes in a TCP socket's transmit queue that were not acknowledged yet (tcp(7) SIOCOUTQ).
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (which is TIOCOUTQ) writes one int, which outlives the call.
    let asked = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if asked < 0 { Err(io::Error::last_os_error()) } else { u64::try_from(bytes).map_err(io::Error::other) }
}

/// Brings up the loopback interface of the network namespace that this process is in.
pub fn loopback_up() -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an ifreq is plain bytes, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Something that bpf(2) has made, by its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BpfObject {
    /// A program.
    Program(u32),
    /// A map.
    Map(u32),
    /// What keeps a program attached.
    Link(u32),
}

/// The head of `union bpf_attr`, as far as it is used here: every member starts at a multiple of its size.
#[repr(C)]
#[derive(Debug, Default)]
struct BpfAttr {
    first: u32,
    second: u32,
    third: u64,
    fourth: u64,
    fifth: u64,
}

fn bpf(command: libc::c_int, attr: &BpfAttr) -> io::Result<libc::c_long> {
    let size = size_of::<BpfAttr>();
    // SAFETY: the kernel reads the attributes, which outlive the call; what they point to is the callers' business, who lay
    // it out in the same way.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A descriptor of an object; ENOENT when there is none. Needs CAP_SYS_ADMIN.
pub fn bpf_object(object: BpfObject) -> io::Result<OwnedFd> {
    // BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID, BPF_LINK_GET_FD_BY_ID.
    let (command, id) = match object {
        BpfObject::Program(id) => (13, id),
        BpfObject::Map(id) => (14, id),
        BpfObject::Link(id) => (30, id),
    };
    owned(bpf(command, &BpfAttr { first: id, ..BpfAttr::default() })?)
}

/// What is pinned at `path`.
pub fn bpf_pinned(path: &std::path::Path) -> io::Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt as _;
    const BPF_OBJ_GET: libc::c_int = 7;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let address = path.as_ptr().expose_provenance() as u64;
    // The attribute's first member is a word of 64 bits here.
    let [first, second] = [address as u32, (address >> 32) as u32];
    owned(bpf(BPF_OBJ_GET, &BpfAttr { first, second, ..BpfAttr::default() })?)
}

/// Changes the value of `key`.
pub fn bpf_update<const KEY: usize, const VALUE: usize>(
    map: BorrowedFd<'_>,
    key: &[u8; KEY],
    value: &[u8; VALUE],
) -> io::Result<()> {
    const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
    let third = key.as_ptr().expose_provenance() as u64;
    let fourth = value.as_ptr().expose_provenance() as u64;
    let attr = BpfAttr { first: raw(map), third, fourth, ..BpfAttr::default() };
    bpf(BPF_MAP_UPDATE_ELEM, &attr).map(drop)
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf_info<const SIZE: usize>(object: BorrowedFd<'_>, info: &mut [u64; SIZE]) -> io::Result<()> {
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    let length = u32::try_from(size_of_val(info)).map_err(io::Error::other)?;
    let third = info.as_mut_ptr().expose_provenance() as u64;
    let attr = BpfAttr { first: raw(object), second: length, third, ..BpfAttr::default() };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &attr).map(drop)
}

/// The ids of the maps that a program uses.
pub fn bpf_maps_of(program: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    // struct bpf_prog_info: nr_map_ids is the upper half of the seventh word, map_ids the eighth.
    let mut ids = vec![0u32; 64];
    let mut info = [0u64; 8];
    info[6] = (ids.len() as u64) << 32;
    info[7] = ids.as_mut_ptr().expose_provenance() as u64;
    bpf_info(program, &mut info)?;
    ids.truncate(usize::try_from(info[6] >> 32).map_err(io::Error::other)?);
    Ok(ids)
}

/// How many bytes of instructions a program has, after the verifier took out what never runs.
pub fn bpf_program_size(program: BorrowedFd<'_>) -> io::Result<usize> {
    // struct bpf_prog_info: xlated_prog_len is the upper half of the third word. (The fourth and fifth are where to write them.)
    let mut info = [0u64; 3];
    bpf_info(program, &mut info)?;
    usize::try_from(info[2] >> 32).map_err(io::Error::other)
}

/// A map's name.
pub fn bpf_map_name(map: BorrowedFd<'_>) -> io::Result<String> {
    // struct bpf_map_info: the name is in the fourth and fifth word.
    let mut info = [0u64; 5];
    bpf_info(map, &mut info)?;
    let bytes: Vec<u8> = info[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
}

/// How many entries a map can have.
pub fn bpf_map_size(map: BorrowedFd<'_>) -> io::Result<usize> {
    // struct bpf_map_info: max_entries is the lower half of the third word.
    let mut info = [0u64; 3];
    bpf_info(map, &mut info)?;
    usize::try_from(info[2] as u32).map_err(io::Error::other)
}

/// The key after `key`, or the first one; `None` at the end.
pub fn bpf_next_key<const KEY: usize>(
    map: BorrowedFd<'_>,
    key: Option<&[u8; KEY]>,
) -> io::Result<Option<[u8; KEY]>> {
    const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
    let mut next = [0; KEY];
    let third = key.map_or(0, |key| key.as_ptr().expose_provenance() as u64);
    let fourth = next.as_mut_ptr().expose_provenance() as u64;
    let attr = BpfAttr { first: raw(map), third, fourth, ..BpfAttr::default() };
    found(bpf(BPF_MAP_GET_NEXT_KEY, &attr)).map(|found| found.then_some(next))
}

/// The value of `key`.
pub fn bpf_lookup<const KEY: usize, const VALUE: usize>(
    map: BorrowedFd<'_>,
    key: &[u8; KEY],
) -> io::Result<Option<[u8; VALUE]>> {
    const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
    let mut value = [0; VALUE];
    let third = key.as_ptr().expose_provenance() as u64;
    let fourth = value.as_mut_ptr().expose_provenance() as u64;
    let attr = BpfAttr { first: raw(map), third, fourth, ..BpfAttr::default() };
    found(bpf(BPF_MAP_LOOKUP_ELEM, &attr)).map(|found| found.then_some(value))
}

fn found(result: io::Result<libc::c_long>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The elements of a map that is shared with the kernel and with other processes. `T` is made of atomics alone.
#[derive(Debug)]
pub struct Shared<T> {
    start: std::ptr::NonNull<T>,
    count: usize,
}

// SAFETY: the memory is shared with the kernel anyway; what reaches it can only use its atomics.
unsafe impl<T: Sync> Send for Shared<T> {}

/// Maps the memory of an array map into ours.
pub fn share(map: BorrowedFd<'_>, count: usize) -> io::Result<Shared<bro_ebpf::Record>> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap};
    let length = (count * size_of::<bro_ebpf::Record>()).try_into().map_err(io::Error::other)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map, 0) }?;
    Ok(Shared { start: start.cast(), count })
}

impl<T> Shared<T> {
    /// All elements.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        // SAFETY: the mapping holds so many elements, is page-aligned, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }.iter()
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: it is our mapping, and no reference into it outlives `self`.
        unsafe { nix::sys::mman::munmap(self.start.cast(), self.count * size_of::<T>()) }.ok();
    }
}

/// Has the kernel tell of what a profile notifies ([`bro_adopt::profile`]), and of every call of another architecture, and wait for an answer: seccomp(2) with SECCOMP_FILTER_FLAG_NEW_LISTENER, as an OCI runtime does it. For this process
/// and all that it starts.
pub fn notify_of_listening() -> io::Result<OwnedFd> {
    const NEW_LISTENER: libc::c_ulong = 1 << 3;
    /// Linux 5.19.
    const WAIT_KILLABLE: libc::c_ulong = 1 << 5;
    const ARCHITECTURE: u32 = if cfg!(target_arch = "x86_64") { 0xC000_003E } else { 0xC000_00B7 };
    let load = |at: u32| filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let equal =
        |value: u32, then: u8, or: u8| filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, then, or, value);
    let answer = |value: u32| filter(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    let number = |call: Call| call.number() as u32;
    // struct seccomp_data: the number at 0, the architecture at 4, the second argument at 24 (its lower half, little-endian).
    let mut program = [
        load(4),
        equal(ARCHITECTURE, 0, 6),
        load(0),
        equal(number(Call::Bind), 4, 0),
        equal(number(Call::Listen), 3, 0),
        equal(number(Call::Shutdown), 0, 3),
        load(24),
        equal(SHUT_WR, 1, 0),
        answer(libc::SECCOMP_RET_USER_NOTIF),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let length = program.len() as libc::c_ushort;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    let install = |flags: libc::c_ulong| {
        let how = libc::SECCOMP_SET_MODE_FILTER;
        // SAFETY: the kernel reads the program, which outlives the call.
        owned(unsafe { libc::syscall(libc::SYS_seccomp, how, flags, &raw const program) })
    };
    install(NEW_LISTENER | WAIT_KILLABLE).or_else(|_older_kernel| install(NEW_LISTENER))
}

const fn filter(code: u32, then: u8, or: u8, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: then, jf: or, k: value }
}

/// A system call of i386, whose numbers are others (`int 0x80`), with two words. For one that touches no memory of ours; the negative
/// error number when it fails.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub fn ask_as_i386(call: i64, words: [i64; 2]) -> i64 {
    let result: i64;
    // SAFETY: the caller sees to it that none of the words is taken for a place in memory. The kernel keeps all registers but the result's and,
    // up to Linux 4.18, r8 to r11. LLVM keeps rbx for itself, so it is put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {first}", "int 0x80", "xchg rbx, {first}",
            first = inout(reg) words[0] => _, inlateout("rax") call => result, in("rcx") words[1],
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    i64::from(result as i32)
}

/// finit_module(2): loads a module of the running kernel's.
pub fn load_module(file: BorrowedFd<'_>) -> io::Result<()> {
    let none = c"";
    // SAFETY: the parameters are an empty string, which outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), none.as_ptr(), 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
