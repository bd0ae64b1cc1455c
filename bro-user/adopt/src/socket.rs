//! What the kernel says of a socket: who it is, what kind, where.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::libc;
use nix::sys::socket::{SockaddrStorage, getsockname};

use crate::family::Family;
use crate::sys;

/// Where a socket is bound, or is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A UDP address.
    Udp(SocketAddr),
    /// A unix socket's path, as it was given to bind(2).
    Path(Vec<u8>),
    /// An abstract name, without its zero byte.
    Abstract(Vec<u8>),
}

impl Place {
    /// A socket's own; `None` of one without.
    #[must_use]
    pub fn of(socket: BorrowedFd<'_>) -> Option<Self> {
        let name = getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
        let v4 = name.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
        if let Some(address) = v4.or_else(|| name.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into()))) {
            let kind = number(socket, libc::SOL_SOCKET, libc::SO_TYPE).ok()?;
            return Some(if kind == libc::SOCK_DGRAM { Self::Udp(address) } else { Self::Tcp(address) });
        }
        let unix = name.as_unix_addr()?;
        match (unix.path(), unix.as_abstract()) {
            (Some(path), _) => Some(Self::Path(path.as_os_str().as_encoded_bytes().to_owned())),
            (None, Some(name)) => Some(Self::Abstract(name.to_owned())),
            (None, None) => None,
        }
    }

    /// Does a socket that is bound here serve clients of `target`? A service that is bound to every address serves any, and one at a loopback
    /// address what is meant by another one.
    #[must_use]
    pub fn serves(&self, target: &Self) -> bool {
        let ((Self::Tcp(here), Self::Tcp(target)) | (Self::Udp(here), Self::Udp(target))) = (self, target)
        else {
            return self == target;
        };
        let (ip, wanted) = (here.ip().to_canonical(), target.ip().to_canonical());
        here.port() == target.port()
            && (ip.is_unspecified() || ip == wanted || (ip.is_loopback() && wanted.is_loopback()))
    }

    /// Is it the place of a socket that was bound? An internet address without a port is none.
    #[must_use]
    pub const fn is_bound(&self) -> bool {
        match self {
            Self::Tcp(address) | Self::Udp(address) => address.port() != 0,
            Self::Path(_) | Self::Abstract(_) => true,
        }
    }
}

/// A socket that could be adopted, or that is there to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// SO_COOKIE: one number for each socket that this kernel has ever had, however many descriptors lead to it.
    pub cookie: u64,
    /// What kind.
    pub family: Family,
}

/// What is at this descriptor; `None` when it is neither a stream socket of a family that can be adopted nor UDP's.
#[must_use]
pub fn look(socket: BorrowedFd<'_>) -> Option<Seen> {
    // MPTCP (262), which Go asks for: its clients are plain TCP's then.
    const TCP_LIKE: [i32; 2] = [libc::IPPROTO_TCP, libc::IPPROTO_MPTCP];
    let number = |name| number(socket, libc::SOL_SOCKET, name).ok();
    let (domain, kind) = (number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?);
    let family = match (domain, kind) {
        (libc::AF_UNIX, libc::SOCK_STREAM) => Family::Unix,
        (libc::AF_UNIX, libc::SOCK_SEQPACKET) => Family::UnixPackets,
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM)
            if !TCP_LIKE.contains(&number(libc::SO_PROTOCOL)?) =>
        {
            return None;
        }
        // An ICMP socket for echo requests is one of datagrams too (icmp(7)).
        (_, libc::SOCK_DGRAM) if number(libc::SO_PROTOCOL)? != libc::IPPROTO_UDP => return None,
        (libc::AF_INET, libc::SOCK_STREAM) => Family::V4,
        (libc::AF_INET, libc::SOCK_DGRAM) => Family::UdpV4,
        (libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_DGRAM) => {
            let only = self::number(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY).ok()? != 0;
            match (kind == libc::SOCK_DGRAM, only) {
                (false, false) => Family::Dual,
                (false, true) => Family::V6Only,
                (true, false) => Family::UdpDual,
                (true, true) => Family::UdpV6Only,
            }
        }
        _ => return None,
    };
    Some(Seen { cookie: cookie(socket).ok()?, family })
}

/// SO_COOKIE (socket(7); of every family since Linux 4.12).
///
/// # Errors
/// ENOTSOCK.
pub fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_COOKIE: i32 = 57;
    let mut value = [0; 8];
    sys::option(socket, libc::SOL_SOCKET, SO_COOKIE, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

/// An option that is an int.
///
/// # Errors
/// getsockopt(2)'s.
pub fn number(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = [0; 4];
    sys::option(socket, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    fn tcp(text: &str) -> Place {
        Place::Tcp(text.parse().unwrap())
    }

    #[test]
    fn a_service_serves_the_addresses_that_its_socket_takes() {
        for (here, target, serves) in [
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("[::]:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "[::1]:80", true),
            ("127.0.0.2:80", "127.0.0.1:80", true),
            ("10.88.0.2:80", "10.88.0.2:80", true),
            ("[::ffff:10.88.0.2]:80", "10.88.0.2:80", true),
            ("10.88.0.2:80", "127.0.0.1:80", false),
            ("127.0.0.1:80", "10.88.0.2:80", false),
            ("0.0.0.0:81", "127.0.0.1:80", false),
        ] {
            assert_eq!(tcp(here).serves(&tcp(target)), serves, "{here} for {target}");
        }
        let path = Place::Path(b"/run/a".to_vec());
        assert!(path.serves(&path.clone()));
        assert!(!path.serves(&Place::Abstract(b"/run/a".to_vec())) && !path.serves(&tcp("0.0.0.0:80")));
        let udp = |text: &str| Place::Udp(text.parse().unwrap());
        assert!(udp("0.0.0.0:53").serves(&udp("127.0.0.1:53")));
        assert!(
            !udp("0.0.0.0:53").serves(&tcp("127.0.0.1:53")) && !tcp("0.0.0.0:53").serves(&udp("0.0.0.0:53"))
        );
    }

    #[test]
    fn duplicates_are_one_socket_and_others_are_not() {
        let one = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let two = std::net::TcpListener::bind("[::]:0").unwrap();
        let seen = look(one.as_fd()).unwrap();
        assert_eq!(look(one.try_clone().unwrap().as_fd()), Some(seen));
        assert_eq!((seen.family, look(two.as_fd()).unwrap().family), (Family::V4, Family::Dual));
        assert_ne!(look(two.as_fd()).unwrap().cookie, seen.cookie);
    }

    #[test]
    fn datagrams_are_their_own_kind_and_files_and_pipes_are_none() {
        let datagrams = |address: &str| std::net::UdpSocket::bind(address).unwrap();
        for (address, family) in [("127.0.0.1:0", Family::UdpV4), ("[::]:0", Family::UdpDual)] {
            let socket = datagrams(address);
            assert_eq!(look(socket.as_fd()).map(|seen| seen.family), Some(family));
            assert_eq!(Place::of(socket.as_fd()), Some(Place::Udp(socket.local_addr().unwrap())));
        }
        let file = std::fs::File::open("/dev/null").unwrap();
        let unix = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert_eq!((look(unix.as_fd()), look(file.as_fd())), (None, None));
    }
}
