//! What a forwarder with `--adopt` says of its first socket, in its report and its log.

use anyhow::{Context as _, Result, ensure};
use bro_user::commands::status::{AdoptionReport, Report};
use bro_user::fallback::FallbackKind;

use crate::forwarder::Forwarder;
use crate::peers::PATIENCE;
use crate::process;

/// Waits for such a line of the log.
pub fn says(forwarder: &Forwarder, text: &str) -> Result<String> {
    let line = forwarder.log().line(PATIENCE, |line| line.contains(text));
    line.with_context(|| format!("waiting for “{text}”"))
}

/// Of the first socket.
pub fn first(report: &Report) -> Option<&AdoptionReport> {
    report.listeners.first()?.adoption.as_ref()
}

/// Waits until the report says so of the first socket.
pub fn eventually(forwarder: &Forwarder, wanted: impl Fn(&AdoptionReport) -> bool) -> Result<Report> {
    let so = |report: &Report| first(report).is_some_and(&wanted);
    let found = process::eventually(PATIENCE, || forwarder.report().as_ref().is_ok_and(so));
    let report = forwarder.report()?;
    ensure!(found, "{:?}", first(&report));
    Ok(report)
}

/// Has the service it?
pub fn is_adopted(report: &AdoptionReport) -> bool {
    matches!(report, AdoptionReport::Adopted { .. })
}

/// Is it relayed, for this reason?
pub fn is_relayed(wanted: FallbackKind) -> impl Fn(&AdoptionReport) -> bool {
    move |report| matches!(report, AdoptionReport::Relayed { reason, .. } if *reason == wanted)
}
