//! Waking: for the first client, after a refusal, and by hand (`bro wake`).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bro_relay::connection::End;
use bro_relay::engine::protocol::{Command, Plain};
use bro_relay::engine::slot;
use bro_relay::stats::Stats;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::freeze::Frost;
use super::keep_awake::BY_CLOCK;
use super::{Control, Phase};
use crate::control_socket::{Asker, Reply};
use crate::exit::Failure;
use crate::service::{Awake, NetnsSource};
use crate::systemd::time_span;

/// Whether a target is awake, as far as the control process knows.
#[derive(Debug)]
pub(super) enum Wakefulness {
    Asleep,
    Waking(Waking),
    Awake,
}

/// A target that is being woken.
#[derive(Debug)]
pub(super) struct Waking {
    since: Instant,
    /// How long its clients are held. None once that is over: those clients have been reset, and the start goes on.
    pub(super) until: Option<Instant>,
    /// It has been awake, and has refused since.
    refused: bool,
    task: AbortHandle,
}

/// How long a unit that systemd calls started may be without being ready, when no client waits for it any more. (How long it may
/// take to be started is for its TimeoutStartSec= to say.)
const SLOWEST: Duration = Duration::from_secs(600);

/// How long the service manager may take to say whether the unit runs.
const KNOCK: Duration = Duration::from_secs(5);

/// Whether the service runs, as asked for a client that wakes nothing.
#[derive(Debug)]
pub(super) struct Knocked {
    backend: usize,
    peer: String,
    runs: bool,
}

/// The clients turned away where the service does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turned {
    /// Clients that wake nothing.
    Ignored,
    /// Every client, for it was started too often.
    All,
}

/// What wakes it without being a client.
pub(super) const BY_HAND: &str = "bro wake";

/// A target that refuses right after it was found to listen is asked again after this at the earliest.
const AFTER_REFUSAL: Duration = Duration::from_millis(20);

/// A target that goes on refusing (over a unix socket: no table shows its listener) after this at the latest.
const AFTER_MANY_REFUSALS: Duration = Duration::from_millis(640);

/// How often a target has refused since it was woken.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Refusals(u32);

impl Refusals {
    /// How long to wait before the next try: twice as long each time.
    fn pause(&mut self, refused: bool) -> Duration {
        if !refused {
            *self = Self::default();
            return Duration::ZERO;
        }
        let pause = AFTER_REFUSAL.saturating_mul(1 << self.0.min(16));
        self.0 += 1;
        pause.min(AFTER_MANY_REFUSALS)
    }
}

