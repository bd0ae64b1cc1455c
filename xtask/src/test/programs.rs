//! The tier that makes the kernel relay's programs anew: those checked in must be what the source says.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::summary::Count;

/// Runs `build-ebpf --check`, which knows the compilers that can and says what is missing.
pub fn run() -> Result<Count> {
    let output = Command::new("/proc/self/exe")
        .args(["build-ebpf", "--check"])
        .stdout(Stdio::inherit())
        .output()
        .context("cannot run build-ebpf")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint = complaint.trim();
    if !output.status.success() && ["is missing", "no compiler"].iter().any(|lack| complaint.contains(lack)) {
        let need = complaint.lines().last().unwrap_or_default().trim_start_matches("xtask: ");
        return Ok(Count::missing("kernel programs", need));
    }
    if !complaint.is_empty() {
        println!("{complaint}");
    }
    println!("kernel programs: {}", if output.status.success() { "as their source" } else { "FAILED" });
    Ok(Count::check(output.status.success()))
}
