//! The steps of a wake, tried one by one without waking anything: `bro try-wake`, which `bro doctor NAME` has systemd run within
//! the confinement of a forwarder's unit. One line of JSON for each step.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bro_relay::target::Target;
use nix::libc;
use serde::{Deserialize, Serialize};

use crate::cli::TryWake;
use crate::exit::Failure;
use crate::netns::sock_diag::Table;
use crate::netns::{Namespace, NetnsRef};

/// One step of a wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum TrialStep {
    /// Finds the namespace of the container's process.
    Find,
    /// Starts the agent and has it enter the namespace.
    Enter,
    /// Makes sockets there: IPv4, IPv6, unix.
    Inet,
    Inet6,
    Unix,
    /// Reads the kernel's table of listeners there.
    Table,
    /// Uses the kernel relay's programs.
    Bpf,
}

impl std::fmt::Display for TrialStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Find => "find the network namespace of the container's process",
            Self::Enter => "have a process enter the container's network namespace",
            Self::Inet => "make an IPv4 socket in the container's network namespace",
            Self::Inet6 => "make an IPv6 socket in the container's network namespace",
            Self::Unix => "make a unix socket",
            Self::Table => "read the kernel's table of listeners in the container's network namespace",
            Self::Bpf => "use bpf(2) for the kernel relay",
        })
    }
}

/// What came of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tried {
    pub step: TrialStep,
    /// Why not, if it failed.
    pub error: Option<String>,
}

/// Where and as what the steps were tried.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Circumstances {
    /// What a security module takes the process for (/proc/self/attr/current).
    pub label: String,
    /// Which user namespace it is in.
    pub user_namespace: String,
}

/// The command's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum TrialLine {
    Tried(Tried),
    Circumstances(Circumstances),
}

/// The program's answer, as far as it got: nonsense is ignored, since it may come from a user's process.
pub(super) fn read(text: &str) -> (Circumstances, Vec<Tried>) {
    let (mut circumstances, mut tried) = (Circumstances::default(), Vec::new());
    for said in text.lines().filter_map(|line| serde_json::from_str(line).ok()) {
        match said {
            TrialLine::Tried(step) => tried.push(step),
            TrialLine::Circumstances(these) => circumstances = these,
        }
    }
    (circumstances, tried)
}

/// Runs `bro try-wake`.
///
/// # Errors
/// When its output has no reader.
pub fn run(options: &TryWake) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(all(options))
}

/// Each line is written at once: a filter may end this process at the next step.
fn say(said: &TrialLine) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(said)?;
    line.push(b'\n');
    std::io::stdout().write_all(&line)?;
    Ok(std::io::stdout().flush()?)
}

/// Says what came of a step; returns what it made, if it worked.
fn said<T>(step: TrialStep, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
    let (made, error) = match result {
        Ok(made) => (Some(made), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    say(&TrialLine::Tried(Tried { step, error }))?;
    Ok(made)
}

async fn all(options: &TryWake) -> anyhow::Result<()> {
    let label = std::fs::read_to_string("/proc/self/attr/current").unwrap_or_default();
    let user_namespace = std::fs::read_link("/proc/self/ns/user").unwrap_or_default();
    say(&TrialLine::Circumstances(Circumstances {
        label: label.trim_end_matches(['\0', '\n']).to_owned(),
        user_namespace: user_namespace.display().to_string(),
    }))?;
    if options.bpf {
        said(TrialStep::Bpf, bro_sockmap::try_bpf(nix::unistd::geteuid().is_root()).map_err(Into::into))?;
    }
    let Some(netns) = said(TrialStep::Find, find(options.pid))? else { return Ok(()) };
    let Some(namespace) = said(TrialStep::Enter, Namespace::look_into(netns).await)? else { return Ok(()) };
    let place = NetnsRef::Entered(Arc::new(namespace));
    for (step, domain) in families(&options.target) {
        said(step, place.socket(domain, libc::SOCK_STREAM, 0).await.map_err(Into::into))?;
    }
    if options.target.iter().any(|target| matches!(target, Target::Tcp { .. } | Target::Udp { .. })) {
        let table = async { Table::open(&place).await?.listeners() };
        said(TrialStep::Table, table.await.map_err(Into::into))?;
    }
    Ok(())
}

/// As a wake does: first the process, then its namespace.
fn find(pid: Option<i32>) -> anyhow::Result<OwnedFd> {
    let Some(pid) = pid else { return Ok(std::fs::File::open("/proc/self/ns/net")?.into()) };
    let process = bro_relay::sys::pidfd_open(pid)?;
    let netns = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
    if bro_relay::sys::exited(&process) {
        anyhow::bail!(Failure::NotFound(format!("process {pid} has exited")));
    }
    Ok(netns.into())
}

/// The families of the sockets that the targets need.
fn families(targets: &[Target]) -> Vec<(TrialStep, i32)> {
    let mut families = Vec::new();
    for target in targets {
        let ip = |host: &str| host.parse::<std::net::IpAddr>().ok();
        families.extend(match target {
            Target::Tcp { host, .. } | Target::Udp { host, .. } => match ip(host) {
                Some(ip) if ip.is_ipv6() => vec![(TrialStep::Inet6, libc::AF_INET6)],
                Some(_) => vec![(TrialStep::Inet, libc::AF_INET)],
                None => vec![(TrialStep::Inet, libc::AF_INET), (TrialStep::Inet6, libc::AF_INET6)],
            },
            Target::Unix(_) | Target::Abstract(_) | Target::Datagrams(_) => {
                vec![(TrialStep::Unix, libc::AF_UNIX)]
            }
        });
    }
    families.sort_by_key(|(_, domain)| *domain);
    families.dedup();
    families
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_before_the_end_is_read() {
        let lines = "{\"label\":\"unconfined\",\"user_namespace\":\"user:[1]\"}\n{\"step\":\"find\",\"error\":null}\nnonsense\n\
                     {\"step\":\"table\",\"error\":\"no\"}\n{\"step\":\"dance\",\"error\":null}\n{\"step\":\"en";
        let (circumstances, tried) = read(lines);
        assert_eq!((&*circumstances.label, &*circumstances.user_namespace), ("unconfined", "user:[1]"));
        let is = |step, error: Option<&str>| Tried { step, error: error.map(str::to_owned) };
        assert_eq!(tried, [is(TrialStep::Find, None), is(TrialStep::Table, Some("no"))]);
    }

    #[test]
    fn only_the_families_of_the_targets_are_tried() {
        let of = |targets: &[&str]| -> Vec<TrialStep> {
            let targets: Vec<Target> = targets.iter().map(|target| target.parse().unwrap()).collect();
            families(&targets).into_iter().map(|(step, _)| step).collect()
        };
        assert_eq!(of(&["127.0.0.1:80", "10.0.0.1:90"]), [TrialStep::Inet]);
        assert_eq!(of(&["[::1]:80", "/run/x"]), [TrialStep::Unix, TrialStep::Inet6]);
        assert_eq!(of(&["db.internal:5432"]), [TrialStep::Inet, TrialStep::Inet6]);
    }
}
