//! The only unsafe code: system calls that no library wraps safely, and descriptors that arrive as bare numbers.
#![allow(unsafe_code, reason = "this is the one place for it; every block says why it is sound")]

pub mod messages;

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;
use nix::sys::socket::{MsgFlags, SockaddrLike as _, SockaddrStorage};

/// An argument that is not looked at. What is not given is whatever was in the register, for a filter to see.
const NOTHING: libc::c_ulong = 0;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Takes ownership of a descriptor that this process was given by number (sd_listen_fds(3)), if it is open.
///
/// # Errors
/// EBADF when `number` is not an open descriptor.
pub fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only looks the number up.
    let _flags = check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: it is open, and the caller passes each number that systemd gave it once, before anything else is opened.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// accept4(2) with the peer's address: a non-blocking, close-on-exec connection.
///
/// # Errors
/// accept4's.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<SockaddrStorage>)> {
    let mut storage = std::mem::MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: address and length are valid for writing, and length holds the room there is.
    let raw = check(unsafe {
        libc::accept4(listener.as_raw_fd(), storage.as_mut_ptr().cast(), &raw mut length, flags)
    })?;
    // SAFETY: the kernel just made this descriptor for us.
    let connection = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: the storage was zeroed and then filled by the kernel, `length` bytes of it.
    let peer = unsafe { SockaddrStorage::from_raw(storage.as_ptr().cast(), Some(length)) };
    Ok((connection, peer))
}

/// socket(2) with a protocol given by number.
///
/// # Errors
/// socket's.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let raw =
        check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol) })?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// pidfd_open(2): a descriptor that polls readable when the process has exited.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let raw = check(raw.try_into().unwrap_or(-1))?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// ioctl_ns(2) NS_GET_USERNS: the user namespace that owns the namespace `ns`.
///
/// # Errors
/// EPERM when it is neither the caller's user namespace nor below it.
pub fn owning_user_namespace(ns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: this request takes no argument.
    let raw = check(unsafe { libc::ioctl(ns.as_raw_fd(), NS_GET_USERNS, NOTHING) })?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// ioctl_ns(2) NS_GET_NSTYPE: is this the file of a network namespace?
#[must_use]
pub fn is_network_namespace(file: BorrowedFd<'_>) -> bool {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: this request takes no argument; a file that is no namespace refuses it.
    unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE, NOTHING) == libc::CLONE_NEWNET }
}

/// openat2(2) with RESOLVE_IN_ROOT: `path` as a process whose root directory is `root` would see it, symlinks included.
///
/// # Errors
/// openat2's.
pub fn open_in_root(root: BorrowedFd<'_>, path: &std::path::Path) -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    Ok(openat2(root, path, how)?)
}

/// What a look at a socket shows.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peeked {
    /// At least a byte.
    Byte,
    /// The end of the stream.
    End,
    /// Nothing yet.
    Nothing,
    /// The connection's abort, and nothing before it. The kernel says so once, and this was it.
    Abort(nix::errno::Errno),
}

/// What waits to be read. By a look at it (MSG_PEEK), because FIONREAD says 0 of every socket in a sockmap on Linux 6.6.128,
/// 6.12.75, 6.18.14, 6.19 and many after them. Like any recv(2) it takes the socket's error along; to ask without taking
/// anything there is [`stirs`].
pub fn look(socket: BorrowedFd<'_>) -> Peeked {
    use nix::errno::Errno;
    use nix::sys::socket::recv;
    loop {
        return match recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Peeked::End,
            Ok(_) => Peeked::Byte,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => Peeked::Nothing,
            Err(errno) => Peeked::Abort(errno),
        };
    }
}

/// Do so many bytes wait to be read? `bytes` is a few thousand at most: they are looked at, see [`look`].
#[must_use]
pub fn has_received(socket: BorrowedFd<'_>, bytes: u16) -> bool {
    use nix::sys::socket::recv;
    let mut room = vec![0; usize::from(bytes)];
    recv(socket.as_raw_fd(), &mut room, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) == Ok(room.len())
}

