//! The command line of `bro activate`.

use std::path::PathBuf;

use bro_relay::netns::identity::Identity;
use bro_relay::proxy_protocol::Trusted;
use clap::{Args, ValueEnum};

use super::idle::{IdleBy, WakeOn};
use super::{LocalClients, ProxyVersion, RelayChoice};
use crate::address::{External, Internal, NamedAddress};
use crate::adopt::Adopt;
use crate::installed::Connects;
use crate::service::readiness::Ready;
use crate::service::sources::Choice;
use crate::systemd::calendar::DailySpans;
use crate::systemd::time_span::TimeSpan;
use bro_relay::rate::Rate;

pub(super) const EXAMPLES: &str = "\
Examples:
  A rootless quadlet ~/.config/containers/systemd/web.container, whose service listens on port 80 inside:
    bro activate web --external-port 127.0.0.1:8080 --internal-port 80

  What would it write? And away with it again, the quadlet stays as it is:
    bro activate web --external-port 8080 --dry-run
    bro activate web --remove

  A second port of the same container, through the same forwarder:
    bro activate web --service-name metrics --external-port 9100
    bro activate web --service-name metrics --remove

  A name server, over UDP and TCP; and two ports at once, the second one called metrics:
    bro activate dns --external-port 53/tcp+udp
    bro activate web --external-port 443/tcp+udp --external-port metrics=127.0.0.1:9100

  nginx takes the socket over itself: no forwarder, no idle stop, the client's own address:
    bro activate web --direct --external-port 0.0.0.0:8080

  A service that knows nothing of it accepts at systemd's socket itself, is woken and stopped, and sees its clients' own addresses:
    bro activate web --adopt --external-port 0.0.0.0:8080 --internal-port 80

  Port 80 for a rootless container of the user “test”, as root; no sysctl, and nothing of it runs as root:
    bro activate web --system --run-as test --external-port 80

An option that is left out stays as an earlier run set it. Files that bro activate did not write are never overwritten.
NAME is looked for where Podman looks (podman-systemd.unit(5)): NAME.container, NAME.pod, NAME.kube, or an instance
NAME@INSTANCE of a template NAME@.container. Interrupted (Ctrl-C, SIGTERM, SIGHUP), it puts back what it has begun.

Exit status: 0 done, or nothing to do; 1 failed; 2 wrong usage; 4 quadlet not found; 5 not permitted. Whatever the
failure, no file and no unit is changed.";

/// `bro activate`.
#[derive(Debug, Args)]
pub struct Activate {
    /// The quadlet: web, web.container, app.pod, app.kube, or web@blue for an instance of a template
    #[arg(value_name = "NAME")]
    pub name: String,

    /// Where clients connect: PORT (of every address, IPv4 and IPv6), ADDR:PORT, a /unix/path, an @abstract name or vsock::PORT (repeatable)
    ///
    /// systemd listens there from now on, also after a reboot. Prefer an address to a bare port where not the whole network
    /// is meant: 127.0.0.1:8080. A port is of TCP; 53/udp is one of UDP, and 443/tcp+udp is both (HTTP/3). 30000-30009/udp is a range, of 256
    /// ports at most: each goes to the same port inside, or to one of as many from --internal-port on. seqpacket:/unix/path has clients that
    /// send messages (ListenSequentialPacket=), dgram:/unix/path datagrams. vsock:CID:PORT is one context identifier's alone. NAME= in front
    /// names a further port, as --service-name does: several can be given at once.
    #[arg(long, value_name = "[NAME=][ADDR:]PORT")]
    pub external_port: Vec<NamedAddress<External>>,

    /// Where the service listens inside the container (default: 127.0.0.1, and the port behind it in PublishPort=, or the same port; repeatable)
    ///
    /// TCP or UDP is as outside. Of a range of external ports, the first one inside. NAME= in front as in --external-port.
    #[arg(long, value_name = "[NAME=][ADDR:]PORT", conflicts_with = "direct")]
    pub internal_port: Vec<NamedAddress<Internal>>,

    /// A name for this port, to give one container several: one forwarder serves them all
    #[arg(long, value_name = "SERVICE", value_parser = crate::address::service_name)]
    pub service_name: Option<String>,

    /// No forwarder: hand the socket to the container's own program (auto, nginx or listen-fds)
    ///
    /// Podman passes the sockets of the container's unit on (LISTEN_FDS). The program must be made for that: then clients
    /// reach it without anything in between, with their own addresses, also with Network=none. nginx can, by way of the
    /// variable NGINX, which is set for it (auto looks for “nginx” in Image= and Exec=; give --direct=nginx where neither says
    /// so). Nothing stops the container when it is idle, and bro's own options do not apply.
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    pub direct: Option<Direct>,

