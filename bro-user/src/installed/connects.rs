//! To where the processes of a container whose service adopts sockets may connect (`--adopt-connect`).

use std::fmt;
use std::str::FromStr;

/// It is about connect(2): a socket of the host's that a container has could lead it anywhere on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connects {
    /// To where it may without adoption.
    Any,
    /// Over TCP to these ports alone, in ascending order; to unix sockets as before.
    Ports(Vec<u16>),
    /// Nowhere, not even to a unix socket.
    Never,
}

/// Why that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("“{0}” is not any, none, never or a list of ports, as in 5432,6379")]
pub struct InvalidConnects(String);

impl FromStr for Connects {
    type Err = InvalidConnects;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ports = || -> Option<Vec<u16>> {
            let mut ports: Vec<u16> = text
                .split(',')
                .map(|port| port.parse().ok().filter(|port| *port > 0))
                .collect::<Option<_>>()?;
            ports.sort_unstable();
            ports.dedup();
            Some(ports)
        };
        match text {
            "any" => Ok(Self::Any),
            "none" => Ok(Self::Ports(Vec::new())),
            "never" => Ok(Self::Never),
            _ => ports().map(Self::Ports).ok_or_else(|| InvalidConnects(text.to_owned())),
        }
    }
}

impl fmt::Display for Connects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Never => f.write_str("never"),
            Self::Ports(ports) if ports.is_empty() => f.write_str("none"),
            Self::Ports(ports) => {
                let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                f.write_str(&ports.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_as_it_is_read() {
        for text in ["any", "none", "never", "80", "80,443"] {
            assert_eq!(text.parse::<Connects>().unwrap().to_string(), text);
        }
        assert_eq!("443,80,443".parse(), Ok(Connects::Ports(vec![80, 443])));
        for text in ["", "0", "80,", "70000", "all", "80-90"] {
            assert!(text.parse::<Connects>().is_err(), "{text}");
        }
    }
}
