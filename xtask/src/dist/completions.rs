//! Completions for shells: static scripts, for `bro` and each of its other names.

use bro_user::cli;
use bro_user::cli::Cli;
use clap::CommandFactory as _;
use clap_complete::Shell;

/// A script that a shell loads when its command is completed for the first time.
pub struct Script {
    /// What that shell looks for.
    pub file: String,
    pub text: String,
    pub shell: Shell,
}

/// All of them.
pub fn scripts() -> Vec<Script> {
    let names: Vec<(&str, clap::Command)> = std::iter::once(("bro", offered()))
        .chain(cli::NAMES.iter().filter_map(|(name, subcommand)| {
            Some((*name, Cli::command().find_subcommand(subcommand)?.clone().name(*name)))
        }))
        .collect();
    let mut scripts = Vec::new();
    for (name, command) in names {
        for (shell, file) in [
            (Shell::Bash, name.to_owned()),
            (Shell::Zsh, format!("_{name}")),
            (Shell::Fish, format!("{name}.fish")),
        ] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command.clone(), name, &mut text);
            scripts.push(Script { file, text: String::from_utf8_lossy(&text).into_owned(), shell });
        }
    }
    scripts
}

/// Without what is hidden: the library would offer that too.
fn offered() -> clap::Command {
    let whole = Cli::command();
    let subcommands = whole.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()).cloned();
    clap::Command::new("bro")
        .version(env!("CARGO_PKG_VERSION"))
        .propagate_version(true)
        .args(whole.get_arguments().cloned())
        .subcommands(subcommands)
}
