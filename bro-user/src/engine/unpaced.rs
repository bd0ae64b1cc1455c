//! What a sink on this host is spared: congestion control.
//!
//! Between two sockets of one host there is no path to share and nothing is lost, but an algorithm that paces (bbr) still
//! spreads what it sends over time, with a timer for each step, and carries a stream at half the speed. Reno, which every
//! kernel has and everybody may choose (tcp(7), tcp_allowed_congestion_control), does nothing there once it has started.

use std::ffi::OsString;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::sys::socket::{SockaddrStorage, getpeername, getsockname, setsockopt, sockopt};

use crate::sockaddr;

/// Chooses the algorithm, if the sink's other end is on this host. A failure leaves the host's default.
pub fn unpace(sink: BorrowedFd<'_>) {
    if is_local(sink) {
        setsockopt(&sink, sockopt::TcpCongestion, &OsString::from("reno")).ok();
    }
}

fn is_local(socket: BorrowedFd<'_>) -> bool {
    let (own, peer) = (getsockname(socket.as_raw_fd()), getpeername(socket.as_raw_fd()));
    let ip =
        |end: nix::Result<SockaddrStorage>| end.ok().and_then(|end| sockaddr::tcp(&end)).map(|end| end.ip());
    ip(own).zip(ip(peer)).is_some_and(|(own, peer)| sockaddr::on_this_host(own, peer))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn a_sink_on_this_host_is_not_paced() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            unpace(stream.as_fd());
            let chosen = getsockopt(&stream, sockopt::TcpCongestion).unwrap();
            assert_eq!(chosen.to_string_lossy().trim_end_matches('\0'), "reno", "{address}");
        }
    }
}
