//! `bro forward --metrics`: what it counts is what has happened, to the byte; and a reader of metrics, however badly it asks, costs clients nothing.
//!
//! Needs: a network namespace. Takes: seconds.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bro_tests::forwarder::{Forwarder, Setup, bro_of};
use bro_tests::peers::PATIENCE;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::{process, require_namespaces};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// An answer: its status, its headers, and what it says.
struct Answer {
    status: u16,
    head: String,
    text: String,
}

fn exchange(mut stream: impl Read + Write, request: &str) -> Result<Answer> {
    stream.write_all(request.as_bytes())?;
    let mut all = String::new();
    stream.read_to_string(&mut all).context("the answer")?;
    let (head, text) = all.split_once("\r\n\r\n").with_context(|| format!("no answer: {all:?}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("a status")?;
    let length = format!("Content-Length: {}", text.len());
    ensure!(head.lines().any(|line| line == length), "{head}: there are {} bytes", text.len());
    Ok(Answer { status, head: head.into(), text: text.into() })
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: application/openmetrics-text\r\n\r\n";

/// Samples by their names and labels.
type Samples = BTreeMap<String, f64>;

/// Reads the text, strictly: every family is told of before its samples, once, and the end is there.
fn samples(text: &str) -> Result<Samples> {
    let body = text.strip_suffix("# EOF\n").context("no end")?;
    let (mut kinds, mut found) = (BTreeMap::new(), Samples::new());
    let mut last = String::new();
    for line in body.lines() {
        if let Some(about) = line.strip_prefix("# ") {
            if let Some((name, kind)) = about.strip_prefix("TYPE ").and_then(|about| about.split_once(' ')) {
                ensure!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} is there twice");
                last = name.into();
            }
            continue;
        }
        let (key, value) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
        let name = key.split('{').next().unwrap_or_default();
        ensure!(name.starts_with(&last), "{line} stands below {last}");
        let suffix = &name[last.len()..];
        let allowed: &[&str] = match kinds[&last].as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_count", "_sum"],
            other => bail!("{last} is a {other}"),
        };
        ensure!(allowed.contains(&suffix), "{line} is no sample of a {}", kinds[&last]);
        ensure!(found.insert(key.to_owned(), value.parse()?).is_none(), "{key} is there twice");
    }
    Ok(found)
}

/// The sum of the samples of that name that have all of these labels.
fn sum(samples: &Samples, name: &str, labels: &[&str]) -> f64 {
    let has = |key: &str| labels.iter().all(|label| key.contains(label));
    let mine = samples.iter().filter(|(key, _)| key.split('{').next() == Some(name) && has(key));
    mine.map(|(_, value)| value).sum()
}

/// Where a forwarder that was told to let the kernel choose says that it is asked.
fn address(forwarder: &Forwarder) -> Result<String> {
    let line = forwarder.log().line(PATIENCE, |line| line.contains("metrics are at http://"))?;
    let rest = line.split("http://").nth(1).context("an address")?;
    Ok(rest.split('/').next().unwrap_or_default().to_owned())
}

fn over_tcp(address: &str, request: &str) -> Result<Answer> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    exchange(stream, request)
}

fn over_unix(path: &Path) -> Result<Answer> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    exchange(stream, GET)
}

