//! Waking: for the first client, after a refusal, and by hand (`bro wake`).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep, timeout};

use super::{Control, Phase};
use crate::activate::{Awake, Place};
use crate::connection::End;
use crate::control::{Asker, Outcome};
use crate::engine::handle::{Command, Plain};
use crate::engine::slot;
use crate::exit::Failure;

/// Whether a target is awake, as far as the control side knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wakefulness {
    Asleep,
    Waking,
    Awake,
}

/// Who wakes it without being a client.
const BY_HAND: &str = "bro wake";

/// A target that refuses right after it was found to listen is not asked again sooner.
const AFTER_REFUSAL: Duration = Duration::from_millis(20);

/// Nor is one that goes on refusing (over a unix socket, whose listener no table shows) asked less often.
const AFTER_MANY_REFUSALS: Duration = Duration::from_millis(640);

/// How often a target has refused since it was woken.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Refusals(u32);

impl Refusals {
    /// How long to wait with the next try: twice as long each time.
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
        self.wakefulness[backend] = Wakefulness::Waking;
        let pause = self.refusals[backend].pause(refused);
        if refused {
            tracing::debug!(%target, ?pause, "the service refused a connection; waiting for it");
        } else {
            self.woken_by = Some(peer.to_owned());
            tracing::info!(%target, %peer, unit = self.options.unit.as_deref(), "waking the service for its first client");
        }
        let limit = self.options.start_timeout.or_forever();
        let (activator, done) = (self.activator.clone(), self.woken.0.clone());
        let waking = async move {
            sleep(pause).await;
            let result = match timeout(limit, activator.wake(backend, &target)).await {
                Ok(result) => result,
                Err(elapsed) => Err(elapsed.into()),
            };
            let failed = result.is_err();
            done.send((backend, result)).ok();
            if failed {
                activator.forget().await;
            }
        };
        while self.wakes.try_join_next().is_some() {}
        self.wakes.spawn(waking);
    }

    pub(super) fn woken(&mut self, backend: usize, result: anyhow::Result<Awake>) {
        match result {
            Ok(Awake { destination, incarnation }) => {
                self.wakefulness[backend] = Wakefulness::Awake;
                self.failures.woken(backend);
                self.woken_at = Instant::now();
                let _since = self.awake_since.get_or_insert_with(|| (Instant::now(), SystemTime::now()));
                // What stood there before may be another's by now.
                self.addresses.clear(slot(backend, destination.addresses.len())..slot(backend + 1, 0));
                for (number, address) in destination.addresses.iter().enumerate() {
                    if let Some(address) = address {
                        // There is room for the most addresses a target may have.
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
                    self.answer_wakers(&Outcome::done("awake"));
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
                let target = &self.targets[backend];
                let limit = self.options.start_timeout;
                let (end, why) = if error.is::<tokio::time::error::Elapsed>() {
                    (
                        End::StartTimeout,
                        format!("the service {} within {limit}", self.options.ready.lacking()),
                    )
                } else {
                    (End::StartFailed, format!("cannot start the service: {error:#}"))
                };
                tracing::error!(%target, "{why}; the clients held for it are reset");
                self.failures.failed(backend, target, &why);
                self.answer_wakers(&Outcome::refused(format!("{target}: {why}")));
                self.engine.send(Plain::Failed { backend, end });
                self.give_up_on_a_dead_process(error);
            }
        }
    }

    /// Told to stop while it wakes a target: where systemd starts the unit only after this process has ended, those who are held
    /// would be held in vain.
    pub(super) fn give_up_where_in_the_way(&self) {
        let waking =
            self.wakefulness.iter().enumerate().filter(|(_, target)| **target == Wakefulness::Waking);
        for (backend, _) in waking {
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

    /// `--pid` names one process. When it has exited there will never be a namespace again, so the forwarder ends as well.
    fn give_up_on_a_dead_process(&mut self, error: anyhow::Error) {
        if matches!(self.activator.place(), Place::Pid(_))
            && matches!(error.downcast_ref(), Some(Failure::NotFound(_)))
        {
            self.failure = Some(error);
            self.begin_drain("The process that --pid names has exited");
        }
    }

    /// A target's namespace is gone.
    pub(super) fn gone(&mut self, backend: usize) {
        tracing::info!(target = %self.targets[backend], "the service's namespace is gone; the next client wakes it again");
        if self.wakefulness[backend] == Wakefulness::Awake {
            self.wakefulness[backend] = Wakefulness::Asleep;
        }
        if self.wakefulness.iter().all(|target| *target == Wakefulness::Asleep) {
            self.awake_since = None;
            self.activator.end_use();
        }
        self.engine.send(Plain::Gone { backend });
        // Whoever waits for all of them waits for this one again.
        if !self.wakers.is_empty() {
            self.engine.send(Plain::Wake(BY_HAND.into()));
        }
    }

    /// Is every target awake?
    fn is_awake(&self) -> bool {
        self.wakefulness.iter().all(|target| *target == Wakefulness::Awake)
    }

    /// `bro wake`: answered when every target is awake.
    pub(super) fn told_to_wake(&mut self, asker: Asker) {
        if self.phase != Phase::Serving {
            return asker.answer(Outcome::leaving());
        }
        if self.is_awake() {
            return asker.answer(Outcome::done("awake already"));
        }
        self.wakers.push(asker);
        self.engine.send(Plain::Wake(BY_HAND.into()));
    }

    fn answer_wakers(&mut self, outcome: &Outcome) {
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
