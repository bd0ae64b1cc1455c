//! One client's story, in order: admitted, held until the service listens, given a socket, connected, relayed, closed. Its stages,
//! and which may follow which, are in `connection/stage.rs`.

mod abort;
mod acknowledged;
mod stage;

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bro_sockmap::{Lane, send_memory};
use nix::errno::Errno;
use nix::sys::socket::{SockaddrStorage, getsockname, setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use crate::peer::Peer;
use crate::proxy_protocol::{Bad, Introduction};
use crate::rate::Meter;
use crate::relay::half_close::Half;
use crate::relay::{Broken, DescriptorGuard, Direction, Method, Side, Tools, copy};
use crate::source::Origin;

pub use abort::{Abort, AbortProgress, AbortVerdict, STALLED, WHOLE};
pub use acknowledged::{Acknowledged, Amount};
pub use stage::{Census, Relayed, Stage, StageName};

/// Why a connection ended; the `reason` of its log line. Reasons that the control process decides can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// Both sides finished sending.
    Eof,
    /// The client aborted.
    #[serde(skip)]
    ClientReset(Errno),
    /// The service aborted.
    #[serde(skip)]
    ServiceReset(Errno),
    /// Nothing that was sent to this side was acknowledged for `--user-timeout`.
    #[serde(skip)]
    Vanished(Side),
    /// No byte for `--idle-timeout`.
    IdleTimeout,
    /// It outlived `--drain-timeout`.
    DrainTimeout,
    /// The service did not listen within `--start-timeout`.
    StartTimeout,
    /// The service could not be started.
    StartFailed,
    /// The service could not be connected to.
    #[serde(skip)]
    Refused(Errno),
    /// The client left while it was held.
    ClientLeft,
    /// Over `--connections-per-source`.
    SourceLimit,
    /// It came while the service slept, and wakes nothing (`--wake-ignore`).
    WakeIgnored,
    /// It came while the service slept, which was started too often (`--wakes-per-hour`).
    WakeLimit,
    /// One side passed descriptors, which cannot be passed on.
    #[serde(skip)]
    Descriptors(Side),
    /// A trusted peer sent no PROXY header, or one that makes no sense.
    #[serde(skip)]
    BadHeader(Bad),
    /// A trusted peer did not send its PROXY header in time.
    HeaderTimeout,
    /// A second SIGTERM, or `bro sleep --force`.
    Shutdown,
    /// Nothing moved on any connection for `--exit-idle-time`.
    IdleExit,
}

impl End {
    /// Every reason that a log line may give.
    pub const WORDS: [&str; 19] = [
        "eof",
        "client-reset",
        "service-reset",
        "client-vanished",
        "service-vanished",
        "idle-timeout",
        "drain-timeout",
        "start-timeout",
        "start-failed",
        "refused",
        "client-left",
        "source-limit",
        "wake-ignored",
        "wake-limit",
        "descriptors",
        "bad-proxy-header",
        "proxy-header-timeout",
        "shutdown",
        "idle-exit",
    ];

    /// The reason in its log line, of which there is a fixed number.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Eof => "eof",
            Self::ClientReset(_) => "client-reset",
            Self::ServiceReset(_) => "service-reset",
            Self::Vanished(Side::Client) => "client-vanished",
            Self::Vanished(Side::Service) => "service-vanished",
            Self::IdleTimeout => "idle-timeout",
            Self::DrainTimeout => "drain-timeout",
            Self::StartTimeout => "start-timeout",
            Self::StartFailed => "start-failed",
            Self::Refused(_) => "refused",
            Self::ClientLeft => "client-left",
            Self::SourceLimit => "source-limit",
            Self::WakeIgnored => "wake-ignored",
            Self::WakeLimit => "wake-limit",
            Self::Descriptors(_) => "descriptors",
            Self::BadHeader(_) => "bad-proxy-header",
            Self::HeaderTimeout => "proxy-header-timeout",
            Self::Shutdown => "shutdown",
            Self::IdleExit => "idle-exit",
        }
    }

    /// What the kernel said, where it said something.
    #[must_use]
    pub fn detail(self) -> Option<&'static str> {
        match self {
            Self::ClientReset(errno) | Self::ServiceReset(errno) | Self::Refused(errno) => Some(errno.desc()),
            Self::Descriptors(Side::Client) => {
                Some("the client passed descriptors (SCM_RIGHTS), which a relay cannot pass on")
            }
            Self::Descriptors(Side::Service) => {
                Some("the service passed descriptors (SCM_RIGHTS), which a relay cannot pass on")
            }
            Self::BadHeader(bad) => Some(bad.sentence()),
            Self::Vanished(_) => Some("it acknowledged nothing of what was sent to it (--user-timeout)"),
            _ => None,
        }
    }
}

