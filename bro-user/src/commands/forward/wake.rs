//! Waking: for the first client, after a refusal, and by hand (`bro wake`).

use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use bro_relay::connection::End;
use bro_relay::engine::protocol::Plain;
use bro_relay::stats::Stats;
use tokio::time::{Instant, sleep};

use super::data_plane::DataPlane;
use super::keep_awake::BY_CLOCK;
use super::lifecycle::{LifeChange, Lifecycle, Phase};
use super::target_state::{TargetState, Turned, Wakefulness, Waking};
use crate::control_socket::{Asker, Reply};
use crate::exit::Failure;
use crate::service::Awake;
use crate::service::incarnation::NetnsSource;
use crate::systemd::time_span;

/// How long a unit that systemd calls started may be without being ready, when no client waits for it any more. (How long it may
/// take to be started is for its TimeoutStartSec= to say.)
const SLOWEST_START: Duration = Duration::from_secs(600);

/// How long the service manager may take to say whether the unit runs.
const SILENT_MANAGER: Duration = Duration::from_secs(5);

/// Whether the service runs, as asked for a client that starts nothing.
#[derive(Debug)]
pub(super) struct RunState {
    target: usize,
    peer: String,
    runs: bool,
}

/// A client that nothing has accepted.
pub(super) const A_CLIENT: &str = "a client";

/// What is found awake without having been woken here.
const BY_ITSELF: &str = "its container";

/// What wakes it without being a client.
pub(super) const BY_HAND: &str = "bro wake";

