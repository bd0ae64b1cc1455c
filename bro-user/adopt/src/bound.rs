//! Where a listener of the host's is bound. getsockname(2) does not always say: the fence of a socket unit has it say the internal port, to this
//! process as well (`bro fence --port`), and what connects to the listener, or asks the kernel for its clients, needs the other one. The kernel's table has it, by the
//! socket's cookie.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use bro_relay::netns::netlink;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use nix::libc;

use crate::socket::{self, Place};

/// What was found: a listener is bound once. By its cookie, of which there are as many as listeners that this process has had.
static FOUND: Mutex<BTreeMap<u64, SocketAddr>> = Mutex::new(BTreeMap::new());

/// Where it is bound; what getsockname(2) says, where the table does not tell (it tells of listeners in this process's network namespace alone). `None` of a socket
/// without an address.
#[must_use]
pub fn place(listener: BorrowedFd<'_>) -> Option<Place> {
    let told = Place::of(listener)?;
    let Place::Tcp(address) = told else { return Some(told) };
    let Ok(cookie) = socket::cookie(listener) else { return Some(told) };
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = found.get(&cookie) {
        return Some(Place::Tcp(*known));
    }
    match in_table(cookie, address.is_ipv4()) {
        Some(bound) => {
            found.insert(cookie, bound);
            Some(Place::Tcp(bound))
        }
        None => Some(told),
    }
}

fn in_table(cookie: u64, is_v4: bool) -> Option<SocketAddr> {
    let table = bro_relay::sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG).ok()?;
    let (family, socket_id) =
        if is_v4 { (AF_INET, SocketId::new_v4()) } else { (AF_INET6, SocketId::new_v6()) };
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::LISTEN,
        socket_id,
    };
    let mut found = None;
    let asked =
        netlink::ask(&table, NLM_F_REQUEST | NLM_F_DUMP, SockDiagMessage::InetRequest(request), |answer| {
            if let SockDiagMessage::InetResponse(response) = answer
                && u64::from_ne_bytes(response.header.socket_id.cookie) == cookie
            {
                let id = &response.header.socket_id;
                found = Some(SocketAddr::new(id.source_address, id.source_port));
            }
        });
    asked.ok().and(found)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn the_table_says_the_same_where_nothing_lies() {
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let listener = std::net::TcpListener::bind(address).unwrap();
            let at = listener.local_addr().unwrap();
            assert_eq!(in_table(socket::cookie(listener.as_fd()).unwrap(), at.is_ipv4()), Some(at));
            assert_eq!(place(listener.as_fd()), Some(Place::Tcp(at)));
        }
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(place(datagrams.as_fd()).is_some());
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(place(unix.as_fd()), Place::of(unix.as_fd()));
    }
}
