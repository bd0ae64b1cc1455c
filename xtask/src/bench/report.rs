//! What a run leaves: JSON for programs, Markdown for people, plots for both.

mod json;
mod markdown;
mod plots;

use std::path::Path;

use anyhow::{Context as _, Result};

use super::contenders::Contender;
use super::environment::Environment;
use super::plan::Plan;
use super::results::Results;
use super::tools::Missing;

/// The checked-in report, and its plots and JSON.
const PUBLISHED: &str = "BENCHMARKS.md";
const PUBLISHED_PLOTS: &str = "benchmarks";

/// All of a run.
pub struct Report {
    pub environment: Environment,
    pub plan: Plan,
    pub present: Vec<Contender>,
    pub missing: Vec<Missing>,
    pub versions: Vec<(String, String)>,
    pub results: Results,
}

impl Report {
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
        std::fs::write(folder.join("results.json"), json + "\n").context("writing results.json")?;
        std::fs::write(markdown, markdown::render(self, plots)).context("writing the report")?;
        plots::draw(self, folder)
    }
}
