//! Which sockets get a fence of their units' own: those that a container gets, of the system's manager, and of TCP or adopted ones of UDP.

use bro_proc::cgroup;
use bro_relay::listener::SocketKind;
use bro_sockmap::fence;

use super::executable;
use super::plan::Paths;
use crate::installed::{Installed, InstalledPort, Mode};
use crate::systemd::scope::RuntimeScope;

/// Does the container get systemd's own listeners?
pub(crate) const fn concerns(installed: &Installed) -> bool {
    match installed.mode {
        Mode::Adopt(_) | Mode::Direct(_) => true,
        Mode::Forward(_) => false,
    }
}

/// Notes it with each of its ports, or says why there is none: a unit whose fence fails does not listen.
pub(super) fn plan(wanted: &mut Installed, places: &Paths, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let wants = concerns(wanted) && wanted.scope == RuntimeScope::System;
    let gets_datagrams = wanted.adoption().is_some_and(|adoption| adoption.what.offers(SocketKind::Datagram));
    // A socket of UDP can be led elsewhere as well.
    let concerns =
        |listener: &InstalledPort| listener.is_tcp() || (gets_datagrams && listener.external.is_udp());
    let refusal = if wants && wanted.listeners.iter().any(concerns) { refusal(places) } else { None };
    let program = if wants && refusal.is_none() { Some(executable::path(places)?) } else { None };
    for listener in &mut wanted.listeners {
        listener.fence = program.clone().filter(|_| concerns(listener));
    }
    warnings.extend(refusal.map(|why| {
        format!("there is no fence around the sockets of {}: {why}; see SECURITY.md", wanted.unit)
    }));
    Ok(())
}

/// Why this host's kernel has none. That of an image's tree is not here; and an ordinary user, for whom nothing is written, cannot tell.
fn refusal(places: &Paths) -> Option<String> {
    if places.root.is_some() || !nix::unistd::geteuid().is_root() {
        return None;
    }
    impossible()
}

/// Why root cannot have one on this host.
pub(crate) fn impossible() -> Option<String> {
    if let Err(error) = cgroup::mount_point() {
        return Some(format!("{error}"));
    }
    fence::check().err().map(|error| format!("{:#}", anyhow::Error::from(error)))
}
