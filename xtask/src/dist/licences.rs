//! The licences of what is linked into the binary, or into the kernel programs that it holds: their texts have to go with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Release;
use crate::build::cargo;

/// A crate of others.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dependency {
    name: String,
    version: String,
    licence: String,
    folder: PathBuf,
}

/// Everything that is linked, sorted by name; without what only compilers run.
pub fn of_dependencies(release: &Release) -> Result<Vec<Dependency>> {
    let mut found = BTreeSet::new();
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    // The programs for the kernel are in the binary too.
    for (package, features, target) in
        [("bro-user", "", host.as_str()), ("bro-ebpf", "bro-ebpf/programs", "bpfel-unknown-none")]
    {
        let output = cargo()
            .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target])
            .args(["--features", features])
            .current_dir(&release.source)
            .output()
            .context("cannot run cargo")?;
        ensure!(
            output.status.success(),
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        linked(&serde_json::from_slice(&output.stdout)?, package, &mut found)?;
    }
    Ok(found.into_iter().collect())
}

fn linked(metadata: &Value, root: &str, found: &mut BTreeSet<Dependency>) -> Result<()> {
    let text = |value: &Value| value.as_str().map(str::to_owned).context("cargo metadata lacks a text");
    let list = |value: &Value| value.as_array().cloned().context("cargo metadata lacks a list");
    let packages: BTreeMap<String, Value> = list(&metadata["packages"])?
        .into_iter()
        .map(|package| Ok((text(&package["id"])?, package)))
        .collect::<Result<_>>()?;
    let nodes: BTreeMap<String, Value> = list(&metadata["resolve"]["nodes"])?
        .into_iter()
        .map(|node| Ok((text(&node["id"])?, node)))
        .collect::<Result<_>>()?;
    let first = packages
        .iter()
        .find(|(_, package)| package["name"] == root)
        .context("the workspace's own package")?;
    let (mut seen, mut open) = (BTreeSet::new(), vec![first.0.clone()]);
    while let Some(id) = open.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        let package = packages.get(&id).context("cargo metadata lacks a package")?;
        let runs_in_the_compiler = package["targets"].to_string().contains("proc-macro");
        if runs_in_the_compiler {
            continue;
        }
        if !package["source"].is_null() {
            let manifest = PathBuf::from(text(&package["manifest_path"])?);
            found.insert(Dependency {
                name: text(&package["name"])?,
                version: text(&package["version"])?,
                licence: text(&package["license"])
                    .unwrap_or_else(|_| "see its text".into())
                    .replace('/', " OR "),
                folder: manifest.parent().context("a manifest is in a folder")?.to_owned(),
            });
        }
        for dependency in list(&nodes.get(&id).context("cargo metadata lacks a node")?["deps"])? {
            let linked = |kind: &Value| kind["kind"].is_null();
            if list(&dependency["dep_kinds"])?.iter().any(linked) {
                open.push(text(&dependency["pkg"])?);
            }
        }
    }
    Ok(())
}

/// Debian's copyright file, in its machine-readable form.
pub fn copyright(release: &Release, crates: &[Dependency]) -> Result<String> {
    let indented = |text: &str| -> String {
        let mut out = String::new();
        for line in text.trim().lines() {
            let line = line.trim_end();
            writeln!(out, " {}", if line.is_empty() { "." } else { line }).ok();
        }
        out
    };
    let mit = std::fs::read_to_string(release.source.join("LICENSE-MIT"))?;
    let (_, mit) = mit.split_once("\n\n").context("the title of the licence")?;
    let (holder, mit) = mit.split_once("\n\n").context("the copyright line of the licence")?;
    let mut text = String::from(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
         Upstream-Name: bro\n\
         Comment: The binary holds the crates listed below; the texts of their\n \
         licences are in /usr/share/doc/bro/third-party.txt.gz. The programs that\n \
         it loads into the kernel are bro's own and declare \"Dual MIT/GPL\" to it.\n .\n",
    );
    for dependency in crates {
        writeln!(text, " {} {}: {}", dependency.name, dependency.version, dependency.licence)?;
    }
    write!(
        text,
        "\nFiles: *\nCopyright: {}\nLicense: Expat or Apache-2.0\n\n\
         License: Expat\n{}\n\
         License: Apache-2.0\n On Debian systems, the full text of the Apache License, Version 2.0 is in\n \
         /usr/share/common-licenses/Apache-2.0.\n",
        holder.trim().trim_start_matches("Copyright (c) "),
        indented(mit)
    )?;
    Ok(text)
}

/// Every licence text once, under the names of those that carry it.
pub fn texts(crates: &[Dependency]) -> Result<String> {
    let mut by_text: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut without = Vec::new();
    for dependency in crates {
        let named = format!("{} {} ({})", dependency.name, dependency.version, dependency.licence);
        let files = licence_files(&dependency.folder)?;
        if files.is_empty() {
            without.push(named.clone());
        }
        for file in files {
            let text = String::from_utf8_lossy(&std::fs::read(&file)?).replace('\r', "");
            by_text.entry(text.trim().to_owned()).or_default().push(named.clone());
        }
    }
    let mut groups: Vec<(Vec<String>, String)> =
        by_text.into_iter().map(|(text, names)| (names, text)).collect();
    groups.sort();
    let mut out = String::from("Licences of the crates that are linked into bro.\n");
    for (names, text) in groups {
        write!(out, "\n{}\n{}\n{0}\n\n{text}\n", "=".repeat(80), names.join("\n"))?;
    }
    if !without.is_empty() {
        write!(out, "\n{}\nWithout a text of their own:\n{}\n", "=".repeat(80), without.join("\n"))?;
    }
    Ok(out)
}

fn licence_files(folder: &Path) -> Result<Vec<PathBuf>> {
    const BEGINNINGS: [&str; 6] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        if path.is_file() && BEGINNINGS.iter().any(|beginning| name.starts_with(beginning)) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
