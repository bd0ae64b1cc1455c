//! The command line of `bro helper`.

use std::ffi::OsString;

use clap::Args;

pub(super) const EXAMPLES: &str = "\
Examples:
  systemd's own proxy as a container's forwarder, in the network namespace of one with Network=none:
    ExecStart=bro helper --container systemd-web -- /usr/lib/systemd/systemd-socket-proxyd 127.0.0.1:80

  A look around in it, with the programs of the host:
    bro helper --container systemd-web -- ss --listening --numeric --tcp

CMD takes this process over, with its number, its environment and its descriptors: the sockets that systemd passed
(LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES) are CMD's. Nothing but the network namespace changes for the system's
containers. For a user's own, CMD is in the user namespace that owns that network namespace as well, where it holds every
capability, and nothing outside of it; it keeps the caller's user and groups, so files are the caller's as before.
Where that namespace says that this user is root, as Podman's does, CMD sees itself as root.

Exit status: CMD's own; 127 when there is no such command, 126 when it cannot be executed; before that 2 wrong usage;
3 the passed sockets are another process's; 4 no such process or container; 5 it is another user's.";

/// `bro helper`.
#[derive(Debug, Args)]
pub struct Helper {
    /// The process whose network namespace CMD is to be in
    #[arg(long, value_name = "PID", required_unless_present = "container", conflicts_with = "container", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,

    /// The running container of this user whose network namespace CMD is to be in
    #[arg(long, value_name = "NAME", value_parser = crate::address::container)]
    pub container: Option<String>,

    /// The command with its arguments
    #[arg(value_name = "CMD", last = true, required = true, num_args = 1..)]
    pub command: Vec<OsString>,
}
