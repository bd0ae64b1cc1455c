//! The kernel's own table of TCP listeners and UDP sockets in a namespace (sock_diag(7)), read without touching the service.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use bro_relay::netns::netlink;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, Nla as _};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use nix::libc;

use super::NetnsRef;

/// A sock_diag socket in a namespace.
#[derive(Debug)]
pub struct Table {
    socket: OwnedFd,
}

/// A listener of the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListeningSocket {
    /// Where it listens.
    pub address: SocketAddr,
    /// An IPv6 listener that takes no IPv4 client.
    pub v6_only: bool,
    /// The number of the control group that it was made in (Linux 5.9): its folder's.
    pub group: Option<u64>,
}

impl ListeningSocket {
    /// Would a client of `address` reach this listener?
    #[must_use]
    pub fn serves(self, address: SocketAddr) -> bool {
        if self.address.port() != address.port() {
            return false;
        }
        match (self.address.ip(), address.ip()) {
            (IpAddr::V4(bound), IpAddr::V4(wanted)) => bound.is_unspecified() || bound == wanted,
            (IpAddr::V6(bound), IpAddr::V6(wanted)) => bound.is_unspecified() || bound == wanted,
            (IpAddr::V6(bound), IpAddr::V4(wanted)) => {
                bound.to_ipv4_mapped() == Some(wanted) || (bound.is_unspecified() && !self.v6_only)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) => false,
        }
    }
}

impl Table {
    /// Opens the table of the namespace at `place`. Needs no capability.
    ///
    /// # Errors
    /// socket(2)'s; the kernel may lack INET_DIAG.
    pub async fn open(place: &NetnsRef) -> io::Result<Self> {
        Ok(Self { socket: place.socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG).await? })
    }

    /// Opens the table of this process's own namespace.
    ///
    /// # Errors
    /// As above.
    pub fn here() -> io::Result<Self> {
        let socket = bro_relay::sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
        Ok(Self { socket })
    }

    /// Every TCP listener.
    ///
    /// # Errors
    /// When the kernel refuses or answers nonsense.
    pub fn listeners(&self) -> io::Result<Vec<ListeningSocket>> {
        self.all(IPPROTO_TCP, &StateFlags::LISTEN)
    }

    /// Every UDP socket that takes datagrams of any sender (one that is connected does not, nor one that was shut down).
    ///
    /// # Errors
    /// As above; ENOENT where the kernel lacks INET_UDP_DIAG.
    pub fn datagram_sockets(&self) -> io::Result<Vec<ListeningSocket>> {
        self.all(IPPROTO_UDP, &StateFlags::CLOSE)
    }

    fn all(&self, protocol: u8, states: &StateFlags) -> io::Result<Vec<ListeningSocket>> {
        let mut found = Vec::new();
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let request = InetRequest {
                family,
                protocol,
                extensions: ExtensionFlags::empty(),
                states: states.clone(),
                socket_id,
            };
            self.ask(NLM_F_REQUEST | NLM_F_DUMP, request, |response| {
                if !is_shut_down(response) {
                    found.push(read(response));
                }
            })?;
        }
        Ok(found)
    }

    fn ask(&self, flags: u16, request: InetRequest, mut each: impl FnMut(&InetResponse)) -> io::Result<()> {
        netlink::ask(&self.socket, flags, SockDiagMessage::InetRequest(request), |answer| {
            if let SockDiagMessage::InetResponse(response) = answer {
                each(&response);
            }
        })
    }
}

/// Both directions: such a socket for datagrams is in the table until all have closed it.
fn is_shut_down(response: &InetResponse) -> bool {
    const BOTH: u8 = 3;
    response.nlas.iter().any(|nla| matches!(nla, Nla::Shutdown(BOTH)))
}

/// INET_DIAG_CGROUP_ID, which the library has no name for.
fn group(response: &InetResponse) -> Option<u64> {
    const INET_DIAG_CGROUP_ID: u16 = 21;
    let nla = response.nlas.iter().find(|nla| nla.kind() == INET_DIAG_CGROUP_ID && nla.value_len() == 8)?;
    let mut value = [0; 8];
    nla.emit_value(&mut value);
    Some(u64::from_ne_bytes(value))
}

fn read(response: &InetResponse) -> ListeningSocket {
    let id = &response.header.socket_id;
    ListeningSocket {
        address: SocketAddr::new(id.source_address, id.source_port),
        group: group(response),
        v6_only: response.nlas.iter().any(|nla| matches!(nla, Nla::SkV6Only(true))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(address: &str, v6_only: bool) -> ListeningSocket {
        ListeningSocket { address: address.parse().unwrap(), v6_only, group: None }
    }

    #[test]
    fn knows_who_would_answer() {
        let local: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let local6: SocketAddr = "[::1]:80".parse().unwrap();
        assert!(listening("127.0.0.1:80", false).serves(local));
        assert!(listening("0.0.0.0:80", false).serves(local));
        assert!(listening("[::]:80", false).serves(local));
        assert!(listening("[::]:80", true).serves(local6));
        assert!(!listening("[::]:80", true).serves(local));
        assert!(!listening("127.0.0.2:80", false).serves(local));
        assert!(!listening("0.0.0.0:80", false).serves(local6));
        assert!(!listening("0.0.0.0:81", false).serves(local));
    }

    #[tokio::test]
    async fn shows_a_listener_of_this_namespace() {
        let table = Table::open(&NetnsRef::Own).await.unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(table.listeners().unwrap().iter().any(|found| found.serves(address)));
        drop(listener);
        assert!(!table.listeners().unwrap().iter().any(|found| found.serves(address)));
    }

    #[tokio::test]
    async fn shows_a_datagram_socket_that_is_not_connected() {
        let table = Table::open(&NetnsRef::Own).await.unwrap();
        let socket = std::net::UdpSocket::bind("[::1]:0").unwrap();
        let address = socket.local_addr().unwrap();
        let shown = || table.datagram_sockets().unwrap().iter().any(|found| found.serves(address));
        assert!(shown());
        socket.connect(address).unwrap();
        assert!(!shown());
    }
}
