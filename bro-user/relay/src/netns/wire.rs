//! What a forwarder and its agent say to each other: one request and one answer a message, over a seqpacket socket pair.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use bro_sockmap::HOOK_REQUEST;
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use crate::source::Binding;
use crate::sys;

/// A request to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentRequest {
    /// Join the network namespace that comes along as the first descriptor. The second is the folder in /proc of the process with
    /// the ids that count, the third, if any, the root directory for [`Address::Inside`]. Unix sockets are connected to as this
    /// user.
    Join(Identity),
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
    /// Keep what a service at this TCP or UDP address answers in the namespace, and see that sockets may have clients' addresses
    /// there.
    KeepReplies(Address),
    /// Take requests from the socket that comes along as well: [`AgentRequest::Dial`] to these addresses, and nothing else.
    Channel(TargetAddresses),
    /// Make a stream socket and connect it to the target's address with this number, as from this one if there is one. The answer may
    /// be a socket that is still connecting.
    Dial(u8, Option<SocketAddr>),
    /// Make this many unconnected stream sockets, at most [`sys::MOST_DESCRIPTORS`], of the family of its address with this
    /// number.
    Supply(u8, u8),
    /// Keep the program that comes along, for [`AgentRequest::Hook`].
    Program,
    /// Run that program, which puts a socket of the agent's namespace into the kernel relay's map of senders, on this request.
    Hook(Box<[u8; HOOK_REQUEST]>),
}

/// Where a channel leads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetAddresses {
    /// Numbered from 0.
    pub addresses: Vec<Address>,
    /// A file that still has to name the agent's namespace when something is connected there; if it does not, the answer is
    /// [`STALE`].
    pub file: Option<PathBuf>,
    /// What sockets for these addresses have to allow.
    #[serde(default)]
    pub binding: Binding,
}

impl TargetAddresses {
    /// The most addresses that one target may have.
    pub const MOST: usize = 16;
}

/// The namespace's file names another one by now.
pub const STALE: nix::errno::Errno = nix::errno::Errno::ESTALE;

/// One address of a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Address {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A UDP address.
    Udp(SocketAddr),
    /// A unix path as the forwarder sees it.
    Unix(PathBuf),
    /// The name of an abstract unix socket.
    Abstract(Vec<u8>),
    /// A unix path inside the container.
    Inside(PathBuf),
    /// A unix socket for datagrams, at one of those three.
    Datagrams(Box<Self>),
}

impl Address {
    /// The TCP address, if it is one.
    #[must_use]
    pub const fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Udp(_) | Self::Unix(_) | Self::Abstract(_) | Self::Inside(_) | Self::Datagrams(_) => None,
        }
    }

    /// The UDP address, if it is one.
    #[must_use]
    pub const fn udp(&self) -> Option<SocketAddr> {
        match self {
            Self::Udp(address) => Some(*address),
            Self::Tcp(_) | Self::Unix(_) | Self::Abstract(_) | Self::Inside(_) | Self::Datagrams(_) => None,
        }
    }

    /// The address, if it is one of a network.
    #[must_use]
    pub const fn inet(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) | Self::Udp(address) => Some(*address),
            Self::Unix(_) | Self::Abstract(_) | Self::Inside(_) | Self::Datagrams(_) => None,
        }
    }
}

/// An answer: the descriptors, or the errno of what failed.
pub type AgentAnswer = Result<Vec<OwnedFd>, nix::errno::Errno>;

/// The longest request: a channel's addresses, some of which are paths of PATH_MAX.
const LONGEST: usize = 32 * 1024;

