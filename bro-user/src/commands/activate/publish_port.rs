//! A `PublishPort=` of the quadlet: does it need a port that systemd is to listen at, and which one of the container is behind it?

use std::net::IpAddr;

use crate::address::{External, PortProtocol, Ports};
use crate::podman::quadlet::Quadlet;

/// A published port, or a range, as far as it names the host's: `[IP:]HOST:CONTAINER[/PROTOCOL]`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PublishedPorts {
    /// `None` is every address.
    ip: Option<IpAddr>,
    host: Ports,
    /// The first of the container's.
    container: u16,
}

impl PublishedPorts {
    /// Reads it. `None`: Podman chooses the host's port, or it is of another protocol than TCP and UDP.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let (text, protocol) = PortProtocol::split(text).ok()?;
        let (rest, container) = text.rsplit_once(':')?;
        let (ip, host) = rest.rsplit_once(':').map_or((None, rest), |(ip, host)| (Some(ip), host));
        let (first, last) = host.split_once('-').unwrap_or((host, host));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        Some(Self {
            // An IPv6 address stands in brackets.
            ip: ip.and_then(|ip| ip.trim_start_matches('[').trim_end_matches(']').parse().ok()),
            host: Ports { first, last, protocol: protocol.unwrap_or(PortProtocol::Tcp) },
            container: container.split_once('-').map_or(container, |(first, _)| first).parse().ok()?,
        })
        .filter(|published| published.host.first <= published.host.last)
    }

    /// The ports that both need.
    fn clash(&self, external: &External) -> Option<Ports> {
        let ports = external.ports()?;
        let protocol = if ports.protocol == PortProtocol::Both { self.host.protocol } else { ports.protocol };
        let both =
            Ports { first: ports.first.max(self.host.first), last: ports.last.min(self.host.last), protocol };
        (ports.overlap(self.host) && overlap(self.ip, external.ip())).then_some(both)
    }
}

/// The sentences about the lines that are in the way.
pub(crate) fn in_the_way(quadlet: &Quadlet, external: &External) -> Vec<String> {
    let all = quadlet.values("PublishPort").into_iter();
    all.filter_map(|publish| Some(sentence(publish, clash(publish, external)?, quadlet))).collect()
}

/// What a clash leads to.
pub(super) fn sentence(publish: &str, ports: Ports, quadlet: &Quadlet) -> String {
    let word = if ports.beyond_first() > 0 { "ports" } else { "port" };
    format!(
        "PublishPort={publish} in {} takes {word} {ports} as well: while systemd listens there the container cannot start",
        quadlet.file_name()
    )
}

/// The ports that the line needs too.
pub(super) fn clash(publish: &str, external: &External) -> Option<Ports> {
    PublishedPorts::read(publish)?.clash(external)
}

/// The container's port that the quadlet publishes at the first of the external ones, if all of them are of one line.
pub(super) fn behind(quadlet: &Quadlet, external: &External) -> Option<u16> {
    let wanted = external.ports()?;
    quadlet.values("PublishPort").into_iter().find_map(|publish| {
        let published = PublishedPorts::read(publish)?;
        let both = published.clash(external)?;
        let whole = (both.first, both.last) == (wanted.first, wanted.last);
        published.container.checked_add(wanted.first - published.host.first).filter(|_| whole)
    })
}

fn overlap(one: Option<IpAddr>, other: Option<IpAddr>) -> bool {
    let particular = |ip: Option<IpAddr>| ip.filter(|ip| !ip.is_unspecified());
    match (particular(one), particular(other)) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::podman::quadlet::QuadletKind;
    use crate::systemd::unit_file::UnitFile;

    #[test]
    fn the_same_port_of_another_address_or_protocol_is_no_clash() {
        let clash = |publish: &str, external: &str| clash(publish, &external.parse().unwrap()).is_some();
        assert!(!clash("127.0.0.2:18080:80", "127.0.0.1:18080"));
        assert!(clash("127.0.0.1:18080:80", "127.0.0.1:18080"));
        assert!(clash("[::1]:18080:80/tcp", "[::1]:18080") && !clash("[::1]:18080:80", "127.0.0.1:18080"));
        for publish in ["18080:80", "0.0.0.0:18080:80", "[::]:18080:80", "18000-18100:80-180"] {
            assert!(clash(publish, "127.0.0.1:18080"), "{publish}");
            assert!(clash(publish, "18080"), "{publish}");
        }
        assert!(clash("127.0.0.2:18080:80", "18080") && clash("127.0.0.2:18080:80", "0.0.0.0:18080"));
        assert!(!clash("18081:80", "18080") && !clash("18080:80", "/run/web.sock"));
        assert!(
            clash("53:53/udp", "53/udp") && clash("53:53/udp", "53/tcp+udp") && !clash("53:53/udp", "53")
        );
        assert!(clash("8003-8009:3-9", "8000-8003") && !clash("8004:4", "8000-8003"));
    }

    #[test]
    fn ports_that_podman_chooses_are_none() {
        for text in ["80", "127.0.0.1::80", "53:53/sctp", "90-80:1-11", "x:80"] {
            assert_eq!(PublishedPorts::read(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_behind_a_published_port_is_known() {
        let text =
            "[Container]\nPublishPort=5353:53/udp\nPublishPort=8080:80\nPublishPort=9000-9009:1000-1009\n";
        let quadlet = Quadlet {
            name: "web".into(),
            kind: QuadletKind::Container,
            path: "web.container".into(),
            file: UnitFile::parse(text),
            unit: "web.service".into(),
            container: Ok("systemd-web".into()),
        };
        let behind = |external: &str| behind(&quadlet, &external.parse().unwrap());
        assert_eq!(behind("5353/udp"), Some(53));
        assert_eq!(behind("127.0.0.1:8080"), Some(80));
        assert_eq!(behind("9002-9004"), Some(1002));
        assert_eq!((behind("5353"), behind("9005-9010"), behind("/run/x")), (None, None, None));
        let said = in_the_way(&quadlet, &"9008-9020".parse().unwrap());
        assert!(said[0].contains("takes ports 9008-9009 as well"), "{said:?}");
        let said = in_the_way(&quadlet, &"5353/tcp+udp".parse().unwrap());
        assert!(said.len() == 1 && said[0].contains("takes port 5353/udp as well"), "{said:?}");
    }
}
