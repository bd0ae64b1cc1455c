//! Where a service listens, as the command line says it: `HOST:PORT`, `PORT`, a bare host, a unix path or an `@abstract` name.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A target as written, before any name is looked up.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A host name or address, and a TCP port.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address without its brackets.
        host: String,
        /// The port, 1 to 65535.
        port: u16,
    },
    /// A host name or address, and a UDP port.
    Udp {
        /// As of TCP.
        host: String,
        /// The port, 1 to 65535.
        port: u16,
    },
    /// A unix stream socket's path (with `--container` or `--pid`: a path inside).
    Unix(PathBuf),
    /// A unix stream socket's abstract name, without the `@`.
    Abstract(String),
    /// A unix socket for datagrams, at one of the two above.
    Datagrams(Box<Self>),
}

/// Why a text is not a target.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTarget {
    /// Nothing there.
    #[error("a target is missing; write HOST:PORT, a /unix/path or an @abstract name")]
    Empty,
    /// Not a port.
    #[error("“{0}” is not a port; write a number from 1 to 65535")]
    Port(String),
    /// An IPv6 address with a last group that could be a port.
    #[error("“{0}” is ambiguous; write an IPv6 address in brackets: [{0}]:PORT")]
    Brackets(String),
    /// `[` without `]`, or something else after the bracket than `:PORT`.
    #[error("“{0}” is not an address; write [IPV6]:PORT")]
    BadBrackets(String),
    /// An address of vsock(7).
    #[error(
        "“{0}”: bro forwards clients of vsock for whom systemd listens (ListenStream=vsock:CID:PORT), and neither listens nor connects there \
         itself; write HOST:PORT, a /unix/path or an @abstract name"
    )]
    Vsock(String),
    /// Characters no host name has.
    #[error("“{0}” is not a host name; write HOST:PORT, a /unix/path or an @abstract name")]
    Host(String),
    /// Longer than sun_path (unix(7)).
    #[error("the unix path or name “{0}” has more than 107 bytes, which no socket address can hold")]
    TooLong(String),
    /// `--target` without a name.
    #[error("“{0}” has no name; write NAME=ADDR, with the FileDescriptorName= of the socket as NAME")]
    NoName(String),
}

/// What tells a UDP port from a TCP port, as Podman writes it.
const UDP: &str = "/udp";

/// What systemd-socket-proxyd takes for a host without a port.
const DEFAULT_PORT: u16 = 80;

