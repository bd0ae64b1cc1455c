//! The address from which the service sees a client come: the client's own wherever that can be had, and never one to which a
//! service grants more than to a stranger.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::libc::VMADDR_CID_LOCAL;
use nix::sys::socket::{SockaddrIn, SockaddrIn6, bind};
use serde::{Deserialize, Serialize};

use crate::peer::Peer;

/// Where clients on this host's loopback interface, or on a unix socket, come from: what Podman (5.3 and newer) calls
/// host.containers.internal under pasta.
pub const THIS_HOST_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);

/// The same for a service on IPv6; of fd00::/8, which no network but this one knows by that name (“bro” in ASCII).
pub const THIS_HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x726f, 0, 0, 0, 0, 0, 2);

/// The index of the loopback interface, in every network namespace.
const LOOPBACK: u32 = 1;

/// The address under which the service is to see a client, before it is known which family the service speaks. The client's own, or
/// what a balancer that may vouch for it has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A host.
    Address(SocketAddr),
    /// This host: a client on its loopback interface, with that port, or over a unix socket.
    ThisHost(u16),
    /// Another machine, by its context identifier (vsock(7)): it has no address that the service could read.
    Machine(u32),
}

impl Origin {
    /// Where a client's connection comes from.
    #[must_use]
    pub fn of(peer: &Peer) -> Self {
        match peer {
            Peer::Tcp(address) => Self::at(*address),
            Peer::Unix { .. } | Peer::Vsock { cid: VMADDR_CID_LOCAL, .. } => Self::ThisHost(0),
            Peer::Vsock { cid, .. } => Self::Machine(*cid),
        }
    }

    /// Where a client with this address comes from.
    #[must_use]
    pub fn at(address: SocketAddr) -> Self {
        let ip = address.ip().to_canonical();
        if ip.is_loopback() {
            return Self::ThisHost(address.port());
        }
        Self::Address(SocketAddr::new(ip, address.port()))
    }

    /// The address for a service that speaks IPv4, or IPv6; `taken` are the service's own.
    fn seen(self, ipv4: bool, taken: &[IpAddr]) -> SocketAddr {
        let address = match self {
            Self::ThisHost(port) if ipv4 => return SocketAddr::new(THIS_HOST_V4.into(), port),
            Self::ThisHost(port) => return SocketAddr::new(THIS_HOST_V6.into(), port),
            Self::Machine(cid) if ipv4 => {
                return SocketAddr::new(v4_of(fold(&cid.to_be_bytes())).into(), 0);
            }
            Self::Machine(cid) => return SocketAddr::new(v6_of(fold(&cid.to_be_bytes())).into(), 0),
            Self::Address(address) => address,
        };
        let port = address.port();
        let free = |ip: IpAddr| !taken.contains(&ip);
        match address.ip() {
            IpAddr::V4(ip) if ipv4 && fits_v4(ip) && free(ip.into()) => SocketAddr::new(ip.into(), port),
            // RFC 6052: what a translator between the two would make of it.
            IpAddr::V4(ip) if !ipv4 && fits_v4(ip) && free(translated(ip).into()) => {
                SocketAddr::new(translated(ip).into(), port)
            }
            IpAddr::V6(ip) if !ipv4 && fits_v6(ip) && free(ip.into()) => {
                // The interface is this host's; inside there is one.
                let scope = if ip.is_unicast_link_local() { LOOPBACK } else { 0 };
                SocketAddrV6::new(ip, port, 0, scope).into()
            }
            ip if ipv4 => SocketAddr::new(stand_in_v4(ip).into(), port),
            ip => SocketAddr::new(stand_in_v6(ip).into(), port),
        }
    }
}

/// An address that a client may have, and that is nothing else here.
fn fits_v4(ip: Ipv4Addr) -> bool {
    let first = ip.octets()[0];
    // Neither “this network”, nor multicast, nor among the stand-ins.
    !ip.is_loopback() && first != 0 && first < 224 && ip != THIS_HOST_V4
}

fn fits_v6(ip: Ipv6Addr) -> bool {
    let ours = ip.segments()[..2] == THIS_HOST_V6.segments()[..2];
    !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast() && !ours
}

/// `64:ff9b::` and the IPv4 address.
fn translated(ip: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = ip.octets();
    let [high, low] = [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])];
    Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low)
}

/// In 240.0.0.0/4, which is no host's: one for each IPv6 network (its first 64 bits), as far as 28 bits can tell networks apart,
/// and the same each time.
fn stand_in_v4(ip: IpAddr) -> Ipv4Addr {
    v4_of(digest(ip))
}

