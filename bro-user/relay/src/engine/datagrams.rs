//! A datagram's way, from top to bottom: it comes to a listener, its flow is found or made, it waits where the service sleeps or the
//! flow has no socket yet, and goes to the service; what the service answers goes back from the address that the client wrote to.
//! Then what may come in between: a service that refuses or is lost, flows that end, figures.
//!
//! Nothing is sent that was not received, and once only. What cannot be passed on is dropped, as any router would, and counted.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, SockaddrStorage, send, setsockopt, sockopt};

use super::agent_link::out_of_descriptors;
use super::connect::nothing_listens;
use super::report::{Figures, MOST_PEERS};
use super::targets::{Found, Frozen};
use super::token::Token;
use super::{Engine, RETRY, TICK};
use crate::ancillary::Ancillary;
use crate::engine::protocol::EngineEvent;
use crate::flows::{DatagramTally, Dropped, FlowEnds, FlowId, FlowTable, HeldDatagram, HeldDatagrams};
use crate::netns::wire;
use crate::peer::{Peer, Source};
use crate::proxy_protocol::Trusted;
use crate::source::Origin;
use crate::sys::messages::{Messages, ReceivedDatagram};

/// Datagrams that are received at a time; a buffer for each is kept.
const BATCH: usize = 16;

/// How often in a row one socket is read before others have their turn.
const ROUNDS: usize = 4;

/// The most datagrams that wait for the service, and for their flows' sockets, and the most bytes of them.
const HELD: usize = 1024;
const HELD_BYTES: usize = 4 << 20;

/// How long a flow is left for answers that are on their way, once the forwarder hears no client any more.
const PARTING: Duration = Duration::from_secs(2);

/// How far a flow is.
#[derive(Debug)]
enum FlowStage {
    /// It waits for the service.
    Held,
    /// The agent is to make its socket.
    Dialling,
    /// It has one, connected to the service.
    Open(OwnedFd),
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
    /// It keeps nothing awake (`--idle-ignore`).
    ignored: bool,
    opened: Instant,
    to_service: u64,
    to_client: u64,
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
    held: HeldDatagrams,
    /// Made for the first datagram.
    messages: Option<Messages>,
    idle: Duration,
    next_generation: u32,
    /// Flows without a socket.
    waiting: usize,
    /// Flows that are not ignored.
    keeping: usize,
    /// Targets whose agent is to be asked for sockets.
    to_ask: Vec<usize>,
    /// It was said that flows take each other's places.
    full_announced: bool,
}

impl Datagrams {
    /// Room for `most` flows, of one source `per_source`, that end after `idle` without a datagram.
    pub(super) fn new(most: usize, per_source: Option<u32>, idle: Duration) -> Self {
        Self {
            flows: FlowTable::new(most, per_source.map(|most| most as usize)),
            held: HeldDatagrams::new(HELD, HELD_BYTES),
            messages: None,
            idle,
            next_generation: 0,
            waiting: 0,
            keeping: 0,
            to_ask: Vec::new(),
            full_announced: false,
        }
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
            flow.ignored || (matches!(flow.stage, FlowStage::Open(_)) && used.elapsed() >= limit)
        };
        self.flows.iter().all(|(_, _, used, flow)| sleeps(used, flow))
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
        flow.stage = stage;
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
    if name.as_sockaddr_in6().is_some() {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        setsockopt(socket, sockopt::Ipv6RecvTClass, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
    }
    // Of an IPv6 socket's IPv4 clients too.
    setsockopt(socket, sockopt::IpRecvTos, &true)
}

/// The client's address, as the socket's family writes it.
fn client_of(message: &ReceivedDatagram<'_>) -> Option<SocketAddr> {
    let from = message.from?;
    if let Some(v4) = from.as_sockaddr_in() {
        return Some(std::net::SocketAddrV4::from(*v4).into());
    }
    let v6 = std::net::SocketAddrV6::from(*from.as_sockaddr_in6()?);
    Some(std::net::SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into())
}

/// The same as people and limits know it.
fn peer_of(client: SocketAddr) -> Peer {
    Peer::Tcp(SocketAddr::new(client.ip().to_canonical(), client.port()))
}

impl Engine {
    /// Takes what waits on a listener for datagrams.
    pub(super) fn receive_datagrams(&mut self, listener: usize) {
        let mut messages = self.datagrams.messages.take().unwrap_or_else(|| Messages::new(BATCH));
        for _ in 0..ROUNDS {
            let received = match messages.receive(self.listeners.socket(listener)) {
                Ok(received) => received,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(errno) => {
                    tracing::debug!(error = errno.desc(), "a listener for datagrams says");
                    break;
                }
            };
            let now = Instant::now();
            for message in (0..received).filter_map(|number| messages.get(number)) {
                if let Some(client) = client_of(&message) {
                    self.client_sent(listener, client, &message, now);
                }
            }
            if received < BATCH {
                break;
            }
        }
        self.datagrams.messages = Some(messages);
        self.datagrams_moved();
        self.ask_for_flows();
    }

