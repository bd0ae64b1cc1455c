//! The tier that runs each fuzzer of `fuzz/` for a few seconds, from its committed corpus on: what a change breaks at once is
//! seen, and so is a fuzzer that no longer builds. To look for longer: `cargo fuzz run NAME`.

use std::num::NonZero;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};

use super::summary::Count;
use crate::build::{cargo, target_folder};

const SECONDS: u32 = 5;

/// The version CI uses.
const MEND: &str = "needs cargo-fuzz: run `cargo install --locked cargo-fuzz@0.13.2`";
const MEND_COMPILER: &str = "needs a C++ compiler: run `sudo apt-get install g++`";

/// Builds and runs them all.
pub fn run() -> Result<Count> {
    for (mut probe, mend) in [(fuzz("--version"), MEND), (plain("c++", "--version"), MEND_COMPILER)] {
        let there = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !there.is_ok_and(|status| status.success()) {
            return Ok(Count::missing("fuzzers", mend));
        }
    }
    let folder = target_folder()?.join("fuzz");
    let build = fuzz("build").args(OPTIONS).arg("--target-dir").arg(&folder).status();
    ensure!(build.context("cannot run cargo")?.success(), "the fuzzers do not build");
    let listed = fuzz("list").arg("--fuzz-dir=fuzz").output().context("cannot run cargo")?;
    let names = String::from_utf8(listed.stdout)?;
    // One for each processor at a time: a fuzzer has one thread, and each has its seconds.
    let left = Mutex::new(names.lines());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let at_once = std::thread::available_parallelism().map_or(1, NonZero::get);
    let passed: Vec<bool> = std::thread::scope(|scope| -> Result<_> {
        let work =
            || std::iter::from_fn(next).map(|name| passes(name, &folder)).collect::<Result<Vec<bool>>>();
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let passed: Result<Vec<_>> =
            workers.into_iter().map(|one| one.join().expect("it does not panic")).collect();
        Ok(passed?.concat())
    })?;
    ensure!(!passed.is_empty(), "there are no fuzzers");
    Ok(passed.into_iter().fold(Count::default(), |count, passed| count + Count::check(passed)))
}

/// Runs one, and prints what it has said once it is over.
fn passes(name: &str, folder: &Path) -> Result<bool> {
    // What is found on the way is not to be committed unseen: the first folder takes it.
    let found = folder.join("found").join(name);
    std::fs::create_dir_all(&found)?;
    let mut run = fuzz("run");
    run.args(OPTIONS).arg("--target-dir").arg(folder).arg(name).arg(&found);
    run.arg(format!("fuzz/corpus/{name}")).arg("--");
    run.args([&format!("-max_total_time={SECONDS}"), "-timeout=10", "-max_len=4096", "-verbosity=0"]);
    run.arg(format!("-artifact_prefix={}/", folder.display()));
    let ran = run.stdin(Stdio::null()).output().context("cannot run cargo")?;
    let said = String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned();
    println!("{said}fuzz {name}: {}", if ran.status.success() { "ok" } else { "FAILED" });
    Ok(ran.status.success())
}

/// Safe code needs no sanitizer, and runs several times as fast without one.
const OPTIONS: [&str; 2] = ["--fuzz-dir=fuzz", "--sanitizer=none"];

/// `cargo fuzz` asks for instrumentation by options that a stable compiler takes only when it is told to.
fn fuzz(verb: &str) -> Command {
    let mut command = cargo();
    command.args(["fuzz", verb]).env("RUSTC_BOOTSTRAP", "1");
    command
}

fn plain(program: &str, argument: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(argument);
    command
}
