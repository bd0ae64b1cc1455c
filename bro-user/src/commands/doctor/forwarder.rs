//! Does the forwarder do its work? One that cannot start is started by systemd again and again, and one that hangs is still active.

use super::hints::ManagerOwner;
use super::{Check, listens, settings};
use crate::commands::status::{AdoptionReport, ListenerReport, Report, UndeliveredReport, Waiting};
use crate::control_socket::{self, Request};
use crate::fallback::FallbackKind;
use crate::installed::Installed;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

const NAME: &str = "forwarder";

/// `service` is the forwarder's unit.
pub(super) async fn check(installed: &Installed, service: &str, systemd: &SystemdManager) -> Check {
    let manager = ManagerOwner::front(installed);
    let (systemctl, journal) = (manager.systemctl(), manager.journal(service));
    let unreadable = |error: anyhow::Error| {
        Check::bad(NAME, format!("{service}: {error:#}"), format!("see `{systemctl} status {service}`"))
    };
    let found = match systemd.known(service).await {
        Ok(found) => found,
        Err(error) => return unreadable(error),
    };
    if found.load != "loaded" {
        return Check::bad(
            NAME,
            format!("{service} is {}", found.load),
            format!("`{systemctl} daemon-reload`"),
        );
    }
    let restarting = match systemd.restart_loop(service).await {
        Ok(restarting) => restarting,
        Err(error) => return unreadable(error),
    };
    if found.active == "failed" {
        let log = manager.last_words(service).await;
        return Check::bad(NAME, format!("{service} has failed{log}"), format!("see `{journal}`"));
    }
    if let Some(times) = restarting {
        let log = manager.last_words(service).await;
        return Check::bad(
            NAME,
            format!(
                "{service} does not get up, and its clients wait: systemd has started it again {times} times{log}"
            ),
            format!(
                "see `{journal}`; if its program has moved, `{} {}` writes the unit anew, with the program where it is now",
                listens::activate(installed),
                installed.name
            ),
        );
    }
    let answer = if found.active == "active" {
        ask(service, installed.scope).await
    } else {
        ForwarderAnswer::NotAsked
    };
    if let ForwarderAnswer::None(why) = &answer
        // It may have left meanwhile, as it does when it is idle.
        && systemd.active_state(service).await.is_ok_and(|state| state == "active")
    {
        return Check::bad(
            NAME,
            format!("{service} runs, and does not answer: {why}"),
            format!("`{systemctl} restart {service}`; before that, `{journal}` may say why"),
        );
    }
    let mut undelivered = String::new();
    if let ForwarderAnswer::Report(report) = answer {
        if let Some(waiting) = &report.waiting {
            let finding = format!("{service} is full: {waiting}");
            return Check::bad(NAME, finding, room(installed, service, waiting));
        }
        if let Some(check) = report.listeners.iter().find_map(|listener| not_adopted(installed, listener)) {
            return check;
        }
        if let Some(check) = report.undelivered.as_ref().and_then(|told| untold(installed, told)) {
            return check;
        }
        undelivered = report.undelivered.map(|told| format!("; {told}")).unwrap_or_default();
    }
    if found.needs_reload {
        return Check::less(
            NAME,
            format!("{service} is {}, and has changed on disk since systemd read it", found.active),
            format!("`{systemctl} daemon-reload`"),
        );
    }
    if found.active == "active"
        && systemd.properties(service).await.is_ok_and(|properties| settings::are_older(&properties))
    {
        return Check::less(
            NAME,
            format!("{service} runs with settings from before its unit was changed"),
            format!(
                "`{systemctl} restart {service}`, once its clients have left; their connections end with it"
            ),
        );
    }
    Check::ok(NAME, format!("{service} is {}{undelivered}", found.active))
}

