//! The stages of a connection, and which may follow which. A stage changes in [`Connection::set_stage`] and nowhere else.
//!
//! ```text
//! accept ─▶ Admitted ─▶ Introducing ─▶ Admitted      a balancer in front says who the client is (--accept-proxy)
//!              │
//!              ├─▶ Silent ─▶ Held                    the client's first byte wakes the service (--wake-on=data)
//!              ├─▶ Held ────────┐                    the service is being woken
//!              ▼                ▼
//!           AwaitingSocket ─▶ Connecting ─▶ Relaying ─▶ closed
//!              ▲    │            │
//!              │    └─▶ Held     │                   it refuses, or has gone to sleep: it is waited for again
//!              └─────────────────┘                   the next address, or the same one once more
//! ```
//!
//! A connection may be closed in any of them.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::{Abort, Connection, Registration};
use crate::proxy_protocol::Incoming;
use crate::relay::{Direction, Side};

/// Where in its story a connection is.
#[derive(Debug)]
pub enum Stage {
    /// It is about to be decided how it goes on: nothing of the kernel's is waited for.
    Admitted,
    /// A trusted balancer in front has connected; its header says who the client is (`--accept-proxy`).
    Introducing(Box<Incoming>),
    /// The service sleeps, and only a byte of the client's wakes it (`--wake-on=data`).
    Silent,
    /// The service does not listen yet.
    Held,
    /// It listens; a socket in its namespace is on the way.
    AwaitingSocket,
    /// The connection to the service is being made, to this one of its addresses.
    Connecting {
        /// The forwarder's socket towards the service.
        service: OwnedFd,
        /// The index of the address that is tried.
        address: usize,
    },
    /// Bytes flow.
    Relaying {
        /// The forwarder's socket towards the service.
        service: OwnedFd,
        /// Client to service.
        up: Direction,
        /// Service to client.
        down: Direction,
        /// One side has aborted, and the other is still owed what was sent before that. Boxed, for it is rare.
        abort: Option<Box<Abort>>,
    },
}

/// A stage's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageName {
    /// [`Stage::Admitted`]
    Admitted,
    /// [`Stage::Introducing`]
    Introducing,
    /// [`Stage::Silent`]
    Silent,
    /// [`Stage::Held`]
    Held,
    /// [`Stage::AwaitingSocket`]
    AwaitingSocket,
    /// [`Stage::Connecting`]
    Connecting,
    /// [`Stage::Relaying`]
    Relaying,
}

impl StageName {
    const ALL: [Self; 7] = [
        Self::Admitted,
        Self::Introducing,
        Self::Silent,
        Self::Held,
        Self::AwaitingSocket,
        Self::Connecting,
        Self::Relaying,
    ];

    /// May a connection go on from here to there?
    const fn leads_to(self, next: Self) -> bool {
        use StageName::*;
        match self {
            Admitted => matches!(next, Introducing | Silent | Held | AwaitingSocket),
            Introducing => matches!(next, Admitted),
            // Another target of the forwarder's has been woken; this one may still sleep.
            Silent | Held => matches!(next, Silent | Held | AwaitingSocket),
            AwaitingSocket => matches!(next, Held | AwaitingSocket | Connecting),
            Connecting => matches!(next, AwaitingSocket | Relaying),
            Relaying => false,
        }
    }

    /// Is there a socket towards the service?
    const fn has_service(self) -> bool {
        matches!(self, Self::Connecting | Self::Relaying)
    }
}

impl Stage {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> StageName {
        match self {
            Self::Admitted => StageName::Admitted,
            Self::Introducing(_) => StageName::Introducing,
            Self::Silent => StageName::Silent,
            Self::Held => StageName::Held,
            Self::AwaitingSocket => StageName::AwaitingSocket,
            Self::Connecting { .. } => StageName::Connecting,
            Self::Relaying { .. } => StageName::Relaying,
        }
    }
}

/// How many connections are in each stage.
#[derive(Debug, Default)]
pub struct Census([usize; StageName::ALL.len()]);

impl Census {
    /// A connection was accepted.
    pub const fn enter(&mut self) {
        self.0[StageName::Admitted as usize] += 1;
    }

    const fn advance(&mut self, from: StageName, to: StageName) {
        self.0[from as usize] -= 1;
        self.0[to as usize] += 1;
    }

