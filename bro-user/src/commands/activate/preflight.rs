//! What excludes activation: words of the quadlet, and what is activated already.

use super::present::Present;
use crate::exit::Failure;
use crate::installed::{self, Installed};
use crate::podman::quadlet::Quadlet;
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

/// Refuses to take the units of what is activated already for something else.
pub(super) fn fits(
    installed: Option<&Installed>,
    owner: Option<&RunAsUser>,
    quadlet: &Quadlet,
    present: &Present,
) -> anyhow::Result<()> {
    let Some(installed) = installed else {
        // A first run that was killed may have left the first port's socket, which is written again.
        return match present.units.leftover(&quadlet.name) {
            Some(rest) if !rest.is_only_its_first_socket() => Err(installed::in_part(&rest).into()),
            _ => Ok(()),
        };
    };
    let name = &installed.name;
    if installed.quadlet.extension() != quadlet.path.extension() {
        return Err(Failure::Usage(format!(
            "{name} is activated already, for {}; both would need the same units",
            installed.quadlet.display()
        ))
        .into());
    }
    if installed.run_as.as_ref() != owner {
        let whose = installed.run_as.as_ref().map_or("the system's own container", |owner| &owner.name);
        return Err(Failure::Usage(format!(
            "{name} is activated already, for {whose}; both would need the same units: `bro activate {name} --remove` makes room"
        ))
        .into());
    }
    Ok(())
}
