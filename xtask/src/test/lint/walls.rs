//! What the crates that touch clients' bytes, containers' system calls and the kernel's programs may never depend on, however indirectly.

use anyhow::{Context as _, Result, ensure};

use crate::build::cargo;

const INSIDE: [&str; 3] = ["bro-adopt", "bro-relay", "bro-sockmap"];
const OUTSIDE: [&str; 3] = ["tokio", "zbus", "clap"];

/// Prints every one that does; whether none does.
pub fn hold() -> Result<bool> {
    let mut hold = true;
    for package in INSIDE {
        let output = cargo()
            .args([
                "tree",
                "--package",
                package,
                "--edges",
                "normal",
                "--prefix",
                "none",
                "--format",
                "{lib}",
            ])
            .output()
            .context("cannot run cargo tree")?;
        ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr).trim());
        let linked = String::from_utf8(output.stdout)?;
        ensure!(linked.lines().count() > 10, "cargo tree shows nothing of {package}");
        for library in
            OUTSIDE.into_iter().filter(|library| linked.lines().any(|line| line.trim() == *library))
        {
            hold = false;
            println!(
                "{package} depends on {library}: `cargo tree -p {package} -e normal -i {library}` shows by what"
            );
        }
    }
    Ok(hold)
}
