//! The control process: what happens to a forwarder, and which of its parts takes account of it.

use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::anyhow;
use bro_relay::engine::protocol::{EngineEvent, Plain};
use bro_relay::stats::Stats;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, Interval, MissedTickBehavior, sleep_until};

use super::adoption::{self, Guests, SocketAdoption};
use super::data_plane::{DataPlane, PlaneNews};
use super::drain;
use super::freeze::FreezeDone;
use super::handover::Predecessor;
use super::lifecycle::{Due, LifeChange, Lifecycle, Phase};
use super::reload::Reload;
use super::requests::{CallerRequest, Requests};
use super::waiting::Limit;
use crate::cli::{Forward, RelayChoice};
use crate::control_socket::Reply;
use crate::ledger::Ledger;
use crate::service::sources::Choice;
use crate::systemd::notify;

/// How often the status is brought up to date; the engine's figures may take no longer.
pub(super) const STEP: Duration = Duration::from_secs(1);

/// How long the service manager may take to say which run of the unit it is, where the forwarder waits for that.
pub(super) const REMEMBER: Duration = Duration::from_secs(2);

/// A forwarder's control process.
pub(super) struct Control<'a> {
    pub(super) options: &'a Forward,
    pub(super) started: Instant,
    /// The service: asleep, woken, idle.
    pub(super) life: Lifecycle<'a>,
    /// The relay process and the kernel relay.
    pub(super) plane: DataPlane<'a>,
    /// `--adopt`: who accepts at the listeners.
    pub(super) adoption: Option<SocketAdoption>,
    /// Its successor and its predecessor.
    pub(super) reload: Reload<'a>,
    /// What callers ask it.
    pub(super) requests: Requests,
    /// How many connections there may be.
    pub(super) limit: Limit,
    /// Where the counts are kept for later forwarders.
    pub(super) ledger: Ledger,
    /// The status that systemd was told last.
    said: String,
    pub(super) failure: Option<anyhow::Error>,
}

/// The signals that a forwarder takes.
struct Signals {
    hang_up: Signal,
    terminate: Signal,
    interrupt: Signal,
}

/// What has become of a target.
enum Fate {
    /// It listens. It was looked for since then.
    Found {
        since: Instant,
    },
    Gone,
}

/// What a signal asks for.
enum Demand {
    Stop,
    Reload,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            hang_up: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for one that tells it to stop; another waits meanwhile.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    async fn next(&mut self) -> Demand {
        tokio::select! {
            _ = self.terminate.recv() => Demand::Stop,
            _ = self.interrupt.recv() => Demand::Stop,
            _ = self.hang_up.recv() => Demand::Reload,
        }
    }
}

/// What is done by the clock alone.
struct Clocks {
    /// The status, and whatever is looked at with it.
    step: Interval,
    /// systemd's watchdog, where there is one.
    watchdog: Option<Interval>,
    /// More time for a drain.
    extend: Interval,
}

/// What the clock says.
enum Tick {
    Step,
    Watchdog,
    Extend,
}

impl Clocks {
    fn new() -> Self {
        let mut extend = tokio::time::interval(drain::EXTEND_EVERY);
        // It runs during a drain only.
        extend.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watchdog = notify::watchdog_interval().map(tokio::time::interval);
        Self { step: tokio::time::interval(STEP), watchdog, extend }
    }

    async fn next(&mut self, draining: bool) -> Tick {
        let watchdog = async {
            match &mut self.watchdog {
                Some(watchdog) => watchdog.tick().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.step.tick() => Tick::Step,
            _ = watchdog => Tick::Watchdog,
            _ = self.extend.tick(), if draining => Tick::Extend,
        }
    }
}

/// Waits until something is due; for ever where nothing is.
async fn until(due: Option<(Instant, Due)>) -> Due {
    match due {
        Some((at, due)) => {
            sleep_until(at).await;
            due
        }
        None => std::future::pending().await,
    }
}

impl<'a> Control<'a> {
    pub(super) fn new(
        options: &'a Forward,
        life: Lifecycle<'a>,
        plane: DataPlane<'a>,
        adoption: Option<SocketAdoption>,
        reload: Reload<'a>,
        requests: Requests,
        limit: Limit,
    ) -> Self {
        let ledger = Ledger::of(options.unit.as_deref());
        let (started, said) = (Instant::now(), String::new());
        Self { options, started, life, plane, adoption, reload, requests, limit, ledger, said, failure: None }
    }

