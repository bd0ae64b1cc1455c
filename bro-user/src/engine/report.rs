//! The engine's figures, put together when somebody asks.

use super::Engine;
use crate::stats::Tally;

impl Engine {
    /// Each listener's tally, with what the connections of this moment have moved so far.
    pub(super) fn tallies(&self) -> Vec<Tally> {
        let mut tallies = self.tallies.clone();
        for (_, connection) in &self.connections {
            let tally = &mut tallies[connection.listener];
            tally.open += 1;
            if connection.is_held() {
                tally.held += 1;
            }
            for lane in connection.lanes() {
                super::lanes::add(tally, &lane.snapshot());
            }
        }
        tallies
    }
}
