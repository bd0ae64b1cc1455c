//! The plots, as SVG: bars, one group a contender.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Report;
use crate::bench::metrics::{self, Metric};

/// One plot.
struct Plot {
    file: &'static str,
    /// The section of the report that shows it.
    section: &'static str,
    title: &'static str,
    metrics: &'static [&'static str],
    /// Whether the figures add up to one bar.
    stacked: bool,
}

const PLOTS: &[Plot] = &[
    Plot {
        file: "throughput.svg",
        section: "Bulk",
        title: "Throughput of one connection, GiB/s (more is better)",
        metrics: &["download.bytes_per_second", "upload.bytes_per_second", "duplex.bytes_per_second"],
        stacked: false,
    },
    Plot {
        file: "cpu-per-gib.svg",
        section: "CPU per GiB",
        title: "CPU seconds of the whole system per GiB (less is better)",
        metrics: &["download.system_cpu_per_gib", "upload.system_cpu_per_gib", "duplex.system_cpu_per_gib"],
        stacked: false,
    },
    Plot {
        file: "round-trips.svg",
        section: "Round trips",
        title: "Round trip of 64 B, µs (less is better)",
        metrics: &["requests64.p50", "requests64.p99", "requests64.p999"],
        stacked: false,
    },
    Plot {
        file: "round-trips-16k.svg",
        section: "Round trips",
        title: "Round trip of 16 KiB, µs (less is better)",
        metrics: &["requests16k.p50", "requests16k.p99", "requests16k.p999"],
        stacked: false,
    },
    Plot {
        file: "memory.svg",
        section: "Memory per idle connection",
        title: "Memory of the process per idle connection, KiB (less is better)",
        metrics: &["idle1000.process_bytes", "idle9000.process_bytes"],
        stacked: false,
    },
    Plot {
        file: "programs.svg",
        section: "Databases",
        title: "Requests a second of real programs (more is better)",
        metrics: &["pgbench.per_second", "redis.per_second", "wrk.per_second"],
        stacked: false,
    },
    Plot {
        file: "cold-start.svg",
        section: "Cold start",
        title: "Cold start, ms until the first byte (less is better)",
        metrics: &["cold.systemd", "cold.container", "cold.readiness", "cold.relay"],
        stacked: true,
    },
];

const COLOURS: [RGBColor; 4] = [
    RGBColor(0x1b, 0x6c, 0xa8),
    RGBColor(0xe0, 0x8e, 0x1b),
    RGBColor(0x8a, 0x3f, 0x8f),
    RGBColor(0x4a, 0x9a, 0x5a),
];
/// A bar longer than so many times the median bar is cut, with its figure beside it: one outlier must not flatten the rest.
const LONGEST: f64 = 6.0;

/// One bar, or one part of it.
struct Bar<'a> {
    metric: &'a Metric,
    median: f64,
    min: f64,
    max: f64,
}

/// The files of a section's plots.
pub fn names_for(report: &Report, section: &str) -> Vec<&'static str> {
    PLOTS
        .iter()
        .filter(|plot| plot.section == section && !rows(report, plot).is_empty())
        .map(|plot| plot.file)
        .collect()
}

/// Draws all that there are figures for.
pub fn draw(report: &Report, folder: &Path) -> Result<()> {
    for plot in PLOTS {
        let rows = rows(report, plot);
        if !rows.is_empty() {
            one(plot, &rows, &folder.join(plot.file))
                .map_err(|error| anyhow!("drawing {}: {error}", plot.file))?;
        }
    }
    Ok(())
}

fn rows<'a>(report: &'a Report, plot: &Plot) -> Vec<(&'a str, Vec<Bar<'static>>)> {
    let bars = |contender| {
        let figures = plot.metrics.iter().filter_map(|key| metrics::by_key(key));
        let bars = figures.filter_map(|metric| {
            let figure = report.results.get(contender, metric)?;
            let scale = |value| metric.unit.scale(value).max(0.0);
            Some(Bar { metric, median: scale(figure.median), min: scale(figure.min), max: scale(figure.max) })
        });
        bars.collect::<Vec<_>>()
    };
    report
        .present
        .iter()
        .map(|contender| (contender.label, bars(contender)))
        .filter(|(_, bars)| !bars.is_empty())
        .collect()
}

