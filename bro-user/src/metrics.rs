//! What a service's forwarders have counted, for a monitoring system: `bro metrics` prints it, and a forwarder with `--metrics`
//! answers requests for it.

pub mod endpoint;
mod exposition;
mod serve;

use crate::commands::status::{Report, list};

use exposition::Exposed;
pub(crate) use serve::{MetricsServer, Question};

/// The metrics of these services.
pub(crate) fn of(services: &[list::ListedService]) -> anyhow::Result<String> {
    exposition::text(services.iter().map(Exposed::of).collect())
}

/// The answer of one forwarder that serves them itself.
pub(crate) fn of_forwarder(report: Report) -> anyhow::Result<String> {
    exposition::text(vec![Exposed::of(&list::alone(report))])
}
