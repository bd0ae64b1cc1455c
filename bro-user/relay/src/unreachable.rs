//! “Port unreachable”: what a client is told when its datagram was not received (RFC 792, RFC 4443), as bytes. The kernel says it of its
//! own sockets; of a service that is reached through this program only a process with a raw socket can. Pure.

mod limit;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use limit::UnreachableLimit;

/// A datagram that was not received: whom to tell, and of which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undelivered {
    /// The listener that it came to, by its number.
    pub listener: usize,
    /// Whose it was.
    pub client: SocketAddr,
    /// The address of this host's that it was sent to.
    pub local: IpAddr,
    /// The interface, where the address alone does not say it; else 0.
    pub interface: u32,
}

/// ICMP's number, of each version.
const PORT_UNREACHABLE: [u8; 2] = [3, 3];
const PORT_UNREACHABLE_V6: [u8; 2] = [1, 4];

/// The number of UDP among the protocols of IP.
const UDP: u8 = 17;

/// The header of a datagram that carries nothing, in bytes.
const UDP_HEADER: u16 = 8;

/// Any: the original one is not known.
const HOPS: u8 = 64;

/// The message to `client` about a datagram to `local`, without IP's own header. It quotes the datagram's headers, as far as they tell whose
/// it was: by these the client's kernel finds the socket. The checksum of the second version is the kernel's to fill in, which knows as
/// much only then. `None` where there is no one to tell, or the datagram was for several.
#[must_use]
pub fn message(client: SocketAddr, local: SocketAddr) -> Option<Vec<u8>> {
    let ports = [client.port(), local.port(), UDP_HEADER, 0].map(u16::to_be_bytes).concat();
    if client.port() == 0 || !is_one(client.ip()) || !is_one(local.ip()) {
        return None;
    }
    match (client.ip().to_canonical(), local.ip().to_canonical()) {
        (IpAddr::V4(client), IpAddr::V4(local)) => {
            let mut message = [&PORT_UNREACHABLE[..], &[0; 6], &header(client, local), &ports].concat();
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum);
            Some(message)
        }
        (IpAddr::V6(client), IpAddr::V6(local)) => {
            Some([&PORT_UNREACHABLE_V6[..], &[0; 6], &header_v6(client, local), &ports].concat())
        }
        _ => None,
    }
}

/// Is it one host's address?
fn is_one(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast()),
        IpAddr::V6(ip) => !(ip.is_unspecified() || ip.is_multicast()),
    }
}

fn header(client: Ipv4Addr, local: Ipv4Addr) -> Vec<u8> {
    let length = (20 + UDP_HEADER).to_be_bytes();
    let mut header = [&[0x45, 0][..], &length, &[0, 0, 0x40, 0, HOPS, UDP, 0, 0]].concat();
    header.extend(client.octets());
    header.extend(local.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    header
}

fn header_v6(client: Ipv6Addr, local: Ipv6Addr) -> Vec<u8> {
    let mut header = [&[0x60, 0, 0, 0][..], &UDP_HEADER.to_be_bytes(), &[UDP, HOPS]].concat();
    header.extend(client.octets());
    header.extend(local.octets());
    header
}

/// IP's (RFC 1071), of what has an even length.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_is_what_a_kernel_says() {
        let message = message("10.0.0.9:4000".parse().unwrap(), "10.0.0.1:53".parse().unwrap()).unwrap();
        let quoted = [0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0x26, 0xc8, 10, 0, 0, 9, 10, 0, 0, 1];
        assert_eq!(message[8..28], quoted);
        assert_eq!(message[28..], [0x0f, 0xa0, 0, 53, 0, 8, 0, 0]);
        assert_eq!(message[..2], [3, 3]);
        assert_eq!(message[4..8], [0; 4]);
        // A receiver adds all of it up, the sum included.
        assert_eq!((checksum(&message), checksum(&message[8..28])), ([0, 0], [0, 0]));
    }

    proptest! {
        #[test]
        fn it_names_both_ends_and_nothing_else(client: SocketAddr, local: SocketAddr) {
            let Some(message) = message(client, local) else { return Ok(()) };
            let (from, to) = (client.ip().to_canonical(), local.ip().to_canonical());
            let (length, ends, whole) = match (from, to) {
                (IpAddr::V4(from), IpAddr::V4(to)) => (36, [from.octets(), to.octets()].concat(), 28),
                (IpAddr::V6(from), IpAddr::V6(to)) => (56, [from.octets(), to.octets()].concat(), 48),
                _ => return Err(TestCaseError::fail("between families")),
            };
            prop_assert_eq!(message.len(), length);
            prop_assert_eq!(&message[whole - ends.len()..whole], &ends[..]);
            prop_assert_eq!(&message[whole..whole + 2], &client.port().to_be_bytes()[..]);
            prop_assert_eq!(&message[whole + 2..whole + 4], &local.port().to_be_bytes()[..]);
            prop_assert!(!from.is_multicast() && !to.is_multicast() && !to.is_unspecified());
        }
    }

    #[test]
    fn several_hosts_and_none_are_told_nothing() {
        let client = |text: &str| message(text.parse().unwrap(), "10.0.0.1:53".parse().unwrap());
        assert!(client("10.0.0.9:4000").is_some() && client("[::ffff:10.0.0.9]:4000").is_some());
        for none in [
            "10.0.0.9:0",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "0.0.0.0:1",
            "[::ffff:224.0.0.1]:1",
            "[fd00::1]:1",
        ] {
            assert_eq!(client(none), None, "{none}");
        }
        for local in ["224.0.0.251:53", "255.255.255.255:53", "0.0.0.0:53"] {
            assert_eq!(message("10.0.0.9:4000".parse().unwrap(), local.parse().unwrap()), None, "{local}");
        }
        assert_eq!(message("[fd00::1]:1".parse().unwrap(), "[ff02::fb]:53".parse().unwrap()), None);
    }
}
