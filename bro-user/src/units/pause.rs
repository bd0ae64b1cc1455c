//! NAME-pause.service: makes the user namespace of a user's Podman, for a container's unit that may not.
//!
//! newuidmap and newgidmap have rights of their own, which `NoNewPrivileges=` takes away, and in a user's manager
//! `RestrictAddressFamilies=` implies that. Podman's pause process keeps the namespace, and others of its processes join it.

use crate::activated::{Activated, SECTION};

/// Its name.
pub(crate) fn unit(name: &str) -> String {
    format!("{name}-pause.service")
}

pub(super) fn text(activated: &Activated) -> String {
    let unit = unit(&activated.name);
    let heading = super::heading(activated, Some(&unit));
    format!(
        "{heading}[Unit]\n\
         Description=Podman's user namespace for {}\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         ExecStart=podman unshare true\n\
         # Podman's pause process is there for all of this user's containers.\n\
         KillMode=process\n\
         \n\
         [{SECTION}]\n\
         Name={}\n",
        activated.unit, activated.name
    )
}
