//! Where clients connect: sockets that systemd makes, of every kind that it passes (systemd.socket(5)).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use bro_relay::listener::SocketKind;
use bro_relay::target::{self, Target};

use super::{InvalidAddress, Ports, plain};

/// In front of a unix path or name whose socket is no stream.
const KINDS: [(&str, SocketKind); 2] =
    [("seqpacket:", SocketKind::SeqPacket), ("dgram:", SocketKind::UnixDatagram)];

/// As systemd begins it too.
const VSOCK: &str = "vsock:";

/// Where clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum External {
    /// Every address, IPv4 and IPv6.
    Ports(Ports),
    /// One address.
    At(IpAddr, Ports),
    /// A virtual machine's address, or every one, and a port (vsock(7)).
    Vsock {
        /// None is VMADDR_CID_ANY.
        cid: Option<u32>,
        /// The port.
        port: u32,
    },
    /// A unix socket.
    Path(SocketKind, PathBuf),
    /// A unix socket's abstract name, without the `@`.
    Abstract(SocketKind, String),
}

/// One socket of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalSocket {
    /// How clients come to it.
    pub kind: SocketKind,
    /// Where it is.
    pub place: SocketPlace,
}

impl ExternalSocket {
    /// Is it one of this kind at a port of TCP or UDP?
    #[must_use]
    pub fn is_at(&self, kind: SocketKind, port: u16) -> bool {
        self.kind == kind && self.place.port() == Some(port)
    }
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketPlace {
    /// At a port of every address, IPv4 and IPv6.
    Port(u16),
    /// At one address.
    Address(SocketAddr),
    /// As [`External::Vsock`].
    Vsock(Option<u32>, u32),
    /// In the file system.
    Path(PathBuf),
    /// At an abstract name, without the `@`.
    Abstract(String),
}

impl SocketPlace {
    /// The port of TCP or UDP.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        match self {
            Self::Port(port) => Some(*port),
            Self::Address(address) => Some(address.port()),
            Self::Vsock(..) | Self::Path(_) | Self::Abstract(_) => None,
        }
    }
}

impl External {
    /// Its ports, of TCP and UDP.
    #[must_use]
    pub const fn ports(&self) -> Option<Ports> {
        match self {
            Self::Ports(ports) | Self::At(_, ports) => Some(*ports),
            Self::Vsock { .. } | Self::Path(..) | Self::Abstract(..) => None,
        }
    }

    /// The address, where it is a particular one of TCP or UDP.
    #[must_use]
    pub const fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::At(ip, _) => Some(*ip),
            Self::Ports(_) | Self::Vsock { .. } | Self::Path(..) | Self::Abstract(..) => None,
        }
    }

    /// Its sockets, by port, the stream of a port before its datagrams.
    pub fn sockets(&self) -> impl Iterator<Item = ExternalSocket> + '_ {
        let single = match self {
            Self::Ports(_) | Self::At(..) => None,
            Self::Vsock { cid, port } => Some((SocketKind::Vsock, SocketPlace::Vsock(*cid, *port))),
            Self::Path(kind, path) => Some((*kind, SocketPlace::Path(path.clone()))),
            Self::Abstract(kind, name) => Some((*kind, SocketPlace::Abstract(name.clone()))),
        };
        let each = self.ports().into_iter().flat_map(move |ports| {
            let place = move |port| match self.ip() {
                Some(ip) => SocketPlace::Address(SocketAddr::new(ip, port)),
                None => SocketPlace::Port(port),
            };
            let kinds = ports.protocol.kinds();
            ports.all().flat_map(move |port| kinds.iter().map(move |kind| (*kind, place(port))))
        });
        single.into_iter().chain(each).map(|(kind, place)| ExternalSocket { kind, place })
    }

    /// Are there sockets that listen over TCP?
    #[must_use]
    pub fn is_tcp(&self) -> bool {
        self.ports().is_some_and(|ports| ports.protocol.kinds().contains(&SocketKind::Stream))
    }

    /// Are there sockets for datagrams of UDP?
    #[must_use]
    pub fn is_udp(&self) -> bool {
        self.ports().is_some_and(|ports| ports.protocol.kinds().contains(&SocketKind::Datagram))
    }

    /// An address at which a client on this host reaches the first of its ports.
    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        let port = self.ports()?.first;
        let ip = match self.ip() {
            None => Ipv4Addr::LOCALHOST.into(),
            Some(IpAddr::V4(ip)) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            Some(IpAddr::V6(ip)) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            Some(ip) => ip,
        };
        Some(SocketAddr::new(ip, port))
    }
}

