//! What `bro status` and systemd hear of adoption.

use std::time::SystemTime;

use super::fallback::Fallback;
use super::{ListenerHolder, OfferedListener, SocketAdoption};
use crate::commands::status::{AdoptionReport, DatagramsReport};

impl OfferedListener {
    /// What has come to it, if it is for datagrams.
    fn datagrams(&self) -> Option<DatagramsReport> {
        self.datagrams.as_ref().map(|seen| seen.report(&self.socket))
    }
}

impl SocketAdoption {
    /// Of one listener.
    pub(in super::super) fn report(&self, index: usize) -> Option<AdoptionReport> {
        let listener = self.listeners.get(index)?;
        Some(match &listener.holder {
            ListenerHolder::NotOffered => {
                let why = Fallback::never_adopted(listener.kind)?;
                AdoptionReport::Relayed { reason: why.kind(), why: why.to_string() }
            }
            ListenerHolder::Watched
            | ListenerHolder::Sifted
            | ListenerHolder::Yielding { .. }
            | ListenerHolder::Called
            | ListenerHolder::Returning => AdoptionReport::Waiting,
            ListenerHolder::Service { since } => AdoptionReport::Adopted {
                since: since.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |span| span.as_secs()),
                connections: listener.guests,
                datagrams: listener.datagrams(),
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
        let adopted = || {
            self.listeners.iter().filter(|listener| matches!(listener.holder, ListenerHolder::Service { .. }))
        };
        // The latest of all.
        let datagrams = adopted().filter_map(OfferedListener::datagrams).max();
        let plural = if connections == 1 { "" } else { "s" };
        let relayed = self.listeners.iter().filter_map(|listener| match &listener.holder {
            ListenerHolder::Relay(why) => Some(format!("; {} is relayed: {why}", listener.name)),
            _ => None,
        });
        let mut said = "Adopted".to_owned();
        if datagrams.is_none() || adopted().any(|listener| listener.datagrams.is_none()) {
            said += &format!(", {connections} connection{plural} now");
        }
        if let Some(datagrams) = datagrams {
            said += &format!(", {datagrams}");
        }
        relayed.fold(said, |said, one| said + &one)
    }
}
