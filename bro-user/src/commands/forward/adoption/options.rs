//! What does not go with `--adopt`, and where the service listens, for the agent.

use std::net::SocketAddr;

use bro_adopt::socket::Place;
use bro_relay::target::Target;

use crate::cli::{Forward, LocalClients};
use crate::exit::Failure;
use crate::service::readiness::Ready;

/// Refuses what cannot hold for a client that this process does not accept.
pub(in super::super) fn check(options: &Forward, targets: &[Target]) -> Result<(), Failure> {
    let cases = [
        (!options.listen.is_empty(), "--listen", "only sockets that systemd passes can be adopted"),
        (
            options.connections_per_source.is_some(),
            "--connections-per-source",
            "the service accepts its clients itself",
        ),
        (options.proxy_protocol.is_some(), "--proxy-protocol", "the service sees its clients' own addresses"),
        (options.accept_proxy, "--accept-proxy", "the service accepts its clients itself"),
        (
            options.local_clients != LocalClients::Off,
            "--local-clients",
            "no lane leads to an adopted connection",
        ),
        (
            !matches!(options.ready, Ready::Auto | Ready::Listen),
            "--ready other than auto or listen",
            "the service accepts its clients from listen(2) on",
        ),
    ];
    match cases.into_iter().find(|(given, ..)| *given) {
        Some((_, option, why)) => {
            Err(Failure::Usage(format!("{option} does not go with --adopt: {why}; leave one of them out")))
        }
        // Before anything is started.
        None => targets.iter().try_for_each(|target| place(target).map(drop)),
    }
}

/// Where a service listens for clients of this target, as it says so inside.
pub(super) fn place(target: &Target) -> Result<Place, Failure> {
    match target {
        Target::Tcp { host, port } | Target::Udp { host, port } => {
            let address =
                if host == "localhost" { Ok(std::net::Ipv4Addr::LOCALHOST.into()) } else { host.parse() };
            let is_udp = matches!(target, Target::Udp { .. });
            let place = |ip| {
                let address = SocketAddr::new(ip, *port);
                if is_udp { Place::Udp(address) } else { Place::Tcp(address) }
            };
            address.map(place).map_err(|_| {
                Failure::Usage(format!(
                    "--adopt compares addresses, and “{host}” is a name: write the target {target} with an address"
                ))
            })
        }
        // Such a socket is not offered to the service.
        Target::Datagrams(at) => place(at),
        Target::Unix(path) => Ok(Place::Path(path.as_os_str().as_encoded_bytes().to_owned())),
        Target::Abstract(name) => Ok(Place::Abstract(name.as_bytes().to_owned())),
    }
}
