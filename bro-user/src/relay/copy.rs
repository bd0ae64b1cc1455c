//! Moving bytes with recv(2) and send(2) through a buffer that all connections share. Only what a full sink leaves over is
//! kept per connection. The relay that always works: no pipe, no privilege.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use bytes::Bytes;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

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
