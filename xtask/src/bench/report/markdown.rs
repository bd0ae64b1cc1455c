//! The report for people.

use std::fmt::Write as _;

use super::{Report, plots};
use crate::bench::contenders::{Contender, Lanes, Way};
use crate::bench::metrics::{self, Metric, SECTIONS, Section};
use crate::bench::plan::Plan;
use crate::bench::statistics::Summary;

/// Why some rows are as they are: what was found out about them, by hand.
const NOTES: &str = include_str!("notes.md");

/// The document; `plots` is where the plots are, seen from it.
pub fn render(report: &Report, plots: &str) -> String {
    let mut text = String::new();
    // Writing into a String does not fail.
    write(report, plots, &mut text).ok();
    text
}

fn write(report: &Report, plots: &str, text: &mut String) -> std::fmt::Result {
    writeln!(text, "# Benchmarks\n")?;
    writeln!(text, "Made by `cargo xtask bench`, not by hand. To repeat it on your machine:\n")?;
    writeln!(
        text,
        "    sudo --preserve-env=PATH,HOME cargo xtask bench --{}",
        report.last().plan.name.replace("default", "full")
    )?;
    writeln!(text, "\nWithout root it leaves the kernel relay out; `--quick` takes under three minutes.\n")?;
    doubts(report, text)?;
    reading(report, text)?;
    verdict(report, text)?;
    adoption(report, text)?;
    for section in SECTIONS {
        table(report, section, text)?;
        for plot in plots::names_for(report, section.title) {
            writeln!(text, "![{}]({plots}{plot})\n", section.title)?;
        }
    }
    text.push_str(NOTES);
    correctness(report, text)?;
    missing(report, text)?;
    setup(report, text)
}

fn doubts(report: &Report, text: &mut String) -> std::fmt::Result {
    for run in &report.runs {
        for doubt in run.environment.doubts() {
            writeln!(text, "> **{}: {doubt}**\n", run.workloads.join(", "))?;
        }
    }
    Ok(())
}

fn reading(report: &Report, text: &mut String) -> std::fmt::Result {
    let most = |of: fn(&Plan) -> usize| report.runs.iter().map(|run| of(&run.plan)).max().unwrap_or(0);
    let plan = &report.last().plan;
    writeln!(
        text,
        "Medians of up to {} rounds that take turns, {} s each ({} s for real programs; {} cold starts); in small print the lowest \
         and the highest round and how many there were. **Bold** is the best forwarder of a column, and every one that this \
         run cannot tell from it: their rounds overlap. The direct connection, the unix socket, the host network and \
         the service that has adopted the listening socket are no forwarders.\n",
        most(|plan| plan.rounds),
        plan.seconds,
        plan.wrk_seconds,
        most(|plan| plan.cold_rounds)
    )?;
    if plan.from_another_host {
        writeln!(
            text,
            "Clients were on another host: a network namespace of their own at the far end of a veth(4) pair.\n"
        )?;
    }
    for left_out in &report.results.left_out {
        writeln!(text, "Left out for want of time: {left_out}.\n")?;
    }
    if metrics::all().any(|metric| {
        report
            .present
            .iter()
            .any(|who| report.results.get(who, metric).is_some_and(|figure| figure.samples.len() == 1))
    }) {
        writeln!(
            text,
            "> **Some figures have a single round: they tell no contender from another.** A quieter machine or `--full` gives \
             more.\n"
        )?;
    }
    Ok(())
}

fn is_bro(contender: &Contender) -> bool {
    matches!(contender.way, Way::Bro { .. })
}

fn is_forwarder(contender: &Contender) -> bool {
    !matches!(contender.way, Way::Direct | Way::HostNetwork | Way::Unix | Way::Adopted)
}

/// Whether one is better than the other, beyond what the rounds leave open.
fn beats(metric: &Metric, one: &Summary, other: &Summary) -> bool {
    let better = if metric.higher_is_better { one.median > other.median } else { one.median < other.median };
    better && one.differs_from(other)
}

