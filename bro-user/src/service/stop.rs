//! Using the unit, and stopping it when no forwarder uses it any more.

use tokio::time::sleep;

use super::last_look::ToldToStop;
use super::{LOOK, ServiceStarter, use_lock};
use crate::systemd::manager::SystemdManager;

/// The result of an attempt to stop the unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// It is stopped.
    Done,
    /// There is no unit that a forwarder could stop.
    NoUnit,
    /// It runs on: no forwarder had started it.
    NotOurs,
    /// It runs on: another forwarder uses it.
    Used,
    /// It runs on: this unit would be stopped along with it.
    Needed(String),
}

impl ServiceStarter {
    /// Uses the unit from now on. Waits while another forwarder is stopping it.
    pub(super) async fn begin_use(&self, unit: &str) {
        loop {
            match use_lock::Use::begin(unit) {
                Ok(use_lock::UnitLock::Had(begun)) => {
                    let _mine = self.in_use().get_or_insert(begun);
                    return;
                }
                Ok(use_lock::UnitLock::Taken) => sleep(LOOK).await,
                Err(error) => {
                    return tracing::debug!(%error, "other forwarders do not see that {unit} is used");
                }
            }
        }
    }

    /// Ends the use of the unit, since the unit has ended by itself.
    pub fn end_use(&self) {
        drop(self.in_use().take());
    }

    /// Notes which run of the unit is a forwarder's, for a forwarder that takes over from this one.
    pub async fn note_run(&self) {
        if self.unit.is_none() {
            return;
        }
        let Ok(bus) = self.bus().await else { return };
        // A bus that fails tells nothing.
        self.runs.look(&bus).await.ok();
    }

    /// Stops the unit if a forwarder started it (this one, or one before it) and no other forwarder uses it; with `by_force`, in
    /// any case.
    ///
    /// # Errors
    /// When systemd refuses.
    pub async fn stop_what_it_started(&self, by_force: bool) -> anyhow::Result<Stopped> {
        let Some(unit) = &self.unit else { return Ok(Stopped::NoUnit) };
        let mine = self.in_use().take();
        // Held until the unit is stopped: another forwarder that wants to use it waits that long.
        let _alone = match use_lock::Use::alone(unit, mine) {
            Ok(use_lock::UnitLock::Had(alone)) => Some(alone),
            Ok(use_lock::UnitLock::Taken) if !by_force => return Ok(Stopped::Used),
            Ok(use_lock::UnitLock::Taken) => None,
            Err(error) => {
                tracing::debug!(%error, "cannot see whether other forwarders use {unit}");
                None
            }
        };
        let bus = self.bus().await?;
        let (look, ours) = self.runs.look(&bus).await?;
        if matches!(look.state.as_str(), "inactive" | "failed") {
            return Ok(Stopped::Done);
        }
        if !by_force && !ours {
            return Ok(Stopped::NotOurs);
        }
        if let Some(other) = bus.needed_by(unit).await?.filter(|_| !by_force) {
            return Ok(Stopped::Needed(other));
        }
        self.stop(&bus, unit).await
    }

    /// Stops the unit of a service that has its stop signal already, once that has ended: it is this forwarder's, as was seen before.
    ///
    /// # Errors
    /// When systemd refuses.
    pub async fn stop_what_was_told(&self, told: ToldToStop) -> anyhow::Result<Stopped> {
        let Some(unit) = &self.unit else { return Ok(Stopped::NoUnit) };
        told.ended().await;
        // At once: else systemd starts anew what `Restart=` says it is to start.
        let stopped = self.stop(&self.bus().await?, unit).await;
        drop(told.alone);
        stopped
    }

    async fn stop(&self, bus: &SystemdManager, unit: &str) -> anyhow::Result<Stopped> {
        let result = bus.put_to_sleep(unit).await?;
        self.runs.forget();
        tracing::info!(unit, result, "stopped the unit");
        Ok(Stopped::Done)
    }

    /// Why [`ServiceStarter::stop_what_it_started`] would leave the unit running, where that shows before; for a service that must not be left behind.
    pub async fn why_it_goes_on(&self) -> Option<String> {
        let Some(unit) = &self.unit else {
            return Some("its container has the sockets, and there is no --unit to stop".into());
        };
        let look = async { self.runs.look(&self.bus().await?).await };
        match look.await {
            Ok((look, ours)) if ours || matches!(look.state.as_str(), "inactive" | "failed") => None,
            Ok(_) => Some(format!("its container has the sockets, and it was not bro that started {unit}")),
            Err(error) => {
                Some(format!("its container has the sockets, and {unit} cannot be looked at: {error:#}"))
            }
        }
    }

    /// Another unit that runs and needs this one, if there is one.
    pub async fn needed_by(&self) -> Option<String> {
        let unit = self.unit.as_ref()?;
        self.bus().await.ok()?.needed_by(unit).await.ok()?
    }
}
