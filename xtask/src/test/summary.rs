//! What is said at the end of a test run.

use std::collections::BTreeMap;
use std::ops::Add;
use std::time::Duration;

use anyhow::{Result, bail};

use super::second_look::MOST;

/// How many tests of a tier ended how. A test that lacked what it needs counts as skipped only.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Count {
    /// Ran and held.
    pub passed: usize,
    /// Ran and did not, or could not be built.
    pub failed: usize,
    /// Ran not, or found a need not met.
    pub skipped: usize,
    /// For each skipped test: its name and what it lacks, with the line that mends it.
    pub skips: Vec<(String, String)>,
    /// Those of `failed` that have a name.
    pub failures: Vec<Failure>,
    /// Those of `passed` that did so at a second look only.
    pub unsteady: Vec<Failure>,
}

/// A test that failed.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct Failure {
    /// Its name.
    pub test: String,
    /// The last of what it said.
    pub said: String,
    /// Those of its cases that failed, where it has cases.
    pub cases: Vec<Case>,
}

/// A case that failed, as the suite has noted it in the file that `BRO_FAILED_CASES` names.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// What it said.
    pub said: String,
    /// Others stand on it: those have not run.
    pub needed: bool,
}

impl Count {
    /// One check that is no test, such as the format.
    pub fn check(passed: bool) -> Self {
        Self { passed: passed.into(), failed: (!passed).into(), ..Self::default() }
    }

    /// A check whose tool is missing: a failure in CI.
    pub fn missing(check: &str, need: &str) -> Self {
        println!("{check}: {need}");
        if in_ci() {
            return Self::check(false);
        }
        Self { skipped: 1, skips: vec![(check.into(), need.into())], ..Self::default() }
    }
}

/// Whether a missing need is a failure.
pub fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| ci == "true")
}

impl Add for Count {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self.skips.extend(other.skips);
        self.failures.extend(other.failures);
        self.unsteady.extend(other.unsteady);
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
            ..self
        }
    }
}

fn say(what: &str, tests: &[Failure]) {
    if !tests.is_empty() {
        println!("\n!!!!!!!!!! {what} !!!!!!!!!!");
    }
    for Failure { test, said, cases } in tests {
        println!("{test}\n    {said}");
        for Case { name, said, .. } in cases {
            println!("  case {name}\n    {}", said.trim_end().replace('\n', "\n    "));
        }
    }
}

/// All tiers so far.
#[derive(Debug, Default)]
pub struct Summary {
    tiers: Vec<(String, Duration, Count)>,
}

impl Summary {
    /// Notes a tier that has run.
    pub fn add(&mut self, tier: &str, took: Duration, count: Count) {
        self.tiers.push((tier.to_owned(), took, count));
    }

    /// Prints everything; an error when anything failed or nothing ran.
    pub fn close(self, quick: bool) -> Result<()> {
        println!("\n{:20} {:>7} {:>7} {:>8} {:>9}", "tier", "passed", "failed", "skipped", "seconds");
        for (tier, took, count) in &self.tiers {
            let seconds = took.as_secs_f64();
            println!("{tier:20} {:>7} {:>7} {:>8} {seconds:>9.1}", count.passed, count.failed, count.skipped);
        }
        let total = self.tiers.into_iter().map(|(_, _, count)| count).fold(Count::default(), Count::add);

        let mut by_need: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (test, need) in &total.skips {
            by_need.entry(need).or_default().push(test);
        }
        if !by_need.is_empty() {
            println!("\n!!!!!!!!!! NOT TESTED HERE, for want of something: {} !!!!!!!!!!", total.skips.len());
        }
        for (need, mut tests) in by_need {
            tests.sort_unstable();
            println!("{need}\n    {}", tests.join("\n    "));
        }
        if quick {
            println!("\nLeft out by --quick: the tiers that take minutes (`cargo xtask test --list`).");
        }
        // Last, for logs of which only the end is kept.
        say("UNSTEADY: failed, and passed when run again, alone", &total.unsteady);
        say("FAILED", &total.failures);
        println!("\n{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
        match (total.passed, total.failed, total.unsteady.len()) {
            (0, 0, _) => bail!("no test ran"),
            (_, 0, unsteady) if unsteady > MOST => bail!("{unsteady} tests passed at a second look only"),
            (_, 0, _) => Ok(()),
            (_, failed, _) => bail!("{failed} failed"),
        }
    }
}
