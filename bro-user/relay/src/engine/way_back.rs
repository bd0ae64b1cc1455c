//! The way back of datagrams: what the service answers is received on flows' sockets and sent to clients by a thread of its own, so that
//! both directions go at the same time, and neither is woken for each datagram of the other. The engine alone decides which flows there
//! are; this thread is lent their sockets and notes what it did: when a flow was answered last, how much, and what the kernel says.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use super::connect::nothing_listens;
use super::outgoing::cannot_be_taken_apart;
use super::token::Token;
use crate::ancillary::Ancillary;
use crate::flows::{DatagramTally, Dropped, FlowClient, FlowEnds, FlowId, Piece, together};
use crate::listener::Listener;
use crate::stats::Stats;
use crate::sys::messages::Messages;

/// The most answers that are received at a time, of all flows; a buffer for each is kept.
const ROOM: usize = 64;

/// The most of one flow.
const BATCH: usize = 16;

/// As many answers are looked for at the first one: that there is no second one is then said by the same system call.
const FEW: usize = 2;

/// How many errors of one socket's are taken before what it has received is looked for in the next turn.
const TRIES: usize = 4;

/// Events taken per epoll_wait(2).
const EVENTS: usize = 128;

/// The most errors that the engine has not looked at. One more is not told: the flow's next datagram meets it again.
const ERRORS: usize = 1024;

/// A flow's socket in the service's namespace, connected to the service, and whom its answers are for.
#[derive(Debug)]
pub(super) struct FlowSocket {
    pub(super) socket: OwnedFd,
    id: FlowId,
    ends: FlowEnds,
    /// It keeps nothing awake (`--idle-ignore`).
    ignored: bool,
    /// When it was answered last, in nanoseconds since the start.
    answered: AtomicU64,
    /// The engine has yet to look at that.
    noted: AtomicBool,
    /// Bytes that its client was sent.
    to_client: AtomicU64,
    /// How many answers are received at a time: twice as many as there were last.
    at_once: AtomicUsize,
    /// The longest datagrams of which several go to the client as one.
    longest: AtomicUsize,
}

impl FlowSocket {
    pub(super) fn to_client(&self) -> u64 {
        self.to_client.load(Relaxed)
    }
}

/// An error that the kernel has for a flow's socket, of an earlier datagram.
#[derive(Debug)]
pub(super) struct FlowError {
    pub(super) id: FlowId,
    pub(super) socket: Arc<FlowSocket>,
    pub(super) errno: Errno,
}

/// What one listener's clients were sent. A datagram is counted before it is sent, so that a client that has it finds it counted, and
/// taken back if it cannot be.
#[derive(Debug, Default)]
struct AnswerCounts {
    datagrams: AtomicU64,
    bytes: AtomicU64,
    dropped: [AtomicU64; Dropped::WORDS.len()],
}

impl AnswerCounts {
    fn sends(&self, pieces: &[Piece]) {
        self.datagrams.fetch_add(pieces.len() as u64, Relaxed);
        self.bytes.fetch_add(length_of(pieces), Relaxed);
    }

    fn did_not_send(&self, pieces: &[Piece]) {
        self.datagrams.fetch_sub(pieces.len() as u64, Relaxed);
        self.bytes.fetch_sub(length_of(pieces), Relaxed);
    }

    fn drops(&self, why: Dropped, count: usize) {
        self.dropped[why as usize].fetch_add(count as u64, Relaxed);
    }
}

fn length_of(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.length as u64).sum()
}

/// What the thread has for the engine.
#[derive(Debug, Default)]
struct FlowNews {
    /// Flows that were answered, each once until the engine has looked.
    answered: Vec<FlowId>,
    errors: Vec<FlowError>,
}

/// What engine and thread share.
#[derive(Debug)]
pub struct WayBack {
    epoll: Epoll,
    sockets: Mutex<HashMap<FlowId, Arc<FlowSocket>>>,
    news: Mutex<FlowNews>,
    /// Wakes the engine for errors.
    wakes: EventFd,
    listeners: Vec<Arc<Listener>>,
    counts: Vec<AnswerCounts>,
    stats: Arc<Stats>,
    /// `--idle-by=bytes`
    by_bytes: bool,
    start: Instant,
}

