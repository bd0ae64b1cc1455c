//! The files that `bro activate` writes, as text: sockets, the forwarder's service, and the quadlet's drop-in. Pure: what is
//! written depends on nothing but the arguments, so that a second run can tell whether anything has changed.

mod drop_in;
mod hardening;
mod namespaces;
mod service;
mod socket;
mod timer;
mod validate;

use std::path::{Path, PathBuf};

pub use drop_in::{DropIn, RESTRICTED};
pub(crate) use namespaces::unit as pause_unit;

use crate::exit::Failure;
use crate::installed::Installed;
use crate::paths::unrooted;
use crate::systemd::unit_file::MARKER;

/// A file to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Where.
    pub path: PathBuf,
    /// What.
    pub text: String,
}

/// Every file of an activated service. `bro` is the program that the service runs; `root` is what lies above all paths and is not
/// part of what units say; `has_steps` is whether systemd knows RestartSteps=.
///
/// # Errors
/// [`Failure::Usage`] when some of it cannot stand in a unit file.
pub fn files(
    activated: &Installed,
    bro: &Path,
    drop_in: Option<&DropIn>,
    (root, has_steps): (Option<&Path>, bool),
) -> Result<Vec<File>, Failure> {
    validate::check(activated, bro, drop_in)?;
    let mut files: Vec<File> = activated
        .listeners
        .iter()
        .map(|listener| File { path: listener.file.clone(), text: socket::text(activated, listener, root) })
        .collect();
    if let Some(path) = &activated.service_file {
        files.push(File { path: path.clone(), text: service::text(activated, bro, root, has_steps) });
    }
    if let (Some(spans), Some(path)) = (activated.kept_awake(), activated.timer_file()) {
        files.push(File { path, text: timer::text(activated, &spans) });
    }
    if let (Some(drop_in), Some(path)) = (drop_in, &activated.drop_in) {
        files.push(File { path: path.clone(), text: drop_in.text(activated) });
    }
    if let Some(path) = &activated.pause_unit {
        files.push(File { path: path.clone(), text: namespaces::text(activated) });
    }
    Ok(files)
}

/// The text at the top of each file; `own` is where the administrator's own changes belong.
fn heading(activated: &Installed, own: Option<&str>) -> String {
    let name = &activated.name;
    let quadlet = activated.quadlet.file_name().unwrap_or_default().to_string_lossy();
    let own = own.map(|unit| format!("; changes of your own belong into {unit}.d/")).unwrap_or_default();
    format!(
        "{MARKER} for {quadlet}, and written anew by each further run{own}.\n\
         # To undo everything: bro activate {name} --remove\n\n"
    )
}

/// `[X-Bro]`, from which [`crate::installed`] reads everything back.
fn notes(activated: &Installed, root: Option<&Path>) -> Vec<(&'static str, String)> {
    let said = |path: &Path| unrooted(path, root).display().to_string();
    let mut notes =
        vec![("Quadlet", activated.quadlet.display().to_string()), ("Unit", activated.unit.clone())];
    if let Some(container) = &activated.container {
        notes.push(("Container", container.clone()));
    }
    if let Some(owner) = &activated.run_as {
        notes.extend([("RunAs", owner.name.clone()), ("RunAsId", owner.uid.to_string())]);
    }
    if activated.container_given {
        notes.push(("ContainerGiven", "yes".to_owned()));
    }
    notes.extend(activated.options.iter().map(|(name, value)| ("Option", format!("{name}={value}"))));
    notes.extend(activated.others().map(|path| ("Also", said(path))));
    notes.extend(activated.made.iter().map(|path| ("Made", said(path))));
    notes
}
