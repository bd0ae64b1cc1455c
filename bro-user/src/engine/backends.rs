//! Targets as the engine sees them: asleep, waking with clients held, or ready with a supply of sockets in their namespace.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockaddrStorage, UnixAddr, connect, getpeername, getsockopt, sockopt};

use super::Engine;
use super::token::Token;
use crate::connection::{Connection, End, Stage};
use crate::engine::handle::Event;
use crate::netns::diag::Table;
use crate::netns::wire::{self, Request};
use crate::stats::Stats;

/// One address of a target.
#[derive(Debug, Clone)]
pub enum Address {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix address that this process may connect to itself.
    Unix(UnixAddr),
    /// A unix path inside the container, which the agent connects to.
    Inside(PathBuf),
}

impl Address {
    /// The TCP address, if it is one.
    #[must_use]
    pub const fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Unix(_) | Self::Inside(_) => None,
        }
    }

    /// The domain of the socket that connects to it.
    const fn domain(&self) -> i32 {
        match self {
            Self::Tcp(SocketAddr::V4(_)) => libc::AF_INET,
            Self::Tcp(SocketAddr::V6(_)) => libc::AF_INET6,
            Self::Unix(_) | Self::Inside(_) => libc::AF_UNIX,
        }
    }

    /// connect(2), for the addresses that this process may connect to itself.
    fn connect(&self, socket: &OwnedFd) -> nix::Result<()> {
        match self {
            Self::Tcp(address) => connect(socket.as_raw_fd(), &SockaddrStorage::from(*address)),
            Self::Unix(address) => connect(socket.as_raw_fd(), address),
            Self::Inside(_) => Err(Errno::EAFNOSUPPORT),
        }
    }
}

/// How sockets in the target's namespace are had.
#[derive(Debug)]
pub enum Via {
    /// By socket(2): it is the forwarder's own.
    Own,
    /// From the agent at the other end.
    Agent(OwnedFd),
}

/// A target that listens.
#[derive(Debug)]
pub struct Destination {
    /// Its addresses, tried in order. Not empty.
    pub addresses: Vec<Address>,
    /// Where sockets come from.
    pub via: Via,
    /// The file that has to name the namespace still when a client is connected.
    pub file: Option<NamespaceFile>,
    /// The namespace's table of sockets, where the kernel relay may need it.
    pub table: Option<Table>,
}

/// A file that names a namespace, and which one it named.
#[derive(Debug)]
pub struct NamespaceFile {
    /// The file.
    pub path: PathBuf,
    /// Device and inode of the namespace.
    pub id: (u64, u64),
}

impl NamespaceFile {
    /// Does the file name the same namespace still?
    #[must_use]
    pub fn is_current(&self) -> bool {
        nix::sys::stat::stat(&self.path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.id)
    }
}

/// Unconnected sockets asked for at a time, so that the agent is woken once for many connections; fewer where few connections
/// are allowed, since each is a descriptor.
const SUPPLY: usize = 16;

/// With this few left, more are asked for.
const LOW: usize = 4;

/// What was asked of the agent, in order; it answers in order.
#[derive(Debug)]
enum Asked {
    Sockets(i32),
    Connect(usize, u64),
}

#[derive(Debug)]
struct Supply {
    addresses: Vec<Address>,
    via: Via,
    file: Option<NamespaceFile>,
    table: Option<Table>,
    sockets: Vec<(i32, OwnedFd)>,
    asked: VecDeque<Asked>,
    /// Connections that wait for a socket to connect to this address with.
    waiting: VecDeque<(usize, usize)>,
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
    state: State,
    held: VecDeque<usize>,
}

impl Backend {
    /// The table of sockets of the namespace it is in now.
    pub(super) fn table(&self) -> Option<&Table> {
        match &self.state {
            State::Ready(supply) => supply.table.as_ref(),
            State::Asleep | State::Waking => None,
        }
    }

    /// Neither ready nor being woken.
    pub(super) const fn is_asleep(&self) -> bool {
        matches!(self.state, State::Asleep)
    }

