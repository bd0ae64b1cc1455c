//! The PROXY protocol, both ways: the header that tells a service who its client is (`--proxy-protocol`), and the one by which a
//! balancer in front tells that to this forwarder (`--accept-proxy`). Reading here knows no socket: it says how many of the bytes
//! that wait belong to the header, so that none beyond it is taken.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use proxy_header::{ParseConfig, Protocol, ProxiedAddress, ProxyHeader};

use crate::peer::Peer;

/// The version of the header in front of each connection to the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A line of text
    V1,
    /// Binary
    V2,
}

/// The longest header of version 1.
pub const LINE: usize = 107;

/// The longest header of version 2 that is taken, with additional fields; it could have 65551 bytes.
pub const LONGEST: usize = 4096;

/// How every header of version 2 begins.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// How many of its bytes come up to the length, the length included.
const FIXED: usize = 16;

/// How every header of version 1 begins.
const WORD: &[u8; 6] = b"PROXY ";

impl Version {
    /// The header for a client that connected from `source` to `destination`; for a client without such addresses, as over unix,
    /// the header that says so.
    #[must_use]
    pub fn header(self, ends: Option<(SocketAddr, SocketAddr)>) -> Vec<u8> {
        let same_family =
            |(source, destination): &(SocketAddr, SocketAddr)| source.is_ipv4() == destination.is_ipv4();
        let header = match ends.filter(same_family) {
            Some((source, destination)) => {
                ProxyHeader::with_address(ProxiedAddress::stream(source, destination))
            }
            None => ProxyHeader::with_local(),
        };
        let mut room = [0; 2 * LINE];
        let length = match self {
            Self::V1 => header.encode_to_slice_v1(&mut room),
            Self::V2 => header.encode_to_slice_v2(&mut room),
        };
        // Both addresses are of one family, and there is room for the longest: it cannot fail.
        room[..length.unwrap_or(0)].to_vec()
    }
}

/// `--trusted`: a peer that may say in a header who the client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trusted {
    /// Peers that connect from these addresses.
    Net(IpNet),
    /// Peers that connect over a unix socket.
    Unix,
    /// Peers that connect over vsock(7), from one machine alone where it is named.
    Vsock(Option<u32>),
}

impl Trusted {
    /// Is it this one?
    #[must_use]
    pub fn is(&self, peer: &Peer) -> bool {
        match (self, peer) {
            (Self::Net(net), Peer::Tcp(address)) => net.contains(&address.ip()),
            (Self::Unix, Peer::Unix { .. }) | (Self::Vsock(None), Peer::Vsock { .. }) => true,
            (Self::Vsock(Some(machine)), Peer::Vsock { cid, .. }) => machine == cid,
            _ => false,
        }
    }
}

impl FromStr for Trusted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        if let Some(machine) = text.strip_prefix("vsock") {
            let cid = machine.strip_prefix(':').filter(|cid| cid.bytes().all(|byte| byte.is_ascii_digit()));
            return match (machine, cid.and_then(|cid| cid.parse().ok())) {
                ("", _) => Ok(Self::Vsock(None)),
                (_, Some(cid)) => Ok(Self::Vsock(Some(cid))),
                (_, None) => {
                    Err(format!("“{text}” is no machine: write vsock:CID, or vsock for each of them"))
                }
            };
        }
        let net = text.parse::<IpNet>().ok().or_else(|| Some(text.parse::<IpAddr>().ok()?.into()));
        let net = net.ok_or_else(|| {
            format!("“{text}” is neither an address, a network such as 10.0.0.0/8 or fd00::/8, nor unix, vsock or vsock:CID")
        })?;
        // Clients over IPv4 are known by their IPv4 address, however they come.
        let mapped =
            matches!(net, IpNet::V6(net) if net.prefix_len() > 0 && net.addr().to_ipv4_mapped().is_some());
        if mapped {
            return Err(format!("“{text}”: write an IPv4 network as such"));
        }
        Ok(Self::Net(net))
    }
}

