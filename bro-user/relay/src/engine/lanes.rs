//! The kernel relay's place in the engine: lanes are opened for connections that ask and answer in turn, and only their sockets are
//! hooked; they are granted credit when the programs ask, and closed with the connection or when it streams. A connection that is
//! refused a lane is relayed by splice.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};

use bro_sockmap::{Descriptors, Flow, LaneCounters, LaneId, Maps, SenderAddress, SenderRole, Share};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};
use serde::{Deserialize, Serialize};
use slab::Slab;

use super::listeners::Listeners;
use super::token::Token;
use crate::connection::{Connection, LaneDecision, Relayed, Stage};
use crate::engine::protocol::{EngineEvent, Outbox};
use crate::listener::Listener;
use crate::peer::Peer;
use crate::relay::Side;
use crate::sockaddr;
use crate::stats::Tally;

/// What the programs are to watch for one target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceWatch {
    /// Which target.
    pub target: usize,
    /// The cookie of the network namespace the service is in.
    pub netns: u64,
    /// The ports it may listen at; none where it is not to be watched any more.
    pub ports: Vec<u16>,
}

/// The kernel relay's maps, and which connection each lane belongs to.
#[derive(Debug)]
pub(super) struct OpenLanes {
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

impl OpenLanes {
    /// Uses the kernel relay's maps from now on; with `clients`, for what local clients of these listeners send as well. None where
    /// they cannot be used.
    pub(super) fn load(
        epoll: &Epoll,
        descriptors: &Descriptors,
        share: Share,
        clients: Option<&Listeners>,
    ) -> Option<Self> {
        let kernel = match Maps::new(descriptors, share) {
            Ok(kernel) => kernel,
            Err(error) => {
                tracing::warn!("the kernel relay's maps cannot be used; splicing instead: {error}");
                return None;
            }
        };
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Kernel.into());
        if let Err(errno) = epoll.add(kernel.events_fd(), event) {
            tracing::warn!(
                error = errno.desc(),
                "the kernel relay's events cannot be watched; splicing instead"
            );
            return None;
        }
        let (owners, watched) = (HashMap::new(), HashMap::new());
        let mut lanes = Self { kernel, owners, watched, clients: None, refusal_announced: false };
        for listener in clients.into_iter().flat_map(Listeners::iter) {
            lanes.watch_clients(listener);
        }
        Some(lanes)
    }

    /// Has the programs look at clients of one of our own listeners.
    fn watch_clients(&mut self, listener: &Listener) {
        let Some(address) = tcp(getsockname(listener.socket.as_raw_fd())) else { return };
        let watching = bro_sockmap::netns_cookie(listener.socket.as_fd()).and_then(|cookie| {
            self.kernel.watch(cookie, address.port(), SenderRole::Client).map(|()| cookie)
        });
        match watching {
            Ok(cookie) => self.clients = Some(cookie),
            Err(error) => tracing::warn!(%error, "no lane for local clients of {}", listener.address),
        }
    }

    /// Watches a target's service from now on. A namespace that it was in before is forgotten, with the kind that was learned. Says
    /// in which namespace it is watched, if it is.
    pub(super) fn watch(&mut self, watch: ServiceWatch) -> Option<u64> {
        let ServiceWatch { target, netns, ports } = watch;
        if let Some((old, ports)) = self.watched.remove(&target) {
            for port in ports {
                self.kernel.unwatch(old, port);
            }
        }
        for &port in &ports {
            if let Err(error) = self.kernel.watch(netns, port, SenderRole::Service) {
                tracing::warn!(%error, "the kernel relay cannot watch port {port}; splicing instead");
                return None;
            }
        }
        if ports.is_empty() {
            return None;
        }
        let _none = self.watched.insert(target, (netns, ports));
        Some(netns)
    }

    /// No new connection is going to have a lane: another forwarder may hook the connections to come.
    pub(super) fn unwatch_all(&mut self, listeners: &Listeners) {
        for (_, (netns, ports)) in self.watched.drain() {
            for port in ports {
                self.kernel.unwatch(netns, port);
            }
        }
        let Some(netns) = self.clients else { return };
        for listener in listeners.iter() {
            if let Some(address) = tcp(getsockname(listener.socket.as_raw_fd())) {
                self.kernel.unwatch(netns, address.port());
            }
        }
    }

    /// Opens or closes a connection's lanes by how its sides talk. `watched`: the cookie of the namespace in which the programs watch
    /// the service.
    pub(super) fn consider(
        &mut self,
        index: usize,
        connection: &mut Connection,
        watched: Option<u64>,
        tally: &mut Tally,
    ) {
        match connection.wants_lanes() {
            LaneDecision::Leave => {}
            LaneDecision::Open => self.open_both(index, connection, watched),
            LaneDecision::Close => {
                let Some(Relayed { up, down, .. }) = connection.relayed() else { return };
                for (sink, taken) in [(Side::Service, up.take_lane()), (Side::Client, down.take_lane())] {
                    let Some((lane, did)) = taken else { continue };
                    self.close(&lane, &did, sink, tally);
                }
            }
        }
    }

    /// Forgets the lanes of a connection that ends, and counts what they did.
    pub(super) fn close_both(&mut self, connection: &Connection, tally: &mut Tally) {
        for (sink, lane) in connection.lanes() {
            self.close(lane, &lane.snapshot(), sink, tally);
        }
    }

    /// Hears what the programs have to say, and does for the connections' lanes what follows from it. Returns what the agents are to
    /// do: hook these senders, each in the namespace of its target.
    pub(super) fn hear(
        &mut self,
        connections: &mut Slab<Connection>,
        outbox: &Outbox,
    ) -> Vec<(usize, Flow, u64)> {
        let mut proved = Vec::new();
        let Self { kernel, owners, .. } = self;
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
            bro_sockmap::Event::Listening { netns, port } => outbox.tell(&EngineEvent::Listening { netns, port }),
            bro_sockmap::Event::Learned { port, kind, .. } => {
                tracing::debug!(port, kind = ?bro_sockmap::SenderKind::of(kind), "learned what kind of sockets the service uses");
            }
            bro_sockmap::Event::Proved { record, serial, socket, flow } => {
                proved.push((LaneId { record, serial }, flow, socket));
            }
            bro_sockmap::Event::BlockingSender { port, .. } => {
                tracing::debug!(port, "a socket in blocking mode was let go; its bytes are spliced");
            }
        });
        let hooked = proved.into_iter().filter_map(|(id, flow, socket)| {
            let target = self.hook(id, flow, socket, connections)?;
            Some((target, flow, socket))
        });
        hooked.collect()
    }

    /// A sender has proved to be a non-blocking one: it is hooked, if its lane is still open. The service's own socket is in its
    /// namespace: then this is the target whose agent is to hook it.
    fn hook(&self, id: LaneId, flow: Flow, socket: u64, connections: &mut Slab<Connection>) -> Option<usize> {
        let &(index, number, sink) = self.owners.get(&id)?;
        let connection = connections.get_mut(index).filter(|connection| connection.number == number)?;
        let target = connection.target;
        let Relayed { up, down, .. } = connection.relayed()?;
        let lane = match sink {
            Side::Client => down.lane_mut(),
            Side::Service => up.lane_mut(),
        };
        lane.filter(|lane| lane.id() == id)?.set_hooked(socket);
        match sink {
            Side::Client => Some(target),
            Side::Service => {
                self.kernel.hook(flow, socket);
                None
            }
        }
    }

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
