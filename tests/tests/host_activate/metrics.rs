//! Metrics of activated services: within the confinement of their units, and over idle stops, reloads and removal.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};
use bro_tests::pty::Pty;

use crate::activated::{activate, expect_asleep};
use crate::run_as::Served;

/// The sum of the samples of that name that have all of these labels.
fn number(text: &str, name: &str, labels: &[&str]) -> f64 {
    let mine = text.lines().filter(|line| line.split('{').next() == Some(name));
    let mine = mine.filter(|line| labels.iter().all(|label| line.contains(label)));
    mine.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

fn printed(host: &Host, manager: Manager) -> Result<String> {
    let ran = manager.try_run(host, &["bro", "metrics"])?;
    ensure!(ran.success() && ran.stderr.is_empty() && ran.stdout.trim_end().ends_with("# EOF"), "{ran:?}");
    Ok(ran.stdout)
}

/// What a forwarder answers at a port of its host.
fn asked(host: &Host, port: u16) -> Result<String> {
    let mut stream = host.connect(port)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("# EOF\n"), "{answer}");
    Ok(answer)
}

/// The same at a unix socket, asked by a user.
fn asked_over_unix(host: &Host, manager: Manager, path: &str) -> Result<String> {
    let script = format!("printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' | socat -t 10 - UNIX-CONNECT:{path}");
    let answer = manager.run(host, &["sh", "-c", &script])?;
    ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("# EOF"), "{answer}");
    Ok(answer)
}

fn ours(name: &str) -> String {
    format!("service=\"{name}\"")
}

/// Where a manager's forwarders have what they note.
fn notes(host: &Host, manager: Manager) -> Result<String> {
    Ok(match manager {
        Manager::System => "/run/bro".to_owned(),
        Manager::User(user) => format!("/run/user/{}/bro", host.uid(user)?),
    })
}

/// Over TCP: the forwarder answers while it runs, and what it has counted is there when it has gone.
pub fn counted_over_stops_and_reloads(host: &Host, manager: Manager) -> Result<()> {
    let at = host.free_port()?;
    let metrics = format!("127.0.0.1:{at}");
    let options = ["--metrics", &metrics, "--exit-idle-time", "1s"];
    let site = Site::activated(host, manager, "counted", &Plan::service(manager, 0.1, ""), &options)?;
    let service = ours("counted");
    let now = printed(host, manager)?;
    ensure!(number(&now, "bro_service_state", &[&service, "asleep"]) == 1.0, "{now}");
    ensure!(number(&now, "bro_wakes_total", &[&service]) == 0.0, "{now}");
    for round in 1..=2_u32 {
        let rounds = f64::from(round);
        site.check_echo().with_context(|| site.journals())?;
        let said = asked(host, at).with_context(|| site.journals())?;
        ensure!(number(&said, "bro_wakes_total", &[&service, "client"]) == rounds, "{said}");
        ensure!(number(&said, "bro_service_state", &[&service, "awake"]) == 1.0, "{said}");
        if round == 2 {
            site.front.systemctl(host, &["reload", &site.forwarder()])?;
            let reloaded = |said: String| number(&said, "bro_reloads_total", &[&service, "done"]) == 1.0;
            host.wait_until("the successor's answer", PATIENCE, || Ok(asked(host, at).is_ok_and(reloaded)))?;
            let said = asked(host, at)?;
            ensure!(number(&said, "bro_wakes_total", &[&service]) == rounds, "woken by the reload: {said}");
            ensure!(number(&said, "bro_connections_accepted_total", &[&service]) == rounds, "{said}");
        }
        expect_asleep(&site)?;
        let now = printed(host, manager)?;
        ensure!(number(&now, "bro_service_state", &[&service, "asleep"]) == 1.0, "{now}");
        ensure!(number(&now, "bro_stops_total", &[&service, "idle"]) == rounds, "{now}");
        ensure!(number(&now, "bro_connections_closed_total", &[&service, "eof"]) == rounds, "{now}");
        let bytes = |way: &str| number(&now, "bro_relayed_bytes_total", &[&service, way]);
        ensure!(
            bytes("to_service") == rounds * 100_000.0 && bytes("to_client") == rounds * 100_000.0,
            "{now}"
        );
        ensure!(number(&now, "bro_cold_start_duration_seconds_count", &[&service]) == rounds, "{now}");
        ensure!(host.connect(at).is_err(), "it is still answered for");
    }
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    // Another one cannot have the address, although there is no listener now.
    Plan::service(manager, 0.1, "").write_quadlet(host, manager, "second")?;
    let port = host.free_port()?;
    let words = format!("second --external-port 127.0.0.1:{port} --internal-port 7 --metrics {metrics}");
    let refused = activate(host, manager, &words)?;
    ensure!(refused.code == 2 && refused.stderr.contains("those of counted are there"), "{refused:?}");
    ensure!(activate(host, manager, "counted --remove")?.success());
    let left = host.sh(&format!("ls -A {}", notes(host, manager)?))?;
    ensure!(!left.contains("counts-counted.service"), "--remove left {left}");
    Ok(())
}

