//! The ports of a service: those that were there, with what the command line says of some of them.

use bro_relay::listener::SocketKind;
use bro_relay::target::Target;

use super::plan::{Network, Paths, usage};
use super::publish_port;
use crate::address::{External, Internal, NamedAddress, PortProtocol, Ports};
use crate::cli::Activate;
use crate::installed::{Installed, InstalledPort, Mode, SocketUnit, Way};
use crate::podman::quadlet::Quadlet;
use crate::targets::TargetRange;

/// The most sockets of a service: fewer than `bro forward` takes of systemd.
const MOST_SOCKETS: usize = 1000;

/// What ports are decided from.
pub(super) struct PortPlan<'a> {
    pub options: &'a Activate,
    pub quadlet: &'a Quadlet,
    pub installed: Option<&'a Installed>,
    pub places: &'a Paths,
    pub network: &'a Network,
    /// How the container takes its sockets over, if it does.
    pub way: Option<Way>,
}

/// What the command line says of one port.
struct PortWish<'a> {
    service: &'a str,
    external: Option<&'a External>,
    internal: Option<&'a Internal>,
}

impl PortPlan<'_> {
    /// All ports, the first one first.
    pub fn listeners(&self) -> anyhow::Result<Vec<InstalledPort>> {
        let name = &self.quadlet.name;
        let mut listeners = self.installed.map(|installed| installed.listeners.clone()).unwrap_or_default();
        let wishes = self.wishes()?;
        if self.installed.is_none() && wishes.iter().all(|wish| wish.service != *name) {
            let service = wishes.first().map_or("", |wish| wish.service);
            return Err(usage(format!(
                "{name} is not activated yet; do that first, without --service-name, and then add “{service}”"
            )));
        }
        for wish in &wishes {
            let before = listeners.iter().position(|listener| listener.service == *wish.service);
            let listener = self.listener(wish, before.map(|at| &listeners[at]))?;
            match before {
                Some(at) => listeners[at] = listener,
                None => listeners.push(listener),
            }
        }
        // Of two that are new, the later one is to move.
        for wish in wishes.iter().rev() {
            check_apart(wish.service, &listeners)?;
        }
        check_number(&listeners)?;
        // In the order in which they are read back.
        listeners.sort_by_key(|listener| (listener.service != *name, listener.service.clone()));
        Ok(listeners)
    }

    /// Of each port that the command line is about, what it says.
    fn wishes(&self) -> anyhow::Result<Vec<PortWish<'_>>> {
        let Activate { external_port, internal_port, service_name, .. } = self.options;
        let unnamed = service_name.as_deref().unwrap_or(&self.quadlet.name);
        let mut wishes: Vec<PortWish<'_>> = Vec::new();
        let is_about_one = external_port.is_empty() && internal_port.is_empty() || service_name.is_some();
        let named = names(external_port).chain(names(internal_port)).map(|name| name.unwrap_or(unnamed));
        for service in is_about_one.then_some(unnamed).into_iter().chain(named) {
            if wishes.iter().all(|wish| wish.service != service) {
                let external = one_of(external_port, service, unnamed, "--external-port")?;
                let internal = one_of(internal_port, service, unnamed, "--internal-port")?;
                wishes.push(PortWish { service, external, internal });
            }
        }
        Ok(wishes)
    }

    fn listener(&self, wish: &PortWish<'_>, before: Option<&InstalledPort>) -> anyhow::Result<InstalledPort> {
        let (options, name, service) = (self.options, &self.quadlet.name, wish.service);
        let external = match (wish.external, before) {
            (Some(external), _) => external.clone(),
            (None, Some(before)) => before.external.clone(),
            (None, None) if service == *name => {
                return Err(usage("say where clients are to connect: --external-port [ADDR:]PORT"));
            }
            (None, None) => {
                return Err(usage(format!(
                    "say where clients of “{service}” are to connect: --external-port {service}=[ADDR:]PORT"
                )));
            }
        };
        let external = match external {
            // nginx's `listen 80;` is IPv4 only, and nginx takes over only a socket of exactly its address.
            External::Ports(ports) if self.way == Some(Way::Nginx) => {
                External::At(std::net::Ipv4Addr::UNSPECIFIED.into(), ports)
            }
            external => external,
        };
        let internal = match self.way {
            Some(_) => None,
            None => Some(self.internal(wish, before, &external)?),
        };
        let stem = self.quadlet.unit.strip_suffix(".service").unwrap_or(&self.quadlet.unit);
        let socket = match (self.way.is_some(), service == *name) {
            (false, true) => format!("{name}-activator.socket"),
            (false, false) => format!("{name}-{service}-activator.socket"),
            (true, true) => format!("{stem}.socket"),
            (true, false) => format!("{stem}-{service}.socket"),
        };
        let device = options.bind_to_device.clone();
        let listener = InstalledPort {
            service: service.to_owned(),
            socket: SocketUnit::new(socket, &self.places.units),
            internal,
            backlog: options.backlog.or_else(|| before.and_then(|before| before.backlog)),
            device: device.or_else(|| before.and_then(|before| before.device.clone())),
            // Decided for all of them at once.
            fence: None,
            external,
        };
        self.check_device(&listener)?;
        Ok(listener)
    }

    fn check_device(&self, listener: &InstalledPort) -> anyhow::Result<()> {
        let (name, external) = (&self.quadlet.name, &listener.external);
        let Some(device) = listener.device.as_ref().filter(|_| external.ports().is_none()) else {
            return Ok(());
        };
        Err(usage(if self.options.bind_to_device.is_some() {
            format!("{external} is on no network interface: leave --bind-to-device {device} out")
        } else {
            format!(
                "“{}” is bound to the network interface {device}, where {external} cannot be: remove that port or all of {name} \
                 first (--remove)",
                listener.service
            )
        }))
    }

    /// Where the service listens for the clients of an external address.
    fn internal(
        &self,
        wish: &PortWish<'_>,
        before: Option<&InstalledPort>,
        external: &External,
    ) -> anyhow::Result<TargetRange> {
        let host = match &self.options.network {
            Some(name) => Some(self.network.address(name, self.quadlet)?),
            None => None,
        };
        let at = |said: Option<&str>, port: u16| {
            let host = said.or(host.as_deref()).unwrap_or("127.0.0.1");
            at_ports(external, host, port)
        };
        let before = before.and_then(|before| before.internal.as_ref());
        let targets = match (wish.internal, before.map(TargetRange::first)) {
            (Some(Internal::Unix(target)), _) => TargetRange::one(target.clone()),
            (Some(Internal::Ports { host: said, ports, says_protocol }), _) => {
                check_ports(external, *ports, *says_protocol)?;
                at(said.as_deref(), ports.first)?
            }
            (None, Some(Target::Tcp { host: said, port } | Target::Udp { host: said, port })) => {
                at(Some(host.as_deref().unwrap_or(said)), *port)?
            }
            (None, Some(unix)) => TargetRange::one(unix.clone()),
            (None, None) => match external.ports() {
                Some(ports) => {
                    let behind = publish_port::behind(self.quadlet, external);
                    at(None, behind.unwrap_or(ports.first))?
                }
                None => {
                    return Err(usage(format!(
                        "clients connect to {external}, so say where the service listens: --internal-port [ADDR:]PORT or /PATH"
                    )));
                }
            },
        };
        check_kinds(external, targets)
    }
}

