//! How does the service see its clients? Rights that it grants only to its own host must not go to a stranger.

use super::{Check, listens};
use crate::commands::status::Report;
use crate::control_socket::{self, Request};
use crate::installed::{Forwarder, Installed};

const NAME: &str = "clients";

/// As the forwarder says, if it runs and has woken the service; else as planned.
pub(super) async fn check(installed: &Installed, forwarder: &Forwarder) -> Check {
    if forwarder.options.get("source") == Some("loopback") {
        return Check::less(
            NAME,
            "the service sees every client as one of its own host (--source loopback), and grants it what it grants those",
            format!(
                "`{} {} --source auto`, unless that is wanted",
                listens::activate(installed),
                installed.name
            ),
        );
    }
    if installed.adoption().is_some() {
        return Check::ok(
            NAME,
            "the service sees its clients' own addresses where it has adopted a socket, and those of this host as 127.0.0.1",
        );
    }
    let seen = match installed.service() {
        Some(service) => said(&service, installed).await,
        None => Vec::new(),
    };
    if !seen.is_empty() {
        return Check::ok(NAME, seen.join("; "));
    }
    Check::ok(
        NAME,
        match forwarder.options.get("source") {
            Some("client") => "the service is going to see clients by their own addresses",
            Some("container") => "the service is going to see clients by the container's own address",
            _ => {
                "the service is going to see clients by their own addresses where the container has no network, and else by the \
                 container's own"
            }
        },
    )
}

/// What its forwarder says of each target.
async fn said(service: &str, installed: &Installed) -> Vec<String> {
    let path = control_socket::socket_of(service, installed.scope);
    let Ok(report) = control_socket::ask_soon::<Report>(&path, Request::Status).await else {
        return Vec::new();
    };
    let listeners = report.listeners.into_iter();
    let mut said: Vec<String> = listeners
        .filter_map(|listener| {
            Some(format!("the service at {} sees clients {}", listener.target, listener.seen?))
        })
        .collect();
    said.dedup();
    said
}
