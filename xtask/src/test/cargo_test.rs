//! `cargo test`, with its output shown as it comes and its result lines added up.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::summary::Count;
use crate::build::cargo;

/// Runs tests with the built binary.
pub struct Runner {
    /// The binary under test.
    pub bro: PathBuf,
    skips: PathBuf,
}

impl Runner {
    /// `bro` is the binary under test.
    pub fn new(bro: PathBuf) -> Result<Self> {
        let folder = bro.parent().context("the binary is in a folder")?;
        // Beside the binary when that is the build's own folder, so that nothing is left elsewhere.
        let skips = if folder.ends_with("release") {
            folder.join("bro-test-skips")
        } else {
            std::env::temp_dir().join(format!("bro-test-skips-{}", std::process::id()))
        };
        Ok(Self { bro, skips })
    }

    /// `cargo test ARGS`, to the end even when tests fail. Always for the whole workspace: with fewer packages cargo may
    /// choose other features of what they depend on, and build all of that once more.
    pub fn run(&self, args: &[&str]) -> Result<Count> {
        self.count(cargo().args(["test", "--workspace", "--no-fail-fast"]).args(args), &self.skips)
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
        for line in BufReader::new(child.stdout.take().context("stdout is a pipe")?).lines() {
            let line = line.context("the tests' output")?;
            println!("{line}");
            count = count + result_line(&line).unwrap_or_default();
        }
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
        skips: Vec::new(),
    })
}

/// `SKIPPED the_test: needs this; needs that`
fn skip_note(line: &str) -> Option<(String, String)> {
    let (test, need) = line.strip_prefix("SKIPPED ")?.split_once(": ")?;
    Some((test.to_owned(), need.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{result_line, skip_note};

    #[test]
    fn a_result_line_gives_its_counts() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.1s";
        let count = result_line(line).expect("a result line");
        assert_eq!((count.passed, count.failed, count.skipped), (12, 3, 1));
        assert!(result_line("test result_line ... ok").is_none());
    }

    #[test]
    fn a_skip_note_gives_the_test_and_its_need() {
        let note = skip_note("SKIPPED rootless::enters: needs wrk: run `sudo apt-get install wrk`");
        let (test, need) = note.expect("a note");
        assert_eq!(test, "rootless::enters");
        assert_eq!(need, "needs wrk: run `sudo apt-get install wrk`");
    }
}