impl From<Broken> for End {
    fn from(broken: Broken) -> Self {
        match broken.side {
            side if broken.errno == copy::DESCRIPTORS => Self::Descriptors(side),
            Side::Client => Self::ClientReset(broken.errno),
            Side::Service => Self::ServiceReset(broken.errno),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A balancer in front that has introduced a client.
#[derive(Debug)]
pub struct Through {
    /// The balancer.
    pub peer: Peer,
    /// The address at which the client reached it, where it has said so.
    pub destination: Option<SocketAddr>,
    /// How long its header was.
    pub header: u64,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// Its number in the log.
    pub number: u64,
    /// The forwarder's socket towards the client.
    pub client: OwnedFd,
    /// The client.
    pub peer: Peer,
    /// The balancer it came through, where that one has introduced the client.
    pub through: Option<Box<Through>>,
    /// Whether it may pass descriptors.
    pub guard: DescriptorGuard,
    /// `--connections-per-source` counts it.
    pub counted: bool,
    /// The address under which the service is to see it.
    pub origin: Origin,
    /// The index of the listener it came through.
    pub listener: usize,
    /// The index of its target.
    pub target: usize,
    /// When it was accepted.
    pub opened: Instant,
    /// When bytes last moved, as far as noticed; before that, when it began to wait for the service.
    pub active: Instant,
    /// What is known of its sides' acknowledgements.
    pub answers: Acknowledged,
    /// How many bytes had moved then.
    pub moved: u64,
    /// Bytes delivered to the service and to the client when they were last looked at.
    pub last: (u64, u64),
    /// The client has spoken since the service did.
    pub awaits_answer: bool,
    /// It found the service asleep and was the first to.
    pub woke: bool,
    /// It keeps nothing awake (`--idle-ignore`).
    pub ignored: bool,
    /// It wakes nothing (`--wake-ignore`).
    pub wakes_nothing: bool,
    /// How much has to move on it to keep anything awake (`--idle-below`).
    pub meter: Option<Box<Meter>>,
    /// From accepted to connected, for the one that woke the service.
    pub cold_start: Option<Duration>,
    stage: Stage,
    /// How the two sides talk, which decides about lanes.
    pub talk: Talk,
    /// What epoll was last told, per side.
    pub registered: [Registration; 2],
}

/// How the two sides of a connection talk, as far as bytes that go through this process show it: lanes are opened for connections
/// that ask and answer in turn. A short connection has none, and pays for none; a stream has none either.
#[derive(Debug, Clone, Copy, Default)]
pub struct Talk {
    /// Bytes that had reached the service, and the client, when this was looked at last.
    last: (u64, u64),
    /// The side that spoke last.
    speaker: Option<Side>,
    /// How often the turn has passed on, since the last stream.
    turns: u8,
    /// How much came in this turn, and half of what counted before it.
    said: u64,
}

/// What is to be done about a connection's lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneDecision {
    /// Nothing.
    Leave,
    /// They ask and answer: it gets them.
    Open,
    /// One side streams: it loses them.
    Close,
}

impl Talk {
    /// The client has asked, been answered, and asks again.
    const ENOUGH: u8 = 3;

    /// Notes how many bytes have reached the service and the client.
    fn hear(&mut self, up: u64, down: u64) -> LaneDecision {
        let (asked, answered) = (up - self.last.0, down - self.last.1);
        self.last = (up, down);
        if asked + answered == 0 {
            return LaneDecision::Leave;
        }
        let speaker = if answered > asked { Side::Service } else { Side::Client };
        // Both have said something since: with one lane, only the direction without it shows here each time.
        if self.speaker != Some(speaker) || asked.min(answered) > 0 {
            self.speaker = Some(speaker);
            self.turns = self.turns.saturating_add(1);
            self.said /= 2;
        }
        self.said += asked.max(answered);
        if self.said > bro_ebpf::BULK {
            self.turns = 0;
            return LaneDecision::Close;
        }
        if self.turns >= Self::ENOUGH { LaneDecision::Open } else { LaneDecision::Leave }
    }
}

/// What came of moving bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pumped {
    /// What could be moved was moved; not both directions are finished.
    Open,
    /// Both ways are finished.
    Finished,
}

/// What epoll is to report of a socket. Errors and hang-ups it always reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
}

