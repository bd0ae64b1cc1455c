//! Who is compared, and how each is set up: as people run it, except that limits of connections are raised for all alike.
//!
//! Clients connect outside the namespace and the service listens inside. bro, pasta, slirp4netns and rootlessport cross over
//! by themselves. systemd-socket-proxyd, HAProxy and nginx cannot, but take over a listening socket: theirs is made
//! outside, they run inside. socat can neither; it listens inside, with the clients inside too, and so does one bro.

mod datagrams;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{SockaddrStorage, getsockname};

use super::launch::{Filter, Launch, Launched, last_line, this_task};
use super::memory;
use super::programs::Program;
use super::scene::Scene;
use super::service;
use super::stream::Address;
use super::tools::{self, Missing};
use crate::run::process::Lines;
use crate::run::runtime::ListenerPath;

/// The most connections that any contender is allowed.
const CONNECTIONS: u32 = 20_000;
/// How long a contender may take until its first answer.
const START: Duration = Duration::from_secs(10);

/// One of those compared.
#[derive(Debug, Clone)]
pub struct Contender {
    /// In JSON and for `--only`.
    pub key: &'static str,
    /// In tables and plots.
    pub label: &'static str,
    pub way: Way,
    /// How it is set up, for the report.
    pub how: &'static str,
}

/// What a contender is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Direct,
    /// The service with a container's seccomp filter, in the clients' own network namespace.
    HostNetwork,
    Unix,
    Bro {
        options: &'static [&'static str],
        lanes: Lanes,
        inside: bool,
    },
    /// The service has the listening socket itself; bro is beside it.
    Adopted,
    Proxyd,
    Socat,
    Haproxy,
    Nginx,
    Pasta,
    Slirp,
    Rootlessport,
}

/// Which kernel lanes a bro opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lanes {
    None,
    /// Where the kernel allows.
    Auto,
    Service,
    Both,
}

const fn bro(
    key: &'static str,
    label: &'static str,
    options: &'static [&'static str],
    lanes: Lanes,
    how: &'static str,
) -> Contender {
    Contender { key, label, way: Way::Bro { options, lanes, inside: false }, how }
}

/// Everyone, in the order of the tables.
pub const ALL: [Contender; 17] = [
    Contender {
        key: "direct",
        label: "direct (no forwarder)",
        way: Way::Direct,
        how: "client and service in the namespace: the ceiling",
    },
    Contender {
        key: "host-network",
        label: "host network (no forwarder)",
        way: Way::HostNetwork,
        how: "a service as of a container with Network=host: with the seccomp filter of an adopted one, of which nothing is notified, and \
              beside its clients; what adoption is to be compared with",
    },
    Contender {
        key: "unix",
        label: "unix socket (no forwarder)",
        way: Way::Unix,
        how: "the same service on a unix socket, for reference",
    },
    bro("bro-auto", "bro, auto", &["--relay=auto"], Lanes::Auto, "what bro does unless it is told otherwise"),
    bro(
        "bro-both-lanes",
        "bro, both lanes",
        &["--relay=sockmap", "--local-clients=on"],
        Lanes::Both,
        "kernel relay for what the service and what clients of this host send",
    ),
    bro(
        "bro-service-lane",
        "bro, service lane",
        &["--relay=sockmap"],
        Lanes::Service,
        "kernel relay for what the service sends; what the client sends is spliced",
    ),
    bro("bro-splice", "bro, splice", &["--relay=splice"], Lanes::None, "splice(2) both ways"),
    bro("bro-copy", "bro, copy", &["--relay=copy"], Lanes::None, "recv and send both ways"),
    Contender {
        key: "bro-adopted",
        label: "bro, adopted",
        way: Way::Adopted,
        how: "--adopt: the service accepts at the host's listening socket, and bro moves no byte; a service of its own, started as by \
              an OCI runtime with a seccomp filter that notifies (Linux 5.9)",
    },
    Contender {
        key: "systemd-socket-proxyd",
        label: "systemd-socket-proxyd",
        way: Way::Proxyd,
        how: "the listening socket passed in, the process inside (as JoinsNamespaceOf= does)",
    },
    Contender {
        key: "haproxy",
        label: "HAProxy",
        way: Way::Haproxy,
        how: "mode tcp, option splice-auto, default threads; bind fd@3, the process inside",
    },
    Contender {
        key: "nginx",
        label: "nginx stream",
        way: Way::Nginx,
        how: "worker_processes auto; the listening socket passed in, the process inside",
    },
    Contender {
        key: "socat",
        label: "socat (inside)",
        way: Way::Socat,
        how: "TCP-LISTEN,fork with its default buffer; it and its clients inside, for it cannot cross namespaces",
    },
    Contender {
        key: "bro-splice-inside",
        label: "bro, splice (inside)",
        way: Way::Bro { options: &["--relay=splice"], lanes: Lanes::None, inside: true },
        how: "set up like socat, to compare with it",
    },
    Contender {
        key: "pasta",
        label: "pasta",
        way: Way::Pasta,
        how: "publishes the port as podman has it do, at this namespace",
    },
    Contender {
        key: "slirp4netns",
        label: "slirp4netns",
        way: Way::Slirp,
        how: "publishes the port as podman has it do, at this namespace",
    },
    Contender {
        key: "rootlessport",
        label: "rootlessport",
        way: Way::Rootlessport,
        how: "podman's own helper, at this namespace",
    },
];