/// Has poll(2) call this TCP socket readable once so many bytes have come, or all that will come (socket(7), SO_RCVLOWAT). A unix
/// socket's poll(2) does not heed it.
pub fn stir_from(socket: BorrowedFd<'_>, bytes: u16) {
    let bytes = libc::c_int::from(bytes);
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is valid for reading for as long as the call lasts.
    let _refused = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            length,
        )
    };
}

/// Whether anything waits to be read: a byte, the end, or an abort, which is still there afterwards.
#[must_use]
pub fn stirs(socket: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    // Not to be told is no reason to believe that nothing is there.
    poll(&mut [PollFd::new(socket, PollFlags::POLLIN)], PollTimeout::ZERO) != Ok(0)
}

/// Has the other end of this socket finished sending?
#[must_use]
pub fn has_finished(socket: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let finished = PollFlags::from_bits_retain(libc::POLLRDHUP);
    let mut polled = [PollFd::new(socket, finished)];
    // Not to know is no reason to read on for ever.
    poll(&mut polled, PollTimeout::ZERO) != Ok(0)
}

/// How many clients wait to be accepted: over TCP their number (tcp(7): `tcpi_unacked` of a listening socket), else at least one or
/// none.
///
/// # Errors
/// When it is no socket.
pub fn backlog(listener: BorrowedFd<'_>) -> io::Result<u64> {
    if !stirs(listener) {
        return Ok(0);
    }
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let place = info.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `length` bytes to `place`, which is `info`.
    let result = unsafe {
        libc::getsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length)
    };
    // SAFETY: it consists of integers, for which zeros will do where the kernel has written nothing.
    let info = unsafe { info.assume_init() };
    let errno = nix::errno::Errno::result(result);
    match errno {
        Ok(_) => Ok(u64::from(info.tcpi_unacked.max(1))),
        // As a unix socket says it, and one of vsock(7).
        Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOPROTOOPT) => Ok(1),
        Err(errno) => Err(errno.into()),
    }
}

/// Has nothing be received any more at a socket that is for sending alone (socket(7) SO_ATTACH_FILTER), whatever else is done to it.
///
/// # Errors
/// setsockopt(2)'s.
pub fn receive_nothing(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    let (value, length) = ((&raw const program).cast(), size_of::<libc::sock_fprog>() as libc::socklen_t);
    // SAFETY: the program and its one instruction are valid for reading for as long as the call lasts.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, length)
    };
    check(done)?;
    let yes: libc::c_int = 1;
    let (value, length) = ((&raw const yes).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the value is valid for reading for as long as the call lasts.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LOCK_FILTER, value, length)
    };
    check(done).map(drop)
}

/// SO_PASSRIGHTS (Linux 6.16): whether descriptors may be passed to this socket.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Has the kernel refuse descriptors that are passed to this unix socket from now on (unix(7) SCM_RIGHTS): the sender gets EPERM.
/// Sockets that a listening one accepts have it from it.
///
/// # Errors
/// When the kernel is too old for that, or it is no unix socket.
pub fn refuse_descriptors(socket: BorrowedFd<'_>) -> io::Result<()> {
    let no: libc::c_int = 0;
    let (value, length) = ((&raw const no).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: the value is valid for reading for as long as the call lasts.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, value, length) };
    check(done).map(drop)
}

/// Has nothing but bytes and descriptors come with a message to this unix socket: no credentials (SO_PASSCRED, SO_PASSPIDFD) and no
/// label (SO_PASSSEC), which a listening socket may have asked for. Else each message would seem to have been cut off.
pub fn ask_for_nothing_else(socket: BorrowedFd<'_>) {
    const SO_PASSPIDFD: libc::c_int = 76;
    let no: libc::c_int = 0;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    for option in [libc::SO_PASSCRED, libc::SO_PASSSEC, SO_PASSPIDFD] {
        // SAFETY: the value is valid for reading for as long as the call lasts. An older kernel knows one of them less.
        let _refused = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const no).cast(), length)
        };
    }
}

