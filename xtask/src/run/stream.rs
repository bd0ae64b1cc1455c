//! TCP connections in non-blocking mode, as an event loop has them (and as the kernel relay asks for), each wait with a limit.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};

/// How long either end waits for the other: longer than any start is given.
const MOVES_WITHIN: Duration = Duration::from_secs(60);

/// One end of a connection.
pub struct Stream(TcpStream);

impl Stream {
    /// Connects.
    pub fn connect(address: &str) -> io::Result<Self> {
        let address: SocketAddr = address.parse().map_err(io::Error::other)?;
        let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = TcpStream::from(socket(family, SockType::Stream, flags, None)?);
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
            Ok(()) => {}
            Err(Errno::EINPROGRESS) => {
                wait(&socket, PollFlags::POLLOUT)?;
                socket.take_error()?.map_or(Ok(()), Err)?;
            }
            Err(errno) => return Err(errno.into()),
        }
        Self::accepted(socket)
    }

    /// Its own address.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Takes over what a listener gave.
    pub fn accepted(socket: TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Self(socket))
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&self.0, PollFlags::POLLIN)?,
                result => return result,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&self.0, PollFlags::POLLOUT)?,
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait(socket: &TcpStream, readiness: PollFlags) -> io::Result<()> {
    let patience = PollTimeout::try_from(MOVES_WITHIN).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(socket.as_fd(), readiness)], patience)? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing for {MOVES_WITHIN:?}"))),
        _ => Ok(()),
    }
}
