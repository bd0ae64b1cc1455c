//! A forwarder that runs with its old settings: it is started anew where that disturbs no client.

use anyhow::Context as _;

use crate::commands::status::{Report, ServiceState};
use crate::control_socket::{self, Request};
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

/// Starts the running forwarder anew, if it has no client. False where it has one, or where that is unknown.
pub(super) async fn unless_in_use(
    systemd: &SystemdManager,
    service: &str,
    scope: RuntimeScope,
) -> anyhow::Result<bool> {
    // A forwarder that systemd is starting, perhaps for the hundredth time, has no client: clients wait in the kernel's backlog.
    if systemd.active_state(service).await? == "active" {
        let report: anyhow::Result<Report> =
            control_socket::ask_soon(&control_socket::socket_of(service, scope), Request::Status).await;
        if !report.is_ok_and(|report| has_no_client(&report)) {
            return Ok(false);
        }
    }
    // A client that connects from here on waits in the socket's backlog, or may finish.
    let result = systemd.restart(service).await.with_context(|| format!("cannot restart {service}"))?;
    anyhow::ensure!(result == "done", "restarting {service} ended with “{result}”");
    Ok(true)
}

fn has_no_client(report: &Report) -> bool {
    report.total.guests() == 0
        && report.total.held == 0
        && report.waiting.is_none()
        && report.predecessor.is_none()
        && matches!(report.activity.state, ServiceState::Asleep | ServiceState::Awake | ServiceState::Busy)
}
