//! How the control process and the engine talk: commands and events, one a message, over a seqpacket socket pair. Descriptors go
//! along with commands (unix(7) SCM_RIGHTS); never with events, for the engine's process has no way to send one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bro_sockmap::{Descriptors, Share};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use serde::{Deserialize, Serialize};

use crate::connection::End;
use crate::engine::ReadyTarget;
use crate::engine::idle::Leave;
use crate::engine::lanes::ServiceWatch;
use crate::engine::listeners::ListenerUse;
use crate::engine::report::Figures;
use crate::source::Sources;
use crate::stats::Tally;
use crate::sys;
use crate::unreachable::Undelivered;

/// What the control process tells the engine.
#[derive(Debug)]
pub enum EngineCommand {
    /// The target listens: connect its held clients and the ones to come.
    Ready {
        /// Which target.
        target: usize,
        /// How to reach it.
        ready: ReadyTarget,
    },
    /// The kernel relay is loaded.
    Kernel {
        /// Its maps.
        descriptors: Descriptors,
        /// What there is to know about them.
        share: Share,
        /// The programs look at local clients too.
        clients: bool,
    },
    /// Anything that takes no descriptor along.
    Plain(Plain),
}

/// The commands that are words alone.
#[derive(Debug, Serialize, Deserialize)]
pub enum Plain {
    /// Accept clients from now on: whatever they need is there.
    Start,
    /// It could not be started: reset its held clients.
    Failed {
        /// Which target.
        target: usize,
        /// Why, for their log lines.
        end: End,
    },
    /// It has gone to sleep: hold the next client.
    Gone {
        /// Which target.
        target: usize,
    },
    /// The answer to [`EngineEvent::Knock`].
    Knocked {
        /// Which target.
        target: usize,
        /// The service runs, and is being looked for.
        runs: bool,
    },
    /// Accept no more, for this reason; say when that is so, and when the last connection has ended.
    Drain(String),
    /// End every connection now.
    EndAll(End),
    /// End the connections on which the client has said nothing (`--wake-on=data`).
    EndSilent,
    /// Accept no more if it is time to leave; say whether.
    Leave(Leave),
    /// Hold the clients that come from now on, if it is time to leave, for the service is about to be frozen; say whether.
    Freeze(Leave),
    /// It goes on: connect the held clients, and the ones to come.
    Thawed,
    /// Wake what sleeps; names the requester, for the log.
    Wake(String),
    /// Answer, to show that the engine runs.
    Ping,
    /// Have the kernel relay watch a target's service.
    Watch(ServiceWatch),
    /// Use a listener so from now on (`--adopt`); answered by [`EngineEvent::Uses`].
    Use {
        /// Which listener.
        listener: usize,
        /// How.
        how: ListenerUse,
    },
    /// End: the control process is done.
    Stop,
    /// Tell the figures.
    Report,
}

impl From<Plain> for EngineCommand {
    fn from(plain: Plain) -> Self {
        Self::Plain(plain)
    }
}

/// What the engine tells the control process. Bounded without a limit on the queue: per target one wake at a time, and the others
/// are answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum EngineEvent {
    /// A client waits for this target.
    Wake {
        /// Which target.
        target: usize,
        /// The client, for the log.
        peer: String,
        /// Its source, where it is a client.
        source: Option<String>,
        /// The target was ready and refused a connection since.
        refused: bool,
    },
    /// A client that wakes nothing is here (`--wake-ignore`): does the service run?
    Knock {
        /// Which target.
        target: usize,
        /// The client, for the log.
        peer: String,
    },
    /// A client waits at a listener of which that is all that is wanted ([`ListenerUse::WakeOnly`]). It is left alone from now on.
    Waits {
        /// Which listener.
        listener: usize,
    },
    /// The answer to [`Plain::Use`].
    Uses {
        /// Which listener.
        listener: usize,
        /// How.
        how: ListenerUse,
    },
    /// Something began to listen at this port of the namespace with this cookie.
    Listening {
        /// The cookie.
        netns: u64,
        /// The port.
        port: u16,
    },
    /// The answer to [`Plain::Leave`].
    Leaving(bool),
    /// The answer to [`Plain::Freeze`].
    Frozen(bool),
    /// A client waits for a service that is frozen.
    Thaw {
        /// The client, for the log.
        peer: String,
    },
    /// The first answer to [`Plain::Drain`]: no client is accepted any more.
    Draining(String),
    /// The second: no client is connected any more.
    Drained,
    /// The answer to [`Plain::Ping`].
    Pong,
    /// The answer to [`Plain::Watch`]: whether the programs will say when this target's service listens.
    Watching {
        /// Which target.
        target: usize,
        /// Whether they will.
        watching: bool,
    },
    /// A client may be told that its datagram was not received (`--icmp-port-unreachable`); never while another event waits.
    Undelivered(Undelivered),
    /// A part of the answer to [`Plain::Report`]: some listeners' tallies, in order.
    Tallies(Vec<Tally>),
    /// The rest of it.
    Peers(Vec<String>),
}

/// The most tallies that fit into one message, however large their numbers.
const TALLIES: usize = 24;

/// More than the longest message, in bytes.
pub const LONGEST: usize = 64 * 1024;

/// How a message says which command it is.
#[derive(Debug, Serialize, Deserialize)]
enum Head {
    Ready { target: usize, addresses: Vec<Option<SocketAddr>>, guarded: bool, sources: Sources },
    Kernel { share: Share, clients: bool },
    Plain(Plain),
}

