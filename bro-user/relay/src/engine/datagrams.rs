//! A datagram's way, from top to bottom: it comes to a listener, its flow is found or made, it waits where the service sleeps or the
//! flow has no socket yet, and goes to the service; what the service answers goes back on another thread (`way_back.rs`).
//! Then what may come in between: a service that refuses or is lost, flows that end, figures.
//!
//! Nothing is sent that was not received, and once only. What cannot be passed on is dropped, as any router would, and counted.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockaddrStorage, setsockopt, sockopt};

use super::agent_link::out_of_descriptors;
use super::connect::nothing_listens;
use super::outgoing::{Outgoing, Segments, cannot_be_taken_apart};
use super::report::{Figures, MOST_PEERS};
use super::targets::{Found, Frozen};
use super::token::Token;
use super::way_back::{FlowError, FlowSocket, WayBack};
use super::{Engine, RETRY, TICK};
use crate::ancillary::Ancillary;
use crate::engine::protocol::EngineEvent;
use crate::flows::{
    DatagramTally, Dropped, FlowClient, FlowEnds, FlowId, FlowTable, HeldDatagram, HeldDatagrams, Piece,
    together,
};
use crate::listener::SocketKind;
use crate::netns::wire;
use crate::peer::{Peer, Source};
use crate::proxy_protocol::Trusted;
use crate::source::Origin;
use crate::sys::messages::{Messages, ReceivedDatagram};
use crate::unreachable::{Undelivered, UnreachableLimit};

/// Datagrams that are received at a time; a buffer for each is kept.
const BATCH: usize = 16;

/// How often in a row one socket is read before others have their turn.
const ROUNDS: usize = 4;

/// The most datagrams that wait for the service, and for their flows' sockets, and the most bytes of them.
const HELD: usize = 1024;
const HELD_BYTES: usize = 4 << 20;

/// How much waits of a source's before its clients do, over a unix socket. What one batch still brings has room besides.
const ROOM: usize = HELD / 4;
const ROOM_BYTES: usize = HELD_BYTES / 4;

/// How long a flow is left for answers that are on their way, once the forwarder hears no client any more.
const PARTING: Duration = Duration::from_secs(2);

/// How far a flow is.
#[derive(Debug)]
enum FlowStage {
    /// It waits for the service.
    Held,
    /// The agent is to make its socket.
    Dialling,
    /// It has one, connected to the service, through which it is answered as well.
    Open(Arc<FlowSocket>),
}

/// One client's datagrams with the service.
#[derive(Debug)]
struct Flow {
    generation: u32,
    source: Source,
    target: usize,
    stage: FlowStage,
    /// The ECN bits with which its socket sends.
    ecn: u8,
    /// How its socket takes apart what is sent to the service.
    segments: Segments,
    /// Over a unix socket: the service's buffer is full, or much waits already while it has no socket yet. Nothing more is
    /// received until there is room, so that the client waits where it sends.
    is_full: bool,
    /// It keeps nothing awake (`--idle-ignore`).
    ignored: bool,
    opened: Instant,
    to_service: u64,
    /// Through sockets that it has no more.
    to_client: u64,
}

/// A datagram that a client has sent.
#[derive(Debug, Clone)]
struct Arrived {
    ends: FlowEnds,
    flow: FlowId,
    ecn: u8,
    piece: Piece,
}

/// Why a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FlowEnd {
    Idle,
    Evicted,
    Refused,
    Lost,
    StartFailed,
    Descriptors,
    Unsendable,
    Leaving,
}

impl FlowEnd {
    const fn word(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Evicted => "evicted",
            Self::Refused => "refused",
            Self::Lost => "service-gone",
            Self::StartFailed => "start-failed",
            Self::Descriptors => "descriptors",
            Self::Unsendable => "unsendable",
            Self::Leaving => "leaving",
        }
    }

    /// Why what still waited was dropped.
    const fn dropped(self) -> Dropped {
        match self {
            Self::Idle | Self::StartFailed => Dropped::StartFailed,
            Self::Evicted => Dropped::Evicted,
            Self::Refused | Self::Lost => Dropped::Refused,
            Self::Descriptors => Dropped::Descriptors,
            Self::Unsendable => Dropped::Unsendable,
            Self::Leaving => Dropped::Leaving,
        }
    }
}

