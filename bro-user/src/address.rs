//! What `bro activate` reads from its command line: addresses of both sides, names, and text that ends up in a unit file.

mod external;
mod internal;
mod named;
mod ports;

use std::path::PathBuf;

use bro_relay::target;

pub use external::{External, ExternalSocket, SocketPlace};
pub use internal::Internal;
pub use named::NamedAddress;
pub use ports::{PortProtocol, Ports};

/// Why a text is not an external address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// Something else than tcp and udp after the slash.
    #[error("“{0}” ends in neither /tcp, /udp nor /tcp+udp; a port alone is of TCP")]
    Protocol(String),
    /// A range that ends before it begins.
    #[error("“{0}” is no range of ports: write the lower one first")]
    Range(String),
    /// A range of too many ports.
    #[error("“{text}” are {count} ports, and {most} is the most of one range; give the rest a name of their own: --external-port NAME=…", most = ports::MOST)]
    LongRange {
        /// The range.
        text: String,
        /// How many.
        count: u32,
    },
    /// No vsock address.
    #[error(
        "“{0}” is no vsock address; write vsock::PORT, or vsock:CID:PORT for one context identifier alone"
    )]
    Vsock(String),
    /// After `seqpacket:` or `dgram:`.
    #[error(
        "“{0}” is neither a path that begins with / nor an abstract name that begins with @, of a unix socket"
    )]
    NotUnix(String),
    /// A name in front of an address that cannot be one.
    #[error("{0}")]
    Name(String),
    /// A port, an address or a path.
    #[error(transparent)]
    Target(#[from] target::InvalidTarget),
    /// A name where systemd needs an address.
    #[error(
        "“{0}” is not an IP address; systemd listens on addresses, not on names: write for example 127.0.0.1:8080"
    )]
    NotAnIp(String),
    /// Text that no unit file can hold.
    #[error(
        "“{0}” contains characters that a unit file cannot hold there (white space, quotes, % or control characters)"
    )]
    Characters(String),
    /// A path that systemd refuses, or takes for another.
    #[error(
        "“{0}” is no path at which systemd listens: write one that names a file, with neither . nor .. nor an empty part in it"
    )]
    Path(String),
    /// A path at which no service can listen.
    #[error("“{0}” is no path at which a service listens: write one that names a socket")]
    NoSocket(String),
    /// Both ports at once, as `podman run --publish` takes them.
    #[error(
        "“{text}” are two ports, and this is where clients connect: write --external-port {external} --internal-port {internal}"
    )]
    Published {
        /// All of it.
        text: String,
        /// The one that clients connect to.
        external: String,
        /// The one of the container.
        internal: String,
    },
    /// An address without a port.
    #[error("“{0}” has no port; write PORT or ADDR:PORT")]
    NoPort(String),
}

/// Unix paths and abstract names go into unit files as they are.
fn plain(text: &str) -> Result<(), InvalidAddress> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || "%\"'\\;#".contains(c);
    if text.contains(bad) { Err(InvalidAddress::Characters(text.escape_debug().to_string())) } else { Ok(()) }
}

/// A word that is part of a unit's name and a socket's FileDescriptorName=.
pub(crate) fn service_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > 64 || !text.chars().all(fits) {
        let text = text.escape_debug();
        return Err(format!(
            "“{text}” cannot be part of a unit's name: use up to 64 letters, digits, - _ and ."
        ));
    }
    Ok(text.to_owned())
}

/// A container's name, by Podman's own rule.
pub(crate) fn container(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if text.chars().all(fits) && text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Ok(text.to_owned());
    }
    Err(format!("“{}” cannot be a container's name", text.escape_debug()))
}

/// A unit's name with its suffix, as systemd allows it (systemd.unit(5)).
pub(crate) fn unit(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    let named = text.rsplit_once('.').is_some_and(|(name, suffix)| !name.is_empty() && !suffix.is_empty());
    if named && text.len() < 256 && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    Err(format!("“{}” is not the name of a unit, such as web.service", text.escape_debug()))
}

