//! No circle of imports between files of a crate, unless all of them are parts of one: a file and the folder of its name, which may
//! know each other. A circle is printed with the imports that close it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::build::workspace;

/// Where the crates' sources are that have more than a few files.
const CRATES: [&str; 7] = [
    "bro-user/src",
    "bro-user/adopt/src",
    "bro-user/proc/src",
    "bro-user/relay/src",
    "bro-user/sockmap/src",
    "bro-ebpf/src",
    "xtask/src",
];

/// The edges of a crate: they import everything, and nothing imports them.
const EDGES: [&str; 2] = ["main", "fuzzing"];

/// Prints every such circle; whether there is none.
pub fn none() -> Result<bool> {
    let mut none = true;
    for folder in CRATES {
        for circle in circles(&imports(&sources(&workspace().join(folder))?)) {
            none = false;
            println!("circle of imports in {folder}:");
            circle.iter().for_each(|(from, to)| println!("    {from} imports {to}"));
        }
    }
    Ok(none)
}

/// Each module's path below the crate, and its text. The crate's own file has the empty path.
pub(super) fn sources(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let module = module(path.strip_prefix(folder)?);
                if !EDGES.contains(&module.as_str()) {
                    found.insert(module, fs::read_to_string(&path)?);
                }
            }
        }
    }
    Ok(found)
}

fn module(path: &Path) -> String {
    let path: PathBuf = path.with_extension("");
    let names: Vec<_> = path.iter().map(|name| name.to_string_lossy()).collect();
    if names == ["lib"] { String::new() } else { names.join("::") }
}

/// Which modules each one names, outside its tests.
fn imports(sources: &BTreeMap<String, String>) -> BTreeMap<&str, BTreeSet<&str>> {
    let named = |module: &str, text: &str| -> BTreeSet<&str> {
        let named = paths(text).into_iter().filter_map(|path| {
            let (known, _) = sources.get_key_value(longest(sources, &absolute(module, &path))?)?;
            Some(known.as_str())
        });
        named.filter(|other| *other != module && !other.is_empty()).collect()
    };
    sources.iter().map(|(module, text)| (module.as_str(), named(module, text))).collect()
}

/// The longest module that the path begins with.
fn longest<'a>(sources: &BTreeMap<String, String>, path: &'a str) -> Option<&'a str> {
    let mut ends: Vec<usize> = path.match_indices("::").map(|(end, _)| end).collect();
    ends.push(path.len());
    ends.into_iter().rev().map(|end| &path[..end]).find(|part| sources.contains_key(*part))
}

/// From the crate's root; `path` begins with `crate`, `super` or `self`.
fn absolute(module: &str, path: &str) -> String {
    let mut at: Vec<&str> = module.split("::").filter(|name| !name.is_empty()).collect();
    for name in path.split("::") {
        match name {
            "crate" => at.clear(),
            "self" => {}
            "super" => drop(at.pop()),
            name => at.push(name),
        }
    }
    at.join("::")
}

/// Every path in the text that begins with `crate` or `super`, those in braces one by one.
fn paths(text: &str) -> Vec<String> {
    let code = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let code: String =
        code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join(" ");
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':' && c != '$') {
                branches(&code[at..], "", &mut found);
            }
        }
    }
    found
}

/// What begins with `prefix` and goes on as the text does; the length of text that says so.
fn branches(text: &str, prefix: &str, found: &mut Vec<String>) -> usize {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(text.len());
    let path = format!("{prefix}{}", &text[..end]);
    if !text[end..].starts_with('{') || !path.ends_with("::") {
        found.push(path.trim_end_matches(':').to_owned());
        return end;
    }
    let mut at = end + 1;
    loop {
        at += text[at..].find(|c: char| !c.is_whitespace() && c != ',').unwrap_or(text.len() - at);
        match text[at..].chars().next() {
            None => return at,
            Some('}') => return at + 1,
            Some(c) if c.is_alphanumeric() || c == '_' => at += branches(&text[at..], &path, found),
            Some(c) => at += c.len_utf8(),
        }
    }
}

/// The circles that are not within one file and its folder, each as the imports between its members.
fn circles<'a>(imports: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Vec<Vec<(&'a str, &'a str)>> {
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        imports.keys().map(|from| (*from, reachable(imports, from))).collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for from in imports.keys() {
        let members: BTreeSet<&str> =
            reached[from].iter().copied().filter(|to| reached[to].contains(from)).collect();
        if members.len() > 1 && seen.insert(members.clone()) && !is_one_folder(&members) {
            let within = members.iter().flat_map(|from| imports[from].iter().map(|to| (*from, *to)));
            found.push(within.filter(|(_, to)| members.contains(to)).collect());
        }
    }
    found
}

fn reachable<'a>(imports: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut open: Vec<&str> = imports[from].iter().copied().collect();
    while let Some(module) = open.pop() {
        if reached.insert(module) {
            open.extend(imports.get(module).into_iter().flatten());
        }
    }
    reached
}

/// Are all below one folder, or the file of its name?
fn is_one_folder(members: &BTreeSet<&str>) -> bool {
    let folders: BTreeSet<&str> = members.iter().filter_map(|module| module.split("::").next()).collect();
    folders.len() == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<Vec<(String, String)>> {
        let sources =
            files.iter().map(|(path, text)| (module(Path::new(path)), (*text).to_owned())).collect();
        let imports = imports(&sources);
        let owned = |(from, to): (&str, &str)| (from.to_owned(), to.to_owned());
        circles(&imports).into_iter().map(|circle| circle.into_iter().map(owned).collect()).collect()
    }

    #[test]
    fn a_circle_is_found_however_it_is_written() {
        let far = ("a/b.rs", "fn f() { crate::d::g() }");
        for near in
            ["use crate::a::b;", "use crate::{x::Y,\n    a::{self, b::{C, E}}};", "use super::a::b as c;"]
        {
            let circle = found(&[("a.rs", ""), far, ("d.rs", near), ("x.rs", "")]);
            assert_eq!(circle, [[("a::b".into(), "d".into()), ("d".into(), "a::b".into())]], "{near}");
        }
    }

    #[test]
    fn parts_of_one_thing_may_know_each_other() {
        let parts =
            [("a.rs", "use crate::a::b::C;"), ("a/b.rs", "use super::d;"), ("a/d.rs", "use crate::a::X;")];
        assert!(found(&parts).is_empty());
        assert_eq!(found(&[parts[0], ("a/b.rs", "use crate::e;"), ("e.rs", "use super::a;")]).len(), 1);
    }

    #[test]
    fn comments_and_tests_import_nothing() {
        let tests = "use crate::b;\n\n#[cfg(test)]\nmod tests {\n    use crate::b::c;\n}\n";
        assert!(
            found(&[("a.rs", "// crate::b\nfn f() {}"), ("b.rs", "use crate::a;"), ("d.rs", tests)])
                .is_empty()
        );
    }
}
