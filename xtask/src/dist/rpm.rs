//! The RPM, by rpmbuild and packaging/bro.spec, with the binary that is there already: building is not done twice. A distribution
//! builds from the same spec without `staged`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{Habits, Release, program, tree};

/// How to get there.
pub const MEND: &str = "needs rpmbuild: run `sudo apt-get install rpm`";

/// Is rpmbuild here?
pub fn can() -> bool {
    Command::new("rpmbuild").arg("--version").output().is_ok()
}

/// Makes it; the paths of the packages.
pub fn build(release: &Release, binary: &Path) -> Result<Vec<PathBuf>> {
    let top = release.out.join("rpm");
    let staged = top.join("staged");
    std::fs::create_dir_all(&top)?;
    tree::lay_out(release, binary, Habits::Rpm, &staged)?;
    let mut rpmbuild = Command::new("rpmbuild");
    let mut define = |name: &str, value: &str| {
        rpmbuild.args(["--define", &format!("{name} {value}")]);
    };
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path that is no text");
    define("_topdir", &path(&top)?);
    define("staged", &path(&staged)?);
    define("revision", &release.revision.to_string());
    // The same bytes from the same source.
    for (name, value) in [
        ("use_source_date_epoch_as_buildtime", "1"),
        ("clamp_mtime_to_source_date_epoch", "1"),
        ("source_date_epoch_from_changelog", "0"),
        ("_buildhost", "bro"),
        ("_build_id_links", "none"),
    ] {
        define(name, value);
    }
    rpmbuild
        .arg("-bb")
        .arg("--quiet")
        .arg(release.packaging("bro.spec"))
        .env("SOURCE_DATE_EPOCH", release.epoch.0.to_string());
    program("rpmbuild", "rpm", &mut rpmbuild)?;
    let mut packages = Vec::new();
    for architecture in std::fs::read_dir(top.join("RPMS"))? {
        for package in std::fs::read_dir(architecture?.path())? {
            let package = package?.path();
            let to = release.out.join(package.file_name().context("a package has a name")?);
            std::fs::rename(&package, &to)?;
            packages.push(to);
        }
    }
    std::fs::remove_dir_all(&top)?;
    packages.sort();
    Ok(packages)
}
