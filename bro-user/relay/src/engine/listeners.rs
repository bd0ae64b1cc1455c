//! The listening sockets: whether clients are accepted from them, and how many in one turn.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::SockaddrStorage;
use serde::{Deserialize, Serialize};

use super::accept_batch::AcceptBatch;
use super::token::Token;
use crate::listener::{Listener, SocketKind};
use crate::peer::Source;

/// Whether new clients are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accepting {
    /// Yes.
    Open,
    /// Not before a connection ends: `--connections-max` is reached.
    Full,
    /// Not before this instant: the kernel had no descriptor or memory.
    BackingOff { until: Instant, pause: Duration },
    /// No more: draining or stopped.
    Closed,
}

/// What the engine does with a listener while clients are accepted. Without `--adopt` it relays at all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ListenerUse {
    /// Accepts its clients. The listener is non-blocking.
    Relay,
    /// Says when a client waits, or a datagram, once, and takes none: whatever is to have the listener finds it in its queue.
    WakeOnly,
    /// Nothing: a service has what comes to it, or is about to.
    LeaveAlone,
}

/// The listening sockets.
#[derive(Debug)]
pub(super) struct Listeners {
    /// Each with the index of its target.
    all: Vec<(Arc<Listener>, usize)>,
    uses: Vec<ListenerUse>,
    /// How many clients each had of late.
    batches: Vec<AcceptBatch>,
    /// How many flows of each have a service that takes no more now.
    pauses: Vec<u32>,
    /// Counts the times that epoll had something to tell.
    turn: u64,
    accepting: Accepting,
}

impl Listeners {
    /// Nothing is accepted from them yet, and with `adopts` not before they are said to be relayed at.
    pub(super) fn new(all: Vec<(Arc<Listener>, usize)>, adopts: bool) -> Self {
        // For clients that connect from now on: what a relay cannot pass on, the kernel refuses to the sender, if it can. A service that
        // accepts at them itself may want it.
        for (listener, _) in all.iter().filter(|_| !adopts) {
            crate::sys::refuse_descriptors(listener.socket.as_fd()).ok();
        }
        let first = if adopts { ListenerUse::LeaveAlone } else { ListenerUse::Relay };
        Self {
            batches: vec![AcceptBatch::default(); all.len()],
            pauses: vec![0; all.len()],
            uses: vec![first; all.len()],
            all,
            turn: 0,
            accepting: Accepting::Closed,
        }
    }

    /// What is done with this one.
    pub(super) fn used(&self, listener: usize) -> ListenerUse {
        self.uses[listener]
    }

    /// Has one more reason, or one less, to leave what is there where it is.
    pub(super) fn pause(&mut self, epoll: &Epoll, listener: usize, pause: bool) -> nix::Result<()> {
        let was = self.is_watched(listener);
        let reasons = &mut self.pauses[listener];
        *reasons = if pause { *reasons + 1 } else { reasons.saturating_sub(1) };
        self.watch(epoll, listener, was)
    }

    /// Uses one so from now on; whether there is one of this number.
    pub(super) fn set_use(&mut self, epoll: &Epoll, listener: usize, how: ListenerUse) -> nix::Result<bool> {
        if listener >= self.all.len() {
            return Ok(false);
        }
        let was = self.is_watched(listener);
        self.uses[listener] = how;
        self.watch(epoll, listener, was)?;
        Ok(true)
    }

    /// Is what comes to it received?
    pub(super) fn is_watched(&self, listener: usize) -> bool {
        let accepts = match self.all[listener].0.kind {
            SocketKind::Stream | SocketKind::Vsock | SocketKind::SeqPacket => {
                self.accepting == Accepting::Open
            }
            // The limits on connections are none on datagrams.
            SocketKind::Datagram | SocketKind::UnixDatagram => self.accepting != Accepting::Closed,
        };
        accepts && self.pauses[listener] == 0 && self.uses[listener] != ListenerUse::LeaveAlone
    }

    /// Has epoll watch it if it is to now and was not, and the other way round.
    fn watch(&self, epoll: &Epoll, listener: usize, was: bool) -> nix::Result<()> {
        let socket = self.all[listener].0.socket.as_fd();
        match (was, self.is_watched(listener)) {
            (false, true) => {
                epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, Token::Listener(listener).into()))
            }
            (true, false) => epoll.delete(socket),
            _ => Ok(()),
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Listener> {
        self.all.iter().map(|(listener, _)| &**listener)
    }

    /// The index of a listener's target.
    pub(super) fn target(&self, listener: usize) -> usize {
        self.all[listener].1
    }

    /// Epoll has something to tell.
    pub(super) const fn next_turn(&mut self) {
        self.turn += 1;
    }

    /// How many clients may be taken from this one in this turn.
    pub(super) fn allowed(&self, listener: usize) -> usize {
        self.batches[listener].allowed(self.turn)
    }

    /// Notes that so many were taken, of so many.
    pub(super) fn took(&mut self, listener: usize, taken: usize, allowed: usize) {
        self.batches[listener].took(self.turn, taken, taken == allowed);
    }

    pub(super) fn accept(&self, listener: usize) -> io::Result<(OwnedFd, Option<SockaddrStorage>)> {
        crate::sys::accept(self.all[listener].0.socket.as_fd())
    }

    /// Is it a socket for datagrams, on which there is nothing to accept?
    pub(super) fn takes_datagrams(&self, listener: usize) -> bool {
        self.all[listener].0.kind.takes_datagrams()
    }

    pub(super) fn kind(&self, listener: usize) -> SocketKind {
        self.all[listener].0.kind
    }

    pub(super) fn socket(&self, listener: usize) -> BorrowedFd<'_> {
        self.all[listener].0.socket.as_fd()
    }

    pub(super) const fn accepting(&self) -> Accepting {
        self.accepting
    }

    /// Has epoll watch them while clients are accepted.
    pub(super) fn set_accepting(&mut self, epoll: &Epoll, accepting: Accepting) -> nix::Result<()> {
        let was: Vec<bool> = (0..self.all.len()).map(|listener| self.is_watched(listener)).collect();
        self.accepting = accepting;
        for (listener, was) in was.into_iter().enumerate() {
            self.watch(epoll, listener, was)?;
        }
        Ok(())
    }
}

/// How many connections each source has (`--connections-per-source`).
#[derive(Debug)]
pub(super) struct PerSource {
    limit: Option<u32>,
    counts: HashMap<Source, u32>,
}

impl PerSource {
    pub(super) fn new(limit: Option<u32>) -> Self {
        Self { limit, counts: HashMap::new() }
    }

    /// Whether it counts them.
    pub(super) const fn counts(&self) -> bool {
        self.limit.is_some()
    }

    /// One more of this source; false where it has as many as it may have.
    pub(super) fn enter(&mut self, source: Source) -> bool {
        let Some(limit) = self.limit else { return true };
        let count = self.counts.entry(source).or_default();
        if *count >= limit {
            return false;
        }
        *count += 1;
        true
    }

    /// One that was counted has ended.
    pub(super) fn leave(&mut self, source: Source) {
        if let Some(count) = self.counts.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                let _gone = self.counts.remove(&source);
            }
        }
    }
}