/// The one with the best median among some.
fn best<'a>(
    report: &'a Report,
    metric: &Metric,
    among: impl Fn(&Contender) -> bool,
) -> Option<(&'a Contender, Summary)> {
    let figures = report.present.iter().filter(|contender| among(contender));
    let figures = figures.filter_map(|contender| Some((contender, report.results.get(contender, metric)?)));
    figures.reduce(|best, next| {
        let next_is_better = if metric.higher_is_better {
            next.1.median > best.1.median
        } else {
            next.1.median < best.1.median
        };
        if next_is_better { next } else { best }
    })
}

/// Where bro stands against everyone else, row by row.
fn verdict(report: &Report, text: &mut String) -> std::fmt::Result {
    let others = |contender: &Contender| is_forwarder(contender) && !is_bro(contender);
    let (mut ahead, mut even, mut behind) = (Vec::new(), Vec::new(), Vec::new());
    for section in SECTIONS {
        for metric in section.metrics {
            let (Some((bro, ours)), Some((other, theirs))) =
                (best(report, metric, is_bro), best(report, metric, others))
            else {
                continue;
            };
            let what = format!("{} ({})", metric.title, section.title.to_lowercase());
            if beats(metric, &ours, &theirs) {
                ahead.push(what);
            } else if beats(metric, &theirs, &ours) {
                let line = format!(
                    "- {what}: {} {}, {} {}",
                    other.label,
                    plain(metric, &theirs),
                    bro.label,
                    plain(metric, &ours)
                );
                behind.push(line);
            } else {
                even.push(what);
            }
        }
    }
    if ahead.len() + even.len() + behind.len() == 0 {
        return Ok(());
    }
    writeln!(text, "## In short\n")?;
    writeln!(
        text,
        "The best bro against the best of the other forwarders, figure by figure: ahead in {}, not to be told apart in {}, \
         behind in {}.\n",
        ahead.len(),
        even.len(),
        behind.len()
    )?;
    if !behind.is_empty() {
        writeln!(text, "Behind in:\n\n{}\n", behind.join("\n"))?;
    }
    if !even.is_empty() {
        writeln!(text, "Not to be told apart: {}.\n", even.join("; "))?;
    }
    each_relay(report, text)
}

/// Each bro against the best of the others, where it is behind.
fn each_relay(report: &Report, text: &mut String) -> std::fmt::Result {
    let others = |contender: &Contender| is_forwarder(contender) && !is_bro(contender);
    for bro in report.present.iter().filter(|contender| is_bro(contender)) {
        let rows: Vec<String> = metrics::all()
            .filter_map(|metric| {
                let ours = report.results.get(bro, metric)?;
                let (other, theirs) = best(report, metric, others)?;
                let line = || {
                    let (ours, theirs) = (plain(metric, &ours), plain(metric, &theirs));
                    format!("{} `{}` {ours} (against {theirs})", other.label, metric.key)
                };
                beats(metric, &theirs, &ours).then(line)
            })
            .collect();
        if !rows.is_empty() {
            writeln!(text, "- **{}** alone is behind {}", bro.label, rows.join("; "))?;
        }
    }
    writeln!(text)?;
    against_splice(report, text)
}

/// Each relay that `auto` may choose against the one that it chooses otherwise.
fn against_splice(report: &Report, text: &mut String) -> std::fmt::Result {
    let with_lanes = |contender: &&Contender| {
        matches!(contender.way, Way::Bro { lanes: Lanes::Both | Lanes::Service, .. })
    };
    let is_splice = |contender: &&Contender| contender.key == "bro-splice";
    let Some(splice) = report.present.iter().find(is_splice) else { return Ok(()) };
    for bro in report.present.iter().filter(with_lanes) {
        writeln!(text, "{}", compared(report, bro, splice))?;
    }
    writeln!(text)
}

/// The service that has the socket, against the same service beside its clients.
fn adoption(report: &Report, text: &mut String) -> std::fmt::Result {
    let of = |way: Way| report.present.iter().find(|contender| contender.way == way);
    let (Some(adopted), Some(native)) = (of(Way::Adopted), of(Way::HostNetwork)) else { return Ok(()) };
    let ratios = metrics::all().filter_map(|metric| {
        let (ours, theirs) = (report.results.get(adopted, metric)?, report.results.get(native, metric)?);
        let ratio =
            if metric.higher_is_better { ours.median / theirs.median } else { theirs.median / ours.median };
        ratio.is_finite().then_some(ratio)
    });
    let mut ratios: Vec<f64> = ratios.collect();
    ratios.sort_by(f64::total_cmp);
    let Some(median) = ratios.get(ratios.len() / 2) else { return Ok(()) };
    writeln!(text, "## Adopted\n")?;
    writeln!(text, "{}", compared(report, adopted, native))?;
    writeln!(
        text,
        "- As parts of what the host network does, where more is better: {:.2} in the median of {} figures, {:.2} to {:.2} from the first \
         quarter to the third\n",
        median,
        ratios.len(),
        ratios[ratios.len() / 4],
        ratios[ratios.len() * 3 / 4]
    )
}

