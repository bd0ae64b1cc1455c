//! What a service's forwarders have counted, for a monitoring system: `bro metrics` prints it, and a forwarder with `--metrics` answers
//! requests for it.

pub mod endpoint;
mod exposition;
pub(crate) mod ledger;
mod serve;

use std::io::Write as _;

use crate::activate::bus::Manager;
use crate::exit;
use crate::status::{Report, services};

pub(crate) use exposition::Exposed;
pub use ledger::{Counts, Own};
pub(crate) use serve::{Question, Server};

/// Runs `bro metrics`.
///
/// # Errors
/// When the unit directory cannot be read.
pub fn run(options: &crate::cli::Metrics) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let services = runtime.block_on(services::all(Manager::choose(options.system, options.user)))?;
    let text = exposition::text(services.iter().map(Exposed::of).collect())?;
    exit::unless_nobody_reads(std::io::stdout().lock().write_all(text.as_bytes()).map_err(Into::into))
}

/// The answer of one forwarder that serves them itself.
pub(crate) fn of_forwarder(report: Report) -> anyhow::Result<String> {
    exposition::text(vec![Exposed::of(&services::alone(report))])
}
