//! Moving bytes with recv(2) and send(2) through a buffer that all connections share. Only what a full sink leaves over is
//! kept per connection. The relay that always works: no pipe, no privilege.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, getsockopt, recv, recvmsg, send, sockopt};

/// The most that one recv takes, and so the most that one direction holds.
pub const CHUNK: usize = 128 * 1024;

/// Reads into `buffer`; 0 is the end of the stream.
///
/// # Errors
/// EAGAIN when nothing waits, else the connection's own error.
pub fn read(source: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
    loop {
        match recv(source.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// The same from a socket of vsock(7). One whose other end is closed altogether says that it is not connected, if this end has finished
/// sending as well (`vsock_shutdown` takes SOCK_DONE away): that is the end like any other. One whose other end has vanished, as a virtual
/// machine that is stopped, may seem to end, and has the reset beside that.
///
/// # Errors
/// As [`read()`].
pub fn read_vsock(source: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
    match read(source, buffer) {
        Ok(0) | Err(Errno::ENOTCONN) => match getsockopt(&source, sockopt::SocketError)? {
            0 => Ok(0),
            code => Err(Errno::from_raw(code)),
        },
        read => read,
    }
}

/// The longest message that is looked for room for. The kernel's own default for a socket is some 200 KiB.
pub const LONGEST_MESSAGE: usize = 1024 * 1024;

/// The length of the message that waits (MSG_TRUNC says all of it), or 0 at the end.
///
/// # Errors
/// As [`read()`].
pub fn message_length(source: BorrowedFd<'_>) -> nix::Result<usize> {
    loop {
        let how = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT;
        match recv(source.as_raw_fd(), &mut [], how) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// What [`read_guarded`] fails with when descriptors came along. No socket fails with it by itself.
pub const DESCRIPTORS: Errno = Errno::EMULTIHOP;

/// The same from a unix socket, where descriptors may come along (unix(7) SCM_RIGHTS). There is no room for them, so the kernel
/// closes them before this process has any, however many there are, and says that it did.
///
/// # Errors
/// [`DESCRIPTORS`], or as [`read()`].
pub fn read_guarded(source: BorrowedFd<'_>, buffer: &mut [u8], how: MsgFlags) -> nix::Result<usize> {
    loop {
        let mut parts = [IoSliceMut::new(&mut *buffer)];
        match recvmsg::<()>(source.as_raw_fd(), &mut parts, None, how | MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            Ok(message) if message.flags.contains(MsgFlags::MSG_CTRUNC) => return Err(DESCRIPTORS),
            result => return result.map(|message| message.bytes),
        }
    }
}

/// Writes what the sink takes of `bytes`.
///
/// # Errors
/// EAGAIN when it takes nothing, else the connection's own error.
pub fn write(bytes: &[u8], sink: BorrowedFd<'_>) -> nix::Result<usize> {
    loop {
        match send(sink.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Writes what the sink takes of `rest`, and keeps what is left.
///
/// # Errors
/// As [`write()`].
pub fn write_rest(rest: &mut Bytes, sink: BorrowedFd<'_>) -> nix::Result<usize> {
    let count = write(rest, sink)?;
    let _taken = rest.split_to(count);
    Ok(count)
}