/// The names in front of values.
fn names<T>(all: &[NamedAddress<T>]) -> impl Iterator<Item = Option<&str>> {
    all.iter().map(|named| named.name.as_deref())
}

/// The only value of a port; one without a name is of the port `unnamed`.
fn one_of<'a, T: std::fmt::Debug>(
    all: &'a [NamedAddress<T>],
    service: &str,
    unnamed: &str,
    option: &str,
) -> anyhow::Result<Option<&'a T>> {
    let mut those = all.iter().filter(|named| named.name.as_deref().unwrap_or(unnamed) == service);
    let first = those.next().map(|named| &named.value);
    if those.next().is_some() {
        return Err(usage(format!(
            "{option} is given twice for “{service}”; give every port after the first a name of its own: {option} NAME=…"
        )));
    }
    Ok(first)
}

/// As many ports from this one on as the external address has.
fn at_ports(external: &External, host: &str, port: u16) -> anyhow::Result<TargetRange> {
    let host = host.to_owned();
    let ports = external.ports();
    let first = match ports.map(|ports| ports.protocol) {
        Some(PortProtocol::Udp) => Target::Udp { host, port },
        // Of both, the forwarder makes the one that a socket needs.
        Some(PortProtocol::Tcp | PortProtocol::Both) | None => Target::Tcp { host, port },
    };
    let beyond = ports.map_or(0, Ports::beyond_first);
    TargetRange::range(first, beyond).ok_or_else(|| {
        usage(format!(
            "{external} are {} ports, and from {port} on there are fewer inside: give a lower --internal-port",
            u32::from(beyond) + 1
        ))
    })
}

