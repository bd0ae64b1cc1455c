//! `--idle-below`: heartbeats keep nothing awake, requests do; through every relay.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bro_tests::peers::Conn;
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::{require_namespaces, tier};

const LIMIT: &str = "--idle-below=1K/500ms";

/// Has the client send so much each 50 ms, and the service answer as much, until the forwarder leaves or the time is over.
fn talks(rig: &Rig, pair: &(Conn, Conn), bytes: usize, span: Duration) -> Result<Duration> {
    let began = Instant::now();
    let (words, mut heard) = (vec![b'x'; bytes], vec![0; bytes]);
    while began.elapsed() < span {
        let said = pair.0.send(&words).is_ok() && pair.1.recv_exact(&mut heard).is_ok();
        if !said || pair.1.send(&words).is_err() || pair.0.recv_exact(&mut heard).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(rig.forwarder().is_some(), "without a forwarder nothing sleeps");
    Ok(began.elapsed())
}

fn heartbeats_and_requests(lane: Lane) -> Result<()> {
    if !tier::met(std::thread::current().name().unwrap_or("?"), &lane.needs()) {
        return Ok(());
    }
    let options = ["--exit-idle-time=1s", LIMIT];
    let rig = Rig::with(lane, Legs::TCP4, |setup| setup.args(options))?;
    let (beats, asks) = (rig.pair()?, rig.pair()?);
    // 150 bytes each way in 50 ms are 3000 in 500 ms, 10 are 200.
    let heard = std::thread::scope(|scope| {
        let beating = scope.spawn(|| talks(&rig, &beats, 10, Duration::from_secs(20)));
        let asked = talks(&rig, &asks, 150, Duration::from_millis(2500))?;
        ensure!(asked >= Duration::from_millis(2450), "it left under requests, after {asked:?}");
        let since = Instant::now();
        let beat = beating.join().expect("it does not panic")?;
        anyhow::Ok((beat, since.elapsed()))
    });
    let (beat, since) = heard?;
    ensure!(beat < Duration::from_secs(15), "heartbeats keep it awake");
    ensure!((700..6000).contains(&since.as_millis()), "it left {since:?} after the last request");
    let closings = rig.forwarder().map(|forwarder| forwarder.closings(2)).transpose()?.unwrap_or_default();
    ensure!(closings.iter().all(|closing| closing.reason == "idle-exit"), "{closings:?}");
    if lane.is_kernel() {
        ensure!(closings.iter().any(|closing| closing.relay == "sockmap"), "no lane was taken: {closings:?}");
    }
    Ok(())
}

#[test]
fn spliced() -> Result<()> {
    heartbeats_and_requests(Lane::Splice)
}

#[test]
fn copied() -> Result<()> {
    heartbeats_and_requests(Lane::Copy)
}

#[test]
fn through_the_services_lane() -> Result<()> {
    heartbeats_and_requests(Lane::ServiceLane)
}

#[test]
fn through_both_lanes() -> Result<()> {
    heartbeats_and_requests(Lane::BothLanes)
}

/// One that connects and asks little does not count either, however often.
#[test]
fn small_requests_on_many_connections_keep_nothing_awake() -> Result<()> {
    require_namespaces!();
    let mut scene = bro_tests::scene::Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--exit-idle-time=700ms", LIMIT])?;
    let began = Instant::now();
    while forwarder.wait(Duration::from_millis(100))?.is_none() {
        ensure!(began.elapsed() < Duration::from_secs(5), "small requests keep it awake");
        let Ok(client) = scene.client() else { break };
        if let Ok(Some(served)) = service.try_accept(Duration::from_millis(100)) {
            bro_tests::scene::expect_relayed(&client, &served).ok();
        }
    }
    forwarder.expect_exit(0)
}