/// One line: in how many figures one is ahead of the other, and in which it is behind.
fn compared(report: &Report, who: &Contender, other: &Contender) -> String {
    let (mut ahead, mut even, mut behind) = (0, 0, Vec::new());
    for metric in metrics::all() {
        let (Some(ours), Some(theirs)) = (report.results.get(who, metric), report.results.get(other, metric))
        else {
            continue;
        };
        if beats(metric, &ours, &theirs) {
            ahead += 1;
        } else if beats(metric, &theirs, &ours) {
            behind.push(format!(
                "`{}` {} (against {})",
                metric.key,
                plain(metric, &ours),
                plain(metric, &theirs)
            ));
        } else {
            even += 1;
        }
    }
    let rows = if behind.is_empty() { String::new() } else { format!(": {}", behind.join("; ")) };
    format!(
        "- **{}** against {}: ahead in {ahead}, not to be told apart in {even}, behind in {}{rows}",
        who.label,
        other.label,
        behind.len()
    )
}

fn number(metric: &Metric, value: f64) -> String {
    let scaled = metric.unit.scale(value);
    format!("{scaled:.*}", metric.unit.digits(scaled))
}

fn plain(metric: &Metric, summary: &Summary) -> String {
    format!("{} {}", number(metric, summary.median), metric.unit.name())
}

fn table(report: &Report, section: &Section, text: &mut String) -> std::fmt::Result {
    let metrics: Vec<&Metric> = section
        .metrics
        .iter()
        .filter(|metric| {
            report.present.iter().any(|contender| report.results.get(contender, metric).is_some())
        })
        .collect();
    if metrics.is_empty() {
        return Ok(());
    }
    writeln!(text, "## {}\n\n{}\n", section.title, section.note)?;
    write!(text, "| |")?;
    for metric in &metrics {
        let arrow = if metric.higher_is_better { "↑" } else { "↓" };
        write!(text, " {} [{}] {arrow} |", metric.title, metric.unit.name())?;
    }
    writeln!(text, "\n| --- |{}", " ---: |".repeat(metrics.len()))?;
    for contender in &report.present {
        let figures: Vec<Option<Summary>> =
            metrics.iter().map(|metric| report.results.get(contender, metric)).collect();
        if figures.iter().all(Option::is_none) {
            continue;
        }
        write!(text, "| {} |", contender.label)?;
        for (metric, figure) in metrics.iter().zip(&figures) {
            write!(text, " {} |", cell(report, contender, metric, figure.as_ref()))?;
        }
        writeln!(text)?;
    }
    writeln!(text)
}

fn cell(report: &Report, contender: &Contender, metric: &Metric, figure: Option<&Summary>) -> String {
    let Some(figure) = figure else { return "—".into() };
    let median = number(metric, figure.median);
    let leads = is_forwarder(contender)
        && best(report, metric, is_forwarder).is_some_and(|(leader, leading)| {
            leader.key == contender.key || (figure.samples.len() > 1 && !figure.differs_from(&leading))
        });
    let median = if leads { format!("**{median}**") } else { median };
    let rounds = figure.samples.len();
    match rounds {
        1 => format!("{median} <sub>1</sub>"),
        _ => format!(
            "{median} <sub>{}–{}, {rounds}</sub>",
            number(metric, figure.min),
            number(metric, figure.max)
        ),
    }
}