/// Does what is said of the ports inside fit those outside?
fn check_ports(external: &External, ports: Ports, says_protocol: bool) -> anyhow::Result<()> {
    let outside = external.ports();
    if says_protocol && outside.is_some_and(|outside| outside.protocol != ports.protocol) {
        return Err(usage(format!(
            "clients come to {external}, and --internal-port {ports} is of another protocol; it is the same inside, so leave that out"
        )));
    }
    let (there, here) = (outside.map_or(0, Ports::beyond_first), ports.beyond_first());
    if here > 0 && here != there {
        return Err(usage(format!(
            "--internal-port {ports} has {} ports, and {external} has {}: give the first one alone, and as many are meant",
            u32::from(here) + 1,
            u32::from(there) + 1
        )));
    }
    Ok(())
}

/// Refuses a target that the forwarder would refuse for sockets of that kind.
fn check_kinds(external: &External, targets: TargetRange) -> anyhow::Result<TargetRange> {
    let is_unix = matches!(targets.first(), Target::Unix(_) | Target::Abstract(_));
    if external.is_udp() && is_unix {
        return Err(usage(format!(
            "clients send datagrams over UDP to {external}, and {targets} is a unix socket: give --internal-port [ADDR:]PORT"
        )));
    }
    let takes_messages = external
        .sockets()
        .any(|socket| matches!(socket.kind, SocketKind::SeqPacket | SocketKind::UnixDatagram));
    if takes_messages && !is_unix {
        return Err(usage(format!(
            "clients send messages to {external}, which only a unix socket passes on as they are: give --internal-port /PATH"
        )));
    }
    Ok(targets)
}

/// No other port has a socket in common with this one.
fn check_apart(service: &str, listeners: &[InstalledPort]) -> anyhow::Result<()> {
    let (those, others): (Vec<_>, Vec<_>) =
        listeners.iter().partition(|listener| listener.service == service);
    let same =
        |one: &InstalledPort, other: &InstalledPort| match (one.external.ports(), other.external.ports()) {
            (Some(ports), Some(those)) => ports.overlap(those) && one.external.ip() == other.external.ip(),
            _ => one.external == other.external,
        };
    match others.into_iter().find(|other| those.iter().any(|one| same(one, other))) {
        None => Ok(()),
        Some(other) => Err(usage(format!(
            "{} is the address of “{}” already; give “{service}” another --external-port",
            other.external, other.service
        ))),
    }
}

/// The forwarder takes them all.
fn check_number(listeners: &[InstalledPort]) -> anyhow::Result<()> {
    let all: usize = listeners.iter().map(|listener| listener.external.sockets().count()).sum();
    if all > MOST_SOCKETS {
        return Err(usage(format!(
            "these are {all} sockets in all, and {MOST_SOCKETS} are the most of one service: take fewer ports"
        )));
    }
    Ok(())
}

/// What a container gets with a socket for datagrams, unlike with one that listens.
pub(super) fn way_out(wanted: &Installed) -> Option<String> {
    let Mode::Direct(_) = wanted.mode else { return None };
    let datagrams = wanted.listeners.iter().find(|listener| listener.external.is_udp())?;
    Some(format!(
        "{} is a socket of this host's network: what is in the container can send datagrams from it to every address that the host \
         reaches, its own loopback interface included, whatever the container's network is",
        datagrams.external
    ))
}
