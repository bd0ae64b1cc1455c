//! The command line: what each option means, in the words that `--help` and the man page print.

mod activate;
#[cfg(test)]
mod documented;
mod fence;
mod helper;
pub mod idle;
#[cfg(test)]
mod links;
mod loader;
pub mod wake_sleep;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, FromArgMatches as _, Parser, Subcommand, ValueEnum};

pub use activate::{Activate, Direct};
pub use fence::Fence;
pub use helper::Helper;
pub use loader::Loader;

use crate::adopt::Adopt;
use crate::systemd::time_span::TimeSpan;
use crate::targets::TargetRange;
use bro_relay::netns::identity::Identity;
use bro_relay::proxy_protocol::{self, Trusted};
use bro_relay::target::Target;

/// Start any container on its first connection, relay it without losing a byte, and get out of the way.
#[derive(Debug, Parser)]
#[command(name = "bro", version, long_version = long_version(), max_term_width = 100, propagate_version = true, subcommand_required = true)]
#[command(
    after_help = "Exit status: 0 done; 1 failed; 2 wrong usage; 3 no socket was passed; 4 container, process or \
    namespace not found; 5 not permitted."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// Reads the command line. What each wake of a service runs is read without the other subcommands' options: to make a parser of
    /// all of them takes more processor time than anything else that a forwarder does at its start, and memory that is never needed
    /// again. Where that does not do (`--help`, an error), the whole parser says so.
    ///
    /// # Errors
    /// clap's.
    pub fn read(words: Vec<OsString>) -> Result<Self, clap::Error> {
        let options = words.get(1..).unwrap_or_default();
        if options.first().is_some_and(|name| name == "forward")
            && let Ok(said) =
                Forward::augment_args(clap::Command::new("forward")).try_get_matches_from(options)
            && let Ok(forward) = Forward::from_arg_matches(&said)
        {
            return Ok(Self { command: Command::Forward(Box::new(forward)) });
        }
        if options == ["netns-agent"] {
            return Ok(Self { command: Command::NetnsAgent });
        }
        Self::try_parse_from(words)
    }
}

/// Names of subcommands: the program does the same when it is called so.
pub const NAMES: [(&str, &str); 3] =
    [("bro-activate", "activate"), ("bro-activator", "activate"), ("bro-helper", "helper")];

/// The version, with what made the kernel relay's programs.
fn long_version() -> &'static str {
    static TEXT: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
        let object = bro_sockmap::OBJECT.lines().collect::<Vec<_>>().join("\n  ");
        format!("{}\nkernel programs made by\n  {object}", env!("CARGO_PKG_VERSION"))
    });
    &TEXT
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Relay the sockets that systemd passed to a service, starting its container on the first connection
    #[command(after_long_help = FORWARD_EXAMPLES)]
    Forward(Box<Forward>),
    /// Have systemd listen for a quadlet and wake its container on the first connection: writes the units, starts the socket
    #[command(after_long_help = activate::EXAMPLES)]
    Activate(Box<Activate>),
    /// Start an activated service now, and wait until it is ready
    Wake(wake_sleep::Wake),
    /// Stop an activated service now, unless clients are connected
    Sleep(wake_sleep::Sleep),
    /// What is activated, and whether it is awake; with a NAME: connections, bytes by relay, cold starts
    Status(Status),
    /// A live view of what is activated, in the terminal: states, connections, rates; wakes and puts to sleep by key
    Top(Top),
    /// What is activated, and all that was counted since the host was booted, in the form of OpenMetrics (Prometheus)
    Metrics(Metrics),
    /// What this host can do for this user and what not, or what is wrong with one service; one line a check, with the fix
    Doctor(Doctor),
    /// Load the kernel relay for a user, whose forwarders then need no rights for it
    #[command(after_long_help = loader::EXAMPLES)]
    Loader(Loader),
    /// Run a command in a container's network namespace, with the sockets that systemd passed
    #[command(after_long_help = helper::EXAMPLES)]
    Helper(Helper),
    /// Have the running forwarders of activated services take up a bro that has just been installed
    #[command(hide = true)]
    AfterUpgrade(AfterUpgrade),
    /// Keep containers from leading the sockets of a socket unit elsewhere, for `ExecStartPre=` of that unit
    #[command(hide = true)]
    Fence(Fence),
    /// Try what waking a service takes, for a `bro doctor NAME` that has systemd run this as it would run the forwarder
    #[command(hide = true)]
    TryWake(TryWake),
    /// Make sockets inside another network namespace, for a `bro forward` that holds the other end of fd 0
    #[command(hide = true)]
    NetnsAgent,
}

