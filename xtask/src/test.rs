//! `cargo xtask test`: every tier whose needs are met, in lanes that run side by side, and at the end what was left out and how to
//! mend that. With `CI=true` a missing need is a failure.

mod cargo_test;
mod fuzz;
mod lanes;
mod licences;
mod lint;
mod ordinary_user;
mod programs;
mod second_look;
mod summary;
mod tiers;

use std::ops::Add as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::build::workspace;
use cargo_test::Runner;
use lanes::Lanes;
use summary::{Count, Summary};
use tiers::{Lane, Tier};

/// `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave out the tiers that take minutes
    #[arg(long)]
    quick: bool,

    /// List the tiers with what they need and how long they take, and run none
    #[arg(long)]
    list: bool,

    /// For the task itself: write what came of the one tier to this file, as JSON, instead of summing up
    #[arg(long, hide = true, value_name = "FILE", requires = "tiers")]
    count_to: Option<PathBuf>,

    /// Run only these tiers
    #[arg(value_name = "TIER")]
    tiers: Vec<String>,
}

/// The task.
pub fn run(args: &Args) -> Result<()> {
    let all = Tier::all()?;
    if args.list {
        for tier in &all {
            println!("{}", tier.described()?);
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
        [] => !(tier.is_run_by_name_only() || args.quick && tier.is_slow()),
        named => named.iter().any(|name| name == tier.name()),
    });

    let chosen: Vec<&Tier> = chosen.collect();

    std::env::set_current_dir(workspace()).context("the workspace's folder")?;
    if let Some(to) = &args.count_to {
        let runner = Runner::new(crate::program::installed_bro()?)?;
        let counts = chosen.iter().map(|tier| tier.run(&runner, &all)).collect::<Result<Vec<_>>>()?;
        return lanes::answer(&counts.into_iter().fold(Count::default(), Count::add), to);
    }
    let runs: Vec<&Tier> = chosen.iter().copied().filter(|tier| **tier != Tier::Lint).collect();
    // A lane alone needs no other process.
    let alone = runs.windows(2).all(|pair| pair[0].lane() == pair[1].lane());
    let lane_of = |tier: &Tier| if alone { Lane::Front } else { tier.lane() };
    let in_lane = |lane| runs.iter().copied().filter(|tier| lane_of(tier) == lane).collect::<Vec<&Tier>>();
    let mut summary = Summary::default();
    if runs.is_empty() {
        // No program is needed.
        run_one(Tier::Lint.name(), &mut summary, lint::run)?;
        return summary.close(args.quick);
    }
    let lanes = Lanes::new()?;
    let bro = build(&chosen, &mut summary)?;
    let runner = Runner::new(bro)?;
    let beside = [Lane::Hosts, Lane::Computing].map(|lane| (lane, in_lane(lane)));
    std::thread::scope(|scope| {
        let (lanes, bro) = (&lanes, runner.bro.as_path());
        let beside: Vec<_> =
            beside.iter().map(|(lane, tiers)| scope.spawn(move || lanes.run(*lane, tiers, bro))).collect();
        for tier in in_lane(Lane::Front) {
            run_one(tier.name(), &mut summary, || tier.run(&runner, &all))?;
        }
        for lane in beside {
            for (name, took, count) in lane.join().expect("it does not panic")? {
                summary.add(&name, took, count);
            }
        }
        anyhow::Ok(())
    })?;
    for tier in in_lane(Lane::Alone) {
        run_one(tier.name(), &mut summary, || tier.run(&runner, &all))?;
    }
    summary.close(args.quick)
}

fn run_one(name: &str, summary: &mut Summary, tier: impl FnOnce() -> Result<Count>) -> Result<()> {
    println!("\n== {name} ==");
    let begin = Instant::now();
    let count = tier()?;
    summary.add(name, begin.elapsed(), count);
    Ok(())
}

/// Builds the binary under test. The optimised build has work for one processor most of its time, so `lint`, which needs no binary, runs
/// beside it, and so does the build of all the tests where more than one tier is wanted: together they keep two processors busy, and no
/// tier keeps another one waiting for its build later.
fn build(chosen: &[&Tier], summary: &mut Summary) -> Result<PathBuf> {
    std::thread::scope(|scope| {
        let bro = scope.spawn(crate::program::installed_bro);
        if chosen.contains(&&Tier::Lint) {
            run_one(Tier::Lint.name(), summary, lint::run)?;
        }
        if chosen.len() > 1 {
            // What does not build is a failure of the tier that needs it.
            crate::build::cargo()
                .args(["test", "--workspace", "--no-run", "--quiet"])
                .status()
                .context("cannot run cargo")?;
        }
        bro.join().expect("it does not panic")
    })
}

impl Tier {
    fn run(&self, runner: &Runner, all: &[Self]) -> Result<Count> {
        match self {
            Self::Lint => lint::run(),
            Self::Licences => licences::run(),
            Self::Logic => Ok(runner.run(&["--lib", "--bins"])? + runner.run(&["--doc"])?),
            Self::Suite { name, .. } => runner.suite(name, self.is_slow()),
            Self::Programs => programs::run(),
            Self::Fuzz => fuzz::run(),
            Self::Disk => runner.run(&["--test", "vm", "--", "--exact", "the_disk_is_there"]),
            Self::OrdinaryUser => ordinary_user::run(runner, all),
        }
    }
}
