//! Waiting until a target listens: what its addresses are, who tells of a listener, and what is asked besides.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;

use anyhow::Context as _;
use bro_relay::engine::lanes::ServiceWatch;
use bro_relay::netns::wire::{Address, TargetAddresses};
use bro_relay::target::Target;
use nix::libc;
use tokio::time::sleep;

use super::ServiceStarter;
use super::incarnation::{ContainerNetns, NetnsSource};
use super::kernel_watch::WatchedService;
use super::readiness::{self, Ready};
use crate::exit::Failure;
use crate::netns::NetnsRef;
use crate::systemd::run_command::{self, CommandOutcome};

impl ServiceStarter {
    pub(super) async fn resolve(&self, target: &Target) -> anyhow::Result<Vec<Address>> {
        Ok(match target {
            Target::Tcp { host, port } => {
                let found = tokio::net::lookup_host((host.as_str(), *port));
                let found = found.await.with_context(|| format!("cannot look up the target {target}"))?;
                found.take(TargetAddresses::MOST).map(|found| Address::Tcp(reached(found))).collect()
            }
            Target::Udp { host, port } => {
                let found = tokio::net::lookup_host((host.as_str(), *port));
                let found = found.await.with_context(|| format!("cannot look up the target {target}"))?;
                found.take(TargetAddresses::MOST).map(|found| Address::Udp(reached(found))).collect()
            }
            Target::Unix(_) | Target::Abstract(_) => self.unix(target).into_iter().collect(),
            Target::Datagrams(at) => {
                self.unix(at).map(|at| Address::Datagrams(Box::new(at))).into_iter().collect()
            }
        })
    }

    /// Where a unix target is.
    fn unix(&self, target: &Target) -> Option<Address> {
        match target {
            Target::Abstract(name) => Some(Address::Abstract(name.as_bytes().to_vec())),
            Target::Unix(path) => Some(match self.place {
                NetnsSource::Container(_) | NetnsSource::Pid(_) => Address::Inside(path.clone()),
                NetnsSource::Own | NetnsSource::Netns(_) => Address::Unix(path.clone()),
            }),
            Target::Tcp { .. } | Target::Udp { .. } | Target::Datagrams(_) => None,
        }
    }

    /// Has the kernel relay's programs watch the service, where there are any and it is on this host: they then report its first
    /// listening socket, and the sockets that it accepts can take lanes. The returned value changes when something listens.
    pub(super) async fn watch(
        &self,
        target: usize,
        place: &NetnsRef,
        incarnation: Option<&ContainerNetns>,
        addresses: &[Address],
    ) -> Option<tokio::sync::watch::Receiver<u64>> {
        let programs = self.programs.get()?;
        let mut ports = Vec::new();
        for address in addresses.iter().filter_map(Address::tcp) {
            if place.is_local(address.ip()).await.unwrap_or(false) && !ports.contains(&address.port()) {
                ports.push(address.port());
            }
        }
        if ports.is_empty() {
            return None;
        }
        let socket = place.socket(libc::AF_INET, libc::SOCK_STREAM, 0).await.ok()?;
        let netns = bro_sockmap::netns_cookie(socket.as_fd()).ok()?;
        let cgroup = match incarnation.and_then(|incarnation| incarnation.pid) {
            Some(pid) => bro_proc::cgroup::shared_with(pid.unsigned_abs()),
            None => bro_proc::cgroup::mount_point(),
        };
        let cgroup =
            cgroup.inspect_err(|error| tracing::debug!(%error, "no cgroup to watch the service in")).ok()?;
        let namespace = match place {
            NetnsRef::Own => self.own_agent().await.ok()?,
            NetnsRef::Entered(namespace) => namespace.clone(),
        };
        // Before the programs watch, so that nothing they say is missed.
        let heard = self.listening.subscribe();
        let service = WatchedService { watch: ServiceWatch { target, netns, ports }, cgroup, namespace };
        programs.watch(service).await.then_some(heard)
    }

    pub(super) async fn wait_ready(
        &self,
        place: &NetnsRef,
        addresses: &mut Vec<Address>,
        heard: Option<tokio::sync::watch::Receiver<u64>>,
        mut started: tokio::sync::watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let tcp: Vec<SocketAddr> = addresses.iter().filter_map(Address::tcp).collect();
        let udp: Vec<SocketAddr> = addresses.iter().filter_map(Address::udp).collect();
        match &self.ready {
            Ready::Unchecked => {}
            // No service says over UDP that it is ready, so that the socket is what can be seen.
            Ready::Auto | Ready::Listen | Ready::Connect | Ready::Says(_) if !udp.is_empty() => {
                let _which = readiness::bound(place, &udp, &mut started).await?;
            }
            Ready::Auto | Ready::Listen | Ready::Says(_) if !tcp.is_empty() => {
                if !self.ready.asks_elsewhere() {
                    readiness::listening(place, &tcp, heard, &mut started).await?;
                }
                if let Some((protocol, strictness)) = self.ready.question(tcp[0].port()) {
                    readiness::answering(place, &tcp, &protocol, strictness).await?;
                }
            }
            Ready::Connect if !tcp.is_empty() => readiness::connectable(place, &tcp).await?,
            // A unix socket without a listener refuses without the service noticing: the client's own connection is the test, and
            // is tried until it succeeds.
            Ready::Auto | Ready::Listen | Ready::Connect | Ready::Says(_) => {}
            Ready::Healthy => {
                let NetnsSource::Container(name) = &self.place else {
                    anyhow::bail!(Failure::Usage(
                        "--ready=healthy needs --container, whose health check it is".into()
                    ));
                };
                self.succeeding(&["podman", "healthcheck", "run", name].map(str::to_owned)).await;
            }
            Ready::Exec(line) => self.succeeding(&run_command::shell(line)).await,
        }
        // A datagram is not refused before it is sent, so there is no second address to try.
        if addresses.len() > 1
            && !udp.is_empty()
            && let Ok(Some(bound)) = readiness::bound_now(place, &udp).await
        {
            *addresses = vec![Address::Udp(bound)];
        }
        Ok(())
    }

    /// Waits until a command exits with 0.
    async fn succeeding(&self, words: &[String]) {
        loop {
            match self.run(words).await {
                Ok(CommandOutcome::Exited(0)) => return,
                Ok(outcome) => tracing::debug!(?outcome, "not ready yet"),
                Err(error) => tracing::warn!(%error, "cannot run the readiness command"),
            }
            sleep(readiness::EXEC_STEP).await;
        }
    }

    /// Runs one of the owner's commands to its end, which comes within ten seconds: with this process's rights or, where those are
    /// a confined service's, by the service manager with the owner's rights.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn run(&self, words: &[String]) -> std::io::Result<CommandOutcome> {
        if run_command::is_confined() {
            let outcome = async { run_command::by_manager(&self.bus().await?, words).await };
            match outcome.await {
                Ok(outcome) => return Ok(outcome),
                Err(error) => run_command::refused(words, &error),
            }
        }
        run_command::here(words).await
    }
}

/// The address that a connection to `target` reaches: loopback for the unspecified address, which means this host.
fn reached(target: SocketAddr) -> SocketAddr {
    let ip = match target.ip().to_canonical() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        // With its scope.
        IpAddr::V6(_) => return target,
        ip => ip,
    };
    SocketAddr::new(ip, target.port())
}
