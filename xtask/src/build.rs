//! The `bro` binary, built in release for the tasks that run it.

use std::ffi::OsString;
use std::path::PathBuf;
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
    let task = std::env::current_exe().context("this task's own path")?;
    let target = task.ancestors().nth(2).context("this task lives in target/PROFILE")?;
    Ok(target.join("release/bro"))
}
