//! bind(2): an original that is kept for clients inside must not be in the way of the service's next socket.

use std::os::fd::{AsFd as _, RawFd};

use nix::sys::socket::{setsockopt, sockopt};

use super::Agent;
use crate::caller::Caller;
use crate::notification::{Answer, Raw};
use crate::original::Original;
use crate::socket::look;
use crate::surroundings::Surroundings;

impl<S: Surroundings> Agent<S> {
    /// A supervised restart, or a binary upgrade whose new process does not recognise what it inherits, binds the same address again. Only
    /// here is a process's memory read, and nothing else depends on it: after a lie clients inside are not relayed until the next
    /// listen(2). The kernel makes the call itself.
    pub(super) fn bind(&mut self, caller: &Caller<'_>, notification: &Raw) -> Option<Answer> {
        if !self.originals.is_empty() {
            let [number, address, length, ..] = notification.arguments;
            let next = caller.duplicate(number as RawFd).ok();
            let next = next.and_then(|next| look(next.as_fd()).map(|seen| (next, seen.family)));
            if let Some(((next, family), address)) = next.zip(caller.address_at(address, length)) {
                let (in_the_way, kept) = std::mem::take(&mut self.originals)
                    .into_iter()
                    .partition(|original: &Original| original.is_in_the_way_of(family, address));
                self.originals = kept;
                // Most services set it themselves, since they would not be started twice in a minute without (tcp(7), TIME_WAIT).
                if !in_the_way.is_empty()
                    && let Err(error) = setsockopt(&next, sockopt::ReuseAddr, &true)
                {
                    tracing::debug!(%error, "an address may still be taken when the service binds it");
                }
                self.let_go(in_the_way);
            }
        }
        Some(Answer::Continue)
    }
}
