//! Socket options: what a service has set on the socket that it made is set on the one that it gets, and taken back after it.
//!
//! Accepted sockets have their listener's options (`sk_clone_lock`), so a service that sets them once, before listen(2), would lose them.
//! They stay with systemd's socket when the container has ended, and the next instance must not find them there.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use serde::{Deserialize, Serialize};

use crate::family::Family;
use crate::option_name::{Name, at};
use crate::{datagram_options, socket, sys};

/// SO_BUF_LOCK (Linux 5.14): which buffer sizes were set by hand (`SOCK_SNDBUF_LOCK`, `SOCK_RCVBUF_LOCK`).
const BUFFER_LOCK: Name = at(libc::SOL_SOCKET, 72);
const BUFFERS: [(Name, i32); 2] =
    [(at(libc::SOL_SOCKET, libc::SO_SNDBUF), 1), (at(libc::SOL_SOCKET, libc::SO_RCVBUF), 2)];

const ANY: [Name; 10] = [
    at(libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    at(libc::SOL_SOCKET, libc::SO_OOBINLINE),
    at(libc::SOL_SOCKET, libc::SO_PRIORITY),
    at(libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    at(libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    at(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
    at(libc::SOL_SOCKET, libc::SO_ZEROCOPY),
    at(libc::SOL_SOCKET, libc::SO_LINGER),
    at(libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    at(libc::SOL_SOCKET, libc::SO_SNDTIMEO),
];
const UNIX: [Name; 1] = [at(libc::SOL_SOCKET, libc::SO_PASSCRED)];
const IP: [Name; 5] = [
    at(libc::SOL_IP, libc::IP_TOS),
    at(libc::SOL_IP, libc::IP_TTL),
    at(libc::SOL_IP, libc::IP_MTU_DISCOVER),
    at(libc::SOL_IP, libc::IP_RECVTOS),
    at(libc::SOL_IP, libc::IP_RECVERR),
];
const IPV6: [Name; 4] = [
    at(libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS),
    at(libc::SOL_IPV6, libc::IPV6_TCLASS),
    at(libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER),
    at(libc::SOL_IPV6, libc::IPV6_RECVERR),
];
const TCP: [Name; 12] = [
    at(libc::SOL_TCP, libc::TCP_NODELAY),
    at(libc::SOL_TCP, libc::TCP_KEEPIDLE),
    at(libc::SOL_TCP, libc::TCP_KEEPINTVL),
    at(libc::SOL_TCP, libc::TCP_KEEPCNT),
    at(libc::SOL_TCP, libc::TCP_SYNCNT),
    at(libc::SOL_TCP, libc::TCP_LINGER2),
    at(libc::SOL_TCP, libc::TCP_DEFER_ACCEPT),
    at(libc::SOL_TCP, libc::TCP_USER_TIMEOUT),
    at(libc::SOL_TCP, libc::TCP_FASTOPEN),
    at(libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT),
    at(libc::SOL_TCP, libc::TCP_SAVE_SYN),
    at(libc::SOL_TCP, libc::TCP_CONGESTION),
];

/// Those that a socket of this family has.
fn names(family: Family) -> impl Iterator<Item = Name> {
    let (v6, tcp, udp) = (family.is_v6(), family.is_tcp(), family.is_datagrams());
    let pick = |all: &'static [Name], wanted: bool| if wanted { all } else { &[] }.iter().copied();
    pick(&ANY, true)
        .chain(pick(&UNIX, !tcp && !udp))
        .chain(pick(&IP, tcp || udp))
        .chain(pick(&IPV6, v6))
        .chain(pick(&TCP, tcp))
        .chain(pick(&datagram_options::CARRIED, udp))
        .chain(pick(&datagram_options::CARRIED_V6, udp && v6))
}

/// What comes beside datagrams, of a socket for them.
fn beside(family: Family) -> impl Iterator<Item = Name> {
    let (udp, v6) = (family.is_datagrams(), family.is_v6());
    let pick = |all: &'static [Name], wanted: bool| if wanted { all } else { &[] }.iter().copied();
    pick(&datagram_options::BESIDE, udp).chain(pick(&datagram_options::BESIDE_V6, udp && v6))
}

/// What is not carried over, and put back all the same.
fn only_put_back(family: Family) -> impl Iterator<Item = Name> {
    let (udp, v6) = (family.is_datagrams(), family.is_v6());
    let pick = |all: &'static [Name], wanted: bool| if wanted { all } else { &[] }.iter().copied();
    pick(&datagram_options::PUT_BACK, udp).chain(pick(&datagram_options::PUT_BACK_V6, udp && v6))
}

/// Wide enough for a `timeval` and for the name of a congestion control.
fn get(socket: BorrowedFd<'_>, name: Name) -> Option<Vec<u8>> {
    let mut value = vec![0; 16];
    let length = sys::option(socket, name.level, name.name, &mut value).ok()?;
    value.truncate(length);
    Some(value)
}

/// May the service have it? What would take CAP_NET_ADMIN on this host (socket(7): a priority above 6) is not got by being handed on.
fn may_be_handed_on(name: Name, value: &[u8]) -> bool {
    name != at(libc::SOL_SOCKET, libc::SO_PRIORITY)
        || value.try_into().is_ok_and(|bytes| (0..=6).contains(&i32::from_ne_bytes(bytes)))
}

/// What a listener had before the first adoption of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    values: Vec<(Name, Vec<u8>)>,
    nonblocking: bool,
}

impl Before {
    /// What this listener of this family has now.
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn of(listener: BorrowedFd<'_>, family: Family) -> nix::Result<Self> {
        let buffers = BUFFERS.iter().map(|(name, _)| *name);
        // The lock last: setting a size sets it.
        let others = beside(family).chain(only_put_back(family));
        let all = names(family).chain(others).chain(buffers).chain([BUFFER_LOCK]);
        let values = all.filter_map(|name| Some((name, get(listener, name)?))).collect();
        Ok(Self { values, nonblocking: is_nonblocking(listener)? })
    }

    /// The instance has ended: everything as it was.
    pub fn put_back(&self, listener: BorrowedFd<'_>) {
        let is_buffer = |name: Name| BUFFERS.iter().any(|(buffer, _)| *buffer == name);
        for (name, value) in &self.values {
            if get(listener, *name).as_ref() == Some(value) {
                continue;
            }
            let value = if is_buffer(*name) { halved(value) } else { value.clone() };
            if let Err(error) = sys::set_option(listener, name.level, name.name, &value) {
                tracing::debug!(%error, ?name, "a socket option of the service's stays");
            }
        }
        if let Err(error) = set_nonblocking(listener, self.nonblocking) {
            tracing::debug!(%error, "O_NONBLOCK stays");
        }
    }
}

/// Sets on `listener` what differs between the service's socket and a fresh one; how many could not be set.
///
/// # Errors
/// When a fresh socket cannot be made.
pub fn carry(service: BorrowedFd<'_>, family: Family, listener: BorrowedFd<'_>) -> io::Result<usize> {
    let fresh = fresh(service)?;
    let set = |name: Name, value: &[u8]| sys::set_option(listener, name.level, name.name, value).is_ok();
    let mut refused = 0;
    for name in names(family) {
        let Some(wanted) = get(service, name) else { continue };
        if get(fresh.as_fd(), name).as_ref() == Some(&wanted) || !may_be_handed_on(name, &wanted) {
            continue;
        }
        refused += usize::from(!set(name, &wanted));
    }
    for name in beside(family) {
        if let Some(wanted) = get(service, name).filter(|wanted| get(listener, name).as_ref() != Some(wanted))
        {
            refused += usize::from(!set(name, &wanted));
        }
    }
    let locked =
        get(service, BUFFER_LOCK).and_then(|value| value.try_into().ok()).map_or(0, i32::from_ne_bytes);
    for (name, bit) in BUFFERS {
        if let Some(value) = get(service, name).filter(|_| locked & bit != 0) {
            refused += usize::from(!set(name, &halved(&value)));
        }
    }
    Ok(refused)
}

/// O_NONBLOCK belongs to the open file description, which all have that adopted the listener. So the first adoption of an instance copies the
/// service's flag and a later one only ever sets it: whatever has asked not to be blocked may not be.
///
/// # Errors
/// fcntl(2)'s.
pub fn carry_nonblocking(service: BorrowedFd<'_>, listener: BorrowedFd<'_>, first: bool) -> nix::Result<()> {
    let (wanted, has) = (is_nonblocking(service)?, is_nonblocking(listener)?);
    if wanted != has && (wanted || first) { set_nonblocking(listener, wanted) } else { Ok(()) }
}

/// The kernel doubles what it is given, and tells the double (socket(7), SO_RCVBUF).
fn halved(value: &[u8]) -> Vec<u8> {
    let size = value.try_into().map_or(0, i32::from_ne_bytes);
    (size / 2).to_ne_bytes().to_vec()
}

/// A socket of the same kind that no program has set anything on.
fn fresh(service: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let number = |name| socket::number(service, libc::SOL_SOCKET, name);
    bro_relay::sys::socket(number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?, number(libc::SO_PROTOCOL)?)
}

/// Whether O_NONBLOCK is set.
///
/// # Errors
/// fcntl(2)'s.
pub fn is_nonblocking(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    Ok(OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?).contains(OFlag::O_NONBLOCK))
}

/// Sets O_NONBLOCK or takes it away.
///
/// # Errors
/// fcntl(2)'s.
pub fn set_nonblocking(socket: BorrowedFd<'_>, nonblocking: bool) -> nix::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, nonblocking);
    fcntl(socket, FcntlArg::F_SETFL(flags)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    fn set(socket: &TcpListener, level: i32, name: i32, value: i32) {
        sys::set_option(socket.as_fd(), level, name, &value.to_ne_bytes()).unwrap();
    }

    fn number(socket: &TcpListener, level: i32, name: i32) -> i32 {
        socket::number(socket.as_fd(), level, name).unwrap()
    }

    #[test]
    fn what_a_service_has_set_is_carried_and_put_back() {
        let (service, host) = (listener(), listener());
        set(&host, libc::SOL_TCP, libc::TCP_KEEPCNT, 4);
        let untouched = number(&host, libc::SOL_SOCKET, libc::SO_RCVBUF);
        for (level, name, value) in [
            (libc::SOL_TCP, libc::TCP_NODELAY, 1),
            (libc::SOL_TCP, libc::TCP_KEEPCNT, 3),
            (libc::SOL_SOCKET, libc::SO_RCVBUF, 20_000),
        ] {
            set(&service, level, name, value);
        }
        let before = Before::of(host.as_fd(), Family::V4).unwrap();
        assert_eq!(carry(service.as_fd(), Family::V4, host.as_fd()).unwrap(), 0);
        assert_eq!(number(&host, libc::SOL_TCP, libc::TCP_NODELAY), 1);
        assert_eq!(number(&host, libc::SOL_TCP, libc::TCP_KEEPCNT), 3);
        assert_eq!(number(&host, libc::SOL_SOCKET, libc::SO_RCVBUF), 40_000);
        before.put_back(host.as_fd());
        assert_eq!(number(&host, libc::SOL_TCP, libc::TCP_NODELAY), 0);
        assert_eq!(number(&host, libc::SOL_TCP, libc::TCP_KEEPCNT), 4);
        assert_eq!(number(&host, libc::SOL_SOCKET, libc::SO_RCVBUF), untouched);
        assert_eq!(get(host.as_fd(), BUFFER_LOCK), get(listener().as_fd(), BUFFER_LOCK));
    }

    #[test]
    fn what_comes_beside_a_datagram_is_what_the_service_wants() {
        let udp = |address: &str| std::net::UdpSocket::bind(address).unwrap();
        let value = |socket: &std::net::UdpSocket, (level, name): (i32, i32)| {
            socket::number(socket.as_fd(), level, name).unwrap()
        };
        let set = |socket: &std::net::UdpSocket, (level, name): (i32, i32)| {
            sys::set_option(socket.as_fd(), level, name, &1i32.to_ne_bytes()).unwrap();
        };
        let (pktinfo, tos) = ((libc::SOL_IP, libc::IP_PKTINFO), (libc::SOL_IP, libc::IP_RECVTOS));
        let (broadcast, reuse) =
            ((libc::SOL_SOCKET, libc::SO_BROADCAST), (libc::SOL_SOCKET, libc::SO_REUSEADDR));
        let (service, host) = (udp("127.0.0.1:0"), udp("127.0.0.1:0"));
        [pktinfo, broadcast].into_iter().for_each(|name| set(&host, name));
        [tos, broadcast, reuse].into_iter().for_each(|name| set(&service, name));
        let before = Before::of(host.as_fd(), Family::UdpV4).unwrap();
        assert_eq!(carry(service.as_fd(), Family::UdpV4, host.as_fd()).unwrap(), 0);
        let all = || [pktinfo, tos, broadcast, reuse].map(|name| value(&host, name));
        assert_eq!(all(), [0, 1, 1, 0]);
        // After bind(2) it is systemd's socket that the service sets options on.
        set(&host, reuse);
        before.put_back(host.as_fd());
        assert_eq!(all(), [1, 0, 1, 0]);
        let (service, host) = (udp("[::1]:0"), udp("[::1]:0"));
        let info = (libc::SOL_IPV6, libc::IPV6_RECVPKTINFO);
        set(&service, info);
        let before = Before::of(host.as_fd(), Family::UdpDual).unwrap();
        assert_eq!(carry(service.as_fd(), Family::UdpDual, host.as_fd()).unwrap(), 0);
        assert_eq!(value(&host, info), 1);
        before.put_back(host.as_fd());
        assert_eq!(value(&host, info), 0);
    }

    #[test]
    fn what_systemd_has_set_stays_where_the_service_sets_nothing() {
        let (service, host) = (listener(), listener());
        set(&host, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        carry(service.as_fd(), Family::V4, host.as_fd()).unwrap();
        assert_eq!(number(&host, libc::SOL_SOCKET, libc::SO_KEEPALIVE), 1);
    }

    #[test]
    fn the_first_adoption_copies_o_nonblock_and_a_later_one_only_sets_it() {
        let (blocking, nonblocking, host) = (listener(), listener(), listener());
        nonblocking.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        let before = Before::of(host.as_fd(), Family::V4).unwrap();
        let adopt = |service: &TcpListener, first| {
            carry_nonblocking(service.as_fd(), host.as_fd(), first).unwrap();
            is_nonblocking(host.as_fd()).unwrap()
        };
        let flags = [adopt(&blocking, true), adopt(&nonblocking, false), adopt(&blocking, false)];
        assert_eq!(flags, [false, true, true]);
        set_nonblocking(host.as_fd(), false).unwrap();
        before.put_back(host.as_fd());
        assert!(is_nonblocking(host.as_fd()).unwrap());
    }

    #[test]
    fn a_priority_that_takes_a_right_is_not_handed_on() {
        let name = at(libc::SOL_SOCKET, libc::SO_PRIORITY);
        assert!(may_be_handed_on(name, &6i32.to_ne_bytes()) && !may_be_handed_on(name, &7i32.to_ne_bytes()));
        assert!(!may_be_handed_on(name, &(-1i32).to_ne_bytes()) && !may_be_handed_on(name, &[]));
    }
}
