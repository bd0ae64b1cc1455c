//! Moving bytes with splice(2): from the source into a pipe and from the pipe into the sink, as references to the same pages.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};

use super::pipes::{CAPACITY, Pipe};

/// Fills `pipe` from `source`; 0 is the end of the stream.
///
/// # Errors
/// EAGAIN when nothing waits (also in front of an urgent byte, `__tcp_read_sock`), EINVAL when the socket cannot be spliced,
/// else the connection's own error.
pub fn fill(source: BorrowedFd<'_>, pipe: &Pipe) -> nix::Result<usize> {
    retry(|| splice(source, None, &pipe.write, None, CAPACITY, flags()))
}

/// Empties `held` bytes of `pipe` into `sink`. The exact count matters: asked for more than there is, the kernel would wait
/// for it with MSG_MORE (`splice_to_socket`).
///
/// # Errors
/// EAGAIN when the sink's send buffer is full, else the connection's own error.
pub fn empty(pipe: &Pipe, sink: BorrowedFd<'_>, held: usize) -> nix::Result<usize> {
    retry(|| splice(&pipe.read, None, sink, None, held, flags()))
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

fn retry(mut call: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
