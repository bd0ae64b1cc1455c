//! What `bro activate` prints: what it did on standard output, warnings on standard error.

use std::io::Write as _;

use bro_relay::listener::SocketKind;

use super::apply::{Applied, Left};
use super::plan::Paths;
use super::transaction::Change;
use crate::address::External;
use crate::exit::on_one_line;
use crate::installed::{Connects, Installed, InstalledPort, Mode};
use crate::run_as;
use crate::systemd::scope::RuntimeScope;
use crate::units::File;
use crate::units::RuntimeLink;

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
    wanted: &Installed,
    runtime: Option<&RuntimeLink>,
    changes: &[Change],
    outcome: Applied,
    places: &Paths,
) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let name = &wanted.name;
    if outcome == Applied::Nothing {
        writeln!(out, "nothing to do: {name} is activated just so")?;
        return Ok(());
    }
    list(&mut out, changes)?;
    let (systemctl, journalctl) = match wanted.scope {
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
        match &wanted.mode {
            Mode::Direct(_) | Mode::Adopt(_) => stopped(&mut out, &wanted.unit)?,
            Mode::Forward(_) => {
                writeln!(out, "{} was stopped: its seccomp profile was one that adopts", wanted.unit)?;
            }
        }
    }
    for listener in &wanted.listeners {
        let target = match &listener.internal {
            Some(target) => {
                format!(", for {target} in {}", wanted.container().unwrap_or("the host's network"))
            }
            None => format!(", for {} itself", wanted.unit),
        };
        writeln!(out, "{} listens at {}{target}", listener.socket.name, listener.external)?;
    }
    if outcome == Applied::Restarted
        && let Some(unit) = wanted.service()
    {
        writeln!(out, "{unit} had no client, and was restarted with the new settings")?;
    }
    if outcome == Applied::OldForwarder {
        let unit = wanted.runner();
        writeln!(
            out,
            "{unit} runs, with the settings from before; they change when it starts the next time, or now: {systemctl} \
             restart {unit}"
        )?;
    }
    if wanted.adoption().is_some() {
        adopted(&mut out, wanted, runtime)?;
    }
    if super::fence::concerns(wanted)
        && wanted.scope == RuntimeScope::User
        && wanted.listeners.iter().any(InstalledPort::is_tcp)
    {
        writeln!(
            out,
            "root can put a fence around what {} accepts, which is then led nowhere else: systemctl enable --now bro-fence@{}",
            wanted.unit,
            nix::unistd::geteuid()
        )?;
    }
    if let Mode::Direct(_) = wanted.mode {
        writeln!(
            out,
            "{} is not stopped when it is idle: with --direct there is no forwarder that could",
            wanted.unit
        )?;
    }
    writeln!(out, "\nTry it:")?;
    for line in tries(wanted) {
        writeln!(out, "    {line}")?;
    }
    let log = wanted.runner();
    writeln!(out, "    {journalctl} --unit {log} --follow")?;
    if let Some(owner) = wanted.run_as.as_ref().filter(|owner| !owner.lingers()) {
        writeln!(
            out,
            "\n{0}'s services, and with them the container, are stopped when {0} logs out. To keep them: loginctl enable-linger \
             {0}",
            owner.name
        )?;
    }
    if wanted.scope == RuntimeScope::User && !lingers() {
        writeln!(
            out,
            "\nIt listens while you are logged in. To have it listen always: loginctl enable-linger"
        )?;
    }
    Ok(())
}

/// What differs for an adopted service from one that clients are forwarded to.
fn adopted(
    out: &mut impl std::io::Write,
    wanted: &Installed,
    runtime: Option<&RuntimeLink>,
) -> std::io::Result<()> {
    let unit = &wanted.unit;
    writeln!(out, "{unit} accepts there itself, from its next start on")?;
    let both_families = wanted
        .listeners
        .iter()
        .filter(|listener| listener.is_tcp() && listener.external.ip().is_none_or(|ip| ip.is_ipv6()));
    for listener in both_families {
        write!(
            out,
            "a service that listens on IPv4 only is not adopted at {}, which is a socket of IPv6, and is forwarded to",
            listener.external
        )?;
        match listener.external.ports() {
            Some(ports) => writeln!(out, "; at 0.0.0.0:{ports} it is adopted")?,
            None => writeln!(out)?,
        }
    }
    for listener in wanted.listeners.iter().filter(|listener| listener.external.is_udp()) {
        let external = &listener.external;
        writeln!(out, "datagrams to {external} are forwarded: only what listens is adopted")?;
    }
    if let Some(RuntimeLink { ports, .. }) = runtime {
        let to = match ports.as_slice() {
            [] => "nothing".to_owned(),
            ports => format!("port {} alone", Connects::Ports(ports.to_vec())),
        };
        writeln!(
            out,
            "{unit} connects over TCP to {to}, since its sockets could lead it elsewhere on this host (--adopt-connect)"
        )?;
    }
    if wanted.listeners.iter().any(super::adopt::shows_this_host) {
        writeln!(
            out,
            "{unit} sees this host's own clients as 127.0.0.1: nothing in it may trust that address"
        )?;
    }
    Ok(())
}

fn stopped(out: &mut impl std::io::Write, unit: &str) -> std::io::Result<()> {
    writeln!(out, "{unit} was stopped: it held the socket")
}

fn tries(wanted: &Installed) -> Vec<String> {
    let try_one = |external: &External| match external {
        External::Path(SocketKind::Stream, path) => {
            Some(format!("curl --unix-socket {} http://localhost/", path.display()))
        }
        External::Abstract(SocketKind::Stream, name) => {
            Some(format!("curl --abstract-unix-socket {name} http://localhost/"))
        }
        tcp if tcp.is_tcp() => Some(format!("curl http://{}/", tcp.local()?)),
        // What such a service is asked in is for its owner to know.
        _ => None,
    };
    wanted.listeners.iter().filter_map(|listener| try_one(&listener.external)).collect()
}

fn lingers() -> bool {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
    user.is_some_and(|user| run_as::lingers(&user.name))
}

pub(super) fn removed(installed: &Installed, changes: &[Change], left: Left) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    list(&mut out, changes)?;
    if left == Left::Stopped {
        stopped(&mut out, &installed.unit)?;
    }
    if left == Left::Awake {
        let systemctl = match (&installed.run_as, installed.scope) {
            (Some(owner), _) => format!("systemctl --user --machine {}@", owner.name),
            (None, RuntimeScope::User) => "systemctl --user".to_owned(),
            (None, RuntimeScope::System) => "systemctl".to_owned(),
        };
        writeln!(out, "{} still runs; to stop it: {systemctl} stop {}", installed.unit, installed.unit)?;
    }
    Ok(())
}
