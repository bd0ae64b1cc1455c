//! What a forwarder and its agent say to each other: one request and one answer a message, over a seqpacket socket pair.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::sys;

/// A request to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Join the network namespace that comes along as the first descriptor; the second, if any, is the root directory for
    /// [`Request::Connect`].
    Join,
    /// Make unconnected sockets.
    Sockets {
        /// socket(2)'s domain.
        domain: i32,
        /// socket(2)'s type.
        kind: i32,
        /// socket(2)'s protocol.
        protocol: i32,
        /// How many, at most [`sys::MOST_DESCRIPTORS`].
        count: u8,
    },
    /// Connect a unix stream to this path below the root directory.
    Connect(PathBuf),
    /// Take requests from the socket that comes along as well.
    Channel,
}

/// An answer: the descriptors, or the errno of what failed.
pub type Answer = Result<Vec<OwnedFd>, nix::errno::Errno>;

/// The longest request: a path of PATH_MAX and its verb.
const LONGEST: usize = 4097;

impl Request {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Join => vec![0],
            Self::Sockets { domain, kind, protocol, count } => {
                let mut bytes = vec![1, *count];
                for number in [domain, kind, protocol] {
                    bytes.extend(number.to_le_bytes());
                }
                bytes
            }
            Self::Connect(path) => [&[2], path.as_os_str().as_encoded_bytes()].concat(),
            Self::Channel => vec![3],
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        use std::os::unix::ffi::OsStrExt as _;
        Some(match bytes.split_first()? {
            (0, []) => Self::Join,
            (1, [count, rest @ ..]) if rest.len() == 12 => {
                let mut numbers = rest.chunks_exact(4).map(|n| i32::from_le_bytes([n[0], n[1], n[2], n[3]]));
                Self::Sockets {
                    domain: numbers.next()?,
                    kind: numbers.next()?,
                    protocol: numbers.next()?,
                    count: *count,
                }
            }
            (2, path) if !path.is_empty() => Self::Connect(std::ffi::OsStr::from_bytes(path).into()),
            (3, []) => Self::Channel,
            _ => return None,
        })
    }

    /// Sends the request with `descriptors`.
    ///
    /// # Errors
    /// EAGAIN when a non-blocking channel is full, EPIPE when the agent is gone.
    pub fn send(&self, channel: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(channel, &self.encode(), descriptors)
    }

    /// Receives a request; `None` when the other end is closed.
    ///
    /// # Errors
    /// recvmsg's, and InvalidData for what is no request.
    pub fn receive(channel: BorrowedFd<'_>) -> io::Result<Option<(Self, Vec<OwnedFd>)>> {
        let mut buffer = [0; LONGEST];
        let (length, descriptors) = sys::receive_with_descriptors(channel, &mut buffer)?;
        if length == 0 {
            return Ok(None);
        }
        let request = Self::decode(&buffer[..length]).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some((request, descriptors)))
    }
}

/// Sends an answer.
///
/// # Errors
/// sendmsg's.
pub fn answer(channel: BorrowedFd<'_>, answer: &Answer) -> io::Result<()> {
    match answer {
        Ok(descriptors) => {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            send(channel, &0i32.to_le_bytes(), &borrowed)
        }
        Err(errno) => send(channel, &(*errno as i32).to_le_bytes(), &[]),
    }
}

/// Receives an answer.
///
/// # Errors
/// UnexpectedEof when the agent is gone, WouldBlock when a non-blocking channel has nothing yet.
pub fn receive_answer(channel: BorrowedFd<'_>) -> io::Result<Answer> {
    let mut buffer = [0; 4];
    let (length, descriptors) = sys::receive_with_descriptors(channel, &mut buffer)?;
    if length != buffer.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(match i32::from_le_bytes(buffer) {
        0 => Ok(descriptors),
        errno => Err(nix::errno::Errno::from_raw(errno)),
    })
}

fn send(channel: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights[..] };
    let _sent =
        sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decodes_what_it_encodes(domain: i32, kind: i32, protocol: i32, count: u8, path in "/\\PC{0,60}") {
            for request in [Request::Join, Request::Channel, Request::Connect(path.into()),
                            Request::Sockets { domain, kind, protocol, count }] {
                prop_assert_eq!(Request::decode(&request.encode()), Some(request));
            }
        }

        #[test]
        fn never_panics(bytes: Vec<u8>) {
            Request::decode(&bytes);
        }
    }
}
