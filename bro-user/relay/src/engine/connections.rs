//! What happens to a connection once bytes flow: its events, aborts on their way from one side to the other, its timeouts, and the
//! end of any connection.

use std::os::fd::AsFd as _;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::Engine;
use super::token::{GENERATIONS, Token};
use crate::connection::{AbortVerdict, Connection, End, Interest, Pumped, Registration, Stage};
use crate::engine::listeners::Accepting;
use crate::engine::protocol::EngineEvent;
use crate::peer::Source;
use crate::relay::{Broken, Side, copy};
use crate::sys::{Peeked, look};

const SIDES: [Side; 2] = [Side::Client, Side::Service];

fn generation(connection: &Connection) -> u32 {
    (connection.number % GENERATIONS) as u32
}

impl Engine {
    pub(super) fn connection_event(&mut self, index: usize, expected: u32, side: Side, events: EpollFlags) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        if generation(connection) != expected {
            return;
        }
        let trouble = events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        match (connection.stage(), side) {
            (Stage::Relaying { .. }, _) => self.relay_event(index, side, events, trouble),
            (Stage::Introducing(_), _) => self.read_introduction(index),
            (Stage::Silent, _) => self.silent_client_stirred(index),
            (Stage::Connecting { .. }, Side::Service) => self.connect_event(index),
            (Stage::Held | Stage::AwaitingSocket | Stage::Connecting { .. }, Side::Client) if trouble => {
                self.held_client_hung_up(index, events.contains(EpollFlags::EPOLLERR));
            }
            _ => {}
        }
    }

    /// A held client has left if it has reset, or closed without a word. What it sent before it closed (over unix that is a hang-up
    /// too) is delivered all the same.
    fn held_client_hung_up(&mut self, index: usize, reset: bool) {
        let Some(connection) = self.connections.get(index) else { return };
        if reset || look(connection.client.as_fd()) != Peeked::Byte {
            self.finish(index, End::ClientLeft);
        } else {
            self.silence(index, Side::Client);
        }
    }

    fn relay_event(&mut self, index: usize, side: Side, events: EpollFlags, trouble: bool) {
        if events.contains(EpollFlags::EPOLLERR) {
            return self.side_aborted(index, side, None);
        }
        let readable = trouble || events.contains(EpollFlags::EPOLLIN);
        let writable = trouble || events.contains(EpollFlags::EPOLLOUT);
        let (up, down) = match side {
            Side::Client => (readable, writable),
            Side::Service => (writable, readable),
        };
        self.pump(index, up, down);
        // A hang-up, with nothing to be done about it yet: silence it until there is.
        if trouble
            && let Some(connection) = self.connections.get(index)
            && connection.interest(side) == Some(Interest { read: false, write: false })
        {
            self.silence(index, side);
        }
    }

    /// Moves bytes, then ends the connection or tells epoll what it waits for now.
    pub(super) fn pump(&mut self, index: usize, up: bool, down: bool) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let (spliced, copied, before) = (self.tools.spliced, self.tools.copied, connection.to_service());
        let pumped = connection.pump(&mut self.tools, up, down);
        let tally = &mut self.tallies[connection.listener];
        tally.spliced += self.tools.spliced - spliced;
        tally.copied += self.tools.copied - copied;
        let after = connection.to_service();
        tally.to_service.spliced += after.0 - before.0;
        tally.to_service.copied += after.1 - before.1;
        match pumped {
            Ok(Pumped::Finished) => return self.finish(index, End::Eof),
            Ok(Pumped::Open) => {}
            // Nothing that the other side should wait for.
            Err(broken) if broken.errno == copy::DESCRIPTORS => return self.finish(index, broken.into()),
            Err(broken) => return self.side_aborted(index, broken.side, Some(broken.errno)),
        }
        if let Some(lanes) = &mut self.lanes {
            let watched = self.targets[connection.target].watched;
            lanes.consider(index, connection, watched, tally);
        }
        self.settle(index);
    }

    /// One side has aborted: what it had sent is delivered, then the other side is told. `errno` is what a call on its socket
    /// failed with; without, the kernel is still to be asked.
    fn side_aborted(&mut self, index: usize, side: Side, errno: Option<Errno>) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let (number, is_new) = (connection.number, !connection.is_aborted());
        if !connection.abort(side, errno, &mut self.tools) {
            // Both have aborted: the first abort is the reason.
            return self.finish(index, End::Eof);
        }
        self.pump(index, true, true);
        if is_new {
            self.look_at_abort(index, number, Instant::now());
        }
    }

    /// After bytes have moved: passes on an abort that has nothing in front of it any more, or tells epoll what to wait for now.
    fn settle(&mut self, index: usize) {
        let Some(connection) = self.connections.get(index) else { return };
        if connection.is_aborted() && connection.owed().is_none() {
            return self.finish(index, End::Eof);
        }
        self.register(index);
    }

    /// Looks at the connections that are due.
    pub(super) fn look_at_aborts(&mut self) {
        if self.looks.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some((index, number)) = self.looks.pop(now) {
            self.look_at_abort(index, number, now);
        }
    }

    fn look_at_abort(&mut self, index: usize, number: u64, now: Instant) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        if connection.number != number {
            return;
        }
        let owed = connection.owed();
        let (Some(abort), Some(progress)) = (connection.abort_mut(), owed) else { return self.settle(index) };
        let verdict = abort.look(now, progress);
        connection.active = abort.progressed();
        match verdict {
            AbortVerdict::Wait(when) => self.looks.push(when, index, number),
            AbortVerdict::Overdue => {
                tracing::info!(
                    conn = number,
                    "not all that was sent before the reset could be delivered: the other side does not take it"
                );
                self.finish(index, End::Eof);
            }
        }
    }

    /// Brings epoll's view of both sockets up to date.
    pub(super) fn register(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        for side in SIDES {
            let wanted = connection.interest(side);
            let registered = connection.registered[side as usize];
            let settled = match (registered, wanted) {
                (Registration::Absent, None) => true,
                // A hung-up socket stays silenced while it has nothing to do.
                (Registration::Silenced, wanted) => {
                    wanted.is_none_or(|interest| interest == Interest { read: false, write: false })
                }
                (Registration::Watched(interest), wanted) => wanted == Some(interest),
                (Registration::Absent, Some(_)) => false,
            };
            if settled {
                continue;
            }
            let Some(socket) = connection.socket(side) else { continue };
            let Some(interest) = wanted else {
                self.epoll.delete(socket).ok();
                connection.registered[side as usize] = Registration::Absent;
                continue;
            };
            let mut flags = EpollFlags::empty();
            flags.set(EpollFlags::EPOLLIN, interest.read);
            flags.set(EpollFlags::EPOLLOUT, interest.write);
            let token = Token::Connection { index, generation: generation(connection), side };
            let mut event = EpollEvent::new(flags, token.into());
            let done = match registered {
                Registration::Watched(_) => self.epoll.modify(socket, &mut event),
                Registration::Absent | Registration::Silenced => self.epoll.add(socket, event),
            };
            match done {
                Ok(()) => connection.registered[side as usize] = Registration::Watched(interest),
                Err(errno) => return self.finish(index, Broken { side, errno }.into()),
            }
        }
    }

    /// Stops epoll's reports of a socket that hung up, until there is something to do with it.
    fn silence(&mut self, index: usize, side: Side) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let before = std::mem::replace(&mut connection.registered[side as usize], Registration::Silenced);
        if matches!(before, Registration::Watched(_))
            && let Some(socket) = connection.socket(side)
        {
            self.epoll.delete(socket).ok();
        }
    }

    /// Ends connections that have timed out.
    pub(super) fn expire(&mut self, now: Instant) {
        let (mut due, mut moved) = (Vec::new(), false);
        for (index, connection) in &mut self.connections {
            match connection.stage() {
                Stage::Relaying { .. } => {
                    // Bytes that took a lane did not wake the engine, so they are noticed here.
                    moved |= connection.keeps_awake(now);
                    if self.settings.idle_timeout.is_some_and(|limit| now - connection.active >= limit) {
                        due.push((index, End::IdleTimeout));
                    }
                }
                Stage::Introducing(_) => {
                    if now - connection.active >= super::introductions::WITHIN {
                        due.push((index, End::HeaderTimeout));
                    }
                }
                Stage::Silent => {
                    if now - connection.active >= self.settings.hold_limit {
                        due.push((index, End::IdleTimeout));
                    }
                }
                Stage::Admitted | Stage::Held | Stage::AwaitingSocket | Stage::Connecting { .. } => {
                    // The control process's own limit runs from the wake; this one is each client's, and comes after it.
                    if now - connection.active >= self.settings.hold_limit.saturating_add(super::TICK * 5) {
                        due.push((index, End::StartTimeout));
                    }
                }
            }
        }
        if moved && self.settings.idle_by_bytes.is_some() {
            self.stats.now_idle();
        }
        for (index, end) in due {
            self.finish(index, end);
        }
    }

    /// Ends a connection.
    pub(super) fn finish(&mut self, index: usize, end: End) {
        let Some(mut connection) = self.connections.try_remove(index) else { return };
        let end = connection.end(end);
        if self.settings.idle_by_bytes.is_some() && connection.keeps_awake(Instant::now()) {
            self.stats.now_idle();
        }
        self.silent.remove(connection.peer.source(), connection.number);
        self.census.leave(&connection);
        if !matches!(connection.stage(), Stage::Relaying { .. }) {
            // It may be on any list of those that wait.
            self.targets[connection.target].forget(index);
            self.retries.retain(|&retry| retry != index);
            self.publish_held();
        }
        self.log_end(&connection, end);
        let tally = &mut self.tallies[connection.listener];
        tally.ended.add(end);
        let source = connection.counted.then(|| connection.peer.source());
        if let Some(lanes) = &mut self.lanes {
            lanes.close_both(&connection, tally);
        }
        let kept = !connection.ignored;
        connection.close(end, &mut self.tools);
        self.after_end(source, kept);
    }

    /// A connection has ended: room for the next, and news for what waits for the last. `kept`: it kept the service awake.
    fn after_end(&mut self, source: Option<Source>, kept: bool) {
        if let Some(source) = source {
            self.per_source.leave(source);
        }
        if self.listeners.accepting() == Accepting::Full
            && let Err(error) = self.set_accepting(Accepting::Open)
        {
            tracing::error!(%error, "cannot accept again");
        }
        if kept {
            self.keeping -= 1;
            // Before the count says so. By bytes, a client that connects and says nothing does not count.
            if self.keeping + self.datagrams.keeping() == 0 && self.settings.idle_by_bytes.is_none() {
                self.stats.now_idle();
            }
        }
        self.tell_if_drained();
        self.publish_open();
    }

    /// The last client may have gone.
    pub(super) fn tell_if_drained(&self) {
        if self.draining && self.connections.is_empty() && self.datagrams.is_empty() {
            self.outbox.tell(&EngineEvent::Drained);
        }
    }

    /// The one line of a connection's end.
    fn log_end(&self, connection: &Connection, end: End) {
        let (to_service, to_client) = connection.totals();
        let cold_start_ms = connection.cold_start.map(|span| span.as_millis() as u64);
        tracing::info!(
            conn = connection.number,
            peer = %connection.peer,
            through = connection.through.as_ref().map(|through| through.peer.to_string()),
            target = %self.targets[connection.target].name,
            relay = %connection.relay_name(self.settings.method),
            to_service,
            to_client,
            duration_ms = connection.opened.elapsed().as_millis() as u64,
            reason = %end,
            error = end.detail(),
            cold_start_ms,
            "connection closed"
        );
    }
}
