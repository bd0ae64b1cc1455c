//! The same contenders with UDP sockets: those that can relay them.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::super::launch::{Launch, last_line};
use super::super::scene::Scene;
use super::super::stream::Address;
use super::{
    Contender, Running, Way, bro_args, connections_within_descriptors, local_address, nginx_user, program,
    stream_module,
};

/// How long the first answer may take.
const START: Duration = Duration::from_secs(20);

impl Contender {
    /// Whether it relays datagrams at all; of bro's relays, which are for streams, one stands for all.
    pub fn relays_datagrams(&self) -> bool {
        matches!(self.way, Way::Direct | Way::Socat | Way::Nginx) || self.key == "bro-auto"
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
            _ => bail!("it relays no datagrams"),
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
