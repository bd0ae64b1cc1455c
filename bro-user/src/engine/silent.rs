//! `--wake-on=data`: clients of a sleeping service that have not said anything yet. They wake nothing; their first byte does.
//! They count as connections, but where there is no room for another client, the one that has been silent longest makes room:
//! a scanner cannot shut anybody out by holding its connections open.

use std::os::fd::AsFd as _;
use std::time::Instant;

use super::Engine;
use crate::connection::{End, Stage};
use crate::sys::{Waiting, look};

impl Engine {
    /// Is a client to wait for its first byte? Not when the container is awake, or about to be: then nothing is saved, and a
    /// service that speaks first may speak.
    pub(super) fn are_bytes_to_wake(&self) -> bool {
        self.settings.wake_on_data && self.backends.iter().all(super::backends::Backend::is_asleep)
    }

    /// Has the client wait for its first byte, which may be there already, as its end may.
    pub(super) fn wait_for_a_byte(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        connection.stage = Stage::Silent;
        let _none = self.silent.insert(connection.number, index);
        self.register(index);
        self.silent_client_stirred(index);
    }

    /// A silent client has sent, finished or reset.
    pub(super) fn silent_client_stirred(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        match look(connection.client.as_fd()) {
            Waiting::Byte => {
                let _index = self.silent.remove(&connection.number);
                // From now on it waits for the service.
                connection.active = Instant::now();
                self.hold(index, false);
            }
            Waiting::Nothing => {}
            Waiting::End | Waiting::Abort(_) => self.finish(index, End::ClientLeft),
        }
    }

    /// The container is awake: whoever is silent is let through to it, each to its own target.
    pub(super) fn let_silent_clients_in(&mut self) {
        for index in std::mem::take(&mut self.silent).into_values() {
            self.connections[index].active = Instant::now();
            self.place(index);
        }
    }

    /// Ends the one that has been silent longest; false when there is none.
    pub(super) fn make_room(&mut self) -> bool {
        let Some((_, &index)) = self.silent.first_key_value() else { return false };
        self.finish(index, End::IdleTimeout);
        true
    }
}
