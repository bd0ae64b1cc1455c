//! When a forwarder leaves, and that its container sleeps then: idle time, minimum up time, busy jobs, and `bro sleep`.

use std::ops::ControlFlow;
use std::time::Duration;

use bro_relay::engine::idle::Leave;
use bro_relay::engine::protocol::Plain;
use tokio::time::{Instant, timeout};

use super::adoption::LastLook;
use super::control::Control;
use super::freeze::Frost;
use super::inhibit::Inhibitors;
use super::lifecycle::{LifeChange, Lifecycle, Phase};
use super::reload::Reload;
use super::requests::CallerRequest;
use crate::control_socket::{Asker, Reply};
use crate::service::stop::Stopped;
use crate::systemd::notify;

/// The unit's own limit for this stop is longer by default; a slower unit stops without the forwarder.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How soon the engine is asked again whether it is time to leave.
const AGAIN: Duration = Duration::from_millis(100);

/// Where the questions of [`Inhibitors`] stand.
#[derive(Debug, Default)]
pub(super) struct Busy {
    /// They are being asked.
    asking: bool,
    /// What was busy last.
    who: Option<String>,
    /// When to ask the jobs or the engine again.
    again: Option<Instant>,
}

/// A caller that told the service to sleep (`bro sleep`).
#[derive(Debug)]
pub(super) struct Sleeper {
    force: bool,
    asker: Asker,
}