fn one(plot: &Plot, rows: &[(&str, Vec<Bar<'_>>)], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    const WIDTH: u32 = 900;
    const LEFT: i32 = 200;
    const RIGHT: i32 = 90;
    const TOP: i32 = 62;
    const BAR: i32 = 11;
    const GAP: i32 = 9;
    let heights =
        rows.iter().map(|(_, bars)| if plot.stacked { 2 * BAR } else { BAR * bars.len() as i32 } + GAP);
    let height = TOP + heights.sum::<i32>() + GAP;
    let area = SVGBackend::new(path, (WIDTH, height.unsigned_abs())).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size: i32| ("sans-serif", size).into_font();
    area.draw(&Text::new(plot.title, (12, 10), font(17)))?;
    let mut at = LEFT;
    for (metric, colour) in plot.metrics.iter().filter_map(|key| metrics::by_key(key)).zip(COLOURS) {
        area.draw(&Rectangle::new([(at, 38), (at + 10, 48)], colour.filled()))?;
        area.draw(&Text::new(metric.title, (at + 15, 37), font(12)))?;
        at += 40 + 8 * metric.title.chars().count() as i32;
    }

    let full = longest(plot, rows);
    let place = |value: f64| LEFT + (value.min(full) / full * f64::from(WIDTH as i32 - LEFT - RIGHT)) as i32;
    let mut y = TOP;
    for (label, bars) in rows {
        let high = if plot.stacked { 2 * BAR } else { BAR * bars.len() as i32 };
        let right = font(13).into_text_style(&area).pos(Pos::new(HPos::Right, VPos::Center));
        area.draw(&Text::new(*label, (LEFT - 8, y + high / 2), right))?;
        let mut so_far = 0.0;
        for (number, bar) in bars.iter().enumerate() {
            let colour =
                plot.metrics.iter().position(|key| *key == bar.metric.key).map_or(BLACK, |at| COLOURS[at]);
            if plot.stacked {
                let corners = [(place(so_far), y), (place(so_far + bar.median), y + 2 * BAR)];
                area.draw(&Rectangle::new(corners, colour.filled()))?;
                so_far += bar.median;
                continue;
            }
            let top = y + number as i32 * BAR;
            let corners = [(LEFT, top), (place(bar.median), top + BAR - 1)];
            area.draw(&Rectangle::new(corners, colour.filled()))?;
            // From the lowest round to the highest.
            let whisker = [(place(bar.min), top + BAR / 2), (place(bar.max), top + BAR / 2)];
            area.draw(&PathElement::new(whisker.to_vec(), BLACK))?;
            let cut = if bar.median > full { " →" } else { "" };
            let figure = format!("{:.*}{cut}", bar.metric.unit.digits(bar.median), bar.median);
            area.draw(&Text::new(figure, (place(bar.max.max(bar.median)) + 5, top), font(10)))?;
        }
        if plot.stacked {
            area.draw(&Text::new(format!("{so_far:.1}"), (place(so_far) + 5, y + BAR / 2), font(11)))?;
        }
        y += high + GAP;
    }
    area.present()?;
    Ok(())
}

/// What fills the width.
fn longest(plot: &Plot, rows: &[(&str, Vec<Bar<'_>>)]) -> f64 {
    let mut lengths: Vec<f64> = if plot.stacked {
        rows.iter().map(|(_, bars)| bars.iter().map(|bar| bar.median).sum()).collect()
    } else {
        rows.iter().flat_map(|(_, bars)| bars.iter().map(|bar| bar.median)).collect()
    };
    lengths.sort_by(f64::total_cmp);
    let middle = lengths.get(lengths.len() / 2).copied().unwrap_or(1.0);
    let last = lengths.last().copied().unwrap_or(1.0);
    last.min(middle * LONGEST).max(1e-9)
}