/// What epoll knows of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registration {
    /// Nothing.
    Absent,
    /// This is wanted of it.
    Watched(Interest),
    /// It hung up when nothing was wanted of it, and epoll would report that for ever: it is not watched until something is wanted.
    /// Not the same as [`Self::Absent`]: a socket that was never watched may have an abort to report.
    Silenced,
}

impl Connection {
    /// One that was just accepted. `meter`: how much has to move on it to keep anything awake.
    #[must_use]
    pub fn accepted(
        number: u64,
        client: OwnedFd,
        peer: Peer,
        (listener, target): (usize, usize),
        meter: Option<Box<Meter>>,
        now: Instant,
    ) -> Self {
        let guard = match peer {
            Peer::Tcp(_) | Peer::Vsock { .. } => DescriptorGuard::Needless,
            Peer::Unix { .. } => DescriptorGuard::of(client.as_fd()),
        };
        Self {
            number,
            client,
            origin: Origin::of(&peer),
            peer,
            through: None,
            guard,
            counted: false,
            listener,
            target,
            opened: now,
            active: now,
            answers: Acknowledged::default(),
            moved: 0,
            last: (0, 0),
            awaits_answer: false,
            woke: false,
            ignored: false,
            wakes_nothing: false,
            meter,
            cold_start: None,
            stage: Stage::Admitted,
            talk: Talk::default(),
            registered: [Registration::Absent; 2],
        }
    }

    /// A trusted balancer has said who the client is, in a header of so many bytes.
    pub fn introduce(&mut self, said: Introduction, header: usize) {
        let (peer, destination) = match said {
            Introduction::Client { source, destination } => (Peer::Tcp(source), Some(destination)),
            Introduction::Nothing => (self.peer.clone(), None),
        };
        self.origin = Origin::of(&peer);
        let balancer = std::mem::replace(&mut self.peer, peer);
        self.through = Some(Box::new(Through { peer: balancer, destination, header: header as u64 }));
    }

    /// The peer at the other end of the client's socket.
    #[must_use]
    pub fn neighbour(&self) -> &Peer {
        self.through.as_ref().map_or(&self.peer, |through| &through.peer)
    }

