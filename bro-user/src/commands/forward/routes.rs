//! Which target the clients of each listener are connected to.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsRawFd as _;

use bro_relay::listener::{Listener, SocketKind};
use bro_relay::target::Target;
use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrStorage, getsockname};

use crate::cli::Forward;
use crate::exit::Failure;
use crate::targets;

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
        let numbers = numbers(options, &listeners)?;
        for (listener, number) in listeners.into_iter().zip(numbers) {
            let named = options.targets.iter().find(|(name, _)| *name == listener.name);
            let named = named.map(|(_, targets)| targets.nth(number));
            let Some(target) = named.or_else(|| options.target.clone()) else {
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

/// Which port each listener has among those of its name, from the lowest on: the target's port is as far from the first one of a range.
fn numbers(options: &Forward, listeners: &[Listener]) -> Result<Vec<u16>, Failure> {
    let ports: Vec<Option<u16>> = listeners.iter().map(port).collect();
    let all_of = |name: &str| -> BTreeSet<u16> {
        let of_name = listeners.iter().zip(&ports).filter(|(listener, _)| listener.name == name);
        of_name.filter_map(|(_, port)| *port).collect()
    };
    let mut of_ranges: HashMap<&str, BTreeSet<u16>> = HashMap::new();
    for (name, targets) in &options.targets {
        let Some(wanted) = targets.ports() else { continue };
        let there = all_of(name);
        // None at all is a socket that was not passed, of which is told elsewhere.
        if there.len() != wanted && listeners.iter().any(|listener| listener.name == *name) {
            return Err(Failure::Usage(format!(
                "--target {name}={targets} has {wanted} ports, and the sockets named {name} have {}; give as many, or one target for all",
                there.len()
            )));
        }
        of_ranges.insert(name, there);
    }
    let number = |(listener, port): (&Listener, &Option<u16>)| {
        let before = of_ranges.get(listener.name.as_str()).zip(*port);
        let before = before.map_or(0, |(all, port)| all.range(..port).count());
        u16::try_from(before).unwrap_or(u16::MAX)
    };
    Ok(listeners.iter().zip(&ports).map(number).collect())
}

/// The port of an IP socket.
fn port(listener: &Listener) -> Option<u16> {
    let address: SockaddrStorage = getsockname(listener.socket.as_raw_fd()).ok()?;
    let v4 = address.as_sockaddr_in().map(SockaddrIn::port);
    v4.or_else(|| address.as_sockaddr_in6().map(SockaddrIn6::port))
}

/// The target as the kind of socket makes it, where it can be that socket's.
fn of_its_kind(target: Target, listener: &Listener) -> Result<Target, Failure> {
    let socket = format!("the socket “{}” ({})", listener.name, listener.address);
    match (listener.kind, &target) {
        (SocketKind::UnixDatagram, Target::Tcp { .. } | Target::Udp { .. }) => Err(Failure::Usage(format!(
            "{socket} takes datagrams over a unix socket, and its target {target} is none; give --target {}=/PATH",
            listener.name
        ))),
        (SocketKind::Datagram, Target::Unix(_) | Target::Abstract(_) | Target::Datagrams(_)) => {
            Err(Failure::Usage(format!(
                "{socket} takes UDP datagrams, and its target {target} is a unix socket; give --target {}=HOST:PORT",
                listener.name
            )))
        }
        (SocketKind::Stream | SocketKind::Vsock, Target::Udp { .. }) => Err(Failure::Usage(format!(
            "{socket} takes streams, and its target {target} is a UDP port; leave /udp out, or use ListenDatagram= for it"
        ))),
        (SocketKind::SeqPacket, Target::Tcp { .. } | Target::Udp { .. }) => Err(Failure::Usage(format!(
            "{socket} takes messages (ListenSequentialPacket=), and its target {target} is no unix socket; give --target {}=/PATH",
            listener.name
        ))),
        _ => Ok(targets::of_kind(listener.kind, target)),
    }
}
