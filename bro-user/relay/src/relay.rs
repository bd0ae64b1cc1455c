//! Moving a connection's bytes both ways until both FINs have passed or something fails.
//!
//! [`half_close`] decides, [`splice`] and [`copy`] move; this file puts them together for one direction at a time.

pub mod copy;
pub mod half_close;
pub mod pipes;
pub mod splice;

use std::os::fd::{AsRawFd as _, BorrowedFd};

use bro_sockmap::{Lane, LaneCounters};
use bytes::Bytes;
use half_close::Half;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};
use pipes::{Pipe, Pool};
use splice::Filled;

/// How a direction's bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Through a pipe.
    Splice,
    /// Through a buffer.
    Copy,
    /// The same, from a socket of vsock(7), whose end the kernel tells otherwise. splice(2) would read from it into new pages, as many as the
    /// pipe has room for, however little there is (`copy_splice_read`).
    Vsock,
    /// Through a buffer, each message as a whole (unix sockets of SOCK_SEQPACKET). One counts as a byte more than it has, so that an
    /// empty one is something to pass on as well.
    Messages,
}

/// One end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client's.
    Client,
    /// The service's.
    Service,
}

/// Whether descriptors may come along with what a source sends (unix(7) SCM_RIGHTS). They cannot be relayed, and splice(2) and
/// recv(2) would lose them without a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DescriptorGuard {
    /// None can: it is no unix socket, or the kernel refuses them to the sender.
    Needless,
    /// The kernel refuses them from now on; what was sent before may carry some.
    Backlog,
    /// The kernel does not refuse any: all that comes is looked at, and so is copied.
    Always,
}

impl DescriptorGuard {
    /// Of a unix socket; has the kernel refuse them from now on, if it can.
    #[must_use]
    pub fn of(socket: BorrowedFd<'_>) -> Self {
        let refuses = crate::sys::refuses_descriptors(socket);
        if refuses != Some(true) {
            crate::sys::ask_for_nothing_else(socket);
        }
        match refuses {
            Some(true) => Self::Needless,
            Some(false) if crate::sys::refuse_descriptors(socket).is_ok() => Self::Backlog,
            _ => Self::Always,
        }
    }
}

/// A call on one side's socket that failed: the connection's abort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken {
    /// The socket's side.
    pub side: Side,
    /// What the kernel said.
    pub errno: Errno,
}

/// What all connections share: the pipes, the buffer, and the running totals.
#[derive(Debug)]
pub struct Tools {
    /// The pipes.
    pub pool: Pool,
    scratch: Box<[u8]>,
    /// Bytes moved by splice.
    pub spliced: u64,
    /// Bytes moved by copying.
    pub copied: u64,
    refusal_announced: bool,
}

impl Tools {
    /// With a pool of at most `pipes` pipes.
    #[must_use]
    pub fn new(pipes: usize) -> Self {
        Self {
            pool: Pool::new(pipes),
            scratch: vec![0; copy::CHUNK].into_boxed_slice(),
            spliced: 0,
            copied: 0,
            refusal_announced: false,
        }
    }
}

/// Where a direction's waiting bytes are.
#[derive(Debug)]
enum Held {
    Nothing,
    // Each a pointer: idle connections, the most numerous, should not pay for what they do not hold.
    Pipe(Pipe),
    Bytes(Box<Bytes>),
}

/// One direction of a connection.
#[derive(Debug)]
pub struct Direction {
    half: Half,
    held: Held,
    method: Method,
    source: Side,
    /// Whether descriptors may come from the source.
    guard: DescriptorGuard,
    /// How many of our own bytes, which come first, are not written yet. They are not counted.
    preceding: usize,
    /// Bytes from the source that were for the forwarder, and are not passed on.
    kept: u64,
    /// The kernel's way past us, where this direction has one. Boxed: most connections of a host without have none.
    lane: Option<Box<Lane>>,
    /// What this direction's earlier lanes moved.
    moved_before: u64,
    /// Bytes that we wrote to the sink.
    pub total: u64,
    /// How many of them were copied.
    pub copied: u64,
}

/// After so many bytes in one go, others get their turn.
const TURN: usize = 1024 * 1024;

/// A read of at least this much suggests that more is there already; after less, epoll is asked.
const LARGE: usize = 16 * 1024;

