//! Connections in non-blocking mode from before they are made (the kernel relay takes no others), over TCP or a unix socket.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, SockaddrStorage, UnixAddr, connect, getsockopt, setsockopt,
    shutdown, socket, sockopt,
};

/// How long either end waits for the other.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// In milliseconds; [`set_patience`] shortens it for a whole process.
static LIMIT: AtomicU64 = AtomicU64::new(PATIENCE.as_millis() as u64);

/// How long this process waits for the other end.
pub fn set_patience(patience: Duration) {
    LIMIT.store(patience.as_millis() as u64, Ordering::Relaxed);
}

/// Where to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text.starts_with('/') { Self::Unix(text.into()) } else { Self::Tcp(text.parse()?) })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream {
    /// Connects, and waits until that is done.
    pub fn connect(address: &Address) -> io::Result<Self> {
        let stream = Self::begin(address)?;
        stream.wait(PollFlags::POLLOUT)?;
        stream.connected()?;
        Ok(stream)
    }

    /// Begins to connect; [`Self::connected`] tells how it went, once the socket is writable.
    pub fn begin(address: &Address) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let new = |family| socket(family, SockType::Stream, flags, None);
        let (socket, result) = match address {
            Address::Tcp(address) => {
                let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
                let socket = new(family)?;
                let result = connect(socket.as_raw_fd(), &SockaddrStorage::from(*address));
                (socket, result)
            }
            Address::Unix(path) => {
                let socket = new(AddressFamily::Unix)?;
                let result = connect(socket.as_raw_fd(), &UnixAddr::new(path)?);
                (socket, result)
            }
        };
        match result {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        if matches!(address, Address::Tcp(_)) {
            setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
        }
        Ok(Self(socket))
    }

    /// How connecting went.
    pub fn connected(&self) -> io::Result<()> {
        match getsockopt(&self.0, sockopt::SocketError)? {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// What is there now, or EAGAIN.
    pub fn try_read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        nix::unistd::read(&self.0, buffer)
    }

    /// What fits now, or EAGAIN.
    pub fn try_write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        nix::unistd::write(&self.0, bytes)
    }

    /// Reads once, and waits for that.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.try_read(buffer) {
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN)?,
                result => return Ok(result?),
            }
        }
    }

    /// Reads until the buffer is full, waiting before each read: an answer is never there yet when one has just asked.
    pub fn read_answer(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            self.wait(PollFlags::POLLIN)?;
            match self.try_read(&mut buffer[filled..]) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the connection ended before the answer",
                    ));
                }
                Ok(read) => filled += read,
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Writes all of it.
    pub fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Sends no more.
    pub fn half_close(&self) -> io::Result<()> {
        Ok(shutdown(self.0.as_raw_fd(), Shutdown::Write)?)
    }

    /// Closes with a reset.
    pub fn abort(self) -> io::Result<()> {
        setsockopt(&self.0, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
        Ok(())
    }

    /// Waits until the socket is so.
    pub fn wait(&self, readiness: PollFlags) -> io::Result<()> {
        let patience = Duration::from_millis(LIMIT.load(Ordering::Relaxed));
        wait_for(&mut [PollFd::new(self.as_fd(), readiness)], patience)
    }
}

/// Waits until one of them is ready.
pub fn wait_for(polled: &mut [PollFd<'_>], limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(polled, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing for {limit:?}"))),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
