//! The engine's figures, put together on request.

use serde::{Deserialize, Serialize};
use slab::Slab;

use crate::connection::{Connection, Stage};
use crate::stats::Tally;

/// The most clients that an answer names.
pub(super) const MOST_PEERS: usize = 20;

/// What a report takes from the engine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Each listener's.
    pub tallies: Vec<Tally>,
    /// The clients that are connected and keep the service awake, the first twenty.
    pub peers: Vec<String>,
}

/// The figures of this moment; `tallies` are of what has ended.
pub(super) fn figures(connections: &Slab<Connection>, mut tallies: Vec<Tally>) -> Figures {
    for (_, connection) in connections {
        let tally = &mut tallies[connection.listener];
        tally.open += 1;
        match connection.stage() {
            Stage::Held => tally.held += 1,
            Stage::Silent => tally.silent += 1,
            _ => {}
        }
        for (sink, lane) in connection.lanes() {
            super::lanes::add(tally, sink, &lane.snapshot());
        }
    }
    // A client that has said nothing is no guest yet, and neither is one that keeps nothing awake.
    let guests =
        connections.iter().filter(|(_, guest)| !guest.ignored && !matches!(guest.stage(), Stage::Silent));
    let peers = guests.take(MOST_PEERS).map(|(_, guest)| guest.peer.to_string()).collect();
    Figures { tallies, peers }
}