impl fmt::Display for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ports(ports) => write!(f, "{ports}"),
            Self::At(IpAddr::V4(ip), ports) => write!(f, "{ip}:{ports}"),
            Self::At(IpAddr::V6(ip), ports) => write!(f, "[{ip}]:{ports}"),
            Self::Vsock { .. } | Self::Path(..) | Self::Abstract(..) => {
                self.sockets().try_for_each(|socket| write!(f, "{socket}"))
            }
        }
    }
}

/// Its kind as [`External`] has it, and its place.
impl fmt::Display for ExternalSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            SocketPlace::Port(_) | SocketPlace::Address(_) => {
                let protocol = if self.kind == SocketKind::Datagram { "/udp" } else { "" };
                write!(f, "{}{protocol}", self.place)
            }
            SocketPlace::Vsock(..) => write!(f, "{}", self.place),
            SocketPlace::Path(_) | SocketPlace::Abstract(_) => {
                let prefix = KINDS.iter().find(|(_, kind)| *kind == self.kind);
                write!(f, "{}{}", prefix.map_or("", |(prefix, _)| prefix), self.place)
            }
        }
    }
}

/// As ListenStream= and its like take it.
impl fmt::Display for SocketPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "{port}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Vsock(None, port) => write!(f, "{VSOCK}:{port}"),
            Self::Vsock(Some(cid), port) => write!(f, "{VSOCK}{cid}:{port}"),
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Abstract(name) => write!(f, "@{name}"),
        }
    }
}

impl FromStr for External {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        if text.starts_with(['/', '@']) {
            return unix(SocketKind::Stream, text);
        }
        for (prefix, kind) in KINDS {
            if let Some(rest) = text.strip_prefix(prefix) {
                return unix(kind, rest);
            }
        }
        if let Some(rest) = text.strip_prefix(VSOCK) {
            return vsock(rest).ok_or_else(|| InvalidAddress::Vsock(text.to_owned()));
        }
        if text.parse::<IpAddr>().is_ok() {
            return Err(InvalidAddress::NoPort(text.to_owned()));
        }
        if let Some((external, internal)) = published(text) {
            return Err(InvalidAddress::Published { text: text.to_owned(), external, internal });
        }
        let (host, ports) = Ports::split(text)?;
        let Some((host, ports)) = host.zip(ports) else {
            return match ports {
                Some(ports) => Ok(Self::Ports(ports)),
                None => Err(InvalidAddress::NoPort(text.to_owned())),
            };
        };
        let ip = host.parse::<IpAddr>().map_err(|_| InvalidAddress::NotAnIp(host))?;
        Ok(Self::At(ip, ports))
    }
}

/// A path or an abstract name.
fn unix(kind: SocketKind, text: &str) -> Result<External, InvalidAddress> {
    if !text.starts_with(['/', '@']) {
        return Err(InvalidAddress::NotUnix(text.to_owned()));
    }
    plain(text)?;
    Ok(match text.parse::<Target>()? {
        Target::Abstract(name) => External::Abstract(kind, name),
        _ => {
            let mut parts = text.split('/').skip(1);
            if parts.any(|part| matches!(part, "" | "." | "..")) {
                return Err(InvalidAddress::Path(text.to_owned()));
            }
            External::Path(kind, text.into())
        }
    })
}

/// `CID:PORT` or `:PORT`.
fn vsock(text: &str) -> Option<External> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u32>().ok().filter(|number| digits && *number != u32::MAX)
    };
    let (cid, port) = text.split_once(':')?;
    let cid = if cid.is_empty() { None } else { Some(number(cid)?) };
    Some(External::Vsock { cid, port: number(port)? })
}

