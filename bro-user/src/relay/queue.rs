//! How much may wait in a sink's send buffer.
//!
//! Towards another host the kernel's auto-tuning knows best (tcp(7), tcp_wmem). Between two sockets of one host it lets the
//! queue grow to megabytes, although there is no delay to bridge: the bytes then leave the processor's cache before the
//! reader gets to them. A queue of a few hundred kilobytes carries the same stream up to twice as fast.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::sys::socket::{SockaddrStorage, getpeername, getsockname, setsockopt, sockopt};

/// The SO_SNDBUF of a sink on this host, in bytes; the kernel doubles it for its own overhead (socket(7)).
const LOCAL: usize = 128 * 1024;

/// Bounds the queue of a sink whose other end is on this host, from the start: later the reader's own buffer has grown too.
/// A failure leaves it as it is.
pub fn bound(sink: BorrowedFd<'_>) {
    if is_local(sink) {
        setsockopt(&sink, sockopt::SndBuf, &LOCAL).ok();
    }
}

/// Are both ends of a TCP connection on this host? (Unix sockets queue little by themselves.)
fn is_local(socket: BorrowedFd<'_>) -> bool {
    let (own, peer) = (getsockname(socket.as_raw_fd()), getpeername(socket.as_raw_fd()));
    let (Some(own), Some(peer)) = (own.ok().and_then(ip), peer.ok().and_then(ip)) else { return false };
    own == peer || peer.is_loopback()
}

fn ip(address: SockaddrStorage) -> Option<std::net::IpAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4((*v4).into()).ip());
    }
    let v6 = std::net::SocketAddrV6::from(*address.as_sockaddr_in6()?);
    Some(v6.ip().to_canonical())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn a_sink_on_this_host_is_bounded() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            assert!(getsockopt(&stream, sockopt::SndBuf).unwrap() > 2 * LOCAL, "{address}");
            bound(stream.as_fd());
            assert_eq!(getsockopt(&stream, sockopt::SndBuf).unwrap(), 2 * LOCAL, "{address}");
        }
    }

    #[test]
    fn a_unix_socket_is_left_alone() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let before = getsockopt(&one, sockopt::SndBuf).unwrap();
        bound(one.as_fd());
        assert_eq!(getsockopt(&one, sockopt::SndBuf).unwrap(), before);
    }
}
