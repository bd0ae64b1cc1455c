//! `[NAME=]ADDRESS`: which of a service's ports is meant.

use std::str::FromStr;

use super::{InvalidAddress, service_name};

/// A value that may have the name of a port in front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAddress<T> {
    /// As `--service-name` takes it.
    pub name: Option<String>,
    /// What is said of that port.
    pub value: T,
}

impl<T: FromStr<Err = InvalidAddress>> FromStr for NamedAddress<T> {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        // A path may hold an equals sign, and so may what comes after `seqpacket:`.
        let (name, rest) = match text.split_once('=') {
            Some((name, rest)) if !name.contains(['/', ':', '[', '@']) => (Some(name), rest),
            _ => (None, text),
        };
        let name = name.map(service_name).transpose().map_err(InvalidAddress::Name)?;
        Ok(Self { name, value: rest.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::External;

    #[test]
    fn a_name_stands_before_an_address_and_not_in_a_path() {
        let read = |text: &str| {
            let named: NamedAddress<External> = text.parse().unwrap();
            (named.name, named.value.to_string())
        };
        assert_eq!(read("metrics=9100"), (Some("metrics".to_owned()), "9100".to_owned()));
        assert_eq!(read("127.0.0.1:9100"), (None, "127.0.0.1:9100".to_owned()));
        assert_eq!(read("/run/a=b"), (None, "/run/a=b".to_owned()));
        assert_eq!(read("seqpacket:/run/a=b"), (None, "seqpacket:/run/a=b".to_owned()));
        assert_eq!(read("x=/run/a=b"), (Some("x".to_owned()), "/run/a=b".to_owned()));
        assert!(
            "=80".parse::<NamedAddress<External>>().is_err()
                && "a b=80".parse::<NamedAddress<External>>().is_err()
        );
    }
}
