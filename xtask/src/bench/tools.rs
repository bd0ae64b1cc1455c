//! Other people's programs: where they are, which version, and how to get them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Something that is not here.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Missing {
    pub name: String,
    /// What is missing, and the line that mends it.
    pub why: String,
}

/// Looks on the PATH, and where distributions keep what is not meant to be typed.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual =
        ["/usr/sbin", "/sbin", "/usr/lib/systemd", "/lib/systemd", "/usr/libexec/podman", "/usr/lib/podman"];
    let databases = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    std::env::split_paths(&path)
        .chain(usual.map(PathBuf::from))
        .chain(databases.map(|version| version.path().join("bin")))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// The first line in which a program says its version.
pub fn version(program: &Path, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let line = said
        .lines()
        .find(|line| line.chars().any(|letter| letter.is_ascii_digit()) && !line.contains("error"))?;
    Some(line.trim().to_owned())
}