impl Control<'_> {
    /// Wakes a target in the background.
    pub(super) fn wake(&mut self, backend: usize, peer: &str, refused: bool) {
        let target = self.targets[backend].clone();
        let pause = self.refusals[backend].pause(refused);
        if refused {
            tracing::debug!(%target, ?pause, "the service refused a connection; waiting for it");
        } else {
            self.too_many_said = false;
            if self.options.unit.is_none() {
                self.history.started();
            }
            self.woken_by = Some(peer.to_owned());
            self.count_wake(peer);
            let why = if peer == BY_CLOCK { "at the time of --keep-awake" } else { "for its first client" };
            tracing::info!(%target, %peer, unit = self.options.unit.as_deref(), "waking the service {why}");
        }
        let (activator, done) = (self.activator.clone(), self.woken.0.clone());
        let waking = async move {
            sleep(pause).await;
            let result = activator.wake(backend, &target).await;
            let failed = result.is_err();
            done.send((backend, result)).ok();
            if failed {
                activator.forget().await;
            }
        };
        while self.wakes.try_join_next().is_some() {}
        let task = self.wakes.spawn(waking);
        let (since, until) = (Instant::now(), Some(self.patience()));
        self.wakefulness[backend] = Wakefulness::Waking(Waking { since, until, refused, task });
    }

    /// Counts a wake of the service: its first target's, and not a wake that only finds what a predecessor has woken.
    fn count_wake(&mut self, by: &str) {
        if self.awake_since.is_some() || self.being_woken().is_some() || by == super::reload::AFTER_RELOAD {
            return;
        }
        *match by {
            BY_HAND => &mut self.counts.woken_by_hand,
            BY_CLOCK => &mut self.counts.woken_by_clock,
            _ => &mut self.counts.woken_by_clients,
        } += 1;
    }

    /// The service was found asleep.
    pub(super) fn found_asleep(&self, by: Option<&str>) {
        let before = self.history.idle_time();
        self.history.woken(by);
        if self.history.idle_time() > before
            && let Some(remark) = self.history.remark()
        {
            tracing::info!("{remark}");
        }
    }

    /// A client that wakes nothing has come while the service slept, as far as is known here: another process may have started it.
    pub(super) fn knocked_for(&mut self, backend: usize, peer: String) {
        if backend >= self.targets.len() {
            return tracing::error!(backend, "the relay process asks for a target that there is not");
        }
        self.look_whether_it_runs(backend, peer, Turned::Ignored);
    }

    /// A client would start the service, which was started too often. It may run all the same.
    pub(super) fn looks_before_refusing(&mut self, backend: usize, peer: String) {
        self.look_whether_it_runs(backend, peer, Turned::All);
    }

    /// Asks once at a time for each target, however often the relay process wants to know.
    fn look_whether_it_runs(&mut self, backend: usize, peer: String, of: Turned) {
        let before = self.turned[backend].replace(of);
        if let Some(before) = before {
            self.turned[backend] = Some(before.max(of));
            return;
        }
        let (activator, answer) = (self.activator.clone(), self.knocked.0.clone());
        let asking = async move {
            let runs = tokio::time::timeout(KNOCK, activator.is_up()).await.unwrap_or(false);
            // The receiver may have left meanwhile.
            drop(answer.send(Knocked { backend, peer, runs }));
        };
        drop(tokio::spawn(asking));
    }

    /// The service was started too often: the clients held for it are reset. Said once, until it may be started again.
    fn refuse(&mut self, backend: usize, peer: &str) {
        // The first of those starts may have become an hour old just now.
        let Some(wait) = self.history.too_many() else { return self.wake(backend, peer, false) };
        let limit = self.options.idle.wakes_per_hour.unwrap_or_default();
        if !std::mem::replace(&mut self.too_many_said, true) {
            let why = format!(
                "it was started {limit} times within an hour (--wakes-per-hour={limit}); clients that would wake it are refused for {}",
                time_span::roughly(wait.max(Duration::from_secs(1)))
            );
            let target = &self.targets[backend];
            tracing::warn!(%target, "{why}");
            self.failures.failed(backend, target, &why);
        }
        self.engine.send(Plain::Failed { backend, end: End::WakeLimit });
    }

    /// The service may run: then it is looked for, which starts nothing.
    pub(super) fn knocked(&mut self, Knocked { backend, peer, runs }: Knocked) {
        match &self.wakefulness[backend] {
            _ if !runs => {}
            Wakefulness::Waking(waking) if waking.until.is_some() => {}
            Wakefulness::Waking(_) => self.wait_again(backend, &peer),
            Wakefulness::Asleep => self.wake(backend, &peer, false),
            // It has refused since.
            Wakefulness::Awake => self.wake(backend, &peer, true),
        }
        self.engine.send(Plain::Knocked { backend, runs });
        let of = self.turned[backend].take();
        if of == Some(Turned::All) && !runs && matches!(self.wakefulness[backend], Wakefulness::Asleep) {
            self.refuse(backend, &peer);
        }
    }

    /// How long a client that comes now is held.
    fn patience(&self) -> Instant {
        Instant::now() + self.options.start_timeout.or_forever()
    }

    /// The first client after the held ones have been reset: it waits for the same start.
    pub(super) fn wait_again(&mut self, backend: usize, peer: &str) {
        let patience = self.patience();
        let Some(Wakefulness::Waking(waking)) = self.wakefulness.get_mut(backend) else { return };
        waking.until = Some(patience);
        tracing::info!(target = %self.targets[backend], %peer, since = ?waking.since.elapsed(), "the service is still being started");
        self.woken_by = Some(peer.to_owned());
    }

    /// The targets that are being woken.
    fn waking(&self) -> impl Iterator<Item = (usize, &Waking)> {
        self.wakefulness.iter().enumerate().filter_map(|(backend, wakefulness)| match wakefulness {
            Wakefulness::Waking(waking) => Some((backend, waking)),
            Wakefulness::Asleep | Wakefulness::Awake => None,
        })
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
    pub(super) fn loses_patience(&mut self) {
        let now = Instant::now();
        for backend in 0..self.wakefulness.len() {
            let Wakefulness::Waking(waking) = &mut self.wakefulness[backend] else { continue };
            if waking.until.is_none_or(|until| until > now) {
                continue;
            }
            let goes_on = self.options.unit.is_some() && !waking.refused;
            let limit = self.options.start_timeout;
            let why = format!("the service {} within {limit}", self.options.ready.lacking());
            if goes_on {
                waking.until = None;
            } else {
                self.give_up(backend);
            }
            let rest =
                if goes_on { "; its start goes on, and those who come later wait for that" } else { "" };
            self.failed(backend, End::StartTimeout, &why, rest);
        }
    }

    /// Ends the wait for a service that was started long ago, is not ready, and has no client waiting for it.
    pub(super) fn give_up_on_slow_starts(&mut self) {
        let too_long = self.activator.progress().started.is_some_and(|started| started.elapsed() > SLOWEST);
        if !too_long || Stats::get(&self.stats.held) > 0 || !self.wakers.is_empty() {
            return;
        }
        let given_up: Vec<usize> = self.waking().map(|(backend, _)| backend).collect();
        for backend in given_up {
            let target = &self.targets[backend];
            tracing::error!(%target, "the service {} within {SLOWEST:?} of its unit's start; not waiting any more", self.options.ready.lacking());
            self.give_up(backend);
            self.engine.send(Plain::Failed { backend, end: End::StartTimeout });
        }
    }

    /// Gives the wake up.
    fn give_up(&mut self, backend: usize) {
        let before = std::mem::replace(&mut self.wakefulness[backend], Wakefulness::Asleep);
        if let Wakefulness::Waking(waking) = before {
            waking.task.abort();
        }
        let activator = self.activator.clone();
        drop(tokio::spawn(async move { activator.forget().await }));
    }

    /// Tells of a wake that failed, also the held clients.
    fn failed(&mut self, backend: usize, end: End, why: &str, rest: &str) {
        let target = &self.targets[backend];
        tracing::error!(%target, "{why}; the clients held for it are reset{rest}");
        self.failures.failed(backend, target, why);
        match end {
            End::StartTimeout => self.counts.start_timeouts += 1,
            _ => self.counts.start_failures += 1,
        }
        self.answer_wakers(&Reply::refused(format!("{}: {why}", self.targets[backend])));
        self.engine.send(Plain::Failed { backend, end });
    }

    /// Keeps a service awake after its clients gave up while it was being started, for as long as that took: they may come again.
    fn keep_for_those_who_gave_up(&mut self, since: Instant) {
        if Stats::get(&self.stats.held) == 0 && self.wakers.is_empty() {
            self.kept_until = Instant::now() + since.elapsed().min(SLOWEST);
        }
    }

    pub(super) fn woken(&mut self, backend: usize, result: anyhow::Result<Awake>) {
        let before = &self.wakefulness[backend];
        let since = if let Wakefulness::Waking(waking) = before { Some(waking.since) } else { None };
        match result {
            Ok(Awake { destination, incarnation }) => {
                if let Some(since) = since.filter(|_| self.options.unit.is_some()) {
                    self.keep_for_those_who_gave_up(since);
                }
                self.wakefulness[backend] = Wakefulness::Awake;
                self.failures.woken(backend);
                self.woken_at = Instant::now();
                let _since = self.awake_since.get_or_insert_with(|| (Instant::now(), SystemTime::now()));
                // An old address may be another service's by now.
                self.addresses.clear(slot(backend, destination.addresses.len())..slot(backend + 1, 0));
                for (number, address) in destination.addresses.iter().enumerate() {
                    if let Some(address) = address {
                        // There is room for as many addresses as a target may have.
                        let _there_is_room = self.addresses.write(slot(backend, number), *address);
                    }
                }
                if destination.addresses.iter().any(Option::is_some) {
                    let (target, seen) = (self.targets[backend].to_string(), destination.sources.to_string());
                    if self.seen.get(&target) != Some(&seen) {
                        tracing::info!(%target, "the service sees clients {seen}");
                        let _before = self.seen.insert(target, seen);
                    }
                }
                self.engine.send(Command::Ready { backend, destination });
                if self.is_awake() {
                    self.answer_wakers(&Reply::done("awake"));
                }
                let Some(incarnation) = incarnation else { return };
                let known = std::mem::replace(&mut self.watched[backend], Arc::downgrade(&incarnation));
                if known.ptr_eq(&self.watched[backend]) {
                    return;
                }
                let gone = self.gone.0.clone();
                let watching = async move {
                    incarnation.gone().await;
                    gone.send(backend).ok();
                };
                drop(tokio::spawn(watching));
            }
            Err(error) => {
                self.wakefulness[backend] = Wakefulness::Asleep;
                let why = format!("cannot start the service: {error:#}");
                self.failed(backend, End::StartFailed, &why, "");
                self.give_up_on_a_dead_process(error);
            }
        }
    }

    /// Told to stop while it wakes a target: where systemd starts the unit only after this process has ended, the held clients
    /// would be held in vain.
    pub(super) fn give_up_where_in_the_way(&self) {
        for (backend, _) in self.waking() {
            let (activator, done) = (self.activator.clone(), self.woken.0.clone());
            let asking = async move {
                if activator.is_in_the_way().await {
                    let why =
                        "its unit is started only when this forwarder, which is told to stop, has ended";
                    done.send((backend, Err(anyhow::anyhow!(why)))).ok();
                }
            };
            drop(tokio::spawn(asking));
        }
    }

    /// `--pid` names one process. Once it has exited there will never be a namespace again, so the forwarder ends as well.
    fn give_up_on_a_dead_process(&mut self, error: anyhow::Error) {
        if matches!(self.activator.place(), NetnsSource::Pid(_))
            && matches!(error.downcast_ref(), Some(Failure::NotFound(_)))
        {
            self.failure = Some(error);
            self.begin_drain("The process that --pid names has exited");
        }
    }

    /// A target has lost its namespace.
    pub(super) fn gone(&mut self, backend: usize) {
        tracing::info!(target = %self.targets[backend], "the service's namespace is gone; the next client wakes it again");
        if matches!(self.wakefulness[backend], Wakefulness::Awake) {
            self.wakefulness[backend] = Wakefulness::Asleep;
        }
        if !self.wakefulness.iter().any(|target| matches!(target, Wakefulness::Awake)) {
            // Also where a target is being woken again, since it had refused a connection before this was known.
            self.awake_since = None;
        }
        if self.wakefulness.iter().all(|target| matches!(target, Wakefulness::Asleep)) {
            self.frost = Frost::None;
            self.activator.end_use();
        }
        self.engine.send(Plain::Gone { backend });
        // A caller that waits for all of them waits for this one again.
        if !self.wakers.is_empty() {
            self.engine.send(Plain::Wake(BY_HAND.into()));
        }
    }

    /// Is no target awake, nor being woken?
    pub(super) fn is_asleep(&self) -> bool {
        self.wakefulness.iter().all(|target| matches!(target, Wakefulness::Asleep))
    }

    /// Is every target awake?
    pub(super) fn is_awake(&self) -> bool {
        self.wakefulness.iter().all(|target| matches!(target, Wakefulness::Awake))
    }

    /// `bro wake`: answered when every target is awake.
    pub(super) fn told_to_wake(&mut self, asker: Asker) {
        if self.phase != Phase::Serving {
            return asker.answer(Reply::leaving());
        }
        if self.is_awake() && self.frost == Frost::None {
            return asker.answer(Reply::done("awake already"));
        }
        self.wakers.push(asker);
        self.engine.send(Plain::Wake(BY_HAND.into()));
    }

    pub(super) fn answer_wakers(&mut self, outcome: &Reply) {
        for waker in self.wakers.drain(..) {
            waker.answer(outcome.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_goes_on_refusing_is_asked_less_often() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.pause(false), Duration::ZERO);
        let pauses: Vec<_> = (0..7).map(|_| refusals.pause(true).as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 640]);
        assert_eq!(refusals.pause(false), Duration::ZERO);
        assert_eq!(refusals.pause(true), AFTER_REFUSAL);
    }
}