/// A contender that is up.
#[derive(Debug)]
pub struct Running {
    pub address: Address,
    /// Whether its clients are inside the namespace.
    pub inside: bool,
    /// A service of its own, which ends before its forwarder.
    _service: Option<OwnService>,
    process: Option<Launched>,
    log: PathBuf,
}

/// A service of a contender's own.
pub type OwnService = (Launched, Lines);

impl Contender {
    /// Why it cannot be had here.
    pub fn missing(&self, scene_is_root: bool) -> Option<Missing> {
        let why = self.lack(scene_is_root)?;
        Some(Missing { name: self.label.to_owned(), why })
    }

    /// Has its clients outside of the container, so that they may as well be on another host.
    pub fn is_reached_from_outside(&self) -> bool {
        !matches!(self.way, Way::Direct | Way::Unix | Way::Socat | Way::Bro { inside: true, .. })
    }

    fn lack(&self, root: bool) -> Option<String> {
        let install = |program: &str, package: &str| {
            let line = || format!("{program} is not installed: `sudo apt-get install {package}`");
            tools::find(program).is_none().then(line)
        };
        match self.way {
            Way::Direct | Way::HostNetwork | Way::Unix => None,
            Way::Bro { lanes: Lanes::None, .. } => None,
            Way::Adopted => {
                let known = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
                let notifies =
                    known.is_ok_and(|known| known.split_whitespace().any(|action| action == "user_notif"));
                (!notifies).then(|| {
                    "the kernel has no seccomp notifications (CONFIG_SECCOMP_FILTER, Linux 5.9)".into()
                })
            }
            Way::Bro { .. } => (!root).then(|| {
                "the kernel relay takes capabilities: `sudo --preserve-env=PATH,HOME cargo xtask bench`"
                    .into()
            }),
            Way::Proxyd => install("systemd-socket-proxyd", "systemd"),
            Way::Socat => install("socat", "socat"),
            Way::Haproxy => install("haproxy", "haproxy"),
            Way::Nginx => install("nginx", "nginx libnginx-mod-stream").or_else(|| {
                let line = "nginx has no stream module: `sudo apt-get install libnginx-mod-stream`";
                stream_module().is_err().then(|| line.into())
            }),
            Way::Pasta => install("pasta", "passt"),
            Way::Slirp => install("slirp4netns", "slirp4netns"),
            Way::Rootlessport => install("rootlessport", "podman"),
        }
    }

