//! What tests take for a service that `bro activate` has set up.

use std::path::Path;

use super::{ForwardOptions, Forwarder, Installed, InstalledPort, Mode, SocketUnit};
use crate::systemd::scope::RuntimeScope;

/// `web` of this user, with a forwarder into `container` that has these options, and no port.
pub(crate) fn forwarded(container: Option<&str>, options: &[(&str, &str)]) -> Installed {
    let mode = Mode::Forward(forwarder(container, options));
    Installed::new(
        "web",
        RuntimeScope::User,
        "/quadlets/web.container".into(),
        "web.service".to_owned(),
        mode,
    )
}

/// Its forwarder.
pub(crate) fn forwarder(container: Option<&str>, options: &[(&str, &str)]) -> Forwarder {
    let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Forwarder {
        service_file: "/units/web-activator.service".into(),
        program: "/usr/bin/bro".into(),
        container: container.map(str::to_owned),
        container_given: false,
        options: options.collect::<ForwardOptions>(),
    }
}

/// Its first port: from the external address to the internal one, if clients are forwarded.
pub(crate) fn port(external: &str, internal: Option<&str>) -> InstalledPort {
    InstalledPort {
        service: "web".to_owned(),
        socket: SocketUnit::new("web-activator.socket", Path::new("/units")),
        external: external.parse().unwrap(),
        internal: internal.map(|target| target.parse().unwrap()),
        backlog: None,
        device: None,
        fence: None,
    }
}
