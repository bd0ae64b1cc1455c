//! `--adopt`: each listener, and who accepts at it. A sleeping service's is only watched for a first client, whom nothing accepts; the agent
//! (`bro-adopt`) puts it in the place of the service's own socket when that one listens, and from then on it is left alone. What a
//! service cannot have is relayed until its container ends.
//!
//! - `events.rs`: what happens to them, as the control process's loop hears of it
//! - `agent_thread.rs`: the agent's thread; `claims.rs`: what it and the control process agree on
//! - `fallback.rs`: why a listener is relayed; `closed.rs`: one that its service has closed; `mend.rs`: one that is damaged
//! - `guests.rs`, `traffic.rs`: who is connected to a service that accepts itself, and who of them keeps it awake; `relayed_inside.rs`: who is not the host's client
//! - `datagrams.rs`: what has come to a service that has a socket for datagrams
//! - `last_look.rs`: the one before the service is stopped
//! - `passed.rs`, `options.rs`: what is passed for it; what does not go with it
//! - `heritage.rs`: what a successor gets; `report.rs`: what is said of all that

mod agent_thread;
mod claims;
mod closed;
mod datagrams;
mod events;
mod fallback;
mod guests;
mod heritage;
mod last_look;
mod mend;
mod options;
mod passed;
mod relayed_inside;
mod report;
mod traffic;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_thread::{AgentNews, AgentThread};
use anyhow::{Context as _, bail};
use bro_adopt::socket::Place;
use bro_adopt::{HostListener, Stored, clients, health};
use bro_relay::engine::listeners::ListenerUse;
use bro_relay::engine::protocol::Plain;
use bro_relay::listener::{Listener, SocketKind};
use bro_relay::target::Target;
use claims::Claims;
use datagrams::SeenDatagrams;
use fallback::Fallback;
use mend::Mending;
use relayed_inside::RelayedInside;
use tokio::time::Instant;
use traffic::GuestTraffic;

use super::data_plane::DataPlane;
use crate::cli::Forward;
use crate::cli::idle::WakeOn;
use crate::fallback::FallbackKind;
use crate::relay_handle::Handle;

pub(super) use guests::Guests;
use guests::ShortGuests;
pub(super) use last_look::LastLook;
pub(super) use options::check;
use passed::{HERITAGE, SECCOMP};
pub(super) use passed::{Reserved, take};

/// How long a service that was found to listen may take until its listener is adopted: it may listen at several sockets, one after the other.
const GRACE: Duration = Duration::from_millis(200);

/// A listener, as this process knows it.
#[derive(Debug)]
pub(super) struct OfferedListener {
    name: String,
    address: String,
    target: usize,
    socket: OwnedFd,
    kind: SocketKind,
    place: Place,
    holder: ListenerHolder,
    /// Why the service did not get it at its last listen(2), if it did not.
    misfit: Option<Fallback>,
    /// The clients of the service that has it, at the last look.
    guests: u64,
    /// What has come to it, if it is for datagrams.
    datagrams: Option<SeenDatagrams>,
}

/// Who accepts at it.
#[derive(Debug)]
enum ListenerHolder {
    /// Nothing: a service that is not awake. The engine says when a client waits.
    Watched,
    /// The relay, while the service is not awake: not every client wakes it (`--wake-on=data`, `--wake-ignore`), and which one does shows only when it was
    /// accepted. Those that were are relayed for as long as they stay.
    Sifted,
    /// The engine is about to accept no more there: it is called for a client or, without one, only watched.
    Yielding { called: bool },
    /// Nothing yet: a client waits, and the service is being looked for.
    Called,
    /// The relay, from the start: it is of a kind that `--adopt` does not name.
    NotOffered,
    /// The service.
    Service { since: SystemTime },
    /// The relay.
    Relay(Fallback),
    /// Nothing: the service has closed it. Who connects is reset.
    Closed,
    /// The engine is about to accept no more at it.
    Returning,
    /// Nothing: it is broken.
    Broken(Fallback),
}

/// Whether the service that has the listeners is frozen (`--freeze`). Nothing accepts at them then: the engine says when a client waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrozenService {
    No,
    /// It is, or is about to be.
    Yes,
}