impl Direction {
    /// A direction that starts at `source`.
    #[must_use]
    pub const fn new(source: Side, method: Method) -> Self {
        Self {
            half: Half::NEW,
            held: Held::Nothing,
            method,
            source,
            guard: DescriptorGuard::Needless,
            preceding: 0,
            kept: 0,
            lane: None,
            moved_before: 0,
            total: 0,
            copied: 0,
        }
    }

    /// Gives the direction a lane that was told of [`Direction::dealt_with`].
    pub fn set_lane(&mut self, lane: Lane) {
        self.lane = Some(Box::new(lane));
    }

    /// Notes how many of the source's bytes, before the first that is passed on, were for the forwarder.
    pub fn keep(&mut self, bytes: u64) {
        self.kept = bytes;
    }

    /// How many of the bytes that the source has given to us are in the sink, or were for us: its lane has to know that. `None`
    /// while our own bytes, which come first, are not written yet: nothing may overtake them.
    #[must_use]
    pub const fn dealt_with(&self) -> Option<u64> {
        if self.preceding == 0 { Some(self.kept + self.total) } else { None }
    }

    /// Is its source a socket of vsock(7)?
    #[must_use]
    pub const fn is_from_vsock(&self) -> bool {
        matches!(self.method, Method::Vsock)
    }

    /// Descriptors may come from its source, a unix socket.
    pub fn set_guard(&mut self, guard: DescriptorGuard) {
        self.guard = guard;
    }

    /// Puts our own bytes in front of the source's first one. Nothing is read before they are written.
    pub fn precede(&mut self, bytes: Vec<u8>) {
        self.preceding = bytes.len();
        self.half.read(bytes.len() + usize::from(self.method == Method::Messages));
        self.held = Held::Bytes(Box::new(bytes.into()));
    }

    /// Takes its lane away, with what that did: what is sent from now on comes to us.
    pub fn take_lane(&mut self) -> Option<(Lane, LaneCounters)> {
        let lane = *self.lane.take()?;
        lane.enable(false);
        // All counters in one look: a message that was let through before may be counted any moment.
        let did = lane.snapshot();
        self.moved_before += did.bytes;
        Some((lane, did))
    }

    /// Its lane.
    #[must_use]
    pub fn lane(&self) -> Option<&Lane> {
        self.lane.as_deref()
    }

    /// The same, to be changed.
    pub fn lane_mut(&mut self) -> Option<&mut Lane> {
        self.lane.as_deref_mut()
    }

    /// Bytes that its lanes moved, this one and the earlier ones.
    #[must_use]
    pub fn by_lanes(&self) -> u64 {
        self.moved_before + self.lane.as_ref().map_or(0, |lane| lane.bytes())
    }

