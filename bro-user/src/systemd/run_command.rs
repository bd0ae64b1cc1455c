//! The owner's commands (`--ready exec:`, `--busy-exec`) and Podman's health check: run by this process, or, where that lacks
//! rights that they may need, by the service manager, as units that are gone when they have ended.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::prctl;
use tokio::process::Command;
use tokio::time::timeout;

use super::manager::SystemdManager;

/// How long one run may take.
pub const LIMIT: Duration = Duration::from_secs(10);

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandOutcome {
    /// It exited, with this status.
    Exited(i32),
    /// A signal ended it.
    Signalled,
    /// It took too long, and was ended.
    TooLong,
}

/// Are rights other than its own out of reach for this process? Such a process is confined, so it runs nothing.
#[must_use]
pub fn is_confined() -> bool {
    prctl::get_no_new_privs().unwrap_or(false)
}

/// The words of a shell command.
#[must_use]
pub fn shell(line: &str) -> Vec<String> {
    ["/bin/sh", "-c", line].map(str::to_owned).into()
}

/// Runs a command as a transient unit of the service manager.
///
/// # Errors
/// When the manager refuses.
pub async fn by_manager(bus: &SystemdManager, words: &[String]) -> anyhow::Result<CommandOutcome> {
    // The manager keeps the limit as well; this is for a manager that does not answer.
    let grace = LIMIT + Duration::from_secs(5);
    timeout(grace, bus.run(words, &environment(), LIMIT)).await?
}

/// Says once that the service manager does not run commands for this process, which then runs them itself as far as it can.
pub fn refused(words: &[String], error: &anyhow::Error) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Relaxed) {
        tracing::warn!(
            "the service manager does not run “{}”: {error:#}; running it within this service, with its rights alone",
            words.join(" ")
        );
    }
}

/// This process's environment, but for what systemd says to this process alone (systemd.exec(5)).
fn environment() -> Vec<String> {
    const OURS: [&str; 12] = [
        "LISTEN_",
        "NOTIFY_SOCKET",
        "WATCHDOG_",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "MAINPID",
        "MANAGERPID",
        "SYSTEMD_EXEC_PID",
        "MEMORY_PRESSURE_",
        "RUNTIME_DIRECTORY",
        "CREDENTIALS_DIRECTORY",
        "BRO_HANDOVER",
    ];
    let text = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let theirs = text.filter(|(name, _)| !OURS.iter().any(|ours| name.starts_with(ours)));
    theirs.map(|(name, value)| format!("{name}={value}")).collect()
}

/// Runs a command here.
///
/// # Errors
/// When it cannot be started.
pub async fn here(words: &[String]) -> io::Result<CommandOutcome> {
    use std::os::unix::process::ExitStatusExt as _;
    let Some((program, arguments)) = words.split_first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut command = Command::new(program);
    command.args(arguments);
    match timeout(LIMIT, run(&mut command)).await {
        Ok(Ok(status)) if status.signal().is_some() => Ok(CommandOutcome::Signalled),
        Ok(Ok(status)) => Ok(CommandOutcome::Exited(status.code().unwrap_or(-1))),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(CommandOutcome::TooLong),
    }
}

/// A running command with everything that it started: all of it ends with this value.
struct Group(nix::unistd::Pid);

impl Drop for Group {
    fn drop(&mut self) {
        // ESRCH when all of it has ended already, the usual case.
        nix::sys::signal::killpg(self.0, nix::sys::signal::Signal::SIGKILL).ok();
    }
}

/// Runs a command to its end; when this is dropped, the command and all it started are killed.
async fn run(command: &mut Command) -> io::Result<ExitStatus> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let mut child = command.kill_on_drop(true).spawn()?;
    // The leader is not reaped before `wait` returns, so until then the group's number is its own.
    let _group = child.id().and_then(|id| id.try_into().ok()).map(|id| Group(nix::unistd::Pid::from_raw(id)));
    child.wait().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_systemd_says_to_the_service_is_not_passed_on() {
        let passed = environment();
        assert!(passed.iter().any(|variable| variable.starts_with("PATH=")), "{passed:?}");
        assert!(!passed.iter().any(|variable| variable.starts_with("LISTEN_")), "{passed:?}");
    }

    #[test]
    fn a_command_says_how_it_ended() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let outcome = |line: &str| runtime.block_on(here(&shell(line))).unwrap();
        assert_eq!(outcome("exit 3"), CommandOutcome::Exited(3));
        assert_eq!(outcome("kill -9 $$"), CommandOutcome::Signalled);
        assert!(runtime.block_on(here(&["/nowhere/at/all".to_owned()])).is_err());
    }
}
