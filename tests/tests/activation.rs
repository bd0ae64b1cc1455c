//! The real `systemd-socket-activate` in front: what it listens on is passed to bro at the first connection.
//!
//! Needs: systemd-socket-activate. Takes: seconds.

use anyhow::{Context as _, Result, ensure};
use bro_tests::activation::{PACKAGE, start, wait_until_activated};
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Address, Conn, Family, Here, Listener};
use bro_tests::process;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::tier::{Need, met};

fn can_run(test: &str) -> bool {
    let mut needs = bro_tests::suite::namespace_needs();
    needs.push(Need::Program(PACKAGE.0, PACKAGE.1));
    met(test, &needs)
}

fn loopback(family: Family) -> Result<Address> {
    family.loopback().context("TCP has one")
}

fn netns(scene: &Scene) -> Vec<String> {
    vec!["--netns".into(), scene.namespace.path().display().to_string()]
}

#[test]
fn the_first_client_wakes_a_service_that_does_not_run_yet() -> Result<()> {
    if !can_run("the_first_client_wakes_a_service_that_does_not_run_yet") {
        return Ok(());
    }
    let mut scene = Scene::new()?;
    let mut arguments = netns(&scene);
    arguments.extend(["--exit-idle-time=1s".into(), scene.target()]);
    let (mut forwarder, addresses) = start(&[loopback(Family::Tcp4)?], &[], &arguments)?;
    ensure!(process::name(forwarder.pid()).as_deref() != Some("bro"), "it runs before the first client");

    let client = Conn::new(&Here, &addresses[0])?;
    client.pour(Pattern(1), 0, 1000)?;
    client.close_writing()?;
    wait_until_activated(&forwarder)?;
    let service = scene.serve()?.accept()?;
    service.drink(Pattern(1), 0, 1000)?;
    service.expect_eof()?;
    service.pour(Pattern(2), 0, 2_000_000)?;
    drop(service);
    client.drink(Pattern(2), 0, 2_000_000)?;
    client.expect_eof()?;

    let closing = forwarder.closing()?;
    ensure!(closing.cold_start_ms.is_some() && closing.reason == "eof", "{closing:?}");
    // It executes its program only once: idle exit ends the whole thing.
    forwarder.expect_exit(0)
}

#[test]
fn several_sockets_of_several_kinds_by_their_names() -> Result<()> {
    if !can_run("several_sockets_of_several_kinds_by_their_names") {
        return Ok(());
    }
    let mut scene = Scene::new()?;
    let metrics = Listener::new(&scene.namespace, &loopback(Family::Tcp4)?)?;
    let path = scene.folder().join("front");
    let mut arguments = netns(&scene);
    arguments.extend([
        format!("--target=web={}", scene.target()),
        format!("--target=metrics={}", metrics.address()),
        format!("--target=local={}", scene.target()),
    ]);
    let fronts = [loopback(Family::Tcp4)?, loopback(Family::Tcp6)?, Address::Unix(path.clone())];
    let (forwarder, addresses) = start(&fronts, &["--fdname=web:metrics:local"], &arguments)?;
    ensure!(addresses[2] == Address::Unix(path), "{addresses:?}");
    let service = scene.serve()?;
    for (address, service) in addresses.iter().zip([&service, &metrics, &service]) {
        let client = Conn::new(&Here, address)?;
        let served = service.accept().with_context(|| format!("through {address}"))?;
        expect_relayed(&client, &served)?;
    }
    forwarder.closings(3)?;
    forwarder.stop().map(drop)
}

#[test]
fn a_socket_that_was_not_passed_leaves_the_others_served() -> Result<()> {
    if !can_run("a_socket_that_was_not_passed_leaves_the_others_served") {
        return Ok(());
    }
    let mut scene = Scene::new()?;
    let mut arguments = netns(&scene);
    arguments.extend([format!("--target=web={}", scene.target()), "--target=lost=127.0.0.1:9".into()]);
    let fronts = [loopback(Family::Tcp4)?];
    let (mut strict, addresses) = start(&fronts, &["--fdname=web"], &arguments)?;
    let _wakes = Conn::new(&Here, &addresses[0])?;
    strict.expect_exit(2)?;

    arguments.push("--allow-missing-sockets".into());
    let (forwarder, addresses) = start(&fronts, &["--fdname=web"], &arguments)?;
    let service = scene.serve()?;
    let client = Conn::new(&Here, &addresses[0])?;
    expect_relayed(&client, &service.accept()?)?;
    drop(client);
    let lines = forwarder.log().lines();
    ensure!(lines.iter().any(|line| line.contains("--target lost=") && line.contains("WARN")), "{lines:?}");
    forwarder.stop().map(drop)
}