/// Does the kernel refuse descriptors for this unix socket? `None` where it cannot.
#[must_use]
pub fn refuses_descriptors(socket: BorrowedFd<'_>) -> Option<bool> {
    let mut passes: libc::c_int = 1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    let value = (&raw mut passes).cast();
    // SAFETY: value and length are valid for writing, and length holds the room there is.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, value, &raw mut length)
    };
    check(done).is_ok().then_some(passes == 0)
}

/// Sends one message of a seqpacket channel, with descriptors where there are any.
///
/// # Errors
/// EAGAIN when a non-blocking channel is full, EPIPE when the other end is closed.
pub fn send_with_descriptors(
    channel: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, send, sendmsg};
    if descriptors.is_empty() {
        // send(2) and not sendmsg(2): a process that may only use the former has no way to pass a descriptor on.
        return send(channel.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).map(drop).map_err(Into::into);
    }
    let numbers: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let parts = [io::IoSlice::new(bytes)];
    sendmsg::<()>(channel.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Whether the process of a pidfd has exited: then it is readable.
#[must_use]
pub fn exited(process: &OwnedFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    let mut polled = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO) != Ok(0)
}

/// The error number of what a system call of this module failed with.
#[must_use]
pub fn errno_of(error: &io::Error) -> nix::errno::Errno {
    error.raw_os_error().map_or(nix::errno::Errno::EIO, nix::errno::Errno::from_raw)
}

/// Receives one message of a seqpacket channel with the descriptors that came along (unix(7) SCM_RIGHTS), close-on-exec.
///
/// # Errors
/// recvmsg's; EMFILE when the descriptors did not all fit this process's limit (MSG_CTRUNC). The ones that fit are closed again.
pub fn receive_with_descriptors(
    channel: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    look_or_receive(channel, buffer, MsgFlags::empty())
}

/// The same of what stays to be received, with duplicates of its descriptors (MSG_PEEK).
///
/// # Errors
/// As of [`receive_with_descriptors`].
pub fn peek_with_descriptors(
    channel: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    look_or_receive(channel, buffer, MsgFlags::MSG_PEEK)
}

fn look_or_receive(
    channel: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        nix::sys::socket::recvmsg::<()>(channel.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let (length, cut_off) = (message.bytes, message.flags.contains(MsgFlags::MSG_CTRUNC));
    let mut descriptors = Vec::new();
    for number in numbers_in(&control) {
        // SAFETY: the kernel just put this descriptor into our table, for us alone, and says its number once.
        descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    if cut_off {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok((length, descriptors))
}

/// The numbers of the descriptors in a control buffer (cmsg(3)) that was all zero before recvmsg(2) wrote to it. Nix reads none
/// that was cut off, and those descriptors are in our table all the same.
fn numbers_in(mut control: &[u8]) -> Vec<RawFd> {
    // SAFETY: it only calculates.
    let data = unsafe { libc::CMSG_LEN(0) } as usize;
    let mut numbers = Vec::new();
    while control.len() >= data {
        // SAFETY: there are bytes enough for a header, which is made of integers alone.
        let header: libc::cmsghdr = unsafe { control.as_ptr().cast::<libc::cmsghdr>().read_unaligned() };
        let Some(content) = control.get(data..header.cmsg_len) else { break };
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            let (whole, _rest) = content.as_chunks();
            numbers.extend(whole.iter().map(|number| RawFd::from_ne_bytes(*number)));
        }
        // SAFETY: it only calculates.
        let space = unsafe { libc::CMSG_SPACE(content.len() as u32) } as usize;
        control = control.get(space..).unwrap_or_default();
    }
    numbers
}

/// The most descriptors that one message of ours carries (the kernel's own limit, SCM_MAX_FD, is 253).
pub const MOST_DESCRIPTORS: usize = 64;

/// Removes environment variables, before any thread exists.
pub fn unset_environment(names: &[&str]) {
    for name in names {
        // SAFETY: called from `main` before the first thread is started, so no thread reads the environment meanwhile.
        unsafe { std::env::remove_var(name) };
    }
}

/// Memory that this process shares with its forks, holding one `T` of zeros.
#[derive(Debug)]
pub struct SharedMemory<T> {
    start: std::ptr::NonNull<T>,
}

/// A type that processes may share.
///
/// # Safety
/// It must consist of atomics alone, so that zeros are valid and others may change it at any time.
unsafe trait Shareable: Sync {}
// SAFETY: it is made of `AtomicU64`s alone.
unsafe impl Shareable for crate::counters::Counters {}

// SAFETY: the memory is not tied to a thread.
unsafe impl<T: Sync> Send for SharedMemory<T> {}
// SAFETY: only `&T` of a `Sync` type is ever given out.
unsafe impl<T: Sync> Sync for SharedMemory<T> {}

impl SharedMemory<crate::counters::Counters> {
    /// Fresh memory.
    ///
    /// # Errors
    /// mmap's.
    pub fn new() -> io::Result<Self> {
        Self::map()
    }
}

impl<T> SharedMemory<T> {
    fn map() -> io::Result<Self>
    where
        T: Shareable,
    {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
        let length = std::num::NonZeroUsize::new(size_of::<T>()).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_SHARED) }?;
        Ok(Self { start: start.cast() })
    }

    /// What is there.
    pub fn get(&self) -> &T {
        // SAFETY: mapped until `self` is dropped, page-aligned, zeros at first, and a `Shareable` ever since.
        unsafe { self.start.as_ref() }
    }
}

