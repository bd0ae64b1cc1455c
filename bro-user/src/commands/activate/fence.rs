//! Which sockets get a fence of their units' own: those that a container gets, of the system's manager, and of TCP or adopted ones of UDP.

use bro_proc::cgroup;
use bro_relay::listener::SocketKind;
use bro_relay::target::Target;
use bro_sockmap::fence;

use super::executable;
use super::plan::Paths;
use crate::installed::{Installed, InstalledPort, Mode, SocketFence, SocketNames};
use crate::systemd::scope::RuntimeScope;

/// Each takes programs of its own, of which the kernel bears 64 in a control group.
const MOST_PORTS: usize = 30;

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
    // What is forwarded is told by the forwarder.
    let adoption = wanted.adoption().filter(|adoption| adoption.what.offers(SocketKind::Stream));
    let adoption = adoption.map(|adoption| adoption.trusts_loopback);
    for listener in &mut wanted.listeners {
        let told = adoption.map_or_else(SocketNames::default, |trusts| told(listener, trusts));
        let program = program.clone().filter(|_| concerns(listener));
        listener.fence = program.map(|program| SocketFence { program, told });
    }
    warnings.extend(refusal.map(|why| {
        format!("there is no fence around the sockets of {}: {why}; see SECURITY.md", wanted.unit)
    }));
    Ok(())
}

/// What a service that knows nothing of being adopted is told, so that it finds what it would find behind a forwarder.
fn told(listener: &InstalledPort, trusts_loopback: bool) -> SocketNames {
    let streams = listener.external.sockets().filter(|socket| socket.kind == SocketKind::Stream);
    let first = listener.external.ports().map_or(0, |ports| ports.first);
    let pair = |external: u16| match listener.internal.as_ref()?.nth(external - first) {
        Target::Tcp { port, .. } if port != external => Some((external, port)),
        _ => None,
    };
    let mut ports: Vec<(u16, u16)> =
        streams.filter_map(|socket| socket.place.port()).filter_map(pair).collect();
    if ports.len() > MOST_PORTS {
        ports.clear();
    }
    SocketNames { this_host: !trusts_loopback && super::adopt::serves_this_host(listener), ports }
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
