//! Which target the clients of each listener are connected to.

use bro_relay::listener::{Listener, SocketKind};
use bro_relay::target::Target;

use crate::cli::Forward;
use crate::exit::Failure;

/// The listeners with their targets.
#[derive(Debug)]
pub(super) struct Routes {
    /// Each listener with the index of its target.
    pub(super) listeners: Vec<(Listener, usize)>,
    /// The targets.
    pub(super) targets: Vec<Target>,
}

impl Routes {
    /// Pairs each listener with its target: the one named for it, else the positional one.
    pub(super) fn of(options: &Forward, listeners: Vec<Listener>) -> Result<Self, Failure> {
        for (index, (name, _)) in options.targets.iter().enumerate() {
            if options.targets[..index].iter().any(|(before, _)| before == name) {
                return Err(Failure::Usage(format!("--target {name}=… is given more than once")));
            }
            if !listeners.iter().any(|listener| listener.name == *name) {
                let names: Vec<&str> = listeners.iter().map(|listener| listener.name.as_str()).collect();
                let sentence = format!(
                    "--target {name}=… matches no socket; the sockets passed are named {}",
                    names.join(", ")
                );
                if !options.allow_missing_sockets {
                    return Err(Failure::Usage(sentence));
                }
                tracing::warn!("{sentence}");
            }
        }
        let mut targets: Vec<Target> = Vec::new();
        let mut routes = Vec::with_capacity(listeners.len());
        for listener in listeners {
            let named =
                options.targets.iter().find(|(name, _)| *name == listener.name).map(|(_, target)| target);
            let Some(target) = named.or(options.target.as_ref()) else {
                return Err(Failure::Usage(format!(
                    "the socket “{}” ({}) has no target; give TARGET, or --target {}=ADDR",
                    listener.name, listener.address, listener.name
                )));
            };
            let target = &of_its_kind(target, &listener)?;
            let index = targets.iter().position(|known| known == target).unwrap_or_else(|| {
                targets.push(target.clone());
                targets.len() - 1
            });
            routes.push((listener, index));
        }
        Ok(Self { listeners: routes, targets })
    }
}

/// The target as the kind of socket makes it: the same HOST:PORT means TCP for a socket of streams, and UDP for one of datagrams.
fn of_its_kind(target: &Target, listener: &Listener) -> Result<Target, Failure> {
    let socket = format!("the socket “{}” ({})", listener.name, listener.address);
    match (listener.kind, target) {
        (SocketKind::Datagram, Target::Tcp { host, port }) => {
            Ok(Target::Udp { host: host.clone(), port: *port })
        }
        (SocketKind::UnixDatagram, Target::Unix(_) | Target::Abstract(_)) => {
            Ok(Target::Datagrams(Box::new(target.clone())))
        }
        (SocketKind::UnixDatagram, _) => Err(Failure::Usage(format!(
            "{socket} takes datagrams over a unix socket, and its target {target} is none; give --target {}=/PATH",
            listener.name
        ))),
        (SocketKind::Datagram, Target::Unix(_) | Target::Abstract(_) | Target::Datagrams(_)) => {
            Err(Failure::Usage(format!(
                "{socket} takes UDP datagrams, and its target {target} is a unix socket; give --target {}=HOST:PORT",
                listener.name
            )))
        }
        (SocketKind::Stream, Target::Udp { .. }) => Err(Failure::Usage(format!(
            "{socket} takes streams, and its target {target} is a UDP port; leave /udp out, or use ListenDatagram= for it"
        ))),
        (SocketKind::SeqPacket, Target::Tcp { .. } | Target::Udp { .. }) => Err(Failure::Usage(format!(
            "{socket} takes messages (ListenSequentialPacket=), and its target {target} is no unix socket; give --target {}=/PATH",
            listener.name
        ))),
        _ => Ok(target.clone()),
    }
}
