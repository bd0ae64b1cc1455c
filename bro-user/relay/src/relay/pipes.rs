//! The pipes that splice(2) moves bytes through: a bounded pool. A connection borrows one for as long as bytes wait in it, so idle
//! connections hold none, and one pipe usually serves all connections.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// What the first pipes are asked to hold: the most that an ordinary user may ask for (fs.pipe-max-size). The more one splice
/// moves, the fewer wake-ups a gigabyte costs.
pub const CAPACITY: usize = 1024 * 1024;

/// How many pipes are so large; the others have the kernel's default size, so that all of them together stay well below the
/// user's quota, which other programs of the user need too (fs.pipe-user-pages-soft, 64 MiB).
const LARGE: usize = 16;

/// The most pipes that a forwarder has. With the large ones among them that is less than half of what a user may have (in pages, by
/// the kernel's default for fs.pipe-user-pages-soft); what more connections hold is copied.
pub const MOST: usize = 256;
const _: () = assert!(LARGE * CAPACITY / 4096 + (MOST - LARGE) * 16 <= 16_384 / 2);

/// The kernel's default of sixteen pages. Less than this means that the user's fs.pipe-user-pages-soft is used up: pipe(2)
/// still succeeds then, with two pages (`alloc_pipe_info`).
const USABLE: i32 = 64 * 1024;

/// Empty pipes kept for the next bytes.
pub const KEPT: usize = 4;

/// After a refusal, how long the kernel is not asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// A pipe, empty whenever it is in the pool. Boxed, since a direction that may hold one should not be larger for it: idle
/// connections are the most numerous. Once for all its loans, and not for each.
#[derive(Debug)]
pub struct Pipe(Box<PipeEnds>);

#[derive(Debug)]
struct PipeEnds {
    read: OwnedFd,
    write: OwnedFd,
    large: bool,
}

impl Pipe {
    /// Where bytes come out.
    #[must_use]
    pub fn read(&self) -> BorrowedFd<'_> {
        self.0.read.as_fd()
    }

    /// Where bytes go in.
    #[must_use]
    pub fn write(&self) -> BorrowedFd<'_> {
        self.0.write.as_fd()
    }
}

/// The pool.
#[derive(Debug)]
pub struct Pool {
    idle: Vec<Pipe>,
    lent: usize,
    large: usize,
    limit: usize,
    refused_at: Option<Instant>,
    announced: bool,
}

impl Pool {
    /// A pool of at most `limit` pipes.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { idle: Vec::new(), lent: 0, large: 0, limit, refused_at: None, announced: false }
    }

    /// An empty pipe, or `None` when the pool's or the kernel's limit is reached: then bytes are copied.
    pub fn borrow(&mut self) -> Option<Pipe> {
        let pipe = match self.idle.pop() {
            Some(pipe) => pipe,
            None if self.lent >= self.limit => return None,
            None if self.refused_at.is_some_and(|at| at.elapsed() < PAUSE) => return None,
            None => match make(self.large < LARGE) {
                Ok(pipe) => {
                    self.large += usize::from(pipe.0.large);
                    pipe
                }
                Err(reason) => {
                    self.refused_at = Some(Instant::now());
                    if !std::mem::replace(&mut self.announced, true) {
                        tracing::warn!(%reason, "no pipe to splice through; bytes are copied until there is one again");
                    }
                    return None;
                }
            },
        };
        self.lent += 1;
        Some(pipe)
    }

    /// Takes an empty pipe back.
    pub fn give_back(&mut self, pipe: Pipe) {
        if self.idle.len() < KEPT {
            self.lent -= 1;
            self.idle.push(pipe);
        } else {
            self.discard(pipe);
        }
    }

    /// A borrowed pipe that still held bytes is gone with its connection.
    pub fn discard(&mut self, pipe: Pipe) {
        self.lent -= 1;
        self.large -= usize::from(pipe.0.large);
    }

    /// Pipes lent out now.
    #[must_use]
    pub const fn lent(&self) -> usize {
        self.lent
    }
}

fn make(large: bool) -> Result<Pipe, String> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .map_err(|errno| format!("pipe2: {}", errno.desc()))?;
    // A refusal (EPERM: beyond the user's quota) leaves the default size, which is checked next.
    let large = large && fcntl(&write, FcntlArg::F_SETPIPE_SZ(CAPACITY as i32)).is_ok();
    match fcntl(&write, FcntlArg::F_GETPIPE_SZ) {
        Ok(size) if size >= USABLE => Ok(Pipe(Box::new(PipeEnds { read, write, large }))),
        Ok(_) => Err("this user's pipe quota is used up (raise fs.pipe-user-pages-soft)".into()),
        Err(errno) => Err(format!("F_GETPIPE_SZ: {}", errno.desc())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lends_no_more_than_its_limit() {
        let mut pool = Pool::new(2);
        let (first, second) = (pool.borrow().unwrap(), pool.borrow().unwrap());
        assert!(pool.borrow().is_none());
        pool.give_back(first);
        pool.discard(second);
        assert_eq!(pool.lent(), 0);
        assert!(pool.borrow().is_some());
    }
}
