//! Is there a fence around the sockets that a container gets?

use bro_proc::cgroup;
use bro_sockmap::fence;

use super::{Check, listens};
use crate::commands::activate::fence::{concerns, impossible};
use crate::installed::{Installed, InstalledPort};
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

const NAME: &str = "fence";

pub(super) async fn checks(installed: &Installed, systemd: &SystemdManager) -> Vec<Check> {
    let tcp: Vec<&InstalledPort> = installed.listeners.iter().filter(|listener| listener.is_tcp()).collect();
    if !concerns(installed) || tcp.is_empty() {
        return Vec::new();
    }
    if installed.scope == RuntimeScope::User {
        return vec![of_user().await];
    }
    let mut checks = Vec::new();
    for listener in tcp {
        checks.push(of_unit(installed, listener, systemd).await);
    }
    checks
}

/// That of a socket unit of the system's.
async fn of_unit(installed: &Installed, listener: &InstalledPort, systemd: &SystemdManager) -> Check {
    let unit = &listener.socket.name;
    let is_root = nix::unistd::geteuid().is_root();
    if listener.fence.is_none() {
        let missing = format!("{unit} has none");
        return match Some(()).filter(|()| is_root).and_then(|()| impossible()) {
            Some(why) => Check::less(NAME, format!("{missing}, and this host has none: {why}"), "mend that"),
            None => Check::less(
                NAME,
                missing,
                format!("`{} {}` writes one", listens::activate(installed), installed.name),
            ),
        };
    }
    let group = match systemd.group_of_socket(unit).await {
        Ok(Some(group)) if is_root => group,
        // Only root is told.
        Ok(_) | Err(_) => return Check::ok(NAME, format!("{unit} puts one up before it listens")),
    };
    match fence::stands(&group) {
        Ok(true) => Check::ok(NAME, format!("around the sockets of {unit}")),
        Ok(false) => Check::bad(
            NAME,
            format!("{unit} puts one up before it listens, and none stands"),
            format!("`systemctl restart {unit}`"),
        ),
        Err(error) => {
            Check::less(NAME, format!("whether that of {unit} stands cannot be told: {error}"), "mend that")
        }
    }
}

/// The one that root puts up around all of this user's.
async fn of_user() -> Check {
    let uid = nix::unistd::geteuid().as_raw();
    let group = cgroup::of_user(uid).map(|slice| slice.join(format!("user@{uid}.service/init.scope")));
    let unit = format!("bro-fence@{uid}.service");
    // A user may not ask on each kernel.
    let stands = group.and_then(|group| fence::stands(&group)).unwrap_or(false);
    let is_up = stands
        || match SystemdManager::connect(RuntimeScope::System).await {
            Ok(system) => system.active_state(&unit).await.is_ok_and(|state| state == "active"),
            Err(_) => false,
        };
    if is_up {
        return Check::ok(NAME, "around the sockets of this user's service manager");
    }
    Check::less(
        NAME,
        "none around the sockets of this user's service manager, so what is in the container can lead those that it accepts to ports of this \
         host's own",
        format!("root: `systemctl enable --now bro-fence@{uid}`"),
    )
}