    /// A client has sent a datagram.
    fn client_sent(
        &mut self,
        listener: usize,
        client: SocketAddr,
        message: &ReceivedDatagram<'_>,
        now: Instant,
    ) {
        let Ancillary { local, ecn } = Ancillary::read(message.control);
        let key = FlowEnds { listener, client, local };
        let index = match self.datagrams.flows.find(&key) {
            Some(index) => {
                self.datagrams.flows.touch(index, now);
                index
            }
            None => match self.admit_flow(key, now) {
                Some(index) => index,
                None => return,
            },
        };
        self.send_to_service(index, message.bytes, ecn);
    }

    /// A flow begins, unless its client is none to wake a service that sleeps.
    fn admit_flow(&mut self, key: FlowEnds, now: Instant) -> Option<usize> {
        let (peer, target) = (peer_of(key.client), self.listeners.target(key.listener));
        let is_one_of = |these: &[Trusted]| these.iter().any(|one| one.is(&peer));
        let ready = self.targets[target].is_ready() && self.targets.frozen == Frozen::No;
        if !ready && is_one_of(&self.settings.wake_ignore) {
            self.datagram_tally(key.listener).dropped.add(Dropped::WakeIgnored, 1);
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
            ignored,
            opened: now,
            to_service: 0,
            to_client: 0,
        };
        let made = self.datagrams.flows.insert(key, source, flow, now);
        self.datagrams.waiting += 1;
        self.datagrams.keeping += usize::from(!ignored);
        self.datagram_tally(key.listener).flows += 1;
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
            self.flow_waits(made.index)
        }
        self.publish_open();
        self.publish_held();
        Some(made.index)
    }

