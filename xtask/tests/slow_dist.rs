//! `cargo xtask dist` as it is typed: it builds the binary that packages ship, which takes minutes.

use std::path::{Path, PathBuf};
use std::process::Command;

use bro_tests::require;
use bro_tests::scratch::Scratch;
use bro_tests::tier::Need;

#[test]
fn the_packaged_binary_runs_is_stripped_and_names_no_folder_of_this_machine() {
    require!(
        Need::Program("dpkg-shlibdeps", "dpkg-dev"),
        Need::Program("rpmbuild", "rpm"),
        Need::Program("nm", "binutils")
    );
    let scratch = Scratch::new().unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["dist", "--habits", "rpm", "--out"])
        .arg(scratch.path())
        .status()
        .unwrap();
    assert!(made.success());
    for kind in ["deb", "rpm"] {
        let there = std::fs::read_dir(scratch.path()).unwrap();
        let is_one = |path: PathBuf| path.extension().is_some_and(|extension| extension == kind);
        assert_eq!(there.filter(|entry| is_one(entry.as_ref().unwrap().path())).count(), 1, "{kind}");
    }
    let binary = scratch.path().join("tree/usr/bin/bro");
    let version = Command::new(&binary).arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&version.stdout).contains(env!("CARGO_PKG_VERSION")), "{version:?}");
    let symbols = Command::new("nm").arg(&binary).output().unwrap();
    assert!(symbols.stdout.is_empty(), "it is not stripped");
    let bytes = std::fs::read(&binary).unwrap();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let home = std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    );
    for folder in [workspace, &home] {
        let folder = folder.to_str().unwrap().as_bytes();
        assert!(!bytes.windows(folder.len()).any(|window| window == folder), "it names {folder:?}");
    }
}
