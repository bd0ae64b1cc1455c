//! `--freeze`: the service is there, and none of its processes runs. Its targets stay as they were found; clients that come are
//! held until the control process has had the service go on.

use super::Engine;
use super::idle::Leave;
use crate::connection::End;
use crate::engine::protocol::Event;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frost {
    /// It goes on.
    None,
    /// It is frozen, or about to be.
    Frozen,
    /// A client waits for it, and the control process has been told.
    Thawing,
}

impl Engine {
    /// Holds the clients that come from now on, if it is time to leave; says whether.
    pub(super) fn freeze(&mut self, how: Leave) -> bool {
        let may = self.frost == Frost::None
            && self.backends.iter().any(super::targets::Backend::is_ready)
            && !self.backends.iter().any(super::targets::Backend::is_waking)
            && self.may_leave(how);
        if may {
            self.end_all(End::IdleExit);
            self.frost = Frost::Frozen;
        }
        may
    }

    /// A client waits for it.
    pub(super) fn ask_to_thaw(&mut self, peer: &str) {
        if self.frost == Frost::Frozen {
            self.frost = Frost::Thawing;
            self.outbox.tell(&Event::Thaw { peer: peer.to_owned() });
        }
    }

    /// It goes on.
    pub(super) fn thawed(&mut self) {
        if std::mem::replace(&mut self.frost, Frost::None) == Frost::None {
            return;
        }
        self.stats.now_idle();
        for index in self.held_by_frost() {
            self.place(index);
        }
        self.let_silent_clients_in();
    }
}