/// Over a unix socket in the forwarder's own folder.
pub fn over_a_unix_socket(host: &Host, manager: Manager) -> Result<()> {
    let path = format!("{}/told-activator/metrics.sock", notes(host, manager)?);
    let options = ["--metrics", &path, "--exit-idle-time", "1s"];
    let site = Site::activated(host, manager, "told", &Plan::service(manager, 0.1, ""), &options)?;
    site.check_echo().with_context(|| site.journals())?;
    let said = asked_over_unix(host, manager, &path).with_context(|| site.journals())?;
    ensure!(number(&said, "bro_wakes_total", &[&ours("told")]) == 1.0, "{said}");
    ensure!(host.sh(&format!("stat --format=%a {path}"))?.trim() == "660");
    expect_asleep(&site)?;
    ensure!(activate(host, manager, "told --remove")?.success());
    Ok(())
}

/// The system's forwarder for a user, asked over the network, and at a socket in a folder that an administrator has made.
pub fn of_the_systems_forwarder_for_a_user(host: &Host) -> Result<()> {
    let test = Manager::User("test");
    let at = host.free_port()?;
    let options = format!("--metrics 0.0.0.0:{at} --exit-idle-time 1s");
    let served = Served::new(host, test, "shown", &Plan::service(test, 0.1, ""), &options)?;
    let site = &served.0;
    site.check_echo().with_context(|| site.journals())?;
    let said = asked(host, at).with_context(|| site.journals())?;
    ensure!(number(&said, "bro_wakes_total", &[&ours("shown")]) == 1.0, "{said}");
    expect_asleep(site)?;
    for who in [Manager::System, test] {
        let now = printed(host, who)?;
        ensure!(number(&now, "bro_stops_total", &[&ours("shown"), "idle"]) == 1.0, "{now}");
    }
    host.run(&["install", "-d", "-o", "test", "-m", "0750", "/run/shown"])?;
    let words = "shown --system --run-as test --metrics /run/shown/metrics.sock";
    let ran = activate(host, Manager::System, words)?;
    ensure!(ran.success(), "{ran:?}");
    site.check_echo().with_context(|| site.journals())?;
    let said = asked_over_unix(host, Manager::System, "/run/shown/metrics.sock");
    let said = said.with_context(|| site.journals())?;
    ensure!(number(&said, "bro_wakes_total", &[&ours("shown"), "client"]) == 2.0, "{said}");
    expect_asleep(site)
}

/// `bro top` wakes and puts to sleep, for a user who sits at a terminal.
pub fn top(host: &Host, manager: Manager) -> Result<()> {
    let options = ["--exit-idle-time", "10min"];
    let site = Site::activated(host, manager, "seen", &Plan::service(manager, 0.1, ""), &options)?;
    let user = match manager {
        Manager::System => None,
        Manager::User(user) => Some(user),
    };
    let words = ["setsid", "--wait", "--ctty", "env", "TERM=xterm-256color", "bro", "top"];
    let mut top = Pty::start(host.command(user, &words)?, 24, 80)?;
    let is = |state: &'static str| {
        move |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.first() == Some(&"seen") && words.get(1) == Some(&state)
        }
    };
    top.expect("the service that sleeps", is("asleep"))?;
    // Other services of the host may stand above it.
    let place =
        top.lines().iter().skip(2).position(|line| line.starts_with("seen ")).context("it is gone")?;
    top.press(&"j".repeat(place))?;
    top.press("w")?;
    top.expect("what came of it", |line| line == "seen: awake").with_context(|| site.journals())?;
    top.expect("the service that is awake", is("awake"))?;
    let client = site.client()?;
    top.expect("the client", |line| line.starts_with("seen: awake for") && line.contains("1 connection"))?;
    top.press("s")?;
    top.expect("the question", |line| line.starts_with("seen has 1 connection, to be reset."))?;
    top.press("y")?;
    top.expect("what came of it", |line| line == "seen: stopped").with_context(|| site.journals())?;
    top.expect("the service that sleeps again", is("asleep"))?;
    drop(client);
    let now = printed(host, manager)?;
    ensure!(number(&now, "bro_wakes_total", &[&ours("seen"), "hand"]) == 1.0, "{now}");
    ensure!(number(&now, "bro_stops_total", &[&ours("seen"), "hand"]) == 1.0, "{now}");
    ensure!(number(&now, "bro_connections_closed_total", &[&ours("seen"), "shutdown"]) == 1.0, "{now}");
    top.press("q")?;
    let status = top.expect_restored()?;
    ensure!(status.code() == Some(0), "{status:?}: {:#?}", top.lines());
    expect_asleep(&site)?;
    ensure!(activate(host, manager, "seen --remove")?.success());
    Ok(())
}
