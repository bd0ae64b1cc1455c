//! Moving bytes with splice(2): from the source into a pipe and from the pipe into the sink, as references to the same pages.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};

use super::pipes::{CAPACITY, Pipe};
use crate::sys::{Peeked, look};

/// What came of filling a pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes.
    Bytes(usize),
    /// The end of the stream.
    End,
    /// Nothing waits now.
    Nothing,
    /// Something waits that splice does not pass: an urgent byte (`tcp_read_sock` stops in front of it; recv takes it).
    Urgent,
}

/// Fills `pipe` from `source`.
///
/// # Errors
/// EINVAL when the socket cannot be spliced, else the connection's own error.
pub fn fill(source: BorrowedFd<'_>, pipe: &Pipe) -> nix::Result<Filled> {
    let fill = || retry(|| splice(source, None, pipe.write(), None, CAPACITY, flags()));
    let waits = || match look(source) {
        Peeked::Byte => Ok(true),
        Peeked::End | Peeked::Nothing => Ok(false),
        Peeked::Abort(errno) => Err(errno),
    };
    let filled = match fill() {
        // Bytes that came between the two calls are no reason to copy, so it is the second refusal that counts.
        Err(Errno::EAGAIN) if waits()? => fill(),
        Err(Errno::EAGAIN) => return Ok(Filled::Nothing),
        filled => filled,
    };
    match filled {
        // With the FIN received, splice takes an urgent byte in front for the end.
        Ok(0) if waits()? => Ok(Filled::Urgent),
        Ok(0) => Ok(Filled::End),
        Ok(count) => Ok(Filled::Bytes(count)),
        Err(Errno::EAGAIN) => Ok(Filled::Urgent),
        Err(errno) => Err(errno),
    }
}

/// Empties `held` bytes of `pipe` into `sink`. The exact count matters: asked for more than there is, the kernel would wait
/// for it with MSG_MORE (`splice_to_socket`).
///
/// # Errors
/// EAGAIN when the sink's send buffer is full, else the connection's own error.
pub fn empty(pipe: &Pipe, sink: BorrowedFd<'_>, held: usize) -> nix::Result<usize> {
    retry(|| splice(pipe.read(), None, sink, None, held, flags()))
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
