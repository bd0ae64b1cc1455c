//! Is an address one of this host's? systemd listens at any (FreeBind=), since it may come later than the sockets do at boot; a
//! mistyped one would never be noticed.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, socket};

use crate::address::External;

/// The sentence about an address that no network interface has now.
pub(crate) fn sentence(external: &External) -> Option<String> {
    let ip = external.ip()?;
    is_nowhere(ip)
        .then(|| format!("no network interface has the address {ip} now, so no client can connect there"))
}

/// What to do about that.
pub(crate) const MEND: &str = "`ip address` shows those there are";

fn is_nowhere(ip: IpAddr) -> bool {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let Ok(socket) = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None) else { return false };
    // Any port will do. Where foreign addresses may be bound (net.ipv4.ip_nonlocal_bind), this cannot find out.
    let anywhere = SockaddrStorage::from(SocketAddr::new(ip, 0));
    bind(socket.as_raw_fd(), &anywhere) == Err(Errno::EADDRNOTAVAIL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_no_interface_is_named() {
        let said = |text: &str| sentence(&text.parse().unwrap());
        for mine in ["127.0.0.1:80", "127.9.9.9:80", "0.0.0.0:80", "80", "/run/x.sock"] {
            assert_eq!(said(mine), None, "{mine}");
        }
        // Of TEST-NET-3 (RFC 5737).
        assert!(said("203.0.113.7:80").unwrap().contains("203.0.113.7 now"));
    }
}
