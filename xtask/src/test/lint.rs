//! The tier that runs nothing of the project: format, clippy, docs, the licences of what it depends on, and its inner walls.

mod circles;
mod names;
mod suites;
mod walls;

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::summary::Count;
use crate::build::cargo;

/// The version CI uses; it builds with the oldest compiler that CI has.
const DENY: &str = "needs cargo-deny: run `cargo install --locked cargo-deny@0.20.2`";
const COMPONENTS: &str = "needs rustfmt and clippy: run `rustup component add rustfmt clippy`";

/// Every check, each to its end, whatever became of the others.
pub fn run() -> Result<Count> {
    let mut docs = cargo();
    docs.args(["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    // No advisories: their database is fetched, and a check that needs the network says nothing about a commit.
    let deny = ["deny", "--log-level", "error", "check", "licenses", "bans", "sources"];
    Ok(check("format", cargo().args(["fmt", "--all", "--check"]), "fmt", COMPONENTS)?
        + check("clippy", cargo().args(clippy), "clippy", COMPONENTS)?
        + check("docs", &mut docs, "doc", "")?
        + check("licences", cargo().args(deny), "deny", DENY)?
        + told("walls between crates", walls::hold()?)
        + told("circles of imports", circles::none()?)
        + told("names of types", names::are_distinct()?)
        + told("what suites say of themselves", suites::are_described()?))
}

fn told(name: &str, passed: bool) -> Count {
    println!("{name}: {}", if passed { "ok" } else { "FAILED" });
    Count::check(passed)
}

fn check(name: &str, command: &mut Command, tool: &str, need: &str) -> Result<Count> {
    let mut probe = cargo();
    let probe = probe.args([tool, "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    if !need.is_empty() && !probe.status().context("cannot run cargo")?.success() {
        return Ok(Count::missing(name, need));
    }
    let passed = command.status().context("cannot run cargo")?.success();
    Ok(told(name, passed))
}
