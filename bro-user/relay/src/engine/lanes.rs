//! The kernel relay's place in the engine: lanes are opened for connections that ask and answer in turn, and only their sockets are
//! hooked; they are granted credit when the programs ask, and closed with the connection or when it streams. A connection that is
//! refused a lane is relayed by splice.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};

use bro_sockmap::{Descriptors, Flow, LaneCounters, LaneId, Maps, Role, SenderAddress, Share};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};
use serde::{Deserialize, Serialize};

use super::Engine;
use super::token::Token;
use crate::connection::{Connection, Lanes as Wanted, Relayed, Stage};
use crate::engine::protocol::Event;
use crate::peer::Peer;
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

/// The kernel relay's maps, and which connection each lane belongs to.
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

/// Adds what a lane towards one side did to a tally.
pub(super) fn add(tally: &mut Tally, sink: Side, lane: &LaneCounters) {
    tally.kernel += lane.bytes;
    if sink == Side::Service {
        tally.to_service.kernel += lane.bytes;
    }
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
            let watching = bro_sockmap::netns_cookie(listener.socket.as_fd())
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

    /// No new connection is going to have a lane: another forwarder may hook the connections to come.
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

    /// Opens or closes a connection's lanes by how its sides talk.
    pub(super) fn consider_lanes(&mut self, index: usize) {
        let Some(lanes) = &mut self.lanes else { return };
        let Some(connection) = self.connections.get_mut(index) else { return };
        match connection.wants_lanes() {
            Wanted::Leave => {}
            Wanted::Open => lanes.open_both(index, connection, self.backends[connection.backend].watched),
            Wanted::Close => {
                let listener = connection.listener;
                let Some(Relayed { up, down, .. }) = connection.relayed() else { return };
                for (sink, taken) in [(Side::Service, up.take_lane()), (Side::Client, down.take_lane())] {
                    let Some((lane, did)) = taken else { continue };
                    lanes.close(&lane, &did, sink, &mut self.tallies[listener]);
                }
            }
        }
    }

    /// Forgets the lanes of a connection that ends, and counts what they did.
    pub(super) fn close_lanes(&mut self, connection: &Connection) {
        let Some(lanes) = &mut self.lanes else { return };
        for (sink, lane) in connection.lanes() {
            lanes.close(lane, &lane.snapshot(), sink, &mut self.tallies[connection.listener]);
        }
    }

    /// Hears what the programs have to say.
    pub(super) fn kernel_events(&mut self) {
        let Some(lanes) = &mut self.lanes else { return };
        let mut proved = Vec::new();
        let Lanes { kernel, owners, .. } = lanes;
        let (connections, outbox) = (&self.connections, &self.outbox);
        kernel.drain_events(|event| match event {
            bro_sockmap::Event::LowCredit { record, serial } => {
                let Some(&(index, number, sink)) = owners.get(&LaneId { record, serial }) else { return };
                let Some(connection) = connections.get(index).filter(|connection| connection.number == number) else {
                    return;
                };
                let Stage::Relaying { up, down, .. } = connection.stage() else { return };
                let lane = match sink {
                    Side::Client => down.lane(),
                    Side::Service => up.lane(),
                };
                if let (Some(lane), Some(socket)) = (lane, connection.socket(sink)) {
                    // Without a grant the sender's bytes come to us, and the next write grants anew.
                    lane.grant(socket).ok();
                }
            }
            bro_sockmap::Event::Listening { netns, port } => outbox.tell(&Event::Listening { netns, port }),
            bro_sockmap::Event::Learned { port, kind, .. } => {
                tracing::debug!(port, kind = ?bro_sockmap::Kind::of(kind), "learned what kind of sockets the service uses");
            }
            bro_sockmap::Event::Proved { record, serial, socket, flow } => {
                proved.push((LaneId { record, serial }, flow, socket));
            }
            bro_sockmap::Event::BlockingSender { port, .. } => {
                tracing::debug!(port, "a socket in blocking mode was let go; its bytes are spliced");
            }
        });
        for (lane, flow, socket) in proved {
            self.hook(lane, flow, socket);
        }
    }

    /// A sender has proved to be a non-blocking one: it is hooked, if its lane is still open.
    fn hook(&mut self, id: LaneId, flow: Flow, socket: u64) {
        let Some(lanes) = &self.lanes else { return };
        let Some(&(index, number, sink)) = lanes.owners.get(&id) else { return };
        let Some(connection) = self.connections.get_mut(index) else { return };
        let (connected, backend) = (connection.number, connection.backend);
        let Some(Relayed { up, down, .. }) = connection.relayed() else { return };
        let lane = match sink {
            Side::Client => down.lane_mut(),
            Side::Service => up.lane_mut(),
        };
        let Some(lane) = lane.filter(|lane| connected == number && lane.id() == id) else { return };
        lane.set_hooked(socket);
        match sink {
            // The service's own socket is in its namespace.
            Side::Client => self.hook_inside(backend, flow, socket),
            Side::Service => lanes.kernel.hook(flow, socket),
        }
    }
}

