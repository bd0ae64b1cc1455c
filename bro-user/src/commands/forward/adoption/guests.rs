//! The clients of a service that accepts them itself: they are not seen coming, so the kernel is asked from time to time who is there, and tells
//! of those that came and went meanwhile. A socket for datagrams has no clients, and is asked when one came.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use bro_adopt::clients::{self, EndedClient, EndedClients, Uncountable};
use tokio::time::Instant;

use super::traffic::TrafficSeen;
use super::{FrozenService, ListenerHolder, SocketAdoption};

/// The shortest time between two looks, and the longest.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(10);

/// How often to look, with this idle time: often enough for a short one, and to be of use in a status.
fn step(idle_time: Duration) -> Duration {
    (idle_time / 16).clamp(SHORTEST, LONGEST)
}

/// A look takes no more than one part of so many of this process's time, however many connections there are: then the next one comes later.
const ONE_PART_OF: u32 = 20;

/// What a look has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Guests {
    /// One that keeps the service awake, or it cannot be seen.
    There,
    /// None any more: the last one has left since the look before, which may not have seen it.
    Left,
    /// None that has moved bytes, where those count; but one has come of late, and may be about to until then.
    Fresh(Instant),
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
    fn any(&mut self, sockets: &[BorrowedFd<'_>], counts: &mut dyn FnMut(&EndedClient) -> bool) -> bool {
        let Self::Heard { of, ended } = self else { return false };
        match ended.any(sockets, counts) {
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
        let any = !adopted.is_empty();
        let (had_come, come) = self.look_for_datagrams(&adopted);
        let adopted: Vec<usize> =
            adopted.into_iter().filter(|index| self.listeners[*index].datagrams.is_none()).collect();
        let sockets: Vec<BorrowedFd<'_>> =
            adopted.iter().map(|index| self.listeners[*index].socket.as_fd()).collect();
        let (before, now) = (self.present, Instant::now());
        // Before it is counted: one that is there in between is counted.
        self.short_guests.hear_of(&adopted, &sockets);
        let (traffic, inside, std_now) = (&mut self.traffic, &self.inside, now.into_std());
        let gone = self
            .short_guests
            .any(&sockets, &mut |gone| !inside.has(gone.end, std_now) && traffic.counts_gone(gone, std_now));
        let mut counts = vec![0_u64; adopted.len()];
        let mut seen = traffic.begin();
        let waiting = clients::look(&sockets, traffic.with_bytes(), &mut |client| {
            if inside.has(client.end, std_now) {
                return;
            }
            if let Some(count) = counts.get_mut(client.listener) {
                *count += 1;
            }
            traffic.served(client, &mut seen, std_now, idle_time);
        });
        traffic.end();
        let step = match traffic.step(idle_time) {
            Some(step) if self.frozen == FrozenService::No => step,
            _ => step(idle_time),
        };
        let next = step.max(now.elapsed() * ONE_PART_OF);
        self.looked = Some(now);
        self.look_at = any.then(|| Instant::now() + next);
        match waiting {
            Ok(waiting) => {
                for ((index, count), waiting) in adopted.into_iter().zip(counts).zip(waiting) {
                    self.listeners[index].guests = count + u64::from(waiting);
                    seen.wait(waiting);
                }
                self.present = Some(seen.present + u64::from(come));
                self.stirred = seen.stirs || come;
                match what(&seen, self.traffic.counts_bytes(), before.unwrap_or(0), gone) {
                    _ if come => Guests::There,
                    Guests::None if had_come => Guests::Left,
                    found => found,
                }
            }
            Err(error) => {
                (self.present, self.stirred) = (None, false);
                if !std::mem::replace(&mut self.blind, true) {
                    tracing::warn!(
                        "it cannot be seen who is connected to the service, so it is not put to sleep for idleness: {error}"
                    );
                }
                Guests::There
            }
        }
    }

    /// Was the last look long ago, for a status?
    pub(in super::super) fn is_stale(&self) -> bool {
        self.is_adopted() && self.looked.is_none_or(|looked| looked.elapsed() >= SHORTEST)
    }

    /// Was a client there at the last look that is not ignored, whatever it did? Yes, where it cannot be seen.
    pub(in super::super) fn has_guests(&self) -> bool {
        self.present.is_none_or(|present| present > 0)
    }

    /// How many were connected at the last look, with those that are ignored.
    pub(in super::super) fn guests(&self) -> u64 {
        self.listeners.iter().map(|listener| listener.guests).sum()
    }
}

/// What a look has found: `before`, so many clients were there at the last one; `gone`, and another one has come and gone since.
fn what(seen: &TrafficSeen, by_bytes: bool, before: u64, gone: bool) -> Guests {
    let has_left = gone || (!by_bytes && before > 0);
    match seen.fresh_until {
        _ if seen.keeps_awake => Guests::There,
        _ if has_left => Guests::Left,
        Some(until) => Guests::Fresh(Instant::from_std(until)),
        None => Guests::None,
    }
}
