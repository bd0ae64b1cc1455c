//! Who has each listener. The agent's thread and the control process both take them, at any time: a listener at which the relay accepts must not become
//! a service's, for O_NONBLOCK would be that one's to choose, and the relay could not be interrupted in accept(2) any more.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a service's listen(2) waits for the relay to accept no more at a listener where it only sifts: two messages between two processes.
const YIELDS_WITHIN: Duration = Duration::from_secs(2);

/// A listener's holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    None,
    Service,
    Relay,
    /// The relay, until a service wants it (`--wake-on=data`, `--wake-ignore`).
    Sieve,
}

/// Every listener's.
#[derive(Debug)]
pub(super) struct Claims {
    holders: Mutex<Vec<Holder>>,
    /// A sieve has been left.
    left: Condvar,
}

impl Claims {
    pub(super) fn new(count: usize) -> Self {
        Self { holders: Mutex::new(vec![Holder::None; count]), left: Condvar::new() }
    }

    fn holders(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is it this one's from now on, or was already?
    fn take(&self, listener: usize, by: Holder) -> bool {
        match self.holders().get_mut(listener) {
            Some(holder)
                if *holder == Holder::None
                    || *holder == by
                    || (*holder, by) == (Holder::Sieve, Holder::Relay) =>
            {
                *holder = by;
                true
            }
            _ => false,
        }
    }

    fn leave(&self, listener: usize, by: Holder) {
        if let Some(holder) = self.holders().get_mut(listener).filter(|holder| **holder == by) {
            *holder = Holder::None;
            self.left.notify_all();
        }
    }

    /// Does the relay only sift there?
    pub(super) fn is_sieve(&self, listener: usize) -> bool {
        self.holders().get(listener) == Some(&Holder::Sieve)
    }

    /// The agent is about to put it in the place of a service's socket. Waits, but not for ever, for a sieve to be left.
    pub(super) fn take_for_service(&self, listener: usize) -> bool {
        let is_sieve = |holders: &mut Vec<Holder>| holders.get(listener) == Some(&Holder::Sieve);
        let waited = self.left.wait_timeout_while(self.holders(), YIELDS_WITHIN, is_sieve);
        drop(waited);
        self.take(listener, Holder::Service)
    }

    /// The relay is about to accept at it, until a service wants it.
    pub(super) fn take_for_sieve(&self, listener: usize) -> bool {
        self.take(listener, Holder::Sieve)
    }

    /// It accepts there no more.
    pub(super) fn leave_as_sieve(&self, listener: usize) {
        self.leave(listener, Holder::Sieve);
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

    #[test]
    fn a_service_waits_for_a_sieve_to_be_left_and_the_relay_does_not() {
        let claims = Claims::new(1);
        assert!(claims.take_for_sieve(0) && claims.is_sieve(0));
        std::thread::scope(|scope| {
            let service = scope.spawn(|| claims.take_for_service(0));
            assert!(!service.is_finished() && claims.is_sieve(0));
            claims.leave_as_sieve(0);
            assert!(service.join().unwrap());
        });
        assert!(!claims.take_for_sieve(0));
        claims.leave_as_service(0);
        assert!(claims.take_for_sieve(0) && claims.take_for_relay(0) && !claims.take_for_service(0));
    }
}