    /// A flow waits for the service, which is woken where it sleeps.
    fn flow_waits(&mut self, index: usize) {
        self.datagrams.set_stage(index, FlowStage::Held);
        let Some((key, flow)) = self.datagrams.flows.get(index) else { return };
        let (peer, target, listener) = (peer_of(key.client).to_string(), flow.target, key.listener);
        let source = Some(flow.source.to_string());
        match self.targets[target].stir() {
            Found::Asleep => {
                self.tallies[listener].cold_starts += 1;
                self.outbox.tell(&EngineEvent::Wake { target, peer, source, refused: false });
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
        let Some(link) = self.targets[target].link() else { return self.flow_waits(index) };
        let address = link.ready.addresses.first().copied().flatten();
        let source = address.and_then(|address| link.source(Origin::at(key.client), address, false));
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
            Ok(None) => return self.end_flow(id.index, FlowEnd::Unsendable),
            Err(errno) => {
                let target = &self.targets[target].name;
                tracing::warn!(error = errno.desc(), %target, "no socket for a client's datagrams can be had");
                return self.end_flow(id.index, FlowEnd::Unsendable);
            }
        };
        let token = Token::Flow { index: id.index, generation: id.generation };
        if self.epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, token.into())).is_err() {
            return self.end_flow(id.index, FlowEnd::Descriptors);
        }
        self.datagrams.set_stage(id.index, FlowStage::Open(socket));
        for datagram in self.datagrams.held.take(id) {
            self.send_to_service(id.index, &datagram.bytes, datagram.ecn);
        }
        self.publish_held();
    }

    /// Sends a datagram to the service, or has it wait until that can be done.
    fn send_to_service(&mut self, index: usize, bytes: &[u8], ecn: u8) {
        let Some((key, flow)) = self.datagrams.flows.get_mut(index) else { return };
        let FlowStage::Open(socket) = &flow.stage else { return self.hold_datagram(index, bytes, ecn) };
        if flow.ecn != ecn {
            let ipv6 = self.targets[flow.target].address(0).is_some_and(|address| address.is_ipv6());
            let set = if ipv6 {
                setsockopt(socket, sockopt::Ipv6TClass, &ecn.into())
            } else {
                setsockopt(socket, sockopt::Ipv4Tos, &ecn.into())
            };
            flow.ecn = if set.is_ok() { ecn } else { flow.ecn };
        }
        let once = || send(socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        let tally = &mut self.tallies[key.listener].datagrams;
        let sent = once().or_else(|errno| match errno {
            Errno::EINTR => once(),
            // Of an earlier one: this one has not been sent.
            errno if nothing_listens(errno) && !self.settings.hold_refused => {
                tally.dropped.add(Dropped::Refused, 1);
                once()
            }
            errno => Err(errno),
        });
        match sent {
            Ok(_) => {
                tally.to_service.add(bytes.len());
                flow.to_service += bytes.len() as u64;
            }
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => {
                tally.dropped.add(Dropped::ServiceBuffer, 1)
            }
            Err(Errno::EMSGSIZE) => tally.dropped.add(Dropped::TooLong, 1),
            Err(errno) if nothing_listens(errno) && self.settings.hold_refused => {
                // The one before this was refused, and this one waits until something is bound there again.
                tally.dropped.add(Dropped::Refused, 1);
                let target = flow.target;
                self.datagrams.set_stage(index, FlowStage::Held);
                self.hold_datagram(index, bytes, ecn);
                self.target_refused(target);
            }
            Err(_) => tally.dropped.add(Dropped::Unsendable, 1),
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
    }

    /// The service has answered a client, or the kernel for it.
    pub(super) fn flow_event(&mut self, index: usize, generation: u32) {
        if !self.datagrams.is_there(FlowId { index, generation }) {
            return;
        }
        let mut messages = self.datagrams.messages.take().unwrap_or_else(|| Messages::new(BATCH));
        let error = self.answer_client(index, &mut messages);
        self.datagrams.messages = Some(messages);
        self.datagrams_moved();
        if let Some(errno) = error {
            let Some((key, flow)) = self.datagrams.flows.get(index) else { return };
            tracing::debug!(peer = %peer_of(key.client), error = errno.desc(), "the service's side says");
            if !nothing_listens(errno) {
                return;
            }
            let target = flow.target;
            self.tallies[key.listener].datagrams.dropped.add(Dropped::Refused, 1);
            if self.settings.hold_refused {
                self.end_flow(index, FlowEnd::Refused);
                self.target_refused(target);
            }
        }
    }

    /// Passes on what waits on a flow's socket; returns the error that was there besides.
    fn answer_client(&mut self, index: usize, messages: &mut Messages) -> Option<Errno> {
        let mut error = None;
        for _ in 0..ROUNDS {
            let (key, flow) = self.datagrams.flows.get_mut(index)?;
            let FlowStage::Open(socket) = &flow.stage else { return None };
            let received = match messages.receive(socket.as_fd()) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                // An error comes before what was received before it.
                Err(errno) => {
                    error = Some(errno);
                    continue;
                }
            };
            let (to, listener) = (SockaddrStorage::from(key.client), self.listeners.socket(key.listener));
            let tally = &mut self.tallies[key.listener].datagrams;
            let ecn = |messages: &Messages, number| {
                messages.get(number).map_or(0, |message| Ancillary::read(message.control).ecn)
            };
            let mut next = 0;
            while next < received {
                let bits = ecn(messages, next);
                let end =
                    (next + 1..received).find(|number| ecn(messages, *number) != bits).unwrap_or(received);
                let control = Ancillary { local: key.local, ecn: bits }.write(key.client.ip());
                match messages.send_on(next..end, listener, &to, &control) {
                    Ok(sent) => {
                        for message in (next..next + sent).filter_map(|number| messages.get(number)) {
                            tally.to_clients.add(message.bytes.len());
                            flow.to_client += message.bytes.len() as u64;
                        }
                        next += sent;
                    }
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => {
                        tally.dropped.add(Dropped::ClientBuffer, (received - next) as u64);
                        next = received;
                    }
                    // Of the first one alone.
                    Err(errno) => {
                        let why =
                            if errno == Errno::EMSGSIZE { Dropped::TooLong } else { Dropped::Unsendable };
                        tally.dropped.add(why, 1);
                        next += 1;
                    }
                }
            }
            self.datagrams.flows.touch(index, Instant::now());
            if received < BATCH {
                break;
            }
        }
        error
    }

    /// By bytes, what has just moved counts.
    fn datagrams_moved(&self) {
        if self.settings.idle_by_bytes.is_some() {
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
    pub(super) fn flows_lost(&mut self, target: usize) {
        if self.datagrams.is_empty() {
            return;
        }
        for index in self.datagrams.of_target(target) {
            match self.datagrams.flows.get(index).map(|(_, flow)| &flow.stage) {
                Some(FlowStage::Open(_)) => self.end_flow(index, FlowEnd::Lost),
                Some(FlowStage::Held | FlowStage::Dialling) => self.flow_waits(index),
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
        let now = Instant::now();
        let (limit, hold) = (self.datagrams.limit(self.draining), self.settings.hold_limit);
        let hold = hold.saturating_add(TICK * 5).max(limit);
        let old = self.datagrams.flows.iter().take_while(|(_, _, used, _)| now - *used >= limit);
        let due =
            old.filter(|(_, _, used, flow)| matches!(flow.stage, FlowStage::Open(_)) || now - *used >= hold);
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
        if !matches!(flow.stage, FlowStage::Open(_)) {
            self.datagrams.waiting -= 1;
            if let Some(link) = self.targets[flow.target].link() {
                link.forget_flow(id);
            }
        }
        let left = self.datagrams.held.take(id).len() as u64;
        self.datagram_tally(key.listener).dropped.add(end.dropped(), left);
        tracing::debug!(
            peer = %peer_of(key.client),
            target = %self.targets[flow.target].name,
            to_service = flow.to_service,
            to_client = flow.to_client,
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
        // The kernel takes a closed socket out of epoll.
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
        for (_, key, _, flow) in self.datagrams.flows.iter() {
            let tally = &mut figures.tallies[key.listener].datagrams;
            tally.open += 1;
            tally.held += u64::from(!matches!(flow.stage, FlowStage::Open(_)));
            if !flow.ignored && figures.peers.len() < MOST_PEERS {
                figures.peers.push(peer_of(key.client).to_string());
            }
        }
    }

    /// The clock is looked at when the next flow may end.
    pub(super) fn flow_patience(&self) -> Option<Duration> {
        self.datagrams.patience(self.draining)
    }
}
