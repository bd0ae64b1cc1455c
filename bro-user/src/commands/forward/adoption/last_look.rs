//! The last look before a service is stopped that accepts its clients itself (`service/last_look.rs`).

use super::{Guests, SocketAdoption};
use crate::commands::forward::control::Control;
use crate::service::last_look::ToldToStop;

/// What the last look has shown.
pub(in super::super) enum LastLook {
    /// A client is there: the service runs on.
    Client,
    /// None; the service has its stop signal, where it could be had still for that.
    None(Option<ToldToStop>),
}

impl Control<'_> {
    /// Looks once more, while the service cannot accept. `told`: it is to sleep because it was told to, and not for its idleness;
    /// `by_force`, whatever is connected.
    pub(in super::super) async fn last_look(&mut self, told: bool, by_force: bool) -> LastLook {
        let accepts = self.adoption.as_ref().filter(|adoption| adoption.is_adopted() && !by_force);
        let signal =
            accepts.and_then(|adoption| adoption.stop_signal).filter(|_| self.life.freezing.is_off());
        let Some(signal) = signal else { return LastLook::None(None) };
        let activator = self.life.activator.clone();
        let Some(frozen) = activator.freeze_for_last_look(signal).await else { return LastLook::None(None) };
        let guests = self.look_for_guests();
        let there = if told {
            self.adoption.as_ref().is_some_and(SocketAdoption::has_guests)
        } else {
            guests != Guests::None
        };
        if there {
            activator.goes_on(frozen).await;
            tracing::debug!("a client has come at the last moment; the service runs on");
            LastLook::Client
        } else {
            LastLook::None(Some(frozen.tell_to_stop().await))
        }
    }
}
