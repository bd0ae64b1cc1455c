//! `bro loader`.

use std::path::PathBuf;

use clap::Args;

pub(super) const EXAMPLES: &str = "\
Examples:
  For the user with the number 1000, from now on and after each boot:
    systemctl enable --now bro-loader@1000

  By hand, and away again:
    bro loader alice
    bro loader --remove alice

The programs look at the user's own cgroup (user-UID.slice) and take hold of sockets of that user and of the users of that
user's containers (/etc/subuid) only. They and their memory are pinned below /run/bro/bpf/UID, as files of that user alone. With the default
for --connections that is some 4 MB for each user.

A set that is loaded again takes the place of the old one in one step; forwarders that use the old one keep it until they end.";

/// `bro loader`.
#[derive(Debug, Args)]
pub struct Loader {
    /// The user, by name or number
    #[arg(value_name = "USER")]
    pub user: String,

    /// Take them away; forwarders that use them go on with them until they end
    #[arg(long)]
    pub remove: bool,

    /// How many connections of each of the user's forwarders, of which there may be 16, can take the kernel relay
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub connections: u32,

    /// The cgroup to look at, instead of the user's slice
    #[arg(long, value_name = "PATH", hide = true)]
    pub cgroup: Option<PathBuf>,
}
