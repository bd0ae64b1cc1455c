//! The tier that runs nothing of the project: format, clippy, docs, and its inner walls.

mod circles;
mod names;
mod suites;
mod walls;

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::summary::Count;
use crate::build::cargo;

const COMPONENTS: &str = "needs rustfmt and clippy: run `rustup component add rustfmt clippy`";

/// Every check, each to its end, whatever became of the others.
pub fn run() -> Result<Count> {
    let mut docs = cargo();
    docs.args(["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    Ok(check("format", cargo().args(["fmt", "--all", "--check"]), "fmt", COMPONENTS)?
        + check("clippy", cargo().args(clippy), "clippy", COMPONENTS)?
        + check("docs", &mut docs, "doc", "")?
        + told("walls between crates", walls::hold()?)
        + told("circles of imports", circles::none()?)
        + told("names of types", names::are_distinct()?)
        + told("what suites say of themselves", suites::are_described()?))
}

fn told(name: &str, passed: bool) -> Count {
    println!("{name}: {}", if passed { "ok" } else { "FAILED" });
    Count::check(passed)
}

/// One cargo command, unless the `tool` for it is missing, in which case `need` says what to do.
pub fn check(name: &str, command: &mut Command, tool: &str, need: &str) -> Result<Count> {
    let mut probe = cargo();
    let probe = probe.args([tool, "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    if !need.is_empty() && !probe.status().context("cannot run cargo")?.success() {
        return Ok(Count::missing(name, need));
    }
    let passed = command.status().context("cannot run cargo")?.success();
    Ok(told(name, passed))
}