    /// The service, as it is, accepts its clients at systemd's socket itself: each with its own address, and nothing in between (on, or off)
    ///
    /// As the container starts, its listen(2) is reported to the forwarder (by a seccomp profile, which is written and named in the quadlet's drop-in),
    /// and the forwarder puts systemd's socket in the place of the service's own. Until then, and where a socket does not fit, clients are forwarded as
    /// without this option. Needs a .container that is not on the host's network, Podman 5.0 with crun 0.19 or runc 1.1, Linux 5.14 and systemd 254.
    /// A service that listens on IPv4 only is adopted at an IPv4 address only: --external-port 0.0.0.0:8080. `on` is for sockets of TCP and unix sockets. With
    /// `udp` the service has its sockets for UDP datagrams from its bind(2) on, and with `all` both; what is not named is forwarded. A container that has a
    /// socket of UDP sends from it to whatever this host reaches, and no fence holds that.
    #[arg(long, value_name = "on|udp|all|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", conflicts_with = "direct")]
    pub adopt: Option<Adopt>,

    /// With --adopt: the service sees this host's clients as 127.0.0.1, also where its image is known to trust that address
    ///
    /// A system's socket unit shows them to the service by 169.254.1.2 or fd62:726f::2 otherwise, as a forwarder does.
    #[arg(long, conflicts_with = "direct")]
    pub trust_loopback: bool,

    /// With --adopt: to where the container's processes may connect: any, none, never or PORT,... over TCP
    ///
    /// They have sockets of the host's network, which they could lead to whatever listens on the host. “none” and ports hold for TCP, of every
    /// network: the container is started by a runtime that bro restricts by Landlock (Linux 6.7), and connects to unix sockets as before. “never” refuses
    /// connect(2) altogether, by the seccomp profile, on any kernel. Default: “any”, where a fence of root's stands around the sockets of a system's unit, or the
    /// container has a network; else, for a user's container with Network=none and no pod, the ports that its service listens at.
    #[arg(long, value_name = "WHERE", conflicts_with = "direct")]
    pub adopt_connect: Option<Connects>,

    /// With --direct and Network=none: neither the container nor Podman, which starts it, can make a socket of the network
    ///
    /// The passed socket is the only way in, and there is none out. The image has to be there already. Stays until --remove.
    /// (RestrictAddressFamilies=AF_UNIX AF_NETLINK and NoNewPrivileges=, with a unit that makes the container's network namespace
    /// before, and for a user Podman's user namespace. That takes `unshare` and `ip`.)
    #[arg(long)]
    pub restrict_network: bool,

    /// The network of the quadlet that the service is reached through: none, host, NAME or NAME.network
    ///
    /// Needed only for a service that does not listen on 127.0.0.1 of its container: the target is then the container's
    /// address on that network (IP= of the quadlet).
    #[arg(long, value_name = "NETWORK", conflicts_with = "direct", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub network: Option<String>,

    /// The container whose network namespace the service is in (default: the quadlet's own; needed for a .kube)
    #[arg(long, value_name = "CONTAINER", conflicts_with = "direct", value_parser = crate::address::container)]
    pub container: Option<String>,

    /// Listen on this network interface only (BindToDevice=); not for a unix socket
    #[arg(long, value_name = "INTERFACE", value_parser = crate::address::device)]
    pub bind_to_device: Option<String>,

    /// How many clients may wait to be accepted (Backlog=; default: systemd's, which is the kernel's limit)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub backlog: Option<u32>,

    /// Stop forwarder and container after SPAN without a connection, or infinity (default: 5min)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::limit)]
    pub exit_idle_time: Option<TimeSpan>,

    /// How far that grows while the same clients wake the container again and again (default: 1h, as in bro forward)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct")]
    pub exit_idle_time_max: Option<TimeSpan>,

    /// What counts as idle: no open connection, or no byte on any (as in bro forward)
    #[arg(long, value_name = "connections|bytes", conflicts_with = "direct")]
    pub idle_by: Option<IdleBy>,

    /// Whose connections keep nothing awake: addresses, networks, unix or vsock (repeatable, as in bro forward)
    #[arg(long, value_name = "CIDR|unix|vsock", value_delimiter = ',', conflicts_with = "direct")]
    pub idle_ignore: Vec<Trusted>,

