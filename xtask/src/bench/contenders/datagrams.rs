//! The same contenders with UDP sockets: those that can relay them.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::super::datagram_service;
use super::super::launch::{Filter, Launch, last_line};
use super::super::scene::Scene;
use super::super::stream::Address;
use super::{
    AdoptedStart, Contender, Published, Running, Way, bro_args, connections_within_descriptors,
    expect_adopted, local_address, nginx_user, pasta_script, program, publish_by_slirp, rootlessport_script,
    slirp_args, stream_module,
};

/// How long the first answer may take.
const START: Duration = Duration::from_secs(20);

impl Contender {
    /// Whether it relays datagrams at all; of bro's relays, which are for streams, one stands for all.
    pub fn relays_datagrams(&self) -> bool {
        match self.way {
            Way::Direct | Way::HostNetwork | Way::Adopted | Way::Socat | Way::Nginx => true,
            Way::Pasta | Way::Slirp | Way::Rootlessport => true,
            Way::Bro { .. } => self.key == "bro-auto",
            Way::Unix | Way::Proxyd | Way::Haproxy => false,
        }
    }

    /// Whether the service that all others share has no port of its.
    pub fn has_its_own_datagram_service(&self) -> bool {
        matches!(self.way, Way::HostNetwork | Way::Adopted)
    }

    /// Starts it towards a UDP port inside, and waits until an answer has come back.
    pub fn start_for_datagrams(&self, scene: &Scene, port: u16) -> Result<Running> {
        let running = self.launch_for_datagrams(scene, port);
        let running = running.with_context(|| format!("starting {}", self.label))?;
        let args = ["datagram-load".into(), running.address.to_string(), "--poke".into()];
        if let Err(error) = running.client(scene, &args, START) {
            let log = std::fs::read_to_string(&running.log).unwrap_or_default();
            bail!("starting {}: {error:#}; it says: {}", self.label, last_line(&log));
        }
        if self.way == Way::Adopted {
            expect_adopted(&running.log)?;
        }
        Ok(running)
    }

    fn launch_for_datagrams(&self, scene: &Scene, port: u16) -> Result<Running> {
        let target = format!("127.0.0.1:{port}");
        let log = scene.folder.path(&format!("{}-{port}-udp.log", self.key));
        let (socket, address, inside, path, args) = match self.way {
            Way::Direct => {
                let address = Address::Tcp(target.parse()?);
                return Ok(Running { address, inside: true, _service: None, process: None, log });
            }
            Way::Bro { .. } => {
                let (socket, address) = passed()?;
                let mut args = bro_args(scene, &[]);
                args.push(target);
                (Some(socket), address, false, scene.bro.clone(), args)
            }
            Way::Nginx => {
                let (socket, address) = passed()?;
                let config = log.with_extension("conf");
                let most = connections_within_descriptors();
                let text = format!(
                    "{}daemon off;\npid {};\n{}events {{ worker_connections {most}; }}\nworker_processes auto;\nstream {{\n    \
                     server {{\n        listen {address} udp;\n        proxy_pass {target};\n        proxy_timeout 1h;\n    }}\n}}\n",
                    stream_module()?,
                    log.with_extension("pid").display(),
                    nginx_user(),
                );
                std::fs::write(&config, text)?;
                let args =
                    ["-e".into(), log.display().to_string(), "-c".into(), config.display().to_string()];
                (Some(socket), address, true, program("nginx")?, args.to_vec())
            }
            Way::Socat => {
                let listen = port + 10_000;
                let args =
                    vec![format!("UDP4-LISTEN:{listen},bind=127.0.0.1,fork"), format!("UDP4:{target}")];
                (None, Address::Tcp((Ipv4Addr::LOCALHOST, listen).into()), true, program("socat")?, args)
            }
            Way::HostNetwork => {
                let address = free_port()?;
                let launch = Launch { filter: Filter::Allowing, ..Launch::default() };
                let service = datagram_service::start(launch, &[address.port()])?;
                let address = Address::Tcp(address);
                return Ok(Running { address, inside: false, _service: Some(service), process: None, log });
            }
            Way::Adopted => {
                let (socket, address) = passed()?;
                let starts = AdoptedStart { scene, target, startup_ms: 0 };
                let (process, listener_path) = starts.forwarder(socket, &log)?;
                let filter = Filter::Notifying(listener_path);
                let launch = Launch { inside: scene.inside(true), filter, ..Launch::default() };
                let service = Some(datagram_service::start(launch, &[port])?);
                return Ok(Running {
                    address,
                    inside: false,
                    _service: service,
                    process: Some(process),
                    log,
                });
            }
            Way::Pasta => {
                // By one number on both sides: older ones (2023) lose answers otherwise.
                let host = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                drop(UdpSocket::bind(host).context("its port on this side")?);
                let published = Published { host, port, protocol: "udp" };
                let script = pasta_script(scene, published)?;
                let args = vec!["-c".into(), script];
                (None, Address::Tcp(published.host), false, "/bin/sh".into(), args)
            }
            Way::Slirp => {
                let published = Published { host: free_port()?, port, protocol: "udp" };
                let api = log.with_extension("api");
                let launch = Launch::default();
                let process =
                    Some(launch.start(&program("slirp4netns")?, &slirp_args(scene, &api, false), &log)?);
                publish_by_slirp(&api, published)?;
                let address = Address::Tcp(published.host);
                return Ok(Running { address, inside: false, _service: None, process, log });
            }
            Way::Rootlessport => {
                let published = Published { host: free_port()?, port, protocol: "udp" };
                let script = rootlessport_script(scene, &log.with_extension("port"), published)?;
                let args = vec!["-c".into(), script];
                (None, Address::Tcp(published.host), false, "/bin/sh".into(), args)
            }
            Way::Unix | Way::Proxyd | Way::Haproxy => bail!("it relays no datagrams"),
        };
        let launch = Launch { inside: scene.inside(inside), socket, ..Launch::default() };
        let process = Some(launch.start(&path, &args, &log)?);
        // socat's clients are inside with it.
        let inside = self.way == Way::Socat;
        Ok(Running { address, inside, _service: None, process, log })
    }
}

/// A socket made outside.
fn passed() -> Result<(OwnedFd, Address)> {
    let socket = OwnedFd::from(UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?);
    let address = Address::Tcp(local_address(&socket)?);
    Ok((socket, address))
}

/// A port of the kernel's choice for those that cannot be given a socket.
fn free_port() -> Result<SocketAddr> {
    Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