impl Lifecycle<'_> {
    /// A client waits for this target, or it has refused a client since it was ready. The relay process is not trusted: neither with
    /// a target's number, nor to ask only once.
    pub(super) fn wanted(&mut self, target: usize, peer: String, source: Option<&str>, refused: bool) {
        let Some(state) = self.targets.get(target) else {
            return tracing::error!(target, "the relay process wants a target woken that there is not");
        };
        match &state.wakefulness {
            Wakefulness::Waking(waking) if waking.until.is_some() => {
                tracing::debug!(target, "woken already");
            }
            Wakefulness::Waking(_) => self.wait_again(target, &peer),
            Wakefulness::Asleep if source.is_some() && self.history.too_many().is_some() => {
                // It was started too often. It may run all the same.
                self.look_whether_it_runs(target, peer, Turned::All);
            }
            Wakefulness::Asleep | Wakefulness::Awake => {
                if !refused && self.is_asleep() {
                    self.found_asleep(source);
                }
                self.wake(target, &peer, refused);
            }
        }
    }

    /// A client waits for this target where nothing has accepted it yet (`--adopt`): who it is shows later.
    pub(super) fn called(&mut self, target: usize) {
        if self.targets[target].is_asleep() && self.history.too_many().is_some() {
            return self.look_whether_it_runs(target, A_CLIENT.to_owned(), Turned::All);
        }
        self.wanted(target, A_CLIENT.to_owned(), None, false);
    }

    /// The service has a socket of this process's: it runs, and is looked for, if it is not known yet.
    pub(super) fn started_by_itself(&mut self, target: usize) {
        if self.targets[target].is_asleep() && self.phase == Phase::Serving {
            self.wanted(target, BY_ITSELF.to_owned(), None, false);
        }
    }

    /// The targets whose clients have been held for as long as they may be.
    pub(super) fn overdue(&self) -> Vec<usize> {
        let now = Instant::now();
        let is_over = |waking: &Waking| waking.until.is_some_and(|until| until <= now);
        self.waking().filter(|(_, waking)| is_over(waking)).map(|(target, _)| target).collect()
    }

    /// Its clients wait for as long again.
    pub(super) fn hold_again(&mut self, target: usize) {
        let until = self.hold_limit();
        if let Wakefulness::Waking(waking) = &mut self.targets[target].wakefulness {
            waking.until = Some(until);
        }
    }

    /// Wakes a target in the background.
    fn wake(&mut self, target: usize, peer: &str, refused: bool) {
        let state = &mut self.targets[target];
        let address = state.target.clone();
        let pause = state.refusals.pause(refused);
        if refused {
            tracing::debug!(target = %address, ?pause, "the service refused a connection; waiting for it");
        } else {
            self.too_many_said = false;
            if self.options.unit.is_none() {
                self.history.started();
            }
            self.woken_by = Some(peer.to_owned());
            self.count_wake(peer);
            let why = match peer {
                BY_CLOCK => "at the time of --keep-awake",
                BY_ITSELF => "which runs already",
                _ => "for its first client",
            };
            tracing::info!(target = %address, %peer, unit = self.options.unit.as_deref(), "waking the service {why}");
        }
        let (activator, done) = (self.activator.clone(), self.changes.0.clone());
        let waking = async move {
            if !pause.is_zero() {
                // The timer's least is what is left of a millisecond.
                sleep(pause).await;
            }
            let result = activator.wake(target, &address).await;
            let failed = result.is_err();
            done.send(LifeChange::Woken(target, result)).ok();
            if failed {
                activator.forget().await;
            }
        };
        while self.wakes.try_join_next().is_some() {}
        let task = self.wakes.spawn(waking);
        let (since, until) = (Instant::now(), Some(self.hold_limit()));
        self.targets[target].wakefulness = Wakefulness::Waking(Waking { since, until, refused, task });
    }

    /// Counts a wake of the service: its first target's, and not a wake that only finds what a predecessor has woken.
    fn count_wake(&mut self, by: &str) {
        if self.awake_since.is_some()
            || self.being_woken().is_some()
            || [super::reload::AFTER_RELOAD, BY_ITSELF].contains(&by)
        {
            return;
        }
        *match by {
            BY_HAND => &mut self.counts.woken_by_hand,
            BY_CLOCK => &mut self.counts.woken_by_clock,
            _ => &mut self.counts.woken_by_clients,
        } += 1;
    }

    /// The service was found asleep.
    fn found_asleep(&self, by: Option<&str>) {
        let before = self.history.idle_time();
        self.history.woken(by);
        if self.history.idle_time() > before
            && let Some(remark) = self.history.remark()
        {
            tracing::info!("{remark}");
        }
    }

    /// A client that wakes nothing has come while the service slept, as far as is known here: another process may have started it.
    pub(super) fn knocked_for(&mut self, target: usize, peer: String) {
        if target >= self.targets.len() {
            return tracing::error!(target, "the relay process asks for a target that there is not");
        }
        self.look_whether_it_runs(target, peer, Turned::Ignored);
    }

    /// Asks once at a time for each target, however often the relay process wants to know.
    fn look_whether_it_runs(&mut self, target: usize, peer: String, of: Turned) {
        let before = self.targets[target].turned.replace(of);
        if let Some(before) = before {
            self.targets[target].turned = Some(before.max(of));
            return;
        }
        let activator = self.activator.clone();
        self.hear_of(async move {
            let runs = tokio::time::timeout(SILENT_MANAGER, activator.is_up()).await.unwrap_or(false);
            LifeChange::RunState(RunState { target, peer, runs })
        });
    }

    /// The service was started too often: the clients held for it are reset. Said once, until it may be started again.
    fn refuse(&mut self, target: usize, peer: &str) {
        // The first of those starts may have become an hour old just now.
        let Some(wait) = self.history.too_many() else { return self.wake(target, peer, false) };
        let limit = self.options.idle.wakes_per_hour.unwrap_or_default();
        if !std::mem::replace(&mut self.too_many_said, true) {
            let why = format!(
                "it was started {limit} times within an hour (--wakes-per-hour={limit}); clients that would wake it are refused for {}",
                time_span::roughly(wait.max(Duration::from_secs(1)))
            );
            let address = &self.targets[target].target;
            tracing::warn!(target = %address, "{why}");
            self.failures.failed(target, address, &why);
        }
        self.engine.send(Plain::Failed { target, end: End::WakeLimit });
        self.turned_away.push(target);
    }

    /// The service may run: then it is looked for, which starts nothing.
    pub(super) fn run_state(&mut self, RunState { target, peer, runs }: RunState) {
        match &self.targets[target].wakefulness {
            _ if !runs => {}
            Wakefulness::Waking(waking) if waking.until.is_some() => {}
            Wakefulness::Waking(_) => self.wait_again(target, &peer),
            Wakefulness::Asleep => self.wake(target, &peer, false),
            // It has refused since.
            Wakefulness::Awake => self.wake(target, &peer, true),
        }
        self.engine.send(Plain::Knocked { target, runs });
        let of = self.targets[target].turned.take();
        if of == Some(Turned::All) && !runs && self.targets[target].is_asleep() {
            self.refuse(target, &peer);
        }
    }

    /// How long a client that comes now is held.
    fn hold_limit(&self) -> Instant {
        Instant::now() + self.options.start_timeout.or_forever()
    }

    /// The first client after the held ones have been reset: it waits for the same start.
    fn wait_again(&mut self, target: usize, peer: &str) {
        let until = self.hold_limit();
        let TargetState { wakefulness: Wakefulness::Waking(waking), target: address, .. } =
            &mut self.targets[target]
        else {
            return;
        };
        waking.until = Some(until);
        tracing::info!(target = %address, %peer, since = ?waking.since.elapsed(), "the service is still being started");
        self.woken_by = Some(peer.to_owned());
    }

    /// The targets that are being woken.
    fn waking(&self) -> impl Iterator<Item = (usize, &Waking)> {
        let targets = self.targets.iter().enumerate();
        targets.filter_map(|(target, state)| Some((target, state.waking()?)))
    }

    /// Is a target being woken for clients whose time is not over?
    pub(super) fn holds_any(&self) -> bool {
        self.waking().any(|(_, waking)| waking.until.is_some())
    }

    /// Since when a target is being woken, if one is.
    pub(super) fn being_woken(&self) -> Option<Instant> {
        self.waking().map(|(_, waking)| waking.since).min()
    }

    /// “ for 40s: web.service runs ExecStartPre= (sleep); ”, of a start that takes a while.
    pub(super) fn how_far(&self) -> String {
        let doing = self.activator.progress().doing;
        match self.being_woken() {
            Some(since) if !doing.is_empty() => {
                format!(" for {}: {doing}; ", time_span::roughly(since.elapsed()))
            }
            _ => ": ".into(),
        }
    }

    /// When the next held clients are told that it takes too long.
    pub(super) fn impatience(&self) -> Option<Instant> {
        self.waking().filter_map(|(_, waking)| waking.until).min()
    }

    /// The start takes longer than clients are held: they are reset. Where it is a unit's, and the first one since it slept, it
    /// goes on: begun anew for the next client it would not take less.
    pub(super) fn held_too_long(&mut self) {
        let now = Instant::now();
        for target in 0..self.targets.len() {
            let Wakefulness::Waking(waking) = &mut self.targets[target].wakefulness else { continue };
            if waking.until.is_none_or(|until| until > now) {
                continue;
            }
            let goes_on = self.options.unit.is_some() && !waking.refused;
            let limit = self.options.start_timeout;
            let why = format!("the service {} within {limit}", self.options.ready.lacking());
            if goes_on {
                waking.until = None;
            } else {
                self.give_up(target);
            }
            let rest =
                if goes_on { "; its start goes on, and those who come later wait for that" } else { "" };
            self.failed(target, End::StartTimeout, &why, rest);
        }
    }

    /// Ends the wait for a service that was started long ago, is not ready, and has no client waiting for it.
    pub(super) fn give_up_on_slow_starts(&mut self) {
        let too_long =
            self.activator.progress().started.is_some_and(|started| started.elapsed() > SLOWEST_START);
        if !too_long || Stats::get(&self.stats.held) > 0 || !self.wakers.is_empty() {
            return;
        }
        let given_up: Vec<usize> = self.waking().map(|(target, _)| target).collect();
        for target in given_up {
            let address = &self.targets[target].target;
            tracing::error!(target = %address, "the service {} within {SLOWEST_START:?} of its unit's start; not waiting any more", self.options.ready.lacking());
            self.give_up(target);
            self.engine.send(Plain::Failed { target, end: End::StartTimeout });
        }
    }

    /// Gives the wake up.
    fn give_up(&mut self, target: usize) {
        let before = std::mem::replace(&mut self.targets[target].wakefulness, Wakefulness::Asleep);
        if let Wakefulness::Waking(waking) = before {
            waking.task.abort();
        }
        let activator = self.activator.clone();
        drop(tokio::spawn(async move { activator.forget().await }));
    }

    /// Tells of a wake that failed, also the held clients.
    fn failed(&mut self, target: usize, end: End, why: &str, rest: &str) {
        let address = &self.targets[target].target;
        tracing::error!(target = %address, "{why}; the clients held for it are reset{rest}");
        self.failures.failed(target, address, why);
        match end {
            End::StartTimeout => self.counts.start_timeouts += 1,
            _ => self.counts.start_failures += 1,
        }
        self.answer_wakers(&Reply::refused(format!("{}: {why}", self.targets[target].target)));
        self.engine.send(Plain::Failed { target, end });
        self.turned_away.push(target);
    }

    /// Keeps a service awake after its clients gave up while it was being started, for as long as that took: they may come again.
    fn keep_for_those_who_gave_up(&mut self, since: Instant) {
        if Stats::get(&self.stats.held) == 0 && self.wakers.is_empty() {
            self.kept_until = Instant::now() + since.elapsed().min(SLOWEST_START);
        }
    }

    /// The wake of a target has ended. An error is the end of the forwarder.
    pub(super) fn woken(
        &mut self,
        target: usize,
        result: anyhow::Result<Awake>,
        plane: &mut DataPlane<'_>,
    ) -> anyhow::Result<()> {
        match result {
            Ok(awake) => {
                self.is_found(target, awake, plane);
                Ok(())
            }
            Err(error) => {
                self.targets[target].wakefulness = Wakefulness::Asleep;
                let why = format!("cannot start the service: {error:#}");
                self.failed(target, End::StartFailed, &why, "");
                if self.was_one_process(&error) { Err(error) } else { Ok(()) }
            }
        }
    }

    /// The service listens: its clients are connected to it, and its namespace is watched.
    fn is_found(&mut self, target: usize, awake: Awake, plane: &mut DataPlane<'_>) {
        let Awake { ready, incarnation } = awake;
        let state = &mut self.targets[target];
        let since = state.waking().map(|waking| waking.since);
        state.wakefulness = Wakefulness::Awake;
        if let Some(since) = since.filter(|_| self.options.unit.is_some()) {
            self.keep_for_those_who_gave_up(since);
        }
        self.failures.woken(target);
        self.woken_at = Instant::now();
        let _since = self.awake_since.get_or_insert_with(|| (Instant::now(), SystemTime::now()));
        let state = &mut self.targets[target];
        if ready.addresses.iter().any(Option::is_some) {
            let seen = Some(ready.sources.to_string());
            if state.seen != seen {
                tracing::info!(target = %state.target, "the service sees clients {}", ready.sources);
                state.seen = seen;
            }
        }
        let new = incarnation.filter(|netns| state.found_in(netns));
        plane.ready(target, ready);
        if self.is_awake() {
            self.answer_wakers(&Reply::done("awake"));
        }
        if let Some(netns) = new {
            self.hear_of(async move {
                netns.gone().await;
                LifeChange::NetnsGone(target)
            });
        }
    }

    /// Told to stop while it wakes a target: where systemd starts the unit only after this process has ended, the held clients
    /// would be held in vain.
    pub(super) fn give_up_where_in_the_way(&self) {
        for (target, _) in self.waking() {
            let (activator, done) = (self.activator.clone(), self.changes.0.clone());
            let asking = async move {
                if activator.is_in_the_way().await {
                    let why =
                        "its unit is started only when this forwarder, which is told to stop, has ended";
                    done.send(LifeChange::Woken(target, Err(anyhow!(why)))).ok();
                }
            };
            drop(tokio::spawn(asking));
        }
    }

    /// `--pid` names one process. Once it has exited there will never be a namespace again, so the forwarder ends as well.
    fn was_one_process(&self, error: &anyhow::Error) -> bool {
        matches!(self.activator.place(), NetnsSource::Pid(_))
            && matches!(error.downcast_ref(), Some(Failure::NotFound(_)))
    }

    /// A target has lost its namespace.
    pub(super) fn gone(&mut self, target: usize) {
        tracing::info!(target = %self.targets[target].target, "the service's namespace is gone; the next client wakes it again");
        self.is_gone(target);
    }

    /// A target's service has ended: it sleeps.
    pub(super) fn is_gone(&mut self, target: usize) {
        if self.targets[target].is_awake() {
            self.targets[target].wakefulness = Wakefulness::Asleep;
        }
        if !self.targets.iter().any(TargetState::is_awake) {
            // Also where a target is being woken again, since it had refused a connection before this was known.
            self.awake_since = None;
        }
        if self.is_asleep() {
            self.freezing.is_over();
            self.activator.end_use();
        }
        self.engine.send(Plain::Gone { target });
        // A caller that waits for all of them waits for this one again.
        if !self.wakers.is_empty() {
            self.engine.send(Plain::Wake(BY_HAND.into()));
        }
    }

    /// `bro wake`: answered when every target is awake.
    pub(super) fn told_to_wake(&mut self, asker: Asker) {
        if self.phase != Phase::Serving {
            return asker.answer(Reply::leaving());
        }
        if self.is_awake() && self.freezing.is_off() {
            return asker.answer(Reply::done("awake already"));
        }
        self.wakers.push(asker);
        self.engine.send(Plain::Wake(BY_HAND.into()));
    }
}
