//! `--min-uptime`, `--busy-file`, `--busy-exec`: what keeps a forwarder from leaving although no client is connected.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bro_tests::peers::PATIENCE;
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};

use crate::MOMENT;

#[test]
fn the_service_stays_up_for_a_while_once_it_was_woken() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=300ms", "--min-uptime=1500ms"])?;
    let client = scene.client()?;
    let service = scene.serve()?;
    let served = service.accept()?;
    let woken = Instant::now();
    expect_relayed(&client, &served)?;
    drop((client, served));
    ensure!(forwarder.wait(Duration::from_millis(900))?.is_none(), "it left too early");
    // Who comes meanwhile is served.
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.expect_exit(0)?;
    let up = woken.elapsed();
    ensure!((1450..3000).contains(&up.as_millis()), "it left {up:?} after the service was woken");
    Ok(())
}

#[test]
fn what_was_not_woken_has_no_minimum() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=200ms", "--min-uptime=1h"])?;
    forwarder.expect_exit_within(0, Duration::from_secs(5))
}

#[test]
fn a_file_keeps_it_awake_while_it_is_there() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let file = scene.folder().join("busy");
    std::fs::write(&file, "")?;
    let option = format!("--busy-file={}", file.display());
    let mut forwarder = scene.start(&["--exit-idle-time=200ms", &option])?;
    let service = scene.serve()?;
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    drop((client, served));
    ensure!(forwarder.wait(Duration::from_secs(1))?.is_none(), "it left although the file is there");
    let state = forwarder.report()?.state;
    ensure!(state.contains("busy") && state.contains(&file.display().to_string()), "{state}");
    forwarder.expect_no_spin(MOMENT)?;
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    drop((client, served));
    std::fs::remove_file(&file)?;
    forwarder.expect_exit(0)
}

#[test]
fn a_command_keeps_it_awake_while_it_succeeds() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let (busy, tries) = (scene.folder().join("busy"), scene.folder().join("tries"));
    std::fs::write(&busy, "")?;
    let option = format!("--busy-exec=echo >>{}; test -e {}", tries.display(), busy.display());
    let mut forwarder = scene.start(&["--exit-idle-time=200ms", &option])?;
    let tried = || std::fs::read(&tries).map_or(0, |tries| tries.len());
    ensure!(process::eventually(PATIENCE, || tried() >= 3), "it was asked {} times", tried());
    ensure!(forwarder.is_running()?, "it left although the command says busy");
    std::fs::remove_file(&busy)?;
    forwarder.expect_exit(0)
}

/// The command says no only after a client has come: that client counts.
#[test]
fn a_client_that_comes_during_the_question_is_served() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let asked = scene.folder().join("asked");
    let option = format!("--busy-exec=touch {}; sleep 0.6; exit 1", asked.display());
    let mut forwarder = scene.start(&["--exit-idle-time=300ms", &option])?;
    let service = scene.serve()?;
    ensure!(process::eventually(PATIENCE, || asked.exists()), "it was never asked");
    let (client, served) = (scene.client()?, service.accept()?);
    ensure!(forwarder.wait(Duration::from_secs(1))?.is_none(), "it left with a client");
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.expect_exit(0)
}

#[test]
fn a_broken_question_counts_as_busy_and_is_warned_of() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=200ms", "--busy-exec=/nowhere/at/all"])?;
    forwarder.log().line(PATIENCE, |line| line.contains("WARN") && line.contains("127"))?;
    ensure!(forwarder.wait(MOMENT)?.is_none(), "it left");
    forwarder.stop().map(drop)
}

#[test]
fn a_question_does_not_outlive_the_forwarder() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=200ms", "--busy-exec=sleep 1000; true"])?;
    let sleeps = |pid: &i32| process::name(*pid).as_deref() == Some("sleep");
    let asked = || process::members(forwarder.pid()).iter().any(sleeps);
    ensure!(process::eventually(PATIENCE, asked), "it was never asked");
    forwarder.signal(nix::sys::signal::Signal::SIGTERM)?;
    forwarder.expect_exit(0)
}
