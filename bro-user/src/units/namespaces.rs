//! NAME-pause.service: makes what the unit of a container that is cut off from the network may not: the container's network
//! namespace, and the user namespace of a user's Podman.
//!
//! crun brings the loopback interface up in each network namespace that it makes, which fails where no sockets of AF_INET are to be
//! had; it enters an existing one as it finds it. newuidmap and newgidmap have rights of their own, which `NoNewPrivileges=` takes
//! away, and in a user's manager `RestrictAddressFamilies=` implies that. Podman's pause process keeps the user namespace, and a
//! mount namespace in which the network namespace has its name; other Podman processes join them.

use crate::installed::{Installed, SECTION, pause_unit_of};
use crate::systemd::scope::RuntimeScope;

/// The network namespace, as the container's unit names it.
pub(super) fn netns(name: &str) -> String {
    format!("%t/{name}-pause.netns")
}

pub(super) fn text(installed: &Installed) -> String {
    let unit = pause_unit_of(&installed.name);
    let heading = super::heading(installed, Some(&unit));
    let (within, note) = match installed.scope {
        RuntimeScope::User => (
            "podman unshare ",
            "# Podman's pause process is there for all of this user's containers.\nKillMode=process\n",
        ),
        RuntimeScope::System => ("", ""),
    };
    let netns = netns(&installed.name);
    format!(
        "{heading}[Unit]\n\
         Description=Namespaces for {}\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         # One that is there already keeps the processes in it.\n\
         ExecStart={within}sh -c 'umount --lazy \"$$0\" 2>/dev/null; : >\"$$0\" && unshare --net=\"$$0\" ip link set lo up' {netns}\n\
         ExecStop=-{within}sh -c 'umount --lazy \"$$0\"; rm --force \"$$0\"' {netns}\n\
         {note}\
         \n\
         [{SECTION}]\n\
         Name={}\n",
        installed.unit, installed.name
    )
}