impl AgentRequest {
    /// Its message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Join(Identity::Unused) => vec![0, 0],
            Self::Join(Identity::Forwarder) => vec![0, 1],
            Self::Join(Identity::User { uid, gid }) => {
                let mut bytes = vec![0, 2];
                bytes.extend(uid.to_le_bytes());
                bytes.extend(gid.to_le_bytes());
                bytes
            }
            Self::Sockets { domain, kind, protocol, count } => {
                let mut bytes = vec![1, *count];
                for number in [domain, kind, protocol] {
                    bytes.extend(number.to_le_bytes());
                }
                bytes
            }
            Self::Channel(addresses) => {
                let mut bytes = vec![2];
                // Into memory, of types that all have a form in JSON: it cannot fail.
                serde_json::to_writer(&mut bytes, addresses).unwrap_or_default();
                bytes
            }
            Self::KeepReplies(target) => {
                let mut bytes = vec![7];
                // As above.
                serde_json::to_writer(&mut bytes, target).unwrap_or_default();
                bytes
            }
            Self::Dial(number, source) => {
                let mut bytes = vec![3, *number];
                // As above.
                serde_json::to_writer(&mut bytes, source).unwrap_or_default();
                bytes
            }
            Self::Supply(number, count) => vec![4, *number, *count],
            Self::Program => vec![5],
            Self::Hook(request) => std::iter::once(6).chain(**request).collect(),
        }
    }

    /// Reads what [`Self::encode`] has written; `None` for anything else.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        Some(match bytes.split_first()? {
            (0, [0]) => Self::Join(Identity::Unused),
            (0, [1]) => Self::Join(Identity::Forwarder),
            (0, [2, ids @ ..]) if ids.len() == 8 => {
                let mut numbers = ids.chunks_exact(4).map(|n| u32::from_le_bytes([n[0], n[1], n[2], n[3]]));
                Self::Join(Identity::User { uid: numbers.next()?, gid: numbers.next()? })
            }
            (1, [count, rest @ ..]) if rest.len() == 12 => {
                let mut numbers = rest.chunks_exact(4).map(|n| i32::from_le_bytes([n[0], n[1], n[2], n[3]]));
                Self::Sockets {
                    domain: numbers.next()?,
                    kind: numbers.next()?,
                    protocol: numbers.next()?,
                    count: *count,
                }
            }
            (2, addresses) => Self::Channel(serde_json::from_slice(addresses).ok()?),
            (3, [number, source @ ..]) => Self::Dial(*number, serde_json::from_slice(source).ok()?),
            (7, target) => Self::KeepReplies(serde_json::from_slice(target).ok()?),
            (4, [number, count]) => Self::Supply(*number, *count),
            (5, []) => Self::Program,
            (6, request) => Self::Hook(Box::new(request.try_into().ok()?)),
            _ => return None,
        })
    }

    /// Sends the request with `descriptors`.
    ///
    /// # Errors
    /// EAGAIN when a non-blocking channel is full, EPIPE when the agent is gone.
    pub fn send(&self, channel: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        sys::send_with_descriptors(channel, &self.encode(), descriptors)
    }

    /// Receives a request; `None` when the other end is closed.
    ///
    /// # Errors
    /// recvmsg's, and InvalidData for a message that is no request.
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
pub fn answer(channel: BorrowedFd<'_>, answer: &AgentAnswer) -> io::Result<()> {
    match answer {
        Ok(descriptors) => {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            sys::send_with_descriptors(channel, &0i32.to_le_bytes(), &borrowed)
        }
        Err(errno) => sys::send_with_descriptors(channel, &(*errno as i32).to_le_bytes(), &[]),
    }
}

/// Receives an answer.
///
/// # Errors
/// UnexpectedEof when the agent is gone, WouldBlock when a non-blocking channel has nothing yet.
pub fn receive_answer(channel: BorrowedFd<'_>) -> io::Result<AgentAnswer> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decodes_what_it_encodes(domain: i32, kind: i32, protocol: i32, count: u8, path in "/\\PC{0,60}",
                                   ip: std::net::IpAddr, port: u16, name: Vec<u8>) {
            let addresses = vec![Address::Tcp(SocketAddr::new(ip, port)), Address::Udp(SocketAddr::new(ip, port)), Address::Unix(path.clone().into()),
                                 Address::Abstract(name), Address::Inside(path.clone().into())];
            let addresses = TargetAddresses { addresses, file: Some(path.into()), binding: Binding::Any };
            let source = Some(SocketAddr::new(ip, port));
            let user = Identity::User { uid: port.into(), gid: protocol.cast_unsigned() };
            for request in [AgentRequest::Join(Identity::Unused), AgentRequest::Join(Identity::Forwarder), AgentRequest::Join(user),
                            AgentRequest::Channel(addresses), AgentRequest::Dial(count, source), AgentRequest::Dial(count, None),
                            AgentRequest::KeepReplies(Address::Udp(SocketAddr::new(ip, port))), AgentRequest::Supply(count, 16),
                            AgentRequest::Program, AgentRequest::Hook(Box::new([count; HOOK_REQUEST])),
                            AgentRequest::Sockets { domain, kind, protocol, count }] {
                prop_assert_eq!(AgentRequest::decode(&request.encode()), Some(request));
            }
        }

        #[test]
        fn never_panics(bytes: Vec<u8>) {
            drop(AgentRequest::decode(&bytes));
        }
    }
}
