//! What is in the way of the external ports: the quadlet's own PublishPort=, and addresses that the host lacks.

use super::{Check, listens};
use crate::commands::activate::publish_port;
use crate::installed::Installed;
use crate::podman::quadlet::Quadlet;
use crate::unassigned_address;

const NAME: &str = "ports";

pub(super) fn check(installed: &Installed, quadlet: Option<&Quadlet>) -> Vec<Check> {
    let mut checks = Vec::new();
    for listener in &installed.listeners {
        let external = &listener.external;
        for clash in quadlet.iter().flat_map(|quadlet| publish_port::in_the_way(quadlet, external)) {
            checks.push(Check::bad(
                NAME,
                clash,
                format!(
                    "remove that line, then `{} daemon-reload`",
                    super::hints::ManagerOwner::container(installed).systemctl()
                ),
            ));
        }
        if let Some(finding) = unassigned_address::sentence(external) {
            let service = listens::service_name(installed, listener);
            let ports = external.ports().map(|ports| ports.to_string()).unwrap_or_default();
            checks.push(Check::bad(
                NAME,
                finding,
                format!(
                    "{}; `{} {}{service} --external-port {ports}` listens at all of them",
                    unassigned_address::MEND,
                    listens::activate(installed),
                    installed.name
                ),
            ));
        }
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::service::tests::quadlet;
    use super::*;
    use crate::installed::example;
    use crate::podman::quadlet::QuadletKind;

    #[test]
    fn what_is_in_the_way_is_named_with_its_mend() {
        let mut installed = example::forwarded(Some("systemd-web"), &[]);
        let mut listen = |address: &str| {
            installed.listeners = vec![example::port(address, Some("127.0.0.1:80"))];
            installed.clone()
        };
        let publishing =
            quadlet(QuadletKind::Container, "[Container]\nPublishPort=8150:80\n", Ok("systemd-web"));
        assert!(check(&listen("8151"), Some(&publishing)).is_empty());
        let found = check(&listen("127.0.0.1:8150"), Some(&publishing));
        assert_eq!(found.len(), 1);
        assert!(
            found[0].finding.starts_with("PublishPort=8150:80 in web.container takes port 8150"),
            "{found:?}"
        );
        let found = check(&listen("203.0.113.7:8150"), None);
        assert!(found[0].finding.contains("203.0.113.7"), "{found:?}");
        assert!(
            found[0].fix.as_deref().unwrap().contains("bro activate web --external-port 8150"),
            "{found:?}"
        );
    }
}