    /// Its program and version, where it has them.
    pub fn version(&self, scene: &Scene) -> Option<String> {
        let of = |program: &str, flag: &str| tools::version(&tools::find(program)?, flag);
        match self.way {
            Way::Direct | Way::HostNetwork | Way::Unix => None,
            Way::Bro { .. } | Way::Adopted => tools::version(&scene.bro, "-V"),
            Way::Proxyd => of("systemd-socket-proxyd", "--version"),
            Way::Socat => of("socat", "-V").map(|line| line.chars().take(60).collect()),
            Way::Haproxy => of("haproxy", "-v"),
            Way::Nginx => of("nginx", "-v"),
            Way::Pasta => of("pasta", "--version"),
            Way::Slirp => of("slirp4netns", "--version"),
            Way::Rootlessport => of("podman", "--version"),
        }
    }

    /// Starts it towards a port inside, and waits until a byte has gone there and back.
    pub fn start(&self, scene: &Scene, port: u16) -> Result<Running> {
        let mut running = self.launch(scene, port).with_context(|| format!("starting {}", self.label))?;
        running.wait_until_up(scene, "P").with_context(|| format!("starting {}", self.label))?;
        if self.way == Way::Adopted {
            expect_adopted(&running.log)?;
        }
        Ok(running)
    }

    /// Where and how a real program has to be started for this contender; none where it has no use for one.
    pub fn server(&self, scene: &Scene, port: u16) -> Result<Option<Server>> {
        Ok(match self.way {
            Way::Unix => None,
            Way::HostNetwork => Some(Server { inside: false, filter: Filter::Allowing, forwarder: None }),
            Way::Adopted => {
                let (socket, address, inside) = passed(scene, false)?;
                let log = scene.folder.path(&format!("{}-{port}.log", self.key));
                let starts = AdoptedStart { scene, target: format!("127.0.0.1:{port}"), startup_ms: 0 };
                let (process, listener_path) =
                    starts.forwarder(socket.context("a socket was made")?, &log)?;
                let forwarder = Running { address, inside, _service: None, process: Some(process), log };
                Some(Server {
                    inside: true,
                    filter: Filter::Notifying(listener_path),
                    forwarder: Some(forwarder),
                })
            }
            _ => Some(Server { inside: true, filter: Filter::None, forwarder: None }),
        })
    }

    /// The same as [`Contender::start`] towards a real program, which answers another word.
    pub fn start_for(&self, scene: &Scene, port: u16, program: Program, server: Server) -> Result<Running> {
        let running = match (self.way, server.forwarder) {
            (Way::Adopted, Some(forwarder)) => {
                expect_adopted(&forwarder.log)?;
                Ok(forwarder)
            }
            (Way::HostNetwork, _) => Ok(Running {
                address: Address::Tcp((scene.front(), port).into()),
                inside: false,
                _service: None,
                process: None,
                log: scene.folder.path("service.log"),
            }),
            _ => self.launch(scene, port),
        };
        let mut running = running.with_context(|| format!("starting {}", self.label))?;
        running
            .wait_until_up(scene, program.greeting())
            .with_context(|| format!("starting {}", self.label))?;
        Ok(running)
    }

