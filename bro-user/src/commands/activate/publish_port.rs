//! Does a `PublishPort=` of the quadlet need the address that systemd is to listen at?

use std::net::IpAddr;

use super::plan::published;
use crate::address::External;
use crate::podman::quadlet::Quadlet;

/// The sentences about the lines that are in the way.
pub(crate) fn in_the_way(quadlet: &Quadlet, external: &External) -> Vec<String> {
    let port = external.port().unwrap_or_default();
    let all = quadlet.values("PublishPort").into_iter().filter(|publish| clashes(publish, external));
    all.map(|publish| sentence(publish, port, quadlet)).collect()
}

/// What a clash leads to.
pub(super) fn sentence(publish: &str, port: u16, quadlet: &Quadlet) -> String {
    format!(
        "PublishPort={publish} in {} takes port {port} as well: while systemd listens there the container cannot start",
        quadlet.file_name()
    )
}

/// `None` is every address, which clashes with any.
pub(super) fn clashes(publish: &str, external: &External) -> bool {
    let (Some(ports), Some(port)) = (published(publish), external.port()) else { return false };
    let ours = match external {
        External::Address(address) => Some(address.ip()),
        _ => None,
    };
    ports.contains(&port) && overlap(ip(publish), ours)
}

fn overlap(one: Option<IpAddr>, other: Option<IpAddr>) -> bool {
    let particular = |ip: Option<IpAddr>| ip.filter(|ip| !ip.is_unspecified());
    match (particular(one), particular(other)) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    }
}

/// The address of `[[IP:][HOST]:]CONTAINER[/PROTOCOL]`; an IPv6 address stands in brackets.
fn ip(publish: &str) -> Option<IpAddr> {
    let (rest, _container) = publish.rsplit_once(':')?;
    let (ip, _host) = rest.rsplit_once(':')?;
    ip.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_port_of_another_address_is_no_clash() {
        let clash = |publish: &str, external: &str| clashes(publish, &external.parse().unwrap());
        assert!(!clash("127.0.0.2:18080:80", "127.0.0.1:18080"));
        assert!(clash("127.0.0.1:18080:80", "127.0.0.1:18080"));
        assert!(clash("[::1]:18080:80/tcp", "[::1]:18080") && !clash("[::1]:18080:80", "127.0.0.1:18080"));
        for publish in ["18080:80", "0.0.0.0:18080:80", "[::]:18080:80", "18000-18100:80-180"] {
            assert!(clash(publish, "127.0.0.1:18080"), "{publish}");
            assert!(clash(publish, "18080"), "{publish}");
        }
        assert!(clash("127.0.0.2:18080:80", "18080") && clash("127.0.0.2:18080:80", "0.0.0.0:18080"));
        assert!(!clash("18081:80", "18080") && !clash("18080:80", "/run/web.sock"));
    }
}
