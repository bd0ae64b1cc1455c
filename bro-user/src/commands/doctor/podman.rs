//! Asking the Podman of the container's owner.

use std::time::Duration;

use crate::run_as::{Gaining, RunAsUser};

/// How long Podman may take.
const PODMAN_LIMIT: Duration = Duration::from_secs(10);

/// The status if setpriv(1) finds no such program.
const NOT_FOUND: i32 = 127;

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PodmanAnswer {
    /// It did what it was told; its output.
    Yes(String),
    /// It said no, or failed: its exit status and last words.
    No(i32, String),
    /// There is no podman.
    NotThere,
    /// It did not answer in time.
    Silent,
}

pub(super) async fn ask(owner: Option<&RunAsUser>, args: &[&str]) -> PodmanAnswer {
    let mut command: tokio::process::Command = match owner.filter(|owner| !owner.is_me()) {
        None => tokio::process::Command::new("podman"),
        Some(owner) => owner.command(Gaining::Allowed, "podman").into(),
    };
    let output = command.args(args).stdin(std::process::Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(PODMAN_LIMIT, output).await {
        Err(_) => return PodmanAnswer::Silent,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return PodmanAnswer::NotThere,
        Ok(Err(error)) => return PodmanAnswer::No(NOT_FOUND, error.to_string()),
        Ok(Ok(output)) => output,
    };
    match output.status.code() {
        Some(0) => PodmanAnswer::Yes(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Some(NOT_FOUND) => PodmanAnswer::NotThere,
        code => {
            let words = String::from_utf8_lossy(&output.stderr);
            PodmanAnswer::No(code.unwrap_or(-1), words.trim().lines().last().unwrap_or_default().to_owned())
        }
    }
}

impl PodmanAnswer {
    /// Why it is no answer, in words that follow a subject.
    pub fn trouble(&self) -> Option<String> {
        match self {
            Self::NotThere => Some("podman is not there (is it in PATH?)".to_owned()),
            Self::Silent => Some(format!("podman did not answer within {PODMAN_LIMIT:?}")),
            Self::Yes(_) | Self::No(..) => None,
        }
    }
}