    /// The program with its arguments. None for those without a program.
    fn launch(&self, scene: &Scene, port: u16) -> Result<Running> {
        let target = format!("127.0.0.1:{port}");
        let files = format!("{}-{port}", self.key);
        let log = scene.folder.path(&format!("{files}.log"));
        let run = |place: Place, program: &Path, args: Vec<String>| -> Result<Running> {
            let (socket, address, inside) = place;
            let launch = Launch { inside: scene.inside(inside), socket, ..Launch::default() };
            let process = Some(launch.start(program, &args, &log)?);
            Ok(Running { address, inside: false, _service: None, process, log: log.clone() })
        };
        let bare =
            |address, inside| Running { address, inside, _service: None, process: None, log: log.clone() };
        match self.way {
            Way::Direct => Ok(bare(Address::Tcp(target.parse()?), true)),
            Way::HostNetwork => {
                let address = free_port(scene)?;
                let launch = Launch { filter: Filter::Allowing, ..Launch::default() };
                let service = Scene::starting_service(launch, vec![address.to_string()], 0, &log)?;
                Ok(Running { _service: Some(service), ..bare(Address::Tcp(address), false) })
            }
            Way::Unix => Ok(bare(scene.unix(), false)),
            Way::Bro { options, inside: false, .. } => {
                let mut args = bro_args(scene, options);
                args.push(target);
                run(passed(scene, false)?, &scene.bro, args)
            }
            Way::Bro { options, .. } => {
                let mut args = vec!["forward".to_owned(), format!("--connections-max={CONNECTIONS}")];
                args.extend(options.iter().map(ToString::to_string));
                args.extend([
                    "--drain-timeout=1s".into(),
                    format!("--listen=127.0.0.1:{}", port + 20_000),
                    target,
                ]);
                let mut running = run(own(port + 20_000, true), &scene.bro, args)?;
                running.inside = true;
                Ok(running)
            }
            Way::Adopted => {
                let (socket, address, _) = passed(scene, false)?;
                let socket = socket.context("a socket was made")?;
                // The scene's service listens at the port itself.
                let target = format!("127.0.0.1:{}", port + 30_000);
                let starts = AdoptedStart { scene, target, startup_ms: 0 };
                let (process, service) =
                    starts.both(socket, &log, &scene.folder.path(&format!("{files}-service.log")))?;
                Ok(Running { address, inside: false, _service: Some(service), process: Some(process), log })
            }
            Way::Proxyd => {
                let args = vec![format!("--connections-max={CONNECTIONS}"), target];
                run(passed(scene, true)?, &program("systemd-socket-proxyd")?, args)
            }
            Way::Socat => {
                let listen = format!(
                    "TCP-LISTEN:{},bind=127.0.0.1,fork,reuseaddr,backlog=4095,nodelay",
                    port + 10_000
                );
                let mut running = run(
                    own(port + 10_000, true),
                    &program("socat")?,
                    vec![listen, format!("TCP:{target},nodelay")],
                )?;
                running.inside = true;
                Ok(running)
            }
            Way::Haproxy => {
                let config = scene.folder.path(&format!("{files}.cfg"));
                std::fs::write(&config, haproxy_config(&target))?;
                run(
                    passed(scene, true)?,
                    &program("haproxy")?,
                    vec!["-db".into(), "-f".into(), config.display().to_string()],
                )
            }
            Way::Nginx => {
                let place = passed(scene, true)?;
                let config = scene.folder.path(&format!("{files}.conf"));
                std::fs::write(&config, nginx_config(&place.1, &target, &config.with_extension("pid"))?)?;
                let log = log.display().to_string();
                let args = ["-e", &log, "-c", &config.display().to_string()].map(str::to_owned);
                run(place, &program("nginx")?, args.to_vec())
            }
            Way::Pasta => {
                let host = free_port(scene)?;
                let place = (None, Address::Tcp(host), false);
                let script = pasta_script(scene, Published { host, port, protocol: "tcp" })?;
                run(place, Path::new("/bin/sh"), vec!["-c".into(), script])
            }
            Way::Slirp => {
                let host = free_port(scene)?;
                let api = scene.folder.path(&format!("{files}.api"));
                let running = run(
                    (None, Address::Tcp(host), false),
                    &program("slirp4netns")?,
                    slirp_args(scene, &api, true),
                )?;
                publish_by_slirp(&api, Published { host, port, protocol: "tcp" })?;
                Ok(running)
            }
            Way::Rootlessport => {
                let host = free_port(scene)?;
                let published = Published { host, port, protocol: "tcp" };
                let script = rootlessport_script(scene, &scene.folder.path(&files), published)?;
                run((None, Address::Tcp(host), false), Path::new("/bin/sh"), vec!["-c".into(), script])
            }
        }
    }
}

