//! The `bro` command: reads the command line, sets logging up, runs, and turns errors into one sentence and an exit code.

use std::process::ExitCode;

use bro_user::cli::{Cli, Command};
use bro_user::listen::Environment;
use bro_user::{doctor, exit, forward, logging, netns, status};
use clap::Parser as _;

fn main() -> ExitCode {
    // Before any thread exists, since it changes the environment.
    let environment = Environment::take();
    let result = match Cli::parse().command {
        Command::Forward(options) => {
            logging::init(options.verbose);
            forward::run(&options, &environment)
        }
        Command::Status(options) => status::run(&options),
        Command::Doctor(options) => doctor::run(&options).and_then(|well| {
            if well {
                Ok(())
            } else {
                anyhow::bail!("something that bro is for does not work here; see the lines marked BAD")
            }
        }),
        Command::NetnsAgent => netns::agent::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            exit::code_of(&error)
        }
    }
}

#[expect(clippy::print_stderr, reason = "the one sentence that a failing command says")]
fn complain(error: &anyhow::Error) {
    eprintln!("bro: {error:#}");
}
