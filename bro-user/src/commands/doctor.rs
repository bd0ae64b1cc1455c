//! `bro doctor`: what this host can do for this user, or what is wrong with one activated service; one line for each check, with
//! the fix.

mod adoption;
mod confinement;
mod direct;
pub mod fence;
mod forwarder;
mod forwarders;
mod health;
mod hints;
mod host;
pub(crate) mod image;
mod listens;
pub(crate) mod oci_runtime;
pub(crate) mod podman;
mod ports;
mod seen;
mod selinux;
mod service;
mod settings;
pub(crate) mod versions;

use std::fmt::Write as _;
use std::io::Write as _;

use serde::Serialize;

use crate::exit;
use crate::systemd::scope::RuntimeScope;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Finding {
    /// All there.
    Ok,
    /// bro works without it, with less.
    Less,
    /// Something that bro is for does not work.
    Bad,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    outcome: Finding,
    finding: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, finding: impl Into<String>) -> Self {
        Self { name, outcome: Finding::Ok, finding: finding.into(), fix: None }
    }

    fn less(name: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, outcome: Finding::Less, finding: finding.into(), fix: Some(fix.into()) }
    }

    /// Where a check is about just this, less is bad.
    fn or_bad(self) -> Self {
        let outcome = if self.outcome == Finding::Less { Finding::Bad } else { self.outcome };
        Self { outcome, ..self }
    }

    fn bad(name: &'static str, finding: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, outcome: Finding::Bad, finding: finding.into(), fix: Some(fix.into()) }
    }
}

/// Runs `bro doctor`; true if nothing that bro is for is broken.
///
/// # Errors
/// When there is no service of that name, or standard output is closed.
pub fn run(options: &crate::cli::Doctor) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let checks = runtime.block_on(async {
        match &options.name {
            Some(name) => service::checks(name, options).await,
            None => Ok(vec![
                host::kernel_version(),
                host::service_manager().await,
                host::podman().await,
                versions::check().await,
                host::linger(),
                host::namespaces(),
                selinux::program(),
                host::listeners().await,
                forwarders::check(RuntimeScope::choose(options.system, options.user)).await,
                host::pipes(),
                host::descriptors(),
                host::cgroup(),
                host::sandbox(),
                host::capabilities(),
                host::loader(),
                host::kernel_relay(),
            ]),
        }
    })?;
    let text = if options.json { exit::json(&checks)? + "\n" } else { describe(&checks) };
    let printed = std::io::stdout().lock().write_all(text.as_bytes());
    exit::unless_reader_has_gone(printed.map_err(Into::into))?;
    Ok(checks.iter().all(|check| check.outcome != Finding::Bad))
}

/// Runs `bro try-wake`.
///
/// # Errors
/// When its output has no reader.
pub fn try_wake(options: &crate::cli::TryWake) -> anyhow::Result<()> {
    confinement::trial::run(options)
}

fn describe(checks: &[Check]) -> String {
    let mut text = String::new();
    for Check { name, outcome, finding, fix } in checks {
        let mark = match outcome {
            Finding::Ok => "ok  ",
            Finding::Less => "less",
            Finding::Bad => "BAD ",
        };
        // Writing to a String cannot fail.
        write!(text, "{mark}  {name}: {}", exit::on_one_line(finding)).ok();
        match fix {
            Some(fix) => writeln!(text, " -- {}", exit::on_one_line(fix)).ok(),
            None => writeln!(text).ok(),
        };
    }
    text
}
