//! README.md and the documents for users, executed as they stand there: every chapter that shows something to do.

use std::collections::HashSet;

use anyhow::{Context as _, Result, bail, ensure};
use bro_tests::host::cases::Cases;
use bro_tests::host::{Host, Manager};
use bro_tests::transcript::{Chapter, Step, Who, chapters, compare};

use crate::activated::tree;

const TEXTS: [(&str, &str); 4] = [
    ("README", include_str!("../../../README.md")),
    ("docs/guide", include_str!("../../../docs/guide.md")),
    ("docs/reference", include_str!("../../../docs/reference.md")),
    ("docs/clients", include_str!("../../../docs/clients.md")),
];

/// Whose prompt is `$`, and who is called `db` there.
const USER: Manager = Manager::User("test");
const DB: Manager = Manager::User("other");

/// Each chapter as a case of its own.
pub fn all(host: &Host, cases: &Cases) {
    let mut images = HashSet::new();
    for (name, text) in TEXTS {
        match chapters(text) {
            Err(error) => cases.case(&format!("{name}: can be read"), || Err(error)),
            Ok(chapters) => {
                for chapter in chapters {
                    cases
                        .on(host, &format!("{name}: {}", chapter.title), || run(host, &chapter, &mut images));
                }
            }
        }
    }
}

/// Where a user has it, as the README says: the units of a user's own chapters find it there.
const USERS: &str = "/home/test/.local/bin/bro";
const SYSTEMS: &str = "/usr/local/bin/bro";

fn installed(host: &Host) -> Result<()> {
    USER.run(host, &["install", "-D", SYSTEMS, USERS])?;
    Ok(())
}

/// Does what a chapter shows, with the program where its reader has put it.
fn run(host: &Host, chapter: &Chapter, images: &mut HashSet<(u8, String)>) -> Result<()> {
    let is_users = chapter.steps.iter().all(|step| match step {
        Step::File { path, .. } => path.starts_with("~/"),
        Step::Command { who, .. } => matches!(who, Who::User),
    });
    if !is_users {
        return run_where_it_is(host, chapter, images);
    }
    installed(host)?;
    let aside = format!("{SYSTEMS}-aside");
    host.run(&["mv", SYSTEMS, &aside])?;
    let result = run_where_it_is(host, chapter, images);
    host.run(&["mv", &aside, SYSTEMS])?;
    result
}

/// Does what a chapter shows, and looks that the chapter has left nothing but the files that it shows.
fn run_where_it_is(host: &Host, chapter: &Chapter, images: &mut HashSet<(u8, String)>) -> Result<()> {
    let everybody = [Manager::System, USER, DB];
    let before = everybody.map(|manager| tree(host, manager).unwrap_or_default());
    let mut written = Vec::new();
    let result = chapter.steps.iter().try_for_each(|step| match step {
        Step::File { path, text } => {
            let (owner, path) = place(path)?;
            import(host, owner, text, images)?;
            host.write(&path, text)?;
            written.push(path);
            Ok(())
        }
        Step::Command { who, line, prints } => {
            let who = match who {
                Who::Root => Manager::System,
                Who::User => USER,
                Who::Named(name) if name == "db" => DB,
                Who::Named(name) => bail!("no user is called {name} here"),
            };
            command(host, who, line, prints.as_deref()).with_context(|| line.clone())
        }
    });
    if result.is_err() {
        // What ended half-way has not come to the commands that stop it.
        for path in written.iter().rev() {
            stop(host, path);
        }
    }
    for path in &written {
        host.run(&["rm", "-f", path])?;
    }
    for manager in everybody {
        manager.systemctl(host, &["daemon-reload"])?;
    }
    result?;
    for (manager, before) in everybody.into_iter().zip(before) {
        // Folders stay where a file was written, as they do for a reader.
        let left: Vec<String> = tree(host, manager)?
            .into_iter()
            .filter(|line| !before.contains(line) && !host.path(line).is_dir())
            .collect();
        ensure!(left.is_empty(), "it leaves {left:#?}");
    }
    Ok(())
}

/// Stops the unit that a file is of, if it is of one.
fn stop(host: &Host, path: &str) {
    let Some((folder, name)) = path.rsplit_once('/') else { return };
    let manager = match folder {
        folder if folder.starts_with("/home/test/") => USER,
        folder if folder.starts_with("/home/other/") => DB,
        _ => Manager::System,
    };
    let unit = match name.rsplit_once('.') {
        Some((stem, "container")) => format!("{stem}.service"),
        Some((_, "socket" | "service" | "timer")) => name.to_owned(),
        _ => return,
    };
    manager.systemctl(host, &["stop", &unit]).ok();
}

fn place(path: &str) -> Result<(Manager, String)> {
    if let Some(rest) = path.strip_prefix("~db/") {
        return Ok((DB, format!("/home/other/{rest}")));
    }
    match path.strip_prefix("~/") {
        Some(rest) => Ok((USER, format!("/home/test/{rest}"))),
        None if path.starts_with('/') => Ok((Manager::System, path.into())),
        None => bail!("whose is {path}?"),
    }
}

/// The images that a quadlet names come from the test host instead of a registry.
fn import(host: &Host, owner: Manager, text: &str, images: &mut HashSet<(u8, String)>) -> Result<()> {
    for reference in text.lines().filter_map(|line| line.strip_prefix("Image=docker.io/")) {
        let name = reference.rsplit('/').next().unwrap_or(reference);
        let number = if owner == Manager::System { 0 } else { u8::from(owner == DB) + 1 };
        if images.insert((number, name.into())) {
            owner.import_image(host, name, &format!("docker.io/{reference}"))?;
        }
    }
    Ok(())
}

fn command(host: &Host, who: Manager, line: &str, prints: Option<&str>) -> Result<()> {
    // What goes on in the background must not hold the pipe that is read to its end.
    let script = match line.strip_suffix(" &") {
        Some(line) => format!("({line}) >/dev/null 2>&1 &"),
        None => format!("exec 2>&1\n{line}"),
    };
    // As a login's: ~/.profile puts that folder first once it is there.
    let script = format!("PATH=~/.local/bin:$PATH\n{script}");
    let ran = who.try_run(host, &["bash", "-c", &script])?;
    match prints {
        Some(expected) => compare(expected, &ran.stdout),
        None => {
            ensure!(ran.success(), "it exited with {}:\n{}", ran.code, ran.stdout);
            Ok(())
        }
    }
}
