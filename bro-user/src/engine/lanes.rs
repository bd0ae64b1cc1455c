//! The kernel relay's place in the engine: lanes are opened when a connection is, granted credit when the programs ask, and
//! closed with the connection. Whatever is refused is relayed by splice, for that connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};

use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};
use serde::{Deserialize, Serialize};

use super::Engine;
use super::token::Token;
use crate::connection::{Burst, Connection, Peer, Stage};
use crate::engine::handle::{Event, Numbered};
use crate::kernel::{self, Descriptors, LaneCounters, LaneId, Maps, Role, SenderAddress, Share};
use crate::relay::Side;
use crate::sockaddr;
use crate::stats::Tally;

/// What the programs are to watch for one target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Which target.
    pub backend: usize,
    /// The cookie of the network namespace the service is in.
    pub netns: u64,
    /// The ports it may listen at; none where it is not to be watched any more.
    pub ports: Vec<u16>,
}

/// The kernel relay's maps and whose lane is whose.
#[derive(Debug)]
pub(super) struct Lanes {
    kernel: Maps,
    /// The connection of a lane: its index, its number, and the side that the lane's bytes go to.
    owners: HashMap<LaneId, (usize, u64, Side)>,
    /// What each target's service is watched for.
    watched: HashMap<usize, (u64, Vec<u16>)>,
    /// The cookie of the listeners' namespace, where local clients are.
    clients: Option<u64>,
    refusal_announced: bool,
}

/// Adds what a lane did to a tally.
pub(super) fn add(tally: &mut Tally, lane: &LaneCounters) {
    tally.kernel += lane.bytes;
    tally.passes += lane.passed.iter().sum::<u64>();
    tally.grants += lane.grants;
}

/// A TCP address as its owner's socket shows it.
fn tcp(end: nix::Result<SockaddrStorage>) -> Option<SocketAddr> {
    sockaddr::tcp(&end.ok()?)
}