impl Lanes {
    /// Opens what lanes a connection can have: the service's if the programs watch it, in the namespace with the cookie `watched`,
    /// and the client's if it is on this host.
    fn open_both(&mut self, index: usize, connection: &mut Connection, watched: Option<u64>) {
        let (number, neighbour) = (connection.number, connection.neighbour().clone());
        let Some(Relayed { client, service, up, down }) = connection.relayed() else { return };
        if watched.is_none() && self.clients.is_none() {
            return;
        }
        // A unix client has no lane, nor does its service.
        let Peer::Tcp(peer) = neighbour else { return };
        // The service has not been told yet who its client is.
        let Some(dealt_with) = up.dealt_with() else { return };
        let ends = |fd: i32| (tcp(getsockname(fd)), tcp(getpeername(fd)));
        // As a sender sees itself: its own address is our peer's.
        let (Some(remote), Some(local)) = ends(service.as_raw_fd()) else { return };
        if let Some(netns) = watched {
            let sender = SenderAddress { netns, local, remote };
            let owner = (index, number, Side::Client);
            self.open(&sender, client, owner, down.total).into_iter().for_each(|lane| down.set_lane(lane));
        }
        if let (Some(netns), Some(remote)) = (self.clients, tcp(getsockname(client.as_raw_fd())))
            && sockaddr::on_this_host(remote.ip(), peer.ip())
        {
            let sender = SenderAddress { netns, local: peer, remote };
            let owner = (index, number, Side::Service);
            self.open(&sender, service, owner, dealt_with).into_iter().for_each(|lane| up.set_lane(lane));
        }
    }

    /// Opens a lane for what its sender sends from now on, `forwarded` bytes of which are in the target already.
    fn open(
        &mut self,
        sender: &SenderAddress,
        target: std::os::fd::BorrowedFd<'_>,
        owner: (usize, u64, Side),
        forwarded: u64,
    ) -> Option<bro_sockmap::Lane> {
        match self.kernel.open_lane(sender, target, forwarded) {
            Ok(lane) => {
                let _none = self.owners.insert(lane.id(), owner);
                Some(lane)
            }
            Err(reason) => {
                if !std::mem::replace(&mut self.refusal_announced, true) {
                    tracing::info!(%reason, "a connection has no kernel lane and is spliced");
                }
                None
            }
        }
    }

    /// Counts what a lane did before it is closed, and lets its sender go.
    fn close(&mut self, lane: &bro_sockmap::Lane, did: &LaneCounters, sink: Side, tally: &mut Tally) {
        let _owner = self.owners.remove(&lane.id());
        if let Some(socket) = lane.hooked() {
            self.kernel.release(socket);
        }
        add(tally, sink, did);
    }
}
