//! Targets as the engine sees them: asleep, waking with clients held, or ready with an agent in their namespace that connects.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use bro_sockmap::{Flow, HookRequest};
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockopt, sockopt};

use super::Engine;
use super::frozen::Frost;
use super::token::Token;
use crate::connection::{Connection, End, Registration, Stage};
use crate::engine::protocol::Event;
use crate::netns::wire::{self, Answer, Destinations, Request};
use crate::source::{self, Sources};
use crate::stats::Stats;

/// A target that listens.
#[derive(Debug)]
pub struct Destination {
    /// Its addresses, tried in order, with what is known here of the ones on TCP. Not empty.
    pub addresses: Vec<Option<SocketAddr>>,
    /// Each connection has to ask the agent, for its namespace may be another one by then.
    pub guarded: bool,
    /// From which addresses they are connected to.
    pub sources: Sources,
    /// The agent that connects to them, by their numbers, or makes sockets for that.
    pub channel: OwnedFd,
}

/// Where an address of a target stands in the address book.
#[must_use]
pub const fn slot(backend: usize, address: usize) -> usize {
    backend * Destinations::MOST + address
}

/// The most connections asked of the agent at a time: a channel takes some hundred requests before it is full.
const AT_ONCE: usize = 64;

/// A connection that the agent is to make, or is making.
#[derive(Debug, Clone, Copy)]
struct Dial {
    /// The connection's place in the table, and its number, for another connection may have the place by now.
    index: usize,
    number: u64,
    /// The address's number.
    address: usize,
    /// The client's own port could not be used.
    any_port: bool,
}

/// Unconnected sockets asked for at a time, so that the agent is woken once for many connections; fewer where few connections
/// are allowed, since each is a descriptor.
const SUPPLY: usize = 16;

/// How often the kernel is asked whether there is a source port again.
pub(super) const PORT: Duration = Duration::from_millis(20);

/// With this few left, more are asked for.
const LOW: usize = 4;

/// What was asked of the agent.
#[derive(Debug, Clone, Copy)]
enum Asked {
    /// To connect.
    Dial(Dial),
    /// For sockets of the family of this address.
    Sockets { address: usize },
    /// To hook a sender.
    Hook,
}

#[derive(Debug)]
struct Supply {
    destination: Destination,
    /// Unconnected sockets of the families of IPv4 and IPv6.
    sockets: [Vec<OwnedFd>; 2],
    /// What was asked of the agent, in order; it answers in order.
    asked: VecDeque<Asked>,
    /// What is to be asked when it has answered.
    waiting: VecDeque<Dial>,
    /// Connections that wait for a socket.
    thirsty: VecDeque<Dial>,
    /// It has been said that the service's unix socket does not admit the connecting user.
    not_admitted: bool,
}

impl Supply {
    /// Every connection that waits for the agent.
    fn dials(&self) -> Vec<Dial> {
        let asked = self.asked.iter().filter_map(|asked| match asked {
            Asked::Dial(dial) => Some(dial),
            Asked::Sockets { .. } | Asked::Hook => None,
        });
        asked.chain(&self.waiting).chain(&self.thirsty).copied().collect()
    }

    /// Asks; an error means that there is no agent any more.
    fn ask(&mut self, request: &Request, asked: Asked) -> io::Result<()> {
        self.asked.push_back(asked);
        request.send(self.destination.channel.as_fd(), &[])
    }

    /// Asks for more sockets when few are left and none are on the way.
    fn replenish(&mut self, address: usize, family: SocketAddr, most: usize) -> io::Result<()> {
        let on_the_way = self.asked.iter().any(|asked| {
            let Asked::Sockets { address } = asked else { return false };
            self.destination.addresses[*address].is_some_and(|other| other.is_ipv4() == family.is_ipv4())
        });
        if on_the_way || self.sockets[usize::from(family.is_ipv6())].len() >= LOW {
            return Ok(());
        }
        let count = u8::try_from((most / 4).clamp(1, SUPPLY)).unwrap_or(1);
        let number = u8::try_from(address).unwrap_or(u8::MAX);
        self.ask(&Request::Supply(number, count), Asked::Sockets { address })
    }
}

