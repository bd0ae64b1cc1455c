//! The engine: one process, one level-triggered epoll, every connection. It accepts, has agents connect, and relays. Whatever may
//! have to wait for another process (systemd, podman, a name server) is left to the control process (`bro forward`): the engine
//! tells it what is needed, and the control process tells the engine when a target is ready.
//!
//! Level-triggered, because what to wait for is derived from the connection's state each time ([`Connection::interest`]): a
//! short read then costs no second one, and no order of events can lose an edge.

mod aborts;
mod accept_batch;
mod agent_link;
mod answers;
mod arrival;
mod congestion;
mod connect;
mod connections;
pub mod datagrams;
pub mod idle;
mod introductions;
pub mod lanes;
pub mod listeners;
mod outgoing;
pub mod protocol;
pub mod report;
pub mod socket_options;
mod targets;
mod token;
mod wake_on_data;
pub mod way_back;

use std::sync::Arc;
use std::time::{Duration, Instant};

use connect::PortQueue;
use datagrams::Datagrams;
use lanes::{OpenLanes, ServiceWatch};
use listeners::{Accepting, ListenerUse, Listeners, PerSource};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use slab::Slab;
use targets::Targets;
use token::Token;
use way_back::WayBack;

use crate::connection::{Census, Connection, End};
use crate::engine::protocol::{EngineCommand, EngineEvent, Mailbox, Outbox, Plain, Received};
use crate::listener::Listener;
use crate::proxy_protocol::{Trusted, Version};
use crate::rate::Rate;
use crate::relay::{Method, Tools};
use crate::stats::{Stats, Tally};
use crate::sys::AddressBook;

pub use targets::{ReadyTarget, slot};

/// What the command line decided for the engine.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `--connections-max`
    pub connections_max: usize,
    /// The most pipes for which there are descriptors beside so many connections.
    pub pipes: usize,
    /// `--connections-per-source`
    pub connections_per_source: Option<u32>,
    /// How bytes are moved.
    pub method: Method,
    /// `--keepalive-*`
    pub keepalive: socket_options::Keepalive,
    /// `--user-timeout`
    pub user_timeout: Option<Duration>,
    /// `--source`: whether connections to the service may be bound to an address.
    pub binds: bool,
    /// `--idle-timeout`
    pub idle_timeout: Option<Duration>,
    /// `--start-timeout`: how long a client may wait for its connection to the service, all in all.
    pub hold_limit: Duration,
    /// `--proxy-protocol`
    pub proxy_protocol: Option<Version>,
    /// `--trusted`, with `--accept-proxy`: the peers that may send a header.
    pub trusted: Vec<Trusted>,
    /// `--wake-on=data:BYTES`; 0 with `--wake-on=connect`.
    pub wake_on_bytes: u16,
    /// `--idle-by=bytes` or `--idle-below`: the idle time.
    pub idle_by_bytes: Option<Duration>,
    /// `--idle-ignore`
    pub idle_ignore: Vec<Trusted>,
    /// `--idle-below`
    pub idle_below: Option<Rate>,
    /// `--wake-ignore`
    pub wake_ignore: Vec<Trusted>,
    /// `--flows-max`, as far as there are descriptors.
    pub flows_max: usize,
    /// `--flow-timeout`
    pub flow_timeout: Duration,
    /// Whether a refused connection means “not ready yet” (every `--ready` but `none`).
    pub hold_refused: bool,
    /// `--icmp-port-unreachable`
    pub tells_undelivered: bool,
    /// `--adopt`: each listener is left alone until [`Plain::Use`] says otherwise.
    pub adopts: bool,
}

