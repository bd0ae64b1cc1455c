//! After a case that failed: what it has left activated goes, so that one fault is one failure.

use anyhow::{Context as _, Result, ensure};

use super::{Host, Manager, USERS};

/// What each file that `bro activate` writes begins with.
const MARKER: &str = "# Written by bro activate";

/// Everything that is activated, under the system's manager and under each user's. Returns the units' names.
pub(super) fn all(host: &Host) -> Result<Vec<String>> {
    let mut gone = remove(host, Manager::System, Whose::Everybodys)?;
    for user in USERS {
        gone.extend(remove(host, Manager::User(user), Whose::Everybodys)?);
    }
    Ok(gone)
}

/// What is activated under one manager, and is not another's: the system may listen for a user, whose cases run beside its own.
pub(super) fn of(host: &Host, manager: Manager) -> Result<Vec<String>> {
    remove(host, manager, Whose::Managers)
}

/// Which of a manager's activated services are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// Those whose forwarders run as the manager does.
    Managers,
    Everybodys,
}

fn remove(host: &Host, manager: Manager, whose: Whose) -> Result<Vec<String>> {
    let folder = manager.unit_folder();
    // NAME, UNIT and the file's own name: all that a socket's file says of its service.
    let listed = host.sh(&format!(
        "for file in $(grep -ls '^{MARKER}' {folder}/*.socket {folder}/*-activator.service || true); do \
         echo $(basename $file) $(sed -n '/^\\[X-Bro\\]/,$ s/^Name=//p' $file) $(sed -n 's/^\\(Unit\\|Service\\)=//p' $file); done; \
         echo; grep -ls '^User=' {folder}/*-activator.service || true"
    ))?;
    let (files, of_users) = listed.split_once("\n\n").unwrap_or((listed.trim(), ""));
    let mut names: Vec<&str> = Vec::new();
    let mut units: Vec<&str> = Vec::new();
    for line in files.lines() {
        let mut words = line.split(' ');
        let (Some(file), Some(name)) = (words.next(), words.next()) else { continue };
        let is_users = of_users.contains(&format!("/{name}-activator.service"));
        if !is_users || whose == Whose::Everybodys {
            names.push(name);
            // The socket before what it would start again.
            units.insert(0, file);
            units.extend(words);
        }
    }
    if names.is_empty() {
        return Ok(Vec::new());
    }
    names.sort_unstable();
    names.dedup();
    manager.systemctl(host, &[&["stop"], &units[..]].concat()).ok();
    for name in &names {
        manager.try_run(host, &["bro", "activate", name, "--remove"])?;
    }
    let left = host.sh(&format!("grep -ls '^{MARKER}' {folder}/*.socket {folder}/*.service || true"))?;
    let left: Vec<&str> = left.lines().filter(|path| names.iter().any(|name| path.contains(name))).collect();
    if !left.is_empty() {
        host.run(&[&["rm"], &left[..]].concat())?;
        manager.systemctl(host, &["daemon-reload"]).context("what was removed is not forgotten")?;
    }
    ensure!(left.is_empty(), "bro activate --remove has left {left:?}");
    Ok(names.into_iter().map(str::to_owned).collect())
}
