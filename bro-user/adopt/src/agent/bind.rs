//! bind(2): an original that is kept for clients inside must not be in the way of the service's next socket, and one for datagrams is adopted.

use std::os::fd::{AsFd as _, RawFd};

use super::Agent;
use crate::caller::Caller;
use crate::notification::{Answer, Raw};
use crate::receiver::Role;
use crate::socket::look;
use crate::surroundings::Surroundings;

impl<S: Surroundings> Agent<S> {
    /// A supervised restart, or a binary upgrade whose new process does not recognise what it inherits, binds the same address again. For
    /// that hint a process's memory is read, and nothing else depends on it: after a lie clients inside are not relayed until the next
    /// listen(2). The kernel makes the call itself.
    pub(super) fn bind(
        &mut self,
        (by, role): (u64, Role),
        caller: &Caller<'_>,
        notification: &Raw,
    ) -> Option<Answer> {
        if self.originals.is_empty() && !self.has_datagrams() {
            return Some(Answer::Continue);
        }
        let [number, address, length, ..] = notification.arguments;
        let socket = caller.duplicate(number as RawFd).ok();
        let Some((seen, socket)) = socket.and_then(|socket| Some((look(socket.as_fd())?, socket))) else {
            return Some(Answer::Continue);
        };
        if seen.family.is_datagrams() && self.has_datagrams() && role == Role::Container {
            return self.bind_datagrams(by, caller, notification, (socket, seen));
        }
        if let Some(address) = caller.address_at(address, length) {
            self.clear_the_way(&seen, address);
        }
        Some(Answer::Continue)
    }
}