fn v4_of(sum: u64) -> Ipv4Addr {
    let last = u32::try_from((sum ^ (sum >> 32)) & 0x0fff_ffff).unwrap_or(0);
    // Not the broadcast address.
    Ipv4Addr::from((0xf000_0000 | last).min(u32::MAX - 1))
}

/// In the same network as [`THIS_HOST_V6`].
fn stand_in_v6(ip: IpAddr) -> Ipv6Addr {
    v6_of(digest(ip))
}

fn v6_of(sum: u64) -> Ipv6Addr {
    let sum = sum.to_be_bytes();
    let pair = |at: usize| u16::from_be_bytes([sum[at], sum[at + 1]]);
    let [first, second, ..] = THIS_HOST_V6.segments();
    Ipv6Addr::new(first, second, 1, 0, pair(0), pair(2), pair(4), pair(6))
}

/// FNV-1a of what names a client: all of an IPv4 address, and of an IPv6 address what its owner does not choose.
fn digest(ip: IpAddr) -> u64 {
    match ip {
        IpAddr::V4(ip) => fold(&ip.octets()),
        // All link-local addresses have the same 64 bits.
        IpAddr::V6(ip) if ip.is_unicast_link_local() => fold(&ip.octets()),
        IpAddr::V6(ip) => fold(&ip.octets()[..8]),
    }
}

fn fold(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// From which addresses a target's connections are made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sources {
    /// As the kernel chooses: to a loopback address from a loopback address.
    #[default]
    Kernel,
    /// To a loopback address from the container's own address on its network.
    Container {
        /// For a service on IPv4.
        v4: Option<Ipv4Addr>,
        /// For a service on IPv6.
        v6: Option<Ipv6Addr>,
    },
    /// From each client's own.
    Client {
        /// Addresses of the namespace's own, which are no client's.
        taken: Vec<IpAddr>,
    },
}

/// Binds a socket towards the service, to another port where that one is taken inside or not the forwarder's to take (ports below
/// 1024).
///
/// # Errors
/// bind's.
pub fn bind_to(socket: BorrowedFd<'_>, source: SocketAddr) -> nix::Result<()> {
    // By its family's own length: the relay process's sandbox lets no other pass.
    let bind = |source: SocketAddr| match source {
        SocketAddr::V4(source) => bind(socket.as_raw_fd(), &SockaddrIn::from(source)),
        SocketAddr::V6(source) => bind(socket.as_raw_fd(), &SockaddrIn6::from(source)),
    };
    match bind(source) {
        Err(Errno::EADDRINUSE | Errno::EACCES) if source.port() != 0 => bind(any_port(source)),
        bound => bound,
    }
}

/// The same address with a port of the kernel's choice.
#[must_use]
pub fn any_port(mut source: SocketAddr) -> SocketAddr {
    source.set_port(0);
    source
}

/// What a socket towards the service has to allow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Binding {
    /// Nothing: it is not bound.
    #[default]
    Unbound,
    /// To be bound to an address of the namespace.
    Own,
    /// To be bound to any address (ip(7) IP_TRANSPARENT).
    Any,
}

impl Sources {
    /// The address to bind a connection to `target` to, for this client; `None` leaves it to the kernel.
    #[must_use]
    pub fn of(&self, origin: Origin, target: SocketAddr) -> Option<SocketAddr> {
        match self {
            Self::Kernel => None,
            Self::Container { .. } if !target.ip().is_loopback() => None,
            Self::Container { v4, .. } if target.is_ipv4() => v4.map(|ip| SocketAddr::new(ip.into(), 0)),
            Self::Container { v6, .. } => v6.map(|ip| SocketAddr::new(ip.into(), 0)),
            Self::Client { taken } => Some(origin.seen(target.is_ipv4(), taken)),
        }
    }

    /// What its sockets have to allow.
    #[must_use]
    pub const fn binding(&self) -> Binding {
        match self {
            Self::Kernel => Binding::Unbound,
            Self::Container { .. } => Binding::Own,
            Self::Client { .. } => Binding::Any,
        }
    }
}

