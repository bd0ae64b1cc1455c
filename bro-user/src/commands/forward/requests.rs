//! What callers ask a forwarder: over its control socket (`bro status`, `bro wake`, `bro sleep`), and for metrics (`--metrics`).

use crate::control_socket::{self, Asked, Asker, Request};
use crate::metrics;

/// A caller's question, with where to answer.
#[derive(Debug)]
pub(super) enum CallerRequest {
    Status(Asker),
    Wake(Asker),
    Sleep { force: bool, asker: Asker },
    Metrics(metrics::Question),
}

/// Where callers ask.
#[derive(Debug)]
pub(super) struct Requests {
    control: Option<control_socket::ControlServer>,
    metrics: Option<metrics::MetricsServer>,
}

impl Requests {
    /// Listens for them from now on.
    pub(super) fn start(metrics: Option<metrics::MetricsServer>) -> Self {
        Self { control: control_socket::ControlServer::start_or_warn(), metrics }
    }

    /// Waits for a question; for ever where there is no place to ask at. Nothing is lost when this is cancelled.
    pub(super) async fn next(&mut self) -> CallerRequest {
        loop {
            tokio::select! {
                asked = asked(&mut self.control) => match asked {
                    Ok(Asked { request: Request::Status, to }) => return CallerRequest::Status(to),
                    Ok(Asked { request: Request::Wake, to }) => return CallerRequest::Wake(to),
                    Ok(Asked { request: Request::Sleep { force }, to }) => return CallerRequest::Sleep { force, asker: to },
                    Err(error) => {
                        tracing::warn!(%error, "this forwarder can be asked nothing any more");
                        self.control = None;
                    }
                },
                asker = metrics_asked(&mut self.metrics) => return CallerRequest::Metrics(asker),
            }
        }
    }

    /// A successor that has failed may have put its own socket in this one's place.
    pub(super) fn listen_anew(&mut self) {
        // The old one removes its file, so it goes first.
        self.control = None;
        self.control = control_socket::ControlServer::start_or_warn();
    }

    /// A successor speaks for the service.
    pub(super) fn is_succeeded(&mut self) {
        if let Some(control) = &mut self.control {
            control.is_succeeded();
        }
    }

    /// Serves metrics from now on, now that the other process does not any more.
    pub(super) fn serve_metrics(&mut self, endpoint: Option<&metrics::endpoint::Endpoint>) {
        match endpoint.map(metrics::MetricsServer::start) {
            Some(Ok(server)) => self.metrics = Some(server),
            // That is no reason to end the clients' connections.
            Some(Err(error)) => tracing::error!("{error:#}; going on without"),
            None => {}
        }
    }

    /// The other process listens for them from now on.
    pub(super) fn leave_metrics(&mut self) {
        self.metrics = None;
    }
}

async fn asked(server: &mut Option<control_socket::ControlServer>) -> std::io::Result<Asked> {
    match server {
        Some(server) => server.asked().await,
        None => std::future::pending().await,
    }
}

async fn metrics_asked(server: &mut Option<metrics::MetricsServer>) -> metrics::Question {
    match server {
        Some(server) => server.asked().await,
        None => std::future::pending().await,
    }
}