fn correctness(report: &Report, text: &mut String) -> std::fmt::Result {
    if report.results.verdicts.is_empty() && report.results.failures.is_empty() {
        return Ok(());
    }
    writeln!(text, "## What each got wrong\n")?;
    writeln!(
        text,
        "Half-closes and aborts in both directions, partners that never read, bytes compared, and (for those that a socket \
         starts) a client that comes before the service listens.\n"
    )?;
    writeln!(text, "| | right | wrong |\n| --- | ---: | --- |")?;
    for contender in &report.present {
        let Some(verdicts) = report.results.verdicts.get(contender.key) else { continue };
        let wrong: Vec<String> = verdicts
            .iter()
            .filter_map(|verdict| {
                Some(format!("**{}**: {}", verdict.case, verdict.wrong.as_ref()?.replace('|', "/")))
            })
            .collect();
        let right = verdicts.len() - wrong.len();
        let wrong = if wrong.is_empty() { "nothing".into() } else { wrong.join("<br>") };
        writeln!(text, "| {} | {right} of {} | {wrong} |", contender.label, verdicts.len())?;
    }
    writeln!(text)?;
    for (who, what, why) in &report.results.failures {
        writeln!(text, "- {who} has no figure for {what}: {why}")?;
    }
    writeln!(text)
}

fn missing(report: &Report, text: &mut String) -> std::fmt::Result {
    if report.missing.is_empty() {
        return Ok(());
    }
    writeln!(text, "## Missing on this machine\n")?;
    for missing in &report.missing {
        writeln!(text, "- {}: {}", missing.name, missing.why)?;
    }
    writeln!(text)
}

fn setup(report: &Report, text: &mut String) -> std::fmt::Result {
    writeln!(text, "## How it was measured\n")?;
    writeln!(
        text,
        "A network namespace with nothing but lo stands for the container; the service in it is an event loop with \
         non-blocking sockets, one port for each contender. Clients are processes of their own with non-blocking sockets, \
         outside the namespace if not said otherwise; each warms its way with two connections. All contenders are up while \
         rounds take turns. Service, clients and forwarder share the machine's processors.\n"
    )?;
    for contender in &report.present {
        writeln!(text, "- {}: {}", contender.label, contender.how)?;
    }
    writeln!(text)?;
    for (who, phases) in &report.results.moved {
        let shares = phases.iter().map(|(what, moved)| {
            let all = (moved.kernel + moved.spliced + moved.copied).max(1) as f64;
            let share = |bytes: u64| format!("{:.1} %", bytes as f64 * 100.0 / all);
            let (kernel, spliced, copied) = (share(moved.kernel), share(moved.spliced), share(moved.copied));
            format!("{what}: {kernel} in the kernel, {spliced} spliced, {copied} copied")
        });
        writeln!(text, "- bytes moved by {who}: {}", shares.collect::<Vec<_>>().join("; "))?;
    }
    let e = &report.last().environment;
    writeln!(text, "\n## The machine\n\n| | |\n| --- | --- |")?;
    let machine = if e.virtual_machine { " (a virtual machine)" } else { "" };
    writeln!(text, "| processor | {}, {} cores{machine} |", e.processor, e.cores)?;
    writeln!(text, "| memory | {} GiB |", e.memory_gib)?;
    writeln!(text, "| kernel | {} |", e.kernel)?;
    let or_unknown = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".into());
    writeln!(text, "| system | {} |", or_unknown(&e.system))?;
    writeln!(text, "| frequency governor | {} |", or_unknown(&e.governor))?;
    writeln!(text, "| as | {} |", if e.root { "root" } else { "an ordinary user" })?;
    writeln!(text, "| descriptors | {} a process |", e.descriptors)?;
    for (name, value) in &e.settings {
        writeln!(text, "| {name} | {value} |")?;
    }
    let mut told = Vec::new();
    for (name, version) in &report.versions {
        if !told.contains(&version) {
            told.push(version);
            writeln!(text, "| {name} | {version} |")?;
        }
    }
    for run in &report.runs {
        let (e, rounds) = (&run.environment, run.plan.rounds);
        writeln!(
            text,
            "| run | {}: {}, {rounds} rounds, {:.0} s, on {}, commit {}; {:.2} processors busy with other things before and {:.2} after, \
             load average before {} |",
            run.workloads.join(", "),
            run.plan.name,
            e.seconds,
            or_unknown(&e.date),
            or_unknown(&e.commit),
            e.busy_before,
            e.busy_after,
            or_unknown(&e.load_average)
        )?;
    }
    Ok(())
}
