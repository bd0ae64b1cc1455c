//! The files that `bro activate` writes, as text: sockets, the forwarder's service, and the quadlet's drop-in. Pure: what is
//! written depends on nothing but the arguments, so that a second run can tell whether anything has changed.

mod agent;
mod drop_in;
mod hardening;
mod namespaces;
mod profile;
mod runtime;
mod service;
mod socket;
mod timer;
mod validate;

use std::path::{Path, PathBuf};

pub use agent::{DESCRIPTOR as AGENT_DESCRIPTOR, listener_path};
pub use drop_in::DropIn;
pub use profile::{MadeProfile, profile_text, wrote as wrote_profile};

pub use runtime::RuntimeLink;

use crate::adopt::Adopt;
use crate::exit::Failure;
use crate::installed::{
    ADOPTS, ADOPTS_WHAT, Adoption, CONNECTS, Forwarder, Installed, Mode, RESTRICTED, TRUSTS_LOOPBACK,
};
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

/// Every file of an activated service but the seccomp profile of one whose sockets are adopted, which is made of another file. `root` is what lies above all paths and is not part of what units say; `has_steps` is whether
/// systemd knows RestartSteps=.
///
/// # Errors
/// [`Failure::Usage`] when some of it cannot stand in a unit file.
pub fn files(
    installed: &Installed,
    drop_in: Option<&DropIn>,
    (root, has_steps): (Option<&Path>, bool),
) -> Result<Vec<File>, Failure> {
    validate::check(installed, drop_in)?;
    let mut files: Vec<File> = installed
        .listeners
        .iter()
        .map(|listener| File {
            path: listener.socket.file.clone(),
            text: socket::text(installed, listener, root),
        })
        .collect();
    if let Some(forwarder) = installed.forwarder() {
        let text = service::text(installed, forwarder, root, has_steps);
        files.push(File { path: forwarder.service_file.clone(), text });
    }
    if let (Some(spans), Some(path)) = (installed.kept_awake(), installed.timer_file()) {
        files.push(File { path, text: timer::text(installed, &spans) });
    }
    if let (Some(drop_in), Some(path)) = (drop_in, &installed.drop_in) {
        files.push(File { path: path.clone(), text: drop_in.text(installed) });
    }
    match &installed.mode {
        Mode::Forward(_) => {}
        Mode::Adopt(adoption) => {
            files.push(File { path: adoption.agent.file.clone(), text: agent::text(installed, adoption) });
        }
        Mode::Direct(takeover) => files.extend(
            takeover
                .pause_unit
                .as_ref()
                .map(|path| File { path: path.clone(), text: namespaces::text(installed) }),
        ),
    }
    Ok(files)
}

/// The text at the top of each file; `own` is where the administrator's own changes belong.
fn heading(installed: &Installed, own: Option<&str>) -> String {
    let name = &installed.name;
    let quadlet = installed.quadlet.file_name().unwrap_or_default().to_string_lossy();
    let own = own.map(|unit| format!("; changes of your own belong into {unit}.d/")).unwrap_or_default();
    format!(
        "{MARKER} for {quadlet}, and written anew by each further run{own}.\n\
         # To undo everything: bro activate {name} --remove\n\n"
    )
}

/// `[X-Bro]`, from which [`crate::installed`] reads everything back.
fn notes(installed: &Installed, root: Option<&Path>) -> Vec<(&'static str, String)> {
    let said = |path: &Path| unrooted(path, root).display().to_string();
    let mut notes =
        vec![("Quadlet", installed.quadlet.display().to_string()), ("Unit", installed.unit.clone())];
    if let Some(container) = installed.container() {
        notes.push(("Container", container.to_owned()));
    }
    if let Some(owner) = &installed.run_as {
        notes.extend([("RunAs", owner.name.clone()), ("RunAsId", owner.uid.to_string())]);
    }
    let option = |(name, value): (&str, &str)| ("Option", format!("{name}={value}"));
    let mut note_forwarder = |forwarder: &Forwarder| {
        if forwarder.container_given {
            notes.push(("ContainerGiven", "yes".to_owned()));
        }
        notes.extend(forwarder.options.iter().map(option));
    };
    match &installed.mode {
        Mode::Forward(forwarder) => note_forwarder(forwarder),
        Mode::Adopt(Adoption { forwarder, what, source, trusts_loopback, connects, .. }) => {
            note_forwarder(forwarder);
            notes.push((ADOPTS, source.display().to_string()));
            notes.extend((*what != Adopt::On).then(|| (ADOPTS_WHAT, what.word().to_owned())));
            notes.extend(trusts_loopback.then(|| (TRUSTS_LOOPBACK, "yes".to_owned())));
            notes.extend(connects.iter().map(|connects| (CONNECTS, connects.to_string())));
        }
        Mode::Direct(takeover) => {
            notes.push(option(("direct", takeover.way.word())));
            notes.extend(takeover.pause_unit.is_some().then(|| option((RESTRICTED, "yes"))));
        }
    }
    notes.extend(installed.others().map(|path| ("Also", said(path))));
    notes.extend(installed.made.iter().map(|path| ("Made", said(path))));
    notes
}