/// Where and how a real program is started for a contender.
pub struct Server {
    pub inside: bool,
    pub filter: Filter,
    /// What has to run before it.
    forwarder: Option<Running>,
}

/// A forwarder with `--adopt`, and the service that takes its socket.
pub struct AdoptedStart<'a> {
    pub scene: &'a Scene,
    /// Where the service listens inside.
    pub target: String,
    pub startup_ms: u64,
}

impl AdoptedStart<'_> {
    /// Starts the forwarder, and says at which `listenerPath` it awaits the service.
    pub fn forwarder(&self, socket: OwnedFd, log: &Path) -> Result<(Launched, String)> {
        let listener_path = ListenerPath::listen(local_address(&socket)?.port())?;
        let mut args = bro_args(self.scene, &["--adopt=all"]);
        args.push(self.target.clone());
        let launch =
            Launch { socket: Some(socket), adopt: Some(listener_path.passed()?), ..Launch::default() };
        Ok((launch.start(&self.scene.bro, &args, log)?, listener_path.name))
    }

    /// Starts both, the forwarder first; the service's lines tell when it listens.
    pub fn both(&self, socket: OwnedFd, log: &Path, service_log: &Path) -> Result<(Launched, OwnService)> {
        let (forwarder, listener_path) = self.forwarder(socket, log)?;
        let filter = Filter::Notifying(listener_path);
        let launch = Launch { inside: self.scene.inside(true), filter, ..Launch::default() };
        let addresses = vec![self.target.clone()];
        let service = Scene::starting_service(launch, addresses, self.startup_ms, service_log)?;
        Ok((forwarder, service))
    }
}

/// A socket that is relayed would answer as well: the forwarder's log tells, a moment after its first client has its answer.
pub fn expect_adopted(log: &Path) -> Result<()> {
    let deadline = Instant::now() + START;
    loop {
        let said = std::fs::read_to_string(log)?;
        if said.contains("adopted: the service accepts") {
            return Ok(());
        }
        let refusal = said.lines().find(|line| line.contains("not adopted"));
        ensure!(refusal.is_none() && Instant::now() < deadline, "{}", refusal.unwrap_or(last_line(&said)));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The socket to pass, where clients connect, and whether the program runs inside.
type Place = (Option<OwnedFd>, Address, bool);

/// A socket made outside.
fn passed(scene: &Scene, inside: bool) -> Result<Place> {
    let socket = service::bound(&Address::Tcp((scene.front(), 0).into()))?;
    let address = Address::Tcp(local_address(&socket)?);
    Ok((Some(socket), address, inside))
}

/// A port that the program binds itself.
fn own(port: u16, inside: bool) -> Place {
    (None, Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port))), inside)
}

/// Where a socket listens.
pub fn local_address(socket: &OwnedFd) -> Result<SocketAddr> {
    use std::os::fd::AsRawFd as _;
    let name: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let v4 = name.as_sockaddr_in().context("an IPv4 address")?;
    Ok(SocketAddr::V4((*v4).into()))
}

/// A port of the kernel's choice for those that cannot be given a socket.
fn free_port(scene: &Scene) -> Result<SocketAddr> {
    Ok(std::net::TcpListener::bind((scene.front(), 0))?.local_addr()?)
}

fn program(name: &str) -> Result<PathBuf> {
    tools::find(name).with_context(|| format!("{name} is gone"))
}

/// `bro forward` for this container, without the target.
pub fn bro_args(scene: &Scene, options: &[&str]) -> Vec<String> {
    let mut args = vec!["forward".to_owned(), format!("--pid={}", scene.container.pid())];
    args.extend([format!("--connections-max={CONNECTIONS}"), "--drain-timeout=1s".into()]);
    args.extend(options.iter().map(ToString::to_string));
    args
}

