//! Limits: how many at once, how many from one source, how long in silence, and what happens when descriptors run out.
//!
//! Needs: a network namespace; root and kernel BTF for one test. Takes: seconds.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::{Conn, Family, Here, PATIENCE};
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::tier::{Need, met};

/// Long enough for a connection that is going to be made to have been made.
const MOMENT: Duration = Duration::from_millis(300);

#[test]
fn over_the_limit_a_client_waits_in_the_backlog() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--connections-max=2"])?;
    let mut open = Vec::new();
    for _ in 0..2 {
        let pair = (scene.client()?, service.accept()?);
        expect_relayed(&pair.0, &pair.1)?;
        open.push(pair);
    }
    // Connected as far as the kernel is concerned, with bytes under way, and neither served nor dropped.
    let waiting = [scene.client()?, scene.client()?];
    for client in &waiting {
        client.send(b"ping")?;
    }
    ensure!(service.try_accept(MOMENT)?.is_none(), "a third client was let in");
    forwarder.expect_no_spin(MOMENT)?;
    for client in &waiting {
        ensure!(client.stays_silent(Duration::ZERO)?, "a waiting client was dropped");
    }
    expect_relayed(&open[0].0, &open[0].1).context("the first two are not held up")?;
    // They wait out of sight, so it is said: with what lets them in.
    let said = "2 clients wait until one of 2 connections ends (--connections-max=2)";
    let status =
        || forwarder.report().map(|report| (report.state, report.waiting.map(|waiting| waiting.clients)));
    ensure!(
        process::eventually(PATIENCE, || status()
            .is_ok_and(|(state, waiting)| state.contains(said) && waiting == Some(2))),
        "{:?}",
        status()
    );
    // One leaves, one comes in: the one that has waited longest.
    for client in waiting {
        open.remove(0);
        let service_end = service.accept()?;
        service_end.recv_exact(&mut [0; 4])?;
        service_end.send(b"pong")?;
        client.recv_exact(&mut [0; 4])?;
        ensure!(service.try_accept(Duration::from_millis(50))?.is_none(), "two came in for one that left");
        open.push((client, service_end));
    }
    let none_waits = || status().is_ok_and(|(state, waiting)| !state.contains("wait") && waiting.is_none());
    ensure!(process::eventually(PATIENCE, none_waits), "{:?}", status());
    drop(open);
    forwarder.closings(4)?;
    let log = forwarder.stop()?;
    let warned = log.lines().iter().filter(|line| line.contains("--connections-max=2")).count();
    ensure!(warned == 1, "said {warned} times: {:#?}", log.lines());
    Ok(())
}

/// Without the option there are as many connections as the limit on descriptors has room for.
#[test]
fn by_default_descriptors_are_the_limit() -> Result<()> {
    require_namespaces!();
    const CLIENTS: usize = 300;
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&[])?;
    let mut open = Vec::new();
    for number in 0..CLIENTS {
        let pair = (scene.client()?, service.accept().with_context(|| format!("client {number} waits"))?);
        expect_relayed(&pair.0, &pair.1)?;
        open.push(pair);
    }
    ensure!(forwarder.report()?.waiting.is_none());
    drop(open);
    forwarder.stop().map(drop)
}

#[test]
fn held_clients_count_towards_the_limit() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["-c", "3"])?;
    let clients: Vec<Conn> = (0..6).map(|_| scene.client()).collect::<Result<_>>()?;
    for (number, client) in (0..).zip(&clients) {
        client.send(&[number])?;
    }
    scene.expect_held(&forwarder, 3)?;
    std::thread::sleep(MOMENT);
    scene.expect_held(&forwarder, 3)?;

    let service = scene.serve()?;
    let mut order = Vec::new();
    let mut clients: Vec<Option<Conn>> = clients.into_iter().map(Some).collect();
    for _ in 0..6 {
        let conn = service.accept()?;
        let mut number = [0];
        conn.recv_exact(&mut number)?;
        order.push(number[0]);
        // Both ends leave: that makes room for one of those that wait.
        clients[usize::from(number[0])].take();
    }
    ensure!(order == [0, 1, 2, 3, 4, 5], "served in another order: {order:?}");
    forwarder.closings(6)?;
    forwarder.stop().map(drop)
}

#[test]
fn one_source_address_gets_so_many_connections_and_another_its_own() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--connections-per-source=2"])?;
    let from =
        |last| Conn::bound_to(&Here, scene.front.address(), Some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, last))));
    let mut open = Vec::new();
    for _ in 0..2 {
        let pair = (from(1)?, service.accept()?);
        expect_relayed(&pair.0, &pair.1)?;
        open.push(pair);
    }
    from(1)?.expect_abort().context("a third connection from one address")?;
    let neighbour = (from(2)?, service.accept()?);
    expect_relayed(&neighbour.0, &neighbour.1).context("another address")?;
    open.remove(0);
    forwarder.closings(2)?;
    let again = (from(1)?, service.accept()?);
    expect_relayed(&again.0, &again.1).context("after one has left")?;
    drop((open, neighbour, again));
    let closings = forwarder.closings(5)?;
    let refused: Vec<_> = closings.iter().filter(|closing| closing.reason == "source-limit").collect();
    ensure!(refused.len() == 1 && refused[0].peer.starts_with("127.0.0.1:"), "{closings:?}");
    forwarder.stop().map(drop)
}

