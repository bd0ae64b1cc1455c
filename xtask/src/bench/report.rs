//! What a run leaves: JSON for programs, Markdown for people, plots for both.

mod json;
mod markdown;
mod plots;

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::contenders::Contender;
use super::environment::Environment;
use super::plan::Plan;
use super::results::Results;
use super::tools::Missing;

/// The checked-in report, and its plots and JSON.
const PUBLISHED: &str = "BENCHMARKS.md";
const PUBLISHED_PLOTS: &str = "benchmarks";

/// One run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    pub environment: Environment,
    pub plan: Plan,
    /// What it measured.
    pub workloads: Vec<String>,
}

/// All of a run, and of those that it adds to.
pub struct Report {
    /// In the order in which they ran.
    pub runs: Vec<Run>,
    pub present: Vec<Contender>,
    pub missing: Vec<Missing>,
    pub versions: Vec<(String, String)>,
    pub results: Results,
}

impl Report {
    /// What earlier runs have left in a folder.
    pub fn read(folder: &Path) -> Result<Self> {
        json::read(folder)
    }

    /// Takes up what earlier runs have measured and this one has not. Figures are compared within a row, and so each row is of one
    /// run as a whole.
    pub fn add_to(mut self, mut earlier: Self) -> Result<Self> {
        for (before, now) in earlier.runs.iter().zip(self.runs.iter().cycle()) {
            let machine = |run: &Run| (run.environment.kernel.clone(), run.environment.processor.clone());
            ensure!(machine(before) == machine(now), "the earlier figures are of another machine or kernel");
        }
        let again: Vec<String> = self.runs.iter().flat_map(|run| run.workloads.clone()).collect();
        earlier.results.forget(&again);
        for run in &mut earlier.runs {
            run.workloads.retain(|workload| !again.contains(workload));
        }
        earlier.runs.retain(|run| !run.workloads.is_empty());
        self.results.take_up(earlier.results);
        earlier.runs.append(&mut self.runs);
        self.runs = earlier.runs;
        let was_present = |key: &str| earlier.present.iter().any(|contender| contender.key == key);
        let is_present = |key: &str| self.present.iter().any(|contender| contender.key == key);
        let all = super::contenders::ALL.into_iter();
        self.present =
            all.filter(|contender| is_present(contender.key) || was_present(contender.key)).collect();
        for version in earlier.versions {
            if !self.versions.contains(&version) {
                self.versions.push(version);
            }
        }
        Ok(self)
    }

    /// The run that ended last.
    fn last(&self) -> &Run {
        self.runs.last().expect("a report is of at least one run")
    }

    /// As Markdown, with plots beside it.
    pub fn markdown(&self) -> String {
        markdown::render(self, "")
    }

    /// Writes everything into a folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.files(folder, &folder.join("report.md"), "")
    }

    /// Writes what is checked in.
    pub fn publish(&self) -> Result<()> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace's folder")?;
        let folder = root.join(PUBLISHED_PLOTS);
        std::fs::create_dir_all(&folder)?;
        self.files(&folder, &root.join(PUBLISHED), &format!("{PUBLISHED_PLOTS}/"))
    }

    fn files(&self, folder: &Path, markdown: &Path, plots: &str) -> Result<()> {
        let json = serde_json::to_string_pretty(&json::render(self))?;
        std::fs::write(folder.join(json::FILE), json + "\n").context("writing results.json")?;
        std::fs::write(markdown, markdown::render(self, plots)).context("writing the report")?;
        plots::draw(self, folder)
    }
}