impl<T> Drop for SharedMemory<T> {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and no reference outlives `self`.
        let _unmapped = unsafe { nix::sys::mman::munmap(self.start.cast(), size_of::<T>()) };
    }
}

/// fork(2). `None` in the child.
///
/// # Errors
/// fork's; EBUSY when this process has more than one thread, for then the child may use next to nothing.
pub fn fork() -> io::Result<Option<i32>> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: there is no other thread that could hold a lock at this moment.
    let pid = check(unsafe { libc::fork() })?;
    Ok((pid != 0).then_some(pid))
}

/// Gives freed memory back to the kernel (malloc_trim(3)), after much was needed once. glibc's allocator would keep it.
pub fn return_freed_memory() {
    // SAFETY: as safe as free(3); nothing that is in use is touched.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A duplicate of a descriptor that has the first free number from `number` on, close-on-exec.
///
/// # Errors
/// EMFILE, or EINVAL for a number that is beyond the limit.
pub fn duplicate(descriptor: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    let made = nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(number))?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// Closes, after [`fork`] and in the child, what belongs to its parent alone. The child may not use it afterwards.
pub fn close_in_child(descriptor: BorrowedFd<'_>) {
    // SAFETY: a plain number; the child ends by [`exit_now`], without the destructor that would close it again.
    unsafe { libc::close(descriptor.as_raw_fd()) };
}

/// Closes, after [`fork`] and in the child, every descriptor from `first` on (close_range(2); one by one where a filter or an old
/// kernel forbids that). Values of the child that own one may neither be used nor dropped afterwards.
///
/// # Errors
/// When it cannot be seen which are open.
pub fn close_all_in_child(first: RawFd) -> io::Result<()> {
    let (from, last): (libc::c_ulong, libc::c_ulong) = (first.unsigned_abs().into(), u32::MAX.into());
    // SAFETY: plain numbers; the child ends by [`exit_now`], without the destructors that would close them again.
    if unsafe { libc::syscall(libc::SYS_close_range, from, last, NOTHING) } == 0 {
        return Ok(());
    }
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for number in open.into_iter().filter(|&number| number >= first) {
        // SAFETY: as above; that of the folder itself is closed already.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// Lets no program that is executed from now on have a descriptor of this process's beyond the first three (close_range(2), of
/// Linux 5.11). An older kernel leaves things as they were.
pub fn keep_descriptors() {
    let (first, last): (libc::c_ulong, libc::c_ulong) = (3, u32::MAX.into());
    let flags = libc::c_ulong::from(libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: nothing is closed, and code that is to pass a descriptor on does so by dup(2) or by taking the flag away.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
}

/// Ignores a signal.
///
/// # Errors
/// EINVAL for signals that cannot be ignored.
pub fn ignore(signal: nix::sys::signal::Signal) -> nix::Result<()> {
    // SAFETY: no handler of ours is involved.
    unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigIgn) }.map(drop)
}

/// _exit(2): without anything that a normal end of the process would do.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(code) }
}

/// The addresses that the relay process may connect to, in memory that only the control process can write. The relay process sees
/// it at a place below all its other memory, which its sandbox never lets it change ([`crate::sandbox`]): so connect(2) can be
/// allowed for exactly what stands here. An empty place holds no address of any existing family: zeros would be an address of
/// AF_UNSPEC, to which a connected socket may be connected in order to be led elsewhere afterwards (connect(2)).
#[derive(Debug)]
pub struct AddressBook {
    start: std::ptr::NonNull<u8>,
    length: std::num::NonZeroUsize,
    count: usize,
    /// Its memory, until both processes have it.
    file: Option<OwnedFd>,
}

// SAFETY: the memory is not tied to a thread, and is written through `&mut self` alone.
unsafe impl Send for AddressBook {}

impl Drop for AddressBook {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and nothing refers to it.
        let _unmapped = unsafe { nix::sys::mman::munmap(self.start.cast(), self.length.get()) };
    }
}

