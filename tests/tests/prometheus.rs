//! A real Prometheus scrapes `bro forward --metrics` and answers questions about what it has read; promtool looks through the same text.
//!
//! Needs: a network namespace, prometheus. Takes: seconds.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, bro_of};
use bro_tests::log::Log;
use bro_tests::peers::PATIENCE;
use bro_tests::process::{self, Session};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, find_program};
use bro_tests::{bro, require_namespaces, require_or_ok};
use serde_json::Value;

const PROMETHEUS: Need = Need::Program("prometheus", "prometheus");
const PROMTOOL: Need = Need::Program("promtool", "prometheus");

/// A Prometheus of the test's own, at a port that the kernel has chosen. Its fields end in this order.
struct Prometheus {
    at: String,
    log: Log,
    _process: Session,
    _data: Scratch,
}

impl Prometheus {
    /// One that scrapes `target` five times a second.
    fn start(target: &str) -> Result<Self> {
        let data = Scratch::new()?;
        let settings = format!(
            "global:\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\nscrape_configs:\n  - job_name: bro\n    static_configs:\n      - \
             targets: ['{target}']\n"
        );
        let file = data.join("prometheus.yml");
        std::fs::write(&file, settings)?;
        let mut command = Command::new(bro::helper());
        command
            .args(["launch", "--"])
            .arg(find_program("prometheus").context("no prometheus")?)
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", data.join("data").display()))
            .arg("--web.listen-address=127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process = Session(command.spawn()?);
        let log = Log::collect(process.0.stderr.take().context("its standard error")?);
        let line = log.line(PATIENCE, |line| line.contains("Listening on"))?;
        let at = line.rsplit_once("address=").context("an address")?.1.to_owned();
        Ok(Self { at, log, _process: process, _data: data })
    }

    /// What its API answers, once it has begun to.
    fn get(&self, path: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(&self.at)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET /api/v1/{path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.at)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer}"))?;
        ensure!(head.split(' ').nth(1) == Some("200"), "{path}: {answer}");
        Ok(serde_json::from_str(body)?)
    }

    /// The one number that a question in its language has as its answer now, if there is one.
    fn number(&self, question: &str) -> Result<Option<f64>> {
        let escaped: String = question.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.get(&format!("query?query={escaped}"))?;
        let results = answer["data"]["result"].as_array().context("results")?;
        let [one] = results.as_slice() else { return Ok(None) };
        Ok(one["value"][1].as_str().and_then(|value| value.parse().ok()))
    }

    /// Waits until a question has that answer.
    fn expect(&self, question: &str, wanted: f64) -> Result<()> {
        let is = || self.number(question);
        ensure!(
            process::eventually(PATIENCE, || is().is_ok_and(|is| is == Some(wanted))),
            "{question} is {:?}, not {wanted}; of the target it says {:#}; its log:\n{}",
            is(),
            self.get("targets").unwrap_or_default(),
            self.log.lines().join("\n")
        );
        Ok(())
    }
}

/// Where the forwarder says that it is asked.
fn address(forwarder: &Forwarder) -> Result<String> {
    let line = forwarder.log().line(PATIENCE, |line| line.contains("metrics are at http://"))?;
    let rest = line.split("http://").nth(1).context("an address")?;
    Ok(rest.split('/').next().unwrap_or_default().to_owned())
}

#[test]
fn it_scrapes_and_answers_with_what_was_counted() -> Result<()> {
    require_namespaces!();
    require_or_ok!(PROMETHEUS);
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--metrics", "127.0.0.1:0"])?;
    let prometheus = Prometheus::start(&address(&forwarder)?)?;
    prometheus.expect("up{job=\"bro\"}", 1.0)?;
    prometheus.expect("bro_service_state{state=\"asleep\"}", 1.0)?;

    let client = scene.client()?;
    prometheus.expect("sum(bro_held_clients)", 1.0)?;
    let service = scene.serve()?;
    let served = service.accept()?;
    expect_relayed(&client, &served)?;
    prometheus.expect("sum(bro_relayed_bytes_total)", 8.0)?;
    prometheus.expect("bro_service_state{state=\"awake\"}", 1.0)?;
    prometheus.expect("bro_wakes_total{cause=\"client\"}", 1.0)?;
    // A histogram whose buckets it can reckon with.
    prometheus.expect("bro_cold_start_duration_seconds_count", 1.0)?;
    prometheus.expect("histogram_quantile(1, bro_cold_start_duration_seconds_bucket) > bool 0", 1.0)?;
    // It has understood the kinds, not only the numbers.
    for (metric, kind) in [
        ("bro_wakes", "counter"),
        ("bro_service_state", "gauge"),
        ("bro_cold_start_duration_seconds", "histogram"),
    ] {
        let told = prometheus.get(&format!("targets/metadata?metric={metric}"))?;
        let told = &told["data"][0];
        ensure!(
            told["type"] == kind && told["help"].as_str().is_some_and(|help| !help.is_empty()),
            "{metric}: {told}"
        );
    }
    let targets = prometheus.get("targets")?;
    let target = &targets["data"]["activeTargets"][0];
    ensure!(target["health"] == "up" && target["lastError"] == "", "{target:#}");

    // The forwarder that has gone is missed.
    drop((client, served));
    forwarder.stop()?;
    prometheus.expect("up{job=\"bro\"}", 0.0)
}

/// promtool reads the older text form, where a counter's own lines have its whole name; nothing else may be amiss for it.
#[test]
fn promtool_has_nothing_to_say() -> Result<()> {
    require_namespaces!();
    require_or_ok!(PROMTOOL);
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.setup().found_in(scene.folder()).arg(scene.target()).start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    let printed = bro_of(scene.folder(), &["metrics"]).output()?;
    ensure!(printed.status.success(), "{printed:?}");
    let text = String::from_utf8(printed.stdout)?;
    ensure!(text.contains("\nbro_wakes_total{"), "{text}");
    let said = promtool(&text)?;
    let strange: Vec<&str> = said.lines().filter(|line| !line.ends_with("_total no help text")).collect();
    ensure!(strange.is_empty(), "{said}");
    let older = in_the_older_form(&text);
    let said = promtool(&older)?;
    ensure!(said.is_empty(), "{said}\n{older}");
    // It does look: a sample without a value is noticed.
    ensure!(
        !promtool(&older.replacen(" 1\n", " one\n", 1))?.is_empty(),
        "promtool says nothing about anything"
    );
    drop(pair);
    forwarder.stop().map(drop)
}

/// What it says, line by line; nothing where all is well.
fn promtool(text: &str) -> Result<String> {
    let mut command = Command::new(find_program("promtool").context("no promtool")?);
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = command.spawn()?;
    running.stdin.take().context("its standard input")?.write_all(text.as_bytes())?;
    let ran = running.wait_with_output()?;
    let said = [ran.stdout, ran.stderr].concat();
    ensure!(ran.status.success() == said.is_empty(), "{}: {}", ran.status, String::from_utf8_lossy(&said));
    Ok(String::from_utf8(said)?)
}

/// Counters are told of by the names that their samples have.
fn in_the_older_form(text: &str) -> String {
    let counters: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let renamed = text.lines().map(|line| {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what @ ("HELP" | "TYPE")), Some(name), Some(rest))
                if counters.contains(&name) =>
            {
                format!("# {what} {name}_total {rest}\n")
            }
            _ => format!("{line}\n"),
        }
    });
    renamed.collect()
}