    /// The client's address and the one it has reached, for the service to be told.
    #[must_use]
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        let Peer::Tcp(source) = self.peer else { return None };
        let own = || crate::sockaddr::tcp(&getsockname::<SockaddrStorage>(self.client.as_raw_fd()).ok()?);
        let destination = self.through.as_ref().and_then(|through| through.destination).or_else(own)?;
        Some((source, destination))
    }

    /// The socket of one side, where there is one.
    #[must_use]
    pub fn socket(&self, side: Side) -> Option<BorrowedFd<'_>> {
        match (side, &self.stage) {
            (Side::Client, _) => Some(self.client.as_fd()),
            (Side::Service, Stage::Connecting { service, .. } | Stage::Relaying { service, .. }) => {
                Some(service.as_fd())
            }
            (Side::Service, _) => None,
        }
    }

    /// What to wait for on one side; `None` when nothing more can come of it.
    #[must_use]
    pub fn interest(&self, side: Side) -> Option<Interest> {
        match (&self.stage, side) {
            (Stage::Introducing(_) | Stage::Silent, Side::Client) => {
                Some(Interest { read: true, write: false })
            }
            // Only a reset is of interest while the client is held; what it sends waits in its socket.
            (
                Stage::Admitted | Stage::Held | Stage::AwaitingSocket | Stage::Connecting { .. },
                Side::Client,
            ) => Some(Interest { read: false, write: false }),
            (Stage::Connecting { .. }, Side::Service) => Some(Interest { read: false, write: true }),
            (
                Stage::Admitted | Stage::Introducing(_) | Stage::Silent | Stage::Held | Stage::AwaitingSocket,
                Side::Service,
            ) => None,
            (Stage::Relaying { up, down, abort, .. }, side) => {
                let (from_here, to_here) = match side {
                    Side::Client => (up.half(), down.half()),
                    Side::Service => (down.half(), up.half()),
                };
                if abort.as_ref().is_some_and(|abort| abort.side == side) {
                    // Epoll would report its abort for ever: it is watched while there is room for what is left.
                    return from_here.wants_read().then_some(Interest { read: true, write: false });
                }
                let interest = Interest { read: from_here.wants_read(), write: to_here.wants_write() };
                // Once both FINs have passed here, the socket reports a hang-up for ever.
                let over = !from_here.is_open() && !from_here.is_void() && to_here == Half::Finished;
                (!over).then_some(interest)
            }
        }
    }

    /// The relay, as the log names it: the one that moved bytes, or, where none moved, the one that was meant to.
    #[must_use]
    pub fn relay_name(&self, method: Method) -> &'static str {
        let (ours, copied) = match &self.stage {
            Stage::Relaying { up, down, .. } => (up.total + down.total, up.copied + down.copied),
            _ => (0, 0),
        };
        match method {
            _ if self.by_lanes() > 0 => "sockmap",
            Method::Splice if ours > 0 && ours == copied => "copy",
            Method::Splice => "splice",
            Method::Copy | Method::Vsock | Method::Messages => "copy",
        }
    }

    /// Bytes that this process has spliced and copied to the service.
    #[must_use]
    pub const fn to_service(&self) -> (u64, u64) {
        match &self.stage {
            Stage::Relaying { up, .. } => (up.total.saturating_sub(up.copied), up.copied),
            _ => (0, 0),
        }
    }

    /// Bytes that lanes moved.
    fn by_lanes(&self) -> u64 {
        match &self.stage {
            Stage::Relaying { up, down, .. } => up.by_lanes() + down.by_lanes(),
            _ => 0,
        }
    }

    /// Its lanes.
    pub fn lanes(&self) -> impl Iterator<Item = (Side, &Lane)> {
        let (up, down) = match &self.stage {
            Stage::Relaying { up, down, .. } => (up.lane(), down.lane()),
            _ => (None, None),
        };
        up.map(|lane| (Side::Service, lane)).into_iter().chain(down.map(|lane| (Side::Client, lane)))
    }

    /// Bytes that reached the service and the client so far.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        match &self.stage {
            Stage::Relaying { up, down, .. } => (up.delivered(), down.delivered()),
            _ => (0, 0),
        }
    }

    /// Has a byte moved since this was asked last? Then the connection was active, `now`.
    pub fn notice_bytes(&mut self, now: Instant) -> bool {
        self.notice_direction();
        let total = self.last.0 + self.last.1;
        let moved = std::mem::replace(&mut self.moved, total) != total;
        if moved {
            self.active = now;
        }
        moved
    }

    /// Where that goes by bytes: have enough moved since this was asked last to keep the service awake?
    pub fn keeps_awake(&mut self, now: Instant) -> bool {
        let moved = self.notice_bytes(now);
        let total = self.moved;
        match &mut self.meter {
            _ if self.ignored => false,
            None => moved,
            Some(meter) => meter.reaches(total, now),
        }
    }

    /// Notes which side spoke last.
    fn notice_direction(&mut self) {
        let (up, down) = self.totals();
        match std::mem::replace(&mut self.last, (up, down)) {
            before if before.1 != down => self.awaits_answer = false,
            before if before.0 != up => self.awaits_answer = true,
            _ => {}
        }
    }

    /// Moves what can be moved in both directions.
    ///
    /// # Errors
    /// The side that broke.
    pub fn pump(&mut self, tools: &mut Tools, up_ready: bool, down_ready: bool) -> Result<Pumped, Broken> {
        let Stage::Relaying { service, up, down, .. } = &mut self.stage else { return Ok(Pumped::Open) };
        if up_ready {
            up.pump(self.client.as_fd(), service.as_fd(), tools)?;
        }
        // A socket of vsock whose other end is closed does not become writable for that, if anything was left to be read when it came
        // to know (`vsock_poll`): what waits for it is tried once its end has been read.
        let may_be_closed = up.is_from_vsock() && !up.half().is_open() && down.half().wants_write();
        if down_ready || may_be_closed {
            down.pump(service.as_fd(), self.client.as_fd(), tools)?;
        }
        let finished = up.half() == Half::Finished && down.half() == Half::Finished;
        Ok(if finished { Pumped::Finished } else { Pumped::Open })
    }

    /// What its lanes are to be, after bytes have moved.
    pub fn wants_lanes(&mut self) -> LaneDecision {
        let Stage::Relaying { up, down, abort: None, .. } = &self.stage else { return LaneDecision::Leave };
        let wanted = self.talk.hear(up.delivered(), down.delivered());
        if self.lanes().any(|(_, lane)| lane.is_in_bulk()) {
            self.talk.turns = 0;
            return LaneDecision::Close;
        }
        // A direction may end while it has a lane; what is left to say is not worth a new one.
        let open = up.half().is_open() && down.half().is_open();
        match wanted {
            LaneDecision::Open if self.lanes().next().is_some() || !open => LaneDecision::Leave,
            LaneDecision::Open => {
                // Where no lane can be had, this is not tried again with each message.
                self.talk.turns = 0;
                LaneDecision::Open
            }
            LaneDecision::Close if self.lanes().next().is_none() => LaneDecision::Leave,
            wanted => wanted,
        }
    }

    /// One side has aborted. `errno` is what a call on its socket failed with; the kernel does not say that again. False when no
    /// side is left that could be owed anything.
    pub fn abort(&mut self, side: Side, errno: Option<Errno>, tools: &mut Tools) -> bool {
        let Stage::Relaying { up, down, abort, .. } = &mut self.stage else { return false };
        if let Some(abort) = abort {
            abort.tell(errno);
            return abort.side == side;
        }
        let (from, to) = match side {
            Side::Client => (up, down),
            Side::Service => (down, up),
        };
        to.sink_aborted(tools);
        // EPIPE: it had finished sending before (`tcp_reset`), or has closed without having anything left to read (unix). That
        // end is in its place in the stream.
        from.source_aborted(errno.is_some_and(|errno| errno != Errno::EPIPE));
        *abort = Some(Box::new(Abort::new(side, errno, Instant::now())));
        true
    }

    /// How far the other side has come with what it is owed before an abort is passed on to it; `None` when it has acknowledged
    /// all of it, or there is no abort.
    #[must_use]
    pub fn owed(&self) -> Option<AbortProgress> {
        let Stage::Relaying { service, up, down, abort: Some(abort) } = &self.stage else { return None };
        let (from, sink) = match abort.side {
            Side::Client => (up, service),
            Side::Service => (down, &self.client),
        };
        // Nothing is ever queued in a unix socket: what was written has arrived, and stays when this end is closed.
        let queued = send_memory(sink.as_fd()).map_or(0, |memory| memory.queued);
        let paid = from.half().is_over() && queued == 0;
        (!paid).then(|| AbortProgress { delivered: from.delivered(), queued })
    }

    /// Has one side aborted?
    #[must_use]
    pub const fn is_aborted(&self) -> bool {
        matches!(self.stage, Stage::Relaying { abort: Some(_), .. })
    }

    /// The abort that is to be passed on, if one is.
    pub fn abort_mut(&mut self) -> Option<&mut Abort> {
        match &mut self.stage {
            Stage::Relaying { abort, .. } => abort.as_deref_mut(),
            _ => None,
        }
    }

    /// How the connection ends if it ends now with `end`: by the abort, if one side has aborted already.
    #[must_use]
    pub fn end(&self, end: End) -> End {
        match &self.stage {
            Stage::Relaying { abort: Some(abort), .. } => abort.end(self.socket(abort.side)),
            _ => end,
        }
    }

    /// May it end without an abort? When both sides have finished; and where neither side loses a byte: a client that never said
    /// anything, a connection that merely sleeps.
    fn ends_cleanly(&self, end: End) -> bool {
        match (end, &self.stage) {
            (End::Eof, _) => true,
            (End::ClientLeft, Stage::Silent) => true,
            (End::ClientLeft, Stage::Introducing(incoming)) => incoming.length() == 0,
            (End::IdleExit, Stage::Relaying { up, down, .. }) => {
                // One side waits for an answer, or for the rest of one: a FIN would look like the answer's end.
                let rests =
                    |direction: &Direction| direction.half().is_open() && !direction.half().wants_write();
                rests(up) && rests(down) && !self.awaits_answer
            }
            (End::IdleExit, _) => true,
            _ => false,
        }
    }

    /// Ends it: sockets closed, as an abort (RST, see [`closing_aborts`]) unless it ends cleanly, and borrowed pipes given up.
    pub fn close(self, end: End, tools: &mut Tools) {
        let aborted = !self.ends_cleanly(end);
        closing_aborts(&self.client, aborted);
        match self.stage {
            Stage::Relaying { service, mut up, mut down, .. } => {
                closing_aborts(&service, aborted);
                up.discard(tools);
                down.discard(tools);
            }
            Stage::Admitted
            | Stage::Introducing(_)
            | Stage::Silent
            | Stage::Held
            | Stage::AwaitingSocket
            | Stage::Connecting { .. } => {}
        }
    }
}

