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
        if let Some(v4) = name.as_sockaddr_in() {
            return Some(Self::Tcp(SocketAddr::V4((*v4).into())));
        }
        if let Some(v6) = name.as_sockaddr_in6() {
            return Some(Self::Tcp(SocketAddr::V6((*v6).into())));
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
        let (Self::Tcp(here), Self::Tcp(target)) = (self, target) else { return self == target };
        let (ip, wanted) = (here.ip().to_canonical(), target.ip().to_canonical());
        here.port() == target.port()
            && (ip.is_unspecified() || ip == wanted || (ip.is_loopback() && wanted.is_loopback()))
    }
}

/// A stream socket that could be adopted, or that is there to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// SO_COOKIE: one number for each socket that this kernel has ever had, however many descriptors lead to it.
    pub cookie: u64,
    /// What kind.
    pub family: Family,
}

/// What is at this descriptor; `None` when it is no stream socket of a family that can be adopted.
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
        (libc::AF_INET, libc::SOCK_STREAM) => Family::V4,
        (libc::AF_INET6, libc::SOCK_STREAM) => {
            let only = self::number(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY).ok()?;
            if only == 0 { Family::Dual } else { Family::V6Only }
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
    fn datagrams_and_files_are_none() {
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!((look(datagrams.as_fd()), look(file.as_fd())), (None, None));
    }
}