fn scrape(address: &str) -> Result<Samples> {
    let answer = over_tcp(address, GET)?;
    ensure!(answer.status == 200, "{}", answer.head);
    ensure!(
        answer.head.contains("application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{}",
        answer.head
    );
    samples(&answer.text)
}

/// Waits until a sum is that.
fn expect(address: &str, name: &str, labels: &[&str], wanted: f64) -> Result<Samples> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let samples = scrape(address)?;
        let is = sum(&samples, name, labels);
        if is == wanted {
            return Ok(samples);
        }
        ensure!(Instant::now() < deadline, "{name} {labels:?} is {is}, not {wanted}: {samples:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_is_counted_is_what_has_happened() -> Result<()> {
    require_namespaces!();
    for (relay, by) in [("splice", "relay=\"splice\""), ("copy", "relay=\"copy\"")] {
        let mut scene = Scene::new()?;
        let forwarder =
            scene.start(&["--metrics", "127.0.0.1:0", "--relay", relay, "--connections-max", "2"])?;
        let at = address(&forwarder)?;
        let before = scrape(&at)?;
        ensure!(sum(&before, "bro_connections_accepted_total", &[]) == 0.0, "{before:#?}");
        ensure!(sum(&before, "bro_service_state", &["state=\"asleep\""]) == 1.0, "{before:#?}");
        ensure!(sum(&before, "bro_service_state", &[]) == 1.0, "in two states at once: {before:#?}");

        // The first client is held until the service listens.
        let client = scene.client()?;
        expect(&at, "bro_held_clients", &[], 1.0)?;
        expect(&at, "bro_service_state", &["state=\"starting\""], 1.0)?;
        let service = scene.serve()?;
        let served = service.accept()?;
        // To the byte, in either direction.
        client.send(&[7; 1000])?;
        served.recv_exact(&mut [0; 1000])?;
        served.send(&vec![9; 300_000])?;
        client.recv_exact(&mut vec![0; 300_000])?;
        let now = expect(&at, "bro_relayed_bytes_total", &["direction=\"to_client\"", by], 300_000.0)?;
        ensure!(
            sum(&now, "bro_relayed_bytes_total", &["direction=\"to_service\"", by]) == 1000.0,
            "{now:#?}"
        );
        ensure!(sum(&now, "bro_relayed_bytes_total", &[]) == 301_000.0, "by another way too: {now:#?}");
        ensure!(
            sum(&now, "bro_connections", &[]) == 1.0 && sum(&now, "bro_held_clients", &[]) == 0.0,
            "{now:#?}"
        );
        ensure!(sum(&now, "bro_service_state", &["state=\"awake\""]) == 1.0, "{now:#?}");
        ensure!(sum(&now, "bro_wakes_total", &["cause=\"client\""]) == 1.0, "{now:#?}");
        ensure!(sum(&now, "bro_wakes_total", &[]) == 1.0, "{now:#?}");
        ensure!(sum(&now, "bro_cold_starts_total", &[]) == 1.0, "{now:#?}");
        ensure!(sum(&now, "bro_cold_start_duration_seconds_count", &[]) == 1.0, "{now:#?}");
        ensure!(sum(&now, "bro_cold_start_duration_seconds_bucket", &["le=\"+Inf\""]) == 1.0, "{now:#?}");
        ensure!(sum(&now, "bro_forwarder_info", &[&format!("relay=\"{relay}\"")]) == 1.0, "{now:#?}");

        // A second one that aborts, a third that has to wait for it: the limit is two.
        let (second, second_served) = (scene.client()?, service.accept()?);
        let third = scene.client()?;
        expect(&at, "bro_limits_reached_total", &["limit=\"connections-max\""], 1.0)?;
        expect(&at, "bro_waiting_clients", &[], 1.0)?;
        second.abort()?;
        second_served.expect_abort()?;
        let third_served = service.accept()?;
        expect_relayed(&third, &third_served)?;
        client.close_writing()?;
        served.expect_eof()?;
        served.close_writing()?;
        client.expect_eof()?;
        let now = expect(&at, "bro_connections_closed_total", &["reason=\"eof\""], 1.0)?;
        ensure!(sum(&now, "bro_connections_closed_total", &["reason=\"client-reset\""]) == 1.0, "{now:#?}");
        ensure!(sum(&now, "bro_connections_closed_total", &[]) == 2.0, "{now:#?}");
        ensure!(sum(&now, "bro_connections_accepted_total", &[]) == 3.0, "{now:#?}");
        let now = expect(&at, "bro_connections", &[], 1.0)?;
        ensure!(sum(&now, "bro_relayed_bytes_total", &[]) == 301_008.0, "{now:#?}");
        ensure!(sum(&now, "bro_wakes_total", &[]) == 1.0, "{now:#?}");
        drop((third, third_served));
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn failures_and_refusals_are_counted_by_reason() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let options = ["--metrics", "127.0.0.1:0", "--start-timeout", "300ms", "--connections-per-source", "1"];
    let forwarder = scene.start(&options)?;
    let at = address(&forwarder)?;
    scene.client()?.expect_abort()?;
    let now = expect(&at, "bro_wake_failures_total", &["reason=\"start-timeout\""], 1.0)?;
    ensure!(sum(&now, "bro_connections_closed_total", &["reason=\"start-timeout\""]) == 1.0, "{now:#?}");
    ensure!(sum(&now, "bro_cold_start_duration_seconds_count", &[]) == 0.0, "{now:#?}");
    ensure!(sum(&now, "bro_last_wake_failure_timestamp_seconds", &[]) > 1.6e9, "{now:#?}");
    let service = scene.serve()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    scene.client()?.expect_abort()?;
    let now = expect(&at, "bro_limits_reached_total", &["limit=\"connections-per-source\""], 1.0)?;
    ensure!(sum(&now, "bro_connections_closed_total", &["reason=\"source-limit\""]) == 1.0, "{now:#?}");
    ensure!(
        sum(&now, "bro_last_wake_failure_timestamp_seconds", &[]) == 0.0,
        "it has been woken since: {now:#?}"
    );
    drop(pair);
    forwarder.stop().map(drop)
}

#[test]
fn over_a_unix_socket_which_a_dead_forwarder_may_have_left() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let path = scene.folder().join("metrics.sock");
    drop(std::os::unix::net::UnixListener::bind(&path)?);
    let service = scene.serve()?;
    let path_word = path.display().to_string();
    let forwarder = scene.start(&["--metrics", &path_word])?;
    forwarder.log().line(PATIENCE, |line| line.contains("metrics are at"))?;
    ensure!(std::fs::metadata(&path)?.permissions().mode() & 0o7777 == 0o660);
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    let answer = over_unix(&path)?;
    ensure!(answer.status == 200, "{}", answer.head);
    let now = samples(&answer.text)?;
    ensure!(sum(&now, "bro_relayed_bytes_total", &[]) == 8.0, "{now:#?}");

    // The second reader is told so, and takes nothing away.
    let inode = std::fs::metadata(&path)?.ino();
    let other = Scene::new()?;
    let refused = other.start(&["--metrics", &path_word])?;
    let said = expect_refusal(refused)?;
    ensure!(
        said.contains("--metrics: cannot listen at") && said.contains("Address already in use"),
        "{said}"
    );
    ensure!(std::fs::metadata(&path)?.ino() == inode && over_unix(&path)?.status == 200);
    drop(pair);
    forwarder.stop()?;
    ensure!(!path.exists(), "the socket is left behind");
    Ok(())
}

/// It ends with one sentence and 1.
fn expect_refusal(mut forwarder: Forwarder) -> Result<String> {
    forwarder.expect_exit(1)?;
    let complaints: Vec<String> =
        forwarder.log().lines().into_iter().filter(|line| line.starts_with("bro: ")).collect();
    ensure!(complaints.len() == 1, "{complaints:?}");
    Ok(complaints.concat())
}

#[test]
fn an_address_that_is_taken_ends_it_at_the_start() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let at = taken.local_addr()?.to_string();
    let said = expect_refusal(scene.start(&["--metrics", &at])?)?;
    ensure!(
        said.contains(&format!("cannot listen at {at}")) && said.contains("Address already in use"),
        "{said}"
    );
    let file = scene.folder().join("file");
    std::fs::write(&file, "mine")?;
    let said = expect_refusal(scene.start(&["--metrics", &file.display().to_string()])?)?;
    ensure!(said.contains("no socket is there") && std::fs::read(&file)? == b"mine", "{said}");
    let nowhere = scene.folder().join("none/s").display().to_string();
    let said = expect_refusal(scene.start(&["--metrics", &nowhere])?)?;
    ensure!(said.contains("No such file or directory"), "{said}");
    let mut wrong = scene.start(&["--metrics", "localhost:9464"])?;
    wrong.expect_exit(2)?;
    wrong.log().line(PATIENCE, |line| line.contains("is neither ADDR:PORT"))?;
    Ok(())
}

