//! Freezing the unit instead of stopping it, and thawing it for the next client.

use anyhow::bail;

use super::{ServiceStarter, use_lock};
use crate::exit::Failure;

impl ServiceStarter {
    /// Is `--freeze` available?
    ///
    /// # Errors
    /// [`Failure::Usage`] if not.
    pub async fn check_freezing(&self) -> anyhow::Result<()> {
        let Some(unit) = &self.unit else {
            bail!(Failure::Usage("--freeze needs --unit, which it freezes".into()));
        };
        if !self.bus().await?.can_freeze(unit).await? {
            bail!(Failure::Usage(cannot_freeze(unit)));
        }
        Ok(())
    }

    /// Freezes the unit if a forwarder started it and no other forwarder uses it; says whether it is frozen.
    ///
    /// # Errors
    /// When systemd refuses.
    pub async fn freeze(&self) -> anyhow::Result<bool> {
        let Some(unit) = &self.unit else { return Ok(false) };
        let mine = self.in_use().take();
        let frozen = async {
            // No other forwarder begins to use it until it is frozen; one that does so afterwards thaws it.
            let _alone = match use_lock::Use::alone(unit, mine) {
                Ok(use_lock::UnitLock::Had(alone)) => Some(alone),
                Ok(use_lock::UnitLock::Taken) => return Ok(false),
                Err(_) => None,
            };
            let bus = self.bus().await?;
            let (look, ours) = self.runs.look(&bus).await?;
            if !look.is_active() || !ours {
                return Ok(false);
            }
            bus.freeze(unit).await?;
            anyhow::Ok(true)
        };
        let frozen = frozen.await;
        self.begin_use(unit).await;
        frozen
    }

    /// Thaws the unit.
    ///
    /// # Errors
    /// When systemd refuses.
    pub async fn thaw(&self) -> anyhow::Result<()> {
        let Some(unit) = &self.unit else { return Ok(()) };
        self.bus().await?.thaw(unit).await
    }

    /// Thaws a unit that was frozen by a forwarder before this one, which was killed.
    pub async fn thaw_what_was_left(&self) {
        let Some(unit) = &self.unit else { return };
        let Ok(bus) = self.bus().await else { return };
        match bus.thaw_if_frozen(unit).await {
            Ok(true) => {
                tracing::info!(unit, "thawed the unit, which a forwarder before this one had left frozen")
            }
            Ok(false) => {}
            Err(error) => tracing::warn!("cannot thaw {unit}: {error:#}"),
        }
    }
}

/// The message about a unit that cannot be frozen.
pub(crate) fn cannot_freeze(unit: &str) -> String {
    format!(
        "--freeze: systemd cannot freeze {unit} here (it takes systemd 246 or newer, and cgroups of version 2); leave it out, and \
         the service is stopped when it is idle"
    )
}
