//! The life cycle of the service, as one forwarder drives it: asleep, woken (`wake.rs`), frozen and thawed (`freeze.rs`), idle and put
//! to sleep (`sleep.rs`). It knows nothing of how clients come: it is told that one waits for a target, and tells the engine when
//! that target is ready.

use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use bro_relay::stats::Stats;
use bro_relay::target::Target;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::data_plane::DataPlane;
use super::freeze::{FreezeDone, Freezing};
use super::keep_awake::{CalendarAnswer, KeepAwake};
use super::reload::Reload;
use super::settings;
use super::sleep::{Busy, Sleeper};
use super::target_state::TargetState;
use super::wake::RunState;
use crate::cli::Forward;
use crate::control_socket::{Asker, Reply};
use crate::ledger::Counts;
use crate::relay_handle::Handle;
use crate::service::failed_wake::Failures;
use crate::service::wakes::Wakes;
use crate::service::{Awake, ServiceStarter};

/// How far the exit has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Clients are welcome.
    Serving,
    /// The engine was asked whether it is idle.
    Leaving,
    /// No more clients; the present ones may finish until then.
    Draining(Instant),
}

/// What its background tasks report.
#[derive(Debug)]
pub(super) enum LifeChange {
    /// A wake of this target has ended.
    Woken(usize, anyhow::Result<Awake>),
    /// A target has lost its namespace.
    NetnsGone(usize),
    /// What is busy, after the idle time.
    Busy(Option<String>),
    /// systemd has frozen or thawed the unit.
    Freeze(FreezeDone),
    /// Whether the service runs, for clients that start nothing.
    RunState(RunState),
    /// Whether this is a time of `--keep-awake`.
    Calendar(CalendarAnswer),
}

/// What is due at an instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// The idle time, or the next look whether it is over.
    IdleTime,
    /// Clients have been held for as long as they may be.
    HoldLimit,
    /// The drain has lasted as long as it may.
    DrainLimit,
}

/// The life cycle.
pub(super) struct Lifecycle<'a> {
    pub(super) options: &'a Forward,
    pub(super) activator: Arc<ServiceStarter>,
    pub(super) engine: Arc<Handle>,
    pub(super) stats: Arc<Stats>,
    pub(super) targets: Vec<TargetState>,
    pub(super) phase: Phase,
    /// Since when a target has been awake, on the monotonic clock and on the wall clock.
    pub(super) awake_since: Option<(Instant, SystemTime)>,
    /// When a target was woken last; before that, when the forwarder started.
    pub(super) woken_at: Instant,
    /// What woke it last.
    pub(super) woken_by: Option<String>,
    /// No client was there any more when a long start had succeeded: the service is kept for their return, until then.
    pub(super) kept_until: Instant,
    /// The tasks of its wakes.
    pub(super) wakes: JoinSet<()>,
    /// How often the service is started.
    pub(super) history: Arc<Wakes>,
    /// `--keep-awake`
    pub(super) keep_awake: KeepAwake,
    /// The log has said that it was started too often.
    pub(super) too_many_said: bool,
    /// Wakes that failed.
    pub(super) failures: Failures,
    pub(super) freezing: Freezing,
    pub(super) busy: Busy,
    /// The callers that wait until it is awake.
    pub(super) wakers: Vec<Asker>,
    /// The caller that told it to sleep.
    pub(super) sleeper: Option<Sleeper>,
    /// When a client of a service that accepts itself was seen last (`--adopt`).
    pub(super) guests_seen: Instant,
    /// The service has sockets of this process's: it must not be left behind.
    pub(super) has_sockets: bool,
    /// Targets whose clients are to be reset, of those whom nothing has accepted yet.
    pub(super) turned_away: Vec<usize>,
    /// What this side of the forwarder has counted.
    pub(super) counts: Counts,
    pub(super) changes: (UnboundedSender<LifeChange>, UnboundedReceiver<LifeChange>),
}

impl<'a> Lifecycle<'a> {
    /// Nothing is awake yet, as far as is known.
    pub(super) fn new(
        options: &'a Forward,
        targets: Vec<Target>,
        activator: Arc<ServiceStarter>,
        keep_awake: KeepAwake,
        plane: &DataPlane<'_>,
    ) -> Self {
        let history = Arc::new(Wakes::of(options.unit.as_deref(), settings::wake_limits(options)));
        activator.count_starts(history.clone());
        if let Some(watching) = plane.watching() {
            activator.watch_through(watching.clone());
        }
        Self {
            options,
            activator,
            engine: plane.engine().clone(),
            stats: plane.stats().clone(),
            failures: Failures::of(options.unit.as_deref(), &targets),
            targets: targets.into_iter().map(TargetState::asleep).collect(),
            phase: Phase::Serving,
            awake_since: None,
            woken_at: Instant::now(),
            woken_by: None,
            kept_until: Instant::now(),
            wakes: JoinSet::new(),
            history,
            keep_awake,
            too_many_said: false,
            freezing: Freezing::default(),
            busy: Busy::default(),
            wakers: Vec::new(),
            sleeper: None,
            guests_seen: Instant::now(),
            has_sockets: false,
            turned_away: Vec::new(),
            counts: Counts::default(),
            changes: unbounded_channel(),
        }
    }

    /// Runs a task in the background, and hears of what it found.
    pub(super) fn hear_of(&self, task: impl Future<Output = LifeChange> + Send + 'static) {
        let changes = self.changes.0.clone();
        // The receiver may have left meanwhile.
        drop(tokio::spawn(async move { changes.send(task.await).ok() }));
    }

    /// What a background task has found.
    pub(super) async fn change(&mut self) -> Option<LifeChange> {
        self.changes.1.recv().await
    }

    /// Takes account of it. An error is the end of the forwarder.
    pub(super) fn changed(
        &mut self,
        change: LifeChange,
        plane: &mut DataPlane<'_>,
        reload: &Reload<'_>,
    ) -> anyhow::Result<()> {
        match change {
            LifeChange::Woken(target, result) => return self.woken(target, result, plane),
            LifeChange::NetnsGone(target) => self.gone(target),
            LifeChange::Busy(who) => self.is_busy(who, reload),
            LifeChange::Freeze(done) => self.freeze_done(done),
            LifeChange::RunState(state) => self.run_state(state),
            LifeChange::Calendar(answer) => self.calendar_said(answer),
        }
        Ok(())
    }

    /// What is due next, and when.
    pub(super) fn next_due(&self, reload: &Reload<'_>) -> Option<(Instant, Due)> {
        let draining_until = if let Phase::Draining(until) = self.phase { Some(until) } else { None };
        let dues = [
            self.idle_deadline(reload).map(|at| (at, Due::IdleTime)),
            self.impatience().map(|at| (at, Due::HoldLimit)),
            draining_until.map(|at| (at, Due::DrainLimit)),
        ];
        dues.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Is no target awake, nor being woken?
    pub(super) fn is_asleep(&self) -> bool {
        self.targets.iter().all(TargetState::is_asleep)
    }

    /// Is every target awake?
    pub(super) fn is_awake(&self) -> bool {
        self.targets.iter().all(TargetState::is_awake)
    }

    pub(super) const fn is_draining(&self) -> bool {
        matches!(self.phase, Phase::Draining(_))
    }

    pub(super) fn answer_wakers(&mut self, outcome: &Reply) {
        for waker in self.wakers.drain(..) {
            waker.answer(outcome.clone());
        }
    }
}
