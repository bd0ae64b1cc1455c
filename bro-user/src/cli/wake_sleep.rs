//! `bro wake` and `bro sleep`.

use clap::Args;

use crate::systemd::time_span::TimeSpan;

/// What both take.
#[derive(Debug, Args)]
pub struct Whom {
    /// The service: what was given to `bro activate`, or the unit that a forwarder starts
    #[arg(value_name = "NAME")]
    pub name: String,

    /// It is a service of this user (default for an ordinary user)
    #[arg(long, conflicts_with = "system")]
    pub user: bool,

    /// It is a service of the system (default for root)
    #[arg(long)]
    pub system: bool,
}

/// `bro wake`.
#[derive(Debug, Args)]
pub struct Wake {
    /// Whom.
    #[command(flatten)]
    pub whom: Whom,

    /// How long to wait until it is ready
    #[arg(long, value_name = "SPAN", default_value = "90s", value_parser = crate::systemd::time_span::limit)]
    pub timeout: TimeSpan,
}

/// `bro sleep`.
#[derive(Debug, Args)]
pub struct Sleep {
    /// Whom.
    #[command(flatten)]
    pub whom: Whom,

    /// Although clients are connected (they are reset), another forwarder uses it, or it was not bro that started it
    #[arg(long)]
    pub force: bool,
}
