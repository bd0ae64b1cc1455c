//! Socket addresses as the rest of the program compares them: an IPv4 one always as such, also where a dual-stack socket shows
//! it mapped into IPv6.

use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};

use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::SockaddrStorage;

/// The TCP address; `None` where it is a unix socket's or one of vsock(7).
#[must_use]
pub fn tcp(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    let v6 = SocketAddrV6::from(*address.as_sockaddr_in6()?);
    Some(SocketAddr::new(v6.ip().to_canonical(), v6.port()))
}

/// An address of vsock(7) as systemd writes it: `vsock:CID:PORT`, and `vsock::PORT` for every context identifier.
#[must_use]
pub fn describe_vsock(cid: u32, port: u32) -> String {
    if cid == VMADDR_CID_ANY { format!("vsock::{port}") } else { format!("vsock:{cid}:{port}") }
}

/// Is the peer of a socket with the address `own` on the same host?
#[must_use]
pub fn on_this_host(own: IpAddr, peer: IpAddr) -> bool {
    own == peer || peer.is_loopback()
}