    pub(super) const fn asleep(name: String) -> Self {
        Self { name, watched: None, state: State::Asleep, held: VecDeque::new() }
    }
}

/// The errors that pass when somebody else lets go of something.
const fn out_of_descriptors(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

/// The errors that mean “nobody listens (yet)”.
const fn nobody_listens(errno: Errno) -> bool {
    matches!(errno, Errno::ECONNREFUSED | Errno::ENOENT | Errno::ENETUNREACH | Errno::EADDRNOTAVAIL)
}

impl Engine {
    /// A newly admitted (or refused) connection: to the service if it is ready, else held.
    pub(super) fn place(&mut self, index: usize) {
        let backend = self.connections[index].backend;
        if let State::Ready(supply) = &self.backends[backend].state {
            if supply.file.as_ref().is_none_or(NamespaceFile::is_current) {
                return self.start_connect(index, 0);
            }
            self.backend_gone(backend);
        }
        if self.is_to_wait_for_a_byte(index) {
            return self.wait_for_a_byte(index);
        }
        self.hold(index, false);
    }

    /// Wakes whatever sleeps, although nobody has connected (`bro wake`).
    pub(super) fn wake_by_hand(&mut self, by: &str) {
        for (index, backend) in self.backends.iter_mut().enumerate() {
            if backend.is_asleep() {
                backend.state = State::Waking;
                self.outbox.tell(Event::Wake { backend: index, peer: by.to_owned(), refused: false });
            }
        }
    }

    pub(super) fn hold(&mut self, index: usize, refused: bool) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        connection.stage = Stage::Held;
        connection.registered[1] = None;
        let backend = &mut self.backends[connection.backend];
        backend.held.push_back(index);
        if matches!(backend.state, State::Asleep) {
            backend.state = State::Waking;
            connection.woke |= !refused;
            let wake =
                Event::Wake { backend: connection.backend, peer: connection.peer.to_string(), refused };
            if !refused {
                self.tallies[connection.listener].cold_starts += 1;
            }
            self.outbox.tell(wake);
        }
        self.register(index);
        self.publish_held();
    }

    fn publish_held(&self) {
        Stats::set(&self.stats.held, self.backends.iter().map(|backend| backend.held.len() as u64).sum());
    }

    pub(super) fn backend_ready(&mut self, backend: usize, destination: Destination) {
        if let Via::Agent(channel) = &destination.via {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Agent(backend).into());
            if let Err(errno) = self.epoll.add(channel.as_fd(), event) {
                tracing::error!(error = errno.desc(), "cannot watch the namespace agent");
                return self.backend_failed(backend, End::StartFailed);
            }
        }
        let Destination { addresses, via, file, table } = destination;
        let supply = Supply {
            addresses,
            via,
            file,
            table,
            sockets: Vec::new(),
            asked: VecDeque::new(),
            waiting: VecDeque::new(),
        };
        self.backends[backend].state = State::Ready(Box::new(supply));
        // In the order in which they came, also those who were held again after a refusal.
        let mut held: Vec<usize> = self.backends[backend].held.drain(..).collect();
        held.sort_by_key(|&index| self.connections[index].number);
        self.publish_held();
        // For whoever is to come: a service that was just woken is not idle yet.
        self.stats.now_idle();
        for index in held {
            self.place(index);
        }
        self.let_silent_clients_in();
    }

    pub(super) fn backend_failed(&mut self, backend: usize, end: End) {
        self.backends[backend].state = State::Asleep;
        for index in std::mem::take(&mut self.backends[backend].held) {
            self.finish(index, end);
        }
        self.publish_held();
    }

    /// The service went to sleep, or its namespace is gone: whoever still waits for a socket there is held again.
    pub(super) fn backend_gone(&mut self, backend: usize) {
        let State::Ready(supply) = std::mem::replace(&mut self.backends[backend].state, State::Asleep) else {
            // Asleep already, or waking: then the control side is at it.
            return;
        };
        let asked = supply.asked.iter().filter_map(|asked| match asked {
            Asked::Connect(index, number) => Some((*index, *number)),
            Asked::Sockets(_) => None,
        });
        let connections = &self.connections;
        let waiting =
            supply.waiting.iter().filter_map(|(index, _)| Some((*index, connections.get(*index)?.number)));
        let stranded: Vec<(usize, u64)> = asked.chain(waiting).collect();
        drop(supply);
        for (index, number) in stranded {
            if self.connections.get(index).is_some_and(|connection| connection.number == number) {
                self.hold(index, false);
            }
        }
    }

    /// Begins to connect to one of the target's addresses.
    fn start_connect(&mut self, index: usize, number: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let backend = connection.backend;
        let State::Ready(supply) = &mut self.backends[backend].state else { return self.hold(index, false) };
        connection.stage = Stage::AwaitingSocket;
        let Some(address) = supply.addresses.get(number).cloned() else {
            return self.refused(index, number, Errno::EADDRNOTAVAIL);
        };
        match address {
            Address::Inside(path) => {
                supply.asked.push_back(Asked::Connect(index, connection.number));
                self.ask(backend, &Request::Connect(path));
                self.register(index);
            }
            Address::Tcp(_) | Address::Unix(_) => {
                let domain = address.domain();
                let socket = match &supply.via {
                    Via::Own => crate::sys::socket(domain, libc::SOCK_STREAM, 0).map(Some),
                    Via::Agent(_) => Ok(supply.take(domain)),
                };
                match socket {
                    Ok(Some(socket)) => self.connect(index, number, socket, &address),
                    Ok(None) => {
                        supply.waiting.push_back((index, number));
                        self.register(index);
                    }
                    Err(error) => self.no_socket(index, usize::MAX, errno_of(&error)),
                }
                self.replenish(backend, domain);
            }
        }
    }

    /// Asks the agent for more sockets when few are left and none are on the way.
    fn replenish(&mut self, backend: usize, domain: i32) {
        let State::Ready(supply) = &mut self.backends[backend].state else { return };
        let on_the_way =
            supply.asked.iter().any(|asked| matches!(asked, Asked::Sockets(asked) if *asked == domain));
        let left = supply.sockets.iter().filter(|(of, _)| *of == domain).count();
        if matches!(supply.via, Via::Own) || on_the_way || left >= LOW {
            return;
        }
        supply.asked.push_back(Asked::Sockets(domain));
        let count = u8::try_from((self.settings.connections_max / 4).clamp(1, SUPPLY)).unwrap_or(1);
        self.ask(backend, &Request::Sockets { domain, kind: libc::SOCK_STREAM, protocol: 0, count });
    }

    fn ask(&mut self, backend: usize, request: &Request) {
        let State::Ready(supply) = &self.backends[backend].state else { return };
        let Via::Agent(channel) = &supply.via else { return };
        if let Err(error) = request.send(channel.as_fd(), &[]) {
            tracing::warn!(%error, "the namespace agent does not take requests");
            self.backend_gone(backend);
        }
    }

    pub(super) fn agent_answered(&mut self, backend: usize) {
        let State::Ready(supply) = &mut self.backends[backend].state else { return };
        let Via::Agent(channel) = &supply.via else { return };
        let answer = match wire::receive_answer(channel.as_fd()) {
            Ok(answer) => answer,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // The answer came, but its descriptors did not fit: as if the agent had said so.
            Err(error) if out_of_descriptors(errno_of(&error)) => Err(errno_of(&error)),
            Err(error) => {
                tracing::debug!(%error, "the namespace agent has ended");
                return self.backend_gone(backend);
            }
        };
        match (supply.asked.pop_front(), answer) {
            (Some(Asked::Sockets(domain)), Ok(sockets)) => {
                supply.sockets.extend(sockets.into_iter().map(|socket| (domain, socket)));
                for (index, number) in std::mem::take(&mut supply.waiting) {
                    self.start_connect(index, number);
                }
            }
            (Some(Asked::Sockets(_)), Err(errno)) => {
                for (index, number) in std::mem::take(&mut supply.waiting) {
                    self.no_socket(index, number, errno);
                }
            }
            (Some(Asked::Connect(index, number)), answer) => {
                if self.connections.get(index).is_none_or(|connection| connection.number != number) {
                    return;
                }
                match answer.map(|mut sockets| sockets.pop()) {
                    Ok(Some(service)) => self.start_relay(index, service, None),
                    Ok(None) => self.refused(index, 0, Errno::EPROTO),
                    Err(Errno::EAGAIN) => self.retries.push(index),
                    Err(errno) => self.no_socket(index, 0, errno),
                }
            }
            (None, _) => {}
        }
    }

    /// No socket to connect with. When only descriptors are wanting, the client waits until one is free.
    fn no_socket(&mut self, index: usize, number: usize, errno: Errno) {
        if out_of_descriptors(errno) {
            self.retries.push(index);
            self.register(index);
        } else {
            self.refused(index, number, errno);
        }
    }

    fn connect(&mut self, index: usize, number: usize, socket: OwnedFd, address: &Address) {
        match address.connect(&socket) {
            Ok(()) => self.start_relay(index, socket, address.tcp()),
            // On this host the handshake is over by the time connect returns (`release_sock` has processed the answer).
            Err(Errno::EINPROGRESS) if getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok() => {
                self.start_relay(index, socket, address.tcp());
            }
            Err(Errno::EINPROGRESS) => {
                self.connections[index].stage = Stage::Connecting { service: socket, address: number };
                self.register(index);
            }
            // A unix service's backlog is full; it does not tell when there is room.
            Err(Errno::EAGAIN) if matches!(address, Address::Unix(_)) => {
                self.retries.push(index);
                self.register(index);
            }
            Err(errno) => self.refused(index, number, errno),
        }
    }

    pub(super) fn retry_connect(&mut self, index: usize) {
        if matches!(self.connections.get(index), Some(Connection { stage: Stage::AwaitingSocket, .. })) {
            self.start_connect(index, 0);
        }
    }

    /// One of the addresses of a connection's target.
    fn address(&self, index: usize, number: usize) -> Option<&Address> {
        match &self.backends[self.connections.get(index)?.backend].state {
            State::Ready(supply) => supply.addresses.get(number),
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
            let target = self.address(index, address).and_then(|address| address.tcp());
            return self.start_relay(index, service, target);
        }
        self.epoll.delete(service.as_fd()).ok();
        connection.registered[1] = None;
        connection.stage = Stage::AwaitingSocket;
        self.refused(index, address, error.map_or_else(|errno| errno, Errno::from_raw));
    }

    /// An address refused: the next one, or back to waiting if nobody listens any more, or the end.
    fn refused(&mut self, index: usize, number: usize, errno: Errno) {
        let Some(connection) = self.connections.get(index) else { return };
        let backend = connection.backend;
        if let State::Ready(supply) = &self.backends[backend].state
            && number.saturating_add(1) < supply.addresses.len()
        {
            return self.start_connect(index, number + 1);
        }
        let patient = connection.active.elapsed() < self.settings.hold_limit;
        if !(self.settings.hold_refused && nobody_listens(errno) && patient) {
            return self.finish(index, End::Refused(errno));
        }
        tracing::debug!(
            conn = connection.number,
            error = errno.desc(),
            "the service refused; waiting for it again"
        );
        self.backend_gone(backend);
        self.hold(index, true);
    }

    /// A connection that did not relay yet has ended: nobody is to wait for it.
    pub(super) fn forget_waiting(&mut self, index: usize, connection: &Connection) {
        let backend = &mut self.backends[connection.backend];
        backend.held.retain(|&held| held != index);
        if let State::Ready(supply) = &mut backend.state {
            supply.waiting.retain(|&(waiting, _)| waiting != index);
        }
        self.retries.retain(|&retry| retry != index);
        self.publish_held();
    }
}

impl Supply {
    fn take(&mut self, domain: i32) -> Option<OwnedFd> {
        let position = self.sockets.iter().rposition(|(of, _)| *of == domain)?;
        Some(self.sockets.swap_remove(position).1)
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
