//! TCP clients, by the kernel's table of connections: which of them came to which listener.
//!
//! A connection does not say by which listener it came. It is of the listener's family (the kernel makes it so: an IPv4 client of an IPv6 listener has
//! an IPv6 socket), has its port, and of the listeners with both the one that the kernel would choose for its local address
//! (`inet_lookup_listener`): bound to the interface before any interface, bound to the address before any address. Where several are
//! left (SO_REUSEPORT) the control group tells them apart: a connection has that of its listener's maker, and systemd makes each socket
//! unit's sockets in one of its own. Where not even that does, it counts for each of them: it is better to keep a service awake.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use netlink_packet_core::Nla as _;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use nix::libc;

use super::{ClientEnd, ServedClient, Uncountable, WithBytes};
use crate::bound;
use crate::socket::{self, Place};
use crate::sys;

/// A listener as the table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bound {
    cookie: u64,
    end: LocalEnd,
}

/// What listeners and their connections have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LocalEnd {
    address: IpAddr,
    /// SO_BINDTODEVICE (`BindToDevice=`); 0 without.
    interface: u32,
    /// INET_DIAG_CGROUP_ID (Linux 5.9).
    cgroup: Option<u64>,
}

impl LocalEnd {
    pub(super) fn of(response: &InetResponse) -> Self {
        const INET_DIAG_CGROUP_ID: u16 = 21;
        let group = response.nlas.iter().find(|nla| nla.kind() == INET_DIAG_CGROUP_ID);
        let cgroup = group.filter(|nla| nla.value_len() == 8).map(|nla| {
            let mut value = [0; 8];
            nla.emit_value(&mut value);
            u64::from_ne_bytes(value)
        });
        let id = &response.header.socket_id;
        Self { address: id.source_address, interface: id.interface_id, cgroup }
    }

    /// How well a listener here fits a connection there, as the kernel weighs it; `None` where no such connection comes by it.
    fn fits(&self, connection: &Self) -> Option<u8> {
        let interface = match self.interface {
            0 => 0,
            bound if bound == connection.interface => 2,
            _ => return None,
        };
        if self.address == connection.address {
            Some(interface + 1)
        } else {
            self.address.is_unspecified().then_some(interface)
        }
    }
}

/// Which of the listeners a connection came by.
fn came_by(listeners: &[Bound], connection: &LocalEnd) -> Vec<u64> {
    let fits: Vec<(u8, &Bound)> =
        listeners.iter().filter_map(|listener| Some((listener.end.fits(connection)?, listener))).collect();
    let best = fits.iter().map(|(fit, _)| *fit).max();
    let best: Vec<&Bound> =
        fits.into_iter().filter(|(fit, _)| Some(*fit) == best).map(|(_, bound)| bound).collect();
    let same: Vec<u64> = best
        .iter()
        .filter(|listener| connection.cgroup.is_some() && listener.end.cgroup == connection.cgroup)
        .map(|listener| listener.cookie)
        .collect();
    if same.is_empty() { best.iter().map(|listener| listener.cookie).collect() } else { same }
}