const FORWARD_EXAMPLES: &str = "\
Examples:
  A rootless quadlet web.container (Network=none), asleep until the first connection to web-activator.socket:
    ExecStart=bro forward --unit web.service --container systemd-web --exit-idle-time 5min 127.0.0.1:80

  By hand, without systemd as PID 1, towards a network namespace made with `ip netns add demo`:
    systemd-socket-activate -l 127.0.0.1:8080 bro forward --netns /run/netns/demo 127.0.0.1:80

  Two sockets (FileDescriptorName=http and =metrics), one container:
    bro forward --container web --target http=127.0.0.1:80 --target metrics=127.0.0.1:9100

TARGET is HOST:PORT, [IPV6]:PORT, a PORT (of 127.0.0.1), a bare HOST (port 80), a /unix/path or an @abstract name.
Time spans are systemd's: 90, 500ms, 1min 30s, infinity. A number alone is in seconds.

Exit status: 0 done; 1 failed; 2 wrong usage; 3 no socket was passed; 4 container, process or namespace not found;
5 not permitted.";

/// How long a stopping forwarder lets its connections finish, unless it is told otherwise.
pub(crate) const DRAIN_TIMEOUT: &str = "30s";

/// `bro forward`.
#[derive(Debug, Args)]
pub struct Forward {
    /// Where the service listens, for every socket without a --target of its own
    #[arg(value_name = "TARGET")]
    pub target: Option<Target>,

    /// The target of the sockets whose FileDescriptorName= is NAME, or HOST:FIRST-LAST: a port for each of theirs (repeatable)
    #[arg(long = "target", value_name = "NAME=ADDR", value_parser = crate::targets::parse_named)]
    pub targets: Vec<(String, TargetRange)>,

    /// Only warn of a --target whose socket was not passed, such as one whose port was taken at boot, and serve the others
    #[arg(long)]
    pub allow_missing_sockets: bool,

    /// Listen on ADDR, for a host without systemd: [NAME=]HOST:PORT, PORT or a unix path (repeatable)
    #[arg(long, value_name = "ADDR", value_parser = crate::systemd::listen_fds::parse_listen)]
    pub listen: Vec<crate::systemd::listen_fds::ListenSpec>,

    /// The Podman container whose network namespace (for a unix target: whose files) the target is in
    #[arg(long, value_name = "NAME", group = "place", value_parser = crate::address::container)]
    pub container: Option<String>,

    /// The process whose network namespace the target is in
    #[arg(long, value_name = "PID", group = "place", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,

    /// The network namespace the target is in, as a file such as /run/netns/NAME
    #[arg(long, value_name = "PATH", group = "place")]
    pub netns: Option<PathBuf>,

    /// As which user a service's unix socket is connected to: unused, forwarder, or UID or UID:GID
    ///
    /// The service sees that user (SO_PEERCRED), and may trust it, as PostgreSQL's “peer” and MariaDB's “unix_socket” do.
    /// unused: an id of the container's that no entry of its /etc/passwd and /etc/group has, so that no client has more rights than
    /// a stranger. UID or UID:GID: this one, as the container numbers them (GID: the same number), with no other group. forwarder: this
    /// forwarder's own user; every client then has the rights that the service gives to that user, which is mostly the owner or root.
    /// The socket's mode, and that of the folders above it, has to let that user in.
    #[arg(long, value_name = "WHO", default_value_t = Identity::Unused)]
    pub unix_identity: Identity,

    /// The unit to start on the first connection (without it, the container is started by unit dependencies)
    #[arg(long, value_name = "NAME.service", value_parser = crate::address::unit)]
    pub unit: Option<String>,

    /// Start the unit on the user's service manager (default for an ordinary user)
    #[arg(long, conflicts_with = "system")]
    pub user: bool,

    /// Start the unit on the system's service manager (default for root)
    #[arg(long)]
    pub system: bool,