#[test]
fn over_unix_a_source_is_a_user() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::of(Family::Unix)?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--connections-per-source=1"])?;
    let first = (scene.client()?, service.accept()?);
    expect_relayed(&first.0, &first.1)?;
    let (bytes, _) = scene.client()?.read_to_end()?;
    ensure!(bytes.is_empty(), "a refused client got bytes");
    drop(first);
    let closings = forwarder.closings(2)?;
    ensure!(closings.iter().any(|closing| closing.reason == "source-limit"), "{closings:?}");
    let again = (scene.client()?, service.accept()?);
    expect_relayed(&again.0, &again.1)?;
    drop(again);
    forwarder.stop().map(drop)
}

/// Forty clients want eighty descriptors and more; there are forty-eight.
#[test]
fn out_of_descriptors_it_backs_off_and_recovers() -> Result<()> {
    require_namespaces!();
    const CLIENTS: u8 = 40;
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let setup = scene.setup().launch("nofile=48:48").arg(scene.target());
    let mut forwarder = setup.start()?;
    let clients: Vec<Conn> = (0..CLIENTS).map(|_| scene.client()).collect::<Result<_>>()?;
    for (number, client) in (0..).zip(&clients) {
        client.send(&[number])?;
    }
    // The ends of the connections that are being served: service's and client's.
    let mut open: Vec<(Conn, Conn)> = Vec::new();
    let mut waiting: Vec<Option<Conn>> = clients.into_iter().map(Some).collect();
    let mut serve_next = |open: &mut Vec<(Conn, Conn)>, within: Duration| -> Result<bool> {
        let Some(conn) = service.try_accept(within)? else { return Ok(false) };
        let mut number = [0];
        conn.recv_exact(&mut number)?;
        let client = waiting[usize::from(number[0])].take().context("one client, two connections")?;
        conn.send(&[number[0] ^ 0xff])?;
        let mut answer = [0];
        client.recv_exact(&mut answer)?;
        ensure!(answer[0] == number[0] ^ 0xff, "an answer came to the wrong client");
        open.push((conn, client));
        Ok(true)
    };
    let mut served = 0;
    while serve_next(&mut open, MOMENT)? {
        served += 1;
    }
    ensure!((1..CLIENTS).contains(&served), "{served} served at once");
    ensure!(forwarder.is_running()?, "it has ended");
    forwarder.expect_no_spin(MOMENT * 2)?;
    let is_told = || forwarder.log().complaints().iter().any(|line| line.contains("LimitNOFILE="));
    ensure!(process::eventually(PATIENCE, is_told), "{:#?}", forwarder.log().lines());
    let told = forwarder.log().complaints();
    ensure!((1..4).contains(&told.len()), "want it told, and told briefly: {told:#?}");
    // As connections end, everyone gets a turn.
    let deadline = Instant::now() + PATIENCE;
    while served < CLIENTS {
        ensure!(Instant::now() < deadline, "only {served} of {CLIENTS} served");
        open.pop();
        while serve_next(&mut open, Duration::from_millis(100))? {
            served += 1;
        }
    }
    drop(open);
    let closings = forwarder.closings(CLIENTS.into())?;
    ensure!(closings.iter().all(|closing| closing.reason == "eof"), "{closings:?}");
    forwarder.stop().map(drop)
}

/// The kernel relay takes some twenty: a forwarder that insists on it says which limit is too low, wherever it is met.
#[test]
fn too_few_descriptors_for_the_kernel_relay_are_named_as_the_reason() -> Result<()> {
    if !met("too_few_descriptors_for_the_kernel_relay", &[Need::Root, Need::Bpf]) {
        return Ok(());
    }
    let scene = Scene::new()?;
    let mut told = 0;
    for limit in (18..54).step_by(3) {
        let setup = scene.setup().launch(format!("nofile={limit}:{limit}")).arg("--relay=sockmap");
        let mut forwarder = setup.arg(scene.target()).start()?;
        let settled = |line: &str| line.contains("kernel relay loaded") || line.starts_with("bro: ");
        let line = forwarder.log().line(PATIENCE, settled).with_context(|| format!("with {limit}"))?;
        if line.contains("cannot be had") {
            told += 1;
            ensure!(line.contains("(os error 24)") && line.contains("LimitNOFILE="), "with {limit}: {line}");
            ensure!(!line.contains("LimitMEMLOCK="), "with {limit}: {line}");
            forwarder.expect_exit(1)?;
        }
    }
    ensure!(told > 2, "only {told} were too few");
    Ok(())
}

