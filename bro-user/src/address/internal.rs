//! Where the service listens, as `--internal-port` says it.

use std::str::FromStr;

use bro_relay::target::Target;

use super::ports::{PortProtocol, Ports};
use super::{InvalidAddress, plain};

/// Where the service listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Internal {
    /// Ports; without a host the network decides of which address.
    Ports {
        /// A name or an address, if one is said.
        host: Option<String>,
        /// The ports. Of a single one, those after it belong to the rest of a range of external ports.
        ports: Ports,
        /// Whether a protocol is said; otherwise it is that of the external ports.
        says_protocol: bool,
    },
    /// A unix socket.
    Unix(Target),
}

impl FromStr for Internal {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        if text.starts_with(['/', '@']) {
            let target = text.parse()?;
            plain(text)?;
            if matches!(target, Target::Unix(_)) && matches!(text.rsplit('/').next(), Some("" | "." | "..")) {
                return Err(InvalidAddress::NoSocket(text.to_owned()));
            }
            return Ok(Self::Unix(target));
        }
        let (host, ports) = Ports::split(text)?;
        let ports = ports.ok_or_else(|| InvalidAddress::NoPort(text.to_owned()))?;
        plain(text)?;
        let says_protocol = PortProtocol::split(text)?.1.is_some();
        Ok(Self::Ports { host, ports, says_protocol })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ports_with_and_without_a_host() {
        let ports = |first, last, protocol| Ports { first, last, protocol };
        assert_eq!(
            "80".parse(),
            Ok(Internal::Ports { host: None, ports: ports(80, 80, PortProtocol::Tcp), says_protocol: false })
        );
        assert_eq!(
            "10.0.0.2:53-55/udp".parse(),
            Ok(Internal::Ports {
                host: Some("10.0.0.2".into()),
                ports: ports(53, 55, PortProtocol::Udp),
                says_protocol: true
            })
        );
        assert_eq!("/run/x.sock".parse(), Ok(Internal::Unix("/run/x.sock".parse().unwrap())));
        assert!("db".parse::<Internal>().is_err() && "5-4".parse::<Internal>().is_err());
    }
}
