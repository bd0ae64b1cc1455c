//! Is there a fence around the sockets that a container gets?
//!
//! It stands in the control group that systemd should make the listener in. Which one that is by the kernel's own table is asked as well: a systemd that has no
//! use for the group of a socket (no BPF firewall, which it takes cgroup v2 alone for) makes the socket in its own, and the fence would stand around nothing.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use bro_proc::cgroup;
use bro_relay::listener::SocketKind;
use bro_sockmap::fence;

use super::{Check, listens};
use crate::commands::activate::fence::{concerns, impossible};
use crate::installed::{Installed, InstalledPort};
use crate::netns::sock_diag::Table;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

const NAME: &str = "fence";

pub(super) async fn checks(installed: &Installed, systemd: &SystemdManager) -> Vec<Check> {
    let tcp: Vec<&InstalledPort> = installed.listeners.iter().filter(|listener| listener.is_tcp()).collect();
    if !concerns(installed) || tcp.is_empty() {
        return Vec::new();
    }
    if installed.scope == RuntimeScope::User {
        return vec![of_user(&tcp).await];
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
        Ok(true) if is_elsewhere(listener, &group) => made_elsewhere(listener, unit),
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
async fn of_user(listeners: &[&InstalledPort]) -> Check {
    let uid = nix::unistd::geteuid().as_raw();
    let group = cgroup::of_user(uid).map(|slice| slice.join(format!("user@{uid}.service/init.scope")));
    let unit = format!("bro-fence@{uid}.service");
    // A user may not ask on each kernel.
    let stands = group.as_ref().is_ok_and(|group| fence::stands(group).is_ok_and(|stands| stands));
    let is_up = stands
        || match SystemdManager::connect(RuntimeScope::System).await {
            Ok(system) => system.active_state(&unit).await.is_ok_and(|state| state == "active"),
            Err(_) => false,
        };
    let elsewhere =
        |listener: &&&InstalledPort| group.as_ref().is_ok_and(|group| is_elsewhere(listener, group));
    if let Some(listener) = listeners.iter().find(elsewhere).filter(|_| is_up) {
        return made_elsewhere(listener, &unit);
    }
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

fn made_elsewhere(listener: &InstalledPort, fence: &str) -> Check {
    Check::bad(
        NAME,
        format!(
            "that of {fence} stands, and {} was made in another control group than it stands around, so it does nothing: this systemd makes no socket in the group that the \
             socket is of (it takes cgroup v2 alone, and a kernel with CONFIG_CGROUP_BPF)",
            listener.socket.name
        ),
        "boot with systemd.unified_cgroup_hierarchy=1, or `--adopt=off`",
    )
}

/// Is what listens there of another control group than this one, by the kernel's table? Not where the kernel does not say, or nothing listens.
fn is_elsewhere(listener: &InstalledPort, group: &Path) -> bool {
    let streams = listener.external.sockets().filter(|socket| socket.kind == SocketKind::Stream);
    streams
        .filter_map(|socket| socket.place.port())
        .any(|port| listens_within((listener.external.ip(), port), group) == Some(false))
}

/// Was a TCP listener of this namespace, at this address, or at any with this port, made in this control group? `None` where there is none, or this kernel (before
/// 5.9) does not tell.
#[must_use]
pub fn listens_within((ip, port): (Option<IpAddr>, u16), group: &Path) -> Option<bool> {
    let number = std::fs::metadata(group).ok()?.ino();
    let found = Table::here().and_then(|table| table.listeners()).ok()?;
    let of_it = found
        .iter()
        .filter(|found| found.address.port() == port && ip.is_none_or(|ip| found.address.ip() == ip));
    let groups: Vec<u64> = of_it.filter_map(|found| found.group).collect();
    (!groups.is_empty()).then(|| groups.contains(&number))
}
