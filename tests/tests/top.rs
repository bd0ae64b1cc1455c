//! `bro top` on a terminal: it sees what there is, heeds keys, and leaves the terminal as it was, however it ends.
//!
//! Needs: a network namespace. Takes: seconds.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use bro_tests::forwarder::{Forwarder, bro_of};
use bro_tests::pty::Pty;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use nix::sys::signal::Signal;

/// A scene with a forwarder that `bro top` finds.
fn found() -> Result<(Scene, Forwarder)> {
    let scene = Scene::new()?;
    let forwarder = scene.setup().found_in(scene.folder()).arg(scene.target()).start()?;
    bro_tests::process::eventually(bro_tests::peers::PATIENCE, || {
        scene.folder().join("bro/web/status.sock").exists()
    });
    Ok((scene, forwarder))
}

fn top(scene: &Scene) -> Result<Pty> {
    Pty::start(bro_of(scene.folder(), &["top"]), 24, 80)
}

#[test]
fn shows_what_happens_heeds_keys_and_gives_the_terminal_back() -> Result<()> {
    require_namespaces!();
    let (mut scene, forwarder) = found()?;
    let mut top = top(&scene)?;
    top.expect("the heading", |line| line == "bro: 1 service, 0 awake, 0 connections")?;
    top.expect("the table", |line| {
        line.starts_with("NAME ") && line.contains("HELD") && line.ends_with("RELAY")
    })?;
    top.expect("the service", |line| line.contains(" asleep ") && line.trim_end().ends_with("splice"))?;
    let held = scene.client()?;
    top.expect("the held client", |line| line.split_whitespace().any(|word| word == "starting"))?;
    let service = scene.serve()?;
    let served = service.accept()?;
    expect_relayed(&held, &served)?;
    top.expect("the connection", |line| line == "bro: 1 service, 1 awake, 1 connection")?;
    held.send(&[7; 100_000])?;
    served.recv_exact(&mut vec![0; 100_000])?;
    top.expect("the rate", |line| line.contains(" kB ") && line.contains(" awake "))?;

    // It is in use: asked first, and no is no.
    top.press("s")?;
    top.expect("the question", |line| {
        line.ends_with(" has 1 connection, to be reset. Put it to sleep? (y/n)")
    })?;
    top.press("n")?;
    top.expect("what came of it", |line| line.ends_with(": left as it is"))?;
    expect_relayed(&held, &served)?;

    // Smaller, and larger again. What was drawn for the old size and came later is drawn over.
    top.resize(8, 40)?;
    top.expect_screen("heading and keys", |lines| {
        lines.len() <= 8
            && lines[0] == "bro: 1 service, 1 awake, 1 connection"
            && lines.iter().any(|line| line.contains("q quit"))
    })?;
    top.resize(24, 80)?;
    top.expect("all columns", |line| line.starts_with("NAME ") && line.ends_with("RELAY"))?;

    top.press("q")?;
    let status = top.expect_restored()?;
    ensure!(status.code() == Some(0), "{status:?}: {:#?}", top.lines());
    expect_relayed(&held, &served)?;
    drop((held, served));
    forwarder.stop().map(drop)
}

#[test]
fn the_terminal_is_given_back_when_it_is_told_to_end() -> Result<()> {
    require_namespaces!();
    let (scene, forwarder) = found()?;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut top = top(&scene)?;
        top.expect("the service", |line| line.contains(" asleep "))?;
        top.signal(signal)?;
        let status = top.expect_restored()?;
        ensure!(status.code() == Some(0), "{signal}: {status:?}: {:#?}", top.lines());
    }
    // Control-C is a key there.
    let mut top = top(&scene)?;
    top.expect("the service", |line| line.contains(" asleep "))?;
    top.press("\u{3}")?;
    ensure!(top.expect_restored()?.code() == Some(0));
    forwarder.stop().map(drop)
}

#[test]
fn says_so_where_there_is_nothing() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    std::fs::create_dir(scene.folder().join("bro"))?;
    let mut top = top(&scene)?;
    top.expect("a sentence", |line| line.starts_with("Nothing is activated, and no forwarder"))?;
    // There is nothing to be chosen.
    top.press("wsjk")?;
    top.press("q")?;
    ensure!(top.expect_restored()?.code() == Some(0));
    Ok(())
}

#[test]
fn without_a_terminal_it_is_one_sentence() -> Result<()> {
    let mut command = Command::new(bro_tests::bro::binary());
    let ran = command.arg("top").stdin(Stdio::null()).output()?;
    let said = String::from_utf8(ran.stderr)?;
    ensure!(ran.status.code() == Some(2) && ran.stdout.is_empty(), "{:?}", ran.status);
    ensure!(said.lines().count() == 1 && said.starts_with("bro: bro top needs a terminal"), "{said}");
    Ok(())
}
