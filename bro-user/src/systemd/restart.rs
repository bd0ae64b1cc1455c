//! A unit that systemd is about to start again by itself (Restart=). An order to start it meanwhile would count against the unit's
//! start limit (StartLimitBurst=) besides the restart's own count, and use the limit up where systemd alone never would.

use std::time::Duration;

use tokio::time::timeout;

use crate::systemd::manager::SystemdManager;

/// A later restart than this is brought forward, as by hand: a unit that waits longer between its starts is far from their limit.
const SOON: Duration = Duration::from_secs(5);

/// Between two looks where the service manager does not tell of a change.
const LOOK: Duration = Duration::from_millis(200);

/// What the service manager knows of a unit's restarts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restarting {
    /// ActiveState.
    pub state: String,
    /// SubState: auto-restart, stop-post, …
    pub sub: String,
    /// It was told to do something with the unit: to stop it, say.
    pub has_job: bool,
    /// Restart=
    pub policy: String,
    /// RestartSec=
    pub delay: Duration,
}

impl Restarting {
    /// Is systemd about to start the unit by itself, and soon? After its process has ended that is not decided before the end of
    /// ExecStopPost=, until when nothing could be started anyway.
    fn is_near(&self) -> bool {
        let ends = self.state == "deactivating" && !self.has_job && self.policy != "no";
        let between = self.state == "activating" && self.sub.starts_with("auto-restart");
        (ends || between) && self.delay <= SOON
    }
}

/// Waits for as long as systemd is about to start the unit by itself. Says in which state (ActiveState) it is then.
///
/// # Errors
/// When the bus fails.
pub(crate) async fn awaited(bus: &SystemdManager, unit: &str) -> anyhow::Result<String> {
    let now = bus.restarting(unit).await?;
    if !now.is_near() {
        return Ok(now.state);
    }
    tracing::debug!(unit, "systemd is about to start the unit again by itself; waiting for that");
    let mut changes = bus.changes(unit).await?;
    loop {
        let now = bus.restarting(unit).await?;
        if !now.is_near() {
            return Ok(now.state);
        }
        if let Ok(ended) = timeout(LOOK, changes.next()).await {
            ended?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_systemd_starts_by_itself_soon_is_left_to_it() {
        let restarting = |state: &str, sub: &str, has_job: bool, policy: &str, seconds: u64| {
            let (state, sub, policy) = (state.into(), sub.into(), policy.into());
            Restarting { state, sub, has_job, policy, delay: Duration::from_secs(seconds) }.is_near()
        };
        assert!(restarting("activating", "auto-restart", false, "always", 0));
        assert!(restarting("activating", "auto-restart-queued", true, "on-failure", 3));
        assert!(restarting("deactivating", "stop-post", false, "always", 0));
        // Another process stops it; it is to stay down; a client would wait too long.
        assert!(!restarting("deactivating", "stop-sigterm", true, "always", 0));
        assert!(!restarting("deactivating", "stop-post", false, "no", 0));
        assert!(!restarting("activating", "auto-restart", false, "always", 60));
        for (state, sub) in
            [("active", "running"), ("activating", "start"), ("inactive", "dead"), ("failed", "failed")]
        {
            assert!(!restarting(state, sub, false, "always", 0), "{state} {sub}");
        }
    }
}