impl Lifecycle<'_> {
    /// When to leave for want of clients, or to look again whether there are any.
    pub(super) fn idle_deadline(&self, reload: &Reload<'_>) -> Option<Instant> {
        if self.phase != Phase::Serving || self.options.idle.exit_idle_time.finite().is_none() {
            return None;
        }
        if self.keep_awake.until().is_some() {
            return None;
        }
        let limit = self.history.idle_time();
        match self.freezing.frost() {
            Frost::None => {}
            Frost::Frozen { since } if self.wakers.is_empty() && !reload.stands_in_the_way() => {
                let limit = self.options.idle.freeze_time.finite()?;
                // With a silent client there the engine stays, and is not asked again at once.
                return [Some(since + limit), self.busy.again].into_iter().flatten().max();
            }
            _ => return None,
        }
        if self.busy.asking || !self.wakers.is_empty() || reload.stands_in_the_way() {
            return None;
        }
        // The unit is never stopped in the middle of its start, whether or not the waiting clients have given up.
        if self.options.unit.is_some() && self.being_woken().is_some() {
            return None;
        }
        // Who waits for a service to accept is in no count of the engine's (`--adopt`), and is not left for as long as it may wait.
        if self.options.adopt.is_any() && self.holds_any() {
            return None;
        }
        let awake = self.awake_since.map(|(since, _)| since + self.options.idle.min_uptime.or_forever());
        [Some(self.idle_since() + limit), Some(self.kept_until), awake, self.busy.again]
            .into_iter()
            .flatten()
            .max()
    }

    /// Since when nothing has happened; now, while something does.
    fn idle_since(&self) -> Instant {
        let since =
            if self.options.idle.counts_bytes() { self.stats.quiet_from() } else { self.stats.idle_from() };
        // The engine counts, and hears of a wake a moment later than the control process.
        since.map_or_else(Instant::now, Instant::from_std).max(self.woken_at).max(self.guests_seen)
    }

    /// Has the deadline passed? It may move while it is waited for.
    pub(super) fn is_idle_time_over(&self, reload: &Reload<'_>) -> bool {
        self.idle_deadline(reload).is_some_and(|deadline| deadline <= Instant::now())
    }

    /// The idle time is over: asks what may be busy, then the engine, which has the last word.
    pub(super) fn idle_time_is_over(&mut self) {
        let inhibitors = Inhibitors {
            file: self.options.idle.busy_file.clone(),
            exec: self.options.idle.busy_exec.clone(),
        };
        // A frozen service is not asked: it was asked before, and could not answer.
        let has_sockets = self.has_sockets;
        let nothing_to_ask = inhibitors.is_empty() && self.options.unit.is_none() && !has_sockets;
        if nothing_to_ask || self.freezing.is_frozen() {
            return self.ask_to_leave();
        }
        self.busy.asking = true;
        let activator = self.activator.clone();
        self.hear_of(async move {
            LifeChange::Busy(match inhibitors.busy(&activator).await {
                None if has_sockets => activator.why_it_goes_on().await,
                busy => busy,
            })
        });
    }

    /// The answer to the question what is busy.
    pub(super) fn is_busy(&mut self, who: Option<String>, reload: &Reload<'_>) {
        let limit = self.history.idle_time();
        self.busy.asking = false;
        self.busy.again = who.as_ref().map(|_| Instant::now() + Inhibitors::step(limit));
        if let Some(who) = who.as_ref().filter(|_| self.busy.who.is_none()) {
            tracing::info!("the idle time is over, and the service is busy: {who}");
        }
        self.busy.who = who;
        // A client may have come meanwhile.
        if self.busy.who.is_none() && self.is_idle_time_over(reload) {
            self.ask_to_leave();
        }
    }

    /// What keeps the idle exit waiting, if anything does.
    pub(super) fn who_is_busy(&self) -> Option<&str> {
        let limit = self.history.idle_time();
        self.busy.who.as_deref().filter(|_| self.idle_since() + limit <= Instant::now())
    }

    pub(super) fn ask_to_leave(&mut self) {
        let how = if self.options.idle.counts_bytes() {
            Leave::WithoutBytes(self.history.idle_time())
        } else {
            Leave::WithoutConnections
        };
        if self.may_freeze() {
            return self.ask_to_freeze(how);
        }
        self.phase = Phase::Leaving;
        self.engine.send(Plain::Leave(how));
    }

    /// A client is there: the engine is not asked again at once.
    pub(super) fn busy_again(&mut self) {
        self.busy.again = Some(Instant::now() + AGAIN);
    }

    /// `bro sleep`.
    pub(super) fn told_to_sleep(&mut self, force: bool, asker: Asker, reload: &Reload<'_>) {
        if self.phase != Phase::Serving {
            return asker.answer(Reply::leaving());
        }
        // The successor that is being started would stay.
        if reload.is_starting() {
            return asker.answer(Reply::leaving());
        }
        // The service manager would end the predecessor along with this process.
        if let Some(predecessor) = reload.predecessor().filter(|_| !force) {
            return asker.answer(Reply::refused(format!("clients are connected: {predecessor}")));
        }
        self.phase = Phase::Leaving;
        self.sleeper = Some(Sleeper { force, asker });
        self.engine.send(Plain::Leave(if force { Leave::Now } else { Leave::WithoutGuests }));
    }

    /// The engine does not let the forwarder leave: a client has connected.
    pub(super) fn stays(&mut self) {
        if self.phase == Phase::Leaving {
            self.phase = Phase::Serving;
        }
        let Some(Sleeper { asker, .. }) = self.sleeper.take() else {
            // The clock may not move, since only bytes count: then it would be asked again at once.
            return self.busy_again();
        };
        let figures = self.engine.report();
        let answering = async move {
            let clients = figures.await.map(|figures| figures.peers).unwrap_or_default();
            let message = "clients are connected".to_owned();
            asker.answer(Reply { clients, ..Reply::refused(message) });
        };
        drop(tokio::spawn(answering));
    }
}

