//! System calls that only the control process and the commands make. The others are in [`bro_relay::sys`] and in `bro-sockmap`.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::libc;

/// Lets tokio wait for a descriptor, which from now on belongs to the returned value alone.
///
/// # Errors
/// When epoll does not take it (a plain file, say).
pub fn watch(fd: OwnedFd, interest: tokio::io::Interest) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps its descriptor open, and the same one, for as long as the AsyncFd that owns it exists.
    unsafe { tokio::io::unix::AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// pidfd_send_signal(2): sends a signal to the process of a pidfd; with 0, finds out whether that may be done.
///
/// # Errors
/// ESRCH when it has exited; EPERM.
pub fn signal(process: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    let (number, none) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: without a siginfo_t the kernel makes one, as for kill(2); no memory of this process is involved.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, number, signal, none, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How many bytes, with what the kernel adds, were sent at this unix socket and wait to be read (SIOCOUTQ, `unix_outq_len`).
///
/// # Errors
/// ioctl(2)'s.
pub fn unread(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut bytes = 0;
    // SAFETY: the kernel writes one int, to where there is one.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
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
