//! The results for programs. [`SCHEMA`] grows when a reader of the old form would misread the new one.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Report, Run};
use crate::bench::check::Verdict;
use crate::bench::contenders::{self, Contender, Moved};
use crate::bench::metrics;
use crate::bench::results::Results;

/// The form of the document.
pub const SCHEMA: u32 = 2;
/// Its name.
pub const FILE: &str = "results.json";

/// The whole document. Figures are in bytes and seconds.
pub fn render(report: &Report) -> Value {
    let results = &report.results;
    let contenders: Vec<Value> = report
        .present
        .iter()
        .map(|contender| json!({"key": contender.key, "label": contender.label, "how": contender.how}))
        .collect();
    let figures: Vec<Value> = results
        .all()
        .map(|(who, name, summary)| {
            let better = metrics::by_key(name).map(|m| if m.higher_is_better { "higher" } else { "lower" });
            json!({"contender": who, "figure": name, "better": better, "median": summary.median, "min": summary.min,
                "max": summary.max, "samples": summary.samples})
        })
        .collect();
    let failures: Vec<Value> = results
        .failures
        .iter()
        .map(|(who, what, why)| json!({"contender": who, "workload": what, "why": why}))
        .collect();
    let moved: Vec<Value> = results
        .moved
        .iter()
        .flat_map(|(who, list)| {
            list.iter().map(move |(what, bytes)| json!({"contender": who, "phase": what, "bytes": bytes}))
        })
        .collect();
    let doubts: Vec<String> = report.runs.iter().flat_map(|run| run.environment.doubts()).collect();
    json!({
        "schema": SCHEMA,
        "runs": report.runs,
        "contenders": contenders,
        "versions": report.versions,
        "missing": report.missing,
        "figures": figures,
        "correctness": results.verdicts,
        "failures": failures,
        "moved": moved,
        "left_out": results.left_out,
        "doubts": doubts,
    })
}

/// What of a document later runs add to.
#[derive(Debug, Deserialize)]
struct Document {
    schema: u32,
    runs: Vec<Run>,
    versions: Vec<(String, String)>,
    contenders: Vec<Key>,
    figures: Vec<Figure>,
    correctness: std::collections::BTreeMap<String, Vec<Verdict>>,
    failures: Vec<Failure>,
    moved: Vec<MovedBy>,
    left_out: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Key {
    key: String,
}

#[derive(Debug, Deserialize)]
struct Figure {
    contender: String,
    figure: String,
    samples: Vec<f64>,
}

#[derive(Debug, Deserialize)]
struct Failure {
    contender: String,
    workload: String,
    why: String,
}

#[derive(Debug, Deserialize)]
struct MovedBy {
    contender: String,
    phase: String,
    bytes: Moved,
}

fn known(key: &str) -> Result<Contender> {
    let contender = contenders::ALL.into_iter().find(|contender| contender.key == key);
    contender.with_context(|| format!("it has a contender {key}, which is none any more"))
}

/// What earlier runs have left in a folder.
pub fn read(folder: &Path) -> Result<Report> {
    let path = folder.join(FILE);
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    understand(&text).with_context(|| format!("{} cannot be added to", path.display()))
}

fn understand(text: &[u8]) -> Result<Report> {
    let document: Document = serde_json::from_slice(text)?;
    ensure!(document.schema == SCHEMA, "it is of form {}, not {SCHEMA}", document.schema);
    let mut results = Results::default();
    results.left_out = document.left_out;
    for Figure { contender, figure, samples } in document.figures {
        let contender = known(&contender)?;
        for sample in samples {
            results.add(&contender, [(figure.clone(), sample)].into());
        }
    }
    for (contender, verdicts) in document.correctness {
        results.verdicts.insert(known(&contender)?.key, verdicts);
    }
    let failures = document.failures.into_iter();
    results.failures = failures.map(|failure| (failure.contender, failure.workload, failure.why)).collect();
    for MovedBy { contender, phase, bytes } in document.moved {
        results.moved.entry(known(&contender)?.key).or_default().push((phase, bytes));
    }
    let present = document.contenders.iter().map(|contender| known(&contender.key)).collect::<Result<_>>()?;
    let (runs, versions) = (document.runs, document.versions);
    Ok(Report { runs, present, missing: Vec::new(), versions, results })
}
