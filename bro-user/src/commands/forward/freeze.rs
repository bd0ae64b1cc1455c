//! `--freeze`: an idle service is frozen, thawed for its next client, and stopped when there has been none for long.

use std::time::SystemTime;

use tokio::time::Instant;

use super::lifecycle::{LifeChange, Lifecycle, Phase};
use super::target_state::Wakefulness;
use crate::control_socket::Reply;
use bro_relay::engine::idle::Leave;
use bro_relay::engine::protocol::Plain;

/// How far the freezing is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Frost {
    /// It is not frozen.
    #[default]
    None,
    /// The engine was asked whether it is time.
    Asked,
    /// systemd was told to freeze it; meanwhile a client has come, or none.
    Freezing { wanted: bool },
    /// It is frozen.
    Frozen { since: Instant },
    /// systemd was told to thaw it.
    Thawing,
}

/// What is known of freezing.
#[derive(Debug, Default)]
pub(super) struct Freezing {
    frost: Frost,
    /// When the service was last frozen.
    since: Option<SystemTime>,
    /// It cannot be frozen, or must not be.
    failed: bool,
}

impl Freezing {
    pub(super) const fn frost(&self) -> Frost {
        self.frost
    }

    /// Is nothing frozen, and nothing about to be?
    pub(super) const fn is_off(&self) -> bool {
        matches!(self.frost, Frost::None)
    }

    /// Is it frozen, or about to be?
    pub(super) const fn is_frozen(&self) -> bool {
        matches!(self.frost, Frost::Freezing { .. } | Frost::Frozen { .. })
    }

    /// When it was frozen, if it is.
    pub(super) fn since(&self) -> Option<SystemTime> {
        self.since.filter(|_| self.is_frozen())
    }

    /// The service has gone to sleep, or goes on.
    pub(super) const fn is_over(&mut self) {
        self.frost = Frost::None;
    }
}

/// What systemd has done.
#[derive(Debug)]
pub(super) enum FreezeDone {
    /// It is frozen; or it is not, since a forwarder has not started it, or another one uses it.
    Froze(anyhow::Result<bool>),
    /// It is thawed.
    Thawed(anyhow::Result<()>),
}

impl Lifecycle<'_> {
    /// Is the service to be frozen instead of stopped?
    pub(super) fn may_freeze(&self) -> bool {
        self.options.idle.freeze && !self.freezing.failed && self.freezing.is_off() && self.is_awake()
    }

    /// The idle time is over: asks the engine, which has the last word.
    pub(super) fn ask_to_freeze(&mut self, how: Leave) {
        self.freezing.frost = Frost::Asked;
        self.engine.send(Plain::Freeze(how));
    }

    /// The engine's answer: it holds every client from now on, or a client is there.
    pub(super) fn engine_froze(&mut self, frozen: bool) {
        if self.freezing.frost != Frost::Asked {
            return;
        }
        if !frozen || self.phase != Phase::Serving {
            self.freezing.frost = Frost::None;
            if frozen {
                self.engine.send(Plain::Thawed);
            }
            self.stays_warm();
            return;
        }
        self.freezing.frost = Frost::Freezing { wanted: false };
        let activator = self.activator.clone();
        self.hear_of(async move { LifeChange::Freeze(FreezeDone::Froze(activator.freeze().await)) });
    }

    fn stays_warm(&mut self) {
        self.busy_again();
        if self.is_awake() {
            self.answer_wakers(&Reply::done("awake already"));
        }
    }

    /// A client has come to a frozen service.
    pub(super) fn thaw_for(&mut self, peer: String) {
        if self.freezing.is_frozen() {
            tracing::info!(%peer, unit = self.options.unit.as_deref(), "thawing the service for its first client");
            self.woken_by = Some(peer);
        }
        match self.freezing.frost {
            Frost::Freezing { .. } => self.freezing.frost = Frost::Freezing { wanted: true },
            Frost::Frozen { .. } => self.thaw(),
            Frost::Thawing => {}
            Frost::None | Frost::Asked => self.engine.send(Plain::Thawed),
        }
    }

    fn thaw(&mut self) {
        self.freezing.frost = Frost::Thawing;
        let activator = self.activator.clone();
        self.hear_of(async move { LifeChange::Freeze(FreezeDone::Thawed(activator.thaw().await)) });
    }

    /// systemd has done what it was told.
    pub(super) fn freeze_done(&mut self, done: FreezeDone) {
        match (done, self.freezing.frost) {
            (FreezeDone::Froze(Ok(true)), Frost::Freezing { wanted }) => {
                tracing::info!(
                    unit = self.options.unit.as_deref(),
                    "no client is connected any more; froze the unit"
                );
                self.freezing.frost = Frost::Frozen { since: Instant::now() };
                self.freezing.since = Some(SystemTime::now());
                if wanted {
                    self.thaw();
                }
            }
            (FreezeDone::Froze(result), Frost::Freezing { .. }) => {
                // It is stopped when idle, or left running if another process started it.
                self.freezing.failed = true;
                if let Err(error) = result {
                    tracing::warn!("cannot freeze the unit, so it is stopped when it is idle: {error:#}");
                }
                self.goes_on();
            }
            (FreezeDone::Thawed(Ok(())), Frost::Thawing) => self.goes_on(),
            (FreezeDone::Thawed(Err(error)), Frost::Thawing) => {
                // It may have been stopped meanwhile: a client that waits has it started, or thawed once more.
                tracing::warn!("cannot thaw the unit; looking for it anew: {error:#}");
                self.freezing.frost = Frost::None;
                for (target, state) in self.targets.iter_mut().enumerate() {
                    state.wakefulness = Wakefulness::Asleep;
                    self.engine.send(Plain::Gone { target });
                }
                self.engine.send(Plain::Thawed);
                if !self.wakers.is_empty() {
                    self.engine.send(Plain::Wake(super::wake::BY_HAND.into()));
                }
            }
            // Its namespace is gone by now, or this process leaves.
            _ => {}
        }
    }

    fn goes_on(&mut self) {
        self.freezing.is_over();
        self.woken_at = Instant::now();
        self.awake_since = Some((Instant::now(), SystemTime::now()));
        self.engine.send(Plain::Thawed);
        self.answer_wakers(&Reply::done("awake"));
    }
}
