//! When the forwarder may leave, or have the service frozen: `--idle-by=bytes`, and the moment itself.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Engine;
use super::listeners::Accepting;
use super::targets::{Frozen, HeldTarget};
use crate::connection::{Connection, End, Stage};
use crate::engine::protocol::EngineEvent;

/// What the control process asks when it wants to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Leave {
    /// Only if there is no connection that keeps the service awake.
    WithoutConnections,
    /// If no byte has moved for so long; connections that merely sleep are ended.
    WithoutBytes(Duration),
    /// Only if every connected client has said nothing yet.
    WithoutGuests,
    /// In any case; connected clients are cut off.
    Now,
}

impl Engine {
    /// How often `--idle-by=bytes` looks at connections for bytes that moved. Bytes that took a lane did not wake the engine.
    pub(super) fn byte_step(&self) -> Option<Duration> {
        let limit = self.settings.idle_by_bytes.filter(|_| !self.connections.is_empty())?;
        let step = (limit / 8).clamp(Duration::from_millis(10), Duration::from_secs(5));
        Some(self.settings.idle_below.map_or(step, |rate| step.min(rate.step())))
    }

    /// Notes that bytes have moved since the last look. Late by one step at most, and never early.
    fn notice_bytes(&mut self) {
        let (mut moved, now) = (false, std::time::Instant::now());
        for (_, connection) in &mut self.connections {
            moved |= connection.keeps_awake(now);
        }
        if moved {
            self.stats.now_idle();
        }
    }

    /// Accepts no more if the control process may leave; says whether.
    pub(super) fn leave(&mut self, how: Leave) -> anyhow::Result<bool> {
        let may = self.may_leave(how);
        if may {
            self.set_accepting(Accepting::Closed)?;
            self.end_all(if how == Leave::Now { End::Shutdown } else { End::IdleExit });
        }
        Ok(may)
    }

    /// Holds the clients that come from now on, if it is time to leave; says whether.
    pub(super) fn freeze(&mut self, how: Leave) -> bool {
        let may = self.targets.may_freeze() && self.may_leave(how);
        if may {
            self.end_all(End::IdleExit);
            self.targets.frozen = Frozen::Yes;
        }
        may
    }

    /// A client waits for a service that is frozen.
    pub(super) fn ask_to_thaw(&mut self, peer: &str) {
        if self.targets.frozen == Frozen::Yes {
            self.targets.frozen = Frozen::Thawing;
            self.outbox.tell(&EngineEvent::Thaw { peer: peer.to_owned() });
        }
    }

    /// The service goes on: the clients that are held for what is ready are connected.
    pub(super) fn thawed(&mut self) {
        if std::mem::replace(&mut self.targets.frozen, Frozen::No) == Frozen::No {
            return;
        }
        let ready = self.targets.iter_mut().filter(|target| target.is_ready());
        let held = ready.flat_map(HeldTarget::take_held).collect();
        self.let_in(held);
        for target in 0..self.targets.len() {
            if self.targets[target].is_ready() {
                self.flows_go_on(target);
            }
        }
    }

    /// Is it time to leave?
    fn may_leave(&mut self, how: Leave) -> bool {
        match how {
            Leave::WithoutConnections => {
                self.datagrams.keeping() == 0
                    && self.datagrams.waiting() == 0
                    && self.connections.iter().all(|(_, connection)| connection.ignored && !waits(connection))
            }
            Leave::WithoutGuests => {
                let is_no_guest = |connection: &Connection| {
                    connection.ignored || matches!(connection.stage(), Stage::Silent)
                };
                self.datagrams.keeping() == 0
                    && self.connections.iter().all(|(_, connection)| is_no_guest(connection))
            }
            Leave::WithoutBytes(limit) => {
                self.notice_bytes();
                self.datagrams.all_sleep(limit)
                    && self.connections.iter().all(|(_, connection)| sleeps(connection, limit))
                    && self.stats.since_active() >= limit
            }
            Leave::Now => true,
        }
    }
}

/// A client that has just connected is about to say something. One that does not keeps nothing awake for longer than that.
const ABOUT_TO_SPEAK: Duration = Duration::from_secs(1);

/// Does its client wait for the service?
const fn waits(connection: &Connection) -> bool {
    matches!(
        connection.stage(),
        Stage::Admitted | Stage::Held | Stage::AwaitingSocket | Stage::Connecting { .. }
    )
}

/// Does it merely sleep: does nothing on it wait for the service or to be read, and is nothing about to?
fn sleeps(connection: &Connection, limit: Duration) -> bool {
    if connection.ignored {
        return !waits(connection);
    }
    let is_fresh = connection.opened.elapsed() < limit.min(ABOUT_TO_SPEAK);
    match connection.stage() {
        Stage::Silent => !is_fresh,
        // It has not finished yet.
        Stage::Relaying { up, .. } if is_fresh && up.half().wants_read() => false,
        Stage::Admitted
        | Stage::Introducing(_)
        | Stage::Held
        | Stage::AwaitingSocket
        | Stage::Connecting { .. } => false,
        // An abort is on its way.
        Stage::Relaying { abort: Some(_), .. } => false,
        Stage::Relaying { service, up, down, abort: None } => {
            let comes = |socket: BorrowedFd<'_>, open: bool| open && crate::sys::stirs(socket);
            !comes(connection.client.as_fd(), up.half().wants_read())
                && !comes(service.as_fd(), down.half().wants_read())
        }
    }
}
