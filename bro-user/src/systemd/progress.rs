//! How far the start of a unit is, in words for a person that waits: what the service manager knows of it.

use std::time::Duration;

use tokio::time::Instant;

/// Before the first questions to the service manager: a start that ends sooner needs no words, and of thirty that are started at once
/// some take seconds. Each look is six questions.
pub(crate) const FIRST: Duration = Duration::from_secs(3);

/// Between two looks.
pub(crate) const STEP: Duration = Duration::from_secs(1);

/// The longest text of a unit's own (STATUS= of sd_notify(3)) that is repeated.
const LONGEST: usize = 200;

/// How far a unit's start is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Since when the service manager calls it started; none while it is being started.
    pub started: Option<Instant>,
    /// What it does meanwhile; empty until bro first asks.
    pub doing: String,
}

/// What the service manager knows of a unit that is being started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Start {
    /// ActiveState.
    pub state: String,
    /// SubState: start-pre, start, auto-restart, running, …
    pub sub: String,
    /// Its job waits for the jobs of other units.
    pub waits: bool,
    /// What the unit says of itself.
    pub status: String,
    /// The name of the process that systemd waits for: of ExecStartPre=, say, or the main one.
    pub process: Option<String>,
}

impl Start {
    /// Is the unit being started? One that has failed, and that systemd is to start again after a while, is not.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.state == "activating" && !self.sub.starts_with("auto-restart")
    }

    /// In words, after the unit's name.
    #[must_use]
    pub fn words(&self) -> String {
        let process = self.process.as_deref();
        let running = process.map(|process| format!(" ({process})")).unwrap_or_default();
        let said = self.status.chars().take(LONGEST).collect::<String>();
        match (self.state.as_str(), self.sub.as_str()) {
            ("inactive" | "failed", _) if self.waits => "waits for other units".into(),
            ("activating", "condition") => format!("runs ExecCondition={running}"),
            ("activating", "start-pre") => format!("runs ExecStartPre={running}"),
            ("activating", "start-post") => format!("runs ExecStartPost={running}"),
            ("activating", sub) if sub.starts_with("auto-restart") => "is restarted by systemd".into(),
            ("activating", _) if !said.is_empty() => format!("is starting: {said}"),
            // Its conmon would be the main process otherwise.
            ("activating", _) if process == Some("podman") => {
                "is starting: podman has not started the container yet (it may be pulling the image)".into()
            }
            ("activating", _) => "is starting".into(),
            ("active" | "reloading", _) if !said.is_empty() => format!("runs, but is not ready yet: {said}"),
            ("active" | "reloading", _) => "runs, but is not ready yet".into(),
            (state, sub) => format!("is {state} ({sub})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_said_in_words() {
        let start = |state: &str, sub: &str, status: &str, process: Option<&str>, waits: bool| Start {
            state: state.into(),
            sub: sub.into(),
            waits,
            status: status.into(),
            process: process.map(str::to_owned),
        };
        for (start, words) in [
            (start("inactive", "dead", "", None, true), "waits for other units"),
            (start("activating", "start-pre", "", Some("sleep"), false), "runs ExecStartPre= (sleep)"),
            (start("activating", "start-post", "", None, false), "runs ExecStartPost="),
            (start("activating", "start", "50 %", Some("podman"), false), "is starting: 50 %"),
            (start("activating", "start", "", Some("conmon"), false), "is starting"),
            (start("activating", "auto-restart-queued", "", None, false), "is restarted by systemd"),
            (start("active", "running", "", Some("conmon"), false), "runs, but is not ready yet"),
            (start("deactivating", "stop-sigterm", "", None, false), "is deactivating (stop-sigterm)"),
        ] {
            assert_eq!(start.words(), words);
            let under_way = ["activating start-pre", "activating start", "activating start-post"];
            let is = under_way.contains(&&*format!("{} {}", start.state, start.sub));
            assert_eq!(start.is_under_way(), is, "{start:?}");
        }
        assert!(
            start("activating", "start", "", Some("podman"), false).words().contains("pulling the image")
        );
        assert!(start("activating", "start", &"x".repeat(9999), None, false).words().len() < 2 * LONGEST);
    }
}