impl EngineCommand {
    /// Its message, and the descriptors that go along.
    #[must_use]
    pub fn encode(self) -> (Vec<u8>, Vec<OwnedFd>) {
        let (head, descriptors) = match self {
            Self::Ready { target, ready: ReadyTarget { addresses, guarded, sources, channel } } => {
                (Head::Ready { target, addresses, guarded, sources }, vec![channel])
            }
            Self::Kernel { descriptors, share, clients } => {
                (Head::Kernel { share, clients }, descriptors.into_array().into())
            }
            Self::Plain(plain) => (Head::Plain(plain), Vec::new()),
        };
        // Into memory, of types that all have a form in JSON: it cannot fail.
        (serde_json::to_vec(&head).unwrap_or_default(), descriptors)
    }

    /// Reads what [`Self::encode`] has written; `None` for anything else.
    #[must_use]
    pub fn decode(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Option<Self> {
        Some(match serde_json::from_slice(bytes).ok()? {
            Head::Ready { target, addresses, guarded, sources } => {
                let channel = descriptors.into_iter().next()?;
                Self::Ready { target, ready: ReadyTarget { addresses, guarded, sources, channel } }
            }
            Head::Kernel { share, clients } => {
                let descriptors = Descriptors::from_array(descriptors.try_into().ok()?);
                Self::Kernel { descriptors, share, clients }
            }
            Head::Plain(plain) => Self::Plain(plain),
        })
    }
}

/// What came of the commands.
#[derive(Debug)]
pub enum Received {
    /// One of them.
    Command(EngineCommand),
    /// A command with descriptors that did not fit this process's table: [`EngineCommand::Ready`] of this target, or [`EngineCommand::Kernel`].
    WithoutDescriptors(Option<usize>),
}

/// The engine's end of the commands.
#[derive(Debug)]
pub struct Mailbox {
    channel: Rc<OwnedFd>,
    buffer: RefCell<Vec<u8>>,
}

impl Mailbox {
    /// What epoll watches.
    #[must_use]
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// The next command, if there is one. Without a control process there is nothing to do but stop.
    #[must_use]
    pub fn next(&self) -> Option<Received> {
        let mut buffer = self.buffer.borrow_mut();
        let nonsense = || {
            tracing::error!("the control process says something that makes no sense");
            Received::Command(Plain::Stop.into())
        };
        match sys::receive_with_descriptors(self.channel(), &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Ok((length @ 1.., descriptors)) => {
                let command = EngineCommand::decode(&buffer[..length], descriptors);
                Some(command.map_or_else(nonsense, Received::Command))
            }
            // Its words have come.
            Err(error) if sys::errno_of(&error) == Errno::EMFILE => {
                let words = serde_json::Deserializer::from_slice(&buffer).into_iter().next();
                Some(match words {
                    Some(Ok(Head::Ready { target, .. })) => Received::WithoutDescriptors(Some(target)),
                    Some(Ok(Head::Kernel { .. })) => Received::WithoutDescriptors(None),
                    _ => nonsense(),
                })
            }
            Ok(_) | Err(_) => Some(Received::Command(Plain::Stop.into())),
        }
    }
}

/// The engine's end of the events.
#[derive(Debug)]
pub struct Outbox {
    channel: Rc<OwnedFd>,
    /// What did not fit the channel yet.
    queue: RefCell<VecDeque<Vec<u8>>>,
}

impl Outbox {
    /// Tells the control process; messages that it is too slow to take wait here.
    pub fn tell(&self, event: &EngineEvent) {
        self.queue.borrow_mut().push_back(serde_json::to_vec(event).unwrap_or_default());
        self.flush();
    }

    /// Tells the figures.
    pub fn tell_figures(&self, figures: Figures) {
        for tallies in figures.tallies.chunks(TALLIES) {
            self.tell(&EngineEvent::Tallies(tallies.to_vec()));
        }
        self.tell(&EngineEvent::Peers(figures.peers));
    }

    /// Sends what waits, as far as it fits.
    pub fn flush(&self) {
        let mut queue = self.queue.borrow_mut();
        while let Some(message) = queue.front() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.channel.as_raw_fd(), message, flags) {
                Err(Errno::EAGAIN | Errno::ENOBUFS) => return,
                // The control process is gone and cannot be told; the mailbox will notice that.
                Ok(_) | Err(_) => drop(queue.pop_front()),
            }
        }
    }

    /// Whether something waits.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        !self.queue.borrow().is_empty()
    }
}

/// The engine's ends of `channel`.
#[must_use]
pub fn engines_ends(channel: OwnedFd) -> (Mailbox, Outbox) {
    let channel = Rc::new(channel);
    let mailbox = Mailbox { channel: channel.clone(), buffer: RefCell::new(vec![0; LONGEST]) };
    (mailbox, Outbox { channel, queue: RefCell::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    #[test]
    fn a_command_whose_descriptors_do_not_fit_is_not_the_end() {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (control, engine) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (mailbox, _outbox) = engines_ends(engine);
        let send = |head: &Head| {
            // More than one message of ours has room for: that looks the same as a full table.
            let too_many = [control.as_fd(); sys::MOST_DESCRIPTORS + 1];
            let words = serde_json::to_vec(head).unwrap();
            sys::send_with_descriptors(control.as_fd(), &words, &too_many).unwrap();
        };
        let sources = crate::source::Sources::default;
        send(&Head::Plain(Plain::Report));
        assert!(matches!(mailbox.next(), Some(Received::Command(EngineCommand::Plain(Plain::Stop)))));
        send(&Head::Ready { target: 7, addresses: vec![None; 16], guarded: false, sources: sources() });
        // What a longer message before it has left is no part of it.
        send(&Head::Ready { target: 3, addresses: vec![None], guarded: false, sources: sources() });
        assert!(matches!(mailbox.next(), Some(Received::WithoutDescriptors(Some(7)))));
        assert!(matches!(mailbox.next(), Some(Received::WithoutDescriptors(Some(3)))));
        assert!(mailbox.next().is_none());
    }
}