    /// When the first client may be connected: auto, listen, connect, healthy, http:PAGE, postgres, mysql, redis, exec:CMD or none
    ///
    /// listen: the kernel's table of listeners in the target's namespace shows the port; the service is not touched. auto: the
    /// same, and a service at port 5432, 3306 or 6379 says in PostgreSQL's, MySQL's or Redis' protocol that it takes clients
    /// (one that says something else there, or nothing for a second, is ready as well). postgres, mysql, redis: the same at any
    /// port, and nothing else will do. http:PAGE: the answer to a GET has a status below 500; PAGE is /PATH, or //HOST/PATH,
    /// :PORT/PATH or //HOST:PORT/PATH, where HOST is only named in the request. connect: a connection of bro's own succeeded (and
    /// is closed). healthy: podman's health check passes (needs --container). exec:CMD: a shell command on the host exits with 0,
    /// tried every 200 ms, each try for 10 s at most. none: at once; a refused connection is a reset for the client. All of it
    /// within --start-timeout.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub ready: crate::service::readiness::Ready,

    /// How long clients are held while the service starts; then they are reset and the next client tries again
    #[arg(long, value_name = "SPAN", default_value = "90s", value_parser = crate::systemd::time_span::limit)]
    pub start_timeout: TimeSpan,

    /// When it wakes and when it sleeps.
    #[command(flatten)]
    pub idle: idle::Idle,

    /// On SIGTERM, how long connections may take to finish (0: they are ended at once, as by a second SIGTERM)
    #[arg(long, value_name = "SPAN", default_value = DRAIN_TIMEOUT)]
    pub drain_timeout: TimeSpan,

    /// Abort a connection after SPAN without a byte in either direction
    #[arg(long, value_name = "SPAN", default_value = "infinity", value_parser = crate::systemd::time_span::limit)]
    pub idle_timeout: TimeSpan,

