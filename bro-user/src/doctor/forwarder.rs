//! Does the forwarder do its work? One that cannot start is started by systemd again and again, and one that hangs is active all the
//! same.

use std::path::PathBuf;

use super::whose::Whose;
use super::{Check, listens};
use crate::activate::bus::Manager;
use crate::activated::Activated;
use crate::activation::systemd::Systemd;
use crate::control::{self, Request};
use crate::status::Report;

const NAME: &str = "forwarder";

/// `service` is the forwarder's unit.
pub(super) async fn check(known: &Activated, service: &str, systemd: &Systemd) -> Check {
    let whose = Whose::front(known);
    let (systemctl, journal) = (whose.systemctl(), whose.journal(service));
    let unreadable = |error: anyhow::Error| {
        Check::bad(NAME, format!("{service}: {error:#}"), format!("see `{systemctl} status {service}`"))
    };
    let found = match systemd.bus.known(service).await {
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
    let restarting = match systemd.restarting(service).await {
        Ok(restarting) => restarting,
        Err(error) => return unreadable(error),
    };
    if found.active == "failed" {
        let log = whose.last_words(service).await;
        return Check::bad(NAME, format!("{service} has failed{log}"), format!("see `{journal}`"));
    }
    if let Some(times) = restarting {
        let log = whose.last_words(service).await;
        return Check::bad(
            NAME,
            format!(
                "{service} does not get up, and its clients wait: systemd has started it again {times} times{log}"
            ),
            format!(
                "see `{journal}`; if its program has moved, `{} {}` writes the unit anew, with the program where it is now",
                listens::activate(known),
                known.name
            ),
        );
    }
    if found.active == "active"
        && let Some(why) = does_not_answer(service, known.scope).await
        // It may have left meanwhile, as it does when it is idle.
        && systemd.bus.active_state(service).await.is_ok_and(|state| state == "active")
    {
        return Check::bad(
            NAME,
            format!("{service} runs, and does not answer: {why}"),
            format!("`{systemctl} restart {service}`; before that, `{journal}` may say why"),
        );
    }
    Check::ok(NAME, format!("{service} is {}", found.active))
}

/// Why not, if it has the socket that each forwarder is asked at.
async fn does_not_answer(service: &str, scope: Manager) -> Option<String> {
    let path = socket(service, scope);
    if !path.exists() {
        return None;
    }
    let asked = control::ask_soon::<Report>(&path, Request::Status).await;
    let error = asked.err()?;
    let refused = error.downcast_ref::<std::io::Error>();
    // Who may not ask does not find out.
    (refused.map(std::io::Error::kind) != Some(std::io::ErrorKind::PermissionDenied))
        .then(|| format!("{error:#} at {}", path.display()))
}

/// In the directory that its unit names (`RuntimeDirectory=bro/%N`).
pub(super) fn socket(service: &str, scope: Manager) -> PathBuf {
    let base = match scope {
        Manager::System => PathBuf::from(control::SYSTEM),
        Manager::User => control::base_directory(),
    };
    base.join(service.strip_suffix(".service").unwrap_or(service)).join(control::SOCKET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_where_the_unit_has_it() {
        assert_eq!(
            socket("web-activator.service", Manager::System),
            PathBuf::from("/run/bro/web-activator/status.sock")
        );
    }
}
