//! What goes to the service with one system call: a datagram, or several that the kernel takes apart (udp(7), UDP_SEGMENT). The length
//! is an option of the flow's socket and not said with each message, since the relay process may not name addresses on such a
//! socket, and the filter of its system calls cannot see whether a message does (`sandbox.rs`).

use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

use crate::flows::Piece;
use crate::sys::messages::Messages;

/// How a flow's socket takes apart what is sent.
#[derive(Debug)]
pub(super) struct Segments {
    /// The length of each datagram, as the socket was told; 0 where it sends everything as it is.
    now: usize,
    longest: usize,
}

impl Default for Segments {
    fn default() -> Self {
        Self { now: 0, longest: usize::from(u16::MAX) }
    }
}

impl Segments {
    /// None are taken apart: over unix sockets.
    pub(super) const fn never() -> Self {
        Self { now: 0, longest: 0 }
    }

    /// The longest datagrams of which several may go as one.
    pub(super) const fn longest(&self) -> usize {
        self.longest
    }

    fn set(&mut self, socket: BorrowedFd<'_>, length: usize) -> nix::Result<()> {
        if self.now != length {
            setsockopt(&socket, sockopt::UdpGsoSegment, &i32::try_from(length).unwrap_or(0))?;
            self.now = length;
        }
        Ok(())
    }

    /// Several of this length could not go as one.
    pub(super) fn refuse(&mut self, why: Errno, length: usize) {
        // Their way is not as wide, or the kernel or an interface does not do it at all.
        let too_long = matches!(why, Errno::EINVAL | Errno::EMSGSIZE);
        self.longest = if too_long { length.saturating_sub(1) } else { 0 };
    }
}

/// Does the kernel say that several cannot go as one, of which each may go by itself?
pub(super) const fn cannot_be_taken_apart(errno: Errno) -> bool {
    matches!(errno, Errno::EINVAL | Errno::EMSGSIZE | Errno::EIO | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP)
}

/// What is to be sent.
#[derive(Debug)]
pub(super) enum Outgoing<'a> {
    One(&'a [u8]),
    /// As many as [`crate::flows::together`] says.
    Several(&'a [Piece], &'a mut Messages),
}

impl Outgoing<'_> {
    /// How many, and how many bytes.
    pub(super) fn amount(&self) -> (u64, u64) {
        match self {
            Self::One(bytes) => (1, bytes.len() as u64),
            Self::Several(pieces, _) => {
                (pieces.len() as u64, pieces.iter().map(|piece| piece.length as u64).sum())
            }
        }
    }

    /// The length of each but the last.
    pub(super) fn segment(&self) -> usize {
        match self {
            Self::One(_) => 0,
            Self::Several(pieces, _) => pieces.first().map_or(0, |piece| piece.length),
        }
    }

    /// Each by itself.
    pub(super) fn each(&self) -> impl Iterator<Item = &[u8]> {
        let (one, several): (_, &[Piece]) = match self {
            Self::One(bytes) => (Some(*bytes), &[]),
            Self::Several(pieces, _) => (None, pieces),
        };
        let of = |piece| match self {
            Self::Several(_, messages) => messages.bytes_of(piece),
            Self::One(bytes) => *bytes,
        };
        one.into_iter().chain(several.iter().map(of))
    }

    /// Sends it, or nothing of it.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, segments: &mut Segments) -> nix::Result<()> {
        let length = self.segment();
        match self {
            Self::Several(pieces, messages) => {
                segments.set(socket, length)?;
                messages.write_together(pieces, socket)
            }
            Self::One(bytes) => {
                if bytes.len() > segments.now {
                    segments.set(socket, 0)?;
                }
                // write(2) is among the calls that the filter lets pass unseen, but does nothing where there is nothing to write.
                let once = || match bytes {
                    [] => send(socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
                    _ => nix::unistd::write(socket, bytes),
                };
                let sent = once().or_else(|errno| {
                    // An older kernel, or a way that has become narrower, minds the length although there is nothing to take apart.
                    let minds = segments.now > 0 && cannot_be_taken_apart(errno);
                    if !minds {
                        return Err(errno);
                    }
                    segments.refuse(errno, segments.now);
                    segments.set(socket, 0)?;
                    once()
                });
                sent.map(drop)
            }
        }
    }
}