    /// Let the service have the listening sockets themselves, and relay only what it cannot have
    ///
    /// For a container that was created with the seccomp profile of `bro activate --adopt`: its listen(2) is answered by this forwarder, which puts the passed
    /// socket in the place of the service's own. The service then accepts its clients itself: it sees their own addresses, and no byte
    /// of theirs passes here. It takes one more passed socket, with FileDescriptorName=seccomp: the unix socket that the profile's
    /// listenerPath names; and, so that a crash of this process loses nothing, FileDescriptorStoreMax= in its unit. A socket that the service cannot have, for
    /// it listens at one of another family or not within --start-timeout, is relayed until the container ends; `bro status` and the log say why.
    /// What only a process can do that accepts a client (--proxy-protocol, --accept-proxy, --connections-per-source, --local-clients) does not go with it;
    /// --connections-max holds for clients that are relayed alone. For the idle time all clients count but two kinds of a unix socket's: those that come and go between
    /// two looks (a second to ten), and those that connect from another network namespace.
    /// With `udp` it is the passed sockets for datagrams that the service has, from its bind(2) on, and with `all` both. What the container then sends from that
    /// port goes to whatever this host reaches, and no fence holds it (SECURITY.md). A datagram waits in the socket's own buffer until the service is there. The
    /// service has to have a socket of the same family: 0.0.0.0:53 for one of IPv4, and `[::]:53` with BindIPv6Only=both for one of both. The other passed sockets are
    /// relayed from the start.
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "on|udp|all|off", value_enum, default_value = "off", default_missing_value = "on")]
    pub adopt: Adopt,

    /// How many connections at once; further clients wait in the kernel's backlog (default: as many as the limit on descriptors allows)
    #[arg(short = 'c', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections_max: Option<u32>,

    /// How many connections at once from one source (an IPv4 address, the /64 of an IPv6 one, or, over unix, a user); further ones are
    /// reset
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections_per_source: Option<u32>,

    /// How many clients' datagrams at once are told apart (UDP); the least recently used flow makes room for the next
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub flows_max: u32,

    /// End a client's flow of datagrams after SPAN without one in either direction
    #[arg(long, value_name = "SPAN", default_value = "60", value_parser = crate::systemd::time_span::limit)]
    pub flow_timeout: TimeSpan,

    /// Tell a client over UDP by ICMP that its datagram was not received: nothing is bound at the target, or the service cannot be started
    ///
    /// Of a program on this host the kernel says so itself. A client whose socket is connected gets ECONNREFUSED; it is told of a datagram that is lost, not
    /// of one that waits for the service. Six messages at once and then one a second go to one source (as --connections-per-source counts), 1000 a second to all;
    /// none about a datagram for several hosts. It takes CAP_NET_RAW over the network that clients come by, to make sockets that only send; then it is given
    /// up. Where that cannot be had the forwarder does not start.
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub icmp_port_unreachable: bool,

    /// How bytes are moved: auto, sockmap, splice or copy
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub relay: RelayChoice,

    /// From which address the service sees its clients come: auto, client, container or loopback
    ///
    /// client: the client's own address and port, in a container whose network is the loopback interface alone (`Network=none`). It
    /// takes CAP_NET_ADMIN over the container's network, which the owner of a rootless container has. Clients on this host's own
    /// loopback interface, and those of a unix socket, come from 169.254.1.2 or fd62:726f::2. container: the container's own address
    /// on its network, for every client. auto: client without a network, else container. loopback: 127.0.0.1 or ::1, and so
    /// every client is granted what the service trusts its own host with, such as a database without a password.
    #[arg(long, value_name = "WHICH", default_value = "auto")]
    pub source: crate::service::sources::Choice,

    /// Let what clients on this host send take a kernel lane too: off, on, or a cgroup's path
    ///
    /// The lane's program then looks at every TCP connection that is made in that cgroup (on: in all of them) and takes
    /// hold of those towards this forwarder's own sockets, so it is off unless asked for: the clients are other
    /// people's programs. Their bytes go straight into the service's connection, and the forwarder sleeps. A client has to
    /// have been non-blocking when it connected and at two messages after that. One that then turns to blocking mode leaves the
    /// lane when it sends next; if it waits in recv before, that can fail with EAGAIN when a signal interrupts it.
    #[arg(long, value_name = "off|on|CGROUP", default_value = "off")]
    pub local_clients: LocalClients,

    /// Let sockets in blocking mode take the kernel lanes too
    ///
    /// The kernel's receive path for such sockets has a flaw: a blocking recv that is interrupted by a signal (even with
    /// SA_RESTART), or that follows a shutdown of the sending side, can fail with EAGAIN. Only for programs that bear it.
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub blocking_sockets: bool,

    /// Tell the service who its client is, by a PROXY protocol header in front of the client's bytes: v1 (text) or v2 (binary)
    ///
    /// For a service that expects it of every connection (nginx: listen … proxy_protocol). A client without an IP address, over unix,
    /// is told of as UNKNOWN (v1) or LOCAL (v2).
    #[arg(long, value_name = "v1|v2")]
    pub proxy_protocol: Option<ProxyVersion>,

    /// Take the client's address from the PROXY protocol header (v1 or v2) of a --trusted balancer in front
    ///
    /// A trusted balancer has to send one within 5 s, of 107 bytes (v1) or 4096 bytes (v2) at most, or is reset. That address is then the
    /// client's: for --source, --connections-per-source, the log, and --proxy-protocol. Where the header names none (UNKNOWN, LOCAL),
    /// the balancer is the client. A header of any other peer is not believed: it is ordinary bytes, for the service.
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub accept_proxy: bool,

    /// With --accept-proxy: whose headers are believed, addresses, networks (10.0.0.0/8), unix for clients of a unix socket, or vsock or vsock:CID (repeatable)
    #[arg(long, value_name = "CIDR|unix|vsock", value_delimiter = ',')]
    pub trusted: Vec<Trusted>,

    /// TCP keepalive on both legs: time without traffic before the first probe, 1s to 32767s
    #[arg(long, value_name = "SPAN", default_value = "60s", value_parser = crate::systemd::time_span::keepalive)]
    pub keepalive_time: TimeSpan,

    /// TCP keepalive on both legs: time between probes, 1s to 32767s
    #[arg(long, value_name = "SPAN", default_value = "10s", value_parser = crate::systemd::time_span::keepalive)]
    pub keepalive_interval: TimeSpan,

    /// TCP keepalive on both legs: unanswered probes before an abort
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=127))]
    pub keepalive_probes: u32,

    /// Answer GET /metrics there, with what `bro metrics` prints: ADDR:PORT, a PORT of 127.0.0.1, or the path of a unix socket
    ///
    /// In the form of OpenMetrics, for Prometheus and its like; only while this forwarder runs. 8 requests at once, of 8 KiB and 5 s
    /// each. There is no password: who can connect can read. A unix socket has mode 0660; one without a listener
    /// is replaced.
    #[arg(long, value_name = "ADDR:PORT|PATH")]
    pub metrics: Option<crate::metrics::endpoint::Endpoint>,

    /// Abort a connection of which a side has acknowledged nothing of what was sent to it for SPAN, 1s or more, or infinity
    ///
    /// For a side that vanishes in the middle of an answer, when TCP keepalive is silent. As TCP_USER_TIMEOUT (tcp(7)), but a side that
    /// merely does not read, and answers the probes of its closed window, is not aborted.
    #[arg(long, value_name = "SPAN", default_value = "3min", value_parser = crate::systemd::time_span::user_timeout)]
    pub user_timeout: TimeSpan,

    /// More log lines: -v for every connection's start, -vv for every step, in the kernel relay's programs too
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// `--local-clients=`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalClients {
    /// Clients' sockets are left alone.
    Off,
    /// Clients anywhere on this host.
    On,
    /// Clients in this cgroup and below.
    Cgroup(PathBuf),
}

