//! The `bro` binary, built in release for the tasks that run it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The cargo that runs this task, so that its toolchain is kept.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// The `bro` binary in release: the one `BRO_BIN` names, else built by cargo into this task's own target folder.
pub fn bro() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BRO_BIN").map(PathBuf::from) {
        ensure!(path.is_file(), "BRO_BIN names {}, which is no file", path.display());
        return Ok(path);
    }
    // Not --quiet: the first time takes minutes, and silence would look like a fault.
    let built = cargo()
        .args(["build", "--release", "--package", "bro-user", "--bin", "bro"])
        .status()
        .context("cannot run cargo")?;
    ensure!(built.success(), "cargo could not build the bro binary");
    Ok(target_folder()?.join("release/bro"))
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
