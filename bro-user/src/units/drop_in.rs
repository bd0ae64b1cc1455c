//! NAME.container.d/50-bro-activator.conf: what the quadlet needs to be woken.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::RuntimeLink;
use crate::installed::{Installed, Mode, pause_unit_of};
use crate::systemd::unit_file::UnitFile;

/// The contents of the drop-in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DropIn {
    /// Without a network there is none to wait for: Podman's units wait for network-online.target, a rootless one for up to 90
    /// seconds where nothing else asks for that target.
    pub no_network: bool,
    /// With `--direct`: the container's unit and its sockets belong together.
    pub sockets: Vec<String>,
    /// nginx finds passed sockets by this variable only.
    pub nginx: bool,
    /// `Notify=` of the quadlet waits for a message that nginx never sends.
    pub never_notifies: bool,
    /// With `--adopt`: the profile by which the forwarder hears of the container's listen(2).
    pub profile: Option<PathBuf>,
    /// With `--adopt`: the runtime that keeps the container from connecting.
    pub runtime: Option<RuntimeLink>,
}

impl DropIn {
    /// Reads what was written, with the sockets of `rest`.
    #[must_use]
    pub fn read(file: &UnitFile, rest: &Installed) -> Self {
        let own = file.words("Unit", "Requires");
        Self {
            no_network: file.value("Quadlet", "DefaultDependencies").is_some(),
            sockets: rest
                .listeners
                .iter()
                .map(|listener| listener.socket.name.clone())
                .filter(|_| !own.is_empty())
                .collect(),
            nginx: file.value("Container", "Environment").is_some(),
            never_notifies: file.value("Container", "Notify").is_some(),
            profile: file.value("Container", "SeccompProfile").map(|path| path.replace("%%", "%").into()),
            runtime: RuntimeLink::read(file),
        }
    }

    /// Is there anything to say?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn text(&self, installed: &Installed) -> String {
        let mut text = super::heading(installed, None);
        let mut sections: Vec<String> = Vec::new();
        let restricted = matches!(&installed.mode, Mode::Direct(takeover) if takeover.pause_unit.is_some());
        if !self.sockets.is_empty() {
            let sockets = self.sockets.join(" ");
            let mut section = format!(
                "# Also when it is started by hand it gets its sockets.\n[Unit]\nRequires={sockets}\nAfter={sockets}\n\
                 # Its clients start it, however often: at this limit systemd would stop listening for good.\n\
                 StartLimitIntervalSec=0\n"
            );
            if restricted {
                let pause = pause_unit_of(&installed.name);
                write!(
                    section,
                    "# Makes the namespaces, which this unit may not.\nWants={pause}\nAfter={pause}\n"
                )
                .ok();
            }
            sections.push(section);
        }
        // A user's container and the system's sockets have other managers.
        let agent = installed.adoption().map(|adoption| &adoption.agent.name);
        if let Some(agent) = agent.filter(|_| installed.run_as.is_none()) {
            sections.push(format!(
                "# Without this socket no command could be run in it, and it could not be started.\n[Unit]\nWants={agent}\nAfter={agent}\n"
            ));
        }
        let mut container = String::new();
        if let Some(profile) = &self.profile {
            // The generator takes it as it is, for ExecStart=.
            let profile = profile.display().to_string().replace('%', "%%");
            write!(
                container,
                "# Podman's own, or the quadlet's, which besides tells the forwarder of listen(2).\nSeccompProfile={profile}\n"
            )
            .ok();
        }
        if let Some(runtime) = &self.runtime {
            container.push_str(&runtime.container());
        }
        if self.nginx {
            // sd_listen_fds(3): passed descriptors begin with 3.
            let descriptors: String =
                (3..3 + self.sockets.len()).map(|number| format!("{number};")).collect();
            writeln!(container, "Environment=NGINX={descriptors}").ok();
            if self.never_notifies {
                container.push_str("# nginx sends no READY=1.\nNotify=false\n");
            }
        }
        if restricted {
            let netns = super::namespaces::netns(&installed.name);
            write!(
                container,
                "# No network but loopback, as before, in a namespace that is there already.\nNetwork=\nNetwork=ns:{netns}\n\
                 # There is no way to a registry.\nPull=never\n"
            )
            .ok();
        }
        if !container.is_empty() {
            sections.push(format!("[Container]\n{container}"));
        }
        let mut service = self.runtime.as_ref().map(RuntimeLink::service).unwrap_or_default();
        // The socket with the container unit's name belongs to it without a word.
        if self.sockets.len() > 1 {
            writeln!(service, "Sockets={}", self.sockets.join(" ")).ok();
        }
        if restricted {
            service.push_str(
                "# The passed sockets are not affected.\nRestrictAddressFamilies=AF_UNIX AF_NETLINK\nNoNewPrivileges=yes\n",
            );
        }
        if !service.is_empty() {
            sections.push(format!("[Service]\n{service}"));
        }
        if self.no_network {
            sections.push(
                "# Network=none: there is no network to wait for at the first connection.\n[Quadlet]\n\
                 DefaultDependencies=false\n"
                    .to_owned(),
            );
        }
        write!(text, "{}", sections.join("\n")).ok();
        text
    }
}
