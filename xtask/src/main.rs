//! The project's own tasks, one file a task: `cargo xtask run` shows the main job on this host, `cargo xtask test` runs
//! every tier of tests whose needs are met, `cargo xtask bench` compares forwarders.

mod bench;
mod build;
mod build_ebpf;
mod dist;
mod program;
mod run;
mod test;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The project's own tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show the main job here: a sleeping service in a namespace, woken by its first client
    Run(run::Args),
    /// Run every tier of tests whose needs are met, and say loudly what was left out
    Test(test::Args),
    /// Compare bro with every other forwarder that is here: a table, plots and JSON
    Bench(Box<bench::Args>),
    /// Make the kernel relay's programs from source, or check that those checked in are what the source makes
    BuildEbpf(build_ebpf::Args),
    /// Make what package managers install: man pages, completions, a Debian package, an RPM
    Dist(dist::Args),
    /// A process of `run`: its container, service, client or forwarder
    #[command(subcommand, hide = true)]
    Part(run::Part),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Run(args) => run::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::BuildEbpf(args) => build_ebpf::run(&args),
        Task::Dist(args) => dist::run(&args),
        Task::Part(part) => run::part(part),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            std::io::stderr().write_all(format!("xtask: {error:#}\n").as_bytes()).ok();
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Cli;

    /// An attribute of a task's own parts can hide the task.
    #[test]
    fn help_names_every_task() {
        let help = Cli::command().render_help().to_string();
        for task in ["run", "test", "bench", "build-ebpf", "dist"] {
            assert!(
                help.lines().any(|line| line.trim_start().starts_with(&format!("{task} "))),
                "{task}:\n{help}"
            );
        }
        assert!(!help.contains("part"), "{help}");
    }
}
