//! Where things are: folders of units and configuration, and the same below another root (`--root`).

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::systemd::scope::RuntimeScope;

/// Where `bro activate` puts units.
///
/// # Errors
/// When there is no home directory.
pub fn unit_directory(scope: RuntimeScope) -> anyhow::Result<PathBuf> {
    match scope {
        RuntimeScope::System => Ok("/etc/systemd/system".into()),
        RuntimeScope::User => Ok(config_home()?.join("systemd/user")),
    }
}

/// `$XDG_CONFIG_HOME`, or what stands for it.
///
/// # Errors
/// When neither the environment nor the user database names a home directory.
pub fn config_home() -> anyhow::Result<PathBuf> {
    let absolute =
        |name| std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    if let Some(config) = absolute("XDG_CONFIG_HOME") {
        return Ok(config);
    }
    if let Some(home) = absolute("HOME") {
        return Ok(home.join(".config"));
    }
    let user =
        nix::unistd::User::from_uid(nix::unistd::geteuid())?.context("this user has no home directory")?;
    Ok(user.dir.join(".config"))
}

/// `$XDG_RUNTIME_DIR` of the user that this process acts as, or what stands for it.
pub(crate) fn runtime_directory() -> PathBuf {
    // While root acts as a user, its environment is not that user's.
    let own = nix::unistd::getuid() == nix::unistd::geteuid();
    let said = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| own).map(PathBuf::from);
    said.unwrap_or_else(|| runtime_directory_of(nix::unistd::geteuid().as_raw()))
}

/// Where logind has a user's.
pub(crate) fn runtime_directory_of(uid: u32) -> PathBuf {
    format!("/run/user/{uid}").into()
}

/// `path`, below `root` where there is one.
pub(crate) fn below(root: Option<&Path>, path: &Path) -> PathBuf {
    match root {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    }
}

/// A path as units name it.
pub(crate) fn unrooted(path: &Path, root: Option<&Path>) -> PathBuf {
    let inside = root.and_then(|root| path.strip_prefix(root).ok());
    inside.map_or_else(|| path.to_owned(), |inside| Path::new("/").join(inside))
}