/// All flows.
#[derive(Debug)]
pub(super) struct Datagrams {
    flows: FlowTable<Flow>,
    /// None where no listener takes datagrams.
    way_back: Option<Arc<WayBack>>,
    held: HeldDatagrams,
    /// Made for the first datagram.
    messages: Option<Messages>,
    idle: Duration,
    next_generation: u32,
    /// Flows without a socket.
    waiting: usize,
    /// Flows that are not ignored.
    keeping: usize,
    /// A datagram of one that is not ignored has come since this was looked at.
    moved: bool,
    /// Targets whose agent is to be asked for sockets.
    to_ask: Vec<usize>,
    /// It was said that descriptors are not passed on.
    descriptors_announced: bool,
    /// It was said that flows take each other's places.
    full_announced: bool,
    /// How many clients may still be told that a datagram was not received.
    undelivered: UnreachableLimit,
}

impl Datagrams {
    /// Room for `most` flows, of one source `per_source`, that end after `idle` without a datagram.
    pub(super) fn new(
        most: usize,
        per_source: Option<u32>,
        idle: Duration,
        way_back: Option<Arc<WayBack>>,
    ) -> Self {
        Self {
            flows: FlowTable::new(most, per_source.map(|most| most as usize)),
            way_back,
            held: HeldDatagrams::new(HELD, HELD_BYTES),
            messages: None,
            idle,
            next_generation: 0,
            waiting: 0,
            keeping: 0,
            moved: false,
            to_ask: Vec::new(),
            descriptors_announced: false,
            full_announced: false,
            undelivered: UnreachableLimit::default(),
        }
    }

