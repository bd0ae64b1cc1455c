//! Which bro the units run.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::plan::Paths;
use crate::exit::Failure;
use crate::installed::Installed;
use crate::systemd::scope::RuntimeScope;

/// The program that runs now, by its own path: `bro-activate` may be a link to it.
pub(super) fn path(places: &Paths) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe().context("cannot tell where bro itself is")?;
    // In an image's tree it is where an administrator would put it.
    let inside = places.root.as_deref().and_then(|root| path.strip_prefix(root).ok());
    let path = inside.map_or(path.clone(), |inside| Path::new("/").join(inside));
    let text = path.to_string_lossy();
    anyhow::ensure!(
        !text.contains(['$', '"', '\\']) && !text.contains(char::is_control),
        "the path of bro itself, {text}, cannot stand in a unit file; install it elsewhere"
    );
    anyhow::ensure!(!text.ends_with(" (deleted)"), "the bro that runs has been replaced; run the new one");
    Ok(path)
}

/// The user that the forwarder runs as has to be able to execute it.
pub(super) fn check(wanted: &Installed, places: &Paths) -> anyhow::Result<()> {
    let Some(owner) = wanted.run_as.as_ref().filter(|_| places.root.is_none()) else { return Ok(()) };
    let path = std::env::current_exe().context("cannot tell where bro itself is")?;
    let may = {
        let _acting = owner.act()?;
        nix::unistd::eaccess(&path, nix::unistd::AccessFlags::X_OK).is_ok()
    };
    if may {
        return Ok(());
    }
    let (shown, name) = (path.display(), &owner.name);
    Err(Failure::NotPermitted(format!(
        "{name} may not execute {shown}; install it: sudo install {shown} /usr/local/bin/bro, and run that (nothing was changed)"
    ))
    .into())
}

/// What is doubtful about that path.
pub(super) fn warning(places: &Paths) -> Option<String> {
    if places.root.is_some() {
        return None;
    }
    let path = std::env::current_exe().ok()?;
    let shown = path.display();
    if places.scope == RuntimeScope::System {
        let loose = path.ancestors().find(|part| {
            std::fs::metadata(part).is_ok_and(|metadata| {
                metadata.uid() != 0 || (metadata.mode() & 0o022 != 0 && metadata.mode() & 0o1000 == 0)
            })
        });
        if let Some(loose) = loose {
            return Some(format!(
                "root's service will run {shown}, which others than root can change ({}); install it: sudo install {shown} \
                 /usr/local/bin/bro",
                loose.display()
            ));
        }
    }
    let built = path.components().any(|part| part.as_os_str() == "target") || path.starts_with("/tmp");
    built.then(|| {
        format!("the units will run {shown}, which looks as if it may go; install bro, and run that")
    })
}