/// TCP_INFO of a listener has the length of its accept queue where a connection's has the segments that are not acknowledged
/// (`tcp_get_info`).
pub(super) fn queued(listener: BorrowedFd<'_>) -> io::Result<u32> {
    const TCP_LISTEN: u8 = 10;
    // tcpi_state is the first byte of eight; then come tcpi_rto, tcpi_ato, tcpi_snd_mss, tcpi_rcv_mss, tcpi_unacked.
    let mut info = [0; 28];
    let _length = sys::option(listener, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    let length = u32::from_ne_bytes([info[24], info[25], info[26], info[27]]);
    Ok(if info[0] == TCP_LISTEN { length } else { 0 })
}

/// Listeners of one family and port, which one question is about.
struct PortQuestion {
    family: u8,
    port: u16,
    /// Their places among all, with their cookies.
    listeners: Vec<(usize, u64)>,
    /// All of the namespace's, those of other programs too.
    bound: Vec<Bound>,
}

/// What is to be asked about these listeners; nothing about those that are not TCP's.
fn questions(listeners: &[BorrowedFd<'_>]) -> Vec<PortQuestion> {
    let mut asked: Vec<PortQuestion> = Vec::new();
    for (index, listener) in listeners.iter().enumerate() {
        let Some((Place::Tcp(address), seen)) = bound::place(*listener).zip(socket::look(*listener)) else {
            continue;
        };
        let family = if address.is_ipv4() { AF_INET } else { AF_INET6 };
        // In case that it is found not to listen any more: its connections are still there.
        let end = LocalEnd { address: address.ip(), interface: 0, cgroup: None };
        let own = Bound { cookie: seen.cookie, end };
        let same = asked.iter_mut().find(|asked| (asked.family, asked.port) == (family, address.port()));
        if let Some(same) = same {
            same.listeners.push((index, seen.cookie));
            same.bound.push(own);
        } else {
            let (listeners, port) = (vec![(index, seen.cookie)], address.port());
            asked.push(PortQuestion { family, port, listeners, bound: vec![own] });
        }
    }
    asked
}

/// Did one of these connections, of this family and at this local port, come by one of the listeners?
pub(super) fn is_client(
    listeners: &[BorrowedFd<'_>],
    connections: &[(u8, u16, LocalEnd)],
) -> Result<bool, Uncountable> {
    for mut asked in questions(listeners) {
        let (family, port) = (asked.family, asked.port);
        let mut at_port = connections
            .iter()
            .filter(|(its, at, _)| (*its, *at) == (family, port))
            .map(|(_, _, end)| end)
            .peekable();
        if at_port.peek().is_none() {
            continue;
        }
        asked.learn_of_others(&super::table(listeners)?)?;
        let is_ours = |cookie: &u64| asked.listeners.iter().any(|(_, its)| its == cookie);
        if at_port.any(|end| came_by(&asked.bound, end).iter().any(is_ours)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Does the kernel tell of these listeners, by the table that has their connections too?
pub(super) fn are_countable(listeners: &[BorrowedFd<'_>]) -> Result<(), Uncountable> {
    questions(listeners).iter_mut().try_for_each(|asked| asked.learn_of_others(&super::table(listeners)?))
}

/// Hands over each that is served.
pub(super) fn served(
    listeners: &[BorrowedFd<'_>],
    bytes: WithBytes,
    each: &mut dyn FnMut(&ServedClient),
) -> Result<(), Uncountable> {
    questions(listeners).iter_mut().try_for_each(|asked| asked.ask(listeners, bytes, each))
}

impl PortQuestion {
    fn ask(
        &mut self,
        listeners: &[BorrowedFd<'_>],
        with_bytes: WithBytes,
        each: &mut dyn FnMut(&ServedClient),
    ) -> Result<(), Uncountable> {
        let table = super::table(listeners)?;
        self.learn_of_others(&table)?;
        let states =
            StateFlags::ESTABLISHED | StateFlags::CLOSE_WAIT | StateFlags::FIN_WAIT1 | StateFlags::FIN_WAIT2;
        let extensions = match with_bytes {
            WithBytes::Yes => ExtensionFlags::INFO,
            WithBytes::No => ExtensionFlags::empty(),
        };
        super::dump(&table, self.request(states, extensions), |answer| {
            let SockDiagMessage::InetResponse(response) = answer else { return };
            if response.header.inode == 0 {
                return;
            }
            let (number, end) = who(&response);
            let bytes = bytes(&response).filter(|_| with_bytes == WithBytes::Yes);
            for cookie in came_by(&self.bound, &LocalEnd::of(&response)) {
                for (index, _) in self.listeners.iter().filter(|(_, its)| *its == cookie) {
                    each(&ServedClient { listener: *index, number, end, bytes });
                }
            }
        })
    }

    /// Asks which listeners there are.
    fn learn_of_others(&mut self, table: &OwnedFd) -> Result<(), Uncountable> {
        let mut found = Vec::new();
        let request = self.request(StateFlags::LISTEN, ExtensionFlags::empty());
        super::dump(table, request, |answer| {
            if let SockDiagMessage::InetResponse(response) = answer {
                let cookie = u64::from_ne_bytes(response.header.socket_id.cookie);
                found.push(Bound { cookie, end: LocalEnd::of(&response) });
            }
        })?;
        self.bound.retain(|own| !found.iter().any(|found| found.cookie == own.cookie));
        self.bound.append(&mut found);
        Ok(())
    }

    /// The kernel tells of sockets with this local port alone (`inet_diag_dump_icsk`), and so of none that is somewhere else.
    fn request(&self, states: StateFlags, extensions: ExtensionFlags) -> SockDiagMessage {
        let any = if self.family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
        SockDiagMessage::InetRequest(InetRequest {
            family: self.family,
            protocol: IPPROTO_TCP,
            extensions,
            states,
            socket_id: SocketId { source_port: self.port, ..any },
        })
    }
}

/// A connection's cookie, and its client's end.
pub(super) fn who(response: &InetResponse) -> (u64, ClientEnd) {
    let id = &response.header.socket_id;
    let address = SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
    (u64::from_ne_bytes(id.cookie), ClientEnd::Tcp(address))
}

/// tcpi_bytes_acked and tcpi_bytes_received (Linux 4.1) together. An end takes one place in the sequence, and is no byte.
pub(super) fn bytes(response: &InetResponse) -> Option<u64> {
    const TCP_FIN_WAIT2: u8 = 5;
    const TCP_CLOSE_WAIT: u8 = 8;
    let info = response.nlas.iter().find_map(|nla| match nla {
        Nla::TcpInfo(info) => Some(info),
        _ => None,
    })?;
    let number = |at: usize| {
        let bytes: [u8; 8] = info.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    let ends = u64::from([TCP_FIN_WAIT2, TCP_CLOSE_WAIT].contains(&response.header.state));
    Some(number(120)?.wrapping_add(number(128)?).saturating_sub(ends))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(address: &str, interface: u32, cgroup: Option<u64>) -> LocalEnd {
        LocalEnd { address: address.parse().unwrap(), interface, cgroup }
    }

    #[test]
    fn a_connection_came_by_the_listener_that_the_kernel_chooses() {
        let bound =
            |cookie, address, interface, cgroup| Bound { cookie, end: end(address, interface, cgroup) };
        let listeners = [
            bound(1, "0.0.0.0", 0, Some(10)),
            bound(2, "127.0.0.1", 0, Some(20)),
            bound(3, "0.0.0.0", 7, Some(30)),
            bound(4, "10.0.0.1", 0, Some(40)),
            bound(5, "10.0.0.1", 0, Some(50)),
        ];
        for (address, interface, cgroup, came) in [
            ("127.0.0.1", 0, Some(20), vec![2]),
            // What does not agree is no reason to let a service sleep.
            ("127.0.0.1", 0, Some(99), vec![2]),
            ("127.0.0.2", 0, Some(10), vec![1]),
            ("10.0.0.9", 7, Some(30), vec![3]),
            ("10.0.0.1", 0, Some(50), vec![5]),
            ("10.0.0.1", 0, Some(99), vec![4, 5]),
            ("10.0.0.1", 0, None, vec![4, 5]),
        ] {
            assert_eq!(came_by(&listeners, &end(address, interface, cgroup)), came, "{address} {interface}");
        }
        assert_eq!(came_by(&listeners[1..2], &end("127.0.0.2", 0, Some(20))), [0; 0]);
    }
}
