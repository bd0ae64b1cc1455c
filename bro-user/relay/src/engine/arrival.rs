//! A client's way in, from top to bottom: accepted, introduced by a balancer in front, admitted within the limits, placed; and held
//! where its target does not listen yet, until the control process has woken it. `connect.rs` is what follows.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::SockaddrStorage;

use super::listeners::{Accepting, ListenerUse};
use super::targets::{Found, Frozen, Readiness, ReadyTarget};
use super::{Engine, introductions, socket_options};
use crate::connection::{Connection, End, Stage};
use crate::engine::agent_link::AgentLink;
use crate::engine::protocol::EngineEvent;
use crate::engine::token::Token;
use crate::peer::Peer;
use crate::proxy_protocol::Trusted;
use crate::rate::Meter;
use crate::stats::Stats;
use crate::sys::{Peeked, has_finished, has_received, look, stir_from};
use nix::sys::epoll::{EpollEvent, EpollFlags};

/// The first pause after EMFILE and its like; it doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(1);

impl Engine {
    /// Accepts what waits on a listener.
    pub(super) fn accept_some(&mut self, listener: usize) -> anyhow::Result<()> {
        let (mut taken, allowed) = (0, self.listeners.allowed(listener));
        while taken < allowed
            && self.listeners.accepting() == Accepting::Open
            && self.accept_one(listener, FIRST_PAUSE)?
        {
            taken += 1;
        }
        self.listeners.took(listener, taken, allowed);
        Ok(())
    }

    /// The first attempt after a pause: when it fails as well, the next pause is longer.
    pub(super) fn accept_after_pause(&mut self, pause: Duration) -> anyhow::Result<()> {
        let longer = (pause * 2).min(LAST_PAUSE);
        for listener in 0..self.listeners.len() {
            let is_relayed = self.listeners.used(listener) == ListenerUse::Relay
                && !self.listeners.takes_datagrams(listener);
            if is_relayed && self.listeners.accepting() == Accepting::Open {
                let _more = self.accept_one(listener, longer)?;
            }
        }
        Ok(())
    }

