//! The two ends of a forwarded connection: sockets, over TCP, unix streams and vsock, whose every wait has a deadline.
//!
//! All sockets are non-blocking and wait with poll(2): that is what gives them deadlines, and what the kernel relay asks of
//! sockets it may hook. The network namespace of a socket is the one it was *made* in, so a service that stands "inside the
//! container" is a socket made by the namespace's holder process and used by the test itself, beside the client's.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc::{VMADDR_CID_LOCAL, VMADDR_PORT_ANY};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    self, AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, SockaddrIn, SockaddrIn6,
    SockaddrStorage, UnixAddr, VsockAddr, sockopt,
};

use crate::pattern::Pattern;

/// How long any one wait may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Between two attempts, where no event tells when the next one is worth it.
const STEP: Duration = Duration::from_millis(50);

/// What a socket is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// A unix stream.
    Unix,
    /// A stream of vsock(7).
    Vsock,
}

impl Family {
    /// An abort of this kind of connection looks different from its end.
    #[must_use]
    pub const fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp4 | Self::Tcp6)
    }

    /// The loopback address with a port of the kernel's choice.
    #[must_use]
    pub const fn loopback(self) -> Option<Address> {
        match self {
            Self::Tcp4 => Some(Address::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0))),
            Self::Tcp6 => Some(Address::Tcp(SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0))),
            Self::Unix => None,
            Self::Vsock => Some(Address::Vsock(VMADDR_CID_LOCAL, VMADDR_PORT_ANY)),
        }
    }

    /// A stream socket of this family in the network namespace of the calling thread.
    pub fn socket(self) -> io::Result<OwnedFd> {
        let domain = match self {
            Self::Tcp4 => AddressFamily::Inet,
            Self::Tcp6 => AddressFamily::Inet6,
            Self::Unix => AddressFamily::Unix,
            Self::Vsock => AddressFamily::Vsock,
        };
        Ok(socket::socket(domain, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?)
    }
}

/// Where a socket listens, printed as `bro forward` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// HOST:PORT.
    Tcp(SocketAddr),
    /// A path.
    Unix(PathBuf),
    /// A name without a file, of one network namespace.
    Abstract(String),
    /// A context identifier and a port.
    Vsock(u32, u32),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{name}"),
            Self::Vsock(cid, port) => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

impl Address {
    /// The family of the sockets that can have this address.
    #[must_use]
    pub const fn family(&self) -> Family {
        match self {
            Self::Tcp(SocketAddr::V4(_)) => Family::Tcp4,
            Self::Tcp(SocketAddr::V6(_)) => Family::Tcp6,
            Self::Unix(_) | Self::Abstract(_) => Family::Unix,
            Self::Vsock(..) => Family::Vsock,
        }
    }

    /// The address that `socket` is bound to.
    pub fn of(socket: BorrowedFd<'_>) -> Result<Self> {
        let name: SockaddrStorage = socket::getsockname(socket.as_raw_fd())?;
        Self::from_kernel(&name).context("the socket has no address that a test knows")
    }

    /// The address that `socket` is connected to.
    pub fn of_peer(socket: BorrowedFd<'_>) -> Result<Self> {
        let name: SockaddrStorage = socket::getpeername(socket.as_raw_fd())?;
        Self::from_kernel(&name).context("the socket's peer has no address that a test knows")
    }

    fn from_kernel(name: &SockaddrStorage) -> Option<Self> {
        if let Some(v4) = name.as_sockaddr_in() {
            return Some(Self::Tcp(SocketAddr::V4((*v4).into())));
        }
        if let Some(v6) = name.as_sockaddr_in6() {
            return Some(Self::Tcp(SocketAddr::V6((*v6).into())));
        }
        if let Some(vsock) = name.as_vsock_addr() {
            return Some(Self::Vsock(vsock.cid(), vsock.port()));
        }
        let unix = name.as_unix_addr()?;
        if let Some(path) = unix.path() {
            return Some(Self::Unix(path.to_owned()));
        }
        Some(Self::Abstract(String::from_utf8(unix.as_abstract()?.to_vec()).ok()?))
    }