/// Whether closing the socket is an abort: a RST, and what still waits to be sent is thrown away (socket(7), SO_LINGER). It is,
/// from the start until the connection has ended well, so that a killed forwarder never looks like a clean end of stream. A unix
/// socket has no RST; closing it with unread bytes is the nearest there is.
pub fn closing_aborts(socket: &impl AsFd, yes: bool) {
    let linger = nix::libc::linger { l_onoff: yes.into(), l_linger: 0 };
    setsockopt(socket, sockopt::Linger, &linger).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(talk: &mut Talk, both: &mut (u64, u64), up: u64, down: u64) -> LaneDecision {
        *both = (both.0 + up, both.1 + down);
        talk.hear(both.0, both.1)
    }

    #[test]
    fn a_host_is_an_ipv4_address_or_a_64() {
        let source = |address: &str| Peer::Tcp(address.parse().unwrap()).source();
        assert_eq!(source("[2001:db8:1:2::3]:1"), source("[2001:db8:1:2:ffff::4]:2"));
        assert_ne!(source("[2001:db8:1:2::3]:1"), source("[2001:db8:1:3::3]:1"));
        assert_ne!(source("192.0.2.1:1"), source("192.0.2.2:1"));
        assert_eq!(source("192.0.2.1:1"), source("[::ffff:192.0.2.1]:1"));
        assert_ne!(source("[::ffff:192.0.2.1]:1"), source("[::ffff:192.0.2.2]:1"));
    }

    #[test]
    fn every_reason_is_one_that_is_counted() {
        use End::*;
        let (errno, bad) = (Errno::EPIPE, Bad::TooLong);
        let all = [
            Eof,
            ClientReset(errno),
            ServiceReset(errno),
            Vanished(Side::Client),
            Vanished(Side::Service),
            IdleTimeout,
            DrainTimeout,
            StartTimeout,
            StartFailed,
            Refused(errno),
            ClientLeft,
            SourceLimit,
            WakeIgnored,
            WakeLimit,
            Descriptors(Side::Client),
            BadHeader(bad),
            HeaderTimeout,
            Shutdown,
            IdleExit,
        ];
        assert_eq!(all.map(End::word), End::WORDS);
    }

    #[test]
    fn lanes_are_for_those_who_ask_and_answer_in_turn() {
        let (mut talk, mut both) = (Talk::default(), (0, 0));
        // A short connection: connect, ask, be answered.
        assert_eq!(heard(&mut talk, &mut both, 100, 0), LaneDecision::Leave);
        assert_eq!(heard(&mut talk, &mut both, 0, 5000), LaneDecision::Leave);
        assert_eq!(heard(&mut talk, &mut both, 0, 0), LaneDecision::Leave);
        // It asks again.
        assert_eq!(heard(&mut talk, &mut both, 100, 0), LaneDecision::Open);
        // A large answer, in pieces: a stream, until they talk in turn again.
        assert_eq!(heard(&mut talk, &mut both, 0, bro_ebpf::BULK / 2), LaneDecision::Open);
        assert_eq!(heard(&mut talk, &mut both, 0, bro_ebpf::BULK / 2), LaneDecision::Close);
        assert_eq!(heard(&mut talk, &mut both, 0, 1), LaneDecision::Close);
        assert_eq!(heard(&mut talk, &mut both, 1, 0), LaneDecision::Leave);
        assert_eq!(heard(&mut talk, &mut both, 0, 1), LaneDecision::Leave);
        assert_eq!(heard(&mut talk, &mut both, 1, 0), LaneDecision::Open);
    }

    #[test]
    fn one_lane_alone_is_kept_by_those_who_talk_in_turn() {
        let (mut talk, mut both) = (Talk::default(), (0, 0));
        for _ in 0..3 {
            heard(&mut talk, &mut both, 1000, 1000);
        }
        for _ in 0..10_000 {
            assert_eq!(heard(&mut talk, &mut both, 1000, 20_000), LaneDecision::Open);
        }
        // Large ones both ways are a stream.
        let large = bro_ebpf::BULK / 2 + 1000;
        assert!((0..20).any(|_| heard(&mut talk, &mut both, large, large) == LaneDecision::Close));
    }

    #[test]
    fn a_service_that_only_sends_gets_no_lane() {
        let (mut talk, mut both) = (Talk::default(), (0, 0));
        assert_eq!(heard(&mut talk, &mut both, 100, 0), LaneDecision::Leave);
        for _ in 0..10_000 {
            assert_ne!(heard(&mut talk, &mut both, 0, 100), LaneDecision::Open);
        }
    }
}
