//! The tier that looks at the licences and the sources of what the project depends on: `deny.toml` says which are right.

use anyhow::Result;

use super::lint::check;
use super::summary::Count;
use crate::build::cargo;

/// The version CI uses; it builds with the oldest compiler that CI has.
const DENY: &str = "needs cargo-deny: run `cargo install --locked cargo-deny@0.20.2`";

/// Runs cargo-deny. No advisories: their database is fetched, and a check that needs the network says nothing about a commit.
pub fn run() -> Result<Count> {
    let deny = ["deny", "--log-level", "error", "check", "licenses", "bans", "sources"];
    check("licences", cargo().args(deny), "deny", DENY)
}
