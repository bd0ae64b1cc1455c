//! Where a listener of the host's is bound. getsockname(2) does not always say: the fence of a socket unit has it say the internal port, to this
//! process as well (`bro fence --port`), and what connects to the listener, or asks the kernel for its clients, needs the other one. The kernel's table has it, by the
//! socket's cookie.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use bro_relay::netns::netlink;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use nix::libc;

use crate::socket::{self, Place};

/// The ports that were found: a listener is bound once. By its cookie, of which there are as many as listeners that this process has had.
static FOUND: Mutex<BTreeMap<u64, u16>> = Mutex::new(BTreeMap::new());

/// Where it is bound; what getsockname(2) says, where the table does not tell (it tells of sockets in this process's network namespace alone, and of those for
/// datagrams where the kernel has udp_diag). `None` of a socket without an address.
#[must_use]
pub fn place(listener: BorrowedFd<'_>) -> Option<Place> {
    places(&[listener]).pop().flatten()
}

/// The same of each, for which each table is read once.
#[must_use]
pub fn places(listeners: &[BorrowedFd<'_>]) -> Vec<Option<Place>> {
    let told: Vec<_> = listeners.iter().map(|listener| ToldPlace::of(*listener)).collect();
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    for (table, is_v4) in PortTable::ALL {
        let in_it =
            |told: &&ToldPlace| told.table == Some((table, is_v4)) && !found.contains_key(&told.cookie);
        let missing: BTreeSet<u64> = told.iter().flatten().filter(in_it).map(|told| told.cookie).collect();
        if !missing.is_empty() {
            found.extend(table.tells(&missing, is_v4));
        }
    }
    told.into_iter().map(|told| told.map(|told| told.corrected(&found))).collect()
}

/// What getsockname(2) says of a socket.
struct ToldPlace {
    place: Place,
    /// 0 where it does not matter.
    cookie: u64,
    /// Where it is to be found, and whether among those of IPv4.
    table: Option<(PortTable, bool)>,
}

impl ToldPlace {
    fn of(listener: BorrowedFd<'_>) -> Option<Self> {
        let place = Place::of(listener)?;
        let table = match &place {
            Place::Tcp(address) => Some((PortTable::Listeners, address.is_ipv4())),
            Place::Udp(address) => Some((PortTable::Datagrams, address.is_ipv4())),
            Place::Path(_) | Place::Abstract(_) => None,
        };
        let cookie = table.and_then(|_| socket::cookie(listener).ok());
        Some(Self { place, cookie: cookie.unwrap_or(0), table: table.filter(|_| cookie.is_some()) })
    }

    /// With the port of the table, where it is in one.
    fn corrected(mut self, found: &BTreeMap<u64, u16>) -> Place {
        let port = self.table.and_then(|_| found.get(&self.cookie));
        if let (Some(port), Place::Tcp(address) | Place::Udp(address)) = (port, &mut self.place) {
            address.set_port(*port);
        }
        self.place
    }
}

/// One of the kernel's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortTable {
    /// Of TCP, those that listen.
    Listeners,
    /// Of UDP, those that are connected to no peer.
    Datagrams,
}

impl PortTable {
    /// With whether it is that of IPv4.
    const ALL: [(Self, bool); 4] = [
        (Self::Listeners, true),
        (Self::Listeners, false),
        (Self::Datagrams, true),
        (Self::Datagrams, false),
    ];

    /// At which ports these are bound, by their cookies; nothing of those that are not in it.
    fn tells(self, wanted: &BTreeSet<u64>, is_v4: bool) -> BTreeMap<u64, u16> {
        let mut found = BTreeMap::new();
        let (protocol, states) = match self {
            Self::Listeners => (IPPROTO_TCP, StateFlags::LISTEN),
            Self::Datagrams => (IPPROTO_UDP, StateFlags::CLOSE),
        };
        let Ok(table) = bro_relay::sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)
        else {
            return found;
        };
        let (family, socket_id) =
            if is_v4 { (AF_INET, SocketId::new_v4()) } else { (AF_INET6, SocketId::new_v6()) };
        let request =
            InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id };
        let request = SockDiagMessage::InetRequest(request);
        let asked = netlink::ask(&table, NLM_F_REQUEST | NLM_F_DUMP, request, |answer| {
            if let SockDiagMessage::InetResponse(response) = answer {
                let id = &response.header.socket_id;
                let cookie = u64::from_ne_bytes(id.cookie);
                if wanted.contains(&cookie) {
                    found.insert(cookie, id.source_port);
                }
            }
        });
        if asked.is_ok() { found } else { BTreeMap::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::os::fd::AsFd as _;

    use super::*;

    fn in_table(table: PortTable, socket: BorrowedFd<'_>, at: SocketAddr) -> Option<u16> {
        let cookie = socket::cookie(socket).unwrap();
        table.tells(&BTreeSet::from([cookie]), at.is_ipv4()).remove(&cookie)
    }

    #[test]
    fn the_table_says_the_same_where_nothing_lies() {
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let listener = std::net::TcpListener::bind(address).unwrap();
            let at = listener.local_addr().unwrap();
            assert_eq!(in_table(PortTable::Listeners, listener.as_fd(), at), Some(at.port()));
            let datagrams = std::net::UdpSocket::bind(address).unwrap();
            let for_them = datagrams.local_addr().unwrap();
            assert_eq!(in_table(PortTable::Datagrams, datagrams.as_fd(), for_them), Some(for_them.port()));
            let both = places(&[listener.as_fd(), datagrams.as_fd()]);
            assert_eq!(both, [Some(Place::Tcp(at)), Some(Place::Udp(for_them))]);
        }
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(place(unix.as_fd()), Place::of(unix.as_fd()));
    }
}
