//! Is there a fence around the sockets that a container gets?
//!
//! It stands in the control group that systemd should make the listener in. Which one that is by the kernel's own table is asked as well: a systemd that has no
//! use for the group of a socket (no BPF firewall, which takes cgroup v2) makes the socket in its own, and the fence would stand around nothing.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use bro_proc::cgroup;
use bro_relay::listener::SocketKind;
use bro_relay::read_bounded::{self, Link};

use super::{Check, listens};
use crate::commands::activate::fence::{concerns, impossible};
use crate::installed::{Connects, Installed, InstalledPort, SocketFence};
use crate::netns::sock_diag::Table;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::UnitFile;
use crate::units::DropIn;

const NAME: &str = "fence";

/// The longest drop-in that is read.
const LONGEST: u64 = 1 << 16;

pub(super) async fn checks(installed: &Installed, systemd: &SystemdManager) -> Vec<Check> {
    let tcp: Vec<&InstalledPort> = installed.listeners.iter().filter(|listener| listener.is_tcp()).collect();
    if !concerns(installed) || tcp.is_empty() {
        return Vec::new();
    }
    if installed.scope == RuntimeScope::User {
        return vec![of_user(installed, &tcp).await];
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
    let Some(fence) = &listener.fence else {
        let missing = format!("{unit} has none");
        return match Some(()).filter(|()| is_root).and_then(|()| impossible()) {
            Some(why) => Check::less(NAME, format!("{missing}, and this host has none: {why}"), "mend that"),
            None => Check::less(
                NAME,
                missing,
                format!("`{} {}` writes one", listens::activate(installed), installed.name),
            ),
        };
    };
    let group = match systemd.group_of_socket(unit).await {
        Ok(Some(group)) if is_root => group,
        // Only root is told.
        Ok(_) | Err(_) => return Check::ok(NAME, format!("{unit} puts one up before it listens")),
    };
    match bro_sockmap::fence::stands(&group) {
        Ok(true) if is_elsewhere(listener, &group) => made_elsewhere(listener, unit),
        Ok(true) => Check::ok(NAME, format!("around the sockets of {unit}{}", told(fence))),
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

/// What a service is told there.
fn told(SocketFence { told, .. }: &SocketFence) -> String {
    let this_host =
        told.this_host.then(|| "clients of this host are seen by 169.254.1.2 or fd62:726f::2".to_owned());
    let ports =
        told.ports.iter().map(|(external, internal)| format!("port {external} is seen as {internal}"));
    let said: Vec<String> = this_host.into_iter().chain(ports).collect();
    if said.is_empty() { String::new() } else { format!("; {}", said.join(", ")) }
}

/// The one that root puts up around all of this user's.
async fn of_user(installed: &Installed, listeners: &[&InstalledPort]) -> Check {
    let uid = nix::unistd::geteuid().as_raw();
    let group = cgroup::of_user(uid).map(|slice| slice.join(format!("user@{uid}.service/init.scope")));
    let unit = format!("bro-fence@{uid}.service");
    // A user may not ask on each kernel.
    let stands =
        group.as_ref().is_ok_and(|group| bro_sockmap::fence::stands(group).is_ok_and(|stands| stands));
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
    if let Some(says) = held_back(installed) {
        return Check::ok(NAME, says);
    }
    Check::less(
        NAME,
        "none around the sockets of this user's service manager, so what is in the container can lead those that it accepts to ports of this \
         host's own",
        format!(
            "root: `systemctl enable --now bro-fence@{uid}`; or without root, for an adopted service that connects to no other: `{} {} --adopt-connect=none`",
            listens::activate(installed),
            installed.name
        ),
    )
}

/// What keeps the container itself from connecting, where something does (`--adopt-connect`).
fn held_back(installed: &Installed) -> Option<String> {
    if installed.adoption()?.connects == Some(Connects::Never) {
        return Some(format!(
            "none, and none of the processes of {} may connect anywhere, by its seccomp profile",
            installed.unit
        ));
    }
    let text = read_bounded::read(installed.drop_in.as_ref()?, LONGEST, Link::Follow).ok()?;
    let drop_in = DropIn::read(&UnitFile::parse(&text), installed);
    let ports = Connects::Ports(drop_in.runtime?.ports);
    Some(match ports {
        Connects::Ports(ports) if ports.is_empty() => {
            format!(
                "none, and no process of {} may connect over TCP, by its runtime (Landlock)",
                installed.unit
            )
        }
        ports => format!(
            "none, and the processes of {} may connect over TCP to these ports alone, by its runtime (Landlock): {ports}",
            installed.unit
        ),
    })
}

fn made_elsewhere(listener: &InstalledPort, fence: &str) -> Check {
    Check::bad(
        NAME,
        format!(
            "that of {fence} stands, and {} was made in another control group than it stands around, so it does nothing: this systemd makes no socket in the group that the \
             socket is of (it takes cgroup v2, and a kernel with CONFIG_CGROUP_BPF)",
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