/// How far the agent is.
#[derive(Debug)]
enum AgentState {
    /// It has not begun, for a predecessor's may still answer.
    ToCome(passed::LeftBehind),
    Answers(AgentThread),
    /// It has stopped, and a successor is to get this.
    Bequeathed {
        stored: Vec<Stored>,
        way: OwnedFd,
        /// What it had said and was not heard yet.
        unheard: Vec<AgentNews>,
    },
    Over,
}

impl AgentState {
    /// What it says next; for ever nothing where none answers.
    async fn news(&mut self) -> AgentNews {
        match self {
            Self::Answers(thread) => thread.news().await,
            Self::ToCome(_) | Self::Bequeathed { .. } | Self::Over => std::future::pending().await,
        }
    }

    /// What it has said already.
    fn said_already(&mut self) -> Option<AgentNews> {
        match self {
            Self::Answers(thread) => thread.said_already(),
            Self::ToCome(_) | Self::Bequeathed { .. } | Self::Over => None,
        }
    }
}

/// All of it.
#[derive(Debug)]
pub(super) struct SocketAdoption {
    listeners: Vec<OfferedListener>,
    seccomp: OwnedFd,
    agent: AgentState,
    claims: Arc<Claims>,
    inside: Arc<RelayedInside>,
    engine: Arc<Handle>,
    /// How many containers the agent answers for.
    containers: usize,
    /// When the last one ended.
    ended: Option<Instant>,
    /// The signal by which the only one is told to stop, where that is known.
    stop_signal: Option<i32>,
    /// Targets that were found to listen, and when it is to be decided about their listeners.
    decisions: BTreeMap<usize, Instant>,
    /// When to look next who is connected.
    look_at: Option<Instant>,
    /// When that was done last.
    looked: Option<Instant>,
    /// Those whom no look sees.
    short_guests: ShortGuests,
    /// Who of those that are there keeps the service awake.
    traffic: GuestTraffic,
    /// How many that are not ignored were there at the last look; none where it could not be seen.
    present: Option<u64>,
    /// Since the look before, one has come, or a byte.
    stirred: bool,
    /// Whether the service is frozen.
    frozen: FrozenService,
    /// Not every client wakes the service.
    sifts: bool,
    /// How long a datagram counts as a client (`--flow-timeout`).
    flow_timeout: Duration,
    /// A look has failed, and it was said.
    blind: bool,
    /// Why listeners are relayed, of those that were not counted yet.
    fell_back: Vec<FallbackKind>,
    /// The way to the successor that is being started.
    way: Option<OwnedFd>,
    mending: Mending,
}

/// What it hears of, or has to do.
#[derive(Debug)]
pub(super) enum AdoptionNews {
    Agent(AgentNews),
    /// It is to be decided about this target's listeners.
    Decide(usize),
    /// It is time to look who is connected.
    Look,
    /// It is time to look whether what is damaged can be mended.
    Mend,
    /// What systemd has said to that.
    Mending(anyhow::Result<mend::MendAnswer>),
}