/// A network interface's name, as the kernel allows it (dev_valid_name).
pub(crate) fn device(text: &str) -> Result<String, String> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || "/:%\"'\\".contains(c);
    if text.is_empty() || text.len() > 15 || text == "." || text == ".." || text.contains(bad) {
        return Err(format!("“{}” is not the name of a network interface", text.escape_debug()));
    }
    Ok(text.to_owned())
}

/// Is it an absolute path without `..`, which leads where it seems to, also below another directory?
pub(crate) fn is_straight(path: &std::path::Path) -> bool {
    path.is_absolute() && !path.components().any(|part| part == std::path::Component::ParentDir)
}

/// A path that means the same for every reader.
pub(crate) fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(one_line(text)?);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(format!("“{text}” is not an absolute path: the service does not run in this directory"))
    }
}

/// Text that fits on a line of a unit file.
pub(crate) fn one_line(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("it is empty".to_owned());
    }
    if text.contains(char::is_control) || text.ends_with('\\') || text.trim() != text {
        let text = text.escape_debug();
        return Err(format!("“{text}” does not fit on one line of a unit file"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use bro_relay::listener::SocketKind;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_every_form() {
        let tcp = |port| Ports { first: port, last: port, protocol: PortProtocol::Tcp };
        assert_eq!("8080".parse(), Ok(External::Ports(tcp(8080))));
        assert_eq!("127.0.0.1:80".parse(), Ok(External::At(Ipv4Addr::LOCALHOST.into(), tcp(80))));
        assert_eq!("[::1]:80".parse(), Ok(External::At(Ipv6Addr::LOCALHOST.into(), tcp(80))));
        assert_eq!("/run/web.sock".parse(), Ok(External::Path(SocketKind::Stream, "/run/web.sock".into())));
        assert_eq!("@web".parse(), Ok(External::Abstract(SocketKind::Stream, "web".into())));
    }

    #[test]
    fn refuses_with_the_reason() {
        let refused = |text: &str| text.parse::<External>().unwrap_err().to_string();
        assert!(refused("localhost:80").contains("not an IP address"));
        assert!(refused("8080:80").ends_with("write --external-port 8080 --internal-port 80"));
        assert!(refused("127.0.0.1:8080:80").contains("--external-port 127.0.0.1:8080 --internal-port 80"));
        assert!(refused("[::1]:8080:80").contains("--external-port [::1]:8080 --internal-port 80"));
        assert!(refused("web:80").contains("not an IP address"));
        assert!(refused("127.0.0.1").contains("no port"));
        assert!(refused("::1").contains("no port"));
        assert!(refused("[::1]").contains("no port"));
        assert!(refused("0").contains("not a port"));
        assert!(refused("127.0.0.1:http").contains("not a port"));
        assert!(refused("").contains("missing"));
        assert!(refused("/run/a b").contains("characters"));
        assert!(refused("@%h").contains("characters"));
        for path in ["/", "/tmp/", "/tmp/../tmp/x.sock", "/run/./x.sock", "/run//x.sock", "/.."] {
            assert!(refused(path).contains("no path at which systemd listens"), "{path}");
        }
        assert!(refused(&format!("/run/{}", "x".repeat(103))).contains("107 bytes"));
        assert!(format!("/run/{}", "x".repeat(102)).parse::<External>().is_ok());
        assert!("web".parse::<Internal>().is_err());
        for path in ["/", "/run/", "/run/.."] {
            assert_eq!(path.parse::<Internal>(), Err(InvalidAddress::NoSocket(path.to_owned())));
        }
        assert!("/run/web.sock".parse::<Internal>().is_ok());
        assert!(service_name("a/b").is_err() && service_name("").is_err() && service_name("metrics").is_ok());
        assert!(device("eth0").is_ok() && device("way-too-long-a-name").is_err() && device("a b").is_err());
        assert!(absolute("busy").is_err() && absolute("/run/busy").is_ok());
        assert!(one_line("a\nb").is_err() && one_line("").is_err() && one_line("pg_isready -q").is_ok());
    }

    proptest! {
        #[test]
        fn prints_what_it_reads(text in "\\PC{0,30}") {
            if let Ok(external) = text.parse::<External>() {
                prop_assert_eq!(external.to_string().parse::<External>(), Ok(external));
            }
            text.parse::<Internal>().ok();
        }
    }
}
