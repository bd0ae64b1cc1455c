//! The clients of a service that accepts them itself: they are not seen coming, so the kernel is asked from time to time who is there, and tells
//! of those that came and went meanwhile.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use bro_adopt::clients::{self, Counting, EndedClients, Uncountable};
use tokio::time::Instant;

use super::{ListenerHolder, SocketAdoption};

/// The shortest time between two looks, and the longest.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(10);

/// How often to look, with this idle time: often enough for a short one, and to be of use in a status.
fn step(idle_time: Duration) -> Duration {
    (idle_time / 16).clamp(SHORTEST, LONGEST)
}

/// What a look has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Guests {
    /// A client, or it cannot be seen.
    There,
    /// None any more: the last one has left since the look before, which may not have seen it.
    Left,
    /// None, as at the look before.
    None,
}

/// How it is heard of clients that come and go between two looks.
#[derive(Debug)]
pub(super) enum ShortGuests {
    /// No service has a listener.
    NotHeard,
    /// Of these listeners, by their places.
    Heard { of: Vec<usize>, ended: EndedClients },
    /// Of these it is not heard: the kernel does not tell, or none is TCP's.
    Silent { of: Vec<usize> },
}

impl ShortGuests {
    /// Those of these listeners, from now on.
    fn hear_of(&mut self, adopted: &[usize], sockets: &[BorrowedFd<'_>]) {
        let (Self::Heard { of, .. } | Self::Silent { of }) = self else {
            if !adopted.is_empty() {
                *self = Self::begin(adopted, sockets);
            }
            return;
        };
        if adopted.is_empty() {
            *self = Self::NotHeard;
        } else if of != adopted {
            *self = Self::begin(adopted, sockets);
        }
    }

    fn begin(adopted: &[usize], sockets: &[BorrowedFd<'_>]) -> Self {
        let of = adopted.to_vec();
        match EndedClients::of(sockets) {
            Ok(Some(ended)) => Self::Heard { of, ended },
            Ok(None) => Self::Silent { of },
            Err(error) => Self::fails(of, &error),
        }
    }

    fn fails(of: Vec<usize>, error: &Uncountable) -> Self {
        tracing::debug!("clients that come and go between two looks are not seen: {error}");
        Self::Silent { of }
    }

    /// Has one gone since the last time?
    fn any(&mut self, sockets: &[BorrowedFd<'_>]) -> bool {
        let Self::Heard { of, ended } = self else { return false };
        match ended.any(sockets) {
            Ok(any) => any,
            Err(error) => {
                *self = Self::fails(std::mem::take(of), &error);
                false
            }
        }
    }
}

impl SocketAdoption {
    /// Looks who is connected to services, or waits to be.
    pub(super) fn look(&mut self, idle_time: Duration) -> Guests {
        let is_adopted = |holder: &ListenerHolder| matches!(holder, ListenerHolder::Service { .. });
        let adopted: Vec<usize> =
            (0..self.listeners.len()).filter(|index| is_adopted(&self.listeners[*index].holder)).collect();
        self.look_at = (!adopted.is_empty()).then(|| Instant::now() + step(idle_time));
        let sockets: Vec<BorrowedFd<'_>> =
            adopted.iter().map(|index| self.listeners[*index].socket.as_fd()).collect();
        let before = self.guests();
        // Before it is counted: one that is there in between is counted.
        self.short_guests.hear_of(&adopted, &sockets);
        let gone = self.short_guests.any(&sockets);
        match count(&sockets) {
            Ok(counts) => {
                for (index, count) in adopted.into_iter().zip(&counts) {
                    self.listeners[index].guests = *count;
                }
                match counts.iter().sum() {
                    0 if before == 0 && !gone => Guests::None,
                    0 => Guests::Left,
                    _ => Guests::There,
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.blind, true) {
                    tracing::warn!(
                        "it cannot be seen who is connected to the service, so it is not put to sleep for idleness: {error}"
                    );
                }
                Guests::There
            }
        }
    }

    /// How many were connected at the last look.
    pub(in super::super) fn guests(&self) -> u64 {
        self.listeners.iter().map(|listener| listener.guests).sum()
    }
}

/// How many each has: those that are served, and those that wait for that.
pub(super) fn count(listeners: &[BorrowedFd<'_>]) -> Result<Vec<u64>, Uncountable> {
    let counts = clients::count(listeners, &Counting::ALL)?;
    Ok(counts.into_iter().map(|clients| clients.served + u64::from(clients.queued)).collect())
}
