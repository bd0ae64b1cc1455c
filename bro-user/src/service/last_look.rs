//! The last look at a service that accepts its clients itself, before it is stopped. After any look it may accept one more, which its end would cut
//! off. So it is frozen while it is looked at, and has its stop signal before it runs on: what comes by then waits, for the next run.
//!
//! Without that it accepts until Podman has it stopped, a tenth of a second later. What is left is what a service accepts that goes on to do so after
//! the signal, or in another thread than the one that the signal comes to.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::incarnation::{ContainerNetns, NetnsSource};
use super::{ServiceStarter, use_lock};
use crate::systemd::manager::SystemdManager;

/// How long systemd may take to freeze the unit. The kernel does it in a few milliseconds, unless a process waits for a device.
const FREEZE_LIMIT: Duration = Duration::from_secs(2);

/// How long the service may take to end by its stop signal before its unit is stopped, at which Podman sends it that signal again: some programs end
/// without delay at the second one.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A service that is frozen for the last look. It has to be thawed by one of its methods.
#[derive(Debug)]
pub struct FrozenForLook {
    bus: SystemdManager,
    unit: String,
    first: Arc<ContainerNetns>,
    signal: i32,
    alone: use_lock::Use,
    asked: Instant,
}

/// A service that has its stop signal. No other forwarder begins to use it.
#[derive(Debug)]
pub struct ToldToStop {
    first: Arc<ContainerNetns>,
    pub(super) alone: use_lock::Use,
}

impl ServiceStarter {
    /// Freezes the service, whose container's first process is told to stop by `signal`. None where it is not this forwarder's to stop, where that process
    /// does not heed the signal, or where it cannot be frozen: then it is stopped as any other.
    pub async fn freeze_for_last_look(&self, signal: i32) -> Option<FrozenForLook> {
        let unit = self.unit.clone().filter(|_| matches!(self.place, NetnsSource::Container(_)))?;
        let first = self.current().clone().filter(|first| first.heeds(signal))?;
        let bus = self.bus().await.ok()?;
        // One that could not be stopped is not told to.
        let mine = self.in_use().take();
        let Ok(use_lock::UnitLock::Had(alone)) = use_lock::Use::alone(&unit, mine) else {
            self.begin_use(&unit).await;
            return None;
        };
        let frozen = FrozenForLook { bus, unit, first, signal, alone, asked: Instant::now() };
        match timeout(FREEZE_LIMIT, self.freeze_where_ours(&frozen)).await {
            Ok(Ok(true)) => return Some(frozen),
            Ok(Ok(false)) => {
                drop(frozen.alone);
                self.begin_use(&frozen.unit).await;
                return None;
            }
            Ok(Err(error)) => tracing::debug!("the service is not frozen for the last look: {error:#}"),
            Err(_) => tracing::debug!("systemd takes long to freeze the service for the last look"),
        }
        // It may be on its way.
        self.goes_on(frozen).await;
        None
    }

    async fn freeze_where_ours(&self, frozen: &FrozenForLook) -> anyhow::Result<bool> {
        let FrozenForLook { bus, unit, .. } = frozen;
        let (look, needed, can) =
            tokio::join!(self.runs.look(bus), bus.needed_by(unit), bus.can_freeze(unit));
        let (look, ours) = look?;
        if !look.is_active() || !ours || needed?.is_some() || !can? {
            return Ok(false);
        }
        bus.freeze(unit).await?;
        Ok(true)
    }

    /// A client is there: the service runs on, and this forwarder uses it.
    pub async fn goes_on(&self, frozen: FrozenForLook) {
        frozen.thaw().await;
        drop(frozen.alone);
        self.begin_use(&frozen.unit).await;
    }
}

impl FrozenForLook {
    /// No client is there: the service has its stop signal before it runs on.
    pub async fn tell_to_stop(self) -> ToldToStop {
        if let Err(error) = self.first.signal(self.signal) {
            tracing::debug!(%error, "the service has no stop signal yet");
        }
        self.thaw().await;
        tracing::debug!(signal = self.signal, took = ?self.asked.elapsed(), "the service was looked at for the last time, frozen, and has its stop signal");
        ToldToStop { first: self.first, alone: self.alone }
    }

    async fn thaw(&self) {
        for _ in 0..2 {
            match timeout(FREEZE_LIMIT, self.bus.thaw_if_frozen(&self.unit)).await {
                Ok(Ok(_was_frozen)) => return,
                Ok(Err(error)) => tracing::warn!("cannot thaw {}: {error:#}", self.unit),
                Err(_) => tracing::warn!("systemd takes long to thaw {}", self.unit),
            }
        }
    }
}

impl ToldToStop {
    /// Waits for its end, for as long as it may take.
    pub(super) async fn ended(&self) {
        drop(timeout(END_LIMIT, self.first.gone()).await);
    }
}
