//! A type's name says in which place it is used: no two types of the crates below `bro-user` have the same one.

use std::collections::BTreeMap;

use anyhow::Result;

use super::circles::sources;
use crate::build::workspace;

/// The crates whose types one reader meets side by side.
const CRATES: [&str; 5] =
    ["bro-user/src", "bro-user/adopt/src", "bro-user/proc/src", "bro-user/relay/src", "bro-user/sockmap/src"];

/// Prints every name that more than one type has; whether there is none.
pub fn are_distinct() -> Result<bool> {
    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for folder in CRATES {
        for (module, text) in sources(&workspace().join(folder))? {
            for name in types_in(&text) {
                types.entry(name.to_owned()).or_default().push(format!("{folder} {module}"));
            }
        }
    }
    types.retain(|_, places| places.len() > 1);
    for (name, places) in &types {
        println!("{name} is the name of {} types: {}", places.len(), places.join(", "));
    }
    Ok(types.is_empty())
}

/// The types that a file defines outside of its modules: those begin at the left margin, as rustfmt has it.
fn types_in(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| {
        // `pub(super) enum` and `pub enum` are `enum`.
        let line = match line.strip_prefix("pub(") {
            Some(rest) => rest.split_once(") ")?.1,
            None => line.strip_prefix("pub ").unwrap_or(line),
        };
        let (kind, rest) = line.split_once(' ')?;
        let name = rest.split(|c: char| !c.is_alphanumeric()).next()?;
        ["struct", "enum", "union", "trait", "type"].contains(&kind).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_found_and_nothing_else() {
        let source = "pub struct One(u8);\nenum Two {\n    Three,\n}\npub(super) type Four<'a> = &'a str;\n\
                      pub(crate) trait Five {\n    type Six;\n}\nfn structure() {}\n// struct Seven\n";
        assert_eq!(types_in(source).collect::<Vec<_>>(), ["One", "Two", "Four", "Five"]);
    }
}