    /// The port, of TCP addresses.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(address) => Some(address.port()),
            _ => None,
        }
    }

    fn bind(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let raw = socket.as_raw_fd();
        Ok(match self {
            Self::Tcp(SocketAddr::V4(address)) => socket::bind(raw, &SockaddrIn::from(*address)),
            Self::Tcp(SocketAddr::V6(address)) => socket::bind(raw, &SockaddrIn6::from(*address)),
            Self::Unix(path) => socket::bind(raw, &UnixAddr::new(path.as_path())?),
            Self::Abstract(name) => socket::bind(raw, &UnixAddr::new_abstract(name.as_bytes())?),
            Self::Vsock(cid, port) => socket::bind(raw, &VsockAddr::new(*cid, *port)),
        }?)
    }

    fn connect(&self, socket: BorrowedFd<'_>) -> nix::Result<()> {
        let raw = socket.as_raw_fd();
        match self {
            Self::Tcp(SocketAddr::V4(address)) => socket::connect(raw, &SockaddrIn::from(*address)),
            Self::Tcp(SocketAddr::V6(address)) => socket::connect(raw, &SockaddrIn6::from(*address)),
            Self::Unix(path) => socket::connect(raw, &UnixAddr::new(path.as_path())?),
            Self::Abstract(name) => socket::connect(raw, &UnixAddr::new_abstract(name.as_bytes())?),
            Self::Vsock(cid, port) => socket::connect(raw, &VsockAddr::new(*cid, *port)),
        }
    }
}

/// Where sockets are made: in the test's own network namespace, or in another.
pub trait Place {
    /// A stream socket made there.
    fn socket(&self, family: Family) -> io::Result<OwnedFd>;
}

/// The network namespace of the test itself.
#[derive(Debug, Clone, Copy)]
pub struct Here;

impl Place for Here {
    fn socket(&self, family: Family) -> io::Result<OwnedFd> {
        family.socket()
    }
}

/// A socket with an address that does not listen yet: a service that is still starting.
#[derive(Debug)]
pub struct Bound {
    fd: OwnedFd,
    address: Address,
}

impl Bound {
    /// Binds a socket made at `place`; port 0 becomes one of the kernel's choice.
    pub fn new(place: &dyn Place, address: &Address) -> Result<Self> {
        let fd = place.socket(address.family())?;
        if address.family().is_tcp() {
            // A service that is started a second time finds its port in TIME_WAIT, as real services do.
            socket::setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        }
        address.bind(fd.as_fd()).with_context(|| format!("binding {address}"))?;
        let address = Address::of(fd.as_fd())?;
        Ok(Self { fd, address })
    }