impl std::fmt::Display for LocalClients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::On => f.write_str("on"),
            Self::Cgroup(path) => path.display().fmt(f),
        }
    }
}

impl std::str::FromStr for LocalClients {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "on" => Ok(Self::On),
            path if path.starts_with('/') => Ok(Self::Cgroup(path.into())),
            _ => Err(format!("“{text}” is neither off, on, nor a cgroup's path such as /user.slice")),
        }
    }
}

/// `bro doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    /// The activated service to look at, instead of the host
    #[arg(value_name = "NAME")]
    pub name: Option<String>,

    /// Wake the service, to see where it listens
    #[arg(long, requires = "name")]
    pub wake: bool,

    /// It is a service of this user (default for an ordinary user)
    #[arg(long, conflicts_with = "system")]
    pub user: bool,

    /// It is a service of the system (default for root)
    #[arg(long)]
    pub system: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `bro after-upgrade`, which packages' scripts run.
#[derive(Debug, Args)]
pub struct AfterUpgrade {
    /// Those of this user only (default: of the system, and of every user whose service manager runs)
    #[arg(long)]
    pub user: bool,
}

/// `bro try-wake`.
#[derive(Debug, Args)]
pub struct TryWake {
    /// The process whose network namespace is entered (default: none is)
    #[arg(long)]
    pub pid: Option<i32>,
    /// Where the service listens, which says what kinds of sockets are made (repeatable)
    #[arg(long)]
    pub target: Vec<Target>,
    /// The kernel relay may be used
    #[arg(long)]
    pub bpf: bool,
}

/// `bro status`.
#[derive(Debug, Args)]
pub struct Status {
    /// All that is known of these services' forwarders, instead of a line for each service: names, or paths of status sockets
    ///
    /// A service without a running forwarder is shown as in the list of all, also with --json.
    #[arg(value_name = "NAME")]
    pub whom: Vec<String>,

    /// The services of this user (default for an ordinary user)
    #[arg(long, conflicts_with = "system")]
    pub user: bool,

    /// The services of the system (default for root)
    #[arg(long)]
    pub system: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Print again each second, until interrupted
    #[arg(short, long)]
    pub watch: bool,
}

/// `bro metrics`.
#[derive(Debug, Args)]
pub struct Metrics {
    /// The services of this user (default for an ordinary user)
    #[arg(long, conflicts_with = "system")]
    pub user: bool,

    /// The services of the system (default for root)
    #[arg(long)]
    pub system: bool,
}

/// `bro top`.
#[derive(Debug, Args)]
pub struct Top {
    /// The services of this user (default for an ordinary user)
    #[arg(long, conflicts_with = "system")]
    pub user: bool,

    /// The services of the system (default for root)
    #[arg(long)]
    pub system: bool,
}

/// `--proxy-protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProxyVersion {
    /// A line of text
    V1,
    /// Binary
    V2,
}

impl From<ProxyVersion> for proxy_protocol::Version {
    fn from(version: ProxyVersion) -> Self {
        match version {
            ProxyVersion::V1 => Self::V1,
            ProxyVersion::V2 => Self::V2,
        }
    }
}

/// `--relay=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RelayChoice {
    /// The best relay this host can have
    Auto,
    /// The kernel relay: what the service sends goes straight into the client's connection, without waking bro; what
    /// cannot go that way is spliced. Where it cannot be had, this is an error. On kernels that answer FIONREAD with 0 for
    /// its sockets (`bro doctor` tells), a service that asks how much waits hangs; auto means splice there
    Sockmap,
    /// splice(2) through a pipe, bytes stay in the kernel
    Splice,
    /// recv and send through a buffer
    Copy,
}