impl Engine {
    /// Uses the kernel relay's maps from now on; with `clients`, for what local clients send as well.
    pub(super) fn kernel_loaded(&mut self, descriptors: &Descriptors, share: Share, clients: bool) {
        let kernel = match Maps::new(descriptors, share) {
            Ok(kernel) => kernel,
            Err(error) => {
                return tracing::warn!("the kernel relay's maps cannot be used; splicing instead: {error}");
            }
        };
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Kernel.into());
        if let Err(errno) = self.epoll.add(kernel.events_fd(), event) {
            tracing::warn!(
                error = errno.desc(),
                "the kernel relay's events cannot be watched; splicing instead"
            );
            return;
        }
        self.lanes = Some(Lanes {
            kernel,
            owners: HashMap::new(),
            watched: HashMap::new(),
            clients: None,
            refusal_announced: false,
        });
        if clients {
            self.watch_clients();
        }
    }

    /// Has the programs look at clients of our own listeners.
    fn watch_clients(&mut self) {
        let Some(lanes) = &mut self.lanes else { return };
        for (listener, _) in &self.listeners {
            let Some(address) = tcp(getsockname(listener.socket.as_raw_fd())) else { continue };
            let watching = kernel::netns_cookie(listener.socket.as_fd())
                .and_then(|cookie| lanes.kernel.watch(cookie, address.port(), Role::Client).map(|()| cookie));
            match watching {
                Ok(cookie) => lanes.clients = Some(cookie),
                Err(error) => tracing::warn!(%error, "no lane for local clients of {}", listener.address),
            }
        }
    }

    /// Watches a target's service from now on. A namespace that it was in before is forgotten, with the kind that was learned.
    pub(super) fn watch(&mut self, watch: Watch) {
        let backend = watch.backend;
        let watching = self.begin_watch(watch);
        self.outbox.tell(&Event::Watching { backend, watching });
    }

    fn begin_watch(&mut self, watch: Watch) -> bool {
        let Some(lanes) = &mut self.lanes else { return false };
        let Watch { backend, netns, ports } = watch;
        let Some(target) = self.backends.get_mut(backend) else { return false };
        target.watched = None;
        if let Some((old, ports)) = lanes.watched.remove(&backend) {
            for port in ports {
                lanes.kernel.unwatch(old, port);
            }
        }
        for &port in &ports {
            if let Err(error) = lanes.kernel.watch(netns, port, Role::Service) {
                tracing::warn!(%error, "the kernel relay cannot watch port {port}; splicing instead");
                return false;
            }
        }
        if ports.is_empty() {
            return false;
        }
        target.watched = Some(netns);
        let _none = lanes.watched.insert(backend, (netns, ports));
        true
    }

    /// No new connection is going to have a lane: another forwarder may hook what is to come.
    pub(super) fn unwatch_all(&mut self) {
        let Some(lanes) = &mut self.lanes else { return };
        for (_, (netns, ports)) in lanes.watched.drain() {
            for port in ports {
                lanes.kernel.unwatch(netns, port);
            }
        }
        let Some(netns) = lanes.clients else { return };
        for (listener, _) in &self.listeners {
            if let Some(address) = tcp(getsockname(listener.socket.as_raw_fd())) {
                lanes.kernel.unwatch(netns, address.port());
            }
        }
    }

    /// Opens the lanes of a connection that has just been made to `target`, its TCP address.
    pub(super) fn open_lanes(&mut self, index: usize, target: Option<SocketAddr>) {
        let Some(lanes) = &mut self.lanes else { return };
        let Some(connection) = self.connections.get_mut(index) else { return };
        let (number, client) = (connection.number, connection.client.as_fd());
        let Stage::Relaying { service, up, down, .. } = &mut connection.stage else { return };
        // As a sender sees itself: its own address is our peer's.
        let own = |fd: i32| tcp(getsockname(fd));
        let watched = self.backends[connection.backend].watched;
        let careful = lanes.kernel.fionread_lies();
        let Peer::Tcp(peer) = connection.peer else { return };
        if let (Some(netns), Some(remote), Some(local)) = (watched, own(service.as_raw_fd()), target) {
            let sender = SenderAddress { netns, local, remote };
            lanes.open(&sender, client, (index, number, Side::Client), None, |lane| {
                down.set_lane(lane);
                connection.burst = careful.then(Burst::default);
            });
        }
        if let (Some(netns), Some(remote), Some(_)) = (lanes.clients, own(client.as_raw_fd()), target)
            && sockaddr::on_this_host(remote.ip(), peer.ip())
        {
            let sender = SenderAddress { netns, local: peer, remote };
            // The programs see messages, not bursts: a head and a body that both take the lane are within it.
            let largest = careful.then_some(Burst::MOST / 2);
            lanes.open(&sender, service.as_fd(), (index, number, Side::Service), largest, |lane| {
                up.set_lane(lane)
            });
        }
    }

    /// Has a service's socket let go, for good, before more is put in front of it than it may be asked about while it is hooked. What
    /// the client sends waits until the control process has said which socket that is.
    pub(super) fn release_service(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        if !connection.asks_which_socket() {
            return;
        }
        let Stage::Relaying { service, .. } = &connection.stage else { return };
        let ends = (tcp(getsockname(service.as_raw_fd())), tcp(getpeername(service.as_raw_fd())));
        let connection = Numbered { index, number: connection.number };
        match ends {
            // Its own end of the connection is our peer's.
            (Some(remote), Some(local)) => {
                let backend = self.connections[index].backend;
                self.outbox.tell(&Event::WhichSocket { connection, backend, local, remote });
            }
            // It is broken, which the next read or write tells.
            _ => self.release_socket(connection, None),
        }
    }

    /// The control process has said which socket the service's is: it is let go, and the bytes that waited for that go through.
    pub(super) fn release_socket(&mut self, Numbered { index, number }: Numbered, cookie: Option<u64>) {
        let Some(connection) = self.connections.get_mut(index).filter(|found| found.number == number) else {
            return;
        };
        if let (Some(lanes), Some(cookie)) = (&mut self.lanes, cookie) {
            lanes.kernel.release(cookie);
        }
        connection.lift_burst();
        self.pump(index, true, false);
    }

    /// Forgets the lanes of a connection that ends, and counts what they did.
    pub(super) fn close_lanes(&mut self, connection: &Connection) {
        let Some(lanes) = &mut self.lanes else { return };
        for lane in connection.lanes() {
            let _owner = lanes.owners.remove(&lane.id());
            add(&mut self.tallies[connection.listener], &lane.snapshot());
        }
    }

    /// Hears what the programs have to say.
    pub(super) fn kernel_events(&mut self) {
        let Some(lanes) = &mut self.lanes else { return };
        let Lanes { kernel, owners, .. } = lanes;
        let (connections, outbox) = (&self.connections, &self.outbox);
        kernel.drain_events(|event| match event {
            kernel::Event::LowCredit { record, serial } => {
                let Some(&(index, number, sink)) = owners.get(&LaneId { record, serial }) else { return };
                let Some(connection) = connections.get(index).filter(|connection| connection.number == number) else {
                    return;
                };
                let Stage::Relaying { up, down, .. } = &connection.stage else { return };
                let lane = match sink {
                    Side::Client => down.lane(),
                    Side::Service => up.lane(),
                };
                if let (Some(lane), Some(socket)) = (lane, connection.socket(sink)) {
                    // Without a grant the sender's bytes come to us, and the next write grants anew.
                    lane.grant(socket).ok();
                }
            }
            kernel::Event::Listening { netns, port } => outbox.tell(&Event::Listening { netns, port }),
            kernel::Event::Learned { port, kind, .. } => {
                tracing::debug!(port, kind = ?kernel::Kind::of(kind), "learned what kind of sockets the service uses");
            }
            kernel::Event::Proved { .. } => {}
            kernel::Event::BlockingSender { port, .. } => {
                tracing::debug!(port, "a socket in blocking mode was let go; its bytes are spliced");
            }
        });
    }
}

impl Lanes {
    fn open(
        &mut self,
        sender: &SenderAddress,
        target: std::os::fd::BorrowedFd<'_>,
        owner: (usize, u64, Side),
        largest: Option<u32>,
        set: impl FnOnce(kernel::Lane),
    ) {
        match self.kernel.open_lane(sender, target, 0, largest) {
            Ok(lane) => {
                let _none = self.owners.insert(lane.id(), owner);
                set(lane);
            }
            Err(reason) => {
                if !std::mem::replace(&mut self.refusal_announced, true) {
                    tracing::info!(%reason, "a connection has no kernel lane and is spliced");
                }
            }
        }
    }
}