/// The engine's state.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    epoll: Epoll,
    listeners: Listeners,
    draining: bool,
    targets: Targets,
    connections: Slab<Connection>,
    /// How many of them are in each stage.
    census: Census,
    /// What stands beside connections for datagrams.
    datagrams: Datagrams,
    /// Connections that are not ignored (`--idle-ignore`).
    keeping: usize,
    per_source: PerSource,
    /// Connections on which the client has to say something first.
    silent: wake_on_data::Silent,
    /// Connections for which the kernel had no source port.
    ports: PortQueue,
    /// Connections to try again at the next tick (a unix service's backlog was full).
    retries: Vec<usize>,
    /// When to look after aborts that are on their way.
    looks: aborts::Looks,
    /// When to look for acknowledgements.
    answers: answers::Answers,
    next_number: u64,
    tools: Tools,
    /// The addresses that this process may connect to itself; without them, the agents connect.
    addresses: Option<AddressBook>,
    stats: Arc<Stats>,
    tallies: Vec<Tally>,
    lanes: Option<OpenLanes>,
    mailbox: Mailbox,
    outbox: Outbox,
    last_tick: Instant,
}

/// Events taken per epoll_wait(2).
const BATCH: usize = 128;

/// How often connections that wait for something are looked at.
const TICK: Duration = Duration::from_millis(100);

/// How soon a connection to a unix service with a full backlog is tried again.
const RETRY: Duration = Duration::from_millis(5);

