//! The OCI runtime of a container that connects over TCP to some ports alone (`commands/oci_runtime.rs`), in the quadlet's drop-in: a link to bro, which the
//! container's unit makes in the runtime directory before it starts Podman. Containers with the same ports share one.

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::installed::Connects;
use crate::systemd::unit_file::{UnitFile, quote_word};

/// Such a runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeLink {
    /// The bro that it leads to.
    pub program: PathBuf,
    /// The runtime that bro then becomes: crun or runc.
    pub name: String,
    /// To which it may connect.
    pub ports: Vec<u16>,
}

const START: &str = "--runtime=";

impl RuntimeLink {
    /// As it was written; the ports are in the name of the folder.
    pub(super) fn read(file: &UnitFile) -> Option<Self> {
        let arguments = file.words("Container", "GlobalArgs");
        let path = arguments.iter().find_map(|word| word.strip_prefix(START))?;
        let (folder, name) = path.rsplit_once('/')?;
        let ports = match folder.rsplit_once("/tcp-")?.1.parse().ok()? {
            Connects::Ports(ports) => ports,
            Connects::Any | Connects::Never => return None,
        };
        let commands = file.values("Service", "ExecStartPre");
        let link = commands.iter().find_map(|line| line.strip_prefix("ln -sfT "))?;
        let program = crate::systemd::unit_file::split_words(link).into_iter().next()?;
        Some(Self { program: program.replace("%%", "%").into(), name: name.to_owned(), ports })
    }

    fn folder(&self) -> String {
        format!("%t/bro/runtime/tcp-{}", Connects::Ports(self.ports.clone()))
    }

    /// Of `[Container]`.
    pub(super) fn container(&self) -> String {
        format!(
            "# Over TCP it connects to no other port: by a socket of the host's, which it has, it could reach whatever listens there.\nGlobalArgs={START}{}/{}\n",
            self.folder(),
            self.name
        )
    }

    /// Of `[Service]`.
    pub(super) fn service(&self) -> String {
        let (folder, program) = (self.folder(), quote_word(&self.program.display().to_string()));
        let mut text = String::new();
        // Writing to a String cannot fail.
        write!(
            text,
            "# bro, called by that name, becomes the runtime with what that makes of the container kept from connecting (Landlock).\n\
             ExecStartPre=mkdir -p {folder}\n\
             ExecStartPre=ln -sfT {program} {folder}/{name}\n\
             # It is stopped by Podman with the same argument, also if that is newer than its start.\n\
             ExecStop=-mkdir -p {folder}\n\
             ExecStop=-ln -sfT {program} {folder}/{name}\n",
            name = self.name
        )
        .ok();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_as_it_was_written() {
        for (ports, folder) in [(vec![], "/tcp-none/"), (vec![80, 443], "/tcp-80,443/")] {
            let link = RuntimeLink { program: "/opt/b %/bro".into(), name: "crun".into(), ports };
            let text = format!("[Container]\n{}\n[Service]\n{}", link.container(), link.service());
            assert!(text.contains(folder), "{text}");
            assert_eq!(RuntimeLink::read(&UnitFile::parse(&text)), Some(link));
        }
        let own = UnitFile::parse("[Container]\nGlobalArgs=--runtime=/usr/bin/crun\n");
        assert_eq!(RuntimeLink::read(&own), None);
    }
}