    /// A connection on which less moves than BYTES within TIME keeps nothing awake: 1K/1min (as in bro forward)
    #[arg(long, value_name = "BYTES/TIME", value_parser = crate::rate::rate, conflicts_with = "direct")]
    pub idle_below: Option<Rate>,

    /// What wakes the container: a connection, its first byte (data), or its first BYTES (data:BYTES; as in bro forward)
    #[arg(long, value_name = "connect|data[:BYTES]", conflicts_with = "direct")]
    pub wake_on: Option<WakeOn>,

    /// Whose connections do not wake the container: addresses, networks, unix or vsock (repeatable, as in bro forward)
    #[arg(long, value_name = "CIDR|unix|vsock", value_delimiter = ',', conflicts_with = "direct")]
    pub wake_ignore: Vec<Trusted>,

    /// How often clients may have the container started within any 60 minutes (as in bro forward)
    #[arg(long, value_name = "N", conflicts_with = "direct", value_parser = clap::value_parser!(u32).range(1..=i64::from(crate::service::wakes::MOST_PER_HOUR)))]
    pub wakes_per_hour: Option<u32>,

    /// Freeze the container when it is idle, instead of stopping it; its next client has it go on at once (as in bro forward)
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_missing_value = "true", conflicts_with = "direct")]
    pub freeze: Option<bool>,

    /// With --freeze: stop the container after it has been frozen for SPAN (default: 1h)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::limit)]
    pub freeze_time: Option<TimeSpan>,

    /// Let the container run for SPAN at least once it was woken
    #[arg(long, value_name = "SPAN", conflicts_with = "direct")]
    pub min_uptime: Option<TimeSpan>,

    /// Awake without clients at these times: Mon..Fri 09:00..18:00, or never (repeatable, as in bro forward; a timer starts the forwarder)
    #[arg(long, value_name = "TIMES", conflicts_with = "direct")]
    pub keep_awake: Vec<DailySpans>,

    /// Do not stop the container while this file exists
    #[arg(long, value_name = "PATH", conflicts_with = "direct", value_parser = crate::address::absolute)]
    pub busy_file: Option<PathBuf>,

    /// Do not stop the container while this shell command exits with 0
    #[arg(long, value_name = "CMD", conflicts_with = "direct", value_parser = crate::address::one_line)]
    pub busy_exec: Option<String>,

    /// When the first client may be connected, as in bro forward (default: healthy where the quadlet has a HealthCmd=, else auto)
    #[arg(long, value_name = "HOW", conflicts_with = "direct")]
    pub ready: Option<Ready>,

    /// How long clients are held while the container starts (default: 90s)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::limit)]
    pub start_timeout: Option<TimeSpan>,

    /// On SIGTERM, how long connections may take to finish (default: 30s)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct")]
    pub drain_timeout: Option<TimeSpan>,

    /// Abort a connection after SPAN without a byte in either direction (default: infinity)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::limit)]
    pub idle_timeout: Option<TimeSpan>,

    /// How many connections at once; further clients wait (default: as many as the limit on descriptors allows)
    #[arg(long, value_name = "N", conflicts_with = "direct", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections_max: Option<u32>,

    /// How many connections at once from one source; further ones are reset (as in bro forward)
    #[arg(long, value_name = "N", conflicts_with = "direct", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections_per_source: Option<u32>,

    /// How many clients' datagrams at once are told apart (default: 4096, as in bro forward)
    #[arg(long, value_name = "N", conflicts_with = "direct", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub flows_max: Option<u32>,

    /// End a client's flow of datagrams after SPAN without one in either direction (default: 60s)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::limit)]
    pub flow_timeout: Option<TimeSpan>,

    /// Tell a client over UDP by ICMP that its datagram was not received (as in bro forward; for the system, since it takes CAP_NET_RAW)
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_missing_value = "true", conflicts_with = "direct")]
    pub icmp_port_unreachable: Option<bool>,

    /// TCP keepalive on both legs: time without traffic before the first probe (default: 60s)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::keepalive)]
    pub keepalive_time: Option<TimeSpan>,

    /// TCP keepalive on both legs: time between probes (default: 10s)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::keepalive)]
    pub keepalive_interval: Option<TimeSpan>,

    /// TCP keepalive on both legs: unanswered probes before an abort (default: 6)
    #[arg(long, value_name = "N", conflicts_with = "direct", value_parser = clap::value_parser!(u32).range(1..=127))]
    pub keepalive_probes: Option<u32>,

    /// Abort a connection of which a side has acknowledged nothing of what was sent to it for SPAN, or infinity (default: 3min)
    #[arg(long, value_name = "SPAN", conflicts_with = "direct", value_parser = crate::systemd::time_span::user_timeout)]
    pub user_timeout: Option<TimeSpan>,

    /// As which user a service's unix socket is connected to: unused, forwarder or UID or UID:GID (as in bro forward)
    #[arg(long, value_name = "WHO", conflicts_with = "direct")]
    pub unix_identity: Option<Identity>,

    /// Tell the service who its client is, by a PROXY protocol header: v1 or v2 (as in bro forward)
    #[arg(long, value_name = "v1|v2", conflicts_with = "direct")]
    pub proxy_protocol: Option<ProxyVersion>,

    /// Take the client's address from the PROXY protocol header of a --trusted balancer in front (as in bro forward)
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_missing_value = "true", conflicts_with = "direct")]
    pub accept_proxy: Option<bool>,

    /// With --accept-proxy: whose headers are believed, addresses, networks, unix or vsock (repeatable, as in bro forward)
    #[arg(long, value_name = "CIDR|unix|vsock", value_delimiter = ',', conflicts_with = "direct")]
    pub trusted: Vec<Trusted>,

    /// How bytes are moved: auto, sockmap, splice or copy
    #[arg(long, value_name = "HOW", conflicts_with = "direct")]
    pub relay: Option<RelayChoice>,

    /// From which address the service sees its clients: auto, client, container or loopback (as in bro forward)
    #[arg(long, value_name = "WHICH", conflicts_with = "direct")]
    pub source: Option<Choice>,

    /// Let what clients on this host send take a kernel lane too: off, on, or a cgroup's path (as in bro forward)
    #[arg(long, value_name = "off|on|CGROUP", conflicts_with = "direct")]
    pub local_clients: Option<LocalClients>,

    /// Let sockets in blocking mode take the kernel lanes too (as in bro forward)
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_missing_value = "true", conflicts_with = "direct")]
    pub blocking_sockets: Option<bool>,

    /// The forwarder answers GET /metrics there, while it runs: ADDR:PORT, a PORT of 127.0.0.1, or a unix socket's path (as in bro forward)
    #[arg(long, value_name = "ADDR:PORT|PATH", conflicts_with = "direct")]
    pub metrics: Option<crate::metrics::endpoint::Endpoint>,

    /// For the system, for the rootless container of an ordinary user: systemd listens, as on port 80, and the forwarder is USER
    ///
    /// The quadlet is looked for where USER's Podman looks; the container, its images and its unit are USER's as ever. The socket
    /// and the forwarder's service are the system's, and nothing of theirs runs as root. The service starts USER's service
    /// manager where it does not run yet.
    #[arg(long, value_name = "USER", value_parser = crate::run_as::name, conflicts_with_all = ["user", "direct"])]
    pub run_as: Option<String>,

    /// For the system: quadlets and units below /etc, rootful containers (default for root)
    #[arg(long, conflicts_with = "user")]
    pub system: bool,

    /// For this user: quadlets and units below ~/.config, rootless containers (default for an ordinary user)
    #[arg(long)]
    pub user: bool,

    /// Print the files, write and start nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Undo it: stop listening, remove what bro activate wrote and nothing else (with --service-name: that port only)
    #[arg(long, conflicts_with_all = ["external_port", "internal_port", "direct", "network", "container", "bind_to_device",
        "backlog", "exit_idle_time", "exit_idle_time_max", "wakes_per_hour", "freeze", "freeze_time", "idle_by", "idle_ignore", "idle_below", "wake_on", "wake_ignore", "min_uptime", "keep_awake", "busy_file", "busy_exec", "ready", "start_timeout",
        "drain_timeout", "idle_timeout", "connections_max", "connections_per_source", "flows_max", "flow_timeout", "icmp_port_unreachable", "keepalive_time", "keepalive_interval",
        "keepalive_probes", "user_timeout", "unix_identity", "proxy_protocol", "accept_proxy", "trusted", "relay", "source", "local_clients",
        "blocking_sockets", "metrics", "run_as", "restrict_network", "adopt", "trust_loopback", "adopt_connect"])]
    pub remove: bool,

    /// Read and write below DIR, such as the root of an image, and start nothing
    #[arg(long, value_name = "DIR", value_parser = crate::address::absolute)]
    pub root: Option<PathBuf>,
}

/// `--direct=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Direct {
    /// As nginx takes it where Image= or Exec= name nginx, else by LISTEN_FDS
    Auto,
    /// The variable NGINX names the descriptors
    Nginx,
    /// The program reads LISTEN_FDS (sd_listen_fds(3))
    ListenFds,
}
