//! A client's way on, from top to bottom: its target is ready, so it is given a socket in the service's namespace, connected, and
//! relayed from then on. What may come in between is at the end: the target refuses, is lost, or there is no port.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{SockType, SockaddrStorage, getpeername, getsockopt, sockopt};

use super::Engine;
use super::agent_link::{AT_ONCE, Answered, Attempt, out_of_descriptors};
use super::socket_options::set_options;
use super::targets::{Frozen, slot};
use crate::connection::{Connection, End, Stage};
use crate::listener::SocketKind;
use crate::netns::wire;
use crate::peer::Peer;
use crate::relay::{DescriptorGuard, Direction, Method, Side};
use crate::source;

/// How often the kernel is asked whether there is a source port again.
pub(super) const PORT_STEP: Duration = Duration::from_millis(20);

/// The connections, by place and number, for which the kernel had no source port.
#[derive(Debug)]
pub(super) struct PortQueue {
    waiting: VecDeque<(usize, u64)>,
    /// When the kernel was asked last.
    asked: Instant,
}

impl PortQueue {
    pub(super) fn new() -> Self {
        Self { waiting: VecDeque::new(), asked: Instant::now() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

const fn awaits_socket(connection: &Connection) -> bool {
    matches!(connection.stage(), Stage::AwaitingSocket)
}

/// The errors that mean “nothing listens there (yet)”.
pub(super) const fn nothing_listens(errno: Errno) -> bool {
    matches!(errno, Errno::ECONNREFUSED | Errno::ENOENT | Errno::ENETUNREACH)
}

impl Engine {
    /// Begins to connect to one of the target's addresses, as the client or (with `any_port`) from another port of its address.
    pub(super) fn start_connect(&mut self, index: usize, address: usize, any_port: bool) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let target = connection.target;
        let Some(link) = self.targets[target].link() else { return self.hold(index, false) };
        connection.set_stage(&mut self.census, |_| Stage::AwaitingSocket);
        let attempt = Attempt { index, number: connection.number, address, any_port };
        let (Some(tcp), Some(book)) = (link.open_address(address), &self.addresses) else {
            link.connect(attempt);
            self.register(index);
            return self.ask_agent(target);
        };
        let socket = link.take_socket(tcp);
        let source = link.source(connection.origin, tcp, any_port);
        let replenished = link.replenish(address, tcp, self.settings.connections_max);
        match socket {
            Some(socket) => {
                let bound = source.map_or(Ok(()), |source| source::bind_to(socket.as_fd(), source));
                let connect = |()| book.connect(socket.as_fd(), slot(target, address), tcp.is_ipv4());
                match bound.and_then(connect) {
                    Ok(()) | Err(Errno::EINPROGRESS) => self.connecting(attempt, socket),
                    // The kernel still holds the last connection from this port to there.
                    Err(Errno::EADDRNOTAVAIL) if source.is_some_and(|source| source.port() != 0) => {
                        self.start_connect(index, address, true);
                    }
                    Err(errno) => self.refused(index, address, errno),
                }
            }
            None => {
                link.await_socket(attempt);
                self.register(index);
            }
        }
        if replenished.is_err() {
            self.target_gone(target);
        }
    }

    /// Asks the agent for what waits, as far as it may be asked.
    pub(super) fn ask_agent(&mut self, target: usize) {
        let Some(link) = self.targets[target].link() else { return };
        if let Err(error) = link.ask_on(&self.connections) {
            tracing::warn!(%error, "the namespace agent does not take requests");
            self.target_gone(target);
        }
    }

    /// The agent in a target's namespace has answered, or has ended.
    pub(super) fn agent_answered(&mut self, target: usize) {
        let Some(answered) = self.targets[target].link().and_then(|link| link.answer()) else { return };
        match answered {
            Answered::Nothing => {}
            Answered::Flow(flow, answer) => {
                self.flow_dialled(target, flow, answer.map(|mut sockets| sockets.pop()));
            }
            Answered::Connection(attempt, answer) => {
                self.agent_connected(attempt, answer.map(|mut sockets| sockets.pop()));
            }
            // The agent has made sockets: the connections that wait for one begin anew.
            Answered::Sockets(attempts, made) => {
                for attempt in attempts {
                    if !self.waits_for(attempt) {
                        continue;
                    }
                    match made {
                        Ok(()) => self.start_connect(attempt.index, attempt.address, attempt.any_port),
                        // The client waits until one is free.
                        Err(errno) if out_of_descriptors(errno) => self.try_again(attempt),
                        Err(errno) => self.refused(attempt.index, attempt.address, errno),
                    }
                }
            }
            Answered::Ended(error) => {
                tracing::debug!(%error, "the namespace agent has ended");
                return self.target_gone(target);
            }
        }
        self.ask_agent(target);
    }

    /// The agent has made a connection itself, or could not.
    fn agent_connected(&mut self, attempt: Attempt, answer: Result<Option<OwnedFd>, Errno>) {
        if !self.waits_for(attempt) {
            return;
        }
        match answer {
            Ok(Some(service)) => self.connecting(attempt, service),
            Ok(None) => self.refused(attempt.index, attempt.address, Errno::EPROTO),
            // A unix service's backlog is full, and nothing tells when there is room; or a descriptor is missing.
            Err(errno) if errno == Errno::EAGAIN || out_of_descriptors(errno) => self.try_again(attempt),
            // This client, and each one after it, is served in the namespace that the file names now.
            Err(wire::STALE) => {
                let Some(connection) = self.connections.get(attempt.index) else { return };
                self.target_gone(connection.target);
                self.hold(attempt.index, false);
            }
            Err(errno) => self.refused(attempt.index, attempt.address, errno),
        }
    }

    /// The service has been connected to, or is about to be.
    fn connecting(&mut self, attempt: Attempt, service: OwnedFd) {
        let Attempt { index, address, .. } = attempt;
        let connection = &mut self.connections[index];
        let is_tcp = self.targets[connection.target].address(address).is_some();
        // On this host the handshake is over by the time connect returns (`release_sock` has processed the answer).
        let done = !is_tcp || getpeername::<SockaddrStorage>(service.as_raw_fd()).is_ok();
        connection.set_stage(&mut self.census, |_| Stage::Connecting { service, address });
        if done { self.start_relay(index) } else { self.register(index) }
    }

    /// A connection that was in progress has succeeded or failed.
    pub(super) fn connect_event(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let Stage::Connecting { service, address } = connection.stage() else { return };
        let (error, address) = (getsockopt(service, sockopt::SocketError), *address);
        if error == Ok(0) {
            return self.start_relay(index);
        }
        self.epoll.delete(service.as_fd()).ok();
        connection.set_stage(&mut self.census, |_| Stage::AwaitingSocket);
        self.refused(index, address, error.map_or_else(|errno| errno, Errno::from_raw));
    }

    /// The service has accepted: bytes may flow.
    fn start_relay(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let Stage::Connecting { service, address } = connection.stage() else { return };
        let mut method = self.settings.method;
        let address = self.targets[connection.target].address(*address);
        if address.is_none() {
            let messages = self.listeners.kind(connection.listener) == SocketKind::SeqPacket;
            // The agent connects to whichever kind listens there.
            let same = messages == (getsockopt(service, sockopt::SockType) == Ok(SockType::SeqPacket));
            if !same {
                return self.finish(index, End::Refused(Errno::EPROTOTYPE));
            }
            method = if messages { Method::Messages } else { method };
        }
        set_options(service, address.map(|address| address.ip().to_canonical()), self.settings.keepalive);
        let from_client =
            if matches!(connection.neighbour(), Peer::Vsock { .. }) { Method::Vsock } else { method };
        let (mut up, mut down) =
            (Direction::new(Side::Client, from_client), Direction::new(Side::Service, method));
        up.set_guard(connection.guard);
        if address.is_none() {
            down.set_guard(DescriptorGuard::of(service.as_fd()));
        }
        if let Some(version) = self.settings.proxy_protocol {
            up.precede(version.header(connection.ends()));
        }
        // What a balancer in front sent for us is part of what its socket has sent.
        up.keep(connection.through.as_ref().map_or(0, |through| through.header));
        connection.set_stage(&mut self.census, |stage| match stage {
            Stage::Connecting { service, .. } => Stage::Relaying { service, up, down, abort: None },
            other => other,
        });
        if let Some(span) = connection.cold_start {
            self.tallies[connection.listener].cold_start_times.add(span);
        }
        self.pump(index, true, false);
    }

    /// Does the connection still wait for this?
    fn waits_for(&self, attempt: Attempt) -> bool {
        let connection = self.connections.get(attempt.index);
        connection.is_some_and(|connection| connection.number == attempt.number && awaits_socket(connection))
    }

    /// Tries once more at a later tick: what was missing may be there then.
    fn try_again(&mut self, attempt: Attempt) {
        self.retries.push(attempt.index);
        self.register(attempt.index);
    }

    pub(super) fn retry_connect(&mut self, index: usize) {
        if self.connections.get(index).is_some_and(awaits_socket) {
            self.start_connect(index, 0, false);
        }
    }

    /// An address refused: the next one, or back to waiting if nothing listens any more, or the end.
    fn refused(&mut self, index: usize, number: usize, errno: Errno) {
        let Some(connection) = self.connections.get(index) else { return };
        let target = &mut self.targets[connection.target];
        if let Some(link) = target.link() {
            let addresses = &link.ready.addresses;
            if number.saturating_add(1) < addresses.len() {
                return self.start_connect(index, number + 1, false);
            }
            let is_unix = addresses.get(number).copied().flatten().is_none();
            if errno == Errno::EACCES && is_unix && link.announces_not_admitted() {
                tracing::warn!(
                    target = %target.name,
                    "the service's unix socket does not let the user in as whom this forwarder connects (--unix-identity): open \
                     the socket and the folders above it to that user, or name another one"
                );
            }
        }
        let patient = connection.active.elapsed() < self.settings.hold_limit;
        if errno == Errno::EADDRNOTAVAIL && patient {
            return self.wait_for_a_port(index);
        }
        if !(self.settings.hold_refused && nothing_listens(errno) && patient) {
            return self.finish(index, End::Refused(errno));
        }
        tracing::debug!(
            conn = connection.number,
            error = errno.desc(),
            "the service refused; waiting for it again"
        );
        self.target_lost(connection.target, true);
        self.hold(index, true);
    }

    /// The service went to sleep, or its namespace is gone: the clients that still wait for a socket there are held again.
    pub(super) fn target_gone(&mut self, target: usize) {
        self.target_lost(target, false);
    }

    /// As above; after a refusal, the clients that waited beside the refused one are in no more hurry than it is.
    fn target_lost(&mut self, target: usize, refused: bool) {
        if !self.targets[target].is_ready() {
            // Asleep already, or waking: then the control process is at it.
            return;
        }
        let Some(link) = self.targets[target].sleeps() else { return };
        let attempts = link.attempts();
        drop(link);
        // The clients that were held since it was frozen have it woken now.
        let held = self.targets[target].take_held();
        if !self.targets.any_ready() {
            self.targets.frozen = Frozen::No;
        }
        for attempt in attempts {
            if self.waits_for(attempt) {
                self.hold(attempt.index, refused);
            }
        }
        for index in held {
            self.hold(index, refused);
        }
        self.flows_lost(target, refused);
    }

    /// Nothing is bound at a target for datagrams any more.
    pub(super) fn target_refused(&mut self, target: usize) {
        self.target_lost(target, true);
    }

    /// The kernel has no source port for a connection to the target. That is no refusal of the service's, which goes on serving the
    /// connected clients. This client, and no other, waits until a port is free.
    fn wait_for_a_port(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        connection.set_stage(&mut self.census, |_| Stage::AwaitingSocket);
        let target = &mut self.targets[connection.target];
        if target.announces_ports() {
            tracing::warn!(
                "the namespace has no free source port towards {} (net.ipv4.ip_local_port_range, net.ipv4.tcp_tw_reuse); a client \
                 waits until it has one",
                target.name
            );
        }
        self.ports.waiting.push_back((index, connection.number));
        self.register(index);
    }

    /// Tries again for the clients that wait for a source port. To find that there is none the kernel looks at all of them, so one
    /// client tries for all, and the next ones only where it had one.
    pub(super) fn look_for_ports(&mut self, now: Instant) {
        if self.ports.is_empty() || now.duration_since(self.ports.asked) < PORT_STEP {
            return;
        }
        self.ports.asked = now;
        for _ in 0..AT_ONCE {
            let Some((index, number)) = self.ports.waiting.pop_front() else { return };
            if self.connections.get(index).is_none_or(|connection| connection.number != number) {
                continue;
            }
            self.retry_connect(index);
            if self.connections.get(index).is_some_and(awaits_socket) {
                // It keeps its place.
                if self.ports.waiting.back() == Some(&(index, number)) {
                    self.ports.waiting.rotate_right(1);
                }
                return;
            }
        }
    }
}