    /// What it will listen at.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// Listens.
    pub fn listen(self) -> Result<Listener> {
        socket::listen(&self.fd, Backlog::MAXCONN)?;
        Ok(Listener { fd: self.fd, address: self.address })
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: Address,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Listener {
    /// Listens at `address` with a socket made at `place`.
    pub fn new(place: &dyn Place, address: &Address) -> Result<Self> {
        Bound::new(place, address)?.listen()
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection.
    pub fn accept(&self) -> Result<Conn> {
        self.try_accept(PATIENCE)?.with_context(|| format!("no connection reached {} in time", self.address))
    }

    /// The next connection, if one comes soon enough.
    pub fn try_accept(&self, within: Duration) -> Result<Option<Conn>> {
        let deadline = Instant::now() + within;
        loop {
            if !wait_for(self.fd.as_fd(), PollFlags::POLLIN, remaining(deadline))?.contains(PollFlags::POLLIN)
            {
                return Ok(None);
            }
            match socket::accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                Ok(raw) => {
                    // SAFETY: accept4 has just made this descriptor for us and nothing else knows it.
                    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                    if self.address.family().is_tcp() {
                        socket::setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
                    }
                    return Ok(Some(Conn::of(fd, self.address.family(), false)));
                }
                Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => {}
                Err(error) => bail!("accept at {}: {error}", self.address),
            }
        }
    }
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Waits until `fd` has one of `events` (or an error, or a hang-up); empty when `within` has passed.
pub fn wait_for(fd: BorrowedFd<'_>, events: PollFlags, within: Duration) -> io::Result<PollFlags> {
    let deadline = Instant::now() + within;
    loop {
        let mut fds = [PollFd::new(fd, events)];
        // Rounded up, so that a wait never ends before its deadline.
        let timeout =
            PollTimeout::try_from(remaining(deadline).as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(PollFlags::empty()),
            Ok(_) => return Ok(fds[0].revents().unwrap_or(PollFlags::empty())),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The sender closed its writing side.
    Eof,
    /// The connection was aborted.
    Aborted,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Conn {
    fd: OwnedFd,
    family: Family,
    patience: Duration,
    /// It was aborted before connect(2) was through, which took the error: the first that uses it gets it.
    aborted: AtomicBool,
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Conn {
    /// Connects to `address` with a socket made at `place`.
    pub fn new(place: &dyn Place, address: &Address) -> Result<Self> {
        Self::bound_to(place, address, None)
    }

    const fn of(fd: OwnedFd, family: Family, aborted: bool) -> Self {
        Self { fd, family, patience: PATIENCE, aborted: AtomicBool::new(aborted) }
    }

    /// The abort that connecting has seen, once, as the kernel tells of it once.
    fn check_aborted(&self) -> nix::Result<()> {
        if self.aborted.swap(false, Relaxed) { Err(Errno::ECONNRESET) } else { Ok(()) }
    }

    /// Connects from the local address `source`. One that is accepted and aborted at once is connected: its first use fails.
    pub fn bound_to(place: &dyn Place, address: &Address, source: Option<IpAddr>) -> Result<Self> {
        let family = address.family();
        let fd = place.socket(family)?;
        if let Some(source) = source {
            Address::Tcp(SocketAddr::new(source, 0)).bind(fd.as_fd())?;
        }
        let deadline = Instant::now() + PATIENCE;
        let mut aborted = false;
        loop {
            match address.connect(fd.as_fd()) {
                Ok(()) => break,
                Err(Errno::EINPROGRESS) => {
                    let ready = wait_for(fd.as_fd(), PollFlags::POLLOUT, remaining(deadline))?;
                    ensure!(!ready.is_empty(), "connecting to {address} took too long");
                    let error = Errno::from_raw(socket::getsockopt(&fd, sockopt::SocketError)?);
                    // A refusal is ECONNREFUSED, so this one came after the handshake.
                    aborted = error == Errno::ECONNRESET;
                    ensure!(aborted || error as i32 == 0, "connecting to {address}: {error}");
                    break;
                }
                // A non-blocking unix socket finds the backlog full: there is nothing to poll for, so try again.
                Err(Errno::EAGAIN) if Instant::now() < deadline => std::thread::yield_now(),
                Err(error) => bail!("connecting to {address}: {error}"),
            }
        }
        if family.is_tcp() {
            socket::setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
        }
        Ok(Self::of(fd, family, aborted))
    }

    /// Lets every wait of this connection take `patience` at most.
    #[must_use]
    pub const fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// What it is made of.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.family
    }

    /// Its own address.
    pub fn address(&self) -> Result<Address> {
        Address::of(self.fd.as_fd())
    }

    /// Waits for `events`; errors and hang-ups are told as well.
    pub fn wait(&self, events: PollFlags, within: Duration) -> io::Result<PollFlags> {
        wait_for(self.fd.as_fd(), events, within)
    }

    /// Some bytes; 0 at the end of the stream.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.check_aborted()?;
        let deadline = Instant::now() + self.patience;
        loop {
            match socket::recv(self.fd.as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(count) => return Ok(count),
                Err(Errno::EINTR) => {}
                // The kernel says so of one whose other end is closed, where both had finished sending.
                Err(Errno::ENOTCONN) if self.family == Family::Vsock => return Ok(0),
                Err(Errno::EAGAIN) => {
                    if self.wait(PollFlags::POLLIN, remaining(deadline))?.is_empty() {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "no byte came in time"));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Exactly as many bytes as `buffer` holds.
    pub fn recv_exact(&self, buffer: &mut [u8]) -> Result<()> {
        let mut have = 0;
        while have < buffer.len() {
            let count = self.recv(&mut buffer[have..])?;
            ensure!(count > 0, "the stream ended {have} bytes into {}", buffer.len());
            have += count;
        }
        Ok(())
    }

    /// Whether anything (bytes, an end, an abort) comes within `within`.
    pub fn stays_silent(&self, within: Duration) -> Result<bool> {
        Ok(self.wait(PollFlags::POLLIN, within)?.is_empty())
    }

    /// As much of `bytes` as fits within the wait `within`; `None` when not one byte did.
    pub fn send_within(&self, bytes: &[u8], within: Duration) -> io::Result<Option<usize>> {
        self.check_aborted()?;
        let deadline = Instant::now() + within;
        loop {
            match socket::send(self.fd.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::EINTR) => {}
                // Whose other end is closed does not become writable for that, if something is left to be read here.
                Err(Errno::EAGAIN) if self.family == Family::Vsock && Instant::now() < deadline => {
                    let _events = self.wait(PollFlags::POLLOUT, remaining(deadline).min(STEP))?;
                }
                Err(Errno::EAGAIN) => {
                    if self.wait(PollFlags::POLLOUT, remaining(deadline))?.is_empty() {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Every byte.
    pub fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = self
                .send_within(bytes, self.patience)?
                .ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "no byte was taken in time"))?;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    /// One urgent byte.
    pub fn send_urgent(&self, byte: u8) -> Result<()> {
        let sent = socket::send(self.fd.as_raw_fd(), &[byte], MsgFlags::MSG_OOB | MsgFlags::MSG_NOSIGNAL)?;
        ensure!(sent == 1, "the urgent byte was not taken");
        Ok(())
    }

    /// Says that no more bytes follow.
    pub fn close_writing(&self) -> io::Result<()> {
        Ok(socket::shutdown(self.fd.as_raw_fd(), Shutdown::Write)?)
    }

    /// Ends the connection with a RST (over unix and vsock: by closing it).
    pub fn abort(self) -> Result<()> {
        if self.family.is_tcp() {
            let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            socket::setsockopt(&self.fd, sockopt::Linger, &at_once)?;
        }
        Ok(())
    }

    /// How many of the bytes sent the other end's kernel has not acknowledged yet. (Over unix none: they have arrived.)
    pub fn unacknowledged(&self) -> io::Result<u64> {
        if self.family.is_tcp() { crate::sys::unacknowledged(self.fd.as_fd()) } else { Ok(0) }
    }

    /// Waits until all that was sent is acknowledged.
    pub fn wait_acknowledged(&self) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.unacknowledged()? {
                0 => return Ok(()),
                left => ensure!(Instant::now() < deadline, "{left} bytes were not acknowledged in time"),
            }
            // The kernel has no event for it.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends bytes `from..to` of `pattern`.
    pub fn pour(&self, pattern: Pattern, from: u64, to: u64) -> Result<()> {
        self.pour_chunks(pattern, from, to, || 64 * 1024)
    }

    /// Sends bytes `from..to` of `pattern` in pieces as long as `chunk` says.
    pub fn pour_chunks(
        &self,
        pattern: Pattern,
        from: u64,
        to: u64,
        mut chunk: impl FnMut() -> usize,
    ) -> Result<()> {
        let mut buffer = Vec::new();
        let mut at = from;
        while at < to {
            let length = (chunk().max(1) as u64).min(to - at);
            buffer.resize(usize::try_from(length)?, 0);
            pattern.fill(at, &mut buffer);
            self.send(&buffer).with_context(|| format!("sending after {at} of {to} bytes"))?;
            at += length;
        }
        Ok(())
    }

    /// Sends `pattern` until the other side's refusal to read has stopped it for `stuck`; says how many bytes were taken.
    pub fn pour_until_stuck(&self, pattern: Pattern, bound: u64, stuck: Duration) -> Result<u64> {
        let mut buffer = vec![0; 64 * 1024];
        let mut at = 0;
        loop {
            pattern.fill(at, &mut buffer);
            let Some(count) = self.send_within(&buffer, stuck)? else { return Ok(at) };
            at += count as u64;
            ensure!(at <= bound, "nothing stops the sender: {at} bytes taken, none read");
        }
    }

    /// Reads bytes `from..to` of `pattern`, each compared.
    pub fn drink(&self, pattern: Pattern, from: u64, to: u64) -> Result<()> {
        let mut buffer = vec![0; 256 * 1024];
        let mut at = from;
        while at < to {
            let room = usize::try_from((to - at).min(buffer.len() as u64))?;
            let count =
                self.recv(&mut buffer[..room]).with_context(|| format!("after {at} of {to} bytes"))?;
            ensure!(count > 0, "the stream ended after {at} of {to} bytes");
            pattern.check(at, &buffer[..count])?;
            at += count as u64;
        }
        Ok(())
    }

    /// Reads `pattern` from `from` on until the stream ends, each byte compared: where it ended, and how.
    pub fn drink_to_end(&self, pattern: Pattern, from: u64) -> Result<(u64, End)> {
        let mut buffer = vec![0; 256 * 1024];
        let mut at = from;
        loop {
            match self.recv(&mut buffer) {
                Ok(0) => return Ok((at, End::Eof)),
                Ok(count) => {
                    pattern.check(at, &buffer[..count])?;
                    at += count as u64;
                }
                Err(error) if is_abort(&error) => return Ok((at, End::Aborted)),
                Err(error) => return Err(error).with_context(|| format!("after {at} bytes")),
            }
        }
    }

    /// Expects the end of the stream, and not one byte before it.
    pub fn expect_eof(&self) -> Result<()> {
        let mut buffer = [0; 64];
        let count = self.recv(&mut buffer).context("expecting the end of the stream")?;
        ensure!(count == 0, "{count} bytes came instead of the end: {:?}", &buffer[..count]);
        Ok(())
    }

    /// Expects the connection to be aborted, after any bytes that were still under way.
    pub fn expect_abort(&self) -> Result<()> {
        let end = self.read_to_end()?.1;
        // Over unix streams, and vsock, an abort cannot be told from an end (unless bytes were left unread).
        ensure!(end == End::Aborted || !self.family.is_tcp(), "the connection ended with a clean EOF");
        Ok(())
    }

    /// Everything until the stream ends.
    pub fn read_to_end(&self) -> Result<(Vec<u8>, End)> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match self.recv(&mut buffer) {
                Ok(0) => return Ok((all, End::Eof)),
                Ok(count) => all.extend(&buffer[..count]),
                Err(error) if is_abort(&error) => return Ok((all, End::Aborted)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends until that fails because the other side is gone.
    pub fn expect_sending_fails(&self) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.send_within(&[0; 4096], remaining(deadline)) {
                Err(error) if is_abort(&error) => return Ok(()),
                Err(error) => return Err(error.into()),
                Ok(None) => bail!("the sender is stuck and never told that the other side is gone"),
                Ok(Some(_)) => ensure!(Instant::now() < deadline, "sending goes on for ever"),
            }
        }
    }
}

/// The errors by which the kernel tells that the other side aborted.
#[must_use]
pub fn is_abort(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The abort may come before connect(2) is through, or after: the one that has connected sees it either way, once.
    #[test]
    fn an_abort_at_once_is_seen_by_the_first_use() -> Result<()> {
        let listener = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
        let address = listener.address().clone();
        std::thread::scope(|scope| {
            let aborting = scope.spawn(|| (0..500).try_for_each(|_| listener.accept()?.abort()));
            for round in 0..500 {
                let conn = Conn::new(&Here, &address).with_context(|| format!("round {round}"))?;
                conn.expect_abort().with_context(|| format!("round {round}"))?;
                ensure!(conn.recv(&mut [0])? == 0, "the abort was told twice");
            }
            aborting.join().expect("it does not panic")
        })?;
        // An address without a listener still refuses. One that is bound, for another test could be given the listener's port.
        let bound = Here.socket(Family::Tcp4)?;
        Family::Tcp4.loopback().context("TCP has one")?.bind(bound.as_fd())?;
        ensure!(Conn::new(&Here, &Address::of(bound.as_fd())?).is_err(), "a listener is there");
        Ok(())
    }
}