    /// Bytes that reached the sink, through us or through lanes.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.total + self.by_lanes()
    }

    /// Where it stands.
    #[must_use]
    pub const fn half(&self) -> Half {
        self.half
    }

    const fn sink(&self) -> Side {
        match self.source {
            Side::Client => Side::Service,
            Side::Service => Side::Client,
        }
    }

    /// The source has aborted. What it had sent is still delivered. `taken`: the kernel has reported that already and will not do
    /// so again; otherwise it does at the end of what is left to be read.
    pub fn source_aborted(&mut self, taken: bool) {
        if taken {
            self.half.source_aborted();
        }
    }

    /// The sink has aborted: what is held is given up, and what comes is thrown away.
    pub fn sink_aborted(&mut self, tools: &mut Tools) {
        self.half.sink_aborted();
        self.discard(tools);
        if let Some(lane) = &self.lane {
            // What the lane's sender sends comes to us, as long as it does not know of the abort.
            lane.enable(false);
        }
    }

    /// Moves what can be moved now, and passes the FIN on when it is due.
    ///
    /// # Errors
    /// The side on which a call on the socket failed.
    pub fn pump(
        &mut self,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
        tools: &mut Tools,
    ) -> Result<(), Broken> {
        let mut moved = 0;
        loop {
            if self.half.wants_write() && !self.flush(sink, tools)? {
                return Ok(());
            }
            if self.half.fin_due() {
                // ENOTCONN: the sink is already gone; reading from it will say how.
                match shutdown(sink.as_raw_fd(), Shutdown::Write) {
                    Ok(()) | Err(Errno::ENOTCONN) => self.half.fin_sent(),
                    Err(errno) => return Err(Broken { side: self.sink(), errno }),
                }
            }
            if !self.half.wants_read() || moved >= TURN {
                return Ok(());
            }
            let Some(count) = self.fill(source, sink, tools)? else { return Ok(()) };
            // A short read is left to level-triggered epoll: it costs nothing when there is no more, which is the usual case.
            // But what was sent before the kernel refused descriptors is to be over soon.
            let short = count < LARGE && self.guard != DescriptorGuard::Backlog;
            if self.half.is_open() && !self.half.wants_write() && short {
                return Ok(());
            }
            moved += count;
        }
    }

    /// One read. `None` when nothing waits, `Some(0)` at the end of the stream.
    fn fill(
        &mut self,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
        tools: &mut Tools,
    ) -> Result<Option<usize>, Broken> {
        if self.half.is_void() {
            return self.throw_away(source, tools);
        }
        let spliced = self.method == Method::Splice && self.guard == DescriptorGuard::Needless;
        let borrowed = if spliced { tools.pool.borrow() } else { None };
        let Some(pipe) = borrowed else { return self.fill_by_copy(source, sink, tools) };
        match splice::fill(source, &pipe) {
            Ok(Filled::Bytes(count)) => {
                self.half.read(count);
                self.held = Held::Pipe(pipe);
                let _emptied = self.flush(sink, tools)?;
                Ok(Some(count))
            }
            Ok(Filled::End) => {
                tools.pool.give_back(pipe);
                self.half.ended();
                Ok(Some(0))
            }
            Ok(Filled::Nothing) => {
                tools.pool.give_back(pipe);
                Ok(None)
            }
            Ok(Filled::Urgent) => {
                tools.pool.give_back(pipe);
                self.fill_by_copy(source, sink, tools)
            }
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => {
                tools.pool.give_back(pipe);
                if !std::mem::replace(&mut tools.refusal_announced, true) {
                    tracing::warn!("splice is refused for a socket; its bytes are copied");
                }
                self.method = Method::Copy;
                self.fill_by_copy(source, sink, tools)
            }
            Err(errno) => {
                tools.pool.give_back(pipe);
                Err(self.broke(errno))
            }
        }
    }

    /// Reading has failed, which it does only once nothing is left to be read.
    fn broke(&mut self, errno: Errno) -> Broken {
        self.half.broke();
        Broken { side: self.source, errno }
    }

    /// One read, where no descriptors can come along.
    fn read_bytes(&self, source: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
        match self.method {
            Method::Vsock => copy::read_vsock(source, buffer),
            Method::Splice | Method::Copy | Method::Messages => copy::read(source, buffer),
        }
    }

    /// One read of bytes that have no sink any more.
    fn throw_away(&mut self, source: BorrowedFd<'_>, tools: &mut Tools) -> Result<Option<usize>, Broken> {
        match self.read_bytes(source, &mut tools.scratch) {
            Ok(0) => self.half.ended(),
            Ok(count) => return Ok(Some(count)),
            Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(self.broke(errno)),
        }
        Ok(None)
    }

    /// How much a read has taken, if there was anything. Where there was nothing, all that came before the guard has been read.
    fn received(&mut self, read: nix::Result<usize>) -> Result<Option<usize>, Broken> {
        match read {
            Ok(count) => Ok(Some(count)),
            Err(Errno::EAGAIN) => {
                if self.guard == DescriptorGuard::Backlog {
                    self.guard = DescriptorGuard::Needless;
                }
                Ok(None)
            }
            Err(errno) => Err(self.broke(errno)),
        }
    }

    fn fill_by_copy(
        &mut self,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
        tools: &mut Tools,
    ) -> Result<Option<usize>, Broken> {
        if self.method == Method::Messages {
            return self.fill_message(source, sink, tools);
        }
        let read = match self.guard {
            DescriptorGuard::Needless => self.read_bytes(source, &mut tools.scratch),
            DescriptorGuard::Backlog | DescriptorGuard::Always => {
                copy::read_guarded(source, &mut tools.scratch, MsgFlags::empty())
            }
        };
        let Some(count) = self.received(read)? else { return Ok(None) };
        if count == 0 {
            self.half.ended();
            return Ok(Some(0));
        }
        self.half.read(count);
        let written = match copy::write(&tools.scratch[..count], sink) {
            Ok(written) => written,
            Err(Errno::EAGAIN) => 0,
            Err(errno) => return Err(Broken { side: self.sink(), errno }),
        };
        self.wrote(written, sink);
        self.copied += written as u64;
        tools.copied += written as u64;
        if written < count {
            self.held = Held::Bytes(Box::new(Bytes::copy_from_slice(&tools.scratch[written..count])));
        }
        Ok(Some(count))
    }

    /// One message, however long. A message that is longer than the sink's buffer breaks the connection.
    fn fill_message(
        &mut self,
        source: BorrowedFd<'_>,
        sink: BorrowedFd<'_>,
        tools: &mut Tools,
    ) -> Result<Option<usize>, Broken> {
        let mut long = Vec::new();
        let read = copy::message_length(source).and_then(|length| {
            if length > copy::LONGEST_MESSAGE {
                return Err(Errno::EMSGSIZE);
            }
            long.resize(if length > tools.scratch.len() { length } else { 0 }, 0);
            let buffer = if long.is_empty() { &mut tools.scratch[..] } else { &mut long[..] };
            copy::read_guarded(source, buffer, MsgFlags::empty())
        });
        let Some(count) = self.received(read)? else { return Ok(None) };
        if count == 0 && crate::sys::has_finished(source) {
            self.half.ended();
            return Ok(Some(0));
        }
        self.half.read(count + 1);
        let message = if long.is_empty() { &tools.scratch[..count] } else { &long[..count] };
        match copy::write(message, sink) {
            Ok(written) => {
                self.half.wrote(1);
                self.wrote(written, sink);
                self.copied += written as u64;
                tools.copied += written as u64;
            }
            Err(Errno::EAGAIN) => self.held = Held::Bytes(Box::new(Bytes::copy_from_slice(message))),
            Err(errno) => return Err(Broken { side: self.sink(), errno }),
        }
        Ok(Some(count))
    }

    /// Writes what waits; true when nothing waits any more.
    fn flush(&mut self, sink: BorrowedFd<'_>, tools: &mut Tools) -> Result<bool, Broken> {
        while self.half.wants_write() {
            let written = match &mut self.held {
                Held::Pipe(pipe) => {
                    splice::empty(pipe, sink, self.half.held()).inspect(|n| tools.spliced += *n as u64)
                }
                Held::Bytes(rest) => copy::write_rest(rest, sink).inspect(|n| {
                    let counted = n.saturating_sub(self.preceding) as u64;
                    self.copied += counted;
                    tools.copied += counted;
                    if self.method == Method::Messages {
                        self.half.wrote(1);
                    }
                }),
                Held::Nothing => unreachable!("bytes are held, and by nothing"),
            };
            match written {
                Ok(written) => self.wrote(written, sink),
                Err(Errno::EAGAIN) => return Ok(false),
                Err(errno) => return Err(Broken { side: self.sink(), errno }),
            }
        }
        if let Held::Pipe(pipe) = std::mem::replace(&mut self.held, Held::Nothing) {
            tools.pool.give_back(pipe);
        }
        Ok(true)
    }

    /// Accounts for a write, which comes before the lane hears of it: a sender may take its lane again only once all that
    /// it gave to us is in the sink.
    fn wrote(&mut self, count: usize, sink: BorrowedFd<'_>) {
        self.half.wrote(count);
        let own = count.min(self.preceding);
        self.preceding -= own;
        self.total += (count - own) as u64;
        if let Some(lane) = self.lane.as_ref().filter(|_| count > 0) {
            // If the sink's room cannot be read the lane stays shut, and we go on.
            lane.forwarded(self.kept + self.total, sink).ok();
        }
    }

    /// Gives up what is held.
    pub fn discard(&mut self, tools: &mut Tools) {
        if let Held::Pipe(pipe) = std::mem::replace(&mut self.held, Held::Nothing) {
            tools.pool.discard(pipe);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read as _, Write as _};
    use std::os::fd::{AsFd as _, AsRawFd as _};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

    use super::*;

    fn pass(through: &UnixStream, bytes: &[u8]) -> nix::Result<usize> {
        let descriptors = [0, 1, 2];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        sendmsg::<()>(through.as_raw_fd(), &[IoSlice::new(bytes)], &rights, MsgFlags::empty(), None)
    }

    /// Source and sink, the ends of a relay between them, and the relay itself.
    fn relay(guard: DescriptorGuard) -> (UnixStream, UnixStream, UnixStream, UnixStream, Direction, Tools) {
        let ((source, near), (far, sink)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        let mut direction = Direction::new(Side::Client, Method::Splice);
        direction.set_guard(guard);
        (source, near, far, sink, direction, Tools::new(16))
    }

    /// As on a kernel that refuses none: the connection breaks at the descriptors, and what came before them has been delivered.
    #[test]
    fn descriptors_that_come_along_break_the_connection() {
        let (mut source, near, far, mut sink, mut direction, mut tools) = relay(DescriptorGuard::Always);
        for _ in 0..3 {
            source.write_all(b"before").unwrap();
            direction.pump(near.as_fd(), far.as_fd(), &mut tools).unwrap();
            let mut bytes = [0; 6];
            sink.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"before");
        }
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        source.write_all(b"before").unwrap();
        pass(&source, b"with").unwrap();
        let before = open();
        let broken = loop {
            match direction.pump(near.as_fd(), far.as_fd(), &mut tools) {
                Ok(()) => {}
                Err(broken) => break broken,
            }
        };
        assert_eq!(broken, Broken { side: Side::Client, errno: copy::DESCRIPTORS });
        // Other tests open and close some meanwhile; three for each message would show.
        assert!(open() <= before + 2, "{} and then {}", before, open());
    }

    /// A listening socket may have asked for the credentials of each message (`PassCredentials=`).
    #[test]
    fn credentials_are_taken_for_no_descriptors() {
        let (mut source, near, far, mut sink, mut direction, mut tools) = relay(DescriptorGuard::Needless);
        setsockopt(&near, sockopt::PassCred, &true).unwrap();
        source.write_all(b"before").unwrap();
        direction.set_guard(DescriptorGuard::of(near.as_fd()));
        source.write_all(b" and after").unwrap();
        direction.pump(near.as_fd(), far.as_fd(), &mut tools).unwrap();
        sink.read_exact(&mut [0; 16]).unwrap();
    }

    /// As a socket of vsock says it whose other end is closed, where this end had finished: no abort.
    #[test]
    fn not_connected_is_the_end_of_what_comes_over_vsock() {
        let (_source, _near, far, mut sink, mut spliced, mut tools) = relay(DescriptorGuard::Needless);
        let socket = crate::sys::socket(nix::libc::AF_INET, nix::libc::SOCK_STREAM, 0).unwrap();
        let aborted = spliced.pump(socket.as_fd(), far.as_fd(), &mut tools);
        assert_eq!(aborted, Err(Broken { side: Side::Client, errno: Errno::ENOTCONN }));
        let mut direction = Direction::new(Side::Client, Method::Vsock);
        direction.pump(socket.as_fd(), far.as_fd(), &mut tools).unwrap();
        assert_eq!((direction.half(), sink.read(&mut [0]).unwrap()), (Half::Finished, 0));
    }

    /// What was sent before the kernel refused descriptors is looked at, and then nothing is any more.
    #[test]
    fn after_the_backlog_bytes_are_spliced_again() {
        let (mut source, near, far, mut sink, mut direction, mut tools) = relay(DescriptorGuard::Backlog);
        source.write_all(b"before").unwrap();
        direction.pump(near.as_fd(), far.as_fd(), &mut tools).unwrap();
        assert_eq!((direction.guard, direction.copied), (DescriptorGuard::Needless, 6));
        source.write_all(b"after").unwrap();
        direction.pump(near.as_fd(), far.as_fd(), &mut tools).unwrap();
        assert_eq!((direction.total, direction.copied), (11, 6));
        sink.read_exact(&mut [0; 11]).unwrap();
    }

    #[test]
    fn a_kernel_that_can_refuse_them_does() {
        let (source, near, ..) = relay(DescriptorGuard::Needless);
        match DescriptorGuard::of(near.as_fd()) {
            DescriptorGuard::Always => assert_eq!(pass(&source, b"x"), Ok(1)),
            guard => {
                assert_eq!(
                    (guard, DescriptorGuard::of(near.as_fd())),
                    (DescriptorGuard::Backlog, DescriptorGuard::Needless)
                );
                assert_eq!(pass(&source, b"x"), Err(Errno::EPERM));
            }
        }
    }
}