impl fmt::Display for Trusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(net) => net.fmt(f),
            Self::Unix => f.write_str("unix"),
            Self::Vsock(None) => f.write_str("vsock"),
            Self::Vsock(Some(cid)) => write!(f, "vsock:{cid}"),
        }
    }
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Introduction {
    /// A client came from there, to this address of the balancer's.
    Client {
        /// Its address.
        source: SocketAddr,
        /// The balancer's.
        destination: SocketAddr,
    },
    /// Nothing: the balancer connects for itself, or for a client without such an address. The peer that connected is the client.
    Nothing,
}

/// Why bytes are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    /// They begin otherwise.
    NoHeader,
    /// They go on for too long.
    TooLong,
    /// They make no sense.
    Malformed,
}

impl Bad {
    /// The same, for a log line's field.
    #[must_use]
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::NoHeader => "the connection does not begin with a PROXY header",
            Self::TooLong => "the PROXY header is too long",
            Self::Malformed => "the PROXY header is malformed",
        }
    }
}

/// A header on its way.
#[derive(Debug, Default)]
pub struct Incoming {
    bytes: Vec<u8>,
}

impl Incoming {
    /// How many of the bytes that wait belong to the header. None of what comes after it is among them.
    ///
    /// # Errors
    /// When they belong to none.
    pub fn belonging(&self, waiting: &[u8]) -> Result<usize, Bad> {
        let had = self.bytes.len();
        // What of the header is known, without copying what may be much.
        let byte = |at: usize| self.bytes.get(at).or_else(|| waiting.get(at.checked_sub(had)?)).copied();
        let all = had + waiting.len();
        let begins = |with: &[u8]| with.iter().enumerate().take(all).all(|(at, one)| byte(at) == Some(*one));
        let whole = if begins(SIGNATURE) {
            match (byte(FIXED - 2), byte(FIXED - 1)) {
                (Some(high), Some(low)) => FIXED + usize::from(u16::from_be_bytes([high, low])),
                _ => FIXED,
            }
        } else if begins(WORD) {
            match (0..all.min(LINE)).find(|at| byte(*at) == Some(b'\n')) {
                Some(end) => end + 1,
                None if all >= LINE => return Err(Bad::TooLong),
                None => all,
            }
        } else {
            return Err(Bad::NoHeader);
        };
        if whole > LONGEST {
            return Err(Bad::TooLong);
        }
        Ok((whole - had).min(waiting.len()))
    }

