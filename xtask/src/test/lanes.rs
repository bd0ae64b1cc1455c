//! Lanes run side by side, for each waits most of its time: a suite for its deadlines, a host for its containers. One lane is this
//! process's own; a tier of another lane runs in a process of its own, so that everything that it and its children print comes through one
//! pipe: each line is shown with its tier's name in front.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::summary::Count;
use super::tiers::{Lane, Tier};
use crate::build::target_folder;

/// How tiers are run by processes of this task's own.
pub struct Lanes {
    /// Where this task's program is, as long as cargo has not put another build of it there.
    task: PathBuf,
}

/// A tier that has run: its name, how long it took, what came of it.
pub type Ran = (String, Duration, Count);

impl Lanes {
    /// To be called before anything is built.
    pub fn new() -> Result<Self> {
        Ok(Self { task: std::env::current_exe().context("this task's own path")? })
    }

    /// Runs a lane's tiers one after another; `bro` is the binary under test.
    pub fn run(&self, lane: Lane, tiers: &[&Tier], bro: &Path) -> Result<Vec<Ran>> {
        let one = |tier: &&Tier| {
            if tier.needs_tools() {
                await_tools()?;
            }
            self.one(lane, tier.name(), bro)
        };
        // Those go last, for the tools may not be there yet.
        let mut tiers = tiers.to_vec();
        tiers.sort_by_key(|tier| tier.needs_tools());
        tiers.iter().map(one).collect()
    }

    fn one(&self, lane: Lane, tier: &str, bro: &Path) -> Result<Ran> {
        let answer = target_folder()?.join(format!("bro-test-count-{tier}"));
        show(tier, "begins");
        let begin = Instant::now();
        // A test finds a processor whenever it wants one.
        let niceness = if lane == Lane::Computing { "10" } else { "0" };
        let mut command = Command::new("nice");
        command.args(["-n", niceness]).arg(&self.task).args(["test", tier, "--count-to"]).arg(&answer);
        let (said, heard) = std::io::pipe().context("a pipe for what is printed")?;
        command.env("BRO_BIN", bro).stdin(Stdio::null()).stdout(heard.try_clone()?).stderr(heard);
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        // Its ends of the pipe: the lines end with the last process that has one.
        drop(command);
        for line in BufReader::new(said).split(b'\n') {
            show(tier, &String::from_utf8_lossy(&line.context("the tier's output")?));
        }
        let status = child.wait()?;
        let count = match std::fs::read(&answer) {
            Ok(count) => serde_json::from_slice(&count).with_context(|| format!("what came of {tier}"))?,
            Err(_) => {
                show(tier, &format!("ended without an answer: {status}"));
                Count::check(false)
            }
        };
        std::fs::remove_file(&answer).ok();
        show(tier, &format!("ends after {:.0} s", begin.elapsed().as_secs_f64()));
        Ok((tier.to_owned(), begin.elapsed(), count))
    }
}

/// CI builds the tools that cargo builds while the lanes begin, and holds a lock on the file that this variable names until
/// they are there.
const TOOLS: &str = "BRO_TOOLS_LOCK";

fn await_tools() -> Result<()> {
    let Some(lock) = std::env::var_os(TOOLS) else { return Ok(()) };
    let file = File::open(&lock).with_context(|| format!("{TOOLS}: cannot open {}", lock.display()))?;
    file.lock_shared().with_context(|| format!("{TOOLS}: cannot lock {}", lock.display()))
}

/// What came of the tier that this process runs for another one.
pub fn answer(count: &Count, to: &Path) -> Result<()> {
    std::fs::write(to, serde_json::to_vec(count)?).with_context(|| format!("cannot write {}", to.display()))
}

/// A line at once, whatever else prints at the same time.
fn show(tier: &str, line: &str) {
    std::io::stdout().write_all(format!("{tier:15} | {line}\n").as_bytes()).ok();
}