impl AddressBook {
    /// The room of one address, and what each is aligned to.
    pub const ROOM: usize = size_of::<libc::sockaddr_storage>();

    /// What an empty place is filled with.
    const NOTHING: u8 = 0xff;

    /// Where the relay process may see it: above what no process may map (vm.mmap_min_addr), and below where programs are loaded.
    const LOW: std::ops::Range<usize> = 0x1_0000..0x40_0000;

    /// Room for `count` addresses.
    ///
    /// # Errors
    /// memfd_create's or mmap's.
    pub fn new(count: usize) -> io::Result<Self> {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let length = (count.max(1) * Self::ROOM).next_multiple_of(4096);
        let file = memfd_create(c"bro-addresses", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, length.try_into().map_err(io::Error::other)?)?;
        let length = std::num::NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0) }?.cast();
        // SAFETY: all of a mapping that is writable and that nothing else uses.
        unsafe { std::ptr::write_bytes(start.as_ptr(), Self::NOTHING, length.get()) };
        Ok(Self { start, length, count, file: Some(file) })
    }

    /// For the relay process, right after it was forked: the same addresses, read-only, and at a low place.
    ///
    /// # Errors
    /// When there is no such place.
    pub fn for_relay(&mut self) -> io::Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
        let file = self.file.take().ok_or(io::ErrorKind::InvalidInput)?;
        // Opened anew for reading alone: what is mapped through that can never become writable (mprotect(2) EACCES).
        let file = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let first = maps.split('-').next().and_then(|first| usize::from_str_radix(first, 16).ok());
        let end = first.unwrap_or(0).min(Self::LOW.end);
        let places = (Self::LOW.start..end.saturating_sub(self.length.get())).step_by(Self::LOW.start);
        for place in places {
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED_NOREPLACE;
            let place = std::num::NonZeroUsize::new(place);
            // SAFETY: nothing is mapped there, and MAP_FIXED_NOREPLACE replaces nothing.
            let mapped = unsafe { mmap(place, self.length, ProtFlags::PROT_READ, flags, &file, 0) };
            let Ok(start) = mapped else { continue };
            // SAFETY: the writable mapping that this process has from its parent; nothing here refers to it any more.
            unsafe { munmap(self.start.cast(), self.length.get()) }?;
            return Ok(Self { start: start.cast(), length: self.length, count: self.count, file: None });
        }
        Err(io::ErrorKind::AddrInUse.into())
    }

    /// Both processes have it: no other process is to get at it.
    pub fn shared(&mut self) {
        self.file = None;
    }

    /// Where the addresses are: less than the pages that they fill.
    #[must_use]
    pub fn place(&self) -> std::ops::Range<u64> {
        let start = self.start.as_ptr() as u64;
        start..start + (self.count * Self::ROOM) as u64
    }

    /// Whether there is room for this number.
    const fn has(&self, number: usize) -> bool {
        number < self.count
    }

    /// Empties the places of these numbers. By the control process alone.
    pub fn clear(&mut self, numbers: std::ops::Range<usize>) {
        for number in numbers.filter(|&number| self.has(number)) {
            // SAFETY: within the mapping, which is writable in the process that has made it.
            let at = unsafe { self.start.add(number * Self::ROOM) };
            // SAFETY: `ROOM` bytes of it.
            unsafe { at.write_bytes(Self::NOTHING, Self::ROOM) };
        }
    }

    /// Writes an address; false where there is no room for it. By the control process alone.
    pub fn write(&mut self, number: usize, address: std::net::SocketAddr) -> bool {
        if !self.has(number) {
            return false;
        }
        let address = SockaddrStorage::from(address);
        // SAFETY: within the mapping, which is writable in the process that has made it.
        let at = unsafe { self.start.add(number * Self::ROOM) };
        // SAFETY: both are `ROOM` bytes at most, and do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(address.as_ptr().cast(), at.as_ptr(), address.len() as usize)
        };
        true
    }

    /// connect(2) to the address with this number.
    ///
    /// # Errors
    /// connect's.
    pub fn connect(&self, socket: BorrowedFd<'_>, number: usize, ipv4: bool) -> nix::Result<()> {
        if !self.has(number) {
            return Err(nix::errno::Errno::EADDRNOTAVAIL);
        }
        let length = if ipv4 { size_of::<libc::sockaddr_in>() } else { size_of::<libc::sockaddr_in6>() };
        // SAFETY: within the mapping.
        let address = unsafe { self.start.add(number * Self::ROOM) }.as_ptr().cast();
        // SAFETY: `length` readable bytes, whatever they are.
        nix::errno::Errno::result(unsafe { libc::connect(socket.as_raw_fd(), address, length as u32) })
            .map(drop)
    }
}