#[test]
fn there_is_nothing_else_than_get_metrics() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&["--metrics", "127.0.0.1:0"])?;
    let at = address(&forwarder)?;
    let status = |request: &str| over_tcp(&at, request).with_context(|| format!("{request:.60?}"));
    ensure!(status("GET / HTTP/1.1\r\n\r\n")?.status == 404);
    ensure!(status("GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n")?.status == 404);
    ensure!(status("GET /metrics?name=x HTTP/1.0\r\n\r\n")?.status == 200);
    let other =
        status(&format!("POST /metrics HTTP/1.1\r\nContent-Length: 20000\r\n\r\n{}", "x".repeat(20_000)))?;
    ensure!(other.status == 405 && other.head.contains("\r\nAllow: GET"), "{}", other.head);
    ensure!(status("HEAD /metrics HTTP/1.1\r\n\r\n")?.status == 405);
    ensure!(status("\u{16}\u{3}\u{1}\r\n\r\n")?.status == 400);
    ensure!(status(&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(7000)))?.status == 404);
    ensure!(status(&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(8192)))?.status == 431);
    ensure!(status(&format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65)))?.status == 431);
    // A request in many pieces is one.
    let mut slow = TcpStream::connect(&at)?;
    slow.set_read_timeout(Some(PATIENCE))?;
    slow.set_nodelay(true)?;
    let (last, first) = GET.as_bytes().split_last().context("a request")?;
    for byte in first {
        slow.write_all(std::slice::from_ref(byte))?;
    }
    ensure!(exchange(slow, std::str::from_utf8(&[*last])?)?.status == 200);
    forwarder.stop().map(drop)
}

