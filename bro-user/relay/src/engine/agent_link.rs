//! The engine's end of the channel to the agent in a target's namespace: which connections wait for an answer of it, and the
//! unconnected sockets that it has made.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};

use bro_sockmap::{Flow, HookRequest};
use nix::errno::Errno;
use slab::Slab;

use super::targets::ReadyTarget;
use crate::connection::Connection;
use crate::flows::{FlowId, FlowQueue};
use crate::netns::wire::{self, AgentAnswer, AgentRequest};
use crate::source::{self, Origin};

/// The most connections asked of the agent at a time: a channel takes some hundred requests before it is full.
pub(super) const AT_ONCE: usize = 64;

/// Unconnected sockets asked for at a time, so that the agent is woken once for many connections; fewer where few connections
/// are allowed, since each is a descriptor.
const POOL: usize = 16;

/// With this few left, more are asked for.
const LOW: usize = 4;

/// A connection that is to be made to one of the target's addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt {
    /// The connection's place in the table, and its number, for another connection may have the place by now.
    pub(super) index: usize,
    pub(super) number: u64,
    /// The address's number.
    pub(super) address: usize,
    /// The client's own port could not be used.
    pub(super) any_port: bool,
}

/// What was asked of the agent.
#[derive(Debug, Clone, Copy)]
enum AgentTask {
    /// To connect.
    Connect(Attempt),
    /// For sockets of the family of this address.
    Sockets { address: usize },
    /// To make a flow's socket.
    Flow(FlowId),
    /// To hook a sender.
    Hook,
}

/// What the agent has answered.
#[derive(Debug)]
pub(super) enum Answered {
    /// Nothing that a connection waits for.
    Nothing,
    /// A connection is made, or could not be.
    Connection(Attempt, AgentAnswer),
    /// These waited for sockets, which are there now, or could not be made.
    Sockets(VecDeque<Attempt>, Result<(), Errno>),
    /// A flow's socket is made, or could not be.
    Flow(FlowId, AgentAnswer),
    /// It has ended.
    Ended(io::Error),
}

/// The way to a target's service.
#[derive(Debug)]
pub(super) struct AgentLink {
    pub(super) ready: ReadyTarget,
    /// Unconnected sockets of the families of IPv4 and IPv6.
    pool: [Vec<OwnedFd>; 2],
    /// What was asked of the agent, in order; it answers in order.
    asked: VecDeque<AgentTask>,
    /// What is to be asked when it has answered.
    to_ask: VecDeque<Attempt>,
    /// Flows whose sockets are to be asked for, each with the address that it is to come from.
    flows_to_ask: FlowQueue<Option<SocketAddr>>,
    /// Connections that wait for a socket.
    awaiting_socket: VecDeque<Attempt>,
    /// It has been said that the service's unix socket does not admit the connecting user.
    not_admitted: bool,
}

