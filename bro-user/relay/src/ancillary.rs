//! What comes along with a datagram, and goes along with an answer: the address of this host's that the client wrote to, and the ECN
//! bits (ip(7) IP_PKTINFO and IP_TOS, ipv6(7) IPV6_PKTINFO and IPV6_TCLASS), and that several are one for the kernel (udp(7) UDP_GRO and
//! UDP_SEGMENT). Control messages as bytes (cmsg(3)); pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;

use nix::libc;

use crate::flows::{FlowClient, LocalAddress};

/// The bits of the TOS field that are ECN's (RFC 3168).
pub const ECN: u8 = 0b11;

/// A control message's header: its length, level and type.
const HEADER: usize = size_of::<usize>() + 2 * size_of::<i32>();

/// What came along.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ancillary {
    /// Where it was sent to.
    pub local: Option<LocalAddress>,
    /// Its ECN bits.
    pub ecn: u8,
    /// The length of each datagram, in bytes, where it is several, of which the last may be shorter; else 0.
    pub segment: u16,
    /// Descriptors came along, which are closed by now.
    pub descriptors: bool,
}

impl Ancillary {
    /// Reads control messages; what is not known, or does not fit, is left out.
    #[must_use]
    pub fn read(control: &[u8]) -> Self {
        let mut read = Self::default();
        for (level, kind, data) in each(control) {
            match (level, kind) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    // The interface, the address that routing chose, and the one in the packet. The first two are not known of what
                    // came before the socket was asked for them.
                    let address = |at: usize| Some(Ipv4Addr::from(*data.get(at..)?.first_chunk::<4>()?));
                    let is_one =
                        |ip: &Ipv4Addr| !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast());
                    let (chosen, packets) = (address(4).filter(is_one), address(8));
                    let ip = chosen.or_else(|| packets.filter(is_one));
                    let another = |packets: Ipv4Addr| Some(packets) != chosen && !packets.is_unspecified();
                    let group = chosen.is_some() && packets.is_some_and(another);
                    read.local = ip.map(|ip| LocalAddress { ip: ip.into(), interface: 0, group });
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    if let (Some(octets), Some(interface)) = (data.first_chunk::<16>(), number(data, 16)) {
                        let ip = Ipv6Addr::from(*octets);
                        let needed = ip.is_unicast_link_local() || ip.is_multicast();
                        let interface = if needed { interface.cast_unsigned() } else { 0 };
                        read.local = Some(LocalAddress { ip: ip.into(), interface, group: false });
                    }
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => read.ecn = data.first().copied().unwrap_or(0) & ECN,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    let class = number(data, 0).unwrap_or(0);
                    read.ecn = u8::try_from(class & i32::from(ECN)).unwrap_or(0);
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    read.segment = number(data, 0).and_then(|size| u16::try_from(size).ok()).unwrap_or(0);
                }
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => read.descriptors = true,
                _ => {}
            }
        }
        read
    }

    /// The control messages for an answer to `client`, through a socket of whichever family.
    #[must_use]
    pub fn write(&self, client: &FlowClient) -> Vec<u8> {
        let mut control = Vec::new();
        let FlowClient::Inet(client) = client else { return control };
        match self.local.map(|local| (local.ip, local.interface)) {
            Some((IpAddr::V4(ip), _)) => {
                let info = [[0; 4], ip.octets(), [0; 4]].concat();
                append(&mut control, libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
            }
            // No one can be answered from a multicast address; the kernel chooses.
            Some((IpAddr::V6(ip), interface)) if !ip.is_multicast() => {
                let info = [&ip.octets()[..], &interface.to_ne_bytes()].concat();
                append(&mut control, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
            }
            Some((IpAddr::V6(_), _)) | None => {}
        }
        if self.ecn != 0 {
            let class = i32::from(self.ecn).to_ne_bytes();
            match client.ip().to_canonical() {
                IpAddr::V4(_) => append(&mut control, libc::IPPROTO_IP, libc::IP_TOS, &class),
                IpAddr::V6(_) => append(&mut control, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &class),
            }
        }
        if self.segment != 0 {
            append(&mut control, libc::SOL_UDP, libc::UDP_SEGMENT, &self.segment.to_ne_bytes());
        }
        control
    }
}

/// Each control message: its level, its type and what it says.
fn each(mut control: &[u8]) -> impl Iterator<Item = (i32, i32, &[u8])> {
    std::iter::from_fn(move || {
        let (length, rest) = control.split_first_chunk()?;
        let length = usize::from_ne_bytes(*length);
        let (level, kind) = (number(rest, 0)?, number(rest, 4)?);
        let data = control.get(HEADER..length)?;
        control = control.get(length.next_multiple_of(align_of::<usize>())..).unwrap_or_default();
        Some((level, kind, data))
    })
}

/// The descriptors that came along (unix(7) SCM_RIGHTS).
pub fn descriptors(control: &[u8]) -> impl Iterator<Item = RawFd> {
    let rights = |part: &(i32, i32, &[u8])| (part.0, part.1) == (libc::SOL_SOCKET, libc::SCM_RIGHTS);
    let parts = each(control).filter(rights);
    parts.flat_map(|(_, _, data)| data.chunks_exact(4).filter_map(|bytes| number(bytes, 0)))
}

fn number(bytes: &[u8], at: usize) -> Option<i32> {
    bytes.get(at..)?.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes))
}