/// Has the program that `command` starts inherit `descriptors` as 3, 4, … in this order, as systemd passes sockets.
///
/// # Errors
/// EMFILE.
pub fn pass_descriptors(
    command: &mut std::process::Command,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    use std::os::unix::process::CommandExt as _;
    // First above all destinations, so that none is overwritten before it has been passed on.
    let above = 3 + RawFd::try_from(descriptors.len()).map_err(io::Error::other)?;
    let mut sources = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        sources.push(duplicate(*descriptor, above)?);
    }
    let place = move || {
        for (source, number) in sources.iter().zip(3..) {
            // SAFETY: plain numbers; whatever else has them in the child is close-on-exec and not used any more.
            let _number = check(unsafe { libc::dup2(source.as_raw_fd(), number) })?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec this calls nothing but dup2, which is async-signal-safe.
    let _same = unsafe { command.pre_exec(place) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::AsFd as _;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn channel() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    /// The reading end of a pipe. Its writing end has been sent so often, and is open nowhere else.
    fn send_writing_ends(through: &OwnedFd, count: usize) -> std::io::PipeReader {
        let (reading, writing) = std::io::pipe().unwrap();
        send_with_descriptors(through.as_fd(), b"words", &vec![writing.as_fd(); count]).unwrap();
        reading
    }

    #[test]
    fn descriptors_that_fit_are_closed_when_others_do_not() {
        let (near, far) = channel();
        for count in [MOST_DESCRIPTORS + 1, 2 * MOST_DESCRIPTORS] {
            let mut reading = send_writing_ends(&near, count);
            let refused = receive_with_descriptors(far.as_fd(), &mut [0; 5]).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EMFILE));
            // While one of them is open the pipe has no end, and this waits for ever.
            assert!(exited(&reading.as_fd().try_clone_to_owned().unwrap()), "one is open still");
            assert_eq!(reading.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn all_that_a_message_may_carry_arrive() {
        let (near, far) = channel();
        for count in [0, 1, MOST_DESCRIPTORS] {
            let reading = send_writing_ends(&near, count);
            let (length, descriptors) = receive_with_descriptors(far.as_fd(), &mut [0; 5]).unwrap();
            assert_eq!((length, descriptors.len()), (5, count));
            let end = reading.as_fd().try_clone_to_owned().unwrap();
            assert_eq!(exited(&end), count == 0);
            drop(descriptors);
            assert!(exited(&end));
        }
    }
}