impl std::fmt::Display for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kernel => f.write_str("as local ones"),
            Self::Container { v4, v6 } => {
                f.write_str("by the container's own address")?;
                let own = [v4.map(IpAddr::from), v6.map(IpAddr::from)];
                let own: Vec<String> = own.iter().flatten().map(IpAddr::to_string).collect();
                write!(f, ", {}", own.join(" or "))
            }
            Self::Client { .. } => f.write_str("by their own addresses"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(client: &str, ipv4: bool) -> String {
        let client: SocketAddr = client.parse().unwrap();
        Origin::at(client).seen(ipv4, &["10.9.9.9".parse().unwrap()]).to_string()
    }

    #[test]
    fn a_client_keeps_its_address() {
        assert_eq!(seen("203.0.113.5:40000", true), "203.0.113.5:40000");
        assert_eq!(seen("[::ffff:203.0.113.5]:40000", true), "203.0.113.5:40000");
        assert_eq!(seen("[2001:db8::5]:40000", false), "[2001:db8::5]:40000");
        assert_eq!(seen("[fe80::1%7]:40000", false), "[fe80::1%1]:40000");
    }

    #[test]
    fn this_host_is_no_loopback() {
        assert_eq!(seen("127.0.0.1:40000", true), "169.254.1.2:40000");
        assert_eq!(seen("127.9.9.9:40000", false), "[fd62:726f::2]:40000");
        assert_eq!(seen("[::1]:40000", false), "[fd62:726f::2]:40000");
        assert_eq!(seen("[::ffff:127.0.0.1]:40000", true), "169.254.1.2:40000");
        assert_eq!(Origin::of(&Peer::Unix { uid: 0, pid: 1 }).seen(true, &[]).to_string(), "169.254.1.2:0");
    }

    #[test]
    fn the_other_family_has_an_address_of_its_own() {
        assert_eq!(seen("203.0.113.5:40000", false), "[64:ff9b::cb00:7105]:40000");
        let (one, other) = (seen("[2001:db8::5]:1", true), seen("[2001:db8:0:1::5]:1", true));
        assert!(one.starts_with("24") || one.starts_with("25"), "{one}");
        assert_ne!(one, other);
        assert_eq!(one, seen("[2001:db8::6]:1", true), "of the same network");
        assert_ne!(seen("[fe80::1]:1", true), seen("[fe80::2]:1", true));
    }

    #[test]
    fn each_machine_has_an_address_of_its_own() {
        let seen = |cid, ipv4| Origin::of(&Peer::Vsock { cid, port: 70_000 }).seen(ipv4, &[]).to_string();
        assert_eq!((seen(1, true), seen(1, false)), ("169.254.1.2:0".into(), "[fd62:726f::2]:0".into()));
        for ipv4 in [true, false] {
            let all = [2, 3, 4, 1000, u32::MAX - 1].map(|cid| seen(cid, ipv4));
            for (index, one) in all.iter().enumerate() {
                let start = if ipv4 { ["24", "25"] } else { ["[fd62:726f:1:", "[fd62:726f:1:"] };
                assert!(start.iter().any(|start| one.starts_with(start)), "{one}");
                assert!(all[..index].iter().all(|other| other != one), "{one} twice");
            }
        }
    }

    #[test]
    fn no_client_passes_for_another() {
        // The namespace itself, this host, nonsense, and what stands for others.
        for client in
            ["10.9.9.9:1", "169.254.1.2:1", "0.0.0.0:1", "224.0.0.1:1", "255.255.255.255:1", "240.0.0.1:1"]
        {
            let seen = seen(client, true);
            assert!(
                !seen.starts_with(client.trim_end_matches(":1")) && !seen.starts_with("169.254."),
                "{seen}"
            );
        }
        for client in ["[fd62:726f::2]:1", "[::]:1", "[ff02::1]:1"] {
            assert!(seen(client, false).starts_with("[fd62:726f:1:"), "{}", seen(client, false));
        }
    }

    proptest! {
        #[test]
        fn no_client_is_ever_seen_as_local(client: SocketAddr, target: SocketAddr, taken: Vec<IpAddr>) {
            let sources = Sources::Client { taken: taken.clone() };
            let seen = sources.of(Origin::at(client), target).unwrap();
            prop_assert_eq!(seen.is_ipv4(), target.is_ipv4());
            prop_assert_eq!(seen.port(), client.port());
            let ip = seen.ip();
            prop_assert!(!ip.to_canonical().is_loopback() && !ip.is_unspecified() && !ip.is_multicast(), "{}", ip);
            prop_assert!(!taken.contains(&client.ip()) || ip != client.ip());
            prop_assert_ne!(ip, IpAddr::from(Ipv4Addr::BROADCAST));
        }
    }
}
