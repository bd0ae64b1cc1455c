//! A service that has closed its listener while it lives. Nothing accepts for it, so this process does, only to reset: its clients are told what they would be told
//! without adoption. It takes the listener for no longer than that, so that the service has it again from its next listen(2) on.

use bro_relay::engine::listeners::ListenerUse;

use super::{ListenerHolder, SocketAdoption, reset_all};

impl SocketAdoption {
    /// Resets those that wait, and has the engine say when the next one does.
    pub(super) fn refuse(&mut self, index: usize) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        if self.claims.take_for_relay(index) {
            listener.holder = ListenerHolder::Closed;
            listener.guests = 0;
            reset_all(listener);
            self.claims.leave_as_relay(index);
            self.use_so(index, ListenerUse::WakeOnly);
        }
    }

    /// The container has ended: a client of one of these may wake it again.
    pub(super) fn watch_what_was_closed(&mut self, of: impl Iterator<Item = usize>) {
        for index in of {
            if matches!(self.listeners[index].holder, ListenerHolder::Closed) {
                self.watch(index);
            }
        }
    }
}
