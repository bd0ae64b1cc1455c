//! The ways in which a service gets its clients, each with what only that way has.

use std::path::PathBuf;

use super::options::ForwardOptions;

/// How the service gets its clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// A forwarder takes the sockets, wakes the container and relays.
    Forward(Forwarder),
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
