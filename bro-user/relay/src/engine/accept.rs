//! Letting clients in: accept, the limits on how many, and what happens when the kernel has no descriptor left.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{Accepting, Engine, socket_options};
use crate::connection::{Connection, End, Stage};
use crate::engine::protocol::Event;
use crate::peer::Peer;
use crate::proxy_protocol::Trusted;
use crate::rate::Meter;
use crate::stats::Stats;

/// The first pause after EMFILE and its like; it doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(1);

impl Engine {
    /// Accepts what waits on a listener.
    pub(super) fn accept_some(&mut self, listener: usize) -> anyhow::Result<()> {
        let (turn, mut taken) = (self.turn, 0);
        let allowed = self.crowds[listener].allowed(turn);
        while taken < allowed
            && self.accepting == Accepting::Open
            && self.accept_one(listener, FIRST_PAUSE)?
        {
            taken += 1;
        }
        self.crowds[listener].took(turn, taken, taken == allowed);
        Ok(())
    }

    /// The first attempt after a pause: when it fails as well, the next pause is longer.
    pub(super) fn accept_after_pause(&mut self, pause: Duration) -> anyhow::Result<()> {
        let longer = (pause * 2).min(LAST_PAUSE);
        for listener in 0..self.listeners.len() {
            if self.accepting == Accepting::Open {
                let _more = self.accept_one(listener, longer)?;
            }
        }
        Ok(())
    }

    /// Accepts one client; false when there is none, or none can be taken.
    fn accept_one(&mut self, listener: usize, pause: Duration) -> anyhow::Result<bool> {
        if self.connections.len() >= self.settings.connections_max && self.silent.is_empty() {
            self.tallies[listener].full += 1;
            self.set_accepting(Accepting::Full)?;
            return Ok(false);
        }
        let (socket, backend) = (self.listeners[listener].0.socket.as_fd(), self.listeners[listener].1);
        match crate::sys::accept(socket) {
            Ok((client, address)) => {
                if self.connections.len() >= self.settings.connections_max {
                    let _room = self.make_room();
                }
                self.admit(client, address, listener, backend);
                Ok(true)
            }
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN) => Ok(false),
                // accept(2): errors of that one connection, or a signal.
                Some(
                    Errno::EINTR
                    | Errno::ECONNABORTED
                    | Errno::EPROTO
                    | Errno::ENETDOWN
                    | Errno::ENOPROTOOPT
                    | Errno::EHOSTDOWN
                    | Errno::ENONET
                    | Errno::EHOSTUNREACH
                    | Errno::ENETUNREACH,
                ) => Ok(true),
                // EMFILE, ENFILE, ENOBUFS, ENOMEM, or a listener that another process shut down: to retry at once mends nothing.
                _ => {
                    if pause == FIRST_PAUSE {
                        self.tallies[listener].exhausted += 1;
                        tracing::warn!(%error, "cannot accept; clients wait in the backlog until it works again");
                    }
                    self.set_accepting(Accepting::BackingOff { until: Instant::now() + pause, pause })?;
                    Ok(false)
                }
            },
        }
    }

    fn admit(
        &mut self,
        client: std::os::fd::OwnedFd,
        address: Option<nix::sys::socket::SockaddrStorage>,
        listener: usize,
        backend: usize,
    ) {
        let now = Instant::now();
        let peer = Peer::of(client.as_fd(), address);
        let number = self.next_number;
        self.next_number += 1;
        let meter = self.settings.idle_below.map(|rate| Box::new(Meter::new(rate, now)));
        let connection = Connection::accepted(number, client, peer, (listener, backend), meter, now);
        Stats::set(&self.stats.accepted, number);
        self.tallies[listener].accepted += 1;
        socket_options::set_options(&connection.client, connection.peer.ip(), self.settings.keepalive);
        let introduced = self.settings.trusted.iter().any(|trusted| trusted.is(&connection.peer));
        let index = self.connections.insert(connection);
        self.census.enter();
        self.keeping += 1;
        self.publish_open();
        if introduced {
            self.connections[index].set_stage(&mut self.census, |_| Stage::Introducing(Box::default()));
            return self.read_introduction(index);
        }
        self.welcome(index);
    }

    /// It is known who the client is: it is let in, unless its source has too many connections.
    pub(super) fn welcome(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        let is_one_of = |these: &[Trusted]| these.iter().any(|one| one.is(&connection.peer));
        let (ignored, wakes_nothing) =
            (is_one_of(&self.settings.idle_ignore), is_one_of(&self.settings.wake_ignore));
        connection.wakes_nothing = wakes_nothing;
        if ignored {
            self.ignore(index);
        }
        let Some(connection) = self.connections.get_mut(index) else { return };
        if let Some(limit) = self.settings.connections_per_source {
            let count = self.per_source.entry(connection.peer.source()).or_default();
            if *count >= limit {
                return self.finish(index, End::SourceLimit);
            }
            *count += 1;
            connection.counted = true;
        }
        tracing::debug!(
            conn = connection.number,
            peer = %connection.peer,
            target = %self.backends[connection.backend].name,
            "accepted"
        );
        self.place(index);
    }

    /// A connection keeps nothing awake any more.
    pub(super) fn ignore(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else { return };
        if !std::mem::replace(&mut connection.ignored, true) {
            self.keeping -= 1;
            self.publish_open();
        }
    }

    fn publish_open(&self) {
        Stats::set(&self.stats.open, self.connections.len() as u64);
        Stats::set(&self.stats.keeping, self.keeping as u64);
    }

    /// A connection has ended: room for the next, and news for what waits for the last. `kept`: it kept the service awake.
    pub(super) fn after_end(&mut self, source: Option<crate::peer::Source>, kept: bool) {
        if let Some(source) = source
            && let Some(count) = self.per_source.get_mut(&source)
        {
            *count -= 1;
            if *count == 0 {
                let _gone = self.per_source.remove(&source);
            }
        }
        if matches!(self.accepting, Accepting::Full)
            && let Err(error) = self.set_accepting(Accepting::Open)
        {
            tracing::error!(%error, "cannot accept again");
        }
        if kept {
            self.keeping -= 1;
            // Before the count says so. By bytes, a client that connects and says nothing does not count.
            if self.keeping == 0 && self.settings.idle_by_bytes.is_none() {
                self.stats.now_idle();
            }
        }
        if self.connections.is_empty() && self.draining {
            self.outbox.tell(&Event::Drained);
        }
        self.publish_open();
    }
}
