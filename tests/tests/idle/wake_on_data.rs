//! `--wake-on=data`: only who sends wakes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::{Address, Conn, End, Family, Here, Listener, PATIENCE};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::{process, require_namespaces};

use crate::{MOMENT, wakes};

#[test]
fn who_sends_nothing_wakes_nothing_and_the_first_byte_wakes() -> Result<()> {
    require_namespaces!();
    for family in [Family::Tcp4, Family::Tcp6, Family::Unix] {
        let mut scene = Scene::of(family)?;
        let forwarder = scene.start(&["--wake-on=data", "--relay=splice"])?;
        let (silent, speaks) = (scene.client()?, scene.client()?);
        scene.expect_held(&forwarder, 2)?;
        forwarder.expect_no_spin(2 * MOMENT).context("with silent clients")?;
        ensure!(wakes(&forwarder) == 0, "{family:?}: a silent client woke the service");
        ensure!(silent.stays_silent(Duration::ZERO)?, "a silent client was ended");
        ensure!(forwarder.report()?.total.silent == 2, "{:?}", forwarder.report()?.total);

        speaks.send(b"ping")?;
        forwarder.log().line(PATIENCE, |line| line.contains("waking the service"))?;
        let service = scene.serve()?;
        // Awake, it is everybody's, and may speak first. (A unix service is known to be awake by the first connection that it
        // takes, so there the two are in the order in which they came.)
        let (mut served, mut greeted) = (service.accept()?, service.accept()?);
        if has_sent(&greeted)? {
            std::mem::swap(&mut served, &mut greeted);
        }
        served.recv_exact(&mut [0; 4])?;
        served.send(b"pong")?;
        speaks.recv_exact(&mut [0; 4])?;
        greeted.send(b"220 hello")?;
        silent.recv_exact(&mut [0; 9])?;
        let late = scene.client()?;
        let greeted_too = service.accept().context("a silent client of an awake service")?;
        drop((silent, speaks, served, greeted, late, greeted_too));
        let closings = forwarder.closings(3)?;
        let woke: Vec<_> = closings.iter().filter(|closing| closing.cold_start_ms.is_some()).collect();
        ensure!(woke.len() == 1 && woke[0].conn == 2, "{closings:?}");
        // From the first byte on, not from the connection.
        ensure!(woke[0].cold_start_ms < Some(600) && woke[0].duration_ms >= 600, "{woke:?}");
        forwarder.stop()?;
    }
    Ok(())
}

/// Has its client sent something?
fn has_sent(served: &Conn) -> Result<bool> {
    Ok(!served.stays_silent(MOMENT)?)
}

#[test]
fn who_leaves_without_a_byte_is_forgotten() -> Result<()> {
    require_namespaces!();
    for family in [Family::Tcp4, Family::Unix] {
        let scene = Scene::of(family)?;
        let forwarder = scene.start(&["--wake-on=data"])?;
        let (closes, half_closes, aborts) = (scene.client()?, scene.client()?, scene.client()?);
        scene.expect_held(&forwarder, 3)?;
        half_closes.close_writing()?;
        ensure!(half_closes.read_to_end()?.1 == End::Eof, "a FIN without a byte is answered by a reset");
        drop(closes);
        aborts.abort()?;
        for closing in forwarder.closings(3)? {
            ensure!(closing.reason == "client-left", "{closing:?}");
        }
        scene.expect_held(&forwarder, 0)?;
        ensure!(wakes(&forwarder) == 0, "{family:?}: it woke the service");
        forwarder.stop()?;
    }
    Ok(())
}

