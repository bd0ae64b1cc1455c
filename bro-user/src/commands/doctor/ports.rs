//! What is in the way of the external ports: the quadlet's own PublishPort=, and addresses that the host lacks.

use super::{Check, listens};
use crate::address::External;
use crate::commands::activate::publish_port;
use crate::installed::Installed;
use crate::podman::quadlet::Quadlet;
use crate::unassigned_address;

const NAME: &str = "ports";

pub(super) fn check(known: &Installed, quadlet: Option<&Quadlet>) -> Vec<Check> {
    let mut checks = Vec::new();
    for listener in &known.listeners {
        let Ok(external) = listener.address.parse::<External>() else { continue };
        for clash in quadlet.iter().flat_map(|quadlet| publish_port::in_the_way(quadlet, &external)) {
            checks.push(Check::bad(
                NAME,
                clash,
                format!(
                    "remove that line, then `{} daemon-reload`",
                    super::hints::Whose::container(known).systemctl()
                ),
            ));
        }
        if let Some(finding) = unassigned_address::sentence(&external) {
            let service = listens::service_name(known, listener);
            let port = external.port().unwrap_or_default();
            checks.push(Check::bad(
                NAME,
                finding,
                format!(
                    "{}; `{} {}{service} --external-port {port}` listens at all of them",
                    unassigned_address::MEND,
                    listens::activate(known),
                    known.name
                ),
            ));
        }
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::service::tests::{known, quadlet};
    use super::*;
    use crate::installed::InstalledPort;
    use crate::podman::quadlet::Kind;

    #[test]
    fn what_is_in_the_way_is_named_with_its_mend() {
        let mut known = known(Some("systemd-web"), false);
        let mut listen = |address: &str| {
            known.listeners = vec![InstalledPort {
                service: "web".into(),
                socket: "web-activator.socket".into(),
                file: "/units/web-activator.socket".into(),
                address: address.into(),
                target: Some("127.0.0.1:80".into()),
                backlog: None,
                device: None,
            }];
            known.clone()
        };
        let publishing = quadlet(Kind::Container, "[Container]\nPublishPort=8150:80\n", Ok("systemd-web"));
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
