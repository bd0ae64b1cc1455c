//! Jobs that keep a service from being put to sleep although no client is connected: `--busy-file`, `--busy-exec`, and units that
//! need the container's.

use std::path::PathBuf;
use std::time::Duration;

use crate::service::ServiceStarter;
use crate::systemd::run_command::{self, CommandOutcome, LIMIT};

/// The longest time from a “busy” to the next question.
const STEP: Duration = Duration::from_secs(10);

/// The shortest.
const SHORTEST_STEP: Duration = Duration::from_millis(100);

/// What says “busy”.
#[derive(Debug, Clone, Default)]
pub struct Inhibitors {
    /// A file that exists while busy.
    pub file: Option<PathBuf>,
    /// A shell command that exits with 0 while busy.
    pub exec: Option<String>,
}

/// The first exit status that is no answer: 125 is podman's own trouble; 126 and 127 are the shell's about a command that it
/// cannot run or find; from 128 on it was killed; 255 is podman's about a container that takes no command (if paused, say).
const TROUBLE: i32 = 125;

impl Inhibitors {
    /// Is there nothing to ask?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.file.is_none() && self.exec.is_none()
    }

    /// When to ask again after a “busy”, where the idle time is `limit`.
    #[must_use]
    pub fn step(limit: Duration) -> Duration {
        limit.clamp(SHORTEST_STEP, STEP)
    }

    /// What is busy, if anything is: a unit that would be stopped along with the container's counts as well, and so does a start
    /// that is under way, whatever ordered it. Ends within seconds: `activator` runs the command.
    pub async fn busy(&self, activator: &ServiceStarter) -> Option<String> {
        if let Some(file) = &self.file {
            match file.symlink_metadata() {
                Ok(_) => return Some(format!("{} exists", file.display())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                // It is unknown whether it is there; better awake than cut off.
                Err(error) => {
                    tracing::warn!(%error, "cannot look for {}, which counts as busy", file.display());
                    return Some(format!("{}: {error}", file.display()));
                }
            }
        }
        if activator.is_starting().await {
            return Some("it is still being started".into());
        }
        if let Some(other) = activator.needed_by().await {
            return Some(format!("{other} needs it"));
        }
        let exec = self.exec.as_ref()?;
        let trouble = match activator.run(&run_command::shell(exec)).await {
            Ok(CommandOutcome::Exited(0)) => return Some(format!("“{exec}” says so")),
            Ok(CommandOutcome::Exited(..TROUBLE)) => return None,
            Ok(CommandOutcome::Exited(code)) => format!("exit status {code}"),
            Ok(CommandOutcome::Signalled) => "it was killed".to_owned(),
            Ok(CommandOutcome::TooLong) => format!("no answer within {} s", LIMIT.as_secs()),
            Err(error) => error.to_string(),
        };
        tracing::warn!("--busy-exec: {trouble}, which counts as busy");
        Some(format!("“{exec}”: {trouble}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::incarnation::NetnsSource;
    use crate::service::readiness::Ready;
    use crate::service::sources::WantedSource;
    use crate::systemd::scope::RuntimeScope;
    use bro_relay::netns::identity::Identity;

    fn activator() -> ServiceStarter {
        let (source, identity) = (WantedSource::default(), Identity::default());
        ServiceStarter::new(NetnsSource::Own, None, RuntimeScope::User, Ready::Unchecked, source, identity)
    }

    fn busy(exec: &str) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Inhibitors { file: None, exec: Some(exec.into()) }.busy(&activator()))
    }

    #[test]
    fn a_command_says_busy_by_0_and_by_not_being_runnable() {
        assert!(busy("true").is_some() && busy("/nowhere/at/all").is_some());
        assert_eq!(busy("exit 1"), None);
        assert_eq!(busy("exit 124"), None);
        assert!(busy("exit 125").is_some() && busy("exit 255").is_some() && busy("kill -9 $$").is_some());
    }

    #[test]
    fn a_file_that_cannot_be_looked_for_counts_as_there() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let asks = |file: &str| {
            runtime.block_on(Inhibitors { file: Some(file.into()), exec: None }.busy(&activator())).is_some()
        };
        assert!(asks("/dev/null") && asks("/dev/null/below"));
        assert!(!asks("/nowhere/at/all"));
    }

    #[test]
    fn it_is_asked_again_in_good_time() {
        assert_eq!(Inhibitors::step(Duration::ZERO), Duration::from_millis(100));
        assert_eq!(Inhibitors::step(Duration::from_secs(3)), Duration::from_secs(3));
        assert_eq!(Inhibitors::step(Duration::from_secs(300)), Duration::from_secs(10));
    }
}
