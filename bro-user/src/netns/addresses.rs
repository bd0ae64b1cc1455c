//! The addresses that a network namespace has of its own (rtnetlink(7)).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use bro_relay::netns::netlink;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use nix::libc;
use nix::sys::socket::{SockaddrStorage, connect, getsockname};

use super::NetnsRef;

/// The loopback interface's index, in every network namespace.
const LOOPBACK: u32 = 1;

/// Addresses that every namespace with a way there would reach by its default route; nothing is sent to them (RFC 5737, RFC 3849).
const ELSEWHERE: [(&str, u16); 2] = [("192.0.2.1", 9), ("2001:db8::1", 9)];

/// The addresses of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Those on its networks, first the one by which it reaches others; no link-local ones.
    pub networks: Vec<IpAddr>,
    /// Those on the loopback interface, beside 127.0.0.0/8 and ::1.
    pub loopback: Vec<IpAddr>,
}

impl Addresses {
    /// Those of the namespace at `place`. Needs no capability.
    ///
    /// # Errors
    /// When the kernel refuses or answers nonsense.
    pub async fn of(place: &NetnsRef) -> io::Result<Self> {
        let socket = place.socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).await?;
        let (mut found, mut candidates) = (Self::default(), Vec::new());
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        netlink::ask(&socket, NLM_F_REQUEST | NLM_F_DUMP, request, |answer| {
            if let RouteNetlinkMessage::NewAddress(message) = answer
                && let Some(ip) = own(&message)
            {
                if message.header.index != LOOPBACK {
                    candidates.push(ip);
                } else if !ip.is_loopback() {
                    found.loopback.push(ip);
                }
            }
        })?;
        for ip in candidates {
            // An address of an interface that is down, or that is still looked for elsewhere, is not the host's yet.
            if !is_link_local(ip) && place.is_local(ip).await? {
                found.networks.push(ip);
            }
        }
        for (elsewhere, port) in ELSEWHERE {
            if let Ok(elsewhere) = elsewhere.parse::<IpAddr>()
                && let Ok(first) = usual(place, SocketAddr::new(elsewhere, port)).await
                && let Some(at) = found.networks.iter().position(|ip| *ip == first)
            {
                found.networks[..=at].rotate_right(1);
            }
        }
        Ok(found)
    }
}

/// The address that a message tells of.
fn own(message: &AddressMessage) -> Option<IpAddr> {
    let attributes = || message.attributes.iter();
    // Of a point-to-point interface the other one is its peer's.
    let local = attributes().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    local.or_else(|| {
        attributes().find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

const fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// From which address the namespace would send to `elsewhere`.
async fn usual(place: &NetnsRef, elsewhere: SocketAddr) -> io::Result<IpAddr> {
    let domain = if elsewhere.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = place.socket(domain, libc::SOCK_DGRAM, 0).await?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(elsewhere))?;
    let own = bro_relay::sockaddr::tcp(&getsockname(socket.as_raw_fd())?);
    own.map(|own| own.ip()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn loopback_is_no_network() {
        let found = Addresses::of(&NetnsRef::Own).await.unwrap();
        assert!(!found.networks.iter().chain(&found.loopback).any(IpAddr::is_loopback), "{found:?}");
    }
}