/// How many connections fit into the descriptors that a process may have, two each and some to spare.
fn connections_within_descriptors() -> u64 {
    (memory::more_descriptors().saturating_sub(1600) / 2).min(CONNECTIONS.into())
}

fn haproxy_config(target: &str) -> String {
    let most = connections_within_descriptors();
    format!(
        "global\n    maxconn {most}\n    maxpipes 500\n\
         defaults\n    mode tcp\n    option splice-auto\n    maxconn {most}\n    timeout connect 5s\n    \
         timeout client 1h\n    timeout server 1h\n    timeout tunnel 1h\n\
         listen bench\n    bind fd@3\n    server service {target}\n"
    )
}

/// The line that loads nginx's stream module; empty when it is built in.
fn stream_module() -> Result<String> {
    let folders = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules"];
    let module = folders.map(|folder| Path::new(folder).join("ngx_stream_module.so"));
    if let Some(module) = module.iter().find(|module| module.is_file()) {
        return Ok(format!("load_module {};\n", module.display()));
    }
    let built = std::process::Command::new(program("nginx")?).arg("-V").output()?;
    let built = String::from_utf8_lossy(&built.stderr).into_owned();
    ensure!(built.split_whitespace().any(|word| word == "--with-stream"), "no stream module");
    Ok(String::new())
}

/// What every configuration of nginx begins with.
pub fn nginx_head(pid: &Path) -> String {
    format!(
        "daemon off;\npid {};\n{}events {{ worker_connections {}; }}\n",
        pid.display(),
        nginx_user(),
        2 * connections_within_descriptors()
    )
}

fn nginx_user() -> &'static str {
    if nix::unistd::geteuid().is_root() { "user root;\n" } else { "" }
}

fn nginx_config(listen: &Address, target: &str, pid: &Path) -> Result<String> {
    Ok(format!(
        "{}{}worker_processes auto;\nstream {{\n    server {{\n        listen {listen};\n        \
         proxy_pass {target};\n        proxy_timeout 1h;\n    }}\n}}\n",
        stream_module()?,
        nginx_head(pid),
    ))
}

/// A port of this host that leads to one of the container's.
#[derive(Debug, Clone, Copy)]
struct Published {
    host: SocketAddr,
    port: u16,
    /// `tcp` or `udp`.
    protocol: &'static str,
}

/// pasta gives up its privileges before it opens the namespace, so it is handed over open. Connections from loopback, as
/// these are, never see the interface that it makes, so that one is left unconfigured.
fn pasta_script(scene: &Scene, published: Published) -> Result<String> {
    let Published { host, port, protocol } = published;
    let (published, other) = if protocol == "tcp" { ("-t", "-u") } else { ("-u", "-t") };
    let container = scene.container.pid();
    let user = if scene.container.rootless {
        format!("--userns=/proc/{container}/ns/user")
    } else {
        "--netns-only --runas=0:0".into()
    };
    Ok(format!(
        "exec {} --foreground --quiet {published} {}/{}:{port} {other} none -T none -U none -I pasta0 {user} --netns=/proc/self/fd/9 \
         9</proc/{container}/ns/net",
        program("pasta")?.display(),
        host.ip(),
        host.port()
    ))
}

/// `isolated`: as podman has it, the container reaches nothing on this host's loopback interface. So the answers do not that datagrams from
/// there get.
fn slirp_args(scene: &Scene, api: &Path, isolated: bool) -> Vec<String> {
    let mut args = ["--configure", "--mtu=65520"].map(str::to_owned).to_vec();
    args.extend(isolated.then(|| "--disable-host-loopback".into()));
    args.extend(["--api-socket".into(), api.display().to_string()]);
    args.extend([scene.container.pid().to_string(), "slirp0".into()]);
    args
}

