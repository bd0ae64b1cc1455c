//! The results for programs. [`SCHEMA`] grows when a reader of the old form would misread the new one.

use serde_json::{Value, json};

use super::Report;
use crate::bench::metrics;

/// The form of the document.
pub const SCHEMA: u32 = 1;

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
    json!({
        "schema": SCHEMA,
        "environment": report.environment,
        "plan": report.plan,
        "contenders": contenders,
        "versions": report.versions,
        "missing": report.missing,
        "figures": figures,
        "correctness": results.verdicts,
        "failures": failures,
        "moved": moved,
        "left_out": results.left_out,
        "doubts": report.environment.doubts(),
    })
}
