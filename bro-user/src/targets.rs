//! Where a service listens for the sockets of one name: at one target for all of them, or each at the next port of a range.

use std::fmt;
use std::str::FromStr;

use bro_relay::listener::SocketKind;
use bro_relay::target::{self, InvalidTarget, Target};

/// One target, or as many as there are ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetRange {
    first: Target,
    /// How many ports lie beyond the first one's; none of a unix socket.
    beyond: u16,
}

impl TargetRange {
    /// The one target of all sockets.
    #[must_use]
    pub const fn one(target: Target) -> Self {
        Self { first: target, beyond: 0 }
    }

    /// The target of the lowest port, and as many `beyond` it; `None` where there are no more ports, or it is a unix socket and there is no port.
    #[must_use]
    pub fn range(first: Target, beyond: u16) -> Option<Self> {
        let fits = match &first {
            Target::Tcp { port, .. } | Target::Udp { port, .. } => port.checked_add(beyond).is_some(),
            Target::Unix(_) | Target::Abstract(_) | Target::Datagrams(_) => beyond == 0,
        };
        fits.then_some(Self { first, beyond })
    }

    /// The first, or only one.
    #[must_use]
    pub const fn first(&self) -> &Target {
        &self.first
    }

    /// How many ports there are, if there is a range of them.
    #[must_use]
    pub fn ports(&self) -> Option<usize> {
        (self.beyond > 0).then(|| usize::from(self.beyond) + 1)
    }

    /// The target of the socket that has the lowest port but `number`. Without a range it is the same for all.
    #[must_use]
    pub fn nth(&self, number: u16) -> Target {
        let at = |port: u16| port.saturating_add(number.min(self.beyond));
        match &self.first {
            Target::Tcp { host, port } => Target::Tcp { host: host.clone(), port: at(*port) },
            Target::Udp { host, port } => Target::Udp { host: host.clone(), port: at(*port) },
            unix => unix.clone(),
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = Target> + '_ {
        (0..=self.beyond).map(|number| self.nth(number))
    }
}

/// The target as a kind of socket makes it: the same HOST:PORT means TCP for a socket of streams, and UDP for one of datagrams.
#[must_use]
pub fn of_kind(kind: SocketKind, target: Target) -> Target {
    match (kind, target) {
        (SocketKind::Datagram, Target::Tcp { host, port }) => Target::Udp { host, port },
        (SocketKind::UnixDatagram, unix @ (Target::Unix(_) | Target::Abstract(_))) => {
            Target::Datagrams(Box::new(unix))
        }
        (_, target) => target,
    }
}

impl fmt::Display for TargetRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let written = self.first.to_string();
        match (&self.first, self.beyond) {
            (Target::Tcp { port, .. } | Target::Udp { port, .. }, 1..) => {
                let (ports, protocol) = written.split_once('/').unwrap_or((&written, ""));
                let slash = if protocol.is_empty() { "" } else { "/" };
                write!(f, "{ports}-{}{slash}{protocol}", port + self.beyond)
            }
            _ => f.write_str(&written),
        }
    }
}

impl FromStr for TargetRange {
    type Err = InvalidTarget;

    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        if text.starts_with(['/', '@']) {
            return Ok(Self::one(text.parse()?));
        }
        let (ports, protocol) =
            text.split_once('/').map_or((text, None), |(ports, word)| (ports, Some(word)));
        let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let range = ports.rsplit_once('-').filter(|(rest, last)| {
            number(last) && number(rest.rsplit_once(':').map_or(*rest, |(_, first)| first))
        });
        let Some((single, last)) = range else { return Ok(Self::one(text.parse()?)) };
        let first: Target = match protocol {
            Some(protocol) => format!("{single}/{protocol}").parse()?,
            None => single.parse()?,
        };
        let last = target::port(last)?;
        let beyond = match &first {
            Target::Tcp { port, .. } | Target::Udp { port, .. } => last.checked_sub(*port),
            Target::Unix(_) | Target::Abstract(_) | Target::Datagrams(_) => None,
        };
        beyond.map(|beyond| Self { first, beyond }).ok_or_else(|| InvalidTarget::Host(text.to_owned()))
    }
}

/// `--target NAME=ADDR`.
///
/// # Errors
/// When there is no name, or ADDR is not a target.
pub fn parse_named(text: &str) -> Result<(String, TargetRange), InvalidTarget> {
    match text.split_once('=') {
        Some((name, address)) if !name.is_empty() => Ok((name.to_owned(), address.parse()?)),
        _ => Err(InvalidTarget::NoName(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_is_as_many_targets() {
        let targets: TargetRange = "10.0.0.2:30000-30002/udp".parse().unwrap();
        let all: Vec<String> = targets.all().map(|target| target.to_string()).collect();
        assert_eq!(all, ["10.0.0.2:30000/udp", "10.0.0.2:30001/udp", "10.0.0.2:30002/udp"]);
        assert_eq!((targets.ports(), targets.nth(9)), (Some(3), targets.nth(2)));
        assert_eq!("80-81".parse::<TargetRange>().unwrap().to_string(), "127.0.0.1:80-81");
        assert_eq!("[::1]:80-80".parse::<TargetRange>().unwrap().to_string(), "[::1]:80");
        assert_eq!("my-host:80".parse(), Ok(TargetRange::one("my-host:80".parse().unwrap())));
        assert_eq!("/run/1-2".parse(), Ok(TargetRange::one("/run/1-2".parse().unwrap())));
        assert!("x:81-80".parse::<TargetRange>().is_err() && "x:80-70000".parse::<TargetRange>().is_err());
        assert_eq!(TargetRange::range("x:65535".parse().unwrap(), 1), None);
        assert_eq!(TargetRange::range("/run/x".parse().unwrap(), 1), None);
        assert!(matches!(parse_named("127.0.0.1:80"), Err(InvalidTarget::NoName(_))));
    }

    proptest! {
        #[test]
        fn never_panics_and_prints_what_it_reads(text in "\\PC{0,40}") {
            if let Ok(targets) = text.parse::<TargetRange>() {
                prop_assert_eq!(targets.to_string().parse::<TargetRange>(), Ok(targets));
            }
        }
    }
}
