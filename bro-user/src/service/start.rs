//! Starting the unit, for the clients that wait: the order, the watch over it, and why it failed.

use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::sleep;

use super::ServiceStarter;
use super::incarnation::NetnsSource;
use crate::last_words;
use crate::systemd::manager::{self, Changes, SystemdManager};
use crate::systemd::progress::{self, Progress};
use crate::systemd::restart;
use crate::systemd::scope::RuntimeScope;

/// Between two questions to systemd whether the unit has failed: where it tells of changes, and where it does not.
const WATCH: Duration = Duration::from_secs(1);
const WATCH_UNTOLD: Duration = Duration::from_millis(50);

/// How often a unit that ended without a report that it is ready is started once more, for the same clients.
const READY_LOST: u32 = 3;

/// How long the service manager may leave the order to start the unit unanswered, and the pause before it is asked again.
const SILENT_MANAGER: Duration = Duration::from_secs(10);

const READY_AGAIN: Duration = Duration::from_millis(200);

/// How long bro looks for Podman's words about a failed start.
const CAUSE: Duration = Duration::from_secs(3);

/// Waits until the unit may have changed.
async fn next_look(changes: &mut Option<Changes>) {
    match changes {
        Some(told) => {
            if let Ok(Err(_)) = tokio::time::timeout(WATCH, told.next_step()).await {
                *changes = None;
            }
        }
        None => sleep(WATCH_UNTOLD).await,
    }
}

impl ServiceStarter {
    /// Keeps [`ServiceStarter::progress`] up to date with what the unit does.
    pub(super) async fn follow_progress(&self, unit: &str) -> std::convert::Infallible {
        let mut pause = progress::FIRST;
        loop {
            sleep(std::mem::replace(&mut pause, progress::STEP)).await;
            // A service manager that executes itself anew says nothing for a moment.
            let Ok(bus) = self.bus().await else { continue };
            if let Ok(start) = bus.how_far(unit).await {
                let doing = crate::exit::on_one_line(&format!("{unit} {}", start.words()));
                self.note_progress(|progress| progress.doing = doing);
            }
        }
    }

    /// Is the service manager starting the unit just now, for this forwarder or another caller?
    pub async fn is_starting(&self) -> bool {
        let Some(unit) = &self.unit else { return false };
        let Ok(bus) = self.bus().await else { return false };
        bus.how_far(unit).await.is_ok_and(|start| start.is_under_way())
    }

    /// Does the unit run? Without a unit bro cannot know.
    pub async fn is_up(&self) -> bool {
        let Some(unit) = &self.unit else { return false };
        let Ok(bus) = self.bus().await else { return false };
        bus.active_state(unit).await.is_ok_and(|state| manager::is_active(&state))
    }

    /// Starts the unit, then watches it for as long as the caller waits for it. Returns only to say that the start failed. A
    /// service manager that does not answer for a moment, since it executes itself anew, is asked again.
    pub(super) async fn start(
        &self,
        unit: &str,
        findable: &tokio::sync::Notify,
        started: &tokio::sync::watch::Sender<bool>,
    ) -> anyhow::Result<std::convert::Infallible> {
        let mut silent_since = None;
        loop {
            let Err(error) = self.try_start(unit, findable, started, &mut silent_since).await;
            // A bus that never existed will not appear; but one on which a question was left open is there.
            let since = match silent_since {
                Some(since) => since,
                None if manager::was_left_open(&error)
                    || (manager::is_passing(&error) && self.bus.lock().await.is_some()) =>
                {
                    tokio::time::Instant::now()
                }
                None => return Err(error),
            };
            silent_since = Some(since);
            if !manager::is_passing(&error) || since.elapsed() > SILENT_MANAGER {
                return Err(error);
            }
            tracing::warn!("the service manager does not answer; asking again: {error:#}");
            *self.bus.lock().await = None;
            sleep(READY_AGAIN).await;
        }
    }

