//! What a quadlet says that excludes activation.

use super::plan::Paths;
use crate::exit::Failure;
use crate::podman::quadlet::{self, Kind, Quadlet};
use crate::run_as::RunAsUser;

/// Refuses a unit that systemd would never start for bro, or that would never be there.
pub(super) fn check(quadlet: &Quadlet, direct: bool) -> anyhow::Result<()> {
    let (file, unit) = (quadlet.file_name(), &quadlet.unit);
    let refuse = |text: String| Err(Failure::Usage(text).into());
    // A start by a socket is not a manual start.
    if !direct && quadlet.file.boolean("Unit", "RefuseManualStart") == Some(true) {
        return refuse(format!(
            "RefuseManualStart=yes in {file}: systemd refuses to start {unit} on request, and so for bro; remove that line"
        ));
    }
    if quadlet.file.boolean("Unit", "StopWhenUnneeded") == Some(true) {
        return refuse(format!(
            "StopWhenUnneeded=yes in {file}: systemd stops {unit} under its clients whenever no other unit needs it, and a client is no \
             unit; remove that line{}",
            if direct {
                ""
            } else {
                ", bro stops it when no client is connected and no running unit needs it"
            }
        ));
    }
    if direct && quadlet.file.value("Service", "Type") == Some("oneshot") {
        return refuse(format!(
            "Type=oneshot in {file}: {unit} never becomes active while it serves, so systemd ends it as one that does not start; \
             remove that line"
        ));
    }
    Ok(())
}

/// The pod of a container, if it is part of one that is there: its network is the container's.
pub(super) fn pod_of(quadlet: &Quadlet, owner: Option<&RunAsUser>, places: &Paths) -> Option<Quadlet> {
    let pod = quadlet.value("Pod").filter(|_| quadlet.kind == Kind::Container)?;
    quadlet::find(pod, places.scope, owner, places.root.as_deref()).ok()
}
