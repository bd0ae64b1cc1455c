//! A socket for datagrams that a service has: what comes to it passes bro by, and no table has its clients.
//!
//! The kernel tells when the last datagram that was *received* had arrived (SIOCGSTAMP, socket(7)), on a duplicate of the socket as well. The first question
//! has it take down the time of each packet from then on, as a capture does: of all of the host's, for as long as the socket is open. A
//! service that wants these times itself (SO_TIMESTAMP and its like) takes them away: then nothing can be told of it.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockaddrStorage, getpeername, recv};

use crate::{clients, socket, sys};

/// What has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// A datagram waits to be received.
    pub waits: bool,
    /// What was received before it.
    pub received: LastReceived,
}

/// When the last datagram that was received had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastReceived {
    /// There was none since the first question.
    Never,
    /// Then.
    At(SystemTime),
    /// The service has the times itself.
    Unseen,
}

/// Asks.
///
/// # Errors
/// ioctl(2)'s and poll(2)'s, of a socket that is none for datagrams.
pub fn traffic(socket: BorrowedFd<'_>) -> io::Result<Traffic> {
    Ok(Traffic { waits: waits(socket)?, received: last_received(socket)? })
}

/// Waits a datagram? An empty one too, which FIONREAD does not tell of.
fn waits(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::new(socket, PollFlags::POLLIN)];
    let ready = poll(&mut polled, PollTimeout::ZERO)?;
    Ok(ready > 0 && polled.iter().any(|one| one.any() == Some(true)))
}

fn last_received(socket: BorrowedFd<'_>) -> io::Result<LastReceived> {
    let takes_them = [libc::SO_TIMESTAMP, libc::SO_TIMESTAMPNS, libc::SO_TIMESTAMPING];
    let is_set = |name| socket::number(socket, libc::SOL_SOCKET, name).is_ok_and(|value| value != 0);
    if takes_them.into_iter().any(is_set) {
        return Ok(LastReceived::Unseen);
    }
    match sys::last_received(socket) {
        Ok(since) => {
            Ok(SystemTime::UNIX_EPOCH.checked_add(since).map_or(LastReceived::Never, LastReceived::At))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(LastReceived::Never),
        Err(error) => Err(error),
    }
}

/// Throws away what waits, of as many datagrams.
pub fn drop_what_waits(socket: BorrowedFd<'_>, most: usize) {
    for _ in 0..most {
        match recv(socket.as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

/// A service has it no more: one that was connected to a peer has no other's datagrams, until it is dissolved (connect(2), AF_UNSPEC). Its port stays.
pub(crate) fn dissolve(socket: BorrowedFd<'_>) {
    if is_connected(socket)
        && let Err(error) = sys::dissolve(socket)
    {
        tracing::warn!(%error, "a socket that its service has connected stays so");
    }
}

/// Has it a peer?
#[must_use]
pub fn is_connected(socket: BorrowedFd<'_>) -> bool {
    getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok()
}

/// Was it shut down? Of one direction the kernel's table tells, where there is one (INET_UDP_DIAG).
#[must_use]
pub fn is_shut_down(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let both = poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        && polled.iter().filter_map(PollFd::revents).any(|events| events.contains(PollFlags::POLLHUP));
    both || clients::is_shut_down(socket).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd as _;
    use std::time::Duration;

    use super::*;

    fn pair() -> (UdpSocket, UdpSocket) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(socket.local_addr().unwrap()).unwrap();
        (socket, client)
    }

    #[test]
    fn what_comes_is_seen_by_a_duplicate() {
        let (service, client) = pair();
        let host = service.try_clone().unwrap();
        let look = || traffic(host.as_fd()).unwrap();
        assert_eq!(look(), Traffic { waits: false, received: LastReceived::Never });
        // The kernel takes times down a moment after it was asked to.
        let mut seen = Vec::new();
        for round in 0..3 {
            let before = SystemTime::now() - Duration::from_millis(100);
            client.send(b"").unwrap();
            assert!(look().waits, "an empty one waits");
            service.recv(&mut [0; 8]).unwrap();
            let Traffic { waits: false, received: LastReceived::At(at) } = look() else {
                panic!("round {round}: {:?}", look());
            };
            assert!(at >= before && at <= SystemTime::now() + Duration::from_millis(100), "{at:?}");
            seen.push(at);
        }
        assert_eq!(look().received, LastReceived::At(seen[2]));
        sys::set_option(service.as_fd(), libc::SOL_SOCKET, libc::SO_TIMESTAMP, &1i32.to_ne_bytes()).unwrap();
        assert_eq!(look().received, LastReceived::Unseen);
        for _ in 0..3 {
            client.send(b"dropped").unwrap();
        }
        drop_what_waits(host.as_fd(), 2);
        assert!(look().waits);
        drop_what_waits(host.as_fd(), 2);
        assert!(!look().waits);
    }

    #[test]
    fn a_socket_that_was_connected_takes_others_again() {
        // Bound to a port that was asked for, as systemd's is: another one loses it.
        let place = pair().0.local_addr().unwrap();
        let service = UdpSocket::bind(place).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(place).unwrap();
        let port = service.local_addr().unwrap();
        service.connect("127.0.0.1:9").unwrap();
        assert!(is_connected(service.as_fd()));
        dissolve(service.as_fd());
        assert!(!is_connected(service.as_fd()) && !is_shut_down(service.as_fd()));
        assert_eq!(service.local_addr().unwrap(), port);
        service.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.send(b"hello").unwrap();
        assert_eq!(service.recv(&mut [0; 8]).unwrap(), 5);
        nix::sys::socket::shutdown(service.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap_err();
        assert!(is_shut_down(service.as_fd()));
    }
}