#[test]
fn silence_ends_a_connection_and_one_byte_now_and_then_keeps_it() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--idle-timeout=600ms"])?;
    let silent = (scene.client()?, service.accept()?);
    expect_relayed(&silent.0, &silent.1)?;
    let half = (scene.client()?, service.accept()?);
    half.0.close_writing()?;
    half.1.expect_eof()?;
    let busy = (scene.client()?, service.accept()?);
    let begin = Instant::now();
    // One direction only: that the other is silent does not matter.
    while begin.elapsed() < Duration::from_millis(1500) {
        busy.1.send(b".")?;
        busy.0.recv_exact(&mut [0])?;
        std::thread::sleep(Duration::from_millis(50));
    }
    silent.0.expect_abort().context("client")?;
    silent.1.expect_abort().context("service")?;
    // Half-closed and silent is silent.
    half.0.expect_abort().context("half-closed client")?;
    expect_relayed(&busy.0, &busy.1)?;
    let closings = forwarder.closings(2)?;
    ensure!(
        closings.len() == 2 && closings.iter().all(|closing| closing.reason == "idle-timeout"),
        "{closings:?}"
    );
    ensure!(closings.iter().all(|closing| (600..1400).contains(&closing.duration_ms)), "{closings:?}");
    drop(busy);
    forwarder.stop().map(drop)
}

#[test]
fn keepalive_times_reach_both_legs() -> Result<()> {
    keepalive(&["--keepalive-time=77s", "--keepalive-interval=7s", "--keepalive-probes=5"], (77, 7, 5))
}

/// Without being asked for: the host's own would keep a service awake for two hours for a client whose link has gone.
#[test]
fn a_side_that_has_vanished_is_found_after_two_minutes() -> Result<()> {
    keepalive(&[], (60, 10, 6))
}

fn keepalive(options: &[&str], expected: (u32, u32, u32)) -> Result<()> {
    use nix::sys::socket::{getsockopt, sockopt};
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(options)?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    let mut legs = 0;
    for socket in process::sockets(forwarder.relay())? {
        if bro_tests::peers::Address::of_peer(std::os::fd::AsFd::as_fd(&socket))
            .is_ok_and(|peer| peer.port().is_some())
        {
            let times = (
                getsockopt(&socket, sockopt::TcpKeepIdle)?,
                getsockopt(&socket, sockopt::TcpKeepInterval)?,
                getsockopt(&socket, sockopt::TcpKeepCount)?,
            );
            ensure!(getsockopt(&socket, sockopt::KeepAlive)? && times == expected, "a leg has {times:?}");
            legs += 1;
        }
    }
    ensure!(legs == 2, "{legs} legs found");
    drop(pair);
    forwarder.stop().map(drop)
}

/// The kernel chooses a source port for each connection, and has no more of them than net.ipv4.ip_local_port_range says. That the
/// next client has to wait for one is no other's business, least of all a refusal of the service's.
#[test]
fn without_a_source_port_one_client_waits_and_no_other() -> Result<()> {
    require_namespaces!();
    const PORTS: usize = 4;
    let mut scene = Scene::new()?;
    let mut shell = scene.namespace.enter();
    let range = format!("echo 20000 {} > /proc/sys/net/ipv4/ip_local_port_range", 20000 + PORTS - 1);
    shell.extend(["sh".into(), "-c".into(), range]);
    ensure!(std::process::Command::new(&shell[0]).args(&shell[1..]).status()?.success(), "{shell:?}");
    let service = scene.serve()?;
    // As a client itself, bro has the client's port.
    let forwarder = scene.start(&["--relay=splice", "--source=loopback"])?;
    let mut open = Vec::new();
    for _ in 0..PORTS {
        let pair = (scene.client()?, service.accept()?);
        expect_relayed(&pair.0, &pair.1)?;
        open.push(pair);
    }
    let mut waiting = vec![(b'a', scene.client()?), (b'b', scene.client()?)];
    for (name, client) in &waiting {
        client.send(&[*name])?;
    }
    let told = |line: &str| line.contains("no free source port");
    let line = forwarder.log().line(PATIENCE, told)?;
    ensure!(line.contains("WARN") && line.contains(&scene.target()), "{line}");
    ensure!(service.try_accept(MOMENT)?.is_none(), "there was a port");
    forwarder.expect_no_spin(MOMENT)?;
    for (client, served) in &open {
        expect_relayed(client, served)?;
    }
    while !waiting.is_empty() {
        // Nothing is kept of a connection that is aborted.
        open.remove(0).0.abort()?;
        let served = service.accept().context("a port is free")?;
        let mut name = [0];
        served.recv_exact(&mut name)?;
        let who = waiting
            .iter()
            .position(|waiting| waiting.0 == name[0])
            .context("no client waits by that name")?;
        let (_, client) = waiting.remove(who);
        expect_relayed(&client, &served)?;
        open.push((client, served));
    }
    let lines = forwarder.log().lines();
    ensure!(lines.iter().filter(|line| told(line)).count() == 1, "{lines:#?}");
    ensure!(lines.iter().filter(|line| line.contains("waking")).count() == 1, "{lines:#?}");
    ensure!(!lines.iter().any(|line| line.contains("refused")), "{lines:#?}");
    drop(open);
    forwarder.stop().map(drop)
}