/// systemd has accepted no client before the forwarder runs: one that came and went meanwhile is in the backlog still.
#[test]
fn who_has_left_before_the_forwarder_ran_wakes_nothing() -> Result<()> {
    require_namespaces!();
    for family in [Family::Tcp4, Family::Unix] {
        let scene = Scene::of(family)?;
        let (closes, half_closes, aborts) = (scene.client()?, scene.client()?, scene.client()?);
        half_closes.close_writing()?;
        drop(closes);
        aborts.abort()?;
        let forwarder = scene.start(&["--wake-on=data"])?;
        ensure!(half_closes.read_to_end()?.1 == End::Eof, "a FIN without a byte is answered by a reset");
        for closing in forwarder.closings(3)? {
            ensure!(closing.reason == "client-left", "{closing:?}");
        }
        ensure!(wakes(&forwarder) == 0, "{family:?}: it woke the service");
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn a_byte_and_a_fin_wake() -> Result<()> {
    require_namespaces!();
    for (front, gone) in
        [(Family::Tcp4, false), (Family::Tcp4, true), (Family::Unix, false), (Family::Unix, true)]
    {
        let mut scene = Scene::between(bro_tests::netns::Namespace::new()?, front, Family::Tcp4)?;
        let forwarder = scene.start(&["--wake-on=data"])?;
        let client = scene.client()?;
        scene.expect_held(&forwarder, 1)?;
        client.send(b"ping")?;
        client.close_writing()?;
        let client = (!gone).then_some(client);
        forwarder.log().line(PATIENCE, |line| line.contains("waking the service"))?;
        std::thread::sleep(MOMENT);
        let served = scene.serve()?.accept().with_context(|| format!("{front:?}, gone: {gone}"))?;
        let (came, end) = served.read_to_end()?;
        ensure!(came == b"ping" && end == End::Eof, "{came:?} came, then {end:?}");
        if let Some(client) = client {
            served.send(b"pong")?;
            drop(served);
            ensure!(client.read_to_end()?.0 == b"pong", "no answer");
        } else {
            drop(served);
        }
        forwarder.stop()?;
    }
    Ok(())
}

/// Fewer bytes wake nothing, and what is fewer is passed on at once as soon as the service is awake.
#[test]
fn so_many_bytes_wake() -> Result<()> {
    require_namespaces!();
    for family in [Family::Tcp4, Family::Tcp6] {
        let mut scene = Scene::of(family)?;
        let forwarder = scene.start(&["--wake-on=data:8", "--relay=splice"])?;
        let (scans, waits, speaks) = (scene.client()?, scene.client()?, scene.client()?);
        for client in [&scans, &waits, &speaks] {
            client.send(b"1234567")?;
        }
        scene.expect_held(&forwarder, 3)?;
        forwarder.expect_no_spin(2 * MOMENT).context("with clients that have sent too little")?;
        scans.close_writing()?;
        ensure!(forwarder.closing()?.reason == "client-left", "{:?}", forwarder.closing());
        ensure!(wakes(&forwarder) == 0, "{family:?}: seven bytes woke the service");

        speaks.send(b"8")?;
        forwarder.log().line(PATIENCE, |line| line.contains("waking the service"))?;
        let service = scene.serve()?;
        let (first, second) = (service.accept()?, service.accept()?);
        for served in [&first, &second] {
            let mut came = [0; 7];
            served.recv_exact(&mut came)?;
            ensure!(came == *b"1234567", "{came:?}");
        }
        // The one whose client has sent seven gets its eighth alone.
        waits.send(b"8")?;
        for served in [&first, &second] {
            let mut came = [0; 1];
            served.recv_exact(&mut came)?;
            ensure!(came == *b"8", "{came:?}");
        }
        drop((scans, waits, speaks, first, second));
        forwarder.closings(2)?;
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn silence_has_an_end() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&["--wake-on=data", "--start-timeout=500ms"])?;
    let began = Instant::now();
    let client = scene.client()?;
    client.expect_abort()?;
    ensure!(began.elapsed() >= Duration::from_millis(500), "ended after {:?}", began.elapsed());
    ensure!(forwarder.closing()?.reason == "idle-timeout", "{:?}", forwarder.closing());
    ensure!(wakes(&forwarder) == 0, "it woke the service");
    forwarder.stop().map(drop)
}

/// The time for the start runs from the first byte: a client that was silent for most of it gets all of it.
#[test]
fn the_start_has_its_time_after_a_silence() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--wake-on=data", "--start-timeout=1s"])?;
    let client = scene.client()?;
    std::thread::sleep(Duration::from_millis(800));
    client.send(b"ping")?;
    std::thread::sleep(Duration::from_millis(800));
    let served = scene.serve()?.accept()?;
    served.recv_exact(&mut [0; 4])?;
    served.send(b"pong")?;
    client.recv_exact(&mut [0; 4])?;
    drop((client, served));
    forwarder.stop().map(drop)
}

/// A scanner that holds all connections there may be shuts no client out.
#[test]
fn the_silent_make_room_for_others() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--wake-on=data", "--relay=splice", "--connections-max=3"])?;
    let scanner: Vec<Conn> = (0..3).map(|_| scene.client()).collect::<Result<_>>()?;
    scene.expect_held(&forwarder, 3)?;
    forwarder.expect_no_spin(MOMENT).context("full of silent clients")?;
    ensure!(scanner[0].stays_silent(Duration::ZERO)?, "ended although no other client came");
    let client = scene.client()?;
    client.send(b"ping")?;
    scanner[0].expect_abort().context("the one that was silent longest")?;
    let service = scene.serve()?;
    let served = service.accept()?;
    let mut first = [0; 4];
    // The others are let in as well once the service is awake; the client came last.
    let others = [service.accept()?, service.accept()?];
    let served = [&served, &others[0], &others[1]]
        .into_iter()
        .find(|served| !served.stays_silent(MOMENT).unwrap_or(true))
        .context("the client's bytes have not arrived")?;
    served.recv_exact(&mut first)?;
    ensure!(&first == b"ping", "{first:?}");
    served.send(b"pong")?;
    client.recv_exact(&mut first)?;
    ensure!(forwarder.closing()?.reason == "idle-timeout", "{:?}", forwarder.closing());
    // No client is silent now: the limit is a limit again.
    let fourth = scene.client()?;
    fourth.send(b"ping")?;
    ensure!(service.try_accept(MOMENT)?.is_none(), "a fourth connection");
    Ok(())
}

