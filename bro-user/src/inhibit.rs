//! Jobs that keep a service from being put to sleep although nobody is connected: `--busy-file`, `--busy-exec`.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::timeout;

use crate::activate::ready;

/// How long one try of the command may take.
const TRY: Duration = Duration::from_secs(10);

/// At most so long after a “busy” it is asked again.
const STEP: Duration = Duration::from_secs(10);

/// At least so long.
const SHORTEST_STEP: Duration = Duration::from_millis(100);

/// What says “busy”.
#[derive(Debug, Clone, Default)]
pub struct Inhibitors {
    /// A file that exists meanwhile.
    pub file: Option<PathBuf>,
    /// A shell command that exits with 0 meanwhile.
    pub exec: Option<String>,
}

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

    /// Who is busy, if somebody is. Ends within ten seconds.
    pub async fn busy(&self) -> Option<String> {
        if let Some(file) = &self.file {
            match file.symlink_metadata() {
                Ok(_) => return Some(format!("{} exists", file.display())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                // Nobody knows whether it is there; better awake than cut off.
                Err(error) => {
                    tracing::warn!(%error, "cannot look for {}, which counts as busy", file.display());
                    return Some(format!("{}: {error}", file.display()));
                }
            }
        }
        let exec = self.exec.as_ref()?;
        let trouble = match timeout(TRY, ready::run(&mut ready::shell(exec))).await {
            Ok(Ok(status)) => match status.code() {
                Some(0) => return Some(format!("“{exec}” says so")),
                // What a shell says of a command that it cannot run, or cannot find.
                Some(code @ (126 | 127)) => format!("exit status {code}"),
                _ => return None,
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", TRY.as_secs()),
        };
        tracing::warn!("--busy-exec: {trouble}, which counts as busy");
        Some(format!("“{exec}”: {trouble}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(exec: &str) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Inhibitors { file: None, exec: Some(exec.into()) }.busy())
    }

    #[test]
    fn a_command_says_busy_by_0_and_by_not_being_runnable() {
        assert!(busy("true").is_some() && busy("/nowhere/at/all").is_some());
        assert_eq!(busy("exit 1"), None);
        assert_eq!(busy("exit 125"), None);
        assert_eq!(busy("kill -9 $$"), None);
    }

    #[test]
    fn a_file_that_cannot_be_looked_for_counts_as_there() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let asks = |file: &str| {
            runtime.block_on(Inhibitors { file: Some(file.into()), exec: None }.busy()).is_some()
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
