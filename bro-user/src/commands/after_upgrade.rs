//! `bro after-upgrade`: a new bro has been installed, and forwarders of the old one run. A forwarder with a reloadable unit is
//! reloaded, which hands its listeners to the new program and drops no client; the others run on until they are idle. Nothing is
//! ever stopped or restarted.
//!
//! Only units that `bro activate` wrote are touched. A user's files are read by that user alone: if root followed what a user may
//! put there (a link, a pipe that never ends), that user could hold up an upgrade.

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, ensure};
use nix::unistd::{Uid, User};

use crate::cli::AfterUpgrade;
use crate::exit::{Failure, on_one_line};
use crate::installed::{self, Installed};
use crate::run_as::{Gaining, RunAsUser};
use crate::systemd::scope::RuntimeScope;

/// How long one manager's forwarders may take, as timeout(1) reads it: a reload waits for the new program's readiness.
const RELOAD_LIMIT: &str = "60";

/// Runs `bro after-upgrade`.
///
/// # Errors
/// When a manager does not answer, or a forwarder does not take the new program up; the others have been asked all the same.
pub fn run(options: &AfterUpgrade) -> anyhow::Result<()> {
    if options.user {
        return reload(RuntimeScope::User);
    }
    if !Uid::effective().is_root() {
        return Err(Failure::NotPermitted(
            "only root may do this for all; for your own there is --user".into(),
        )
        .into());
    }
    // The users' side is begun first and waited for last: they all work at the same time.
    let users: Vec<(User, anyhow::Result<Child>)> =
        users().into_iter().map(|user| (user.clone(), ask(&user))).collect();
    let mut failed = Vec::new();
    if let Err(error) = reload(RuntimeScope::System) {
        failed.push(format!("the system's: {error:#}"));
    }
    for (user, asked) in users {
        let status = asked.and_then(|mut child| child.wait().context("cannot wait for it"));
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => failed.push(format!("{}'s: {status}", user.name)),
            Err(error) => failed.push(format!("{}'s: {error:#}", user.name)),
        }
    }
    ensure!(
        failed.is_empty(),
        "some forwarders go on with the bro they were started with: {}",
        failed.join("; ")
    );
    Ok(())
}

/// The users with a running service manager.
fn users() -> Vec<User> {
    let runtime = std::fs::read_dir("/run/user").into_iter().flatten().flatten();
    let mut users: Vec<User> = runtime
        .filter(|entry| entry.path().join("systemd/private").exists())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|uid| *uid != 0)
        .filter_map(|uid| User::from_uid(Uid::from_raw(uid)).ok().flatten())
        .collect();
    users.sort_by_key(|user| user.uid.as_raw());
    users
}

/// The same for one user, as that user, within a time limit.
fn ask(user: &User) -> anyhow::Result<Child> {
    let owner = RunAsUser {
        name: user.name.clone(),
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        home: user.dir.clone(),
    };
    let bro = std::env::current_exe().context("cannot tell where bro itself is")?;
    let mut command = owner.command_within(RELOAD_LIMIT, Gaining::Forbidden, bro);
    command.args(["after-upgrade", "--user"]).spawn().context("cannot run timeout(1)")
}

fn reload(manager: RuntimeScope) -> anyhow::Result<()> {
    let activated = installed::all(manager)?;
    let units: Vec<String> = activated.iter().filter_map(Installed::service).collect();
    if units.is_empty() || !Path::new("/run/systemd/system").is_dir() {
        return Ok(());
    }
    let mut out = std::io::stdout();
    let mut failed = Vec::new();
    for unit in running(&systemctl(manager, &["show", "--property=Id,ActiveState,CanReload"], &units)?) {
        let name = on_one_line(&unit.name);
        if !unit.can_reload {
            writeln!(out, "{name}: goes on with the bro it was started with, until it is idle")?;
        } else if let Err(error) = systemctl(manager, &["reload"], std::slice::from_ref(&unit.name)) {
            failed.push(format!("{error:#}"));
        } else {
            writeln!(out, "{name}: reloaded")?;
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

fn systemctl(manager: RuntimeScope, verb: &[&str], units: &[String]) -> anyhow::Result<String> {
    let scope = if manager == RuntimeScope::System { "--system" } else { "--user" };
    let output = Command::new("timeout")
        .args(["--kill-after=5", RELOAD_LIMIT, "systemctl", scope])
        .args(verb)
        .arg("--")
        .args(units)
        .stdin(Stdio::null())
        .output()
        .context("cannot run systemctl")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "systemctl {} {}: {}", verb[0], units.join(" "), words.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A forwarder that runs.
#[derive(Debug, PartialEq, Eq)]
struct Running {
    name: String,
    can_reload: bool,
}

/// Reads `systemctl show`: blocks of `KEY=VALUE`, an empty line between two units.
fn running(shown: &str) -> Vec<Running> {
    let value = |block: &str, key: &str| {
        let mut lines = block.lines().filter_map(|line| line.split_once('='));
        lines.find(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).unwrap_or_default()
    };
    shown
        .split("\n\n")
        .filter(|block| value(block, "ActiveState") == "active")
        .map(|block| Running { name: value(block, "Id"), can_reload: value(block, "CanReload") == "yes" })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_runs_is_asked_and_only_what_can_is_reloaded() {
        let shown = "Id=a.service\nActiveState=inactive\nCanReload=yes\n\nId=b.service\nActiveState=active\nCanReload=no\n\n\
                     CanReload=yes\nActiveState=active\nId=c.service\n";
        let is = |name: &str, can_reload| Running { name: name.into(), can_reload };
        assert_eq!(running(shown), [is("b.service", false), is("c.service", true)]);
        assert_eq!(running(""), []);
    }
}
