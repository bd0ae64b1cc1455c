//! The files that `bro activate` writes, as text: sockets, the forwarder's service, and the quadlet's drop-in. Pure: what is
//! written depends on nothing but the arguments, so that a second run can tell whether anything has changed.

mod drop_in;
mod service;
mod socket;

use std::path::{Path, PathBuf};

pub use drop_in::DropIn;

use crate::activated::{Activated, MARKER};

/// A file to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Where.
    pub path: PathBuf,
    /// What.
    pub text: String,
}

/// Every file of an activated service. `bro` is the program that the service runs.
#[must_use]
pub fn files(activated: &Activated, bro: &Path, drop_in: Option<&DropIn>) -> Vec<File> {
    let mut files: Vec<File> = activated
        .listeners
        .iter()
        .map(|listener| File { path: listener.file.clone(), text: socket::text(activated, listener) })
        .collect();
    if let Some(path) = &activated.service_file {
        files.push(File { path: path.clone(), text: service::text(activated, bro) });
    }
    if let (Some(drop_in), [path, ..]) = (drop_in, activated.others.as_slice()) {
        files.push(File { path: path.clone(), text: drop_in.text(activated) });
    }
    files
}

/// What stands at the top of each file; `own` is where changes of the administrator's own belong.
fn heading(activated: &Activated, own: Option<&str>) -> String {
    let name = &activated.name;
    let quadlet = activated.quadlet.file_name().unwrap_or_default().to_string_lossy();
    let own = own.map(|unit| format!("; changes of your own belong into {unit}.d/")).unwrap_or_default();
    format!(
        "{MARKER} for {quadlet}, and written anew by each further run{own}.\n\
         # To undo everything: bro activate {name} --remove\n\n"
    )
}

/// `[X-Bro]`, from which [`crate::activated`] reads everything back.
fn notes(activated: &Activated) -> Vec<(&'static str, String)> {
    let mut notes =
        vec![("Quadlet", activated.quadlet.display().to_string()), ("Unit", activated.unit.clone())];
    if let Some(container) = &activated.container {
        notes.push(("Container", container.clone()));
    }
    if activated.container_given {
        notes.push(("ContainerGiven", "yes".to_owned()));
    }
    notes.extend(activated.options.iter().map(|(name, value)| ("Option", format!("{name}={value}"))));
    notes.extend(activated.others.iter().map(|path| ("Also", path.display().to_string())));
    notes.extend(activated.made.iter().map(|path| ("Made", path.display().to_string())));
    notes
}
