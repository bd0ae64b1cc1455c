//! The binary under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, ensure};

/// The `bro` binary: `BRO_BIN` when set (as `cargo xtask test` does, to the one that packages install), else built once by cargo
/// beside the tests.
#[must_use]
pub fn binary() -> &'static PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("BRO_BIN") {
            return path.into();
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo).args(["build", "--quiet", "--package", "bro-user"]).status();
        assert!(built.is_ok_and(|status| status.success()), "cargo could not build the bro binary");
        profile().join("bro")
    })
}

/// Whether it is the one that packages install, out of the tree that `cargo xtask dist` lays out.
#[must_use]
pub fn is_packaged() -> bool {
    binary().ends_with("dist/tree/usr/bin/bro")
}

/// The folder that cargo builds into.
fn profile() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.parent().and_then(|deps| deps.parent()).expect("a test lives in target/PROFILE/deps").to_owned()
}

/// The suites' helper program (`src/bin/peer.rs`), which cargo has built beside the tests.
#[must_use]
pub fn helper() -> PathBuf {
    profile().join("peer")
}

/// The program of the adoption suite (`src/bin/adopt`): an agent, an OCI runtime and small services.
#[must_use]
pub fn adopt() -> PathBuf {
    profile().join("adopt")
}

/// A copy of `program` in `folder`, for users who cannot look where it was built.
pub fn copy(program: &Path, folder: &Path) -> Result<PathBuf> {
    let copy = folder.join(program.file_name().context("a program has a name")?);
    copy_executable(program, &copy)?;
    Ok(copy)
}

/// Copies a file that will be executed. Another process writes it: a descriptor for writing of our own could be in whatever another
/// test starts at this moment, and until that is gone the file cannot be executed (ETXTBSY).
pub fn copy_executable(from: &Path, to: &Path) -> Result<()> {
    let copied = Command::new("cp").arg(from).arg(to).status().context("running cp")?;
    ensure!(copied.success(), "cp {} {}: {copied}", from.display(), to.display());
    Ok(())
}