    /// Accepts one client; false when there is none, or none can be taken.
    fn accept_one(&mut self, listener: usize, pause: Duration) -> anyhow::Result<bool> {
        if self.connections.len() >= self.settings.connections_max && self.silent.is_empty() {
            self.tallies[listener].full += 1;
            self.set_accepting(Accepting::Full)?;
            return Ok(false);
        }
        match self.listeners.accept(listener) {
            Ok((client, address)) => {
                if self.connections.len() >= self.settings.connections_max {
                    self.make_room();
                }
                self.admit(client, address, listener);
                Ok(true)
            }
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN) => Ok(false),
                // accept(2): errors of that one connection, or a signal.
                Some(
                    Errno::EINTR
                    | Errno::ECONNABORTED
                    | Errno::EPROTO
                    | Errno::ENETDOWN
                    | Errno::ENOPROTOOPT
                    | Errno::EHOSTDOWN
                    | Errno::ENONET
                    | Errno::EHOSTUNREACH
                    | Errno::ENETUNREACH,
                ) => Ok(true),
                // EMFILE, ENFILE, ENOBUFS, ENOMEM, or a listener that another process shut down: to retry at once mends nothing.
                _ => {
                    if pause == FIRST_PAUSE {
                        self.tallies[listener].exhausted += 1;
                        tracing::warn!(%error, "cannot accept; clients wait in the backlog until it works again");
                    }
                    self.set_accepting(Accepting::BackingOff { until: Instant::now() + pause, pause })?;
                    Ok(false)
                }
            },
        }
    }

    /// Ends the connection whose client has said nothing for longest.
    fn make_room(&mut self) {
        if let Some(index) = self.silent.first_to_go() {
            self.finish(index, End::IdleTimeout);
        }
    }

    /// A client was accepted. One that comes through a balancer which is trusted to introduce it is not known yet.
    fn admit(&mut self, client: OwnedFd, address: Option<SockaddrStorage>, listener: usize) {
        let now = Instant::now();
        let peer = Peer::of(client.as_fd(), address);
        let number = self.next_number;
        self.next_number += 1;
        let meter = self.settings.idle_below.map(|rate| Box::new(Meter::new(rate, now)));
        let route = (listener, self.listeners.target(listener));
        let connection = Connection::accepted(number, client, peer, route, meter, now);
        Stats::set(&self.stats.accepted, number);
        self.tallies[listener].accepted += 1;
        socket_options::set_options(&connection.client, connection.peer.ip(), self.settings.keepalive);
        let introduced = self.settings.trusted.iter().any(|trusted| trusted.is(&connection.peer));
        let index = self.connections.insert(connection);
        self.census.enter();
        self.keeping += 1;
        self.publish_open();
        if introduced {
            self.connections[index].set_stage(&mut self.census, |_| Stage::Introducing(Box::default()));
            return self.read_introduction(index);
        }
        self.welcome(index);
    }

    /// A trusted peer may have sent more of its header.
    pub(super) fn read_introduction(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let Some((client, incoming)) = connection.introduction() else { return };
        match introductions::read(client, incoming) {
            Ok(None) => self.register(index),
            Ok(Some(said)) => {
                let length = incoming.length();
                connection.introduce(said, length);
                connection.set_stage(&mut self.census, |_| Stage::Admitted);
                self.welcome(index);
            }
            Err(end) => self.finish(index, end),
        }
    }

    /// It is known who the client is: it is let in, unless its source has too many connections.
    fn welcome(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let is_one_of = |these: &[Trusted]| these.iter().any(|one| one.is(&connection.peer));
        let (ignored, wakes_nothing) =
            (is_one_of(&self.settings.idle_ignore), is_one_of(&self.settings.wake_ignore));
        connection.wakes_nothing = wakes_nothing;
        if ignored {
            self.ignore(index);
        }
        let Some(connection) = self.connections.get_mut(index) else { return };
        if !self.per_source.enter(connection.peer.source()) {
            return self.finish(index, End::SourceLimit);
        }
        connection.counted = self.per_source.counts();
        tracing::debug!(
            conn = connection.number,
            peer = %connection.peer,
            target = %self.targets[connection.target].name,
            "accepted"
        );
        self.place(index);
    }

    /// A connection keeps nothing awake any more.
    fn ignore(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        if !std::mem::replace(&mut connection.ignored, true) {
            self.keeping -= 1;
            self.publish_open();
        }
    }

    /// A client that is let in, now or again: to the service if it is ready; else it waits, for its own first byte or the service.
    pub(super) fn place(&mut self, index: usize) {
        let connection = &self.connections[index];
        if self.targets[connection.target].is_ready() {
            match self.targets.frozen {
                Frozen::No => return self.start_connect(index, 0, false),
                Frozen::Yes if connection.wakes_nothing => {
                    self.ignore(index);
                    return self.finish(index, End::WakeIgnored);
                }
                Frozen::Yes | Frozen::Thawing => {}
            }
        }
        if !connection.wakes_nothing && self.are_bytes_to_wake() {
            return self.wait_for_bytes(index);
        }
        self.hold(index, false);
    }

    /// Is a client to wait for its first bytes (`--wake-on=data`)? Not when the container is awake, or about to be: then nothing is
    /// saved, and a service that speaks first may speak.
    fn are_bytes_to_wake(&self) -> bool {
        self.settings.wake_on_bytes > 0 && (self.targets.frozen == Frozen::Yes || self.targets.all_sleep())
    }

    /// How many bytes of this client's wake. Its first one where it has no IP address: whether a unix socket's has sent more cannot be waited for.
    fn bytes_to_wake(&self, index: usize) -> u16 {
        if self.connections[index].peer.ip().is_some() { self.settings.wake_on_bytes } else { 1 }
    }

    /// Has the client wait for its first bytes, which may be there already, as its end may.
    fn wait_for_bytes(&mut self, index: usize) {
        let bytes = self.bytes_to_wake(index);
        let connection = &mut self.connections[index];
        connection.set_stage(&mut self.census, |_| Stage::Silent);
        self.silent.insert(connection.peer.source(), connection.number, index);
        if bytes > 1 {
            stir_from(connection.client.as_fd(), bytes);
        }
        self.register(index);
        self.silent_client_stirred(index);
    }

    /// A silent client has sent enough, finished or reset.
    pub(super) fn silent_client_stirred(&mut self, index: usize) {
        if self.connections.get(index).is_none() {
            return;
        }
        let bytes = self.bytes_to_wake(index);
        let connection = &mut self.connections[index];
        let client = connection.client.as_fd();
        match look(client) {
            Peeked::Byte if bytes > 1 && !has_received(client, bytes) => {
                if has_finished(client) {
                    self.finish(index, End::ClientLeft);
                }
            }
            Peeked::Byte => {
                self.silent.remove(connection.peer.source(), connection.number);
                self.heard(index);
                self.hold(index, false);
            }
            Peeked::Nothing => {}
            Peeked::End | Peeked::Abort(_) => self.finish(index, End::ClientLeft),
        }
    }

    /// Whatever a client that was silent sends stirs its socket again.
    fn heard(&self, index: usize) {
        if self.bytes_to_wake(index) > 1 {
            stir_from(self.connections[index].client.as_fd(), 1);
        }
    }

    /// Holds a client until its target is ready, and has the control process wake it. `refused`: it was ready, and has refused.
    pub(super) fn hold(&mut self, index: usize, refused: bool) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        connection.set_stage(&mut self.census, |_| Stage::Held);
        let (target, peer) = (connection.target, &connection.peer);
        match self.targets[target].hold(index, connection.wakes_nothing) {
            Found::Asleep => {
                let (peer, source) = (peer.to_string(), Some(peer.source().to_string()));
                connection.woke |= !refused;
                if !refused {
                    self.tallies[connection.listener].cold_starts += 1;
                }
                self.outbox.tell(&EngineEvent::Wake { target, peer, source, refused });
            }
            Found::Unknown => self.outbox.tell(&EngineEvent::Knock { target, peer: peer.to_string() }),
            Found::Ready if self.targets.frozen == Frozen::Yes => {
                let peer = peer.to_string();
                connection.woke = true;
                self.ask_to_thaw(&peer);
            }
            Found::Ready | Found::Waking => {}
        }
        self.register(index);
        self.publish_held();
    }

    /// Wakes whatever sleeps, although no client has connected (`bro wake`).
    pub(super) fn wake_by_hand(&mut self, by: &str) {
        self.ask_to_thaw(by);
        for (target, state) in self.targets.iter_mut().enumerate() {
            if state.is_asleep() {
                state.readiness = Readiness::Waking;
                self.outbox.tell(&EngineEvent::Wake {
                    target,
                    peer: by.to_owned(),
                    source: None,
                    refused: false,
                });
            }
        }
    }

    /// The control process has woken a target: its held clients are connected, in the order in which they came. That includes those
    /// that were held again after a refusal.
    pub(super) fn target_ready(&mut self, target: usize, ready: ReadyTarget) {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Agent(target).into());
        if let Err(errno) = self.epoll.add(ready.channel.as_fd(), event) {
            tracing::error!(error = errno.desc(), "cannot watch the namespace agent");
            return self.target_failed(target, End::StartFailed);
        }
        self.targets[target].readiness = Readiness::Ready(Box::new(AgentLink::new(ready)));
        let held = self.targets[target].take_held().into();
        self.let_in(held);
        self.flows_go_on(target);
    }

    /// The service listens, or goes on: clients that were held for it are let in, and those that have not said anything yet.
    pub(super) fn let_in(&mut self, mut held: Vec<usize>) {
        held.sort_by_key(|&index| self.connections[index].number);
        self.publish_held();
        // For the clients to come: a service that was just woken is not idle yet.
        self.stats.now_idle();
        for index in held {
            self.place(index);
        }
        for index in self.silent.take() {
            self.heard(index);
            self.place(index);
        }
    }

    /// The control process could not wake a target: its held clients are reset.
    pub(super) fn target_failed(&mut self, target: usize, end: End) {
        // Its agent has no more use, if there was one.
        drop(self.targets[target].sleeps());
        for index in self.targets[target].take_held() {
            self.finish(index, end);
        }
        self.flows_failed(target);
        self.publish_held();
    }

    /// Whether the service runs, for the clients that wake nothing: they wait until it is found, or are reset.
    pub(super) fn knocked(&mut self, target: usize, runs: bool) {
        let Some(state) = self.targets.get_mut(target) else { return };
        for index in state.knocked(runs) {
            self.ignore(index);
            self.finish(index, End::WakeIgnored);
        }
        self.publish_held();
    }

    /// The table of descriptors was full when the descriptors of a target, or of the kernel relay, came.
    pub(super) fn lacks_descriptors(&mut self, target: Option<usize>) {
        let Some((target, state)) = target.and_then(|target| Some((target, self.targets.get_mut(target)?)))
        else {
            return tracing::warn!(
                "no descriptors for the kernel relay are left (LimitNOFILE=); bytes are spliced"
            );
        };
        let name = &state.name;
        tracing::warn!(
            "no descriptor for the way to {name} is left (LimitNOFILE=); its clients wait until there is one"
        );
        // As after a refusal: it is tried again, after a while.
        self.outbox.tell(&EngineEvent::Wake { target, peer: String::new(), source: None, refused: true });
    }

    /// Lets silent clients go; nothing waits for them.
    pub(super) fn let_silent_clients_go(&mut self, end: End) {
        for index in self.silent.take() {
            self.finish(index, end);
        }
    }

    pub(super) fn publish_open(&self) {
        Stats::set(&self.stats.open, self.connections.len() as u64);
        Stats::set(&self.stats.flows, self.datagrams.len() as u64);
        Stats::set(&self.stats.keeping, (self.keeping + self.datagrams.keeping()) as u64);
    }

    pub(super) fn publish_held(&self) {
        Stats::set(&self.stats.held, self.targets.held() + self.datagrams.waiting() as u64);
    }
}
