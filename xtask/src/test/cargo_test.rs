//! `cargo test`, with its output shown as it comes and its result lines added up.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::second_look;
use super::summary::{Case, Count, Failure};
use crate::build::{cargo, target_folder};

/// Runs tests with the built binary.
pub struct Runner {
    /// The binary under test.
    pub bro: PathBuf,
    skips: PathBuf,
    cases: PathBuf,
}

impl Runner {
    /// `bro` is the binary under test.
    pub fn new(bro: PathBuf) -> Result<Self> {
        // Of this process: tiers that run side by side have one each.
        let own = |what| {
            target_folder().map(|target| target.join(format!("bro-test-{what}-{}", std::process::id())))
        };
        Ok(Self { bro, skips: own("skips")?, cases: own("cases")? })
    }

    /// `cargo test ARGS`, to the end even when tests fail. Always for the whole workspace: with fewer packages cargo may
    /// choose other features of what they depend on, and build all of that once more.
    pub fn run(&self, args: &[&str]) -> Result<Count> {
        self.run_cases(args, &[])
    }

    /// The same, of a suite's cases only those with these names.
    fn run_cases(&self, args: &[&str], names: &[&str]) -> Result<Count> {
        let mut command = cargo();
        command.args(["test", "--workspace", "--no-fail-fast"]).args(args);
        if !names.is_empty() {
            // A line each: one alone would be a part of a name.
            command.env("BRO_CASE", names.join("\n") + "\n");
        }
        File::create(&self.cases).context("a file for the failed cases' names")?;
        let mut count = self.count(command.env("BRO_FAILED_CASES", &self.cases), &self.skips)?;
        let noted = std::fs::read_to_string(&self.cases)?;
        std::fs::remove_file(&self.cases)?;
        if let [failure] = &mut count.failures[..] {
            failure.cases = cases(&noted)?;
        }
        Ok(count)
    }

    /// The suite called `name`, its tests side by side or one by one.
    pub fn suite(&self, name: &str, one_by_one: bool) -> Result<Count> {
        let alone = ["--test", name, "--", "--test-threads=1"];
        let first = self.run(if one_by_one { &alone } else { &alone[..2] })?;
        second_look::look(name, first, |failed, cases| {
            let exact = alone.into_iter().chain(["--exact"]).chain(failed.iter().copied());
            self.run_cases(&exact.collect::<Vec<_>>(), cases)
        })
    }

    /// Any command that prints as a test binary does, with `skips` as the file where tests note what they lack.
    pub fn count(&self, command: &mut Command, skips: &Path) -> Result<Count> {
        File::create(skips).context("a file for the skipped tests' names")?;
        let mut child = command
            .env("BRO_BIN", &self.bro)
            .env("BRO_SKIPS", skips)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        let mut count = Count::default();
        let mut failures = Failures::default();
        for line in BufReader::new(child.stdout.take().context("stdout is a pipe")?).lines() {
            let line = line.context("the tests' output")?;
            println!("{line}");
            failures.line(&line);
            count = count + result_line(&line).unwrap_or_default();
        }
        count.failures = failures.all;
        let succeeded = child.wait()?.success();
        if !succeeded && count.failed == 0 {
            // It did not build, or a test binary died.
            count.failed = 1;
        }
        let mut notes: Vec<(String, String)> =
            std::fs::read_to_string(skips)?.lines().filter_map(skip_note).collect();
        std::fs::remove_file(skips)?;
        notes.sort();
        notes.dedup();
        // The test harness knows no skipping: such a test has returned early and counts as passed there.
        count.passed = count.passed.saturating_sub(notes.len());
        count.skipped += notes.len();
        count.skips.extend(notes);
        Ok(count)
    }
}

/// `test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s`
fn result_line(line: &str) -> Option<Count> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |of: &str| {
        let part = counts.split("; ").find_map(|part| part.strip_suffix(of))?;
        part.trim().parse().ok()
    };
    Some(Count {
        passed: number("passed")?,
        failed: number("failed")?,
        skipped: number("ignored")?,
        ..Count::default()
    })
}

/// Collects, from the part of the output where each failed test has what it printed, its name and the end of that.
#[derive(Default)]
struct Failures {
    all: Vec<Failure>,
    /// Whether the lines are what the last of them has said, from its complaint on.
    complains: bool,
}

impl Failures {
    /// Long enough for a sentence and what led to it.
    const KEPT: usize = 400;

    fn line(&mut self, line: &str) {
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.all.push(Failure { test: test.to_owned(), said: String::new(), cases: Vec::new() });
            self.complains = false;
        } else if ["failures:", "Stack backtrace:"].contains(&line) {
            // The list of their names; and that says where, not what.
            self.complains = false;
        } else if let Some(failure) = self.all.last_mut() {
            let begins = line.starts_with("Error: ")
                || line.contains("' panicked at ")
                || line.contains(") panicked at ");
            self.complains |= begins && failure.said.is_empty();
            if self.complains && !line.trim().is_empty() && failure.said.len() < Self::KEPT {
                failure.said += if failure.said.is_empty() { "" } else { " " };
                failure.said += line.trim();
            }
        }
    }
}

/// What a suite with cases has noted: a JSON object a line.
fn cases(noted: &str) -> Result<Vec<Case>> {
    noted
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no failed case: {line}")))
        .collect()
}

/// `SKIPPED the_test: needs this; needs that`
fn skip_note(line: &str) -> Option<(String, String)> {
    let (test, need) = line.strip_prefix("SKIPPED ")?.split_once(": ")?;
    Some((test.to_owned(), need.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{Failures, cases, result_line, skip_note};

    #[test]
    fn a_result_line_gives_its_counts() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.1s";
        let count = result_line(line).expect("a result line");
        assert_eq!((count.passed, count.failed, count.skipped), (12, 3, 1));
        assert!(result_line("test result_line ... ok").is_none());
    }

    #[test]
    fn a_failed_test_is_named_with_what_it_said_last() {
        let output = "test one ... FAILED\n\nfailures:\n\n---- a::one stdout ----\nits log\nError: 0 wakes\n\nCaused by:\n    why\n\n\n\
            failures:\n    a::one\n\ntest result: FAILED. 2 passed; 1 failed";
        let mut failures = Failures::default();
        output.lines().for_each(|line| failures.line(line));
        let [failure] = failures.all.as_slice() else { panic!("one failure") };
        assert_eq!(failure.test, "a::one");
        assert_eq!(failure.said, "Error: 0 wakes Caused by: why");
    }

    #[test]
    fn failed_cases_are_read_with_what_they_said() {
        let noted = "{\"name\":\"networks: own, the host's\",\"said\":\"no\\nmore\",\"needed\":false}\n";
        let read = cases(noted).expect("a case");
        assert_eq!((read[0].name.as_str(), read[0].said.as_str()), ("networks: own, the host's", "no\nmore"));
        assert!(!read[0].needed && read.len() == 1 && cases("").expect("no case").is_empty());
        assert!(cases("name").is_err());
    }

    #[test]
    fn a_skip_note_gives_the_test_and_its_need() {
        let note = skip_note("SKIPPED rootless::enters: needs wrk: run `sudo apt-get install wrk`");
        let (test, need) = note.expect("a note");
        assert_eq!(test, "rootless::enters");
        assert_eq!(need, "needs wrk: run `sudo apt-get install wrk`");
    }
}
