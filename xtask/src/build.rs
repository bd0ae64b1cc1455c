//! The `bro` binary for the tasks that run it: the one that packages hold.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow};

/// The cargo that runs this task, so that its toolchain is kept.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// The `bro` binary: the one `BRO_BIN` names, else that of the packages, which cargo builds where it is out of date.
pub fn bro() -> Result<PathBuf> {
    named().unwrap_or_else(crate::dist::binary)
}

/// The `bro` binary as it is installed: the one `BRO_BIN` names, else the file in the packages' tree, laid out anew.
pub fn installed_bro() -> Result<PathBuf> {
    named().unwrap_or_else(crate::dist::installed_binary)
}

fn named() -> Option<Result<PathBuf>> {
    let path = PathBuf::from(std::env::var_os("BRO_BIN")?);
    Some(if path.is_file() {
        Ok(path)
    } else {
        Err(anyhow!("BRO_BIN names {}, which is no file", path.display()))
    })
}

/// Where cargo builds.
pub fn target_folder() -> Result<PathBuf> {
    let task = std::env::current_exe().context("this task's own path")?;
    Ok(task.ancestors().nth(2).context("this task lives in target/PROFILE")?.to_owned())
}

/// The clone that `cargo xtask` was typed in, even when clones share a target folder.
pub fn workspace() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).parent().map_or_else(|| ".".into(), Path::to_path_buf)
}
