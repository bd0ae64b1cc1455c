//! cargo, and where it builds.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

/// The cargo that runs this task, so that its toolchain is kept.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
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
