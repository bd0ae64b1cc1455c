//! The service inside the container: an event loop a listening address, as redis or nginx have one, which does what a
//! connection's first bytes ask for. Its sockets are non-blocking from accept on.

use std::collections::HashMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrStorage, accept4, bind, listen, setsockopt,
    shutdown, socket, sockopt,
};

use super::clock;
use super::stream::Address;
use super::wire::{self, Ask, End};
use crate::run::process::die_with_parent;

/// What `cargo xtask bench` gives the service.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to listen: TCP addresses, and paths of unix sockets
    addresses: Vec<Address>,
    /// How long to start up, in milliseconds, before it listens
    #[arg(long, default_value_t = 0)]
    startup_ms: u64,
}

/// The service process: `listening NANOSECONDS` when it does, `accepted NANOSECONDS` at the first client.
pub fn main(args: &Args) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    // A container's start-up, not a wait for anything.
    std::thread::sleep(Duration::from_millis(args.startup_ms));
    let listeners: Vec<OwnedFd> = args.addresses.iter().map(bound).collect::<Result<_>>()?;
    println!("listening {}", clock::now());
    let watched = Arc::new(Watched::default());
    std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .map(|listener| {
                let watched = watched.clone();
                scope.spawn(move || Loop::new(listener, watched)?.run())
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a listener broke")))
    })
}

/// A listening socket in non-blocking mode, with systemd's backlog.
pub fn bound(address: &Address) -> Result<OwnedFd> {
    match address {
        Address::Tcp(address) => listening(*address).with_context(|| format!("cannot listen on {address}")),
        Address::Unix(path) => {
            let listener =
                UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
            listener.set_nonblocking(true)?;
            Ok(listener.into())
        }
    }
}

fn listening(address: SocketAddr) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let listener = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&listener, Backlog::new(4095)?)?;
    Ok(listener)
}

/// What is known of watched connections, by token.
#[derive(Debug, Default)]
struct Watched(Mutex<HashMap<u64, (u64, End)>>);

impl Watched {
    fn note(&self, token: u64, bytes: u64, end: End) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(token, (bytes, end));
    }

    fn answer(&self, token: u64) -> Vec<u8> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&token).copied();
        let (bytes, end) = known.unwrap_or((0, End::Open));
        [bytes.to_le_bytes(), end.encode().to_le_bytes()].concat()
    }
}

/// What a connection is doing.
#[derive(Debug)]
enum Doing {
    /// Its ask has not come in full.
    Asking { head: [u8; wire::LENGTH], filled: usize },
    /// `keep` has been read and not yet written.
    Echo { keep: Vec<u8> },
    /// So many bytes, in writes of `block`, until one does not fit.
    Writes { out: u64, block: usize },
    /// Both ways at once, or one of them; eight bytes more go out when all that was to come has come.
    Bulk { out: u64, into: u64, answer: bool },
    /// Waits for the client's half-close.
    AnswerAtEnd { came: u64, bytes: u64 },
    /// Writes this, then half-closes.
    Answering { bytes: Vec<u8>, written: usize },
    /// Counts what comes until it ends.
    Watch { token: u64, came: u64 },
    /// Reads nothing, ever.
    Deaf,
    /// Writes without end.
    Flood { token: u64, sent: u64 },
}

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    doing: Doing,
    watching: EpollFlags,
}

/// What a turn came to.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Waits,
    Over,
}

struct Loop {
    listener: OwnedFd,
    epoll: Epoll,
    connections: HashMap<RawFd, Connection>,
    watched: Arc<Watched>,
    buffer: Vec<u8>,
    first: bool,
}

