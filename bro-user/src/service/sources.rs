//! `--source=`: from which addresses a target's connections are to be made, decided anew each time it is woken.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;

use anyhow::{Context as _, bail};
use bro_relay::netns::wire::Address;
use bro_relay::source::Sources;
use clap::ValueEnum;
use nix::errno::Errno;
use nix::libc;

use crate::exit::Failure;
use crate::netns::addresses::Addresses;
use crate::netns::{Namespace, NetnsRef};

/// `--source=`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The client's own where the container has the loopback interface alone; else the container's
    #[default]
    Auto,
    /// The client's own. Where it cannot be had, this is an error
    Client,
    /// The container's own on its network, for every client. Where it has none, this is an error
    Container,
    /// 127.0.0.1 or ::1: grants every client whatever the service trusts its own host with
    Loopback,
}

/// The addresses that the service is to see.
#[derive(Debug, Clone, Copy, Default)]
pub struct WantedSource {
    /// The option.
    pub choice: Choice,
    /// The cookie of the network namespace that all clients come to, where all come over TCP and to the same one.
    pub clients: Option<u64>,
}

impl WantedSource {
    /// Decides for a target at `place` with the agent `namespace`. Removes those of `addresses` that no fitting address can reach.
    ///
    /// # Errors
    /// When the wanted addresses cannot be used.
    pub(super) async fn decide(
        self,
        place: &NetnsRef,
        namespace: &Namespace,
        addresses: &mut Vec<Address>,
    ) -> anyhow::Result<Sources> {
        if self.choice == Choice::Loopback || !addresses.iter().any(|address| address.inet().is_some()) {
            return Ok(Sources::Kernel);
        }
        let found =
            Addresses::of(place).await.context("cannot see what addresses the service's network has")?;
        match self.choice {
            Choice::Auto if !found.networks.is_empty() => as_the_container(&found, addresses),
            Choice::Container if !found.networks.is_empty() => as_the_container(&found, addresses),
            Choice::Container => bail!(Failure::Usage(
                "--source=container cannot be had: the container has no network, and so no address of its own there; \
                 --source=client shows the service each client's"
                    .into()
            )),
            // Every client is on the service's own loopback interface already.
            Choice::Auto if self.clients.is_some() && self.clients == cookie(place).await => Ok(Sources::Kernel),
            Choice::Auto | Choice::Client => as_the_clients(found, place, namespace, addresses).await,
            Choice::Loopback => Ok(Sources::Kernel),
        }
    }
}

async fn cookie(place: &NetnsRef) -> Option<u64> {
    let socket = place.socket(libc::AF_INET, libc::SOCK_STREAM, 0).await.ok()?;
    bro_sockmap::netns_cookie(socket.as_fd()).ok()
}

/// From the container's own address on its network.
fn as_the_container(found: &Addresses, addresses: &mut Vec<Address>) -> anyhow::Result<Sources> {
    let v4 = found.networks.iter().find_map(|ip| if let IpAddr::V4(ip) = ip { Some(*ip) } else { None });
    let v6 = found.networks.iter().find_map(|ip| if let IpAddr::V6(ip) = ip { Some(*ip) } else { None });
    let family = |ipv4: bool| if ipv4 { "IPv4" } else { "IPv6" };
    let mut lacking = String::new();
    addresses.retain(|address| {
        let Some(target) = address.inet().filter(|target| target.ip().is_loopback()) else { return true };
        let has = if target.is_ipv4() { v4.is_some() } else { v6.is_some() };
        if !has {
            // Writing to a String cannot fail.
            write!(lacking, "{target} (there is no {} address on its network)", family(target.is_ipv4()))
                .ok();
        }
        has
    });
    if addresses.is_empty() {
        bail!(Failure::Usage(format!(
            "the container has no address of its own from which {lacking} could be connected to: name a target of the other \
             family, or choose --source=client"
        )));
    }
    if !lacking.is_empty() {
        tracing::info!("not connecting to {lacking}");
    }
    Ok(Sources::Container { v4, v6 })
}

/// From each client's own address.
async fn as_the_clients(
    found: Addresses,
    place: &NetnsRef,
    namespace: &Namespace,
    addresses: &mut Vec<Address>,
) -> anyhow::Result<Sources> {
    let own = found
        .networks
        .iter()
        .any(|ip| addresses.iter().any(|address| address.inet().map(|t| t.ip()) == Some(*ip)));
    if own {
        bail!(Failure::Usage(
            "--source=client cannot be had for a target on the container's network, whose answers to others would be led astray: \
             let the service listen on 127.0.0.1 of the container too, or choose --source=container"
                .into()
        ));
    }
    if !found.networks.is_empty() && matches!(place, NetnsRef::Own) {
        bail!(Failure::Usage(
            "--source=client takes a network namespace of the service's own, since it adds a routing rule there: name it with \
             --container, --pid or --netns, or choose --source=container"
                .into()
        ));
    }
    let mut refused = None;
    let mut kept = Vec::with_capacity(addresses.len());
    for address in addresses.drain(..) {
        match address.inet() {
            Some(target) => match namespace.keep_replies(address.clone()).await? {
                Ok(()) => kept.push(address),
                Err(errno) => refused = Some((target, errno)),
            },
            None => kept.push(address),
        }
    }
    *addresses = kept;
    match refused {
        Some((target, errno)) if addresses.is_empty() => Err(why(target, errno)),
        Some((target, errno)) => {
            tracing::info!(
                error = errno.desc(),
                "not connecting to {target}: no client's own address can be had there"
            );
            Ok(Sources::Client { taken: taken(found) })
        }
        None => Ok(Sources::Client { taken: taken(found) }),
    }
}

fn taken(found: Addresses) -> Vec<IpAddr> {
    let Addresses { networks, loopback } = found;
    networks.into_iter().chain(loopback).collect()
}

/// Why no client's own address can be used.
fn why(target: SocketAddr, errno: Errno) -> anyhow::Error {
    let what = "the service cannot be shown its clients' own addresses";
    match errno {
        Errno::EPERM | Errno::EACCES => Failure::NotPermitted(format!(
            "{what}: that takes CAP_NET_ADMIN over its network, which has the loopback interface alone; give the forwarder that \
             capability (in its unit: CapabilityBoundingSet=), or choose --source=loopback, which grants every client what the \
             service grants its own host"
        ))
        .into(),
        _ => anyhow::anyhow!(
            "{what}: {} at {target}; the kernel needs rules for routing (CONFIG_IP_MULTIPLE_TABLES), or choose \
             --source=loopback, which grants every client what the service grants its own host",
            errno.desc()
        ),
    }
}
