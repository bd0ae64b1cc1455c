//! From the command line, the quadlet and what is activated already to what is wanted: checked, with its warnings.

use std::path::{Path, PathBuf};

use bro_relay::listener::SocketKind;
use bro_relay::target::Target;
use clap::ValueEnum;

use super::ports::PortPlan;
use super::{adopt, connects, executable, fence, ports};
use crate::address::ExternalSocket;
use crate::cli::{self, Activate};
use crate::exit::Failure;
use crate::installed::{
    ForwardOptions, Forwarder, Installed, InstalledPort, Mode, Takeover, Way, pause_unit_of,
};
use crate::paths;
use crate::podman::quadlet::{self, Quadlet, QuadletKind};
use crate::run_as::RunAsUser;
use crate::service::readiness::Ready;
use crate::systemd::calendar::DailySpans;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::time_span::TimeSpan;
use crate::units::DropIn;

/// How long a container stays up without a connection, by default.
const IDLE: &str = "5min";

/// An option's name, and its value on the command line.
pub(crate) type HandedOn = (&'static str, fn(&Activate) -> Option<String>);

/// Options that are handed on to `bro forward`, in the order in which they are written.
pub(crate) const HANDED_ON: [HandedOn; 36] = [
    ("ready", |options| options.ready.as_ref().map(Ready::to_string)),
    ("start-timeout", |options| options.start_timeout.map(written)),
    ("wake-on", |options| options.wake_on.map(|what| what.to_string())),
    ("wake-ignore", |options| (!options.wake_ignore.is_empty()).then(|| listed(&options.wake_ignore))),
    ("exit-idle-time", |options| options.exit_idle_time.map(written)),
    ("exit-idle-time-max", |options| options.exit_idle_time_max.map(written)),
    ("idle-by", |options| options.idle_by.map(word)),
    ("idle-ignore", |options| (!options.idle_ignore.is_empty()).then(|| listed(&options.idle_ignore))),
    ("idle-below", |options| options.idle_below.map(|rate| rate.to_string())),
    ("wakes-per-hour", |options| options.wakes_per_hour.map(|most| most.to_string())),
    ("freeze", |options| options.freeze.map(|yes| yes.to_string())),
    ("freeze-time", |options| options.freeze_time.map(written)),
    ("min-uptime", |options| options.min_uptime.map(written)),
    ("keep-awake", |options| {
        (!options.keep_awake.is_empty()).then(|| DailySpans::all(&options.keep_awake).to_string())
    }),
    ("busy-file", |options| options.busy_file.as_ref().map(|path| path.display().to_string())),
    ("busy-exec", |options| options.busy_exec.clone()),
    ("drain-timeout", |options| options.drain_timeout.map(written)),
    ("idle-timeout", |options| options.idle_timeout.map(written)),
    ("connections-max", |options| options.connections_max.map(|most| most.to_string())),
    ("connections-per-source", |options| options.connections_per_source.map(|most| most.to_string())),
    ("flows-max", |options| options.flows_max.map(|most| most.to_string())),
    ("flow-timeout", |options| options.flow_timeout.map(written)),
    ("icmp-port-unreachable", |options| options.icmp_port_unreachable.map(|yes| yes.to_string())),
    ("keepalive-time", |options| options.keepalive_time.map(written)),
    ("keepalive-interval", |options| options.keepalive_interval.map(written)),
    ("keepalive-probes", |options| options.keepalive_probes.map(|probes| probes.to_string())),
    ("user-timeout", |options| options.user_timeout.map(written)),
    ("unix-identity", |options| options.unix_identity.map(|identity| identity.to_string())),
    ("proxy-protocol", |options| options.proxy_protocol.map(word)),
    ("accept-proxy", |options| options.accept_proxy.map(|accept| accept.to_string())),
    ("trusted", |options| (!options.trusted.is_empty()).then(|| listed(&options.trusted))),
    ("relay", |options| options.relay.map(word)),
    ("source", |options| options.source.map(word)),
    ("local-clients", |options| options.local_clients.as_ref().map(ToString::to_string)),
    ("blocking-sockets", |options| options.blocking_sockets.map(|yes| yes.to_string())),
    ("metrics", |options| options.metrics.as_ref().map(ToString::to_string)),
];

/// What is wanted.
#[derive(Debug)]
pub(super) struct Wanted {
    pub service: Installed,
    pub quadlet: Quadlet,
    pub drop_in: DropIn,
    /// Podman's own dependency on the network is there.
    pub waits_for_network: bool,
    pub warnings: Vec<String>,
}

/// Where files go.
#[derive(Debug, Clone)]
pub(super) struct Paths {
    pub scope: RuntimeScope,
    pub units: PathBuf,
    pub root: Option<PathBuf>,
    /// The service manager knows RestartSteps=.
    pub has_steps: bool,
}

pub(super) fn usage(text: impl Into<String>) -> anyhow::Error {
    Failure::Usage(text.into()).into()
}

/// The quadlet, as it was found.
#[derive(Debug)]
pub(super) struct FoundQuadlet {
    pub quadlet: Quadlet,
    /// The pod that it is part of, if that is there: its network is the container's.
    pub pod: Option<Quadlet>,
}

/// Puts `Wanted` together.
pub(super) fn wanted(
    options: &Activate,
    found: &FoundQuadlet,
    installed: Option<&Installed>,
    run_as: Option<RunAsUser>,
    places: &Paths,
) -> anyhow::Result<Wanted> {
    let FoundQuadlet { quadlet, pod } = found;
    if let Some(Ready::Exec(command)) = &options.ready {
        crate::address::one_line(command).map_err(|reason| usage(format!("--ready=exec: {reason}")))?;
    }
    let way = takeover(options, quadlet, installed)?;
    let direct = way.is_some();
    if run_as.is_some() && direct {
        return Err(usage(
            "--run-as does not go with --direct: Podman passes on only the sockets of the manager that starts it, and that is the \
             user's, not the system's",
        ));
    }
    check_names(quadlet)?;
    super::preflight::check(quadlet, direct)?;
    let mut warnings = Vec::new();
    let network = Network::of(quadlet);
    let mode = match way {
        Some(way) => Mode::Direct(taken_over(way, options, quadlet, installed, places, &network)?),
        None => {
            let what = adopt::wanted(options, installed);
            let adopts = what.is_any();
            if options.trust_loopback && !adopts {
                return Err(usage(
                    "--trust-loopback is for --adopt: without it a service does not see this host's clients as 127.0.0.1",
                ));
            }
            if options.adopt_connect.is_some() && !adopts {
                return Err(usage(
                    "--adopt-connect is for --adopt: without it no process of the container has a socket of the host's",
                ));
            }
            let forwarder = forwarder(options, quadlet, installed, places, &network, adopts)?;
            if adopts {
                Mode::Adopt(adopt::adoption(
                    (what, forwarder),
                    options,
                    found,
                    installed,
                    run_as.as_ref(),
                    places,
                )?)
            } else {
                Mode::Forward(forwarder)
            }
        }
    };
    let mut wanted = Installed {
        run_as,
        listeners: PortPlan { options, quadlet, installed, places, network: &network, way }.listeners()?,
        made: installed.map(|installed| installed.made.clone()).unwrap_or_default(),
        ..Installed::new(
            &*quadlet.name,
            places.scope,
            paths::unrooted(&quadlet.path, places.root.as_deref()),
            quadlet.unit.clone(),
            mode,
        )
    };
    if let Some(way) = way {
        check_direct(quadlet, way, &mut warnings)?;
        warnings.extend(ports::way_out(&wanted));
    }
    if wanted.option("accept-proxy") == Some("true") && wanted.option("trusted").is_none() {
        return Err(usage(
            "--accept-proxy needs --trusted: who may say in a header who the client is, such as --trusted=10.0.0.5",
        ));
    }
    check_local_clients(&wanted)?;
    check_unreachable(options, &wanted)?;
    check_ready(&wanted, quadlet, &mut warnings)?;
    check_freeze(&wanted, quadlet, &mut warnings)?;
    fence::plan(&mut wanted, places, &mut warnings)?;
    adopt::check_rest(&wanted, quadlet, &mut warnings)?;
    check_host_network(&wanted, &pod.as_ref().map_or_else(|| Network::of(quadlet), Network::of))?;
    let mut drop_in = drop_in(quadlet, &wanted, &network, places.root.as_deref());
    drop_in.runtime = connects::runtime(&wanted, found, network == Network::None, places, &mut warnings)?;
    if !drop_in.is_empty() {
        let directory = quadlet::drop_in_directory(
            quadlet,
            places.scope,
            wanted.run_as.as_ref(),
            places.root.as_deref(),
        )?;
        let file = match quadlet.name.split_once('@').filter(|_| quadlet.is_shared()) {
            // The directory belongs to the template, so each instance has a file of its own.
            Some((_, instance)) => format!("50-bro-activator-{instance}.conf"),
            None => "50-bro-activator.conf".to_owned(),
        };
        wanted.drop_in = Some(directory.join(file));
    }
    warn_of_ports(quadlet, &wanted, &mut warnings);
    warn_of_install(quadlet, &mut warnings);
    if let Some(pod) = quadlet.value("Pod").filter(|_| quadlet.kind == QuadletKind::Container) {
        warnings.push(format!(
            "{} is part of {pod}: {} alone is woken and stopped with its clients; to wake and stop the whole pod, activate {pod}",
            quadlet.file_name(),
            quadlet.unit
        ));
    }
    let own_word = quadlet.file.boolean("Quadlet", "DefaultDependencies");
    let waits_for_network =
        wanted.unit_scope() == RuntimeScope::User && !drop_in.no_network && own_word != Some(false);
    Ok(Wanted { service: wanted, quadlet: quadlet.clone(), drop_in, waits_for_network, warnings })
}

/// How the container takes its sockets over, if it does; what is installed keeps its mode.
fn takeover(
    options: &Activate,
    quadlet: &Quadlet,
    installed: Option<&Installed>,
) -> anyhow::Result<Option<Way>> {
    let before = match installed {
        None => None,
        Some(Installed { name, mode: Mode::Forward(_) | Mode::Adopt(_), .. }) => {
            if options.direct.is_some() {
                return Err(usage(format!(
                    "{name} is activated with a forwarder; to change that, run `bro activate {name} --remove` first"
                )));
            }
            return Ok(None);
        }
        Some(Installed { name, mode: Mode::Direct(takeover), .. }) => {
            let forwarders_own = !options.internal_port.is_empty()
                || options.container.is_some()
                || options.network.is_some()
                || options.adopt.is_some()
                || HANDED_ON.iter().any(|(_, said)| said(options).is_some());
            if options.direct.is_none() && forwarders_own {
                return Err(usage(format!(
                    "{name} is activated with --direct, where there is no forwarder that could do that; to change it, run `bro \
                     activate {name} --remove` first"
                )));
            }
            Some(takeover.way)
        }
    };
    Ok(match (options.direct, before) {
        (None, before) => before,
        (Some(cli::Direct::Nginx), _) => Some(Way::Nginx),
        (Some(cli::Direct::ListenFds), _) => Some(Way::ListenFds),
        (Some(cli::Direct::Auto), _) if quadlet.is_nginx() => Some(Way::Nginx),
        (Some(cli::Direct::Auto), _) => Some(Way::ListenFds),
    })
}

fn taken_over(
    way: Way,
    options: &Activate,
    quadlet: &Quadlet,
    installed: Option<&Installed>,
    places: &Paths,
    network: &Network,
) -> anyhow::Result<Takeover> {
    let before = installed.and_then(|installed| match &installed.mode {
        Mode::Direct(takeover) => takeover.pause_unit.as_ref(),
        Mode::Forward(_) | Mode::Adopt(_) => None,
    });
    let restricted = options.restrict_network || before.is_some();
    if restricted && *network != Network::None {
        return Err(usage(format!(
            "--restrict-network needs a container without a network; add Network=none to {}",
            quadlet.file_name()
        )));
    }
    let pause_unit = restricted.then(|| places.units.join(pause_unit_of(&quadlet.name)));
    Ok(Takeover { way, pause_unit })
}

fn forwarder(
    options: &Activate,
    quadlet: &Quadlet,
    installed: Option<&Installed>,
    places: &Paths,
    network: &Network,
    adopts: bool,
) -> anyhow::Result<Forwarder> {
    let before = installed.and_then(Installed::forwarder);
    let given = before.filter(|before| before.container_given);
    let container = match (&options.container, given) {
        (Some(given), _) => Some(given.clone()),
        (None, Some(before)) => before.container.clone(),
        (None, None) if *network == Network::Host => None,
        (None, None) => match &quadlet.container {
            Ok(name) => {
                let file = quadlet.file_name();
                Some(crate::address::container(name).map_err(|reason| usage(format!("{file}: {reason}")))?)
            }
            Err(reason) => return Err(usage(reason.clone())),
        },
    };
    if options.restrict_network {
        return Err(usage(
            "--restrict-network is for --direct: a forwarder makes its connections in the container's network, and is confined \
             without a word",
        ));
    }
    let checks_health = container.is_some()
        && quadlet.kind == QuadletKind::Container
        && quadlet.value("HealthCmd").is_some_and(|command| !["", "none"].contains(&command));
    Ok(Forwarder {
        service_file: places.units.join(format!("{}-activator.service", quadlet.name)),
        program: executable::path(places)?,
        container,
        container_given: options.container.is_some() || given.is_some(),
        options: handed_on(options, checks_health, adopts, before),
    })
}

/// The quadlet may say anything; its names have to fit into units.
fn check_names(quadlet: &Quadlet) -> anyhow::Result<()> {
    let name = &quadlet.name;
    if name.contains(':') {
        return Err(usage(format!(
            "“{name}” cannot be activated: its socket goes by that name, and no FileDescriptorName= may hold a colon; give the \
             quadlet another name"
        )));
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '@' | '\\');
    if quadlet.unit.chars().all(fits) {
        return Ok(());
    }
    let unit = quadlet.unit.escape_debug();
    Err(usage(format!("“{unit}”, of {}, cannot be the name of a unit", quadlet.file_name())))
}

fn word<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// As a person would write it: whole minutes as minutes.
fn written(span: TimeSpan) -> String {
    match span.finite().map(|span| (span.as_secs(), span.subsec_nanos())) {
        Some((seconds @ 1.., 0)) if seconds % 3600 == 0 => format!("{}h", seconds / 3600),
        Some((seconds @ 1.., 0)) if seconds % 60 == 0 => format!("{}min", seconds / 60),
        _ => span.to_string(),
    }
}

fn listed<T: ToString>(all: &[T]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn handed_on(
    options: &Activate,
    checks_health: bool,
    adopts: bool,
    installed: Option<&Forwarder>,
) -> ForwardOptions {
    let before = |name: &str| installed.and_then(|before| before.options.get(name)).map(str::to_owned);
    let value = |(name, said): &HandedOn| {
        let value = said(options).or_else(|| before(name));
        let value = match *name {
            "exit-idle-time" => value.or_else(|| Some(IDLE.to_owned())),
            // It accepts from listen(2) on; what an earlier run took from the quadlet is not what was asked for.
            "ready" if adopts => {
                said(options).or_else(|| before(name).filter(|way| !(checks_health && way == "healthy")))
            }
            // The quadlet says itself how to find out.
            "ready" if checks_health => {
                value.filter(|way| way != "auto").or_else(|| Some("healthy".to_owned()))
            }
            _ => value,
        };
        Some(((*name).to_owned(), value?))
    };
    HANDED_ON.iter().filter_map(value).collect()
}

/// The kind of network that the container has.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Network {
    /// `Network=none`.
    None,
    /// `Network=host`.
    Host,
    /// Anything else: names of networks without options, as written; empty for Podman's default.
    Others(Vec<String>),
}

impl Network {
    fn of(quadlet: &Quadlet) -> Self {
        let networks = quadlet.values("Network");
        match networks.as_slice() {
            ["none"] => Self::None,
            ["host"] => Self::Host,
            others => Self::Others(
                others
                    .iter()
                    .map(|network| network.split(':').next().unwrap_or_default().to_owned())
                    .collect(),
            ),
        }
    }

    /// The container's address on the network that `--network` names.
    pub(super) fn address(&self, name: &str, quadlet: &Quadlet) -> anyhow::Result<String> {
        let file = quadlet.file_name();
        let has = match self {
            Self::None => "none".to_owned(),
            Self::Host => "host".to_owned(),
            Self::Others(networks) if networks.is_empty() => match quadlet.value("Pod") {
                Some(pod) => format!("the network of {pod}, which it is part of"),
                None => "Podman's default network".to_owned(),
            },
            Self::Others(networks) => networks.join(" and "),
        };
        match (self, name) {
            (Self::None, "none") | (Self::Host, "host") => return Ok("127.0.0.1".to_owned()),
            (Self::Others(networks), name) => {
                let stem = |network: &str| network.strip_suffix(".network").unwrap_or(network).to_owned();
                if !networks.iter().any(|network| stem(network) == stem(name)) {
                    return Err(usage(format!("{file} is not on the network “{name}”: it has {has}")));
                }
            }
            _ => return Err(usage(format!("{file} is not on the network “{name}”: it has {has}"))),
        }
        let inline =
            quadlet.values("Network").into_iter().filter_map(|network| network.split_once(':')).find_map(
                |(network, options)| {
                    let same = network.strip_suffix(".network").unwrap_or(network)
                        == name.strip_suffix(".network").unwrap_or(name);
                    let mut options = options.split(',');
                    same.then(|| options.find_map(|option| option.strip_prefix("ip=")))?
                },
            );
        match inline.or_else(|| quadlet.value("IP")).or_else(|| quadlet.value("IP6")) {
            Some(ip) if ip.parse::<std::net::IpAddr>().is_ok() => Ok(ip.to_owned()),
            _ => Err(usage(format!(
                "the container's address on “{name}” differs from start to start; add IP= to {file}, or leave --network out \
                 if the service listens on every address of its container"
            ))),
        }
    }
}

fn check_direct(quadlet: &Quadlet, way: Way, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let file = quadlet.file_name();
    if quadlet.kind != QuadletKind::Container {
        return Err(usage(format!(
            "--direct is for a .container: Podman passes no sockets on to the containers of {file}"
        )));
    }
    if quadlet.is_shared() {
        let (prefix, instance) = quadlet.name.split_once('@').unwrap_or((&quadlet.name, ""));
        return Err(usage(format!(
            "--direct needs a drop-in for this instance alone, and {file} is shared by all; give it a file of its own: ln -s \
             {file} {prefix}@{instance}.container"
        )));
    }
    if quadlet.value("Notify") == Some("healthy") {
        warnings.push(format!(
            "Notify=healthy in {file}: the service listens on the passed socket and not inside the container, so a health check \
             that connects inside fails and the unit never becomes active"
        ));
    }
    if way == Way::Nginx {
        warnings.push(
            "nginx takes over only a socket of exactly the address that its configuration listens on, port included; with any \
             other it listens inside the container, where no client comes"
                .to_owned(),
        );
    }
    Ok(())
}

/// The forwarder would refuse to start.
fn check_local_clients(wanted: &Installed) -> anyhow::Result<()> {
    let asked = wanted.option("local-clients").is_some_and(|clients| clients != "off");
    if asked && matches!(wanted.option("relay"), Some("splice" | "copy")) {
        return Err(usage(
            "--local-clients is part of the kernel relay: use --relay=auto or sockmap with it",
        ));
    }
    Ok(())
}

/// Where clients can be told that a datagram was not received.
fn check_unreachable(options: &Activate, wanted: &Installed) -> anyhow::Result<()> {
    if options.icmp_port_unreachable == Some(true) && !wanted.has_udp() {
        return Err(usage(
            "--icmp-port-unreachable is for clients over UDP, and there is no port of theirs; give one, such as --external-port 53/udp",
        ));
    }
    if wanted.scope == RuntimeScope::User && wanted.option("icmp-port-unreachable") == Some("true") {
        return Err(usage(
            "--icmp-port-unreachable takes CAP_NET_RAW over this host's network, which no service of a user's manager can have; activate it for \
             the system (as root, with --system, or --run-as for a user's container)",
        ));
    }
    Ok(())
}

fn check_freeze(wanted: &Installed, quadlet: &Quadlet, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    if !wanted.forwarder().is_some_and(|forwarder| forwarder.options.freezes()) {
        return Ok(());
    }
    let file = quadlet.file_name();
    if quadlet.kind != QuadletKind::Container {
        return Err(usage(format!(
            "--freeze does not go with {file}: the unit's own processes would be frozen, and not those of its containers, which are \
             elsewhere"
        )));
    }
    if quadlet.value("HealthCmd").is_some_and(|command| !["", "none"].contains(&command)) {
        warnings.push(format!(
            "HealthCmd= in {file}: while the container is frozen its health checks hang and fail; see what HealthOnFailure= does then"
        ));
    }
    Ok(())
}

fn check_ready(wanted: &Installed, quadlet: &Quadlet, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let Some(forwarder) = wanted.forwarder() else { return Ok(()) };
    let ready = forwarder.options.ready();
    if let Some(way) = &ready {
        let mut targets = wanted.listeners.iter().flat_map(InstalledPort::targets);
        if let Some(refusal) = targets.find_map(|target| way.refusal(&target)) {
            return Err(usage(refusal));
        }
    }
    if ready != Some(Ready::Healthy) {
        return Ok(());
    }
    let file = quadlet.file_name();
    if forwarder.container.is_none() {
        return Err(usage(format!(
            "--ready=healthy needs --container, whose health check it is; {file} uses the host's network"
        )));
    }
    match quadlet.kind {
        QuadletKind::Pod if !forwarder.container_given => Err(usage(format!(
            "--ready=healthy follows a container's health check, and {file} has none; name one of its containers by --container"
        ))),
        QuadletKind::Container if quadlet.value("HealthCmd") == Some("none") => Err(usage(format!(
            "HealthCmd=none in {file}: there is no health check that --ready=healthy could follow"
        ))),
        QuadletKind::Container if quadlet.value("HealthCmd").is_none() => {
            warnings.push(format!(
                "{file} has no HealthCmd=: unless the image brings a health check, no client will ever be connected"
            ));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// With `Network=host` the service itself takes its port on the host.
fn check_host_network(wanted: &Installed, network: &Network) -> anyhow::Result<()> {
    if *network != Network::Host || wanted.forwarder().is_none() {
        return Ok(());
    }
    for listener in &wanted.listeners {
        let targets = listener.targets();
        let its_own = |socket: &ExternalSocket| {
            targets.iter().any(|target| match target {
                Target::Tcp { port, .. } => socket.is_at(SocketKind::Stream, *port),
                Target::Udp { port, .. } => socket.is_at(SocketKind::Datagram, *port),
                Target::Unix(_) | Target::Abstract(_) | Target::Datagrams(_) => false,
            })
        };
        if let Some(port) = listener.external.sockets().find(its_own).and_then(|socket| socket.place.port()) {
            return Err(usage(format!(
                "the container uses the host's network, so its service itself takes port {port}; give another --external-port, \
                 or another network to the container"
            )));
        }
    }
    Ok(())
}

fn drop_in(quadlet: &Quadlet, wanted: &Installed, network: &Network, root: Option<&Path>) -> DropIn {
    let own_word = quadlet.file.value("Quadlet", "DefaultDependencies").is_some();
    let no_network = quadlet.kind == QuadletKind::Container && *network == Network::None && !own_word;
    match &wanted.mode {
        Mode::Forward(_) => DropIn { no_network, ..DropIn::default() },
        Mode::Adopt(adoption) => {
            let profile = paths::unrooted(&adoption.profile, root);
            DropIn { no_network, profile: Some(profile), ..DropIn::default() }
        }
        Mode::Direct(takeover) => {
            let nginx = takeover.way == Way::Nginx;
            DropIn {
                no_network,
                sockets: wanted.listeners.iter().map(|listener| listener.socket.name.clone()).collect(),
                nginx,
                never_notifies: nginx && quadlet.value("Notify").is_some_and(|notify| notify != "healthy"),
                profile: None,
                runtime: None,
            }
        }
    }
}

fn warn_of_ports(quadlet: &Quadlet, wanted: &Installed, warnings: &mut Vec<String>) {
    let file = quadlet.file_name();
    for publish in quadlet.values("PublishPort") {
        let mut taken = wanted.listeners.iter().map(|listener| &listener.external);
        let clash = taken.find_map(|external| super::publish_port::clash(publish, external));
        warnings.push(match clash {
            Some(ports) => {
                format!("{}; remove that line", super::publish_port::sentence(publish, ports, quadlet))
            }
            None => format!(
                "PublishPort={publish} in {file} is a way in past bro: it wakes nothing, and who comes that way is cut off by the \
                 idle stop; remove that line unless it is meant"
            ),
        });
    }
}

fn warn_of_install(quadlet: &Quadlet, warnings: &mut Vec<String>) {
    for key in ["WantedBy", "RequiredBy", "UpheldBy"] {
        let targets = quadlet.file.words("Install", key);
        if !targets.is_empty() {
            warnings.push(format!(
                "{key}={} in {} starts {} without any client, and what bro has not started it does not stop; remove that line",
                targets.join(" "),
                quadlet.file_name(),
                quadlet.unit
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `bro forward` has only for units written, or commands run, by hand: `bro activate` decides these.
    const BY_HAND: [&str; 12] = [
        // What goes with it is a way of its own (`Mode::Adopt`).
        "adopt",
        "target",
        "targets",
        "allow-missing-sockets",
        "listen",
        "container",
        "pid",
        "netns",
        "unit",
        "user",
        "system",
        "verbose",
    ];

    #[test]
    fn every_option_of_the_forwarder_is_one_of_activate() {
        use clap::CommandFactory as _;
        let all = crate::cli::Cli::command();
        let names = |command: &str| -> Vec<String> {
            let command = all.find_subcommand(command).unwrap();
            command.get_arguments().map(|argument| argument.get_id().as_str().replace('_', "-")).collect()
        };
        let (forward, activate) = (names("forward"), names("activate"));
        let is_handed_on = |name: &String| HANDED_ON.iter().any(|(handed, _)| handed == name);
        let forgotten: Vec<&String> =
            forward.iter().filter(|name| !is_handed_on(name) && !BY_HAND.contains(&name.as_str())).collect();
        assert!(forgotten.is_empty(), "bro activate does not know of {forgotten:?}");
        let remove = all.find_subcommand("activate").unwrap();
        let removing = remove.get_arguments().find(|argument| argument.get_id() == "remove").unwrap();
        let conflicts: Vec<String> = remove
            .get_arg_conflicts_with(removing)
            .into_iter()
            .map(|argument| argument.get_id().as_str().replace('_', "-"))
            .collect();
        for (name, _) in HANDED_ON {
            let name = name.to_owned();
            assert!(forward.contains(&name) && activate.contains(&name), "{name} is no option of both");
            assert!(conflicts.contains(&name), "--remove takes {name} without a word");
        }
    }

    #[test]
    fn spans_are_written_as_they_are_read() {
        for span in ["5min", "1h", "90s", "infinity", "0ns", "1.5s", "250ms"] {
            assert_eq!(written(span.parse().unwrap()), span);
        }
    }
}
