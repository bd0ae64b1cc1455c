//! `bro fence`'s options.

use clap::Args;

/// `bro fence`.
#[derive(Debug, Args)]
pub struct Fence {
    /// Around the sockets of this user's own service manager, instead of those of the socket unit that runs this
    #[arg(long, value_name = "UID", conflicts_with_all = ["this_host", "port"])]
    pub user: Option<u32>,

    /// Have services see clients of this host's loopback interface by 169.254.1.2 or fd62:726f::2, as behind a forwarder, and not as clients of their own host
    #[arg(long)]
    pub this_host: bool,

    /// Have services see the external port as the internal one; some answer no client otherwise
    #[arg(long, value_name = "EXTERNAL:INTERNAL", value_parser = ports)]
    pub port: Vec<(u16, u16)>,
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let both = text.split_once(':').and_then(|(external, internal)| {
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        Some((port(external)?, port(internal)?))
    });
    both.ok_or_else(|| "two ports, as in 8080:80".to_owned())
}