    /// From the first client to the exit.
    pub(super) async fn run(mut self, predecessor: Option<Predecessor>) -> anyhow::Result<()> {
        let (mut signals, mut clocks) = (Signals::new()?, Clocks::new());
        // Only a forwarder that insists on the kernel relay waits for it.
        if self.options.relay == RelayChoice::Sockmap {
            let loaded = tokio::select! {
                loaded = self.plane.loaded() => loaded,
                () = signals.stop() => return Ok(()),
            };
            self.plane.kernel_loaded(loaded).await?;
        }
        self.begin(predecessor).await?;
        loop {
            let (due, draining) = (self.life.next_due(&self.reload), self.life.is_draining());
            let flow = tokio::select! {
                news = self.plane.news() => self.heard(news).await?,
                Some(change) = self.life.change() => self.changed(change),
                news = adoption::news(&mut self.adoption) => self.adoption_news(news),
                Some(news) = self.reload.news() => self.replacement(news).await,
                demand = signals.next() => self.signalled(demand).await,
                due = until(due) => self.is_due(due),
                tick = clocks.next(draining) => self.ticked(tick).await,
                question = self.requests.next() => self.asked(question),
            };
            if flow.is_break() {
                return self.end().await;
            }
        }
    }

    /// Clients are welcome from now on.
    async fn begin(&mut self, predecessor: Option<Predecessor>) -> anyhow::Result<()> {
        // The thread that has loaded the programs attaches them; this one never needs the rights for that. Agents may have to show
        // the service clients' own addresses.
        let shows_clients = matches!(self.options.source, Choice::Auto | Choice::Client);
        bro_sockmap::capabilities::drop_the_kernel_relays(shows_clients);
        // Not before: if the demanded relay cannot be had, one sentence is all.
        for (listener, target) in self.reload.listeners() {
            let target = &self.life.targets[*target].target;
            tracing::info!(socket = %listener.name, address = %listener.address, %target, "listening");
        }
        if predecessor.is_none() {
            self.begin_adoption().await?;
        }
        self.plane.engine().send(Plain::Start);
        self.said = self.status();
        match predecessor {
            Some(predecessor) => self.take_over_from(predecessor),
            None => {
                notify::ready(&self.said);
                self.life.leave_where_only_a_timer_came();
            }
        }
        Ok(())
    }

    /// What the data plane says.
    async fn heard(&mut self, news: PlaneNews) -> anyhow::Result<ControlFlow<()>> {
        match news {
            PlaneNews::Event(event) => Ok(self.event(event).await),
            PlaneNews::KernelRelay(loaded) => {
                self.plane.kernel_loaded(loaded).await?;
                Ok(ControlFlow::Continue(()))
            }
            PlaneNews::Ended => {
                // However it ends, it was not told to.
                let ended = "the relay process has ended by itself, and with it every connection";
                let _first = self.failure.get_or_insert_with(|| anyhow!(ended));
                Ok(ControlFlow::Break(()))
            }
        }
    }

    /// What the engine says.
    async fn event(&mut self, event: EngineEvent) -> ControlFlow<()> {
        match event {
            EngineEvent::Wake { target, peer, source, refused } => {
                self.life.wanted(target, peer, source.as_deref(), refused);
                if let Some(adoption) = &mut self.adoption {
                    adoption.target_called(target);
                }
            }
            EngineEvent::Knock { target, peer } => self.life.knocked_for(target, peer),
            EngineEvent::Frozen(frozen) => self.life.engine_froze(frozen),
            EngineEvent::Thaw { peer } => self.life.thaw_for(peer),
            EngineEvent::Leaving(true) => return self.leaves().await,
            EngineEvent::Leaving(false) => self.life.stays(),
            EngineEvent::Draining(why) => {
                self.draining(&why);
                self.hand_containers_over();
            }
            EngineEvent::Waits { listener } => self.client_waits(listener),
            EngineEvent::Uses { listener, how } => {
                if let Some(adoption) = &mut self.adoption {
                    adoption.engine_uses(listener, how);
                }
            }
            EngineEvent::Drained => return self.reload.is_drained(),
            EngineEvent::Undelivered(about) => self.plane.undelivered(&about),
            EngineEvent::Pong => notify::alive(),
            EngineEvent::Listening { netns, port } => {
                tracing::debug!(netns, port, "the kernel says that there is a listener");
                self.life.activator.heard();
            }
            // Answers, which the handle has already taken.
            EngineEvent::Watching { .. } | EngineEvent::Tallies(_) | EngineEvent::Peers(_) => {}
        }
        self.guard_what_is_frozen();
        ControlFlow::Continue(())
    }

    /// What a background task of the life cycle has found.
    fn changed(&mut self, change: LifeChange) -> ControlFlow<()> {
        let cannot_thaw = matches!(&change, LifeChange::Freeze(FreezeDone::Thawed(Err(_))));
        let has_frozen = matches!(&change, LifeChange::Freeze(FreezeDone::Froze(Ok(true))));
        let of = match &change {
            LifeChange::Woken(target, Ok(_)) => {
                let waking = self.life.targets[*target].waking();
                let since = waking.map_or_else(Instant::now, |waking| waking.since);
                Some((*target, Fate::Found { since }))
            }
            LifeChange::NetnsGone(target) => Some((*target, Fate::Gone)),
            // Whether the idle time is over shows only now.
            LifeChange::Busy(None) => {
                let _told_in_the_life_cycle = self.look_for_guests();
                None
            }
            _ => None,
        };
        if let Err(error) = self.life.changed(change, &mut self.plane, &self.reload) {
            self.failure = Some(error);
            self.begin_drain("The process that --pid names has exited");
        }
        match (of, &mut self.adoption) {
            (Some((target, Fate::Found { since })), Some(adoption)) => adoption.target_found(target, since),
            (Some((target, Fate::Gone)), Some(adoption)) => adoption.target_gone(target),
            _ => {}
        }
        self.turn_away();
        self.guard_what_is_frozen();
        if cannot_thaw {
            // No client of a service that accepts itself would have it looked for.
            for target in self.adoption.as_ref().map(SocketAdoption::adopted_targets).unwrap_or_default() {
                self.life.started_by_itself(target);
            }
        }
        if has_frozen {
            // A client may have come in meanwhile.
            let _told_in_the_life_cycle = self.look_for_guests();
        }
        ControlFlow::Continue(())
    }

