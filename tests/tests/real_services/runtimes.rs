//! Services as people write them in a common runtime (`tests/services`), behind each relay and without any: no answer comes late.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Setup;
use bro_tests::peers::{Address, Conn, Here, PATIENCE};
use bro_tests::process;
use bro_tests::tier::{Need, find_program};

use crate::{Stand, finished};

/// No answer takes longer.
const GAP: Duration = Duration::from_millis(500);

const ALL: &[&str] = &["direct", "splice", "copy", "auto", "sockmap"];
/// Without `--relay=sockmap`, which warns of just that: these ask FIONREAD.
const BUT_SOCKMAP: &[&str] = &["direct", "splice", "copy", "auto"];

/// The source of a service.
fn source(name: &str) -> String {
    format!("{}/services/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Lines of several sizes and large answers, on three connections. The port is the program's last argument.
fn every_relay_serves(program: &str, arguments: &[&str], relays: &[&str]) -> Result<()> {
    for relay in relays {
        let direct = *relay == "direct";
        let mut stand = Stand::through(if direct { "splice" } else { relay }, Setup::netns)?;
        let path = find_program(program).with_context(|| format!("{program} has gone"))?;
        let mut arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        arguments.push(stand.inside.to_string());
        stand.run(&path, &arguments)?;
        let inside = Address::Tcp(std::net::SocketAddr::from(([127, 0, 0, 1], stand.inside)));
        let up = || Conn::new(&stand.namespace, &inside).is_ok();
        ensure!(process::eventually(PATIENCE, up), "{program} does not listen");
        let mut longest = Duration::ZERO;
        for nth in 0..3 {
            let client = if direct {
                Conn::new(&stand.namespace, &inside)?
            } else {
                Conn::new(&Here, stand.front.address())?
            };
            for round in 0..300 {
                let mut line = vec![b'l'; [10, 600, 3000][round % 3]];
                line.push(b'\n');
                let large = round % 100 == 99;
                let answer = if large { 1 << 20 } else { line.len() };
                // The first of all wakes the service.
                let began = Instant::now();
                client.send(if large { b"give\n" } else { &line })?;
                client.recv_exact(&mut vec![0; answer])?;
                let took = began.elapsed();
                ensure!(
                    took < GAP || nth + round == 0,
                    "{relay}: connection {nth}, answer {round} took {took:?}"
                );
                longest = longest.max(if nth + round == 0 { Duration::ZERO } else { took });
            }
            client.close_writing()?;
        }
        println!("{program} through {relay}: the longest answer took {longest:?}");
        drop(stand.service.take());
    }
    Ok(())
}

#[test]
fn asyncio_is_served_by_every_relay() -> Result<()> {
    bro_tests::require_or_ok!(Need::Root, Need::Bpf, Need::Program("python3", "python3"));
    every_relay_serves("python3", &[&source("lines.py")], ALL)
}

#[test]
fn node_is_served_by_every_relay() -> Result<()> {
    bro_tests::require_or_ok!(Need::Root, Need::Bpf, Need::Program("node", "nodejs"));
    every_relay_serves("node", &[&source("lines.js")], ALL)
}

#[test]
fn go_is_served_by_every_relay() -> Result<()> {
    bro_tests::require_or_ok!(Need::Root, Need::Bpf, Need::Program("go", "golang-go"));
    let scratch = bro_tests::scratch::Scratch::new()?;
    let built = scratch.join("lines");
    let mut go = Command::new(find_program("go").context("go has gone")?);
    go.args(["build", "-o"]).arg(&built).arg(source("lines.go"));
    finished(go.env("GOCACHE", scratch.join("cache")).env("GO111MODULE", "off").output()?)?;
    every_relay_serves(built.to_str().context("a path is text")?, &[], ALL)
}

#[test]
fn java_that_asks_before_it_reads_is_served_by_every_relay() -> Result<()> {
    bro_tests::require_or_ok!(Need::Root, Need::Bpf, Need::Program("java", "default-jdk-headless"));
    // Compiled by the launcher, without a file.
    every_relay_serves(
        "java",
        &["-Xshare:auto", "-XX:TieredStopAtLevel=1", &source("Lines.java")],
        BUT_SOCKMAP,
    )
}

#[test]
fn a_service_that_asks_first_is_served_by_every_relay() -> Result<()> {
    bro_tests::require_or_ok!(Need::Root, Need::Bpf, Need::Program("python3", "python3"));
    every_relay_serves("python3", &[&source("asks_first.py")], BUT_SOCKMAP)
}
