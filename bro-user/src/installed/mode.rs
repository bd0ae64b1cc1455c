//! The ways in which a service gets its clients, each with what only that way has.

use std::path::{Path, PathBuf};

use super::SocketUnit;
use super::connects::Connects;
use super::options::ForwardOptions;
use crate::adopt::Adopt;

/// How the service gets its clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// A forwarder takes the sockets, wakes the container and relays.
    Forward(Forwarder),
    /// The same, and while the container runs its service accepts at the sockets itself: the forwarder puts them in the place of the service's own
    /// (`--adopt`).
    Adopt(Adoption),
    /// No forwarder: the container itself takes the sockets over (`--direct`).
    Direct(Takeover),
}

/// The forwarder of an activated service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarder {
    /// Its unit's file.
    pub service_file: PathBuf,
    /// The bro that its unit runs.
    pub program: PathBuf,
    /// The container with the network namespace of the service; none where clients are not forwarded into one.
    pub container: Option<String>,
    /// The container was named by `--container`, not taken from the quadlet.
    pub container_given: bool,
    /// What `bro forward` is given beyond that.
    pub options: ForwardOptions,
}

/// What a forwarder that has its sockets adopted needs besides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adoption {
    /// The forwarder.
    pub forwarder: Forwarder,
    /// Which of its sockets.
    pub what: Adopt,
    /// The container's seccomp profile, by which the forwarder hears of its listen(2).
    pub profile: PathBuf,
    /// The profile that it is made of.
    pub source: PathBuf,
    /// Where the OCI runtime hands the container's notifications over.
    pub agent: SocketUnit,
    /// `--trust-loopback`: the service may take clients of this host for its own users.
    pub trusts_loopback: bool,
    /// `--adopt-connect`, where it was given.
    pub connects: Option<Connects>,
}

impl Adoption {
    /// The adoption of the service `name`, whose units are in `directory`.
    #[must_use]
    pub fn new(name: &str, forwarder: Forwarder, source: PathBuf, directory: &Path) -> Self {
        Self {
            forwarder,
            what: Adopt::On,
            profile: directory.join(profile_of(name)),
            source,
            agent: SocketUnit::new(agent_of(name), directory),
            trusts_loopback: false,
            connects: None,
        }
    }
}

/// The file of a container's seccomp profile.
pub(crate) fn profile_of(name: &str) -> String {
    format!("{name}-activator-seccomp.json")
}

/// The socket unit at which its notifications arrive.
pub(crate) fn agent_of(name: &str) -> String {
    format!("{name}-activator-seccomp.socket")
}

/// What a container that takes its sockets over needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Takeover {
    /// How its program finds them.
    pub way: Way,
    /// The unit that makes its namespaces, with `--restrict-network`.
    pub pause_unit: Option<PathBuf>,
}

/// How a container's program finds the sockets that were passed to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The variable NGINX names the descriptors.
    Nginx,
    /// It reads LISTEN_FDS (sd_listen_fds(3)).
    ListenFds,
}

impl Way {
    /// As it is noted in a unit, and written after `--direct=`.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::ListenFds => "listen-fds",
        }
    }
}
