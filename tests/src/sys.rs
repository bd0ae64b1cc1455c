//! The harness's own unsafe code: three system calls that have no safe wrapper, and the place where inherited descriptors
//! get their numbers.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

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

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the program that `command` starts inherit `fds` as 3, 4, ... in this order, as systemd passes sockets.
pub fn pass_fds(command: &mut Command, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    // Sources far above the destinations: else one dup2 could overwrite the source of the next.
    let sources: Vec<OwnedFd> = fds
        .iter()
        .map(|fd| {
            let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(500))?;
            // SAFETY: fcntl has just made this descriptor for us and nobody else knows it.
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
