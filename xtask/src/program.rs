//! The `bro` binary for the tasks that run it: the one that packages hold.

use std::path::PathBuf;

use anyhow::{Result, anyhow};

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
