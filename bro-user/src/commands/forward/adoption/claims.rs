//! Who has each listener. The agent's thread and the control process both take them, at any time: a listener at which the relay accepts must not become
//! a service's, for O_NONBLOCK would be that one's to choose, and the relay could not be interrupted in accept(2) any more.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A listener's holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    None,
    Service,
    Relay,
}

/// Every listener's.
#[derive(Debug)]
pub(super) struct Claims(Mutex<Vec<Holder>>);

impl Claims {
    pub(super) fn new(count: usize) -> Self {
        Self(Mutex::new(vec![Holder::None; count]))
    }

    fn holders(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is it this one's from now on, or was already?
    fn take(&self, listener: usize, by: Holder) -> bool {
        match self.holders().get_mut(listener) {
            Some(holder) if *holder == Holder::None || *holder == by => {
                *holder = by;
                true
            }
            _ => false,
        }
    }

    fn leave(&self, listener: usize, by: Holder) {
        if let Some(holder) = self.holders().get_mut(listener).filter(|holder| **holder == by) {
            *holder = Holder::None;
        }
    }

    /// The agent is about to put it in the place of a service's socket.
    pub(super) fn take_for_service(&self, listener: usize) -> bool {
        self.take(listener, Holder::Service)
    }

    /// No service has it.
    pub(super) fn leave_as_service(&self, listener: usize) {
        self.leave(listener, Holder::Service);
    }

    /// The relay, or this process, is about to accept at it.
    pub(super) fn take_for_relay(&self, listener: usize) -> bool {
        self.take(listener, Holder::Relay)
    }

    /// Nothing here accepts at it any more.
    pub(super) fn leave_as_relay(&self, listener: usize) {
        self.leave(listener, Holder::Relay);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let claims = Claims::new(2);
        assert!(claims.take_for_service(0) && claims.take_for_service(0) && !claims.take_for_relay(0));
        claims.leave_as_relay(0);
        assert!(!claims.take_for_relay(0) && claims.take_for_relay(1));
        claims.leave_as_service(0);
        assert!(claims.take_for_relay(0) && !claims.take_for_service(0));
        assert!(!claims.take_for_service(2));
    }
}
