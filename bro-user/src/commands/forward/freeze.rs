//! `--freeze`: an idle service is frozen, thawed for its next client, and stopped when there has been none for long.

use std::time::SystemTime;

use tokio::time::Instant;

use super::wake::Wakefulness;
use super::{Control, Phase};
use crate::control_socket::Reply;
use bro_relay::engine::idle::Leave;
use bro_relay::engine::protocol::Plain;

/// How far the freezing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frost {
    /// It is not frozen.
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

/// What systemd has done.
#[derive(Debug)]
pub(super) enum Done {
    /// It is frozen; or it is not, since a forwarder has not started it, or another one uses it.
    Froze(anyhow::Result<bool>),
    /// It is thawed.
    Thawed(anyhow::Result<()>),
}

impl Control<'_> {
    /// Is the service to be frozen instead of stopped?
    pub(super) fn may_freeze(&self) -> bool {
        self.options.idle.freeze && !self.freezing_failed && self.frost == Frost::None && self.is_awake()
    }

    /// The idle time is over: asks the engine, which has the last word.
    pub(super) fn ask_to_freeze(&mut self, how: Leave) {
        self.frost = Frost::Asked;
        self.engine.send(Plain::Freeze(how));
    }

    /// The engine's answer: it holds every client from now on, or a client is there.
    pub(super) fn engine_froze(&mut self, frozen: bool) {
        if self.frost != Frost::Asked {
            return;
        }
        if !frozen || self.phase != Phase::Serving {
            self.frost = Frost::None;
            if frozen {
                self.engine.send(Plain::Thawed);
            }
            self.stays_warm();
            return;
        }
        self.frost = Frost::Freezing { wanted: false };
        let (activator, done) = (self.activator.clone(), self.frosted.0.clone());
        let freezing = async move { done.send(Done::Froze(activator.freeze().await)).ok() };
        drop(tokio::spawn(freezing));
    }

    fn stays_warm(&mut self) {
        self.busy_again();
        if self.is_awake() {
            self.answer_wakers(&Reply::done("awake already"));
        }
    }

    /// A client has come to a frozen service.
    pub(super) fn thaw_for(&mut self, peer: String) {
        if self.is_frozen() {
            tracing::info!(%peer, unit = self.options.unit.as_deref(), "thawing the service for its first client");
            self.woken_by = Some(peer);
        }
        match self.frost {
            Frost::Freezing { .. } => self.frost = Frost::Freezing { wanted: true },
            Frost::Frozen { .. } => self.thaw(),
            Frost::Thawing => {}
            Frost::None | Frost::Asked => self.engine.send(Plain::Thawed),
        }
    }

    fn thaw(&mut self) {
        self.frost = Frost::Thawing;
        let (activator, done) = (self.activator.clone(), self.frosted.0.clone());
        let thawing = async move { done.send(Done::Thawed(activator.thaw().await)).ok() };
        drop(tokio::spawn(thawing));
    }

    /// systemd has done what it was told.
    pub(super) fn frost_done(&mut self, done: Done) {
        match (done, self.frost) {
            (Done::Froze(Ok(true)), Frost::Freezing { wanted }) => {
                tracing::info!(
                    unit = self.options.unit.as_deref(),
                    "no client is connected any more; froze the unit"
                );
                self.frost = Frost::Frozen { since: Instant::now() };
                self.frozen_at = Some(SystemTime::now());
                if wanted {
                    self.thaw();
                }
            }
            (Done::Froze(result), Frost::Freezing { .. }) => {
                // It is stopped when idle, or left running if another process started it.
                self.freezing_failed = true;
                if let Err(error) = result {
                    tracing::warn!("cannot freeze the unit, so it is stopped when it is idle: {error:#}");
                }
                self.goes_on();
            }
            (Done::Thawed(Ok(())), Frost::Thawing) => self.goes_on(),
            (Done::Thawed(Err(error)), Frost::Thawing) => {
                // It may have been stopped meanwhile: a client that waits has it started, or thawed once more.
                tracing::warn!("cannot thaw the unit; looking for it anew: {error:#}");
                self.frost = Frost::None;
                for backend in 0..self.wakefulness.len() {
                    self.wakefulness[backend] = Wakefulness::Asleep;
                    self.engine.send(Plain::Gone { backend });
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
        self.frost = Frost::None;
        self.woken_at = Instant::now();
        self.awake_since = Some((Instant::now(), SystemTime::now()));
        self.engine.send(Plain::Thawed);
        self.answer_wakers(&Reply::done("awake"));
    }

    /// Is it frozen, or about to be?
    pub(super) const fn is_frozen(&self) -> bool {
        matches!(self.frost, Frost::Freezing { .. } | Frost::Frozen { .. })
    }
}
