//! A listening socket, wherever it came from.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::socket::{self, AddressFamily, SockaddrLike as _, SockaddrStorage};

use crate::sockaddr;

/// How clients come to a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketKind {
    /// They connect, and are accepted.
    Stream,
    /// The same, over vsock(7): from virtual machines, or from their host.
    Vsock,
    /// The same, and what they send is messages (unix(7) SOCK_SEQPACKET).
    SeqPacket,
    /// They send datagrams over UDP.
    Datagram,
    /// The same, over a unix socket.
    UnixDatagram,
}

/// One socket for clients, close-on-exec and, unless a service is to have it too, non-blocking.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: OwnedFd,
    /// Its FileDescriptorName=, or the name given with `--listen`.
    pub name: String,
    /// Its address, for people.
    pub address: String,
    /// How clients come to it.
    pub kind: SocketKind,
    /// Made by `--listen`.
    own: bool,
    /// The path to remove at the end, for a unix socket of our own.
    unlink: Option<PathBuf>,
}

impl SocketKind {
    fn of(socket: &OwnedFd) -> nix::Result<Self> {
        let name: SockaddrStorage = socket::getsockname(socket.as_raw_fd())?;
        Ok(match (socket::getsockopt(socket, socket::sockopt::SockType)?, name.family()) {
            (socket::SockType::Datagram, Some(AddressFamily::Unix)) => Self::UnixDatagram,
            (socket::SockType::Datagram, _) => Self::Datagram,
            (socket::SockType::SeqPacket, _) => Self::SeqPacket,
            (_, Some(AddressFamily::Vsock)) => Self::Vsock,
            _ => Self::Stream,
        })
    }

    /// There is nothing to accept.
    #[must_use]
    pub const fn takes_datagrams(self) -> bool {
        matches!(self, Self::Datagram | Self::UnixDatagram)
    }

    fn describe(self, address: &SockaddrStorage) -> String {
        let suffix = if self == Self::Datagram { "/udp" } else { "" };
        format!("{}{suffix}", describe(address))
    }
}

impl Listener {
    /// Made by `--listen`, and not passed by a service manager.
    #[must_use]
    pub const fn is_own(&self) -> bool {
        self.own
    }

    /// One that a service manager has passed, made non-blocking and close-on-exec.
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn passed(socket: OwnedFd, name: String, address: &SockaddrStorage) -> nix::Result<Self> {
        set_flags(&socket)?;
        let kind = SocketKind::of(&socket)?;
        Ok(Self { address: kind.describe(address), socket, name, kind, own: false, unlink: None })
    }

    /// The same, where a service is to have it (`--adopt`): O_NONBLOCK is that one's to choose, for it belongs to the open file description that all
    /// who have the socket share (open(2)).
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn shared(socket: OwnedFd, name: String, address: &SockaddrStorage) -> nix::Result<Self> {
        close_on_exec(&socket)?;
        let kind = SocketKind::of(&socket)?;
        Ok(Self { address: kind.describe(address), socket, name, kind, own: false, unlink: None })
    }

    /// Makes it non-blocking, for whatever accepts at it now: no service has it.
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn set_nonblocking(&self) -> nix::Result<()> {
        set_flags(&self.socket)
    }

    /// One that this process has made, non-blocking and close-on-exec from now on; `unlink`: the file that goes with it.
    ///
    /// # Errors
    /// fcntl(2)'s and getsockname(2)'s.
    pub fn own(socket: OwnedFd, name: String, unlink: Option<PathBuf>) -> nix::Result<Self> {
        set_flags(&socket)?;
        let kind = SocketKind::of(&socket)?;
        let address = kind.describe(&socket::getsockname::<SockaddrStorage>(socket.as_raw_fd())?);
        Ok(Self { socket, name, address, kind, own: true, unlink })
    }

    /// The same socket for the relay process, which has no file to remove, with this number.
    ///
    /// # Errors
    /// EMFILE.
    pub fn for_relay(&self, number: RawFd) -> std::io::Result<Self> {
        let socket = crate::sys::duplicate(self.socket.as_fd(), number)?;
        Ok(Self {
            socket,
            name: self.name.clone(),
            address: self.address.clone(),
            kind: self.kind,
            own: self.own,
            unlink: None,
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = self.unlink.take() {
            std::fs::remove_file(path).ok();
        }
    }
}

fn set_flags(socket: &OwnedFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    let _zero = fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    close_on_exec(socket)
}

fn close_on_exec(socket: &OwnedFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let _zero = fcntl(socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

/// A socket address as people write it.
#[must_use]
pub fn describe(address: &SockaddrStorage) -> String {
    if let Some(v4) = address.as_sockaddr_in() {
        return std::net::SocketAddrV4::from(*v4).to_string();
    }
    if let Some(v6) = address.as_sockaddr_in6() {
        return std::net::SocketAddrV6::from(*v6).to_string();
    }
    if let Some(vsock) = address.as_vsock_addr() {
        return sockaddr::describe_vsock(vsock.cid(), vsock.port());
    }
    match address.as_unix_addr() {
        Some(unix) if unix.path().is_some() => {
            unix.path().map(|path| path.display().to_string()).unwrap_or_default()
        }
        Some(unix) => format!("@{}", String::from_utf8_lossy(unix.as_abstract().unwrap_or_default())),
        None => "?".into(),
    }
}