impl Engine {
    /// An engine that will accept from `listeners`, each with the index of its target in `targets` (their names, for the log).
    ///
    /// # Errors
    /// When epoll refuses one of the descriptors.
    pub fn new(
        settings: Settings,
        listeners: Vec<(Listener, usize)>,
        targets: Vec<String>,
        addresses: Option<AddressBook>,
        stats: Arc<Stats>,
        (mailbox, outbox): (Mailbox, Outbox),
    ) -> anyhow::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(mailbox.channel(), EpollEvent::new(EpollFlags::EPOLLIN, Token::Mailbox.into()))?;
        let pipes = settings.pipes;
        let tallies = vec![Tally::default(); listeners.len()];
        let answers = answers::Answers::new(settings.user_timeout);
        let per_source = settings.connections_per_source;
        let listeners: Vec<(Arc<Listener>, usize)> =
            listeners.into_iter().map(|(listener, target)| (Arc::new(listener), target)).collect();
        let way_back = if listeners.iter().any(|(listener, _)| listener.kind.takes_datagrams()) {
            let all = listeners.iter().map(|(listener, _)| listener.clone()).collect();
            let way_back = WayBack::new(all, stats.clone(), settings.idle_by_bytes.is_some())?;
            epoll.add(way_back.wakes(), EpollEvent::new(EpollFlags::EPOLLIN, Token::WayBack.into()))?;
            Some(Arc::new(way_back))
        } else {
            None
        };
        let datagrams = Datagrams::new(settings.flows_max, per_source, settings.flow_timeout, way_back);
        Ok(Self {
            per_source: PerSource::new(per_source),
            datagrams,
            listeners: Listeners::new(listeners, settings.adopts),
            settings,
            epoll,
            draining: false,
            targets: Targets::asleep(targets),
            connections: Slab::new(),
            census: Census::default(),
            keeping: 0,
            silent: wake_on_data::Silent::default(),
            retries: Vec::new(),
            looks: aborts::Looks::default(),
            answers,
            ports: PortQueue::new(),
            next_number: 1,
            tools: Tools::new(pipes),
            addresses,
            stats,
            tallies,
            lanes: None,
            mailbox,
            outbox,
            last_tick: Instant::now(),
        })
    }

    /// What another thread has to run, where there are listeners for datagrams.
    #[must_use]
    pub fn way_back(&self) -> Option<Arc<WayBack>> {
        self.datagrams.way_back()
    }

    /// Runs until the control process is gone.
    ///
    /// # Errors
    /// When epoll itself fails, which nothing can be done about.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut events = vec![EpollEvent::empty(); BATCH];
        loop {
            let count = match self.epoll.wait(&mut events, self.patience()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(errno.into()),
            };
            self.listeners.next_turn();
            for event in &events[..count] {
                match Token::from(event.data()) {
                    Token::Connection { index, generation, side } => {
                        self.connection_event(index, generation, side, event.events());
                    }
                    Token::Listener(index) => self.client_waits(index)?,
                    Token::Flow { index, generation } => self.flow_event(index, generation),
                    Token::WayBack => self.flows_failed_on_their_way(),
                    Token::Agent(target) => self.agent_answered(target),
                    Token::Kernel => self.kernel_events(),
                    Token::Mailbox => {
                        if !self.read_mailbox()? {
                            return Ok(());
                        }
                    }
                }
            }
            self.outbox.flush();
            self.tick()?;
        }
    }

    /// How long epoll may sleep.
    fn patience(&self) -> EpollTimeout {
        let mut patience: Option<Duration> = None;
        let mut at_most =
            |span: Duration| patience = Some(patience.map_or(span, |patience| patience.min(span)));
        if !self.retries.is_empty() || self.outbox.is_behind() {
            at_most(RETRY);
        }
        if self.census.pending() > 0 {
            at_most(TICK);
        }
        if !self.ports.is_empty() {
            at_most(connect::PORT_STEP);
        }
        if let Some(limit) = self.settings.idle_timeout.filter(|_| !self.connections.is_empty()) {
            at_most((limit / 8).clamp(Duration::from_millis(10), Duration::from_secs(1)));
        }
        if let Some(step) = self.byte_step() {
            at_most(step);
        }
        if let Some(span) = self.looks.patience() {
            at_most(span);
        }
        if let Some(span) = self.answers.patience().filter(|_| !self.connections.is_empty()) {
            at_most(span);
        }
        if let Some(span) = self.flow_patience() {
            at_most(span);
        }
        if let Accepting::BackingOff { until, .. } = self.listeners.accepting() {
            at_most(until.saturating_duration_since(Instant::now()));
        }
        // One more millisecond than the wait, so that the instant has passed when epoll returns.
        patience.map_or(EpollTimeout::NONE, |span| {
            EpollTimeout::try_from(span + Duration::from_millis(1)).unwrap_or(EpollTimeout::ZERO)
        })
    }

    /// Everything that is due by the clock.
    fn tick(&mut self) -> anyhow::Result<()> {
        self.look_at_aborts();
        self.expire_flows();
        for (index, side) in self.answers.look(&mut self.connections) {
            self.finish(index, End::Vanished(side));
        }
        if self.census.pending() == 0
            && self.settings.idle_timeout.is_none()
            && self.byte_step().is_none()
            && !self.is_backing_off()
            && self.retries.is_empty()
        {
            return Ok(());
        }
        let now = Instant::now();
        if let Accepting::BackingOff { until, pause } = self.listeners.accepting()
            && now >= until
        {
            self.set_accepting(Accepting::Open)?;
            self.accept_after_pause(pause)?;
        }
        if now.duration_since(self.last_tick) < RETRY {
            return Ok(());
        }
        for index in std::mem::take(&mut self.retries) {
            self.retry_connect(index);
        }
        self.look_for_ports(now);
        let steps = [
            (self.census.pending() > 0).then_some(TICK),
            self.settings.idle_timeout.map(|limit| (limit / 8).min(TICK)),
            self.byte_step(),
        ];
        let idle_step = steps.into_iter().flatten().min().unwrap_or(TICK);
        if now.duration_since(self.last_tick) < idle_step {
            return Ok(());
        }
        self.last_tick = now;
        self.expire(now);
        Ok(())
    }

    const fn is_backing_off(&self) -> bool {
        matches!(self.listeners.accepting(), Accepting::BackingOff { .. })
    }

    /// Takes the control process's commands; false when it is done.
    fn read_mailbox(&mut self) -> anyhow::Result<bool> {
        loop {
            match self.mailbox.next() {
                None => return Ok(true),
                Some(Received::WithoutDescriptors(of)) => self.lacks_descriptors(of),
                Some(Received::Command(command)) => match command {
                    EngineCommand::Ready { target, ready } => self.target_ready(target, ready),
                    EngineCommand::Kernel { descriptors, share, clients } => {
                        let clients = clients.then_some(&self.listeners);
                        self.lanes = OpenLanes::load(&self.epoll, &descriptors, share, clients);
                    }
                    EngineCommand::Plain(plain) => match plain {
                        Plain::Start => self.set_accepting(Accepting::Open)?,
                        Plain::Stop => return Ok(false),
                        Plain::Watch(watch) => self.watch(watch),
                        Plain::Use { listener, how } => self.use_so(listener, how)?,
                        Plain::Failed { target, end } => self.target_failed(target, end),
                        Plain::Gone { target } => self.target_gone(target),
                        Plain::Knocked { target, runs } => self.knocked(target, runs),
                        Plain::Drain(why) => self.drain(why)?,
                        Plain::EndSilent => self.let_silent_clients_go(End::Shutdown),
                        Plain::EndAll(end) => self.end_all(end),
                        Plain::Leave(how) => {
                            let leaving = self.leave(how)?;
                            self.outbox.tell(&EngineEvent::Leaving(leaving));
                        }
                        Plain::Freeze(how) => {
                            let frozen = self.freeze(how);
                            self.outbox.tell(&EngineEvent::Frozen(frozen));
                        }
                        Plain::Thawed => self.thawed(),
                        Plain::Wake(by) => self.wake_by_hand(&by),
                        Plain::Ping => self.outbox.tell(&EngineEvent::Pong),
                        Plain::Report => {
                            let mut figures = report::figures(&self.connections, self.tallies.clone());
                            self.add_flows(&mut figures);
                            self.outbox.tell_figures(figures);
                        }
                    },
                },
            }
        }
    }

    /// Accepts no more; what was accepted may finish.
    fn drain(&mut self, why: String) -> anyhow::Result<()> {
        self.draining = true;
        self.set_accepting(Accepting::Closed)?;
        if let Some(lanes) = &mut self.lanes {
            lanes.unwatch_all(&self.listeners);
        }
        self.outbox.tell(&EngineEvent::Draining(why));
        self.tell_if_drained();
        Ok(())
    }

    /// A listener has a client, or a datagram.
    fn client_waits(&mut self, listener: usize) -> anyhow::Result<()> {
        match self.listeners.used(listener) {
            ListenerUse::Relay if self.listeners.takes_datagrams(listener) => {
                self.receive_datagrams(listener);
                Ok(())
            }
            ListenerUse::Relay => self.accept_some(listener),
            ListenerUse::WakeOnly => {
                self.listeners.set_use(&self.epoll, listener, ListenerUse::LeaveAlone)?;
                self.outbox.tell(&EngineEvent::Waits { listener });
                Ok(())
            }
            // The event was in the same batch as what the control process says.
            ListenerUse::LeaveAlone => Ok(()),
        }
    }

    fn use_so(&mut self, listener: usize, how: ListenerUse) -> anyhow::Result<()> {
        if self.listeners.set_use(&self.epoll, listener, how)? {
            self.outbox.tell(&EngineEvent::Uses { listener, how });
        }
        Ok(())
    }

    fn set_accepting(&mut self, accepting: Accepting) -> anyhow::Result<()> {
        Ok(self.listeners.set_accepting(&self.epoll, accepting)?)
    }

    /// Has the kernel relay's programs watch a target's service, where there are any.
    fn watch(&mut self, watch: ServiceWatch) {
        let target = watch.target;
        let known = self.targets.get_mut(target).zip(self.lanes.as_mut());
        let watching = known.is_some_and(|(known, lanes)| {
            known.watched = lanes.watch(watch);
            known.watched.is_some()
        });
        self.outbox.tell(&EngineEvent::Watching { target, watching });
    }

    /// The kernel relay's programs have something to say.
    fn kernel_events(&mut self) {
        let Some(lanes) = &mut self.lanes else { return };
        for (target, flow, socket) in lanes.hear(&mut self.connections, &self.outbox) {
            let Some(link) = self.targets[target].link() else { continue };
            if let Err(error) = link.hook(flow, socket) {
                tracing::warn!(%error, "the namespace agent does not take requests");
                self.target_gone(target);
            }
        }
    }

    fn end_all(&mut self, end: End) {
        let indices: Vec<usize> = self.connections.iter().map(|(index, _)| index).collect();
        for index in indices {
            self.finish(index, end);
        }
        self.end_flows();
    }
}
