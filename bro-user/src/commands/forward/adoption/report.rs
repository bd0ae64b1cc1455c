//! What `bro status` and systemd hear of adoption.

use std::time::SystemTime;

use super::fallback::Fallback;
use super::{ListenerHolder, SocketAdoption};
use crate::commands::status::AdoptionReport;

impl SocketAdoption {
    /// Of one listener.
    pub(in super::super) fn report(&self, index: usize) -> Option<AdoptionReport> {
        let listener = self.listeners.get(index)?;
        Some(match &listener.holder {
            ListenerHolder::Watched | ListenerHolder::Called | ListenerHolder::Returning => {
                AdoptionReport::Waiting
            }
            ListenerHolder::Service { since } => AdoptionReport::Adopted {
                since: since.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |span| span.as_secs()),
                connections: listener.guests,
            },
            ListenerHolder::Relay(why) => {
                AdoptionReport::Relayed { reason: why.kind(), why: self.with_refusal(why) }
            }
            ListenerHolder::Closed => AdoptionReport::Closed,
            ListenerHolder::Broken(why) => AdoptionReport::Broken { why: self.with_refusal(why) },
        })
    }

    /// Damage, with why it cannot be mended from here.
    fn with_refusal(&self, why: &Fallback) -> String {
        match (why, &self.mending.refused) {
            (Fallback::Damaged(damage), Some(refused)) => {
                format!("{damage}, and its socket unit cannot be started anew from here: {refused}")
            }
            _ => why.to_string(),
        }
    }

    /// In one line, while a service has a listener.
    pub(in super::super) fn said(&self) -> String {
        let connections = self.guests();
        let plural = if connections == 1 { "" } else { "s" };
        let relayed = self.listeners.iter().filter_map(|listener| match &listener.holder {
            ListenerHolder::Relay(why) => Some(format!("; {} is relayed: {why}", listener.name)),
            _ => None,
        });
        let said = format!("Adopted, {connections} connection{plural} now");
        relayed.fold(said, |said, one| said + &one)
    }
}
