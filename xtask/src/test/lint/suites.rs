//! The tests are a house that one finds one's way in: each suite says at its top what it needs and how long it takes, and
//! `tests/README.md` says for each behaviour which suite has it.

use anyhow::{Context as _, Result};

use super::super::tiers::Tier;
use crate::build::workspace;

const GUIDE: &str = "tests/README.md";

/// Prints what is missing; whether nothing is.
pub fn are_described() -> Result<bool> {
    let guide = std::fs::read_to_string(workspace().join(GUIDE)).context(GUIDE)?;
    let mut all = true;
    for tier in Tier::all()? {
        let Tier::Suite { name, .. } = &tier else { continue };
        if let Err(error) = tier.described() {
            all = false;
            println!("{error:#}");
        }
        if !guide.contains(&format!("`{name}`")) {
            all = false;
            println!("{GUIDE} does not say what `{name}` tests");
        }
    }
    Ok(all)
}
