//! What all contenders share: the container, the service in it, and a folder for what they write.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::contenders::Contender;
use super::launch::{Launch, Launched, this_task};
use super::stream::Address;
use crate::run::namespace::Container;
use crate::run::process::Lines;

/// The first of the service's ports in the namespace, which is new, so that no port of it can be taken: one for each
/// contender, for a socket can be in the care of one kernel relay only.
const FIRST_PORT: u16 = 9000;

/// This host and the other one, of a network for documentation (RFC 5737).
const THIS_HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const OTHER_HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// A network namespace that stands for another host, at the far end of a veth(4) pair, which goes with it.
fn other_host() -> Result<Container> {
    let other = Container::create()?;
    let pid = other.pid();
    let near = format!("bench{pid}");
    let ip = |inside: Option<u32>, line: &str| {
        let program =
            super::tools::find("ip").context("ip is not installed: `sudo apt-get install iproute2`")?;
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let launch = Launch { inside, ..Launch::default() };
        launch.output(&program, &args, Duration::from_secs(10)).with_context(|| format!("ip {line}"))
    };
    ip(None, &format!("link add {near} type veth peer name eth0 netns {pid}"))?;
    ip(None, &format!("addr add {THIS_HOST}/30 dev {near}"))?;
    ip(None, &format!("link set {near} up"))?;
    ip(Some(pid), &format!("addr add {OTHER_HOST}/30 dev eth0"))?;
    ip(Some(pid), "link set eth0 up")?;
    Ok(other)
}

/// The stage.
pub struct Scene {
    pub container: Container,
    pub bro: PathBuf,
    pub folder: Folder,
    /// Where the clients are, if not here.
    other_host: Option<Container>,
    _service: Launched,
    _reference: Launched,
}

impl Scene {
    /// Makes a container with the service, and the same service on a unix socket outside; on demand, another host for the clients.
    pub fn set(bro: PathBuf, contenders: &[Contender], from_another_host: bool) -> Result<Self> {
        let container = Container::create()?;
        let other_host = from_another_host.then(other_host).transpose()?;
        let folder = Folder::create()?;
        let ports =
            (0..contenders.len()).map(|place| format!("{}:{}", Ipv4Addr::UNSPECIFIED, port_of(place)));
        let service = Self::service(Some(container.pid()), ports.collect(), 0, &folder.path("service.log"))?;
        let unix = folder.path("service.sock").display().to_string();
        let reference = Self::service(None, vec![unix], 0, &folder.path("reference.log"))?;
        Ok(Self { container, bro, folder, other_host, _service: service.0, _reference: reference.0 })
    }

    /// Starts a service and waits until it listens; its further lines.
    fn service(
        inside: Option<u32>,
        addresses: Vec<String>,
        startup_ms: u64,
        log: &Path,
    ) -> Result<(Launched, Lines)> {
        let launch = Launch { inside, ..Launch::default() };
        let (launched, lines) = Self::starting_service(launch, addresses, startup_ms, log)?;
        lines.until(Duration::from_secs(10), &mut Vec::new(), |line| line.starts_with("listening"))?;
        Ok((launched, lines))
    }

    /// Starts a service; its lines tell when it listens and when the first client came.
    pub fn starting_service(
        launch: Launch<'_>,
        addresses: Vec<String>,
        startup_ms: u64,
        log: &Path,
    ) -> Result<(Launched, Lines)> {
        let mut args = vec!["bench".into(), "service".into(), format!("--startup-ms={startup_ms}")];
        args.extend(addresses);
        let mut command = launch.command(this_task(), &args)?;
        let log = std::fs::File::create(log).context("a log file")?;
        let mut launched = Launched(command.stdout(Stdio::piped()).stderr(log).spawn()?);
        let lines = Lines::of(launched.stdout()?);
        Ok((launched, lines))
    }

    /// The namespaces to enter for what belongs inside.
    pub fn inside(&self, inside: bool) -> Option<u32> {
        inside.then(|| self.container.pid())
    }

    /// The namespaces to enter for clients.
    pub fn clients(&self, inside: bool) -> Option<u32> {
        self.inside(inside).or(self.other_host.as_ref().map(Container::pid))
    }

    /// Where clients reach what listens outside of the container.
    pub fn front(&self) -> Ipv4Addr {
        if self.other_host.is_some() { THIS_HOST } else { Ipv4Addr::LOCALHOST }
    }

    /// Where the unix reference listens.
    pub fn unix(&self) -> Address {
        Address::Unix(self.folder.path("service.sock"))
    }
}

/// The service's port for a contender.
pub fn port_of(place: usize) -> u16 {
    FIRST_PORT + u16::try_from(place).unwrap_or(0)
}

/// A folder that goes with the run.
pub struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self> {
        let base = std::env::temp_dir();
        remove_stale(&base);
        let path = base.join(format!("bro-bench-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        // Some programs do not run as root, and have to look in.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }

    /// A file or folder in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// What runs that were killed have left.
fn remove_stale(base: &Path) {
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix("bro-bench-")?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            std::fs::remove_dir_all(entry.path()).ok();
        }
    }
}
