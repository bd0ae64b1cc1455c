//! Ports of TCP, UDP or both: one, or a range.

use std::fmt;

use bro_relay::listener::SocketKind;
use bro_relay::target::{self, Target};

use super::InvalidAddress;

/// The most ports of one range: each is a descriptor of the forwarder's, and two where TCP and UDP are meant.
pub const MOST: u16 = 256;

/// What clients of a port speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortProtocol {
    /// They connect.
    Tcp,
    /// They send datagrams.
    Udp,
    /// The one or the other, as over HTTP/3.
    Both,
}

/// After a port, as Podman writes the first two.
const SUFFIXES: [(&str, PortProtocol); 4] = [
    ("udp", PortProtocol::Udp),
    ("tcp+udp", PortProtocol::Both),
    ("udp+tcp", PortProtocol::Both),
    ("tcp", PortProtocol::Tcp),
];

impl PortProtocol {
    /// The kinds of sockets.
    #[must_use]
    pub const fn kinds(self) -> &'static [SocketKind] {
        match self {
            Self::Tcp => &[SocketKind::Stream],
            Self::Udp => &[SocketKind::Datagram],
            Self::Both => &[SocketKind::Stream, SocketKind::Datagram],
        }
    }

    /// What stands after the port: nothing for TCP.
    #[must_use]
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Tcp => "",
            Self::Udp => "/udp",
            Self::Both => "/tcp+udp",
        }
    }

    /// Takes it from the end of a text; `None` where none is said.
    ///
    /// # Errors
    /// When it is another one.
    pub fn split(text: &str) -> Result<(&str, Option<Self>), InvalidAddress> {
        let Some((rest, word)) = text.rsplit_once('/') else { return Ok((text, None)) };
        match SUFFIXES.iter().find(|(suffix, _)| *suffix == word) {
            Some((_, protocol)) => Ok((rest, Some(*protocol))),
            None => Err(InvalidAddress::Protocol(text.to_owned())),
        }
    }
}

/// One port, or as many as lie between two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// The first.
    pub first: u16,
    /// The last, which is not below the first.
    pub last: u16,
    /// What clients speak there.
    pub protocol: PortProtocol,
}

impl Ports {
    /// How many, less one.
    #[must_use]
    pub const fn beyond_first(self) -> u16 {
        self.last - self.first
    }

    /// Each port.
    pub fn all(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }

    /// Is there a port of both, with a protocol of both?
    #[must_use]
    pub fn overlap(self, other: Self) -> bool {
        let speak = self.protocol.kinds().iter().any(|kind| other.protocol.kinds().contains(kind));
        speak && self.first <= other.last && other.first <= self.last
    }

    /// Takes `[HOST:]PORT[-PORT][/PROTOCOL]` apart: the host, if one is said, and the ports, unless there is only a host.
    pub(super) fn split(text: &str) -> Result<(Option<String>, Option<Self>), InvalidAddress> {
        let (rest, protocol) = PortProtocol::split(text)?;
        let protocol = protocol.unwrap_or(PortProtocol::Tcp);
        let (single, last) = of_range(rest);
        let first_and = |first: u16| -> Result<Self, InvalidAddress> {
            let last = match last {
                Some(last) => target::port(last)?,
                None => first,
            };
            if last < first {
                return Err(InvalidAddress::Range(text.to_owned()));
            }
            if last - first >= MOST {
                let count = u32::from(last - first) + 1;
                return Err(InvalidAddress::LongRange { text: text.to_owned(), count });
            }
            Ok(Self { first, last, protocol })
        };
        if !single.is_empty() && single.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok((None, Some(first_and(target::port(single)?)?)));
        }
        let Target::Tcp { host, port } = single.parse::<Target>()? else {
            return Err(target::InvalidTarget::Host(text.to_owned()).into());
        };
        let ports = if single.ends_with(&format!(":{port}")) { Some(first_and(port)?) } else { None };
        Ok((Some(host), ports))
    }
}

/// A text that ends in `FIRST-LAST` is the text that ends in `FIRST`, and `LAST`.
fn of_range(text: &str) -> (&str, Option<&str>) {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.rsplit_once('-') {
        Some((rest, last))
            if number(last) && number(rest.rsplit_once(':').map_or(rest, |(_, first)| first)) =>
        {
            (rest, Some(last))
        }
        _ => (text, None),
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last > self.first {
            write!(f, "-{}", self.last)?;
        }
        write!(f, "{}", self.protocol.suffix())
    }
}