impl Control<'_> {
    /// No client is there, and none is let in any more: stops the unit, and tells the caller that asked for it.
    pub(super) async fn leaves(&mut self) -> ControlFlow<()> {
        let sleeper = self.life.sleeper.take();
        let by_force = sleeper.as_ref().is_some_and(|sleeper| sleeper.force);
        if let Some(why) = self.why_the_container_goes_on().await.filter(|_| !by_force) {
            return self.stays_with(sleeper, &why);
        }
        let told_to_stop = match self.last_look(sleeper.is_some(), by_force).await {
            LastLook::Client => return self.stays_with(sleeper, "clients are connected"),
            LastLook::None(told_to_stop) => told_to_stop,
        };
        let why = if sleeper.is_some() { "Told to sleep: stopping" } else { "Idle: stopping" };
        notify::stopping(why, super::drain::EXTEND_BY);
        tracing::info!(
            "{}",
            if sleeper.is_some() {
                "told to sleep; exiting"
            } else {
                "no client is connected any more; exiting"
            }
        );
        // A wake that goes on would start the unit anew.
        self.life.wakes.shutdown().await;
        let activator = self.life.activator.clone();
        let stopping = timeout(STOP_LIMIT, async {
            match told_to_stop {
                Some(told) => activator.stop_what_was_told(told).await,
                None => activator.stop_what_it_started(by_force).await,
            }
        });
        tokio::pin!(stopping);
        let stopped = loop {
            tokio::select! {
                stopped = &mut stopping => break stopped,
                question = self.requests.next() => match question {
                    CallerRequest::Status(asker) => self.report(asker),
                    CallerRequest::Metrics(asker) => self.tell_metrics(asker),
                    CallerRequest::Wake(asker) | CallerRequest::Sleep { asker, .. } => asker.answer(Reply::leaving()),
                },
            }
        };
        if matches!(stopped, Ok(Ok(Stopped::Done))) {
            let counts = &mut self.life.counts;
            *(if sleeper.is_some() { &mut counts.told_stops } else { &mut counts.idle_stops }) += 1;
        }
        let outcome = match stopped {
            Ok(Ok(Stopped::Done)) => {
                // To be put to sleep and woken by hand does not make the idle time grow.
                if sleeper.is_none() && self.life.awake_since.is_some() {
                    self.life.history.slept();
                }
                Reply::done("stopped")
            }
            Ok(Ok(Stopped::NoUnit)) => {
                Reply::refused("the forwarder has ended, but it has no --unit that it could stop")
            }
            Ok(Ok(Stopped::NotOurs)) => {
                tracing::info!("the unit runs on: no forwarder had started it");
                Reply::refused(
                    "the forwarder has ended, but the unit runs on: it was not bro that started it (--force stops it all the same)",
                )
            }
            Ok(Ok(Stopped::Needed(other))) => {
                tracing::info!("the unit runs on: {other} needs it");
                Reply::refused(format!(
                    "the forwarder has ended, but the unit runs on: {other} needs it (--force stops both)"
                ))
            }
            Ok(Ok(Stopped::Used)) => {
                tracing::info!("the unit runs on: another forwarder uses it");
                Reply::refused(
                    "the forwarder has ended, but the unit runs on: another forwarder uses it (--force stops it all the same)",
                )
            }
            Ok(Err(error)) => {
                tracing::error!("cannot stop the unit: {error:#}");
                Reply::refused(format!("cannot stop the unit: {error:#}"))
            }
            Err(_) => {
                tracing::warn!("the unit takes long to stop; not waiting for it");
                Reply::refused("the unit takes long to stop")
            }
        };
        if let Some(Sleeper { asker, .. }) = sleeper {
            asker.answered(&outcome).await;
        }
        self.let_containers_end().await;
        ControlFlow::Break(())
    }

    /// A service that has this process's sockets would go on: so does this process.
    fn stays_with(&mut self, sleeper: Option<Sleeper>, why: &str) -> ControlFlow<()> {
        self.life.phase = Phase::Serving;
        self.life.busy_again();
        self.plane.engine().send(Plain::Start);
        if let Some(Sleeper { asker, .. }) = sleeper {
            asker.answer(Reply::refused(format!("{why} (--force stops it all the same)")));
        }
        ControlFlow::Continue(())
    }
}
