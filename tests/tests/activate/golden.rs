//! Golden trees: `golden/CASE` holds the disk before (`in`), the command lines (`commands`, one a line), and what is on the disk
//! after them beyond that (`out`) with all that was said (`said`). `BRO_BLESS=1` writes the last two anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use bro_tests::tier::{Need, met};

use crate::tree::{PROGRAM, Tree, list, said};

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/activate/golden")
}

fn files_of(directory: &Path) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    if directory.is_dir() {
        list(directory, directory, &mut all)?;
    }
    all.retain(|_, text| text != "/");
    Ok(all)
}

/// Words of a command line; quotes keep one together.
fn words(line: &str) -> Vec<String> {
    bro_user::systemd::unit_file::split_words(line)
}

fn case(case: &Path) -> Result<()> {
    let input = files_of(&case.join("in"))?;
    let tree = Tree::new(&[])?;
    for (path, text) in &input {
        tree.write(path, text)?;
    }
    let before = tree.listing()?;
    let root = tree.root().display().to_string();
    let program = bro_tests::bro::binary().display().to_string();
    // The root first: the program's path may be the beginning of it.
    let neutral =
        |text: &str| text.replace(&format!("{root}/"), "/").replace(&root, "ROOT").replace(&program, PROGRAM);

    let commands = std::fs::read_to_string(case.join("commands"))?;
    let analyze = Need::Program("systemd-analyze", "systemd");
    if commands.contains("--keep-awake") && !met("every_golden_tree", &[analyze]) {
        return Ok(());
    }
    let mut talk = String::new();
    let mut names = Vec::new();
    for line in commands.lines() {
        let arguments = words(line);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let answer = said(&mut tree.command(&arguments))?;
        talk += &format!("$ bro activate {line}\n{}{}", neutral(&answer.stdout), neutral(&answer.stderr));
        talk += &format!("[{}]\n", answer.code);
        let scope = if arguments.contains(&"--user") { "--user" } else { "--system" };
        if answer.code == 0 {
            names.push((arguments[0].to_owned(), scope));
        }
    }

    let mut after = tree.listing()?;
    let links: Vec<String> =
        after.iter().filter(|(_, text)| text.starts_with("-> ")).map(|(path, _)| path.clone()).collect();
    let sockets: Vec<&String> =
        after.keys().filter(|path| path.ends_with(".socket") && !links.contains(path)).collect();
    ensure!(links.len() == sockets.len(), "every socket is enabled: {links:?}, {sockets:?}");
    after.retain(|path, text| text != "/" && !text.starts_with("-> ") && !input.contains_key(path));
    let after: BTreeMap<String, String> =
        after.into_iter().map(|(path, text)| (path, neutral(&text))).collect();

    // Removing takes away exactly that, and nothing else.
    for (name, scope) in names {
        let answer = said(&mut tree.command(&[&name, scope, "--remove"]))?;
        ensure!(answer.code == 0 || answer.stderr.contains("is not activated"), "{answer:?}");
    }
    ensure!(
        tree.listing()? == before,
        "after --remove there is more or less than before: {:?}",
        tree.listing()?.keys()
    );

    if std::env::var_os("BRO_BLESS").is_some() {
        std::fs::remove_dir_all(case.join("out")).ok();
        for (path, text) in &after {
            let path = case.join("out").join(path);
            std::fs::create_dir_all(path.parent().context("a file lies in a directory")?)?;
            std::fs::write(path, text)?;
        }
        std::fs::write(case.join("said"), &talk)?;
        return Ok(());
    }
    let expected = files_of(&case.join("out"))?;
    ensure!(
        after.keys().eq(expected.keys()),
        "wrote {:?}, expected {:?}\n{talk}",
        after.keys(),
        expected.keys()
    );
    for (path, text) in &after {
        ensure!(expected[path] == *text, "{path} is\n{text}\ninstead of\n{}", expected[path]);
    }
    let expected = std::fs::read_to_string(case.join("said"))?;
    ensure!(expected == talk, "it said\n{talk}\ninstead of\n{expected}");
    Ok(())
}

#[test]
fn every_golden_tree() -> Result<()> {
    let entries = match std::fs::read_dir(cases()) {
        // As the ordinary user for whom the built tests were copied: a user who may read the workspace has run this.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(()),
        entries => entries?,
    };
    let mut cases: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    cases.sort();
    ensure!(cases.len() >= 15, "only {} cases", cases.len());
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|path| case(path).err().map(|error| format!("{}: {error:#}", path.display())))
        .collect();
    ensure!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n\n"));
    Ok(())
}
