//! What `bro activate` prints: what it did on standard output, warnings on standard error.

use std::io::Write as _;

use super::apply::{Applied, Left};
use super::plan::Paths;
use super::transaction::Change;
use crate::address::External;
use crate::exit::on_one_line;
use crate::installed::Installed;
use crate::run_as;
use crate::systemd::scope::RuntimeScope;
use crate::units::File;

pub(super) fn warnings(warnings: &[String]) -> anyhow::Result<()> {
    let mut err = std::io::stderr().lock();
    for warning in warnings {
        writeln!(err, "bro: warning: {}", on_one_line(warning))?;
    }
    Ok(())
}

/// The files, each under its path.
pub(super) fn files(files: &[File]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for (at, File { path, text }) in files.iter().enumerate() {
        let gap = if at == 0 { "" } else { "\n" };
        write!(out, "{gap}==> {} <==\n{text}", path.display())?;
    }
    Ok(())
}

pub(super) fn would_remove(changes: &[Change]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for Change { path, text } in changes {
        let verb = if text.is_some() { "would change" } else { "would remove" };
        writeln!(out, "{verb} {}", on_one_line(&path.display().to_string()))?;
    }
    Ok(())
}

fn list(out: &mut impl std::io::Write, changes: &[Change]) -> std::io::Result<()> {
    for Change { path, text } in changes {
        let verb = if text.is_some() { "wrote" } else { "removed" };
        writeln!(out, "{verb} {}", on_one_line(&path.display().to_string()))?;
    }
    Ok(())
}

pub(super) fn activated(
    activated: &Installed,
    changes: &[Change],
    outcome: Applied,
    places: &Paths,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let name = &activated.name;
    if outcome == Applied::Nothing {
        writeln!(out, "nothing to do: {name} is activated just so")?;
        return Ok(());
    }
    list(&mut out, changes)?;
    let (systemctl, journalctl) = match activated.scope {
        RuntimeScope::System => ("systemctl", "journalctl"),
        RuntimeScope::User => ("systemctl --user", "journalctl --user"),
    };
    if outcome == Applied::Written {
        writeln!(
            out,
            "enabled; it listens from the next boot of {} on",
            places.root.as_deref().unwrap_or(&places.units).display()
        )?;
        return Ok(());
    }
    if outcome == Applied::Stopped {
        stopped(&mut out, &activated.unit)?;
    }
    for listener in &activated.listeners {
        let target = match &listener.target {
            Some(target) => format!(
                ", for {target} in {}",
                activated.container.as_deref().unwrap_or("the host's network")
            ),
            None => format!(", for {} itself", activated.unit),
        };
        writeln!(out, "{} listens at {}{target}", listener.socket, listener.address)?;
    }
    if outcome == Applied::Restarted
        && let Some(unit) = activated.service()
    {
        writeln!(out, "{unit} had no client, and was restarted with the new settings")?;
    }
    if outcome == Applied::OldForwarder {
        let unit = activated.service().unwrap_or_else(|| activated.unit.clone());
        writeln!(
            out,
            "{unit} runs, with the settings from before; they change when it starts the next time, or now: {systemctl} \
             restart {unit}"
        )?;
    }
    if activated.direct {
        writeln!(
            out,
            "{} is not stopped when it is idle: with --direct there is no forwarder that could",
            activated.unit
        )?;
    }
    writeln!(out, "\nTry it:")?;
    for line in tries(activated) {
        writeln!(out, "    {line}")?;
    }
    let log = activated.service().unwrap_or_else(|| activated.unit.clone());
    writeln!(out, "    {journalctl} --unit {log} --follow")?;
    if let Some(owner) = activated.run_as.as_ref().filter(|owner| !owner.lingers()) {
        writeln!(
            out,
            "\n{0}'s services, and with them the container, are stopped when {0} logs out. To keep them: loginctl enable-linger \
             {0}",
            owner.name
        )?;
    }
    if activated.scope == RuntimeScope::User && !lingers() {
        writeln!(
            out,
            "\nIt listens while you are logged in. To have it listen always: loginctl enable-linger"
        )?;
    }
    Ok(())
}

fn stopped(out: &mut impl std::io::Write, unit: &str) -> std::io::Result<()> {
    writeln!(out, "{unit} was stopped: it held the socket")
}

fn tries(activated: &Installed) -> Vec<String> {
    let try_one = |address: &str| {
        Some(match address.parse::<External>().ok()? {
            External::Path(path) => format!("curl --unix-socket {} http://localhost/", path.display()),
            External::Abstract(name) => format!("curl --abstract-unix-socket {name} http://localhost/"),
            tcp => format!("curl http://{}/", tcp.local()?),
        })
    };
    activated.listeners.iter().filter_map(|listener| try_one(&listener.address)).collect()
}

fn lingers() -> bool {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
    user.is_some_and(|user| run_as::lingers(&user.name))
}

pub(super) fn removed(known: &Installed, changes: &[Change], left: Left) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    list(&mut out, changes)?;
    if left == Left::Stopped {
        stopped(&mut out, &known.unit)?;
    }
    if left == Left::Awake {
        let systemctl = match (&known.run_as, known.scope) {
            (Some(owner), _) => format!("systemctl --user --machine {}@", owner.name),
            (None, RuntimeScope::User) => "systemctl --user".to_owned(),
            (None, RuntimeScope::System) => "systemctl".to_owned(),
        };
        writeln!(out, "{} still runs; to stop it: {systemctl} stop {}", known.unit, known.unit)?;
    }
    Ok(())
}
