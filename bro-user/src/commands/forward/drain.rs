//! The end of a forwarder that is told to stop, or replaced: no more clients, and time for those that are connected.

use std::time::Duration;

use bro_relay::connection::End;
use bro_relay::engine::protocol::Plain;
use tokio::time::Instant;

use super::control::Control;
use super::lifecycle::Phase;
use crate::systemd::notify;

/// How often a drain asks the service manager for more time, and by how much.
pub(super) const EXTEND_EVERY: Duration = Duration::from_secs(5);
pub(super) const EXTEND_BY: Duration = Duration::from_secs(15);

/// Between two tries to end the connections that have outlived the drain.
const AGAIN: Duration = Duration::from_secs(1);

impl Control<'_> {
    /// SIGTERM or SIGINT.
    pub(super) fn terminate(&mut self) {
        if self.reload.is_replaced() {
            // The successor does not have this process's connections.
            return self.told_to_stop_although_replaced();
        }
        if self.life.is_draining() {
            tracing::warn!("told twice to stop: ending every connection now");
            self.plane.engine().send(Plain::EndAll(End::Shutdown));
            return self.reload.stop_successor(Duration::ZERO);
        }
        self.begin_drain("Told to stop");
    }

    pub(super) fn begin_drain(&mut self, why: &'static str) {
        let limit = self.options.drain_timeout.or_forever();
        self.life.phase = Phase::Draining(Instant::now() + limit);
        let engine = self.plane.engine();
        // These clients have not asked for anything, and they would hold the drain for its whole time.
        engine.send(Plain::EndSilent);
        engine.send(Plain::Drain(why.into()));
        self.reload.stop_successor(limit);
    }

    /// The engine accepts no more. Said only now: a reader of STOPPING=1 may rely on it.
    pub(super) fn draining(&self, why: &str) {
        let limit = self.options.drain_timeout.or_forever();
        let open = self.plane.stats().guests();
        tracing::info!(open, "{why}: no more clients are accepted, those there are may finish");
        // A successor now speaks for the service: then this is muted.
        notify::stopping(&self.status(), EXTEND_BY.min(limit + Duration::from_secs(5)));
    }

    /// The drain has lasted as long as it may.
    pub(super) fn drain_is_over(&mut self) {
        self.plane.engine().send(Plain::EndAll(End::DrainTimeout));
        // Another process may have to be waited for still.
        self.life.phase = Phase::Draining(Instant::now() + AGAIN);
    }

    /// The unit is stopped: the connections that this process still has get the same time as the successor's.
    fn told_to_stop_although_replaced(&mut self) {
        self.reload.is_replaced_no_more();
        self.life.phase = Phase::Draining(Instant::now() + self.options.drain_timeout.or_forever());
    }
}
