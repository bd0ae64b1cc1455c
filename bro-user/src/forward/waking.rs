//! Waking: for the first client, after a refusal, and by hand (`bro wake`).

use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::{Instant, sleep, timeout};

use super::{AFTER_REFUSAL, Control, Phase};
use crate::activate::{Incarnation, Place};
use crate::connection::End;
use crate::control::{Asker, Outcome};
use crate::engine::handle::{Command, Plain};
use crate::engine::{Destination, slot};
use crate::exit::Failure;

/// Whether a target is awake, as far as the control side knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wakefulness {
    Asleep,
    Waking,
    Awake,
}

impl Control<'_> {
    /// Wakes a target in the background.
    pub(super) fn wake(&mut self, backend: usize, peer: &str, refused: bool) {
        let target = self.targets[backend].clone();
        self.wakefulness[backend] = Wakefulness::Waking;
        if refused {
            tracing::debug!(%target, "the service refused a connection; waiting for it");
        } else {
            self.woken_by = Some(peer.to_owned());
            tracing::info!(%target, %peer, unit = self.options.unit.as_deref(), "waking the service for its first client");
        }
        let limit = self.options.start_timeout.or_forever();
        let (activator, done) = (self.activator.clone(), self.woken.0.clone());
        let waking = async move {
            if refused {
                sleep(AFTER_REFUSAL).await;
            }
            let result = match timeout(limit, activator.wake(backend, &target)).await {
                Ok(result) => result,
                Err(elapsed) => Err(elapsed.into()),
            };
            done.send((backend, result)).ok();
        };
        drop(tokio::spawn(waking));
    }

    pub(super) async fn woken(
        &mut self,
        backend: usize,
        result: anyhow::Result<(Destination, Option<Arc<Incarnation>>)>,
    ) {
        match result {
            Ok((destination, incarnation)) => {
                self.wakefulness[backend] = Wakefulness::Awake;
                self.woken_at = Instant::now();
                let _since = self.awake_since.get_or_insert_with(|| (Instant::now(), SystemTime::now()));
                for (number, address) in destination.addresses.iter().enumerate() {
                    if let Some(address) = address {
                        // There is room for the most addresses a target may have.
                        let _there_is_room = self.addresses.write(slot(backend, number), *address);
                    }
                }
                self.engine.send(Command::Ready { backend, destination });
                let activator = self.activator.clone();
                drop(tokio::spawn(async move { activator.note_run().await }));
                if self.is_awake() {
                    self.answer_wakers(&Outcome::done("awake"));
                }
                let Some(incarnation) = incarnation else { return };
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
                    (End::StartTimeout, format!("the service did not listen within {limit}"))
                } else {
                    (End::StartFailed, format!("cannot start the service: {error:#}"))
                };
                tracing::error!(%target, "{why}; the clients held for it are reset");
                self.answer_wakers(&Outcome::refused(format!("{target}: {why}")));
                self.engine.send(Plain::Failed { backend, end });
                self.activator.forget().await;
                self.give_up_on_a_dead_process(error);
            }
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
    pub(super) async fn gone(&mut self, backend: usize) {
        tracing::info!(target = %self.targets[backend], "the service's namespace is gone; the next client wakes it again");
        if self.wakefulness[backend] == Wakefulness::Awake {
            self.wakefulness[backend] = Wakefulness::Asleep;
        }
        if self.wakefulness.iter().all(|target| *target == Wakefulness::Asleep) {
            self.awake_since = None;
            self.activator.end_use().await;
        }
        self.engine.send(Plain::Gone { backend });
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
        self.engine.send(Plain::Wake("bro wake".into()));
    }

    fn answer_wakers(&mut self, outcome: &Outcome) {
        for waker in self.wakers.drain(..) {
            waker.answer(outcome.clone());
        }
    }
}