impl WayBack {
    /// For the clients of these listeners.
    pub(super) fn new(listeners: Vec<Arc<Listener>>, stats: Arc<Stats>, by_bytes: bool) -> nix::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            sockets: Mutex::default(),
            news: Mutex::default(),
            wakes: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            counts: listeners.iter().map(|_| AnswerCounts::default()).collect(),
            listeners,
            stats,
            by_bytes,
            start: Instant::now(),
        })
    }

    /// Readable where there are errors.
    pub(super) fn wakes(&self) -> BorrowedFd<'_> {
        self.wakes.as_fd()
    }

    /// From now on what comes from the service on this socket goes to the flow's client.
    ///
    /// # Errors
    /// epoll_ctl(2)'s.
    pub(super) fn open(
        &self,
        id: FlowId,
        ends: FlowEnds,
        socket: OwnedFd,
        ignored: bool,
    ) -> nix::Result<Arc<FlowSocket>> {
        let longest = if matches!(ends.client, FlowClient::Inet(_)) { usize::MAX } else { 0 };
        let flow = Arc::new(FlowSocket {
            socket,
            id,
            ends,
            ignored,
            answered: AtomicU64::new(0),
            noted: AtomicBool::new(false),
            to_client: AtomicU64::new(0),
            at_once: AtomicUsize::new(FEW),
            longest: AtomicUsize::new(longest),
        });
        let _none = lock(&self.sockets).insert(id, flow.clone());
        let token = Token::Flow { index: id.index, generation: id.generation };
        let watched = self.epoll.add(&flow.socket, EpollEvent::new(EpollFlags::EPOLLIN, token.into()));
        if watched.is_err() {
            self.close(id);
        }
        watched.map(|()| flow)
    }

    /// No more of it. The socket is closed once the thread does not answer through it either, and the kernel then takes it out of epoll.
    pub(super) fn close(&self, id: FlowId) {
        let mut sockets = lock(&self.sockets);
        let closed = sockets.remove(&id);
        if sockets.is_empty() {
            // What a flood took is given back.
            sockets.shrink_to_fit();
        }
        drop(sockets);
        drop(closed);
    }

    /// When this flow was answered last; none if it never was.
    pub(super) fn answered(&self, flow: &FlowSocket) -> Option<Instant> {
        let nanoseconds = flow.answered.load(Relaxed);
        (nanoseconds > 0).then(|| self.start + Duration::from_nanos(nanoseconds))
    }

    /// The flows that were answered since the engine looked, in the order in which they first were.
    pub(super) fn take_answered(&self) -> Vec<FlowId> {
        std::mem::take(&mut lock(&self.news).answered)
    }

    /// The engine looks at when it was answered. Either it sees what the thread has just stored, or the thread notes it once more.
    pub(super) fn looks_at(flow: &FlowSocket) {
        let _noted = flow.noted.swap(false, AcqRel);
    }

    /// The errors since the engine looked.
    pub(super) fn take_errors(&self) -> Vec<FlowError> {
        // Before it looks: what comes meanwhile wakes it again.
        let _woken = self.wakes.read();
        std::mem::take(&mut lock(&self.news).errors)
    }

    /// Adds what one listener's clients were sent.
    pub(super) fn add_to(&self, listener: usize, tally: &mut DatagramTally) {
        let Some(counts) = self.counts.get(listener) else { return };
        tally.to_clients.add_several(counts.datagrams.load(Relaxed), counts.bytes.load(Relaxed));
        for (why, count) in Dropped::ALL.into_iter().zip(&counts.dropped) {
            tally.dropped.add(why, count.load(Relaxed));
        }
    }

    /// Passes answers on until epoll itself fails.
    ///
    /// # Errors
    /// epoll_wait(2)'s.
    pub(crate) fn run(&self) -> nix::Result<()> {
        let mut messages = Messages::new(ROOM);
        let mut events = vec![EpollEvent::empty(); EVENTS];
        let mut ready: Vec<Arc<FlowSocket>> = Vec::with_capacity(EVENTS);
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            {
                let sockets = lock(&self.sockets);
                ready.extend(events[..count].iter().filter_map(|event| match Token::from(event.data()) {
                    Token::Flow { index, generation } => sockets.get(&FlowId { index, generation }).cloned(),
                    _ => None,
                }));
            }
            self.answer_all(&ready, &mut messages);
            ready.clear();
        }
    }

    /// Receives first and sends then, as much at a time as there is room for: a client of many is then woken for several answers.
    fn answer_all(&self, ready: &[Arc<FlowSocket>], messages: &mut Messages) {
        let mut news = FlowNews::default();
        let mut received = Vec::with_capacity(ready.len());
        for flow in ready {
            if messages.room() < BATCH {
                self.send_all(&mut received, messages);
            }
            let (numbers, error) = self.receive(flow, messages);
            if let Some(errno) = error {
                if nothing_listens(errno) {
                    self.counts[flow.ends.listener].drops(Dropped::Refused, 1);
                }
                news.errors.push(FlowError { id: flow.id, socket: flow.clone(), errno });
            }
            if let Some(numbers) = numbers {
                if !flow.noted.swap(true, AcqRel) {
                    news.answered.push(flow.id);
                }
                received.push((&**flow, numbers));
            }
        }
        self.send_all(&mut received, messages);
        let failed = !news.errors.is_empty();
        if failed || !news.answered.is_empty() {
            let mut all = lock(&self.news);
            all.answered.append(&mut news.answered);
            let room = ERRORS.saturating_sub(all.errors.len());
            all.errors.extend(news.errors.into_iter().take(room));
        }
        if failed {
            // It fails where it is full of wakes, and then the engine is woken anyway.
            let _woken = self.wakes.write(1);
        }
    }

    /// Receives what waits on a flow's socket: its numbers, and the error that was there besides. What there is more comes in the next turn.
    fn receive(&self, flow: &FlowSocket, messages: &mut Messages) -> (Option<Range<usize>>, Option<Errno>) {
        let mut error = None;
        for _ in 0..TRIES {
            match messages.receive_more(flow.socket.as_fd(), flow.at_once.load(Relaxed)) {
                Ok(numbers) => {
                    // Before its client has it.
                    let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    flow.answered.store(now, Relaxed);
                    flow.at_once.store((2 * numbers.len()).clamp(FEW, BATCH), Relaxed);
                    return (Some(numbers), error);
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                // An error comes before what was received before it.
                Err(errno) => error = Some(errno),
            }
        }
        (None, error)
    }

    /// Sends on what was received.
    fn send_all(&self, received: &mut Vec<(&FlowSocket, Range<usize>)>, messages: &mut Messages) {
        for (flow, numbers) in received.drain(..) {
            self.send_to_client(flow, messages, numbers);
            if self.by_bytes && !flow.ignored {
                self.stats.now_idle();
            }
        }
        messages.clear();
    }

    /// Sends what was received on, from the address that the client wrote to, and as much of it at once as can be.
    fn send_to_client(&self, flow: &FlowSocket, messages: &mut Messages, received: Range<usize>) {
        let (ends, counts) = (&flow.ends, &self.counts[flow.ends.listener]);
        let listener = self.listeners[ends.listener].socket.as_fd();
        let inet;
        let to: &dyn SockaddrLike = match &ends.client {
            FlowClient::Inet(client) => {
                inet = SockaddrStorage::from(*client);
                &inet
            }
            FlowClient::Unix(name) => &**name,
            FlowClient::Unbound => return counts.drops(Dropped::Unsendable, received.len()),
        };
        let mut answers = Vec::with_capacity(received.len());
        for number in received {
            let Some(message) = messages.get(number) else { break };
            let Ancillary { ecn, segment, descriptors, .. } = Ancillary::read(message.control);
            if descriptors {
                counts.drops(Dropped::Unsendable, 1);
                continue;
            }
            answers.extend(Piece::of(number, message.bytes.len(), segment.into()).map(|piece| (ecn, piece)));
        }
        for alike in answers.chunk_by(|(one, _), (next, _)| one == next) {
            let ecn = alike[0].0;
            let pieces: Vec<Piece> = alike.iter().map(|(_, piece)| *piece).collect();
            let mut left = &pieces[..];
            while let Some(first) = left.first() {
                let longest = flow.longest.load(Relaxed);
                let count = together(left, longest);
                let mut control = Ancillary { local: ends.local, ecn, ..Ancillary::default() };
                let tried = if count > 1 { &left[..count] } else { apart(left, longest) };
                counts.sends(tried);
                let sent = if count > 1 {
                    control.segment = first.length.try_into().unwrap_or(0);
                    let control = control.write(&ends.client);
                    messages.send_together(tried, listener, to, &control).map(|()| count)
                } else {
                    messages.send_apart(tried, listener, to, &control.write(&ends.client))
                };
                let arrived = sent.unwrap_or(0);
                counts.did_not_send(&tried[arrived..]);
                flow.to_client.fetch_add(length_of(&tried[..arrived]), Relaxed);
                let gone = match sent {
                    Ok(sent) => sent,
                    Err(Errno::EINTR) => 0,
                    Err(errno) if count > 1 && cannot_be_taken_apart(errno) => {
                        flow.longest.store(first.length - 1, Relaxed);
                        0
                    }
                    Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => {
                        counts.drops(Dropped::ClientBuffer, left.len());
                        left.len()
                    }
                    // Of the first one alone, or of all that were to go as one.
                    Err(errno) => {
                        let too_long = errno == Errno::EMSGSIZE;
                        counts.drops(if too_long { Dropped::TooLong } else { Dropped::Unsendable }, count);
                        count
                    }
                };
                left = &left[gone..];
            }
        }
    }
}

/// The first of these, up to those of which several go as one.
fn apart(pieces: &[Piece], longest: usize) -> &[Piece] {
    let alone = (0..pieces.len()).take_while(|at| together(&pieces[*at..], longest) == 1);
    &pieces[..alone.count()]
}

/// The thread that held it before left it whole: nothing is done under it that may fail halfway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
