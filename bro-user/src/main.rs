//! The `bro` command: reads the command line, sets logging up, runs, and turns errors into one sentence and an exit code.

// Only where the functions are in use without being named: see there.
#[cfg(all(target_os = "linux", target_env = "gnu", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod words;

use std::io::Write as _;
use std::process::ExitCode;

use bro_user::cli::{self, Cli, Command};
use bro_user::commands::forward::handover::Predecessor;
use bro_user::commands::{
    activate, after_upgrade, doctor, fence, forward, helper, loader, metrics, oci_runtime, status, top,
    wake_sleep,
};
use bro_user::systemd::listen_fds;
use bro_user::{exit, logging};

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if words.first().is_some_and(|program| oci_runtime::is_called(program)) {
        let Err(error) = oci_runtime::run(&words);
        complain(&error);
        return exit::code_of(&error);
    }
    let cli = match Cli::read(command_line()) {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error),
    };
    let command = match cli.command {
        // Passed sockets are for the command that this process becomes.
        Command::Helper(options) => {
            let Err(error) = helper::run(&options);
            complain(&error);
            return exit::code_of(&error);
        }
        command => command,
    };
    // First of all: nothing is open yet that could take a passed descriptor's number, and no thread reads the environment.
    let predecessor = Predecessor::take();
    let passed = listen_fds::take_passed(if predecessor.is_some() {
        listen_fds::From::Predecessor
    } else {
        listen_fds::From::Systemd
    });
    let result = match command {
        Command::Forward(options) => {
            logging::init(options.verbose);
            forward::run(&options, passed, predecessor)
        }
        Command::Activate(options) => activate::run(&options),
        Command::Wake(options) => wake_sleep::wake(&options),
        Command::Sleep(options) => wake_sleep::sleep(&options),
        Command::Status(options) => status::run(&options),
        Command::Top(options) => top::run(&options),
        Command::Metrics(options) => metrics::run(&options),
        Command::Doctor(options) => doctor::run(&options).and_then(|well| {
            if well {
                Ok(())
            } else {
                anyhow::bail!("something that bro is for does not work here; see the lines marked BAD")
            }
        }),
        Command::Loader(options) => {
            logging::init(0);
            loader::run(&options)
        }
        Command::Fence(options) => fence::run(&options),
        Command::Helper(_) => unreachable!("dealt with above"),
        Command::AfterUpgrade(options) => after_upgrade::run(&options),
        Command::TryWake(options) => doctor::try_wake(&options),
        Command::NetnsAgent => bro_relay::netns::agent::run(),
    };
    let code = match exit::unless_reader_has_gone(result) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            exit::code_of(&error)
        }
    };
    logging::flush();
    code
}

/// The command line; called by one of the subcommands' names, as if that were said.
fn command_line() -> Vec<std::ffi::OsString> {
    let mut words: Vec<_> = std::env::args_os().collect();
    let called = words.first().map(std::path::Path::new).and_then(std::path::Path::file_name);
    let named = cli::NAMES.iter().find(|(name, _)| called.is_some_and(|called| called == *name));
    if let Some((_, subcommand)) = named {
        words[0] = "bro".into();
        words.insert(1, subcommand.into());
    }
    words
}

/// clap's own words in one sentence; its help and version as they are.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if error.kind() == ErrorKind::MissingSubcommand
        || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        complain(&anyhow::anyhow!(
            "say what to do: `bro activate`, `bro forward`, `bro status` or `bro doctor` (see `bro --help`)"
        ));
        return ExitCode::from(2);
    }
    if !error.use_stderr() {
        return error
            .print()
            .map_or(ExitCode::FAILURE, |()| ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2)));
    }
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let first: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    complain(&anyhow::anyhow!("{} (see `bro --help`)", first.join(" ")));
    ExitCode::from(2)
}

fn complain(error: &anyhow::Error) {
    // If no process reads that either, the exit code says it.
    writeln!(std::io::stderr(), "bro: {}", exit::sentence(error)).ok();
}