impl Loop {
    fn new(listener: OwnedFd, watched: Arc<Watched>) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, listener.as_raw_fd() as u64))?;
        let mut buffer = vec![0; 256 * 1024];
        wire::fill(&mut buffer, 0);
        Ok(Self { listener, epoll, connections: HashMap::new(), watched, buffer, first: true })
    }

    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context("epoll"),
            };
            for event in &events[..ready] {
                let fd = event.data() as RawFd;
                if fd == self.listener.as_raw_fd() {
                    self.accept()?;
                } else {
                    self.turn(fd)?;
                }
            }
        }
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let fd = match accept4(self.listener.as_raw_fd(), flags) {
                Ok(fd) => fd,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::ECONNABORTED | Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context("accept"),
            };
            if std::mem::take(&mut self.first) {
                // The process that started this may have stopped listening.
                writeln!(std::io::stdout(), "accepted {}", clock::now()).ok();
            }
            // SAFETY: accept4 has just made it, and no other code has it.
            let socket = unsafe { OwnedFd::from_raw_fd(fd) };
            // A unix socket has no such thing.
            setsockopt(&socket, sockopt::TcpNoDelay, &true).ok();
            let watching = EpollFlags::EPOLLIN;
            self.epoll.add(&socket, EpollEvent::new(watching, fd as u64))?;
            let doing = Doing::Asking { head: [0; wire::LENGTH], filled: 0 };
            self.connections.insert(fd, Connection { socket, doing, watching });
        }
    }

    fn turn(&mut self, fd: RawFd) -> Result<()> {
        let Some(connection) = self.connections.get_mut(&fd) else { return Ok(()) };
        match connection.turn(&mut self.buffer, &self.watched) {
            Ok(Turn::Waits) => {
                let wanted = connection.doing.interest();
                if wanted != connection.watching {
                    connection.watching = wanted;
                    self.epoll.modify(&connection.socket, &mut EpollEvent::new(wanted, fd as u64))?;
                }
            }
            Ok(Turn::Over) => drop(self.connections.remove(&fd)),
            Err(errno) => {
                if let Doing::Watch { token, came } = connection.doing {
                    self.watched.note(
                        token,
                        came,
                        if errno == Errno::ECONNRESET { End::Reset } else { End::Eof },
                    );
                }
                self.connections.remove(&fd);
            }
        }
        Ok(())
    }
}

impl Doing {
    fn interest(&self) -> EpollFlags {
        match self {
            Self::Asking { .. } | Self::AnswerAtEnd { .. } | Self::Watch { .. } => EpollFlags::EPOLLIN,
            Self::Echo { keep } if keep.is_empty() => EpollFlags::EPOLLIN,
            Self::Echo { .. } | Self::Answering { .. } | Self::Flood { .. } => EpollFlags::EPOLLOUT,
            Self::Writes { out: 0, .. } => EpollFlags::EPOLLIN,
            Self::Writes { .. } => EpollFlags::EPOLLOUT,
            Self::Bulk { out: 0, .. } => EpollFlags::EPOLLIN,
            Self::Bulk { into: 0, .. } => EpollFlags::EPOLLOUT,
            Self::Bulk { .. } => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
            // Errors are reported all the same.
            Self::Deaf => EpollFlags::empty(),
        }
    }
}

impl Connection {
    fn turn(&mut self, buffer: &mut [u8], watched: &Watched) -> Result<Turn, Errno> {
        match &mut self.doing {
            Doing::Asking { .. } => self.hear(buffer, watched),
            Doing::Echo { keep } => echo(self.socket.as_fd(), keep, buffer),
            Doing::Bulk { out, into, answer } => {
                let turn = bulk(self.socket.as_fd(), out, into, buffer)?;
                if *into == 0 && std::mem::take(answer) {
                    *out += 8;
                }
                Ok(turn)
            }
            Doing::Writes { out, block } => writes(self.socket.as_fd(), out, *block, buffer),
            Doing::AnswerAtEnd { came, bytes } => {
                let read = some(nix::unistd::read(&self.socket, &mut buffer[..]))
                    .map_or(Ok(None), |r| r.map(Some))?;
                match read {
                    None => Ok(Turn::Waits),
                    Some(0) => {
                        let mut answer = came.to_le_bytes().to_vec();
                        answer.resize(8 + *bytes as usize, 0);
                        wire::fill(&mut answer[8..], 0);
                        self.doing = Doing::Answering { bytes: answer, written: 0 };
                        self.turn(buffer, watched)
                    }
                    Some(read) => {
                        *came += read as u64;
                        Ok(Turn::Waits)
                    }
                }
            }
            Doing::Answering { bytes, written } => {
                while *written < bytes.len() {
                    match some(nix::unistd::write(&self.socket, &bytes[*written..])) {
                        Some(more) => *written += more?,
                        None => return Ok(Turn::Waits),
                    }
                }
                Ok(Turn::Over)
            }
            Doing::Watch { token, came } => match some(nix::unistd::read(&self.socket, &mut buffer[..])) {
                None => Ok(Turn::Waits),
                Some(Ok(0)) => {
                    watched.note(*token, *came, End::Eof);
                    Ok(Turn::Over)
                }
                Some(read) => {
                    *came += read? as u64;
                    watched.note(*token, *came, End::Open);
                    Ok(Turn::Waits)
                }
            },
            // Only an error or a hang-up comes here.
            Doing::Deaf => Ok(Turn::Over),
            Doing::Flood { token, sent } => {
                if let Some(written) = some(nix::unistd::write(&self.socket, buffer)) {
                    *sent += written? as u64;
                    watched.note(*token, *sent, End::Open);
                }
                Ok(Turn::Waits)
            }
        }
    }