    async fn try_start(
        &self,
        unit: &str,
        findable: &tokio::sync::Notify,
        started: &tokio::sync::watch::Sender<bool>,
        silent_since: &mut Option<tokio::time::Instant>,
    ) -> anyhow::Result<std::convert::Infallible> {
        self.note_progress(|progress| *progress = Progress::default());
        // Before the look at the unit: from here on no other forwarder stops it.
        self.begin_use(unit).await;
        let bus = self.bus().await?;
        // Both at once: each takes several questions to the bus, and a first client waits for the answers.
        let (followed, jobs) = tokio::join!(self.follow_runs(&bus, unit), bus.ended_jobs(unit));
        followed?;
        let mut jobs = Some(jobs?);
        let before = loop {
            let mut turn = self.runs.turn().await;
            let look = bus.look(unit).await?;
            // After that look, and about the same state: the unit's process may end between two looks.
            if look.is_between() {
                drop(turn);
                let awaited = restart::awaited(&bus, unit).await?;
                turn = self.runs.turn().await;
                // The state of a restart that waits and of one that is under way is the same word.
                if awaited != look.state || bus.look(unit).await? != look {
                    continue;
                }
            }
            if look.is_running() {
                self.runs.see(&look);
            } else {
                self.runs.order(&look);
            }
            drop(turn);
            if !look.is_active() {
                break look;
            }
            // Perhaps no other process will thaw it: the forwarder that froze it may have been killed.
            if bus.thaw_if_frozen(unit).await? {
                tracing::info!(unit, "thawed the unit, which was frozen");
            }
            // Nor is the end of a job waited for.
            jobs = None;
            // There is nothing to order. An order would start the unit against its start limit where its process has just ended and
            // systemd is about to restart it.
            self.note_progress(|progress| progress.started = Some(tokio::time::Instant::now()));
            findable.notify_one();
            started.send_replace(true);
            let mut changes = bus.changes(unit).await.ok();
            while manager::is_active(&bus.active_state(unit).await?) {
                *silent_since = None;
                next_look(&mut changes).await;
            }
            started.send_replace(false);
        };
        // A container that is left of a unit that is being stopped is not to be found: it would soon be gone, with its clients. Nor
        // does the search begin before systemd has the order: finding the container ends this. Where no process tells that it is
        // there (in the own namespace, or in one that may be older than the unit), systemd has to say so: a connection that is
        // tried before there is a way to the target may take another way, and wait there.
        let process = matches!(self.place, NetnsSource::Container(_) | NetnsSource::Pid(_));
        // Another target's client, or another process, may have ordered it.
        if let Some(wakes) = self.wakes.get().filter(|_| !before.is_running()) {
            wakes.started();
        }
        let early = before.state != "deactivating" && process;
        let ordered = || {
            if early {
                findable.notify_one()
            }
        };
        let jobs = match jobs {
            Some(jobs) => jobs,
            None => bus.ended_jobs(unit).await?,
        };
        let asked = Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?);
        let cannot = || format!("cannot start {unit}");
        let mut result = bus.start_telling(unit, jobs, ordered).await.with_context(cannot)?;
        // Its Result= still describes the run before.
        if result == "failed" && bus.last_try(unit).await.is_ok_and(|last| last < asked) {
            let _turn = self.runs.turn().await;
            self.runs.withdraw(&bus.look(unit).await?);
            bail!(
                "systemd did not even try to start {unit}, which was started too often (StartLimitBurst= in \
                 StartLimitIntervalSec=); a client after that time wakes it again"
            );
        }
        // Rootless Podman's READY=1 is lost now and then: its sender may be gone before systemd looks up the sender's unit. Then
        // systemd ends a healthy container.
        let mut again = READY_LOST;
        while result == "failed"
            && again > 0
            && bus.result(unit).await.is_ok_and(|result| result == "protocol")
        {
            again -= 1;
            tracing::warn!(
                unit,
                "the unit ended without having said that it is ready (Result=protocol); it is started once more"
            );
            let _state = restart::awaited(&bus, unit).await?;
            let turn = self.runs.turn().await;
            let now = bus.look(unit).await?;
            if !now.is_running() {
                self.runs.order(&now);
            }
            drop(turn);
            result = bus.start(unit).await.with_context(cannot)?;
        }
        if result != "done" {
            // A run that another process starts later is not ours either.
            let turn = self.runs.turn().await;
            self.runs.withdraw(&bus.look(unit).await?);
            drop(turn);
            let cause = self.cause(&bus, unit, result == "dependency").await;
            let journal = self.manager.journal();
            bail!("starting {unit} ended with “{result}”{cause}; see `{journal} {unit}`");
        }
        self.note_progress(|progress| progress.started = Some(tokio::time::Instant::now()));
        findable.notify_one();
        started.send_replace(true);
        let mut changes = bus.changes(unit).await.ok();
        loop {
            let state = bus.active_state(unit).await?;
            *silent_since = None;
            if matches!(state.as_str(), "failed" | "inactive") {
                let (cause, journal) = (self.cause(&bus, unit, false).await, self.manager.journal());
                bail!("{unit} is {state} again before it was ready{cause}; see `{journal} {unit}`");
            }
            next_look(&mut changes).await;
        }
    }

    /// Why a start has failed, in Podman's words where there are any: of the unit itself, or of a unit that it requires and that
    /// did not start. The held clients wait for this, for a moment.
    async fn cause(&self, bus: &SystemdManager, unit: &str, by_another: bool) -> String {
        let looking = async {
            let other = if by_another { bus.failed_requirement(unit).await.ok().flatten() } else { None };
            let failed = other.as_deref().unwrap_or(unit);
            let of = match self.manager {
                RuntimeScope::System => last_words::Of::System,
                RuntimeScope::User => last_words::Of::User(nix::unistd::geteuid().as_raw()),
            };
            let words = last_words::cause(failed, of).await;
            match (other, words) {
                (Some(other), Some(words)) => format!(": {other} has failed, saying “{words}”"),
                (Some(other), None) => format!(": {other} has failed"),
                (None, Some(words)) => format!(", saying “{words}”"),
                (None, None) => String::new(),
            }
        };
        tokio::time::timeout(CAUSE, looking).await.unwrap_or_default()
    }

    /// Follows the unit's runs from now on. A look that comes after this misses no step.
    async fn follow_runs(&self, bus: &SystemdManager, unit: &str) -> anyhow::Result<()> {
        let mut following = self.following.lock().await;
        while following.try_join_next().is_some() {}
        if following.is_empty() {
            let (runs, bus, changes) = (self.runs.clone(), bus.clone(), bus.changes(unit).await?);
            following.spawn(async move {
                let Err(error) = runs.follow(&bus, changes).await;
                tracing::debug!(%error, "the unit's runs are not followed any more");
            });
        }
        Ok(())
    }

    /// Is this process, which is being stopped, in the way of the unit's start?
    pub async fn is_in_the_way(&self) -> bool {
        let (Some(unit), Some(own)) = (&self.unit, crate::systemd::own_unit::own_unit()) else {
            return false;
        };
        let Ok(bus) = self.bus().await else { return false };
        bus.starts_after_the_end_of(unit, &own).await.unwrap_or(false)
    }
}