fn append(control: &mut Vec<u8>, level: i32, kind: i32, data: &[u8]) {
    control.extend((HEADER + data.len()).to_ne_bytes());
    control.extend(level.to_ne_bytes());
    control.extend(kind.to_ne_bytes());
    control.extend(data);
    control.resize(control.len().next_multiple_of(align_of::<usize>()), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_what_it_writes(v4: Ipv4Addr, v6: Ipv6Addr, ecn in 0u8..4, client: IpAddr) {
            let client = FlowClient::Inet((client, 1).into());
            for ip in [IpAddr::V4(v4), IpAddr::V6(v6)] {
                prop_assume!(!ip.is_multicast() && !ip.is_unspecified() && ip != IpAddr::V4(Ipv4Addr::BROADCAST));
                let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
                let local = LocalAddress { ip, interface: if link_local { 7 } else { 0 }, group: false };
                let ancillary = Ancillary { local: Some(local), ecn, ..Ancillary::default() };
                prop_assert_eq!(Ancillary::read(&ancillary.write(&client)), ancillary);
            }
            prop_assert!(Ancillary::default().write(&client).is_empty());
        }

        #[test]
        fn reads_how_long_each_of_several_is(segment: u16) {
            let mut control = Vec::new();
            append(&mut control, libc::SOL_UDP, libc::UDP_GRO, &i32::from(segment).to_ne_bytes());
            prop_assert_eq!(Ancillary::read(&control).segment, segment);
        }

        #[test]
        fn finds_descriptors(numbers: Vec<i32>) {
            let mut control = Vec::new();
            append(&mut control, libc::IPPROTO_IP, libc::IP_TOS, &[1]);
            let data: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
            append(&mut control, libc::SOL_SOCKET, libc::SCM_RIGHTS, &data);
            prop_assert_eq!(descriptors(&control).collect::<Vec<_>>(), numbers);
            prop_assert!(Ancillary::read(&control).descriptors);
        }

        #[test]
        fn what_came_too_early_has_its_address_too(ip: Ipv4Addr) {
            let mut control = Vec::new();
            append(&mut control, libc::IPPROTO_IP, libc::IP_PKTINFO, &[[0; 4], [0; 4], ip.octets()].concat());
            let local = Ancillary::read(&control).local.map(|local| local.ip);
            let is_one = !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast());
            prop_assert_eq!(local, is_one.then_some(ip.into()));
        }

        #[test]
        fn knows_what_was_for_several(ip: Ipv4Addr, packets: Ipv4Addr) {
            let mut control = Vec::new();
            append(&mut control, libc::IPPROTO_IP, libc::IP_PKTINFO, &[[0; 4], ip.octets(), packets.octets()].concat());
            let Some(local) = Ancillary::read(&control).local else { return Ok(()) };
            let is_one = |ip: Ipv4Addr| !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast());
            prop_assert_eq!(local.group, is_one(ip) && ip != packets && !packets.is_unspecified());
        }

        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _read = (Ancillary::read(&bytes), descriptors(&bytes).count());
        }
    }
}