/// Those who say nothing, or drip, hold no more places than there are, none of them for long; clients of the service do not notice.
#[test]
fn who_asks_slowly_is_let_go_and_keeps_no_client_from_the_service() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    // The kernel relay would open descriptors meanwhile, and so would the first wake.
    let forwarder = scene.start(&["--metrics", "127.0.0.1:0", "--relay", "splice"])?;
    let at = address(&forwarder)?;
    let first_pair = (scene.client()?, service.accept()?);
    expect_relayed(&first_pair.0, &first_pair.1)?;
    scrape(&at)?;
    let mut before = usize::MAX;
    let settled = || {
        let now = forwarder.descriptors().unwrap_or_default();
        std::mem::replace(&mut before, now) == now
    };
    ensure!(process::eventually(PATIENCE, settled), "its descriptors change and change");
    let began = Instant::now();
    let slow: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut stream = TcpStream::connect(&at)?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ")?;
            Ok(stream)
        })
        .collect::<std::io::Result<_>>()?;
    let places = || forwarder.descriptors().unwrap_or_default().saturating_sub(before);
    ensure!(process::eventually(PATIENCE, || places() == 8), "{} places are taken", places());
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    ensure!(began.elapsed() < Duration::from_secs(4), "a client had to wait: {:?}", began.elapsed());
    // The first of them are told after 5 s that it took too long.
    let mut first = &slow[0];
    first.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut said = String::new();
    first.read_to_string(&mut said)?;
    ensure!(said.starts_with("HTTP/1.1 408 "), "{said}");
    ensure!(began.elapsed() >= Duration::from_secs(4), "after {:?}", began.elapsed());
    // Beside them there is the client, with two.
    ensure!(places() <= 8 + 2, "{} places are taken", places());
    // They go, and a reader that asks properly is answered.
    drop(slow);
    scrape(&at)?;
    ensure!(process::eventually(PATIENCE, || forwarder.descriptors().unwrap_or_default() <= before + 2));
    drop((pair, first_pair));
    forwarder.expect_no_spin(Duration::from_secs(1))?;
    forwarder.stop().map(drop)
}

/// A reload hands the address over: it is the successor that answers, and no process is left behind.
#[test]
fn a_successor_is_asked_at_the_same_address() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let path = scene.folder().join("m").display().to_string();
    for at in [port, path] {
        let mut notify = bro_tests::notify::Notify::new()?;
        let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).args(["--metrics", at.as_str()]);
        let forwarder = setup.arg(scene.target()).start()?;
        notify.wait(PATIENCE, |line| line == "READY=1")?;
        let pair = (scene.client()?, service.accept()?);
        expect_relayed(&pair.0, &pair.1)?;
        forwarder.signal(Signal::SIGHUP)?;
        let main = notify.wait(PATIENCE, |line| line.starts_with("MAINPID="))?;
        let main: i32 = main.trim_start_matches("MAINPID=").parse()?;
        ensure!(main != forwarder.pid());
        let ask = || if at.starts_with('/') { over_unix(Path::new(&at)) } else { over_tcp(&at, GET) };
        // The successor knows how many connections its predecessor still has.
        let replaced =
            || Ok::<_, anyhow::Error>(sum(&samples(&ask()?.text)?, "bro_replaced_connections", &[]));
        ensure!(
            process::eventually(PATIENCE, || replaced().is_ok_and(|count| count == 1.0)),
            "{:?}",
            replaced()
        );
        expect_relayed(&pair.0, &pair.1)?;
        drop(pair);
        ensure!(process::ends(forwarder.pid(), PATIENCE)?, "the predecessor does not end");
        ensure!(ask()?.status == 200, "the predecessor took the endpoint along");
        kill(Pid::from_raw(main), Signal::SIGTERM)?;
        ensure!(process::ends(main, PATIENCE)?, "the successor does not end");
        forwarder.expect_nothing_left()?;
        ensure!(ask().is_err() && !Path::new(&at).exists(), "there is still a listener at {at}");
    }
    Ok(())
}

/// `bro metrics` finds it as `bro status` does.
#[test]
fn on_standard_output_it_is_the_same() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let run = |words: &[&str]| bro_of(scene.folder(), words).output();
    let setup: Setup = scene.setup().found_in(scene.folder()).args(["--metrics", "127.0.0.1:0"]);
    let forwarder = setup.arg(scene.target()).start()?;
    let at = address(&forwarder)?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    let usage = run(&["metrics", "--user", "--system"])?;
    ensure!(usage.status.code() == Some(2), "{usage:?}");
    let ran = run(&["metrics"])?;
    ensure!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
    let (mut printed, mut served) = (samples(&String::from_utf8(ran.stdout)?)?, scrape(&at)?);
    for samples in [&mut printed, &mut served] {
        samples.retain(|key, _| !key.starts_with("bro_forwarder_uptime_seconds"));
    }
    ensure!(printed == served, "{printed:#?}\n{served:#?}");
    drop(pair);
    forwarder.stop().map(drop)
}
