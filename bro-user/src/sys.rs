//! The only unsafe code: system calls that no library wraps safely, and descriptors that arrive as bare numbers.
#![allow(unsafe_code, reason = "this is the one place for it; every block says why it is sound")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};

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
    let raw = check(unsafe { libc::ioctl(ns.as_raw_fd(), NS_GET_USERNS) })?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// ioctl_ns(2) NS_GET_NSTYPE: is this the file of a network namespace?
#[must_use]
pub fn is_network_namespace(file: BorrowedFd<'_>) -> bool {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: this request takes no argument; what is no namespace refuses it.
    unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) == libc::CLONE_NEWNET }
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

/// Whether a byte waits to be read. By a look at it, because FIONREAD says 0 of every socket in a sockmap on Linux 6.6.128,
/// 6.12.75, 6.18.14, 6.19 and many after them. Like any recv(2) it takes the socket's error along.
///
/// # Errors
/// recv's, such as EAGAIN when nothing waits.
pub fn byte_waits(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    use nix::sys::socket::{MsgFlags, recv};
    recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).map(|count| count > 0)
}

/// Receives one message of a seqpacket channel with the descriptors that came along (unix(7) SCM_RIGHTS), close-on-exec.
///
/// # Errors
/// recvmsg's; EMFILE when the descriptors did not all fit this process's limit (MSG_CTRUNC).
pub fn receive_with_descriptors(
    channel: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut control = nix::cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let message =
        recvmsg::<()>(channel.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let truncated = message.flags.contains(MsgFlags::MSG_CTRUNC);
    let mut descriptors = Vec::new();
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = item {
            // SAFETY: the kernel just put these descriptors into our table, for us alone.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    if truncated { Err(io::Error::from_raw_os_error(libc::EMFILE)) } else { Ok((message.bytes, descriptors)) }
}

/// The most descriptors that one message of ours carries (the kernel's own limit, SCM_MAX_FD, is 253).
pub const MOST_DESCRIPTORS: usize = 64;

/// Removes environment variables, before any thread exists.
pub fn unset_environment(names: &[&str]) {
    for name in names {
        // SAFETY: called from `main` before the first thread is started, so nobody reads the environment meanwhile.
        unsafe { std::env::remove_var(name) };
    }
}

/// Lets tokio wait for a descriptor, which from now on belongs to the returned value alone.
///
/// # Errors
/// When epoll does not take it (a plain file, say).
pub fn watch(fd: OwnedFd, interest: tokio::io::Interest) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps its descriptor open, and the same one, for as long as the AsyncFd that owns it exists.
    unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// The type in the file's SELinux label (`bin_t` of `system_u:object_r:bin_t:s0`), where it has one.
#[must_use]
pub fn selinux_type(path: &std::path::Path) -> Option<String> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut label = [0_u8; 512];
    // SAFETY: both strings end with a zero byte, and the kernel writes no more than the length that it is told.
    let length = unsafe {
        libc::getxattr(path.as_ptr(), c"security.selinux".as_ptr(), label.as_mut_ptr().cast(), label.len())
    };
    let label = label.get(..usize::try_from(length).ok()?)?;
    Some(std::str::from_utf8(label).ok()?.trim_end_matches('\0').split(':').nth(2)?.to_owned())
}