    pub(super) fn way_back(&self) -> Option<Arc<WayBack>> {
        self.way_back.clone()
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    pub(super) const fn len(&self) -> usize {
        self.flows.len()
    }

    /// How many keep the service awake.
    pub(super) const fn keeping(&self) -> usize {
        self.keeping
    }

    /// How many wait for the service, or for a socket.
    pub(super) const fn waiting(&self) -> usize {
        self.waiting
    }

    /// How long epoll may sleep, where there are flows.
    pub(super) fn patience(&self, draining: bool) -> Option<Duration> {
        if self.is_empty() {
            return None;
        }
        if self.waiting > 0 {
            return Some(TICK);
        }
        let (_, _, used, _) = self.flows.iter().next()?;
        Some(self.limit(draining).saturating_sub(used.elapsed()).max(RETRY))
    }

    fn limit(&self, draining: bool) -> Duration {
        if draining { self.idle.min(PARTING) } else { self.idle }
    }

    /// Is each one ignored, or without a datagram for so long?
    pub(super) fn all_sleep(&self, limit: Duration) -> bool {
        let sleeps = |used: Instant, flow: &Flow| {
            flow.ignored
                || matches!(&flow.stage, FlowStage::Open(socket) if self.used(used, socket).elapsed() >= limit)
        };
        self.flows.iter().all(|(_, _, used, flow)| sleeps(used, flow))
    }

    /// When a datagram was last passed on, either way.
    fn used(&self, sent: Instant, socket: &FlowSocket) -> Instant {
        let answered = self.way_back.as_ref().and_then(|way_back| way_back.answered(socket));
        answered.map_or(sent, |answered| answered.max(sent))
    }

    /// Takes note of which flows were answered.
    fn look_back(&mut self) {
        let Some(way_back) = self.way_back.clone() else { return };
        for id in way_back.take_answered() {
            let Some((_, Flow { stage: FlowStage::Open(socket), generation, .. })) = self.flows.get(id.index)
            else {
                continue;
            };
            if *generation == id.generation {
                WayBack::looks_at(socket);
                if let Some(answered) = way_back.answered(socket) {
                    self.flows.touch(id.index, answered);
                }
            }
        }
    }

    /// The flow that is there now.
    fn id(&self, index: usize) -> Option<FlowId> {
        self.flows.get(index).map(|(_, flow)| FlowId { index, generation: flow.generation })
    }

    /// The flow, if it still is the one.
    fn is_there(&self, id: FlowId) -> bool {
        self.flows.get(id.index).is_some_and(|(_, flow)| flow.generation == id.generation)
    }

    fn of_target(&self, target: usize) -> Vec<usize> {
        let those = self.flows.iter().filter(|(_, _, _, flow)| flow.target == target);
        those.map(|(index, ..)| index).collect()
    }

    fn set_stage(&mut self, index: usize, stage: FlowStage) {
        let Some((_, flow)) = self.flows.get_mut(index) else { return };
        let (was, is) = (!matches!(flow.stage, FlowStage::Open(_)), !matches!(stage, FlowStage::Open(_)));
        if let FlowStage::Open(socket) = std::mem::replace(&mut flow.stage, stage) {
            flow.to_client += socket.to_client();
            let id = FlowId { index, generation: flow.generation };
            self.way_back.iter().for_each(|way_back| way_back.close(id));
        }
        self.waiting = self.waiting + usize::from(is) - usize::from(was);
    }
}

/// Has the kernel say of each datagram where it was sent to, and with which ECN bits. To be done while a listener may still be
/// changed; it is systemd's as well, and other programs that get it take no notice.
///
/// # Errors
/// setsockopt(2)'s.
pub fn prepare(socket: &OwnedFd) -> nix::Result<()> {
    let name: SockaddrStorage = nix::sys::socket::getsockname(socket.as_raw_fd())?;
    if name.as_unix_addr().is_some() {
        return Ok(());
    }
    if name.as_sockaddr_in6().is_some() {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        setsockopt(socket, sockopt::Ipv6RecvTClass, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
    }
    // Of an IPv6 socket's IPv4 clients too.
    setsockopt(socket, sockopt::IpRecvTos, &true)
}

/// The client, as the socket's family writes it.
fn client_of(message: &ReceivedDatagram<'_>, kind: SocketKind) -> Option<FlowClient> {
    if kind == SocketKind::UnixDatagram {
        let name = message.from.and_then(|from| from.as_unix_addr().copied());
        let named = name.filter(|name| name.path().is_some() || name.as_abstract().is_some());
        return Some(named.map_or(FlowClient::Unbound, |name| FlowClient::Unix(Arc::new(name))));
    }
    inet_of(message).map(FlowClient::Inet)
}

fn inet_of(message: &ReceivedDatagram<'_>) -> Option<SocketAddr> {
    let from = message.from?;
    if let Some(v4) = from.as_sockaddr_in() {
        return Some(std::net::SocketAddrV4::from(*v4).into());
    }
    let v6 = std::net::SocketAddrV6::from(*from.as_sockaddr_in6()?);
    Some(std::net::SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into())
}

/// The same as people and limits know it.
fn peer_of(client: &FlowClient) -> Peer {
    match client {
        FlowClient::Inet(client) => Peer::Tcp(SocketAddr::new(client.ip().to_canonical(), client.port())),
        // A datagram does not say whose it is, unless its socket is asked for that, which would be systemd's socket too.
        FlowClient::Unix(_) | FlowClient::Unbound => Peer::Unix { uid: u32::MAX, pid: 0 },
    }
}

impl Engine {
    /// Takes what waits on a listener for datagrams.
    pub(super) fn receive_datagrams(&mut self, listener: usize) {
        let mut messages = self.datagrams.messages.take().unwrap_or_else(|| Messages::new(BATCH));
        let mut arrived: Vec<Arrived> = Vec::with_capacity(BATCH);
        let kind = self.listeners.kind(listener);
        self.datagrams.look_back();
        for _ in 0..ROUNDS {
            let received = match messages.receive(self.listeners.socket(listener), BATCH) {
                Ok(received) => received,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(errno) => {
                    tracing::debug!(error = errno.desc(), "a listener for datagrams says");
                    break;
                }
            };
            let now = Instant::now();
            for number in 0..received {
                let Some(message) = messages.get(number) else { break };
                let Some(client) = client_of(&message, kind) else { continue };
                let Ancillary { local, ecn, segment, descriptors } = Ancillary::read(message.control);
                if descriptors {
                    self.descriptors_refused(listener);
                    continue;
                }
                let (ends, length) = (FlowEnds { listener, client, local }, message.bytes.len());
                // One client often sends several in a row.
                let last = arrived.last().filter(|last| last.ends == ends);
                let flow = match last.map(|last| last.flow).or_else(|| self.used_flow(&ends, now)) {
                    Some(flow) => flow,
                    None => {
                        // A new one may take the place of one of those.
                        self.pass_to_service(&mut arrived, &mut messages, now);
                        let Some(flow) = self.admit_flow(ends.clone(), now) else { continue };
                        flow
                    }
                };
                let pieces = Piece::of(number, length, segment.into());
                arrived.extend(pieces.map(|piece| Arrived { ends: ends.clone(), flow, ecn, piece }));
            }
            self.pass_to_service(&mut arrived, &mut messages, now);
            if received < BATCH || !self.listeners.is_watched(listener) {
                break;
            }
        }
        self.datagrams.messages = Some(messages);
        self.datagrams_moved();
        self.ask_for_flows();
    }

    /// The flow between these ends, which has just been used.
    fn used_flow(&mut self, ends: &FlowEnds, now: Instant) -> Option<FlowId> {
        let index = self.datagrams.flows.find(ends)?;
        self.datagrams.flows.touch(index, now);
        self.datagrams.moved |= self.datagrams.flows.get(index).is_some_and(|(_, flow)| !flow.ignored);
        self.datagrams.id(index)
    }

    /// Passes on what clients have sent, each flow's in order and as much of it at once as can be.
    fn pass_to_service(&mut self, arrived: &mut Vec<Arrived>, messages: &mut Messages, now: Instant) {
        arrived.sort_by_key(|one| one.flow.index);
        let mut pieces = Vec::with_capacity(arrived.len());
        for of_flow in arrived.chunk_by(|one, next| (one.flow, one.ecn) == (next.flow, next.ecn)) {
            let Arrived { ends, flow, ecn, .. } = &of_flow[0];
            pieces.clear();
            pieces.extend(of_flow.iter().map(|one| one.piece));
            let mut left = &pieces[..];
            while !left.is_empty() {
                // One before it may have ended the flow.
                let there = Some(*flow).filter(|flow| self.datagrams.is_there(*flow));
                let there = there
                    .or_else(|| self.used_flow(ends, now))
                    .or_else(|| self.admit_flow(ends.clone(), now));
                let Some((_, at)) = there.and_then(|flow| self.datagrams.flows.get(flow.index)) else {
                    break;
                };
                let (run, rest) = left.split_at(together(left, at.segments.longest()));
                let outgoing = match run {
                    [one] => Outgoing::One(messages.bytes_of(one)),
                    several => Outgoing::Several(several, messages),
                };
                if let Some(flow) = there {
                    self.send_to_service(flow.index, outgoing, *ecn);
                }
                left = rest;
            }
        }
        arrived.clear();
    }

    /// A flow begins, unless its client is none to wake a service that sleeps.
    fn admit_flow(&mut self, key: FlowEnds, now: Instant) -> Option<FlowId> {
        let (peer, listener) = (peer_of(&key.client), key.listener);
        let target = self.listeners.target(listener);
        let is_one_of = |these: &[Trusted]| these.iter().any(|one| one.is(&peer));
        let ready = self.targets[target].is_ready() && self.targets.frozen == Frozen::No;
        if !ready && is_one_of(&self.settings.wake_ignore) {
            self.datagram_tally(listener).dropped.add(Dropped::WakeIgnored, 1);
            return None;
        }
        let ignored = is_one_of(&self.settings.idle_ignore);
        let generation = self.datagrams.next_generation;
        self.datagrams.next_generation = (generation + 1) % FlowId::GENERATIONS;
        let source = peer.source();
        let flow = Flow {
            generation,
            source,
            target,
            stage: FlowStage::Held,
            ecn: 0,
            segments: if matches!(key.client, FlowClient::Inet(_)) {
                Segments::default()
            } else {
                Segments::never()
            },
            is_full: false,
            ignored,
            opened: now,
            to_service: 0,
            to_client: 0,
        };
        let made = self.datagrams.flows.insert(key, source, flow, now);
        self.datagrams.waiting += 1;
        self.datagrams.keeping += usize::from(!ignored);
        self.datagrams.moved |= !ignored;
        self.datagram_tally(listener).flows += 1;
        if let Some((index, key, flow)) = made.instead_of {
            self.datagram_tally(key.listener).evicted += 1;
            if !std::mem::replace(&mut self.datagrams.full_announced, true) {
                tracing::warn!(
                    flows = self.datagrams.len(),
                    "as many flows as there may be, of all clients or of one source: the least recently used one makes room for the \
                     next (--flows-max, --connections-per-source)"
                );
            }
            self.flow_ended(index, &key, flow, FlowEnd::Evicted);
        }
        tracing::debug!(peer = %peer, target = %self.targets[target].name, "flow opened");
        if ready {
            self.dial_flow(made.index)
        } else {
            self.flow_waits(made.index, false)
        }
        self.publish_open();
        self.publish_held();
        Some(FlowId { index: made.index, generation })
    }

    /// A flow waits for the service, which is woken where it sleeps.
    fn flow_waits(&mut self, index: usize, refused: bool) {
        self.datagrams.set_stage(index, FlowStage::Held);
        let Some((key, flow)) = self.datagrams.flows.get(index) else { return };
        let (peer, target, listener) = (peer_of(&key.client).to_string(), flow.target, key.listener);
        let source = Some(flow.source.to_string());
        match self.targets[target].stir() {
            Found::Asleep => {
                self.tallies[listener].cold_starts += 1;
                self.outbox.tell(&EngineEvent::Wake { target, peer, source, refused });
            }
            Found::Ready if self.targets.frozen == Frozen::Yes => self.ask_to_thaw(&peer),
            Found::Ready | Found::Unknown | Found::Waking => {}
        }
    }

    /// Has the agent make a flow's socket.
    fn dial_flow(&mut self, index: usize) {
        self.datagrams.set_stage(index, FlowStage::Dialling);
        let Some((key, flow)) = self.datagrams.flows.get(index) else { return };
        let (target, id) = (flow.target, FlowId { index, generation: flow.generation });
        let Some(link) = self.targets[target].link() else { return self.flow_waits(index, false) };
        let address = link.ready.addresses.first().copied().flatten();
        let source = match (&key.client, address) {
            (FlowClient::Inet(client), Some(address)) => link.source(Origin::at(*client), address, false),
            _ => None,
        };
        link.dial_flow(id, source);
        if !self.datagrams.to_ask.contains(&target) {
            self.datagrams.to_ask.push(target);
        }
    }

    fn ask_for_flows(&mut self) {
        for target in std::mem::take(&mut self.datagrams.to_ask) {
            self.ask_agent(target);
        }
    }

    /// The agent has made a flow's socket, or could not.
    pub(super) fn flow_dialled(&mut self, target: usize, id: FlowId, answer: Result<Option<OwnedFd>, Errno>) {
        let dialling = self.datagrams.flows.get(id.index).is_some_and(|(_, flow)| {
            flow.generation == id.generation && matches!(flow.stage, FlowStage::Dialling)
        });
        if !dialling {
            return;
        }
        let socket = match answer {
            Ok(Some(socket)) => socket,
            // This flow, and each one after it, is served in the namespace that the file names now.
            Err(wire::STALE) => return self.target_gone(target),
            Err(errno) if out_of_descriptors(errno) => return self.end_flow(id.index, FlowEnd::Descriptors),
            // A unix socket that is not there yet: no table shows it, so that this is how it is waited for.
            Err(errno) if nothing_listens(errno) && self.settings.hold_refused => {
                self.datagrams.set_stage(id.index, FlowStage::Held);
                return self.target_refused(target);
            }
            Ok(None) => return self.end_flow(id.index, FlowEnd::Unsendable),
            Err(errno) => {
                let target = &self.targets[target].name;
                tracing::warn!(error = errno.desc(), %target, "no socket for a client's datagrams can be had");
                return self.end_flow(id.index, FlowEnd::Unsendable);
            }
        };
        let Some((key, flow)) = self.datagrams.flows.get(id.index) else { return };
        let way_back = self.datagrams.way_back.as_ref();
        let opened = way_back.map(|way_back| way_back.open(id, key.clone(), socket, flow.ignored));
        let Some(Ok(socket)) = opened else { return self.end_flow(id.index, FlowEnd::Descriptors) };
        self.set_full(id.index, false);
        self.datagrams.set_stage(id.index, FlowStage::Open(socket));
        // The service has the whole time for its answer, however long it was waited for.
        self.datagrams.flows.touch(id.index, Instant::now());
        self.send_held(id);
        self.publish_held();
    }

    /// Sends what has waited.
    fn send_held(&mut self, id: FlowId) {
        for datagram in self.datagrams.held.take(id) {
            self.send_to_service(id.index, Outgoing::One(&datagram.bytes), datagram.ecn);
        }
    }

    /// Descriptors have come along with a datagram (unix(7) SCM_RIGHTS).
    fn descriptors_refused(&mut self, listener: usize) {
        self.datagram_tally(listener).dropped.add(Dropped::Unsendable, 1);
        if !std::mem::replace(&mut self.datagrams.descriptors_announced, true) {
            tracing::warn!("datagrams with descriptors are dropped: bro passes none on");
        }
    }

    /// There is no room for what a client sends, or there is again. Over a unix socket nothing is lost by that: the client waits where
    /// it sends.
    fn set_full(&mut self, index: usize, is_full: bool) {
        let Some((key, flow)) = self.datagrams.flows.get_mut(index) else { return };
        if std::mem::replace(&mut flow.is_full, is_full) == is_full {
            return;
        }
        let token = Token::Flow { index, generation: flow.generation };
        let told = match &flow.stage {
            FlowStage::Open(socket) if is_full => {
                self.epoll.add(&socket.socket, EpollEvent::new(EpollFlags::EPOLLOUT, token.into()))
            }
            FlowStage::Open(socket) => self.epoll.delete(&socket.socket),
            // There is room when it has its socket, or has ended.
            FlowStage::Held | FlowStage::Dialling => Ok(()),
        };
        let told = told.and_then(|()| self.listeners.pause(&self.epoll, key.listener, is_full));
        if let Err(errno) = told {
            tracing::debug!(error = errno.desc(), "a full socket cannot be watched");
        }
    }

    /// Sends datagrams to the service, or has them wait until that can be done.
    fn send_to_service(&mut self, index: usize, mut outgoing: Outgoing<'_>, ecn: u8) {
        let Some((key, flow)) = self.datagrams.flows.get_mut(index) else { return };
        let (FlowStage::Open(socket), false) = (&flow.stage, flow.is_full) else {
            return outgoing.each().for_each(|bytes| self.hold_datagram(index, bytes, ecn));
        };
        if flow.ecn != ecn {
            let ipv6 = self.targets[flow.target].address(0).is_some_and(|address| address.is_ipv6());
            let set = if ipv6 {
                setsockopt(&socket.socket, sockopt::Ipv6TClass, &ecn.into())
            } else {
                setsockopt(&socket.socket, sockopt::Ipv4Tos, &ecn.into())
            };
            flow.ecn = if set.is_ok() { ecn } else { flow.ecn };
        }
        let mut refused = false;
        let segments = &mut flow.segments;
        let mut once = || outgoing.send(socket.socket.as_fd(), segments);
        let tally = &mut self.tallies[key.listener].datagrams;
        let sent = once().or_else(|errno| match errno {
            Errno::EINTR => once(),
            // Of an earlier one: this one has not been sent.
            errno if nothing_listens(errno) && !self.settings.hold_refused => {
                tally.dropped.add(Dropped::Refused, 1);
                refused = true;
                once()
            }
            errno => Err(errno),
        });
        let (count, bytes) = outgoing.amount();
        match sent {
            Ok(()) => {
                tally.to_service.add_several(count, bytes);
                flow.to_service += bytes;
            }
            Err(errno) if count > 1 && cannot_be_taken_apart(errno) => {
                segments.refuse(errno, outgoing.segment());
                outgoing.each().for_each(|bytes| self.send_to_service(index, Outgoing::One(bytes), ecn));
            }
            Err(Errno::EAGAIN) if !matches!(key.client, FlowClient::Inet(_)) => {
                outgoing.each().for_each(|bytes| self.hold_datagram(index, bytes, ecn));
                self.set_full(index, true);
            }
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => {
                tally.dropped.add(Dropped::ServiceBuffer, count);
            }
            Err(Errno::EMSGSIZE) => tally.dropped.add(Dropped::TooLong, count),
            Err(errno) if nothing_listens(errno) && self.settings.hold_refused => {
                // The one before this was refused, and this one waits until something is bound there again.
                tally.dropped.add(Dropped::Refused, 1);
                let target = flow.target;
                refused = true;
                self.datagrams.set_stage(index, FlowStage::Held);
                outgoing.each().for_each(|bytes| self.hold_datagram(index, bytes, ecn));
                self.target_refused(target);
            }
            Err(_) => tally.dropped.add(Dropped::Unsendable, count),
        }
        if refused && let Some((key, _)) = self.datagrams.flows.get(index) {
            let key = key.clone();
            self.tell_undelivered(&key);
        }
    }

    /// A client may be told that what it sent was not received (`--icmp-port-unreachable`). Not while it
    /// waits, and not of one that was for several hosts.
    fn tell_undelivered(&mut self, key: &FlowEnds) {
        let (FlowClient::Inet(client), Some(local)) = (&key.client, key.local) else { return };
        if !self.settings.tells_undelivered || local.group || self.outbox.is_behind() {
            return;
        }
        let source = peer_of(&key.client).source();
        if self.datagrams.undelivered.allows(source, Instant::now()) {
            let (client, listener) = (*client, key.listener);
            let about = Undelivered { listener, client, local: local.ip, interface: local.interface };
            self.outbox.tell(&EngineEvent::Undelivered(about));
        }
    }

    /// Has a datagram wait.
    fn hold_datagram(&mut self, index: usize, bytes: &[u8], ecn: u8) {
        let Some((_, flow)) = self.datagrams.flows.get(index) else { return };
        let (flow, source) = (FlowId { index, generation: flow.generation }, flow.source);
        for gone in self.datagrams.held.push(HeldDatagram { flow, source, bytes: bytes.into(), ecn }) {
            if let Some((key, _)) = self.datagrams.flows.get(gone.index) {
                self.tallies[key.listener].datagrams.dropped.add(Dropped::Queue, 1);
            }
        }
        let Some((key, _)) = self.datagrams.flows.get(index) else { return };
        let (count, bytes) = self.datagrams.held.share(source);
        if !matches!(key.client, FlowClient::Inet(_)) && (count >= ROOM || bytes >= ROOM_BYTES) {
            self.set_full(index, true);
        }
    }

    /// A service whose buffer was full takes more.
    pub(super) fn flow_event(&mut self, index: usize, generation: u32) {
        let id = FlowId { index, generation };
        if self.datagrams.is_there(id) {
            self.set_full(index, false);
            self.send_held(id);
        }
    }

    /// The kernel has said of flows' sockets that nothing is bound at the target, or worse.
    pub(super) fn flows_failed_on_their_way(&mut self) {
        let Some(way_back) = self.datagrams.way_back.clone() else { return };
        for FlowError { id, socket, errno } in way_back.take_errors() {
            let Some((key, flow)) = self.datagrams.flows.get(id.index) else { continue };
            // Not of a socket that it had before.
            if !matches!(&flow.stage, FlowStage::Open(now) if Arc::ptr_eq(now, &socket)) {
                continue;
            }
            tracing::debug!(peer = %peer_of(&key.client), error = errno.desc(), "the service's side says");
            if !nothing_listens(errno) {
                continue;
            }
            let (key, target) = (key.clone(), flow.target);
            self.tell_undelivered(&key);
            if self.settings.hold_refused {
                self.end_flow(id.index, FlowEnd::Refused);
                self.target_refused(target);
            }
        }
    }

    /// By bytes, what has just moved counts, unless it is of a client that is ignored.
    fn datagrams_moved(&mut self) {
        if std::mem::take(&mut self.datagrams.moved) && self.settings.idle_by_bytes.is_some() {
            self.stats.now_idle();
        }
    }

    /// Something listens again at a target, or goes on: its flows get their sockets.
    pub(super) fn flows_go_on(&mut self, target: usize) {
        if self.datagrams.is_empty() || self.targets.frozen != Frozen::No {
            return;
        }
        for index in self.datagrams.of_target(target) {
            if matches!(self.datagrams.flows.get(index), Some((_, Flow { stage: FlowStage::Held, .. }))) {
                self.dial_flow(index);
            }
        }
        self.ask_for_flows();
    }

    /// The target listens no more: flows end, and those that wait wake it again.
    pub(super) fn flows_lost(&mut self, target: usize, refused: bool) {
        if self.datagrams.is_empty() {
            return;
        }
        for index in self.datagrams.of_target(target) {
            match self.datagrams.flows.get(index).map(|(_, flow)| &flow.stage) {
                Some(FlowStage::Open(_)) => self.end_flow(index, FlowEnd::Lost),
                Some(FlowStage::Held | FlowStage::Dialling) => self.flow_waits(index, refused),
                None => {}
            }
        }
    }

    /// The target could not be woken.
    pub(super) fn flows_failed(&mut self, target: usize) {
        if self.datagrams.is_empty() {
            return;
        }
        for index in self.datagrams.of_target(target) {
            self.end_flow(index, FlowEnd::StartFailed);
        }
    }

    /// The forwarder leaves, or has the service frozen.
    pub(super) fn end_flows(&mut self) {
        let all: Vec<usize> = self.datagrams.flows.iter().map(|(index, ..)| index).collect();
        for index in all {
            self.end_flow(index, FlowEnd::Leaving);
        }
    }

    /// Ends flows that have had no datagram for so long, and those that have waited for too long.
    pub(super) fn expire_flows(&mut self) {
        if self.datagrams.is_empty() {
            return;
        }
        self.datagrams.look_back();
        let now = Instant::now();
        let (limit, hold) = (self.datagrams.limit(self.draining), self.settings.hold_limit);
        let hold = hold.saturating_add(TICK * 5).max(limit);
        let datagrams = &self.datagrams;
        let old = datagrams.flows.iter().take_while(|(_, _, used, _)| now.duration_since(*used) >= limit);
        let due = old.filter(|(_, _, used, flow)| match &flow.stage {
            FlowStage::Open(socket) => now.duration_since(datagrams.used(*used, socket)) >= limit,
            FlowStage::Held | FlowStage::Dialling => now.duration_since(*used) >= hold,
        });
        let due: Vec<usize> = due.map(|(index, ..)| index).collect();
        for index in due {
            self.end_flow(index, FlowEnd::Idle);
        }
    }

    fn end_flow(&mut self, index: usize, end: FlowEnd) {
        if let Some((key, flow)) = self.datagrams.flows.remove(index) {
            self.flow_ended(index, &key, flow, end);
        }
    }

    /// A flow is not in the table any more.
    fn flow_ended(&mut self, index: usize, key: &FlowEnds, flow: Flow, end: FlowEnd) {
        let id = FlowId { index, generation: flow.generation };
        let mut to_client = flow.to_client;
        match &flow.stage {
            FlowStage::Open(socket) => {
                to_client += socket.to_client();
                self.datagrams.way_back.iter().for_each(|way_back| way_back.close(id));
                if flow.is_full {
                    self.epoll.delete(&socket.socket).ok();
                }
            }
            FlowStage::Held | FlowStage::Dialling => {
                self.datagrams.waiting -= 1;
                if let Some(link) = self.targets[flow.target].link() {
                    link.forget_flow(id);
                }
            }
        }
        let left = self.datagrams.held.take(id).len() as u64;
        self.datagram_tally(key.listener).dropped.add(end.dropped(), left);
        if left > 0 && end.dropped() == Dropped::StartFailed {
            self.tell_undelivered(key);
        }
        tracing::debug!(
            peer = %peer_of(&key.client),
            target = %self.targets[flow.target].name,
            to_service = flow.to_service,
            to_client,
            duration_ms = flow.opened.elapsed().as_millis() as u64,
            dropped = left,
            reason = end.word(),
            "flow closed"
        );
        if !flow.ignored {
            self.datagrams.keeping -= 1;
            // Before the count says so.
            if self.keeping + self.datagrams.keeping == 0 && self.settings.idle_by_bytes.is_none() {
                self.stats.now_idle();
            }
        }
        if flow.is_full {
            self.listeners.pause(&self.epoll, key.listener, false).ok();
        }
        drop(flow);
        self.tell_if_drained();
        self.publish_open();
        self.publish_held();
    }

    const fn datagram_tally(&mut self, listener: usize) -> &mut DatagramTally {
        &mut self.tallies.as_mut_slice()[listener].datagrams
    }

    /// What flows are like at this moment.
    pub(super) fn add_flows(&self, figures: &mut Figures) {
        if let Some(way_back) = &self.datagrams.way_back {
            for (listener, tally) in figures.tallies.iter_mut().enumerate() {
                way_back.add_to(listener, &mut tally.datagrams);
            }
        }
        for (_, key, _, flow) in self.datagrams.flows.iter() {
            let tally = &mut figures.tallies[key.listener].datagrams;
            tally.open += 1;
            tally.held += u64::from(!matches!(flow.stage, FlowStage::Open(_)));
            if !flow.ignored && figures.peers.len() < MOST_PEERS {
                figures.peers.push(peer_of(&key.client).to_string());
            }
        }
    }

    /// The clock is looked at when the next flow may end.
    pub(super) fn flow_patience(&self) -> Option<Duration> {
        self.datagrams.patience(self.draining)
    }
}
