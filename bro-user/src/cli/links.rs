//! Every relative link of the documentation leads to a file that is there, and to a heading that this file has.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The documents, at the top of the workspace and in `docs`.
fn documents() -> Vec<PathBuf> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let in_folder = |folder: PathBuf| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let all = in_folder(top.to_owned()).chain(in_folder(top.join("docs")));
    all.filter(|path| path.extension().is_some_and(|kind| kind == "md")).collect()
}

/// The lines outside of code blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut block = false;
    text.lines().filter(move |line| {
        let fence = line.starts_with("```");
        block ^= fence;
        !block && !fence && !line.starts_with("    ")
    })
}

/// What follows `](` up to the closing parenthesis, or the end of a line.
fn links(text: &str) -> impl Iterator<Item = &str> {
    prose(text).flat_map(|line| line.split("](").skip(1)).filter_map(|rest| rest.split(')').next())
}

/// The anchors of the headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces, numbers for repetitions.
fn anchors(text: &str) -> Vec<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let headings =
        prose(text).filter(|line| line.trim_start_matches('#').starts_with(' ') && line.starts_with('#'));
    headings
        .map(|heading| {
            let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
            let title = heading.trim_start_matches('#').trim().to_lowercase();
            let anchor: String = title.chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect();
            let count = seen.entry(anchor.clone()).or_default();
            *count += 1;
            if *count == 1 { anchor } else { format!("{anchor}-{}", *count - 1) }
        })
        .collect()
}

#[test]
fn every_relative_link_leads_somewhere() {
    let mut followed = 0;
    let mut broken = Vec::new();
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for link in links(&text).filter(|link| !link.contains("://")) {
            let (path, anchor) =
                link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
            let target = match path {
                "" => document.clone(),
                path => document.parent().unwrap().join(path),
            };
            let there = match anchor {
                None => target.exists(),
                Some(anchor) => std::fs::read_to_string(&target)
                    .is_ok_and(|text| anchors(&text).iter().any(|one| one == anchor)),
            };
            if !there {
                broken.push(format!("{}: {link}", document.display()));
            }
            followed += 1;
        }
    }
    assert!(broken.is_empty(), "these links lead nowhere:\n{}", broken.join("\n"));
    assert!(followed > 50, "only {followed} relative links were found");
}

#[test]
fn anchors_are_githubs() {
    let text = "# Its `--option`: what?\n\n```\n# no heading\n```\n\n## A b\n\n## A b\n";
    assert_eq!(anchors(text), ["its---option-what", "a-b", "a-b-1"]);
}
