//! `--idle-by=bytes`: a pool's sleeping connections keep nothing awake.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::{End, Family};
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};

#[test]
fn sleeping_connections_are_ended_in_order() -> Result<()> {
    require_namespaces!();
    for family in [Family::Tcp4, Family::Unix] {
        let mut scene = Scene::of(family)?;
        let service = scene.serve()?;
        let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=400ms"])?;
        let pool: Vec<_> = (0..3).map(|_| Ok((scene.client()?, service.accept()?))).collect::<Result<_>>()?;
        for (client, served) in &pool {
            expect_relayed(client, served)?;
        }
        let began = Instant::now();
        for (client, served) in &pool {
            ensure!(client.read_to_end()?.1 == End::Eof, "{family:?}: a client was reset");
            ensure!(served.read_to_end()?.1 == End::Eof, "{family:?}: the service was reset");
        }
        ensure!(began.elapsed() >= Duration::from_millis(380), "after {:?}", began.elapsed());
        ensure!(began.elapsed() < Duration::from_millis(1500), "after {:?}", began.elapsed());
        forwarder.expect_exit(0)?;
        for closing in forwarder.closings(3)? {
            ensure!(closing.reason == "idle-exit" && closing.to_service == 4, "{closing:?}");
        }
    }
    Ok(())
}

#[test]
fn one_connection_that_speaks_keeps_all_of_them() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=500ms"])?;
    let sleeps = (scene.client()?, service.accept()?);
    let speaks = (scene.client()?, service.accept()?);
    for turn in 0..10 {
        ensure!(forwarder.wait(Duration::from_millis(150))?.is_none(), "it left while bytes moved");
        // One way is enough, whichever.
        let (from, to) = if turn % 2 == 0 { (&speaks.0, &speaks.1) } else { (&speaks.1, &speaks.0) };
        from.send(b"x")?;
        to.recv_exact(&mut [0])?;
    }
    expect_relayed(&sleeps.0, &sleeps.1)?;
    forwarder.expect_exit(0)
}

/// Health checks that come and go without a byte.
#[test]
fn connections_without_a_byte_keep_nothing_awake() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=700ms"])?;
    let first = (scene.client()?, service.accept()?);
    expect_relayed(&first.0, &first.1)?;
    let began = Instant::now();
    while forwarder.wait(Duration::from_millis(100))?.is_none() {
        ensure!(began.elapsed() < Duration::from_secs(5), "checks without a byte keep it awake");
        drop(scene.client()?);
    }
    ensure!(began.elapsed() >= Duration::from_millis(650), "it left {:?} after a byte", began.elapsed());
    forwarder.expect_exit(0)
}

/// A FIN would pass for the end of an answer that is still to come.
#[test]
fn who_waits_for_an_answer_sees_a_reset() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=400ms"])?;
    let (client, served) = (scene.client()?, service.accept()?);
    client.send(b"ask")?;
    client.close_writing()?;
    served.recv_exact(&mut [0; 3])?;
    served.expect_eof()?;
    client.expect_abort()?;
    // It has read the client's FIN already, and learns of the reset when it answers.
    served.expect_sending_fails()?;
    forwarder.expect_exit(0)
}

/// Nor does a client that has asked and not half-closed take the end of the stream for an answer.
#[test]
fn who_has_asked_last_sees_a_reset() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=400ms"])?;
    let (asks, answered) = ((scene.client()?, service.accept()?), (scene.client()?, service.accept()?));
    expect_relayed(&asks.0, &asks.1)?;
    expect_relayed(&answered.0, &answered.1)?;
    std::thread::sleep(Duration::from_millis(100));
    asks.0.send(b"ask")?;
    asks.1.recv_exact(&mut [0; 3])?;
    asks.0.expect_abort()?;
    answered.0.expect_eof()?;
    forwarder.expect_exit(0)
}

/// A client that has just connected is about to speak.
#[test]
fn who_has_just_connected_is_given_a_moment() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=800ms"])?;
    let first = (scene.client()?, service.accept()?);
    expect_relayed(&first.0, &first.1)?;
    std::thread::sleep(Duration::from_millis(600));
    let fresh = (scene.client()?, service.accept()?);
    ensure!(forwarder.wait(Duration::from_millis(500))?.is_none(), "it left with a client just connected");
    expect_relayed(&fresh.0, &fresh.1)?;
    forwarder.expect_exit(0)
}

/// Nothing moves, since the client does not read; what it has not read yet is not passed off as all there was.
#[test]
fn who_has_not_read_everything_sees_a_reset() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=500ms"])?;
    let (client, served) = (scene.client()?, service.accept()?);
    // On a busy machine the forwarder has left before this is sure that it is stuck: then it is a reset.
    served.pour_until_stuck(bro_tests::pattern::Pattern(1), 1 << 30, Duration::from_millis(100)).ok();
    forwarder.expect_exit(0)?;
    client.expect_abort()
}

#[test]
fn a_client_that_waits_for_the_service_keeps_it() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=300ms"])?;
    let client = scene.client()?;
    ensure!(forwarder.wait(Duration::from_millis(900))?.is_none(), "it left with a client held");
    let served = scene.serve()?.accept()?;
    expect_relayed(&client, &served).context("a client that was held")?;
    forwarder.expect_exit(0)
}

/// A byte in the very last moment counts: either it is relayed, or the connection ends as one, but it is not swallowed.
#[test]
fn a_request_around_the_idle_exit_is_answered_or_refused() -> Result<()> {
    require_namespaces!();
    for step in 0..12 {
        let mut scene = Scene::new()?;
        let service = scene.serve()?;
        let mut forwarder = scene.start(&["--idle-by=bytes", "--exit-idle-time=200ms"])?;
        let (client, served) = (scene.client()?, service.accept()?);
        expect_relayed(&client, &served)?;
        std::thread::sleep(Duration::from_millis(190 + step * 5));
        // The service echoes until its connection ends.
        let answered = std::thread::scope(|scope| {
            let echoes = scope.spawn(|| {
                let mut buffer = [0; 4];
                while served.recv(&mut buffer).is_ok_and(|count| count > 0) {
                    served.send(&buffer).ok();
                }
            });
            client.send(b"ping").ok();
            let (bytes, _) = client.read_to_end()?;
            echoes.join().expect("the echo does not panic");
            anyhow::Ok(bytes)
        })?;
        let closing = forwarder.closing()?;
        let relayed = closing.to_service == 8;
        ensure!(answered == if relayed { b"ping".as_slice() } else { b"" }, "{answered:?}, {closing:?}");
        forwarder.expect_exit(0)?;
    }
    Ok(())
}