    /// Has the engine tell of clients of a service that is frozen and cannot accept them.
    fn guard_what_is_frozen(&mut self) {
        if let Some(adoption) = &mut self.adoption {
            adoption.set_frozen(self.life.freezing.is_frozen());
        }
    }

    /// What a signal asks for.
    async fn signalled(&mut self, demand: Demand) -> ControlFlow<()> {
        match demand {
            Demand::Stop => self.terminate(),
            Demand::Reload => self.begin_replacement().await,
        }
        ControlFlow::Continue(())
    }

    /// What is due now.
    fn is_due(&mut self, due: Due) -> ControlFlow<()> {
        match due {
            // The engine has the last word.
            Due::IdleTime if self.life.is_idle_time_over(&self.reload) => {
                if self.look_for_guests() == Guests::None {
                    self.life.idle_time_is_over();
                }
            }
            Due::IdleTime => {}
            Due::HoldLimit => {
                self.relay_what_is_late();
                self.life.held_too_long();
                self.turn_away();
            }
            Due::DrainLimit => self.drain_is_over(),
        }
        ControlFlow::Continue(())
    }

    async fn ticked(&mut self, tick: Tick) -> ControlFlow<()> {
        match tick {
            Tick::Step => self.look_around().await,
            Tick::Watchdog => self.plane.engine().send(Plain::Ping),
            Tick::Extend => notify::extend(drain::EXTEND_BY),
        }
        ControlFlow::Continue(())
    }

    /// What is looked at from time to time.
    async fn look_around(&mut self) {
        let stats = self.plane.stats().clone();
        self.reload.tell(&stats);
        if self.life.is_draining() {
            self.life.give_up_where_in_the_way();
            self.keep_counts().await;
        }
        self.life.give_up_on_slow_starts();
        self.life.look_at_the_clock();
        if self.ledger.is_due(Stats::get(&stats.accepted), stats.guests()) {
            self.keep_counts().await;
        }
        if self.life.phase == Phase::Serving {
            self.limit.look(Stats::get(&stats.open), self.reload.listeners());
        }
        self.plane.tell_what_was_left_alone();
        let now = self.status();
        if now != self.said {
            notify::status(&now);
            self.said = now;
        }
    }

    /// What a caller asks.
    fn asked(&mut self, question: CallerRequest) -> ControlFlow<()> {
        match question {
            CallerRequest::Status(asker) => {
                self.look_again_where_stale();
                self.report(asker);
            }
            CallerRequest::Metrics(asker) => {
                self.look_again_where_stale();
                self.tell_metrics(asker);
            }
            CallerRequest::Wake(asker) => self.life.told_to_wake(asker),
            CallerRequest::Sleep { force, asker } if !force && self.has_guests() => {
                asker.answer(Reply::refused("clients are connected".to_owned()));
            }
            CallerRequest::Sleep { force, asker } => self.life.told_to_sleep(force, asker, &self.reload),
        }
        ControlFlow::Continue(())
    }

    /// Is a client connected to a service that accepts itself?
    fn has_guests(&mut self) -> bool {
        let _told_in_the_life_cycle = self.look_for_guests();
        self.adoption.as_ref().is_some_and(SocketAdoption::has_guests)
    }

    /// What is said of clients that nothing of this process accepts is a second old at most.
    fn look_again_where_stale(&mut self) {
        if self.adoption.as_ref().is_some_and(SocketAdoption::is_stale) {
            let _told_in_the_life_cycle = self.look_for_guests();
        }
    }

    /// No connection is left, or none may be.
    async fn end(mut self) -> anyhow::Result<()> {
        if self.life.is_draining() {
            // A service that was woken only now may not be noted yet, and would never be put to sleep.
            drop(tokio::time::timeout(REMEMBER, self.life.activator.note_run()).await);
        }
        if self.life.freezing.is_frozen() && !self.reload.is_replaced() {
            // No other process would have it go on.
            drop(tokio::time::timeout(REMEMBER, self.life.activator.thaw()).await);
        }
        self.keep_counts().await;
        if self.life.phase == Phase::Leaving {
            self.mend_on_the_way_out().await;
        }
        // Which ends the agent: what goes on is in the service manager's store.
        drop(self.adoption.take());
        self.plane.stop().await?;
        self.failure.map_or(Ok(()), Err)
    }
}
