//! `cargo xtask test`: every tier whose needs are met, one after another, and at the end what was left out and how to mend
//! that. With `CI=true` a missing need is a failure.

mod cargo_test;
mod fuzz;
mod lint;
mod ordinary_user;
mod programs;
mod second_look;
mod summary;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::build::workspace;
use cargo_test::Runner;
use summary::Summary;

/// `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave out the tiers that take minutes
    #[arg(long)]
    quick: bool,

    /// List the tiers and run none
    #[arg(long)]
    list: bool,

    /// Run only these tiers
    #[arg(value_name = "TIER")]
    tiers: Vec<String>,
}

/// One step of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tier {
    /// Format, clippy, docs, licences.
    Lint,
    /// What needs nothing but the compiler: unit tests, property tests and models.
    Logic,
    /// A file of integration tests of a package.
    Suite { package: &'static str, name: String },
    /// Whether the checked-in kernel programs are what their source makes.
    Programs,
    /// The fuzzers of `fuzz/`, a few seconds each.
    Fuzz,
    /// As root: the suites once more, by a user who may do nothing.
    OrdinaryUser,
}

/// Suites whose names begin so boot whole hosts or emulated machines, or take minutes for another reason.
const SLOW: &[&str] = &["emulator", "host", "million", "slow", "vm"];

/// Run only when named: they take minutes, and emulated processors bear no neighbours.
const BY_NAME: &[&str] = &["emulator", "million"];

impl Tier {
    fn name(&self) -> &str {
        match self {
            Self::Lint => "lint",
            Self::Logic => "logic",
            Self::Suite { name, .. } => name,
            Self::Programs => "kernel-programs",
            Self::Fuzz => "fuzz",
            Self::OrdinaryUser => "ordinary-user",
        }
    }

    fn is_slow(&self) -> bool {
        match self {
            Self::Suite { name, .. } => SLOW.iter().any(|slow| name.starts_with(slow)),
            Self::Programs | Self::Fuzz | Self::OrdinaryUser => true,
            Self::Lint | Self::Logic => false,
        }
    }

    /// All there are, the quick ones first. A suite is a file in a package's tests folder, so a new one needs no entry.
    fn all() -> Result<Vec<Self>> {
        let mut suites = Vec::new();
        for (package, folder) in [("bro-tests", "tests/tests"), ("xtask", "xtask/tests")] {
            suites.extend(suites_in(&workspace().join(folder))?.into_iter().map(|name| (package, name)));
        }
        suites.sort_by(|a, b| a.1.cmp(&b.1));
        let mut tiers = vec![Self::Lint, Self::Logic, Self::Programs, Self::Fuzz];
        tiers.extend(suites.into_iter().map(|(package, name)| Self::Suite { package, name }));
        if nix::unistd::geteuid().is_root() {
            tiers.push(Self::OrdinaryUser);
        }
        tiers.sort_by_key(Self::is_slow);
        Ok(tiers)
    }
}

fn suites_in(folder: &Path) -> Result<Vec<String>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let paths: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let suite = |path: &PathBuf| {
        let is_suite = path.extension() == Some(OsStr::new("rs")) || path.join("main.rs").is_file();
        is_suite.then(|| path.file_stem()?.to_str().map(str::to_owned)).flatten()
    };
    Ok(paths.iter().filter_map(suite).collect())
}

/// The task.
pub fn run(args: &Args) -> Result<()> {
    let all = Tier::all()?;
    if args.list {
        for tier in &all {
            let note = match tier.is_slow() {
                _ if BY_NAME.contains(&tier.name()) => "  (only when named)",
                true => "  (slow)",
                false => "",
            };
            println!("{}{note}", tier.name());
        }
        return Ok(());
    }
    for wanted in &args.tiers {
        if !all.iter().any(|tier| tier.name() == wanted) {
            let names: Vec<&str> = all.iter().map(Tier::name).collect();
            bail!("no tier is called {wanted}; there are {}", names.join(", "));
        }
    }
    let chosen = all.iter().filter(|tier| match args.tiers.as_slice() {
        [] => !(BY_NAME.contains(&tier.name()) || args.quick && tier.is_slow()),
        named => named.iter().any(|name| name == tier.name()),
    });

    std::env::set_current_dir(workspace()).context("the workspace's folder")?;
    let runner = Runner::new(crate::program::installed_bro()?)?;
    let mut summary = Summary::default();
    for tier in chosen {
        println!("\n== {} ==", tier.name());
        let begin = Instant::now();
        let count = match tier {
            Tier::Lint => lint::run()?,
            Tier::Logic => runner.run(&["--lib", "--bins"])? + runner.run(&["--doc"])?,
            Tier::Suite { name, .. } => runner.suite(name, tier.is_slow())?,
            Tier::Programs => programs::run()?,
            Tier::Fuzz => fuzz::run()?,
            Tier::OrdinaryUser => ordinary_user::run(&runner, &all)?,
        };
        summary.add(tier.name(), begin.elapsed(), count);
    }
    summary.close(args.quick)
}