#[derive(Debug)]
enum State {
    Asleep,
    Waking,
    Ready(Box<Supply>),
}

/// A target.
#[derive(Debug)]
pub(super) struct Backend {
    /// Its name in the log.
    pub(super) name: String,
    /// The cookie of the namespace in which the kernel relay's programs watch the service, if they do.
    pub(super) watched: Option<u64>,
    /// It was said that there is no source port towards it.
    ports_announced: bool,
    /// It was asked whether the service runs, for the clients that wake nothing.
    knocking: bool,
    state: State,
    held: VecDeque<usize>,
}

impl Backend {
    /// Neither ready nor being woken.
    pub(super) const fn is_asleep(&self) -> bool {
        matches!(self.state, State::Asleep)
    }

    pub(super) const fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }

    pub(super) const fn is_waking(&self) -> bool {
        matches!(self.state, State::Waking)
    }

    pub(super) const fn asleep(name: String) -> Self {
        Self {
            name,
            watched: None,
            ports_announced: false,
            knocking: false,
            state: State::Asleep,
            held: VecDeque::new(),
        }
    }
}

/// The errors that pass once something is let go of elsewhere.
const fn out_of_descriptors(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

/// The errors that mean “nothing listens there (yet)”.
const fn has_no_listener(errno: Errno) -> bool {
    matches!(errno, Errno::ECONNREFUSED | Errno::ENOENT | Errno::ENETUNREACH)
}

impl Engine {
    /// A newly admitted (or refused) connection: to the service if it is ready, else held.
    pub(super) fn place(&mut self, index: usize) {
        let backend = self.connections[index].backend;
        if let State::Ready(_) = &self.backends[backend].state {
            if self.frost == Frost::None {
                return self.start_connect(index, 0, false);
            }
            if self.connections[index].wakes_nothing && self.frost == Frost::Frozen {
                self.ignore(index);
                return self.finish(index, End::WakeIgnored);
            }
        }
        if !self.connections[index].wakes_nothing && self.are_bytes_to_wake() {
            return self.wait_for_a_byte(index);
        }
        self.hold(index, false);
    }

    /// Wakes whatever sleeps, although no client has connected (`bro wake`).
    pub(super) fn wake_by_hand(&mut self, by: &str) {
        self.ask_to_thaw(by);
        for (index, backend) in self.backends.iter_mut().enumerate() {
            if backend.is_asleep() {
                backend.state = State::Waking;
                self.outbox.tell(&Event::Wake {
                    backend: index,
                    peer: by.to_owned(),
                    source: None,
                    refused: false,
                });
            }
        }
    }

    pub(super) fn hold(&mut self, index: usize, refused: bool) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        connection.stage = Stage::Held;
        connection.registered[1] = Registration::Absent;
        let backend = &mut self.backends[connection.backend];
        backend.held.push_back(index);
        if matches!(backend.state, State::Asleep) && connection.wakes_nothing {
            if !std::mem::replace(&mut backend.knocking, true) {
                self.outbox
                    .tell(&Event::Knock { backend: connection.backend, peer: connection.peer.to_string() });
            }
        } else if matches!(backend.state, State::Asleep) {
            backend.state = State::Waking;
            connection.woke |= !refused;
            let wake = Event::Wake {
                backend: connection.backend,
                peer: connection.peer.to_string(),
                source: Some(connection.peer.source().to_string()),
                refused,
            };
            if !refused {
                self.tallies[connection.listener].cold_starts += 1;
            }
            self.outbox.tell(&wake);
        } else if matches!(backend.state, State::Ready(_)) && self.frost == Frost::Frozen {
            connection.woke = true;
            let peer = connection.peer.to_string();
            self.ask_to_thaw(&peer);
        }
        self.register(index);
        self.publish_held();
    }

    /// The clients that are held for targets that are ready, in the order in which they came; they are held no more.
    pub(super) fn held_by_frost(&mut self) -> Vec<usize> {
        let mut held = Vec::new();
        for backend in self.backends.iter_mut().filter(|backend| backend.is_ready()) {
            held.extend(backend.held.drain(..));
        }
        held.sort_by_key(|&index| self.connections[index].number);
        self.publish_held();
        held
    }

    fn publish_held(&self) {
        Stats::set(&self.stats.held, self.backends.iter().map(|backend| backend.held.len() as u64).sum());
    }

    pub(super) fn backend_ready(&mut self, backend: usize, destination: Destination) {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Agent(backend).into());
        if let Err(errno) = self.epoll.add(destination.channel.as_fd(), event) {
            tracing::error!(error = errno.desc(), "cannot watch the namespace agent");
            return self.backend_failed(backend, End::StartFailed);
        }
        let supply = Supply {
            destination,
            sockets: [Vec::new(), Vec::new()],
            asked: VecDeque::new(),
            waiting: VecDeque::new(),
            thirsty: VecDeque::new(),
            not_admitted: false,
        };
        self.backends[backend].state = State::Ready(Box::new(supply));
        // In the order in which they came; that includes the clients that were held again after a refusal.
        let mut held: Vec<usize> = self.backends[backend].held.drain(..).collect();
        held.sort_by_key(|&index| self.connections[index].number);
        self.publish_held();
        // For the clients to come: a service that was just woken is not idle yet.
        self.stats.now_idle();
        for index in held {
            self.place(index);
        }
        self.let_silent_clients_in();
    }

    /// The table of descriptors was full when the descriptors of a target, or of the kernel relay, came.
    pub(super) fn lacks_descriptors(&mut self, backend: Option<usize>) {
        let Some(target) = backend.and_then(|backend| self.backends.get(backend)) else {
            return tracing::warn!(
                "no descriptors for the kernel relay are left (LimitNOFILE=); bytes are spliced"
            );
        };
        let name = &target.name;
        tracing::warn!(
            "no descriptor for the way to {name} is left (LimitNOFILE=); its clients wait until there is one"
        );
        // As after a refusal: it is tried again, after a while.
        let (backend, peer) = (backend.unwrap_or_default(), String::new());
        self.outbox.tell(&Event::Wake { backend, peer, source: None, refused: true });
    }

    pub(super) fn backend_failed(&mut self, backend: usize, end: End) {
        self.backends[backend].state = State::Asleep;
        for index in std::mem::take(&mut self.backends[backend].held) {
            self.finish(index, end);
        }
        self.publish_held();
    }

    /// Whether the service runs, for the clients that wake nothing: they wait until it is found, or are reset. Where another client
    /// wakes it by now, they wait with that one.
    pub(super) fn knocked(&mut self, backend: usize, runs: bool) {
        let Some(known) = self.backends.get_mut(backend) else { return };
        known.knocking = false;
        if !known.is_asleep() {
            return;
        }
        if runs {
            known.state = State::Waking;
            return;
        }
        for index in std::mem::take(&mut known.held) {
            self.ignore(index);
            self.finish(index, End::WakeIgnored);
        }
        self.publish_held();
    }

    /// The service went to sleep, or its namespace is gone: the clients that still wait for a socket there are held again.
    pub(super) fn backend_gone(&mut self, backend: usize) {
        self.backend_lost(backend, false);
    }

    /// As above; after a refusal, the clients that waited beside the refused one are in no more hurry than it is.
    fn backend_lost(&mut self, backend: usize, refused: bool) {
        let State::Ready(supply) = std::mem::replace(&mut self.backends[backend].state, State::Asleep) else {
            // Asleep already, or waking: then the control process is at it.
            return;
        };
        let dials = supply.dials();
        drop(supply);
        // The clients that were held since it was frozen have it woken now.
        let held = std::mem::take(&mut self.backends[backend].held);
        if !self.backends.iter().any(Backend::is_ready) {
            self.frost = Frost::None;
        }
        for dial in dials {
            if self.is_dialling(dial) {
                self.hold(dial.index, refused);
            }
        }
        for index in held {
            self.hold(index, refused);
        }
    }

    /// Does the connection still wait for this?
    fn is_dialling(&self, dial: Dial) -> bool {
        self.connections.get(dial.index).is_some_and(|connection| {
            connection.number == dial.number && matches!(connection.stage, Stage::AwaitingSocket)
        })
    }

    /// Tries once more at a later tick: what was missing may be there then.
    fn try_again(&mut self, dial: Dial) {
        self.retries.push(dial.index);
        self.register(dial.index);
    }

    /// Begins to connect to one of the target's addresses, as the client or (with `any_port`) from another port of its address.
    fn start_connect(&mut self, index: usize, address: usize, any_port: bool) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let backend = connection.backend;
        let State::Ready(supply) = &mut self.backends[backend].state else { return self.hold(index, false) };
        connection.stage = Stage::AwaitingSocket;
        let dial = Dial { index, number: connection.number, address, any_port };
        let origin = connection.origin;
        let most = self.settings.connections_max;
        let tcp = supply.destination.addresses.get(address).copied().flatten();
        match (tcp.filter(|_| !supply.destination.guarded), &self.addresses) {
            (Some(tcp), Some(book)) => {
                let socket = supply.sockets[usize::from(tcp.is_ipv6())].pop();
                let source = supply.destination.sources.of(origin, tcp);
                let source = source.map(|source| if any_port { source::any_port(source) } else { source });
                let replenished = supply.replenish(address, tcp, most);
                match socket {
                    Some(socket) => {
                        let bound = source.map_or(Ok(()), |source| source::bind_to(socket.as_fd(), source));
                        let connect =
                            |()| book.connect(socket.as_fd(), slot(backend, address), tcp.is_ipv4());
                        match bound.and_then(connect) {
                            Ok(()) | Err(Errno::EINPROGRESS) => self.dialled(dial, socket),
                            // The kernel still holds the last connection from this port to there.
                            Err(Errno::EADDRNOTAVAIL) if source.is_some_and(|source| source.port() != 0) => {
                                self.start_connect(index, address, true);
                            }
                            Err(errno) => self.refused(index, address, errno),
                        }
                    }
                    None => {
                        supply.thirsty.push_back(dial);
                        self.register(index);
                    }
                }
                if replenished.is_err() {
                    self.backend_gone(backend);
                }
            }
            _ => {
                supply.waiting.push_back(dial);
                self.register(index);
                self.dial_waiting(backend);
            }
        }
    }

    /// Asks the agent for what waits, as far as it may be asked.
    fn dial_waiting(&mut self, backend: usize) {
        let State::Ready(supply) = &mut self.backends[backend].state else { return };
        while supply.asked.len() < AT_ONCE
            && let Some(dial) = supply.waiting.pop_front()
        {
            let Some(connection) = self.connections.get(dial.index) else { continue };
            let Destination { addresses, sources, .. } = &supply.destination;
            let tcp = addresses.get(dial.address).copied().flatten();
            let source = tcp.and_then(|tcp| sources.of(connection.origin, tcp));
            let request = Request::Dial(u8::try_from(dial.address).unwrap_or(u8::MAX), source);
            if let Err(error) = supply.ask(&request, Asked::Dial(dial)) {
                tracing::warn!(%error, "the namespace agent does not take requests");
                return self.backend_gone(backend);
            }
        }
    }

    pub(super) fn agent_answered(&mut self, backend: usize) {
        let State::Ready(supply) = &mut self.backends[backend].state else { return };
        let answer = match wire::receive_answer(supply.destination.channel.as_fd()) {
            Ok(answer) => answer,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // The answer came, but its descriptors did not fit: as if the agent had said so.
            Err(error) if out_of_descriptors(crate::sys::errno_of(&error)) => {
                Err(crate::sys::errno_of(&error))
            }
            Err(error) => {
                tracing::debug!(%error, "the namespace agent has ended");
                return self.backend_gone(backend);
            }
        };
        let dial = match supply.asked.pop_front() {
            None => return,
            Some(Asked::Dial(dial)) => dial,
            Some(Asked::Sockets { address }) => return self.sockets_came(backend, address, answer),
            Some(Asked::Hook) => {
                if let Err(errno) = answer {
                    tracing::debug!(
                        error = errno.desc(),
                        "the service's socket could not be hooked and is spliced"
                    );
                }
                return self.dial_waiting(backend);
            }
        };
        if self.is_dialling(dial) {
            match answer.map(|mut sockets| sockets.pop()) {
                Ok(Some(service)) => self.dialled(dial, service),
                Ok(None) => self.refused(dial.index, dial.address, Errno::EPROTO),
                // A unix service's backlog is full, and nothing tells when there is room; or a descriptor is missing.
                Err(errno) if errno == Errno::EAGAIN || out_of_descriptors(errno) => {
                    self.try_again(dial);
                }
                // This client, and each one after it, is served in the namespace that the file names now.
                Err(wire::STALE) => {
                    self.backend_gone(backend);
                    self.hold(dial.index, false);
                }
                Err(errno) => self.refused(dial.index, dial.address, errno),
            }
        }
        self.dial_waiting(backend);
    }

    /// Has the agent in a target's namespace hook a sender there. One that is not hooked is spliced.
    pub(super) fn hook_inside(&mut self, backend: usize, flow: Flow, cookie: u64) {
        let State::Ready(supply) = &mut self.backends[backend].state else { return };
        if supply.asked.len() >= AT_ONCE {
            return;
        }
        let request = Request::Hook(Box::new(HookRequest { flow, cookie }.packet()));
        if let Err(error) = supply.ask(&request, Asked::Hook) {
            tracing::warn!(%error, "the namespace agent does not take requests");
            self.backend_gone(backend);
        }
    }

    /// The agent has made sockets: the connections that wait for one begin anew.
    fn sockets_came(&mut self, backend: usize, address: usize, answer: Answer) {
        let State::Ready(supply) = &mut self.backends[backend].state else { return };
        let ipv6 = supply.destination.addresses[address].is_some_and(|address| address.is_ipv6());
        let errno = match answer {
            Ok(sockets) => {
                supply.sockets[usize::from(ipv6)].extend(sockets);
                None
            }
            Err(errno) => Some(errno),
        };
        for dial in std::mem::take(&mut supply.thirsty) {
            if !self.is_dialling(dial) {
                continue;
            }
            match errno {
                None => self.start_connect(dial.index, dial.address, dial.any_port),
                // The client waits until one is free.
                Some(errno) if out_of_descriptors(errno) => {
                    self.try_again(dial);
                }
                Some(errno) => self.refused(dial.index, dial.address, errno),
            }
        }
    }

    /// The service has been connected to, or is about to be.
    fn dialled(&mut self, dial: Dial, service: OwnedFd) {
        let Dial { index, address, .. } = dial;
        let target = self.address(index, address);
        // On this host the handshake is over by the time connect returns (`release_sock` has processed the answer).
        if target.is_none() || getpeername::<SockaddrStorage>(service.as_raw_fd()).is_ok() {
            return self.start_relay(index, service, target);
        }
        self.connections[index].stage = Stage::Connecting { service, address };
        self.register(index);
    }

    pub(super) fn retry_connect(&mut self, index: usize) {
        if matches!(self.connections.get(index), Some(Connection { stage: Stage::AwaitingSocket, .. })) {
            self.start_connect(index, 0, false);
        }
    }

    /// One of the addresses of a connection's target, if it is on TCP.
    fn address(&self, index: usize, number: usize) -> Option<SocketAddr> {
        match &self.backends[self.connections.get(index)?.backend].state {
            State::Ready(supply) => *supply.destination.addresses.get(number)?,
            State::Asleep | State::Waking => None,
        }
    }

    /// A connection that was in progress has succeeded or failed.
    pub(super) fn connect_event(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let Stage::Connecting { service, address } = &connection.stage else { return };
        let (error, address) = (getsockopt(service, sockopt::SocketError), *address);
        if error == Ok(0) {
            let Stage::Connecting { service, .. } =
                std::mem::replace(&mut connection.stage, Stage::AwaitingSocket)
            else {
                return;
            };
            let target = self.address(index, address);
            return self.start_relay(index, service, target);
        }
        self.epoll.delete(service.as_fd()).ok();
        connection.registered[1] = Registration::Absent;
        connection.stage = Stage::AwaitingSocket;
        self.refused(index, address, error.map_or_else(|errno| errno, Errno::from_raw));
    }

    /// An address refused: the next one, or back to waiting if nothing listens any more, or the end.
    fn refused(&mut self, index: usize, number: usize, errno: Errno) {
        let Some(connection) = self.connections.get(index) else { return };
        let backend = connection.backend;
        if let State::Ready(supply) = &self.backends[backend].state
            && number.saturating_add(1) < supply.destination.addresses.len()
        {
            return self.start_connect(index, number + 1, false);
        }
        if errno == Errno::EACCES && self.address(index, number).is_none() {
            self.say_not_admitted(backend);
        }
        let Some(connection) = self.connections.get(index) else { return };
        let patient = connection.active.elapsed() < self.settings.hold_limit;
        if errno == Errno::EADDRNOTAVAIL && patient {
            return self.wait_for_a_port(index);
        }
        if !(self.settings.hold_refused && has_no_listener(errno) && patient) {
            return self.finish(index, End::Refused(errno));
        }
        tracing::debug!(
            conn = connection.number,
            error = errno.desc(),
            "the service refused; waiting for it again"
        );
        self.backend_lost(backend, true);
        self.hold(index, true);
    }

    /// The service's unix socket does not admit the agent's user: said once for each time that the service is woken.
    fn say_not_admitted(&mut self, backend: usize) {
        let Backend { name, state, .. } = &mut self.backends[backend];
        let State::Ready(supply) = state else { return };
        if !std::mem::replace(&mut supply.not_admitted, true) {
            tracing::warn!(
                target = %name,
                "the service's unix socket does not let the user in as whom this forwarder connects (--unix-identity): open the \
                 socket and the folders above it to that user, or name another one"
            );
        }
    }

    /// The kernel has no source port for a connection to the target. That is no refusal of the service's, which goes on serving the
    /// connected clients. This client, and no other, waits until a port is free.
    fn wait_for_a_port(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        connection.stage = Stage::AwaitingSocket;
        connection.registered[1] = Registration::Absent;
        let (number, backend) = (connection.number, &mut self.backends[connection.backend]);
        if !std::mem::replace(&mut backend.ports_announced, true) {
            tracing::warn!(
                "the namespace has no free source port towards {} (net.ipv4.ip_local_port_range, net.ipv4.tcp_tw_reuse); a client \
                 waits until it has one",
                backend.name
            );
        }
        self.starved.push_back((index, number));
        self.register(index);
    }

    /// Tries again for the clients that wait for a source port. To find that there is none the kernel looks at all of them, so one
    /// client tries for all, and the next ones only where it had one.
    pub(super) fn look_for_ports(&mut self, now: Instant) {
        if self.starved.is_empty() || now.duration_since(self.last_port) < PORT {
            return;
        }
        self.last_port = now;
        for _ in 0..AT_ONCE {
            let Some((index, number)) = self.starved.pop_front() else { return };
            if self.connections.get(index).is_none_or(|connection| connection.number != number) {
                continue;
            }
            self.retry_connect(index);
            let waits = |connection: &Connection| matches!(connection.stage, Stage::AwaitingSocket);
            if self.connections.get(index).is_some_and(waits) {
                // It keeps its place.
                if self.starved.back() == Some(&(index, number)) {
                    self.starved.rotate_right(1);
                }
                return;
            }
        }
    }

    /// A connection that did not relay yet has ended: it is taken off every list of waiting connections.
    pub(super) fn forget_waiting(&mut self, index: usize, connection: &Connection) {
        let backend = &mut self.backends[connection.backend];
        backend.held.retain(|&held| held != index);
        if let State::Ready(supply) = &mut backend.state {
            supply.waiting.retain(|dial| dial.index != index);
            supply.thirsty.retain(|dial| dial.index != index);
        }
        self.retries.retain(|&retry| retry != index);
        self.publish_held();
    }
}
