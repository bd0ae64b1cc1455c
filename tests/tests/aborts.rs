//! Resets on their way: what ends them early, and what must not take them for something else. (That they overtake no byte is one
//! of the behaviours of every relay, `tests/tests/relay.rs`.)
//!
//! Needs: a network namespace. Takes: seconds.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Forwarder;
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Conn, Listener, PATIENCE};
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const DOWN: Pattern = Pattern(0x2222);

/// A client that does not read, and a service that has sent more than there is room for, and has reset.
fn stuck(scene: &Scene, service: &Listener) -> Result<Conn> {
    let client = scene.client()?;
    let sender = service.accept()?;
    expect_relayed(&client, &sender)?;
    let _sent = sender.pour_until_stuck(DOWN, u64::MAX, Duration::from_millis(300))?;
    sender.abort()?;
    Ok(client)
}

fn expect_service_reset(forwarder: &Forwarder, client: &Conn) -> Result<()> {
    let closing = forwarder.closing()?;
    ensure!(closing.reason == "service-reset", "{closing:?}");
    ensure!(closing.to_client > 4, "{closing:?}");
    client.expect_abort()
}

#[test]
fn a_drain_waits_for_it_as_long_as_for_any_connection() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--drain-timeout=2s", "--relay=splice"])?;
    let client = stuck(&scene, &service)?;
    let begin = Instant::now();
    forwarder.signal(Signal::SIGTERM)?;
    forwarder.expect_exit(0)?;
    let took = begin.elapsed();
    ensure!((Duration::from_millis(1500)..Duration::from_secs(10)).contains(&took), "it took {took:?}");
    expect_service_reset(&forwarder, &client)
}

#[test]
fn an_idle_timeout_that_is_shorter_counts() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--idle-timeout=2s", "--relay=splice"])?;
    let client = stuck(&scene, &service)?;
    expect_service_reset(&forwarder, &client)?;
    forwarder.stop().map(drop)
}

/// A reader that is slower than an idle timeout's worth of its queue, but reads.
#[test]
fn an_idle_timeout_does_not_cut_off_a_slow_reader() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--idle-timeout=1s", "--relay=splice"])?;
    let client = scene.client()?;
    let sender = service.accept()?;
    let size = 2 << 20;
    let sending = thread::spawn(move || -> Result<()> {
        sender.pour(DOWN, 0, size)?;
        sender.wait_acknowledged()?;
        sender.abort()
    });
    let mut at = 0;
    while at < size {
        let piece = (size - at).min(64 * 1024);
        client.drink(DOWN, at, at + piece)?;
        at += piece;
        thread::sleep(Duration::from_millis(90));
    }
    client.expect_abort()?;
    sending.join().expect("it does not panic")?;
    ensure!(forwarder.closing()?.reason == "service-reset");
    forwarder.stop().map(drop)
}

/// The reset of an upload comes in the very moment in which the forwarder looks whether it may leave, and has to stay for
/// another's sake.
#[test]
fn an_aborted_upload_is_no_end_when_the_forwarder_thinks_of_leaving() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder =
        scene.start(&["--relay=splice", "--idle-by=bytes", "--exit-idle-time=1s", "--drain-timeout=0"])?;
    for round in 0..3 {
        let pair = || -> Result<_> {
            let (client, end) = (scene.client()?, service.accept()?);
            client.send(b"half of an upload")?;
            end.recv_exact(&mut [0; 17])?;
            Ok((client, end))
        };
        let (uploading, end) = pair()?;
        let (other, other_end) = pair()?;
        // It stands for a relay process that does not get the processor: the question and the reset wait for it together.
        let relay = Pid::from_raw(forwarder.relay());
        kill(relay, Signal::SIGSTOP)?;
        thread::sleep(Duration::from_millis(1500));
        uploading.abort()?;
        other.send(b"y")?;
        thread::sleep(Duration::from_millis(50));
        kill(relay, Signal::SIGCONT)?;
        end.expect_abort().with_context(|| format!("round {round}"))?;
        other_end.recv_exact(&mut [0; 1]).context("the other's connection goes on")?;
        drop((other, other_end));
    }
    let closings = forwarder.closings(6)?;
    let resets = closings.iter().filter(|closing| closing.reason == "client-reset").count();
    ensure!(resets == 3, "{closings:?}");
    forwarder.stop().map(drop)
}

/// Both sides reset: there is none left to wait for.
#[test]
fn a_second_reset_ends_it_at_once() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--relay=splice"])?;
    let client = stuck(&scene, &service)?;
    thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    client.abort()?;
    let closing = forwarder.closing()?;
    ensure!(begin.elapsed() < PATIENCE / 2, "it took {:?}", begin.elapsed());
    ensure!(closing.reason == "service-reset", "{closing:?}");
    forwarder.stop().map(drop)
}
