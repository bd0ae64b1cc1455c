//! NAME-activator-seccomp.socket: where the OCI runtime hands over by what a container whose sockets are adopted asks (systemd.socket(5)).
//!
//! It is a socket of its own and no port: also a container that is started by hand, and each `podman exec`, connects here, and starts the forwarder
//! where it does not run.

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::installed::{Adoption, Installed, SECTION};
use crate::paths;
use crate::systemd::scope::RuntimeScope;

/// What the forwarder knows it by. No port has this name, as ports' names are those of quadlets or given by hand: one that is is refused.
pub const DESCRIPTOR: &str = "seccomp";

/// The place of the socket, as the seccomp profile says it: `listenerPath` takes no specifier. `uid` is the number of a user whose manager listens.
#[must_use]
pub fn listener_path(name: &str, scope: RuntimeScope, uid: u32) -> PathBuf {
    let runtime = match scope {
        RuntimeScope::System => PathBuf::from("/run"),
        RuntimeScope::User => paths::runtime_directory_of(uid),
    };
    runtime.join(format!("bro/adopt/{name}.sock"))
}

pub(super) fn text(installed: &Installed, adoption: &Adoption) -> String {
    let mut text = super::heading(installed, Some(&adoption.agent.name));
    let (name, unit, wakes) = (&installed.name, &installed.unit, installed.runner());
    let runtime = match installed.scope {
        RuntimeScope::System => "/run",
        RuntimeScope::User => "%t",
    };
    // Writing to a String cannot fail.
    write!(
        text,
        "[Unit]\n\
         Description=Seccomp notifications of {unit}\n\
         \n\
         [Socket]\n\
         ListenStream={runtime}/bro/adopt/{name}.sock\n\
         # Podman and the OCI runtime are the container's owner, and no other user has anything to say here.\n\
         SocketMode=0600\n"
    )
    .ok();
    if let Some(owner) = &installed.run_as {
        writeln!(text, "SocketUser={}", owner.name).ok();
    }
    write!(
        text,
        "RemoveOnStop=yes\n\
         FileDescriptorName={DESCRIPTOR}\n\
         Service={wakes}\n\
         # However often commands run in the container: no limit is to end the listening.\n\
         TriggerLimitIntervalSec=0\n\
         \n\
         [Install]\n\
         WantedBy=sockets.target\n\
         \n\
         [{SECTION}]\n\
         Name={name}\n"
    )
    .ok();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_is_in_the_users_own_directory() {
        let path = |scope| listener_path("web@blue", scope, 7).display().to_string();
        assert_eq!(path(RuntimeScope::System), "/run/bro/adopt/web@blue.sock");
        assert_eq!(path(RuntimeScope::User), "/run/user/7/bro/adopt/web@blue.sock");
    }
}