/// What happens next; for ever nothing without `--adopt`. Nothing is lost when this is cancelled.
pub(super) async fn news(adoption: &mut Option<SocketAdoption>) -> AdoptionNews {
    let Some(adoption) = adoption else { return std::future::pending().await };
    let decision = adoption.decisions.iter().map(|(target, at)| (*at, AdoptionNews::Decide(*target)));
    let look = adoption.look_at.map(|at| (at, AdoptionNews::Look));
    let mend = adoption.mending.next.filter(|_| adoption.mending.asking.is_none());
    let mend = mend.map(|at| (at, AdoptionNews::Mend));
    let due = decision.chain(look).chain(mend).min_by_key(|(at, _)| *at);
    let asking = &mut adoption.mending.asking;
    let asked = async {
        match asking {
            Some(asking) => asking.await.unwrap_or_else(|ended| Err(ended.into())),
            None => std::future::pending().await,
        }
    };
    let clock = async {
        match due {
            Some((at, news)) => {
                tokio::time::sleep_until(at).await;
                news
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        news = adoption.agent.news() => AdoptionNews::Agent(news),
        asked = asked => AdoptionNews::Mending(asked),
        news = clock => news,
    }
}

impl SocketAdoption {
    /// Nothing has begun yet.
    ///
    /// # Errors
    /// A target that no socket can be compared with; EMFILE.
    pub(super) fn new(
        reserved: Reserved,
        routes: &[(Listener, usize)],
        targets: &[Target],
        options: &Forward,
        plane: &DataPlane<'_>,
    ) -> anyhow::Result<Self> {
        let mut listeners = Vec::with_capacity(routes.len());
        let claims = Claims::new(routes.len());
        for (index, (listener, target)) in routes.iter().enumerate() {
            let is_offered = options.adopt.offers(listener.kind);
            if !is_offered {
                // For good.
                let _first = claims.take_for_relay(index);
            }
            listeners.push(OfferedListener {
                name: listener.name.clone(),
                address: listener.address.clone(),
                target: *target,
                socket: listener.socket.try_clone()?,
                kind: listener.kind,
                place: options::place(&targets[*target])?,
                holder: if is_offered { ListenerHolder::Watched } else { ListenerHolder::NotOffered },
                misfit: None,
                guests: 0,
                datagrams: (listener.kind == SocketKind::Datagram).then(SeenDatagrams::default),
            });
        }
        Ok(Self {
            claims: Arc::new(claims),
            inside: Arc::default(),
            listeners,
            seccomp: reserved.seccomp,
            agent: AgentState::ToCome(reserved.before),
            engine: plane.engine().clone(),
            containers: 0,
            ended: None,
            stop_signal: None,
            decisions: BTreeMap::new(),
            look_at: None,
            looked: None,
            short_guests: ShortGuests::NotHeard,
            traffic: GuestTraffic::of(&options.idle),
            present: Some(0),
            stirred: false,
            frozen: FrozenService::No,
            sifts: options.idle.wake_on != WakeOn::Connect || !options.idle.wake_ignore.is_empty(),
            flow_timeout: options.flow_timeout.or_forever(),
            blind: false,
            fell_back: Vec::new(),
            way: None,
            mending: Mending::default(),
        })
    }

    /// Starts the agent, with what the store or a predecessor had. Waits for the latter. What the agent then says of that is in its news already.
    async fn start_agent(&mut self) -> anyhow::Result<()> {
        let AgentState::ToCome(before) = std::mem::replace(&mut self.agent, AgentState::Over) else {
            return Ok(());
        };
        let stored = match before {
            passed::LeftBehind::Stored(stored) => stored,
            passed::LeftBehind::Heritage(way) => {
                tokio::task::spawn_blocking(move || heritage::receive(&way)).await??
            }
        };
        self.answer(stored, Vec::new())
    }

    fn answer(&mut self, stored: Vec<Stored>, unheard: Vec<AgentNews>) -> anyhow::Result<()> {
        let mut listeners = Vec::with_capacity(self.listeners.len());
        for OfferedListener { socket, place, .. } in &self.listeners {
            listeners.push(HostListener { socket: socket.try_clone()?, target: place.clone() });
        }
        let (seccomp, shared) = (self.seccomp.try_clone()?, (self.claims.clone(), self.inside.clone()));
        let thread = AgentThread::start(listeners, seccomp, stored, shared, unheard)?;
        self.agent = AgentState::Answers(thread);
        Ok(())
    }

    /// What a successor is passed beside the listeners, by name: the seccomp socket, and its end of the way by which it gets the rest.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn for_successor(&mut self) -> anyhow::Result<Vec<(&'static str, OwnedFd)>> {
        let (ours, theirs) = heritage::way()?;
        self.way = Some(ours);
        Ok(vec![(SECCOMP, self.seccomp.try_clone()?), (HERITAGE, theirs)])
    }

    /// Stops the agent; what it has is for the successor.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn bequeath(&mut self) -> anyhow::Result<()> {
        let (AgentState::Answers(thread), Some(way)) =
            (std::mem::replace(&mut self.agent, AgentState::Over), self.way.take())
        else {
            bail!("no successor can get what is known of containers");
        };
        let (stored, unheard) = thread.bequeath().context("handing over what is known of containers")?;
        self.agent = AgentState::Bequeathed { stored, way, unheard };
        Ok(())
    }

    /// The successor is gone: the agent goes on.
    pub(super) fn goes_on(&mut self) -> anyhow::Result<()> {
        match std::mem::replace(&mut self.agent, AgentState::Over) {
            AgentState::Bequeathed { stored, mut unheard, .. } => {
                // The new one tells of each container there is.
                self.containers = 0;
                unheard.retain(|news| !news.counts_containers());
                self.answer(stored, unheard)
            }
            other => {
                self.agent = other;
                Ok(())
            }
        }
    }

    /// Neither the agent nor the engine touches a listener any more: the successor may have what is known.
    pub(super) fn hand_over(&mut self) {
        if let AgentState::Bequeathed { stored, way, .. } = &self.agent {
            if let Err(error) = heritage::send(way, stored) {
                // It is restarted, with what is in the store.
                tracing::error!(%error, "the successor does not take what is known of containers");
            }
            self.agent = AgentState::Over;
        }
    }

    /// Has a service one of the listeners?
    pub(super) fn is_adopted(&self) -> bool {
        self.listeners.iter().any(|listener| matches!(listener.holder, ListenerHolder::Service { .. }))
    }

    /// The targets of those that a service has.
    pub(super) fn adopted_targets(&self) -> BTreeSet<usize> {
        let has = |listener: &&OfferedListener| matches!(listener.holder, ListenerHolder::Service { .. });
        self.listeners.iter().filter(has).map(|listener| listener.target).collect()
    }

    fn of_target(&self, target: usize) -> impl Iterator<Item = usize> + use<> {
        let these: Vec<usize> = self
            .listeners
            .iter()
            .enumerate()
            .filter(|(_, listener)| listener.target == target)
            .map(|(index, _)| index)
            .collect();
        these.into_iter()
    }

    /// What the engine does with a listener that a service has.
    const fn use_of_adopted(&self) -> ListenerUse {
        match self.frozen {
            FrozenService::No => ListenerUse::LeaveAlone,
            FrozenService::Yes => ListenerUse::WakeOnly,
        }
    }

    /// The service is frozen, or goes on.
    pub(super) fn set_frozen(&mut self, is: bool) {
        let now = if is { FrozenService::Yes } else { FrozenService::No };
        if std::mem::replace(&mut self.frozen, now) == now {
            return;
        }
        for index in 0..self.listeners.len() {
            if matches!(self.listeners[index].holder, ListenerHolder::Service { .. }) {
                self.use_so(index, self.use_of_adopted());
            }
        }
    }

    fn use_so(&self, listener: usize, how: ListenerUse) {
        self.engine.send(Plain::Use { listener, how });
    }

    /// Has the engine say when a client waits at it, if it is whole.
    fn watch(&mut self, index: usize) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        listener.guests = 0;
        listener.misfit = None;
        if let Some(datagrams) = &mut listener.datagrams {
            *datagrams = SeenDatagrams::default();
            datagrams::note_where_they_come_in(&listener.socket);
        }
        match health::check(listener.socket.as_fd()) {
            // Where the agent is about to have it adopted, it is left to that.
            Ok(()) if self.sifts && listener.kind == SocketKind::Stream => {
                let sifts = self.claims.take_for_sieve(index)
                    && set_nonblocking(&self.listeners[index].socket).is_ok();
                if sifts {
                    self.listeners[index].holder = ListenerHolder::Sifted;
                    self.use_so(index, ListenerUse::Relay);
                } else {
                    self.claims.leave_as_sieve(index);
                    self.watch_all_comers(index);
                }
            }
            Ok(()) => self.watch_all_comers(index),
            Err(damage) => {
                let _taken = self.claims.take_for_relay(index);
                self.relay(index, damage.into());
            }
        }
    }

    /// Has the engine say when a client waits at it, of whatever address.
    fn watch_all_comers(&mut self, index: usize) {
        self.listeners[index].holder = ListenerHolder::Watched;
        self.use_so(index, ListenerUse::WakeOnly);
    }

    /// The service is being woken, or listens: the relay accepts no more where it only sifts, of this target or at this listener.
    fn yield_sieve(&mut self, index: usize, called: bool) {
        if let Some(listener) = self.listeners.get_mut(index)
            && matches!(listener.holder, ListenerHolder::Sifted)
        {
            listener.holder = ListenerHolder::Yielding { called };
            self.use_so(index, ListenerUse::LeaveAlone);
        }
    }

    /// A client has come that wakes this target: those that come from now on are the service's.
    pub(super) fn target_called(&mut self, target: usize) {
        for index in self.of_target(target) {
            self.yield_sieve(index, true);
        }
    }

    /// The service is not woken after all.
    fn sift_again(&mut self, index: usize) {
        self.listeners[index].holder = ListenerHolder::Sifted;
        self.use_so(index, ListenerUse::Relay);
    }

    /// Watches, for a first client, what the agent did not find adopted, and relays what it is not to have. Where it could not be seen who is connected to a
    /// service, there is to be none that accepts its clients itself: it would never be idle.
    fn watch_the_rest(&mut self) {
        let sockets: Vec<_> = self.listeners.iter().map(|listener| listener.socket.as_fd()).collect();
        let uncountable = clients::are_countable(&sockets).err().map(|error| error.to_string());
        for index in 0..self.listeners.len() {
            match (&self.listeners[index].holder, &uncountable) {
                (ListenerHolder::NotOffered, _) => {
                    let listener = &self.listeners[index];
                    if let Some(why) = Fallback::never_adopted(listener.kind) {
                        tracing::info!(socket = %listener.name, address = %listener.address, reason = why.kind().word(), "the socket is relayed, not adopted: {why}");
                    }
                    self.use_so(index, ListenerUse::Relay);
                }
                (ListenerHolder::Watched, Some(why))
                    if self.listeners[index].datagrams.is_none() && self.claims.take_for_relay(index) =>
                {
                    self.relay(index, Fallback::Uncountable(why.clone()));
                }
                (ListenerHolder::Watched, _) => self.watch(index),
                _ => {}
            }
        }
    }

    /// Relays what comes to it, which was claimed for that.
    fn relay(&mut self, index: usize, why: Fallback) {
        if matches!(why, Fallback::Damaged(_)) {
            self.mend_soon();
        }
        let Some(listener) = self.listeners.get_mut(index) else { return };
        if matches!(why, Fallback::Damaged(health::Damage::NotListening | health::Damage::ShutDown)) {
            tracing::error!(socket = %listener.name, address = %listener.address, "nothing can be accepted at the socket: {why}");
            listener.holder = ListenerHolder::Broken(why);
            return self.use_so(index, ListenerUse::LeaveAlone);
        }
        tracing::warn!(socket = %listener.name, address = %listener.address, reason = why.kind().word(), "the socket is relayed, not adopted, until the container ends: {why}");
        self.fell_back.push(why.kind());
        if listener.datagrams.is_some() {
            datagrams::note_where_they_come_in(&listener.socket);
        }
        if let Err(errno) = set_nonblocking(&listener.socket) {
            tracing::error!(error = errno.desc(), socket = %listener.name, "the socket cannot be relayed either");
            listener.holder = ListenerHolder::Broken(why);
            return;
        }
        listener.holder = ListenerHolder::Relay(why);
        self.use_so(index, ListenerUse::Relay);
    }

    /// Resets all that wait at a target's listeners, and drops their datagrams: the service could not be started for them.
    pub(super) fn turn_away(&mut self, target: usize) {
        for index in self.of_target(target) {
            match self.listeners[index].holder {
                ListenerHolder::Called => {}
                // The client was accepted, and the engine resets it.
                ListenerHolder::Yielding { .. } => {
                    self.sift_again(index);
                    continue;
                }
                _ => continue,
            }
            if self.claims.take_for_relay(index) {
                reset_all(&self.listeners[index]);
                self.claims.leave_as_relay(index);
                self.watch(index);
            }
        }
    }

    /// The container of this target has ended: its listeners wait for the next client.
    pub(super) fn target_gone(&mut self, target: usize) {
        self.decisions.remove(&target);
        for index in self.of_target(target) {
            match self.listeners[index].holder {
                ListenerHolder::Called | ListenerHolder::Closed => self.watch(index),
                ListenerHolder::Watched if self.sifts => self.watch(index),
                ListenerHolder::Yielding { .. } => self.sift_again(index),
                ListenerHolder::Relay(Fallback::Damaged(_) | Fallback::Uncountable(_)) => {}
                ListenerHolder::Relay(_) => {
                    self.listeners[index].holder = ListenerHolder::Returning;
                    self.use_so(index, ListenerUse::WakeOnly);
                }
                _ => {}
            }
        }
    }

    /// The engine uses a listener so from now on.
    pub(super) fn engine_uses(&mut self, index: usize, how: ListenerUse) {
        let Some(listener) = self.listeners.get(index) else { return };
        match listener.holder {
            _ if how == ListenerUse::Relay => {}
            ListenerHolder::Returning => {
                self.claims.leave_as_relay(index);
                self.watch(index);
            }
            ListenerHolder::Yielding { called } => {
                if called {
                    self.listeners[index].holder = ListenerHolder::Called;
                } else {
                    self.watch_all_comers(index);
                }
                // Only now: the agent may be waiting for it.
                self.claims.leave_as_sieve(index);
            }
            _ => {}
        }
    }

    /// A target's service listens, which was looked for since then: it is decided soon which of its listeners it has.
    pub(super) fn target_found(&mut self, target: usize, since: Instant) {
        if self.containers == 0 && self.ended.is_some_and(|ended| ended >= since) {
            // What was found has ended meanwhile. A client that waits has it looked for again.
            return self.target_gone(target);
        }
        let grace = if self.containers == 0 { Duration::ZERO } else { GRACE };
        self.decisions.insert(target, Instant::now() + grace);
    }

    /// Relays what the service has not got.
    fn decide(&mut self, target: usize) {
        self.decisions.remove(&target);
        for index in self.of_target(target) {
            let listener = &mut self.listeners[index];
            let is_undecided = match listener.holder {
                ListenerHolder::Watched | ListenerHolder::Called | ListenerHolder::Sifted => true,
                // The service listens at another one now.
                ListenerHolder::Closed => listener.misfit.is_some(),
                ListenerHolder::Yielding { .. } => {
                    self.decisions.insert(target, Instant::now() + GRACE);
                    false
                }
                _ => false,
            };
            if !is_undecided {
                continue;
            }
            let why = match listener.misfit.take() {
                _ if self.containers == 0 => Fallback::NoProfile,
                Some(why) => why,
                None => Fallback::NoneFits,
            };
            if self.claims.take_for_relay(index) {
                self.relay(index, why);
            } else {
                // The agent is about to say that it is adopted.
                self.decisions.insert(target, Instant::now() + GRACE);
            }
        }
    }

    /// The service does not listen in time: clients of this target are relayed from now on, and so wait for it a second time. Whether there was anything to
    /// relay.
    pub(super) fn timed_out(&mut self, target: usize, limit: Duration) -> bool {
        let mut any = false;
        for index in self.of_target(target) {
            if matches!(self.listeners[index].holder, ListenerHolder::Called)
                && self.claims.take_for_relay(index)
            {
                self.relay(index, Fallback::StartTimeout(limit));
                any = true;
            }
        }
        any
    }
}