    /// Reads the ask, and begins with it.
    fn hear(&mut self, buffer: &mut [u8], watched: &Watched) -> Result<Turn, Errno> {
        let Doing::Asking { head, filled } = &mut self.doing else { return Ok(Turn::Waits) };
        let read = match some(nix::unistd::read(&self.socket, &mut head[*filled..])) {
            None => return Ok(Turn::Waits),
            Some(read) => read?,
        };
        if read == 0 {
            return Ok(Turn::Over);
        }
        if *filled == 0 && head[0] == wire::PING {
            nix::unistd::write(&self.socket, &head[..read])?;
            return Ok(Turn::Waits);
        }
        *filled += read;
        if *filled < wire::LENGTH {
            return Ok(Turn::Waits);
        }
        let Ok(ask) = Ask::decode(*head) else { return Ok(Turn::Over) };
        let hello = || nix::unistd::write(&self.socket, &[wire::PING]);
        self.doing = match ask {
            Ask::Ping | Ask::Echo => Doing::Echo { keep: Vec::new() },
            Ask::Source(out) => Doing::Bulk { out, into: 0, answer: false },
            Ask::Writes(out, log) => Doing::Writes { out, block: 1 << log.min(30) },
            Ask::Sink(into) => Doing::Bulk { out: 0, into, answer: true },
            Ask::Both(bytes) => Doing::Bulk { out: bytes, into: bytes, answer: true },
            Ask::AnswerAtEnd(bytes) => Doing::AnswerAtEnd { came: 0, bytes },
            Ask::Abort => {
                setsockopt(&self.socket, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
                return Ok(Turn::Over);
            }
            Ask::Watch(token) => {
                hello()?;
                Doing::Watch { token, came: 0 }
            }
            Ask::HalfClose(token) => {
                shutdown(self.socket.as_raw_fd(), Shutdown::Write)?;
                Doing::Watch { token, came: 0 }
            }
            Ask::Deaf => {
                hello()?;
                Doing::Deaf
            }
            Ask::Flood(token) => Doing::Flood { token, sent: 0 },
            Ask::Query(token) => Doing::Answering { bytes: watched.answer(token), written: 0 },
        };
        // Nothing more need come for it to begin.
        match self.doing {
            Doing::Bulk { .. } | Doing::Writes { .. } | Doing::Answering { .. } | Doing::Flood { .. } => {
                self.turn(buffer, watched)
            }
            _ => Ok(Turn::Waits),
        }
    }
}

/// None when it would have to wait.
fn some(result: Result<usize, Errno>) -> Option<Result<usize, Errno>> {
    if result == Err(Errno::EAGAIN) { None } else { Some(result) }
}

fn echo(socket: BorrowedFd<'_>, keep: &mut Vec<u8>, buffer: &mut [u8]) -> Result<Turn, Errno> {
    if !keep.is_empty() {
        if let Some(written) = some(nix::unistd::write(socket, keep)) {
            keep.drain(..written?);
        }
        return Ok(Turn::Waits);
    }
    // 64 KiB at a time: what an ordinary server has.
    let room = &mut buffer[..64 * 1024];
    let Some(read) = some(nix::unistd::read(socket, room)) else { return Ok(Turn::Waits) };
    let read = read?;
    if read == 0 {
        return Ok(Turn::Over);
    }
    let written = some(nix::unistd::write(socket, &room[..read])).unwrap_or(Ok(0))?;
    keep.extend_from_slice(&room[written..read]);
    Ok(Turn::Waits)
}

fn bulk(socket: BorrowedFd<'_>, out: &mut u64, into: &mut u64, buffer: &mut [u8]) -> Result<Turn, Errno> {
    if *into > 0 || *out == 0 {
        match some(nix::unistd::read(socket, &mut buffer[..])) {
            Some(Ok(0)) => return Ok(Turn::Over),
            Some(read) => *into = into.saturating_sub(read? as u64),
            None => {}
        }
    }
    if *out > 0 {
        let now = usize::try_from(*out).unwrap_or(usize::MAX).min(buffer.len());
        if let Some(written) = some(nix::unistd::write(socket, &buffer[..now])) {
            *out -= written? as u64;
        }
    }
    Ok(Turn::Waits)
}

/// As many writes as fit; when all is out, the client's end is waited for.
fn writes(socket: BorrowedFd<'_>, out: &mut u64, block: usize, buffer: &[u8]) -> Result<Turn, Errno> {
    if *out == 0 {
        return match some(nix::unistd::read(socket, &mut [0; 64])) {
            None => Ok(Turn::Waits),
            Some(read) => read.map(|_| Turn::Over),
        };
    }
    while *out > 0 {
        let now = usize::try_from(*out).unwrap_or(usize::MAX).min(block).min(buffer.len());
        let Some(written) = some(nix::unistd::write(socket, &buffer[..now])) else { break };
        *out -= written? as u64;
    }
    Ok(Turn::Waits)
}