/// A flood of connections that say nothing, with a real client now and then: each of those is served.
#[test]
fn a_flood_of_scans_does_not_keep_clients_out() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--wake-on=data", "--connections-max=16"])?;
    let mut scans = Vec::new();
    for _ in 0..200 {
        scans.push(scene.client()?);
    }
    let client = scene.client()?;
    client.send(b"ping")?;
    let all =
        process::eventually(PATIENCE, || forwarder.report().is_ok_and(|report| report.total.accepted == 201));
    ensure!(all, "{:?}", forwarder.report()?.total);
    // One process accepts and counts, another wakes and says so.
    process::eventually(PATIENCE, || wakes(&forwarder) > 0);
    ensure!(wakes(&forwarder) == 1, "{} wakes", wakes(&forwarder));
    drop(scans);
    let service = scene.serve()?;
    loop {
        let served = service.accept()?;
        if let (came, _) = read_some(&served)?
            && came == b"ping"
        {
            served.send(b"pong")?;
            client.recv_exact(&mut [0; 4])?;
            return Ok(());
        }
    }
}

fn read_some(conn: &Conn) -> Result<(Vec<u8>, usize)> {
    let mut buffer = [0; 16];
    if conn.stays_silent(MOMENT)? {
        return Ok((Vec::new(), 0));
    }
    let count = conn.recv(&mut buffer).unwrap_or(0);
    Ok((buffer[..count].to_vec(), count))
}

/// Two targets in one container: when one is awake, so is the other, and its clients need not speak.
#[test]
fn a_container_that_is_awake_is_awake_for_all_its_targets() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, other) = (Listener::new(&Here, &loopback)?, Listener::new(&scene.namespace, &loopback)?);
    let setup = scene.setup().named(&front, "other").arg(format!("--target=other={}", other.address()));
    let forwarder = setup.arg("--wake-on=data").arg(scene.target()).start()?;
    let connect = |address: &Address| Conn::new(&Here, address);
    let before = connect(front.address())?;
    let first = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    ensure!(wakes(&forwarder) == 0, "woken without a byte");
    first.send(b"ping")?;
    let served = scene.serve()?.accept()?;
    served.recv_exact(&mut [0; 4])?;
    served.send(b"pong")?;
    first.recv_exact(&mut [0; 4])?;
    let greeted = other.accept().context("the silent client of the other target")?;
    expect_relayed(&before, &greeted)?;
    let late = connect(front.address())?;
    let greeted_too = other.accept().context("a later client of the other target")?;
    expect_relayed(&late, &greeted_too)?;
    drop((before, first, served, greeted, late, greeted_too));
    forwarder.stop().map(drop)
}

/// A host that connects without end and says nothing is let go for others, and not these for it.
#[test]
fn a_flood_of_silent_clients_shuts_no_client_out() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--wake-on=data", "--connections-max=8"])?;
    let slow = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    let elsewhere = Some(std::net::Ipv4Addr::new(127, 0, 0, 2).into());
    let mut flood = Vec::new();
    for _ in 0..40 {
        flood.push(Conn::bound_to(&Here, scene.front.address(), elsewhere)?);
    }
    let gone = forwarder.closings(33)?;
    ensure!(gone.iter().all(|closing| closing.peer.starts_with("127.0.0.2:")), "{gone:?}");
    slow.send(b"ping")?;
    forwarder.log().line(PATIENCE, |line| line.contains("waking the service"))?;
    let service = scene.serve()?;
    // Those that were silent are let through as well: as many as there is room for.
    let served = (0..8).map(|_| service.accept()).collect::<Result<Vec<_>>>()?;
    let deadline = Instant::now() + PATIENCE;
    let spoken = loop {
        ensure!(Instant::now() < deadline, "who has spoken is not served");
        let sent = served.iter().map(has_sent).collect::<Result<Vec<_>>>()?;
        if let Some(spoken) = sent.iter().position(|&sent| sent) {
            break &served[spoken];
        }
    };
    spoken.recv_exact(&mut [0; 4])?;
    spoken.send(b"pong")?;
    slow.recv_exact(&mut [0; 4])?;
    drop(served);
    drop((flood, slow, service));
    forwarder.stop().map(drop)
}

/// A stop waits for what is under way, and with a client that has not said a word nothing is.
#[test]
fn a_stop_does_not_wait_for_silent_clients() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let mut forwarder = scene.start(&["--wake-on=data", "--drain-timeout=60s"])?;
    let _silent = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    forwarder.signal(nix::sys::signal::Signal::SIGTERM)?;
    forwarder.expect_exit_within(0, Duration::from_secs(5))?;
    ensure!(forwarder.closing()?.reason == "shutdown", "{:?}", forwarder.closing()?);
    Ok(())
}