/// By the addresses that clients connect to, whatever a service of theirs is told (`bro fence --port`).
pub(super) fn name_as_clients_know_them(listeners: &mut [(Listener, usize)]) {
    let sockets: Vec<_> = listeners.iter().map(|(listener, _)| listener.socket.as_fd()).collect();
    let places = bro_adopt::bound::places(&sockets);
    for ((listener, _), place) in listeners.iter_mut().zip(places) {
        match place {
            Some(Place::Tcp(address)) => listener.address = address.to_string(),
            Some(Place::Udp(address)) => listener.address = format!("{address}/udp"),
            Some(Place::Path(_) | Place::Abstract(_)) | None => {}
        }
    }
}

fn set_nonblocking(socket: &OwnedFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// The most that are reset at once: more than a backlog holds by default.
const MOST_RESET: usize = 8192;

/// Accepts what waits, and resets it (SO_LINGER). A datagram is dropped.
fn reset_all(OfferedListener { socket: listener, datagrams, .. }: &OfferedListener) {
    use nix::libc::linger;
    use nix::sys::socket::{setsockopt, sockopt};
    if datagrams.is_some() {
        return bro_adopt::datagrams::drop_what_waits(listener.as_fd(), MOST_RESET);
    }
    if set_nonblocking(listener).is_err() {
        return;
    }
    for _ in 0..MOST_RESET {
        let Ok((client, _)) = bro_relay::sys::accept(listener.as_fd()) else { return };
        // Without it the client sees an orderly end.
        setsockopt(&client, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 }).ok();
    }
}