/// A port as people write it, 1 to 65535.
///
/// # Errors
/// When it is none.
pub fn port(text: &str) -> Result<u16, InvalidTarget> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let port = if digits { text.parse().ok() } else { None };
    port.filter(|&port| port != 0).ok_or_else(|| InvalidTarget::Port(text.to_owned()))
}

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(text: &str) -> Result<Self, InvalidTarget> {
        if text.is_empty() || text == "@" {
            return Err(InvalidTarget::Empty);
        }
        if let Some(datagrams) = text.strip_suffix(UDP).filter(|_| !text.starts_with(['/', '@'])) {
            return match datagrams.parse()? {
                Self::Tcp { host, port } => Ok(Self::Udp { host, port }),
                _ => Err(InvalidTarget::Host(text.to_owned())),
            };
        }
        if text.starts_with('/') || text.starts_with('@') {
            if text.len() > 107 {
                return Err(InvalidTarget::TooLong(text.to_owned()));
            }
            return Ok(match text.strip_prefix('@') {
                Some(name) => Self::Abstract(name.to_owned()),
                None => Self::Unix(text.into()),
            });
        }
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Self::Tcp { host: "127.0.0.1".into(), port: port(text)? });
        }
        if let Some(rest) = text.strip_prefix('[') {
            let (host, tail) =
                rest.split_once(']').ok_or_else(|| InvalidTarget::BadBrackets(text.to_owned()))?;
            // A zone (%eth0) is kept: link-local addresses need it.
            if host.split('%').next().is_none_or(|ip| ip.parse::<std::net::Ipv6Addr>().is_err()) {
                return Err(InvalidTarget::BadBrackets(text.to_owned()));
            }
            let port = match tail {
                "" => DEFAULT_PORT,
                _ => {
                    port(tail.strip_prefix(':').ok_or_else(|| InvalidTarget::BadBrackets(text.to_owned()))?)?
                }
            };
            return Ok(Self::Tcp { host: host.to_owned(), port });
        }
        if text.strip_prefix("vsock:").is_some_and(|rest| rest.contains(':')) {
            return Err(InvalidTarget::Vsock(text.to_owned()));
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, _)) if host.contains(':') => return Err(InvalidTarget::Brackets(text.to_owned())),
            Some((host, number)) => (host, port(number)?),
            None => (text, DEFAULT_PORT),
        };
        let fits = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
        if host.is_empty() || !host.chars().all(fits) {
            return Err(InvalidTarget::Host(text.to_owned()));
        }
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl Target {
    /// Is it a unix socket?
    #[must_use]
    pub const fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_) | Self::Abstract(_) | Self::Datagrams(_))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Udp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}{UDP}"),
            Self::Udp { host, port } => write!(f, "{host}:{port}{UDP}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Abstract(name) => write!(f, "@{name}"),
            Self::Datagrams(at) => write!(f, "{at} (datagrams)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> Result<Target, InvalidTarget> {
        Ok(Target::Tcp { host: host.into(), port })
    }

    #[test]
    fn reads_what_socket_proxyd_reads() {
        assert_eq!("127.0.0.1:80".parse(), tcp("127.0.0.1", 80));
        assert_eq!("localhost".parse(), tcp("localhost", 80));
        assert_eq!("8080".parse(), tcp("127.0.0.1", 8080));
        assert_eq!("[::1]:5432".parse(), tcp("::1", 5432));
        assert_eq!("[fe80::1%eth0]".parse(), tcp("fe80::1%eth0", 80));
        assert_eq!("[::1]:53/udp".parse(), Ok(Target::Udp { host: "::1".into(), port: 53 }));
        assert_eq!(
            "53/udp".parse::<Target>().map(|target| target.to_string()),
            Ok("127.0.0.1:53/udp".into())
        );
        assert_eq!("/run/x/udp".parse(), Ok(Target::Unix("/run/x/udp".into())));
        assert_eq!("/run/x.sock".parse(), Ok(Target::Unix("/run/x.sock".into())));
        assert_eq!("@bus".parse(), Ok(Target::Abstract("bus".into())));
    }

    #[test]
    fn refuses_with_the_reason() {
        let refused = |text: &str| text.parse::<Target>().unwrap_err();
        assert_eq!(refused(""), InvalidTarget::Empty);
        assert_eq!(refused("host:http"), InvalidTarget::Port("http".into()));
        assert_eq!(refused("host:0"), InvalidTarget::Port("0".into()));
        assert_eq!(refused("70000"), InvalidTarget::Port("70000".into()));
        assert_eq!(refused("53/udp/udp"), InvalidTarget::Host("53/udp/udp".into()));
        assert_eq!(refused("::1"), InvalidTarget::Brackets("::1".into()));
        assert_eq!(refused("vsock::80"), InvalidTarget::Vsock("vsock::80".into()));
        assert_eq!("vsock:80".parse(), tcp("vsock", 80));
        assert_eq!(refused("[::1"), InvalidTarget::BadBrackets("[::1".into()));
        assert_eq!(refused("[host]:80"), InvalidTarget::BadBrackets("[host]:80".into()));
        assert_eq!(refused("a b:80"), InvalidTarget::Host("a b:80".into()));
        assert_eq!(refused(":80"), InvalidTarget::Host(":80".into()));
        assert!(matches!(refused(&format!("/{}", "x".repeat(107))), InvalidTarget::TooLong(_)));
    }

    proptest! {
        #[test]
        fn never_panics_and_prints_what_it_reads(text in "\\PC{0,40}") {
            if let Ok(target) = text.parse::<Target>() {
                prop_assert_eq!(target.to_string().parse::<Target>(), Ok(target));
            }
        }
    }
}
