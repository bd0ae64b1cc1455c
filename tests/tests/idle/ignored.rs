//! `--idle-ignore` and `--wake-ignore`: monitors and scanners are served, but keep nothing awake, or wake nothing.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::{Conn, End, Family, Here, PATIENCE};
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};

use crate::{MOMENT, wakes};

/// Where the monitor is.
const MONITOR: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

fn monitor(scene: &Scene) -> Result<Conn> {
    Conn::bound_to(&Here, scene.front.address(), Some(MONITOR))
}

#[test]
fn a_monitor_that_stays_keeps_nothing_awake_and_is_closed_in_order() -> Result<()> {
    require_namespaces!();
    for by in ["--idle-by=connections", "--idle-by=bytes"] {
        let mut scene = Scene::new()?;
        let service = scene.serve()?;
        let mut forwarder =
            scene.start(&[by, "--exit-idle-time=500ms", "--idle-ignore=10.0.0.0/8,127.0.0.2"])?;
        let watches = (monitor(&scene)?, service.accept()?);
        let client = (scene.client()?, service.accept()?);
        expect_relayed(&watches.0, &watches.1)?;
        for _ in 0..6 {
            expect_relayed(&client.0, &client.1)?;
            ensure!(forwarder.wait(Duration::from_millis(150))?.is_none(), "{by}: it left under a client");
        }
        let report = forwarder.report()?;
        ensure!(report.peers.len() == 1 && report.total.open == 2, "{report:?}");
        drop(client);
        let left = Instant::now();
        while forwarder.wait(Duration::from_millis(20))?.is_none() {
            ensure!(left.elapsed() < Duration::from_secs(5), "{by}: a monitor keeps it awake");
            // Whatever it says. The exit may be at any moment.
            if expect_relayed(&watches.0, &watches.1).is_err() {
                break;
            }
        }
        ensure!(left.elapsed() > Duration::from_millis(300), "{by}: after {:?}", left.elapsed());
        forwarder.expect_exit(0)?;
        let ends: Vec<String> = forwarder.closings(2)?.into_iter().map(|closing| closing.reason).collect();
        ensure!(ends == ["eof", "idle-exit"], "{ends:?}");
    }
    Ok(())
}

#[test]
fn an_ignored_connection_that_sleeps_is_closed_in_order() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--exit-idle-time=300ms", "--idle-ignore=127.0.0.2"])?;
    let watches = (monitor(&scene)?, service.accept()?);
    expect_relayed(&watches.0, &watches.1)?;
    ensure!(watches.0.read_to_end()?.1 == End::Eof && watches.1.read_to_end()?.1 == End::Eof, "a reset");
    forwarder.expect_exit(0)
}

#[test]
fn monitors_that_come_and_go_keep_nothing_awake() -> Result<()> {
    require_namespaces!();
    for by in ["--idle-by=connections", "--idle-by=bytes"] {
        let mut scene = Scene::new()?;
        let service = scene.serve()?;
        let mut forwarder = scene.start(&[by, "--exit-idle-time=700ms", "--idle-ignore=127.0.0.2"])?;
        let first = (scene.client()?, service.accept()?);
        expect_relayed(&first.0, &first.1)?;
        drop(first);
        let began = Instant::now();
        while forwarder.wait(Duration::from_millis(100))?.is_none() {
            ensure!(began.elapsed() < Duration::from_secs(5), "{by}: checks keep it awake");
            let check = monitor(&scene)?;
            if let Ok(Some(served)) = service.try_accept(Duration::from_millis(100)) {
                expect_relayed(&check, &served).ok();
            }
        }
        ensure!(began.elapsed() >= Duration::from_millis(600), "{by}: after {:?}", began.elapsed());
        forwarder.expect_exit(0)?;
    }
    Ok(())
}

/// It wakes what sleeps, and what it waits for is not given up.
#[test]
fn an_ignored_client_that_is_held_is_served() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=300ms", "--idle-ignore=127.0.0.2"])?;
    let watches = monitor(&scene)?;
    ensure!(forwarder.wait(Duration::from_millis(900))?.is_none(), "it left with a client held");
    ensure!(wakes(&forwarder) == 1, "{} wakes", wakes(&forwarder));
    let served = scene.serve()?.accept()?;
    expect_relayed(&watches, &served)?;
    watches.expect_eof()?;
    forwarder.expect_exit(0)
}

#[test]
fn who_wakes_nothing_is_reset_while_it_sleeps_and_served_while_it_is_awake() -> Result<()> {
    require_namespaces!();
    for more in ["--wake-on=connect", "--wake-on=data"] {
        let mut scene = Scene::new()?;
        let forwarder = scene.start(&[more, "--wake-ignore=127.0.0.2"])?;
        for _ in 0..3 {
            monitor(&scene)?.expect_abort()?;
        }
        for closing in forwarder.closings(3)? {
            ensure!(
                closing.reason == "wake-ignored" && closing.peer.starts_with("127.0.0.2:"),
                "{closing:?}"
            );
        }
        ensure!(wakes(&forwarder) == 0, "{more}: it was woken");
        // Another one wakes it, and meanwhile the first waits with that one.
        let client = scene.client()?;
        client.send(b"x")?;
        forwarder.log().line(PATIENCE, |line| line.contains("waking the service"))?;
        let waits = monitor(&scene)?;
        scene.expect_held(&forwarder, 2)?;
        let service = scene.serve()?;
        let first = (&client, service.accept()?);
        first.1.recv_exact(&mut [0])?;
        let second = (&waits, service.accept()?);
        expect_relayed(first.0, &first.1)?;
        expect_relayed(second.0, &second.1)?;
        let late = (monitor(&scene)?, service.accept()?);
        expect_relayed(&late.0, &late.1)?;
        drop((late, first.1, second.1, waits, client));
        forwarder.stop()?;
    }
    Ok(())
}

/// A client that is turned away does not keep the forwarder from leaving either.
#[test]
fn scans_do_not_keep_the_forwarder() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=500ms", "--wake-ignore=127.0.0.0/8"])?;
    let began = Instant::now();
    while forwarder.wait(Duration::from_millis(50))?.is_none() {
        ensure!(began.elapsed() < Duration::from_secs(5), "scans keep it");
        drop(scene.client()?);
    }
    forwarder.expect_exit(0)
}

#[test]
fn users_of_a_unix_socket_can_be_meant_too() -> Result<()> {
    require_namespaces!();
    let scene = Scene::of(Family::Unix)?;
    let forwarder = scene.start(&["--wake-ignore=unix"])?;
    scene.client()?.expect_abort()?;
    ensure!(forwarder.closing()?.reason == "wake-ignored" && wakes(&forwarder) == 0, "it woke it");
    forwarder.stop().map(drop)
}

/// The client counts that a trusted balancer speaks of, not the balancer.
#[test]
fn whom_a_balancer_introduces_is_who_is_meant() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let options = ["--accept-proxy", "--trusted=127.0.0.1", "--wake-ignore=198.51.100.0/24"];
    let forwarder = scene.start(&options)?;
    let scan = scene.client()?;
    scan.send(b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 443\r\n")?;
    scan.expect_abort().context("the one that is meant")?;
    ensure!(forwarder.closing()?.reason == "wake-ignored" && wakes(&forwarder) == 0, "it woke it");
    let client = scene.client()?;
    client.send(b"PROXY TCP4 192.0.2.7 203.0.113.1 4711 443\r\n")?;
    forwarder.log().line(PATIENCE, |line| line.contains("waking the service"))?;
    ensure!(client.stays_silent(MOMENT)?, "not held");
    client.abort()?;
    forwarder.stop().map(drop)
}
