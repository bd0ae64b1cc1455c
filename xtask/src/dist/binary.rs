//! The binary that packages hold, and that the tests run: built in release, with no folder of this machine in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use object::Object as _;

use super::Release;
use crate::build::{cargo, target_folder};

/// Builds it. The folder is its own: other flags would make cargo build everything else anew each time.
pub fn build(release: &Release) -> Result<PathBuf> {
    let folder = target_folder()?.join("dist-build");
    let cargo_home = match std::env::var_os("CARGO_HOME") {
        Some(home) => home.into(),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cargo"),
    };
    let given = std::env::var("RUSTFLAGS").unwrap_or_default();
    let mut flags: Vec<String> = given.split_whitespace().map(str::to_owned).collect();
    for (here, anywhere) in [(&cargo_home, "/cargo"), (&folder, "/target"), (&release.source, "/bro")] {
        flags.push(format!("--remap-path-prefix={}={anywhere}", here.display()));
    }
    let built = cargo()
        .args(["build", "--locked", "--release", "--package", "bro-user", "--bin", "bro"])
        .arg("--target-dir")
        .arg(&folder)
        .current_dir(&release.source)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("SOURCE_DATE_EPOCH", release.epoch.0.to_string())
        .status()
        .context("cannot run cargo")?;
    ensure!(built.success(), "cargo could not build the bro binary");
    let binary = folder.join("release/bro");
    for here in [&cargo_home, &release.source] {
        ensure!(!names(&binary, here)?, "the binary names {}, a folder of this machine", here.display());
    }
    Ok(binary)
}

/// A binary that was built elsewhere: as it is, or a copy without what only a debugger reads.
pub fn given(path: &Path, release: &Release) -> Result<PathBuf> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = object::File::parse(&*bytes).with_context(|| format!("{} is no program", path.display()))?;
    if file.symbol_table().is_none() {
        return Ok(path.to_owned());
    }
    let copy = release.out.join("bro");
    let mut strip = Command::new("strip");
    strip.args(["--strip-all", "-o"]).arg(&copy).arg(path);
    super::program("strip", "binutils", &mut strip)?;
    Ok(copy)
}

fn names(binary: &Path, folder: &Path) -> Result<bool> {
    let (bytes, folder) = (std::fs::read(binary)?, folder.as_os_str().as_encoded_bytes());
    Ok(bytes.windows(folder.len()).any(|window| window == folder))
}