/// The errors that pass once something is let go of elsewhere.
pub(super) const fn out_of_descriptors(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

impl AgentLink {
    pub(super) fn new(ready: ReadyTarget) -> Self {
        Self {
            ready,
            pool: [Vec::new(), Vec::new()],
            asked: VecDeque::new(),
            to_ask: VecDeque::new(),
            flows_to_ask: FlowQueue::default(),
            awaiting_socket: VecDeque::new(),
            not_admitted: false,
        }
    }

    /// Every connection that waits for the agent.
    pub(super) fn attempts(&self) -> Vec<Attempt> {
        let asked = self.asked.iter().filter_map(|asked| match asked {
            AgentTask::Connect(attempt) => Some(attempt),
            AgentTask::Sockets { .. } | AgentTask::Flow(_) | AgentTask::Hook => None,
        });
        asked.chain(&self.to_ask).chain(&self.awaiting_socket).copied().collect()
    }

    /// The address at which this process may connect to the service itself: one on TCP, in a namespace that stays the same.
    pub(super) fn open_address(&self, number: usize) -> Option<SocketAddr> {
        self.ready.addresses.get(number).copied().flatten().filter(|_| !self.ready.guarded)
    }

    /// As whom a client is connected to the service at `address`.
    pub(super) fn source(&self, origin: Origin, address: SocketAddr, any_port: bool) -> Option<SocketAddr> {
        let source = self.ready.sources.of(origin, address)?;
        Some(if any_port { source::any_port(source) } else { source })
    }

    /// A socket for that, if one is left.
    pub(super) fn take_socket(&mut self, address: SocketAddr) -> Option<OwnedFd> {
        self.pool[usize::from(address.is_ipv6())].pop()
    }

    /// Has a connection wait until there is one.
    pub(super) fn await_socket(&mut self, attempt: Attempt) {
        self.awaiting_socket.push_back(attempt);
    }

    /// Asks for more sockets when few are left and none are on the way; `most`: how many connections there may be. An error means
    /// that there is no agent any more.
    pub(super) fn replenish(&mut self, address: usize, family: SocketAddr, most: usize) -> io::Result<()> {
        let on_the_way = self.asked.iter().any(|asked| {
            let AgentTask::Sockets { address } = asked else { return false };
            self.ready.addresses[*address].is_some_and(|other| other.is_ipv4() == family.is_ipv4())
        });
        if on_the_way || self.pool[usize::from(family.is_ipv6())].len() >= LOW {
            return Ok(());
        }
        let count = u8::try_from((most / 4).clamp(1, POOL)).unwrap_or(1);
        let number = u8::try_from(address).unwrap_or(u8::MAX);
        self.ask(&AgentRequest::Supply(number, count), AgentTask::Sockets { address })
    }

    /// Has the agent make a connection, as soon as it may be asked.
    pub(super) fn connect(&mut self, attempt: Attempt) {
        self.to_ask.push_back(attempt);
    }

    /// Asks the agent for what waits, as far as it may be asked. An error means that there is no agent any more.
    pub(super) fn ask_on(&mut self, connections: &Slab<Connection>) -> io::Result<()> {
        while self.asked.len() < AT_ONCE
            && let Some(attempt) = self.to_ask.pop_front()
        {
            let Some(connection) = connections.get(attempt.index) else { continue };
            let tcp = self.ready.addresses.get(attempt.address).copied().flatten();
            let source = tcp.and_then(|tcp| self.source(connection.origin, tcp, false));
            let number = u8::try_from(attempt.address).unwrap_or(u8::MAX);
            self.ask(&AgentRequest::Dial(number, source), AgentTask::Connect(attempt))?;
        }
        while self.asked.len() < AT_ONCE
            && let Some((flow, source)) = self.flows_to_ask.pop()
        {
            self.ask(&AgentRequest::Dial(0, source), AgentTask::Flow(flow))?;
        }
        Ok(())
    }

    /// Has the agent make a flow's socket, as soon as it may be asked.
    pub(super) fn dial_flow(&mut self, flow: FlowId, source: Option<SocketAddr>) {
        self.flows_to_ask.push(flow, source);
    }

    /// A flow that may wait for its socket has ended.
    pub(super) fn forget_flow(&mut self, flow: FlowId) {
        self.flows_to_ask.forget(flow);
    }

    /// Has the agent hook a sender in its namespace, if it may be asked now. One that is not hooked is spliced.
    pub(super) fn hook(&mut self, flow: Flow, cookie: u64) -> io::Result<()> {
        if self.asked.len() >= AT_ONCE {
            return Ok(());
        }
        let request = AgentRequest::Hook(Box::new(HookRequest { flow, cookie }.packet()));
        self.ask(&request, AgentTask::Hook)
    }

    fn ask(&mut self, request: &AgentRequest, asked: AgentTask) -> io::Result<()> {
        self.asked.push_back(asked);
        request.send(self.ready.channel.as_fd(), &[])
    }

    /// Takes the next answer; `None` when there is none yet.
    pub(super) fn answer(&mut self) -> Option<Answered> {
        let answer = match wire::receive_answer(self.ready.channel.as_fd()) {
            Ok(answer) => answer,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // The answer came, but its descriptors did not fit: as if the agent had said so.
            Err(error) if out_of_descriptors(crate::sys::errno_of(&error)) => {
                Err(crate::sys::errno_of(&error))
            }
            Err(error) => return Some(Answered::Ended(error)),
        };
        Some(match self.asked.pop_front()? {
            AgentTask::Connect(attempt) => Answered::Connection(attempt, answer),
            AgentTask::Flow(flow) => Answered::Flow(flow, answer),
            AgentTask::Sockets { address } => {
                let ipv6 = self.ready.addresses[address].is_some_and(|address| address.is_ipv6());
                let made = answer.map(|sockets| self.pool[usize::from(ipv6)].extend(sockets));
                Answered::Sockets(std::mem::take(&mut self.awaiting_socket), made)
            }
            AgentTask::Hook => {
                if let Err(errno) = answer {
                    tracing::debug!(
                        error = errno.desc(),
                        "the service's socket could not be hooked and is spliced"
                    );
                }
                Answered::Nothing
            }
        })
    }

    /// It is to be said now that the service's unix socket does not admit the agent's user.
    pub(super) const fn announces_not_admitted(&mut self) -> bool {
        !std::mem::replace(&mut self.not_admitted, true)
    }

    /// A connection has ended.
    pub(super) fn forget(&mut self, index: usize) {
        self.to_ask.retain(|attempt| attempt.index != index);
        self.awaiting_socket.retain(|attempt| attempt.index != index);
    }
}