/// A socket that the service was to have itself, and has not.
fn not_adopted(installed: &Installed, listener: &ListenerReport) -> Option<Check> {
    let (name, address) = (&listener.name, &listener.address);
    let manager = ManagerOwner::front(installed);
    let port = installed.listeners.iter().find(|port| port.service == *name);
    let socket = port.map_or("its socket unit", |port| &port.socket.name);
    let anew = format!(
        "stop the forwarder and start the socket anew, while no client is connected: `{0} stop {socket}`, `{0} start {socket}`",
        manager.systemctl()
    );
    match listener.adoption.as_ref()? {
        // One of a kind that is never adopted is as it is to be.
        AdoptionReport::Waiting
        | AdoptionReport::Adopted { .. }
        | AdoptionReport::Relayed { reason: FallbackKind::Kind, .. } => None,
        AdoptionReport::Closed => {
            let finding = format!(
                "{name} ({address}): the service has closed the socket that it listened at, and runs on; clients are reset until it listens again"
            );
            let fix =
                format!("see why it does not listen; `{} restart {}`", manager.systemctl(), installed.unit);
            Some(Check::less(NAME, finding, fix))
        }
        AdoptionReport::Broken { why } => {
            Some(Check::bad(NAME, format!("{name} ({address}) is of no use: {why}"), anew))
        }
        AdoptionReport::Relayed { reason, why } => {
            let again = || format!("{} {}", listens::activate(installed), installed.name);
            let fix = match reason {
                FallbackKind::NoProfile => format!(
                    "restart {}: its container may be older than its profile; if that does not help, `{}` writes the profile anew",
                    installed.unit,
                    again()
                ),
                FallbackKind::Family | FallbackKind::NoneFits => format!(
                    "have it listen where the service does, IPv4 at an IPv4 address: `{} --adopt --external-port 0.0.0.0:PORT`",
                    again()
                ),
                FallbackKind::StartTimeout => {
                    format!("`{} --start-timeout SPAN` gives it more time", again())
                }
                FallbackKind::Damaged => anew,
                FallbackKind::Uncountable => "use a kernel with CONFIG_INET_DIAG=y or m and CONFIG_UNIX_DIAG=y or m, or `--adopt=off`; its clients are served all the same".to_owned(),
                FallbackKind::Refused | FallbackKind::Kind => {
                    "its clients are served all the same; the kernel's reason is above".to_owned()
                }
            };
            Some(Check::less(NAME, format!("{name} ({address}) is relayed, not adopted: {why}"), fix))
        }
    }
}

/// Clients over UDP were to be told what is not received, and are not. Where the forwarder may not tell them, it has failed.
fn untold(installed: &Installed, told: &UndeliveredReport) -> Option<Check> {
    let fix = match told {
        UndeliveredReport::Tells { failed: None, .. } => return None,
        UndeliveredReport::Tells { failed: Some(_), .. } => {
            "see whether this host has a route to its clients, and whether a firewall of its own stops what it sends"
                .to_owned()
        }
        UndeliveredReport::NoSocket => format!(
            "`{} {} --icmp-port-unreachable=false`, or give it a port for UDP",
            listens::activate(installed),
            installed.name
        ),
    };
    Some(Check::less(NAME, told.to_string(), fix))
}

/// What lets the waiting clients in.
fn room(installed: &Installed, service: &str, waiting: &Waiting) -> String {
    if waiting.lets_in.starts_with("--connections-max") {
        let more = waiting.connections.saturating_mul(4);
        format!("`{} {} --connections-max {more}` lets more in", listens::activate(installed), installed.name)
    } else {
        format!(
            "LimitNOFILE= in a drop-in of {service}, of two descriptors a connection and some to spare, lets more in"
        )
    }
}

/// What a forwarder answers, if it has a control socket.
enum ForwarderAnswer {
    Report(Box<Report>),
    /// It does not answer, and why.
    None(String),
    NotAsked,
}

async fn ask(service: &str, scope: RuntimeScope) -> ForwarderAnswer {
    let path = control_socket::socket_of(service, scope);
    if !path.exists() {
        return ForwarderAnswer::NotAsked;
    }
    match control_socket::ask_soon::<Report>(&path, Request::Status).await {
        Ok(report) => ForwarderAnswer::Report(Box::new(report)),
        // A caller without the right to ask does not find out.
        Err(error)
            if error.downcast_ref::<std::io::Error>().map(std::io::Error::kind)
                == Some(std::io::ErrorKind::PermissionDenied) =>
        {
            ForwarderAnswer::NotAsked
        }
        Err(error) => ForwarderAnswer::None(format!("{error:#} at {}", path.display())),
    }
}
