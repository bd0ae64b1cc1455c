//! Socket addresses as the rest of the program compares them: an IPv4 one always as such, also where a dual-stack socket shows
//! it mapped into IPv6.

use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};

use nix::sys::socket::SockaddrStorage;

/// The TCP address; `None` where it is a unix socket's.
#[must_use]
pub fn tcp(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    let v6 = SocketAddrV6::from(*address.as_sockaddr_in6()?);
    Some(SocketAddr::new(v6.ip().to_canonical(), v6.port()))
}

/// Is the peer of a socket with the address `own` on the same host?
#[must_use]
pub fn on_this_host(own: IpAddr, peer: IpAddr) -> bool {
    own == peer || peer.is_loopback()
}
