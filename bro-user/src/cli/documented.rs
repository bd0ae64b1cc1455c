//! README.md and docs/ against the command line itself: what they name exists, what exists they name, and every command that
//! they show is one that bro takes.

use std::collections::BTreeSet;

use clap::{Command, CommandFactory as _, Parser as _};

use super::Cli;
use crate::systemd::unit_file::split_words;

const TEXTS: [&str; 4] = [
    include_str!("../../../README.md"),
    include_str!("../../../docs/guide.md"),
    include_str!("../../../docs/reference.md"),
    include_str!("../../../docs/clients.md"),
];

/// Where `cargo xtask`'s own options are, which the texts name too.
const TASKS: [&str; 3] = [
    include_str!("../../../xtask/src/run.rs"),
    include_str!("../../../xtask/src/test.rs"),
    include_str!("../../../xtask/src/bench.rs"),
];

/// The long options that `--help` of any subcommand shows, with their short forms.
fn options() -> BTreeSet<(String, Option<char>)> {
    fn collect(command: &Command, all: &mut BTreeSet<(String, Option<char>)>) {
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            all.extend(argument.get_long().map(|long| (long.to_owned(), argument.get_short())));
        }
        command.get_subcommands().filter(|command| !command.is_hide_set()).for_each(|one| collect(one, all));
    }
    let mut all = BTreeSet::new();
    collect(&Cli::command(), &mut all);
    all
}

/// The option at the start of `text`, without its value.
fn long(text: &str) -> Option<&str> {
    let name = text.strip_prefix("--")?;
    let end = name.find(|c: char| !c.is_ascii_lowercase() && c != '-').unwrap_or(name.len());
    name.get(..end).filter(|name| !name.is_empty())
}

/// What stands between single backquotes, outside of blocks.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    let mut block = false;
    let lines = text.lines().filter(move |line| {
        block ^= line.starts_with("```");
        !block && !line.starts_with("    ")
    });
    lines.flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Every `bro …` that is shown whole: in blocks, in sessions, in units and in running text.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut block = false;
    for line in text.lines() {
        block ^= line.starts_with("```");
        if block || line.starts_with("    ") {
            // A comment stands apart.
            let line = line.split("    #").next().unwrap_or_default();
            let line = line.split_once("ExecStart=").map_or(line, |(_, command)| command);
            let line = line.strip_prefix("%h/.local/bin/").unwrap_or(line);
            let at = if line.trim_start().starts_with("bro ") { line.find("bro ") } else { None };
            let at = at.or_else(|| line.find(" bro ").map(|at| at + 1));
            found.extend(at.map(|at| line[at..].trim_end_matches(" &").trim().to_owned()));
        }
    }
    found.extend(spans(text).filter(|span| span.starts_with("bro ")).map(str::to_owned));
    // A pipe ends a command; one with an ellipsis is not whole.
    let whole = |command: String| command.split(" | ").next().unwrap_or_default().trim().to_owned();
    found.retain(|command| !command.contains('…') && !command.contains("..."));
    found.into_iter().map(whole).collect()
}

#[test]
fn every_option_is_documented() {
    let all = TEXTS.join("\n");
    let mut named = BTreeSet::new();
    for (at, _) in all.match_indices("--") {
        named.extend(long(&all[at..]).filter(|_| !all[..at].ends_with('-')));
    }
    for (name, short) in options() {
        let short = short.is_some_and(|short| all.contains(&format!("`-{short}`")));
        let help = name == "help" || name == "version";
        assert!(named.contains(name.as_str()) || short || help, "neither README nor docs name --{name}");
    }
}

#[test]
fn every_documented_option_exists() {
    let options = options();
    let mut looked_at = 0;
    for name in TEXTS.iter().flat_map(|text| spans(text)).filter_map(long) {
        let is_ours = options.iter().any(|(option, _)| option == name);
        let of_a_task = || TASKS.iter().any(|task| task.contains(&format!("\n    {name}: bool")));
        assert!(is_ours || of_a_task(), "there is no --{name}");
        looked_at += 1;
    }
    assert!(looked_at > 50, "only {looked_at} options were found in the texts");
}

/// Something is missing, and nothing is wrong with what is there.
fn is_less(error: &clap::Error) -> bool {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let no_value = || matches!(error.get(ContextKind::InvalidValue), Some(ContextValue::String(value)) if value.is_empty());
    match error.kind() {
        ErrorKind::MissingRequiredArgument => true,
        ErrorKind::InvalidValue => no_value(),
        _ => false,
    }
}

#[test]
fn every_documented_command_is_taken() {
    let mut taken = 0;
    for command in TEXTS.iter().flat_map(|text| commands(text)) {
        let words = split_words(&command.replace("$XDG_RUNTIME_DIR", "/run/user/1000"));
        match Cli::try_parse_from(words) {
            Ok(_) => taken += 1,
            Err(error) if !error.use_stderr() => taken += 1,
            // Only spoken of: `bro activate`, `bro forward --netns`.
            Err(error) if command.split(' ').count() <= 3 && is_less(&error) => {}
            Err(error) => panic!("the texts show `{command}`: {error}"),
        }
    }
    assert!(taken > 50, "only {taken} commands were found in the texts");
}