fn publish_by_slirp(api: &Path, Published { host, port, protocol }: Published) -> Result<()> {
    let deadline = Instant::now() + START;
    let mut socket = loop {
        match UnixStream::connect(api) {
            Ok(socket) => break socket,
            Err(error) if Instant::now() > deadline => return Err(error).context("slirp4netns' API"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    socket.set_read_timeout(Some(START))?;
    let request = serde_json::json!({"execute": "add_hostfwd", "arguments": {"proto": protocol,
        "host_addr": host.ip().to_string(), "host_port": host.port(), "guest_addr": "10.0.2.100", "guest_port": port}});
    socket.write_all(request.to_string().as_bytes())?;
    socket.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    ensure!(!answer.contains("error"), "slirp4netns does not publish the port: {answer}");
    Ok(())
}

/// Podman tells rootlessport what to do on stdin, and passes a pipe that ends it and one for when it is ready.
/// In a folder of its own, `base`, which is fresh at each start.
fn rootlessport_script(scene: &Scene, base: &Path, published: Published) -> Result<String> {
    let Published { host, port, protocol } = published;
    std::fs::remove_dir_all(base).ok();
    std::fs::create_dir(base)?;
    let mapping = serde_json::json!({"host_ip": host.ip().to_string(), "host_port": host.port(),
        "container_port": port, "range": 1, "protocol": protocol});
    let config = serde_json::json!({"Mappings": [mapping], "ExitFD": 3, "ReadyFD": 4, "TmpDir": base,
        "NetNSPath": format!("/proc/{}/ns/net", scene.container.pid()), "ChildIP": "", "ContainerID": "bench",
        "RootlessCNI": false});
    let (input, exit, ready) = (base.join("config"), base.join("exit"), base.join("ready"));
    std::fs::write(&input, config.to_string())?;
    nix::unistd::mkfifo(&exit, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR)?;
    Ok(format!(
        "exec {} <{} 3<>{} 4>{}",
        program("rootlessport")?.display(),
        input.display(),
        exit.display(),
        ready.display()
    ))
}

impl Running {
    /// Its process group.
    pub fn group(&self) -> Option<i32> {
        self.process.as_ref().map(Launched::group)
    }

    /// Runs a part of this task as its client: where its clients are.
    pub fn client(&self, scene: &Scene, args: &[String], limit: Duration) -> Result<String> {
        let launch = Launch { inside: scene.clients(self.inside), ..Launch::default() };
        launch.output(this_task(), &[vec!["bench".to_owned()], args.to_vec()].concat(), limit)
    }

    fn wait_until_up(&mut self, scene: &Scene, word: &str) -> Result<()> {
        let args = ["poke".to_owned(), self.address.to_string(), word.to_owned()];
        let result = self.client(scene, &args, 2 * START);
        if let (Err(_), Some(process)) = (&result, &mut self.process) {
            let ended = if process.has_ended() { " (it has ended)" } else { "" };
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!("no byte came back{ended}; it says: {}", last_line(&log));
        }
        result.map(drop)
    }

    /// For a bro: how the bytes were moved, as it says itself.
    pub fn moved(&self) -> Option<Moved> {
        let base = match nix::unistd::geteuid() {
            root if root.is_root() => "/run".into(),
            user => std::env::var_os("XDG_RUNTIME_DIR")
                .map_or_else(|| format!("/run/user/{user}").into(), PathBuf::from),
        };
        let status = UnixStream::connect(base.join(format!("bro/{}/status.sock", self.group()?))).ok()?;
        status.shutdown(std::net::Shutdown::Write).ok()?;
        let report: serde_json::Value = serde_json::from_reader(status).ok()?;
        let of = |way: &str| report["total"][way].as_u64().unwrap_or(0);
        let moved = Moved { kernel: of("kernel"), spliced: of("spliced"), copied: of("copied") };
        // One whose service has the socket has none to tell of.
        (moved.kernel + moved.spliced + moved.copied > 0).then_some(moved)
    }
}

/// Bytes, by how they were moved.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub struct Moved {
    pub kernel: u64,
    pub spliced: u64,
    pub copied: u64,
}