    /// A connection is closed.
    pub const fn leave(&mut self, connection: &Connection) {
        self.0[connection.stage.name() as usize] -= 1;
    }

    /// How many do not relay yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        StageName::ALL
            .iter()
            .filter(|name| **name != StageName::Relaying)
            .map(|name| self.0[*name as usize])
            .sum()
    }
}

impl Connection {
    /// Where it stands.
    #[must_use]
    pub const fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Goes on to the next stage, which may take over what belongs to the present one. All that follows from that is done here.
    pub fn set_stage(&mut self, census: &mut Census, next: impl FnOnce(Stage) -> Stage) {
        let before = std::mem::replace(&mut self.stage, Stage::Admitted);
        let from = before.name();
        self.stage = next(before);
        let to = self.stage.name();
        debug_assert!(from.leads_to(to), "a connection cannot go from {from:?} to {to:?}");
        census.advance(from, to);
        if !to.has_service() {
            // A socket that there was is closed, and epoll has forgotten it.
            self.registered[Side::Service as usize] = Registration::Absent;
        }
        match (from, to) {
            // From now on it waits for the service.
            (StageName::Introducing | StageName::Silent, _) => self.active = Instant::now(),
            (_, StageName::Relaying) => {
                let now = Instant::now();
                let waited_since = std::mem::replace(&mut self.active, now);
                self.cold_start = self.woke.then(|| now - waited_since);
            }
            _ => {}
        }
        tracing::trace!(conn = self.number, ?from, ?to, "stage");
    }

    /// The client's socket and what has come of the header, while a balancer in front introduces the client.
    pub fn introduction(&mut self) -> Option<(BorrowedFd<'_>, &mut Incoming)> {
        match &mut self.stage {
            Stage::Introducing(incoming) => Some((self.client.as_fd(), incoming)),
            _ => None,
        }
    }

    /// Both sockets and both directions, while bytes flow.
    pub fn relayed(&mut self) -> Option<Relayed<'_>> {
        match &mut self.stage {
            Stage::Relaying { service, up, down, .. } => {
                Some(Relayed { client: self.client.as_fd(), service: (*service).as_fd(), up, down })
            }
            _ => None,
        }
    }
}

/// What bytes flow between, and how.
#[derive(Debug)]
pub struct Relayed<'a> {
    /// The forwarder's socket towards the client.
    pub client: BorrowedFd<'a>,
    /// The one towards the service.
    pub service: BorrowedFd<'a>,
    /// Client to service.
    pub up: &'a mut Direction,
    /// Service to client.
    pub down: &'a mut Direction,
}

#[cfg(test)]
mod tests {
    use super::StageName::*;
    use super::*;

    #[test]
    fn every_stage_is_reached_and_every_one_but_the_last_is_left() {
        for stage in StageName::ALL {
            let reached = StageName::ALL.iter().any(|from| *from != stage && from.leads_to(stage));
            let left = StageName::ALL.iter().any(|to| *to != stage && stage.leads_to(*to));
            assert!(reached && left == (stage != Relaying), "{stage:?}");
        }
    }

    #[test]
    fn bytes_flow_only_once_a_connection_to_the_service_was_begun() {
        let before_relaying: Vec<_> = StageName::ALL.iter().filter(|from| from.leads_to(Relaying)).collect();
        assert_eq!(before_relaying, [&Connecting]);
        let before_connecting: Vec<_> =
            StageName::ALL.iter().filter(|from| from.leads_to(Connecting)).collect();
        assert_eq!(before_connecting, [&AwaitingSocket]);
        // A client that is not known yet is connected nowhere.
        assert!(!Introducing.leads_to(AwaitingSocket) && !Introducing.leads_to(Held));
        // What was sent to one service is not sent to another one.
        assert!(StageName::ALL.iter().all(|next| !Relaying.leads_to(*next)));
    }

    #[test]
    fn a_census_counts_those_that_do_not_relay() {
        let mut census = Census::default();
        census.enter();
        census.enter();
        for (from, to) in [(Admitted, AwaitingSocket), (AwaitingSocket, Connecting), (Connecting, Relaying)] {
            assert_eq!(census.pending(), 2);
            census.advance(from, to);
        }
        assert_eq!(census.pending(), 1);
    }
}
