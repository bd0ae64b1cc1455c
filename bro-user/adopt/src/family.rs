//! Which of systemd's sockets fits one that a service wants to listen at, or have datagrams from.
//!
//! A service reads its clients' addresses as those of the family that it made its socket of. nginx with an AF_INET socket answers no
//! client that comes with a `sockaddr_in6`; an AF_INET6 service in dual mode gets along with IPv4 clients of an AF_INET one. So the family
//! has to be the same, but for such a service.

/// What kind of socket it is, as far as an adopted one must not differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6 with IPV6_V6ONLY (ipv6(7)).
    V6Only,
    /// AF_INET6 that takes IPv4 clients too.
    Dual,
    /// AF_UNIX, SOCK_STREAM.
    Unix,
    /// AF_UNIX, SOCK_SEQPACKET.
    UnixPackets,
    /// UDP over AF_INET.
    UdpV4,
    /// UDP over AF_INET6 with IPV6_V6ONLY.
    UdpV6Only,
    /// UDP over AF_INET6, IPv4 too.
    UdpDual,
    /// Of a listener: one that fits no service's, and is forwarded.
    Other,
}

impl Family {
    /// Are there datagrams, and nothing to accept?
    #[must_use]
    pub const fn is_datagrams(self) -> bool {
        matches!(self, Self::UdpV4 | Self::UdpV6Only | Self::UdpDual)
    }

    /// Is it a stream over IPv4 or IPv6?
    #[must_use]
    pub const fn is_tcp(self) -> bool {
        matches!(self, Self::V4 | Self::V6Only | Self::Dual)
    }

    /// Is its domain AF_INET6?
    #[must_use]
    pub const fn is_v6(self) -> bool {
        matches!(self, Self::V6Only | Self::Dual | Self::UdpV6Only | Self::UdpDual)
    }

    /// Is its domain AF_INET6, and are IPv4 clients taken?
    #[must_use]
    pub const fn is_dual(self) -> bool {
        matches!(self, Self::Dual | Self::UdpDual)
    }

    /// What it takes, the best first.
    const fn takes(self) -> &'static [Self] {
        match self {
            Self::V4 => &[Self::V4],
            Self::V6Only => &[Self::V6Only, Self::Dual],
            Self::Dual => &[Self::Dual, Self::V4, Self::V6Only],
            Self::Unix => &[Self::Unix],
            Self::UnixPackets => &[Self::UnixPackets],
            // A service answers to the address that it has read, by the same socket: no other family would do, and a dual one has IPv6 clients
            // as an IPv6-only one has them.
            Self::UdpV4 => &[Self::UdpV4],
            Self::UdpV6Only => &[Self::UdpV6Only, Self::UdpDual],
            Self::UdpDual => &[Self::UdpDual],
            Self::Other => &[],
        }
    }

    /// The place among `listeners` of the one that a service with a socket of this family gets.
    #[must_use]
    pub fn choose(self, listeners: &[Self]) -> Option<usize> {
        self.takes().iter().find_map(|fits| listeners.iter().position(|listener| listener == fits))
    }
}

#[cfg(test)]
mod tests {
    use super::Family::{self, Dual, Other, UdpDual, UdpV4, UdpV6Only, Unix, UnixPackets, V4, V6Only};

    #[test]
    fn the_best_fit_and_no_misfit() {
        let cases: [(Family, &[Family], Option<usize>); 21] = [
            (V4, &[Dual, V6Only, V4], Some(2)),
            (V4, &[Dual, V6Only], None),
            (V6Only, &[V4, Dual, V6Only], Some(2)),
            (V6Only, &[V4, Dual], Some(1)),
            (V6Only, &[V4], None),
            (Dual, &[V4, V6Only, Dual], Some(2)),
            (Dual, &[V6Only, V4], Some(1)),
            (Dual, &[V6Only], Some(0)),
            (Dual, &[Unix], None),
            (Unix, &[V4, Unix], Some(1)),
            (Unix, &[UnixPackets], None),
            (UnixPackets, &[Unix, UnixPackets], Some(1)),
            (UnixPackets, &[], None),
            (V4, &[V4, V4], Some(0)),
            (UdpV4, &[V4, UdpDual, UdpV6Only, UdpV4], Some(3)),
            (UdpV4, &[V4, UdpDual], None),
            (UdpV6Only, &[UdpDual, UdpV6Only], Some(1)),
            (UdpV6Only, &[UdpV4, UdpDual], Some(1)),
            (UdpDual, &[UdpV6Only, UdpV4, Dual], None),
            (Dual, &[UdpDual], None),
            (Unix, &[Other, Unix], Some(1)),
        ];
        for (service, listeners, expected) in cases {
            assert_eq!(service.choose(listeners), expected, "{service:?} of {listeners:?}");
        }
    }
}