/// `[IP:]HOST:CONTAINER[/PROTOCOL]`, as Podman and Docker write a published port: the port that clients connect to, and the container's.
fn published(text: &str) -> Option<(String, String)> {
    let (both, protocol) = text.rsplit_once('/').map_or((text, None), |(both, word)| (both, Some(word)));
    let (external, internal) = both.rsplit_once(':')?;
    let ports = [external.rsplit_once(':').map_or(external, |(_, port)| port), internal];
    let are_ports = |text: &&str| text.split('-').all(|port| target::port(port).is_ok());
    let ip = external
        .rsplit_once(':')
        .is_none_or(|(ip, _)| ip.parse::<Ipv4Addr>().is_ok() || ip.starts_with('[') && ip.ends_with(']'));
    let protocol = protocol.map(|word| format!("/{word}")).unwrap_or_default();
    (ip && ports.iter().all(are_ports)).then(|| (format!("{external}{protocol}"), internal.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::PortProtocol;

    fn ports(first: u16, last: u16, protocol: PortProtocol) -> Ports {
        Ports { first, last, protocol }
    }

    #[test]
    fn reads_every_kind_of_socket() {
        let read = |text: &str| text.parse::<External>().unwrap();
        assert_eq!(read("53/udp"), External::Ports(ports(53, 53, PortProtocol::Udp)));
        assert_eq!(read("443/udp+tcp"), External::Ports(ports(443, 443, PortProtocol::Both)));
        assert_eq!(read("443/tcp+udp").to_string(), "443/tcp+udp");
        assert_eq!(read("80/tcp").to_string(), "80");
        assert_eq!(
            read("[::1]:8000-8003/udp"),
            External::At(Ipv6Addr::LOCALHOST.into(), ports(8000, 8003, PortProtocol::Udp))
        );
        assert_eq!(read("127.0.0.1:80-80").to_string(), "127.0.0.1:80");
        assert_eq!(read("vsock::5000"), External::Vsock { cid: None, port: 5000 });
        assert_eq!(read("vsock:2:70000").to_string(), "vsock:2:70000");
        assert_eq!(
            read("seqpacket:/run/x.sock"),
            External::Path(SocketKind::SeqPacket, "/run/x.sock".into())
        );
        assert_eq!(read("dgram:@x"), External::Abstract(SocketKind::UnixDatagram, "x".into()));
        assert_eq!(read("/run/x.sock/udp"), External::Path(SocketKind::Stream, "/run/x.sock/udp".into()));
    }

    #[test]
    fn each_socket_is_there_once_and_in_order() {
        let sockets = |text: &str| -> Vec<String> {
            text.parse::<External>().unwrap().sockets().map(|socket| socket.to_string()).collect()
        };
        assert_eq!(sockets("8000-8001/tcp+udp"), ["8000", "8000/udp", "8001", "8001/udp"]);
        assert_eq!(sockets("[::1]:53/udp"), ["[::1]:53/udp"]);
        assert_eq!(sockets("vsock::7"), ["vsock::7"]);
        assert_eq!(sockets("dgram:/run/x"), ["dgram:/run/x"]);
        assert_eq!(sockets("1-256").len(), 256);
    }

    #[test]
    fn refuses_each_kind_with_its_reason() {
        let refused = |text: &str| text.parse::<External>().unwrap_err().to_string();
        assert!(refused("53/sctp").contains("neither /tcp, /udp nor /tcp+udp"));
        assert!(refused("53/").contains("neither /tcp, /udp nor /tcp+udp"));
        assert!(refused("0/udp").contains("not a port"));
        assert!(refused("90-80").contains("no range of ports"));
        assert!(refused("1000-1256").contains("257 ports"));
        assert!(refused("127.0.0.1:8000-70000").contains("not a port"));
        assert!(refused("8000:80/udp").contains("--external-port 8000/udp --internal-port 80"));
        assert!(refused("8000-8003:80-83").contains("--external-port 8000-8003 --internal-port 80-83"));
        for text in ["vsock:", "vsock:5000", "vsock:x:5", "vsock::4294967295", "vsock::"] {
            assert!(refused(text).contains("vsock:CID:PORT"), "{text}");
        }
        assert!(refused("seqpacket:x.sock").contains("neither a path"));
        assert!(refused("dgram:80").contains("neither a path"));
        assert!(refused("dgram:/run/../x").contains("no path at which systemd listens"));
    }

    #[test]
    fn ports_are_the_same_only_of_one_protocol() {
        let overlap = |one: &str, other: &str| {
            let ports = |text: &str| text.parse::<External>().unwrap().ports().unwrap();
            ports(one).overlap(ports(other))
        };
        assert!(overlap("80-90", "90") && overlap("53/tcp+udp", "53/udp") && overlap("53", "53/tcp+udp"));
        assert!(!overlap("80-90", "91") && !overlap("53", "53/udp"));
    }
}
