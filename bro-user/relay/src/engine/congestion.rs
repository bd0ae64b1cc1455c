//! What a sink on this host is spared: congestion control.
//!
//! Between two sockets of one host there is no path to share and nothing is lost, but an algorithm that paces (bbr) still spreads
//! what it sends over time, with a timer for each step, and carries a stream at half the speed. Reno, which every kernel has and
//! every user may choose (tcp(7), tcp_allowed_congestion_control), does nothing there once it has started.

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::LazyLock;

use nix::sys::socket::{SockaddrStorage, getpeername, getsockname, setsockopt, sockopt};

use crate::sockaddr;

/// The algorithm; not made anew for each socket.
static RENO: LazyLock<OsString> = LazyLock::new(|| "reno".into());

/// Chooses the algorithm, if the sink's other end (`peer`, where that is known) is on this host. A failure leaves the host's
/// default.
pub fn unpace(sink: BorrowedFd<'_>, peer: Option<IpAddr>) {
    if is_local(sink, peer) {
        setsockopt(&sink, sockopt::TcpCongestion, &*RENO).ok();
    }
}

/// Asks the kernel no more than it has to: this is for each connection, twice.
fn is_local(socket: BorrowedFd<'_>, peer: Option<IpAddr>) -> bool {
    let ip =
        |end: nix::Result<SockaddrStorage>| end.ok().and_then(|end| sockaddr::tcp(&end)).map(|end| end.ip());
    // A connection to the unspecified address goes to this host (ip(7), INADDR_ANY), under another address.
    let peer = peer.filter(|peer| !peer.is_unspecified()).or_else(|| ip(getpeername(socket.as_raw_fd())));
    peer.is_some_and(|peer| peer.is_loopback() || ip(getsockname(socket.as_raw_fd())) == Some(peer))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn a_sink_on_this_host_is_not_paced() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let there = listener.local_addr().unwrap();
            for peer in [None, Some(there.ip()), Some(Ipv4Addr::UNSPECIFIED.into())] {
                let stream = TcpStream::connect(there).unwrap();
                unpace(stream.as_fd(), peer);
                let chosen = getsockopt(&stream, sockopt::TcpCongestion).unwrap();
                assert_eq!(chosen.to_string_lossy().trim_end_matches('\0'), "reno", "{address} {peer:?}");
            }
        }
    }
}