    /// Takes what belongs to the header; returns what it says once it is whole.
    ///
    /// # Errors
    /// When it is whole and makes no sense.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Option<Introduction>, Bad> {
        self.bytes.extend_from_slice(bytes);
        let whole = if self.bytes.starts_with(WORD) {
            self.bytes.ends_with(b"\n")
        } else {
            self.bytes.get(..FIXED).is_some_and(|fixed| {
                let rest = u16::from_be_bytes([fixed[FIXED - 2], fixed[FIXED - 1]]);
                self.bytes.len() >= FIXED + usize::from(rest)
            })
        };
        if !whole {
            return Ok(None);
        }
        let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
        match ProxyHeader::parse(&self.bytes, config) {
            Ok((header, length)) if length == self.bytes.len() => match header.proxied_address() {
                Some(ProxiedAddress { protocol: Protocol::Stream, source, destination }) => {
                    let known = |end: &SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
                    Ok(Some(Introduction::Client { source: known(source), destination: known(destination) }))
                }
                Some(_) => Err(Bad::Malformed),
                None => Ok(Some(Introduction::Nothing)),
            },
            Ok(_) | Err(_) => Err(Bad::Malformed),
        }
    }

    /// How many of its bytes have come so far.
    #[must_use]
    pub fn length(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads `stream` as it comes, in pieces of these sizes, and returns what the header says and how much was taken.
    fn read(stream: &[u8], mut sizes: impl FnMut() -> usize) -> (Result<Option<Introduction>, Bad>, usize) {
        let (mut incoming, mut taken, mut there) = (Incoming::default(), 0, 0);
        while there < stream.len() {
            there = (there + sizes().max(1)).min(stream.len());
            let waiting = &stream[taken..there];
            match incoming.belonging(waiting) {
                Ok(count) => {
                    let said = incoming.take(&waiting[..count]);
                    taken += count;
                    if said != Ok(None) {
                        return (said, taken);
                    }
                }
                Err(bad) => return (Err(bad), taken),
            }
        }
        (Ok(None), taken)
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_header_is_what_the_specification_shows() {
        let ends = Some((address("192.168.0.1:56324"), address("192.168.0.11:443")));
        assert_eq!(Version::V1.header(ends), b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n");
        assert_eq!(
            Version::V2.header(ends),
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\xa8\0\x01\xc0\xa8\0\x0b\xdc\x04\x01\xbb"
        );
        assert_eq!(Version::V1.header(None), b"PROXY UNKNOWN\r\n");
        assert_eq!(Version::V2.header(None), b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
        // What cannot be told in one family is not told.
        let mixed = Some((address("192.168.0.1:1"), address("[::1]:2")));
        assert_eq!(Version::V1.header(mixed), Version::V1.header(None));
        let longest = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
        assert!(Version::V1.header(Some((address(longest), address(longest)))).len() <= LINE);
    }

    #[test]
    fn nothing_after_a_header_is_taken() {
        let (source, destination) = (address("192.168.0.1:56324"), address("192.168.0.11:443"));
        for version in [Version::V1, Version::V2] {
            let header = version.header(Some((source, destination)));
            let stream = [&header[..], b"\r\nGET / HTTP/1.0\r\n"].concat();
            for size in 1..stream.len() {
                let (said, taken) = read(&stream, || size);
                assert_eq!(
                    (said, taken),
                    (Ok(Some(Introduction::Client { source, destination })), header.len()),
                    "{size}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_header_is_known_at_its_first_wrong_byte() {
        let said = |stream: &[u8]| read(stream, || stream.len()).0;
        assert_eq!(said(b"GET / HTTP/1.0\r\n"), Err(Bad::NoHeader));
        assert_eq!(said(b"PROXYX"), Err(Bad::NoHeader));
        assert_eq!(said(b"PROX"), Ok(None));
        assert_eq!(said(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 99999\r\n"), Err(Bad::Malformed));
        assert_eq!(said(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 9\n"), Err(Bad::Malformed));
        assert_eq!(said(b"PROXY UDP4 1.2.3.4 5.6.7.8 1 9\r\n"), Err(Bad::Malformed));
        assert_eq!(said(&[&b"PROXY UNKNOWN "[..], &[b'x'; 120]].concat()), Err(Bad::TooLong));
        assert_eq!(said(b"PROXY UNKNOWN something\r\n"), Ok(Some(Introduction::Nothing)));
        let v2 = |tail: &[u8]| [&SIGNATURE[..], tail].concat();
        assert_eq!(said(&v2(b"\x21\x11\xff\xff")), Err(Bad::TooLong));
        assert_eq!(said(&v2(b"\x11\x11\0\0")), Err(Bad::Malformed));
        assert_eq!(said(&v2(b"\x21\x11\0\x04\x01\x02\x03\x04")), Err(Bad::Malformed));
        assert_eq!(
            said(&v2(b"\x21\x12\0\x0c\x01\x02\x03\x04\x05\x06\x07\x08\0\x01\0\x02")),
            Err(Bad::Malformed)
        );
        // Additional fields, of the longest that there may be and one more.
        let fields = |most: usize| {
            let rest = u16::try_from(most).unwrap().to_be_bytes();
            let address = [1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0, 2];
            v2(&[&[0x21, 0x11], &rest[..], &address[..], &vec![0xea; most - 12][..]].concat())
        };
        assert!(matches!(said(&fields(LONGEST - FIXED)), Ok(Some(Introduction::Client { .. }))));
        assert_eq!(said(&fields(LONGEST - FIXED + 1)), Err(Bad::TooLong));
        // Of a balancer's own, and of unix clients.
        assert_eq!(said(&v2(b"\x20\0\0\0")), Ok(Some(Introduction::Nothing)));
        assert_eq!(
            said(&v2(&[&[0x21, 0x31, 0, 216][..], &[0; 216]].concat())),
            Ok(Some(Introduction::Nothing))
        );
    }

    #[test]
    fn the_trusted_are_networks_addresses_or_unix() {
        let trusted = |text: &str| text.parse::<Trusted>().unwrap();
        let tcp = |text: &str| Peer::Tcp(address(text));
        assert!(
            trusted("10.0.0.0/8").is(&tcp("10.9.8.7:1")) && !trusted("10.0.0.0/8").is(&tcp("11.0.0.1:1"))
        );
        assert!(trusted("10.9.8.7").is(&tcp("10.9.8.7:1")) && !trusted("10.9.8.7").is(&tcp("10.9.8.6:1")));
        assert!(trusted("fd00::/8").is(&tcp("[fd12::1]:1")) && !trusted("::/0").is(&tcp("1.2.3.4:1")));
        let unix = Peer::Unix { uid: 0, pid: 1 };
        assert!(
            trusted("unix").is(&unix)
                && !trusted("unix").is(&tcp("1.2.3.4:1"))
                && !trusted("0.0.0.0/0").is(&unix)
        );
        let machine = |cid| Peer::Vsock { cid, port: 1024 };
        assert!(
            trusted("vsock").is(&machine(3))
                && !trusted("vsock").is(&unix)
                && !trusted("unix").is(&machine(3))
        );
        assert!(trusted("vsock:3").is(&machine(3)) && !trusted("vsock:3").is(&machine(4)));
        assert!(!trusted("0.0.0.0/0").is(&machine(3)) && !trusted("::/0").is(&machine(3)));
        for wrong in [
            "",
            "vsock:",
            "vsock:x",
            "vsock:3:5",
            "vsocks",
            "vsock:+3",
            "10.0.0.0/33",
            "localhost",
            "10.0.0",
            "::ffff:10.0.0.0/104",
        ] {
            assert!(wrong.parse::<Trusted>().is_err(), "{wrong}");
        }
        for text in ["10.0.0.0/8", "fd00::/8", "unix", "vsock", "vsock:3"] {
            assert_eq!(trusted(text).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written_is_read(
            v4: bool, one: u128, other: u128, ports: (u16, u16), v2: bool, rest: Vec<u8>, sizes in prop::collection::vec(1_usize..40, 1..9)
        ) {
            let ip = |number: u128| -> IpAddr {
                // The lower half of all: what is not IPv4 written as IPv6, which is read as IPv4.
                if v4 { std::net::Ipv4Addr::from(number as u32).into() } else { std::net::Ipv6Addr::from(number | 1 << 127).into() }
            };
            let ends = (SocketAddr::new(ip(one), ports.0), SocketAddr::new(ip(other), ports.1));
            let header = if v2 { Version::V2 } else { Version::V1 }.header(Some(ends));
            let stream = [&header[..], &rest].concat();
            let mut sizes = sizes.into_iter().cycle();
            let (said, taken) = read(&stream, || sizes.next().unwrap_or(1));
            prop_assert_eq!(said, Ok(Some(Introduction::Client { source: ends.0, destination: ends.1 })));
            prop_assert_eq!(taken, header.len());
        }

        #[test]
        fn no_bytes_make_it_panic_or_take_too_much(bytes: Vec<u8>, v2: bool, size in 1_usize..50) {
            let stream = if v2 { [&SIGNATURE[..], &bytes].concat() } else { [&WORD[..], &bytes].concat() };
            let (_, taken) = read(&stream, || size);
            prop_assert!(taken <= stream.len().min(LONGEST));
        }
    }
}
