//! To where a container whose service adopts sockets may connect, and by what runtime that is so.
//!
//! Without a word it is what takes nothing from it that it is known to need: a user's container without a network and a pod of its own reaches its own
//! loopback interface only, and there the ports that its service listens at, for health checks and its own tools. One with a network may need any
//! other service; and sockets of a system's unit have a fence around them, which asks no more of the container than that it leave these alone.

use bro_relay::target::Target;

use super::executable;
use super::plan::{FoundQuadlet, Paths};
use crate::commands::oci_runtime;
use crate::exit::Failure;
use crate::installed::{Connects, Installed};
use crate::systemd::scope::RuntimeScope;
use crate::units::RuntimeLink;

/// The runtime that Podman is given where it has told of no other; adoption takes one of these.
const RUNTIME: &str = "crun";

/// The runtime that holds the container to it, where one has to.
pub(super) fn runtime(
    wanted: &Installed,
    FoundQuadlet { quadlet, pod }: &FoundQuadlet,
    without_network: bool,
    places: &Paths,
    warnings: &mut Vec<String>,
) -> anyhow::Result<Option<RuntimeLink>> {
    let Some(adoption) = wanted.adoption() else { return Ok(None) };
    let own = ["PodmanArgs", "GlobalArgs"]
        .into_iter()
        .flat_map(|key| quadlet.file.words("Container", key))
        .any(|word| word.starts_with("--runtime"));
    let possible = || if places.root.is_some() { Ok(()) } else { oci_runtime::check() };
    let ports = match &adoption.connects {
        Some(Connects::Any | Connects::Never) => return Ok(None),
        Some(connects @ Connects::Ports(ports)) => {
            let refuse = |why: String| Failure::Usage(format!("--adopt-connect={connects}: {why}"));
            if own {
                let file = quadlet.file_name();
                return Err(refuse(format!(
                    "{file} names a runtime (--runtime), and this takes bro's; leave one of them out"
                ))
                .into());
            }
            possible().map_err(|error| {
                refuse(format!("{error:#}; --adopt-connect=never holds on any kernel, for a service that connects nowhere"))
            })?;
            ports.clone()
        }
        None => {
            let is_alone = without_network && pod.is_none() && quadlet.value("Pod").is_none();
            let is_users = wanted.scope == RuntimeScope::User;
            let has_tcp = wanted.listeners.iter().any(crate::installed::InstalledPort::is_tcp);
            if !is_users || !is_alone || own || !has_tcp {
                return Ok(None);
            }
            if let Err(error) = possible() {
                warnings.push(format!(
                    "{} may lead its sockets elsewhere on this host: {error:#}; see SECURITY.md",
                    wanted.unit
                ));
                return Ok(None);
            }
            its_own(wanted)
        }
    };
    Ok(Some(RuntimeLink { program: executable::path(places)?, name: RUNTIME.to_owned(), ports }))
}

/// The ports at which its service listens.
fn its_own(wanted: &Installed) -> Vec<u16> {
    let targets = wanted.listeners.iter().flat_map(crate::installed::InstalledPort::targets);
    let inside = targets.filter_map(|target| match target {
        Target::Tcp { port, .. } => Some(port),
        _ => None,
    });
    let mut ports: Vec<u16> = inside.collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}
