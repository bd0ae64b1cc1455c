//! The forwarder's own life: what it tells the service manager, when it leaves, how it drains, and which socket leads where.
//!
//! Needs: a network namespace. Takes: seconds.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Setup;
use bro_tests::netns::{Namespace, Owner};
use bro_tests::notify::Notify;
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Address, Conn, Family, Here, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use nix::sys::signal::Signal;

const MOMENT: Duration = Duration::from_millis(300);

#[test]
fn tells_the_service_manager_its_state() -> Result<()> {
    require_namespaces!();
    tells_its_state(Notify::new()?)
}

#[test]
fn tells_its_state_to_an_abstract_socket_too() -> Result<()> {
    require_namespaces!();
    tells_its_state(Notify::new_abstract()?)
}

fn tells_its_state(mut notify: Notify) -> Result<()> {
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).arg(scene.target());
    let mut forwarder = setup.start()?;
    notify.wait(PATIENCE, |line| line == "READY=1")?;
    let is_status = |line: &str| line.starts_with("STATUS=");
    notify.wait(PATIENCE, is_status).context("a status from the start")?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    // The status tells of the open connection, maybe after it has told that the service is looked for.
    notify.wait_anew(PATIENCE, |line| is_status(line) && line.contains("1 connection now"))?;
    drop(pair);
    forwarder.closings(1)?;
    forwarder.signal(Signal::SIGTERM)?;
    forwarder.expect_exit(0)?;
    notify.wait(PATIENCE, |line| line == "STOPPING=1")?;
    let seen = notify.seen();
    ensure!(!seen.iter().any(|line| line.starts_with("WATCHDOG")), "no watchdog was asked for: {seen:?}");
    ensure!(seen.iter().filter(|line| *line == "READY=1").count() == 1, "ready more than once: {seen:?}");
    Ok(())
}

#[test]
fn feeds_the_watchdog_when_asked_to() -> Result<()> {
    require_namespaces!();
    let mut notify = Notify::new()?;
    let scene = Scene::new()?;
    let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).launch("watchdog-usec=300000");
    let forwarder = setup.arg(scene.target()).start()?;
    let mut before = Instant::now();
    for _ in 0..4 {
        notify.wait_anew(PATIENCE, |line| line == "WATCHDOG=1")?;
        ensure!(before.elapsed() < Duration::from_millis(300), "too late: systemd would have killed it");
        before = Instant::now();
    }
    drop(forwarder);

    // A watchdog of another process is not ours to feed.
    let mut notify = Notify::new()?;
    let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).env("WATCHDOG_USEC", "100000");
    let forwarder = setup.env("WATCHDOG_PID", "1").arg(scene.target()).start()?;
    notify.wait(PATIENCE, |line| line == "READY=1")?;
    ensure!(notify.wait(MOMENT, |line| line == "WATCHDOG=1").is_err(), "fed another's watchdog");
    forwarder.stop().map(drop)
}

#[test]
fn asks_for_more_time_while_it_drains() -> Result<()> {
    require_namespaces!();
    let mut notify = Notify::new()?;
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let setup =
        scene.setup().env("NOTIFY_SOCKET", notify.name()).arg("--drain-timeout=20s").arg(scene.target());
    let mut forwarder = setup.start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    forwarder.signal(Signal::SIGTERM)?;
    notify.wait(PATIENCE, |line| line == "STOPPING=1")?;
    let extend = notify.wait(PATIENCE, |line| line.starts_with("EXTEND_TIMEOUT_USEC="))?;
    let more: u64 = extend.trim_start_matches("EXTEND_TIMEOUT_USEC=").parse()?;
    ensure!(more >= 1_000_000, "asked for {more} µs");
    // Asked again in time, as long as it takes.
    let again =
        notify.wait_anew(Duration::from_micros(more), |line| line.starts_with("EXTEND_TIMEOUT_USEC="));
    ensure!(again.is_ok() || more >= 20_000_000, "asked once, for {more} µs of a 20 s drain");
    drop(pair);
    forwarder.expect_exit(0)
}

#[test]
fn leaves_when_no_client_ever_comes() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let begin = Instant::now();
    let mut forwarder = scene.start(&["--exit-idle-time=400ms"])?;
    forwarder.expect_exit(0)?;
    let lasted = begin.elapsed();
    ensure!((400..3000).contains(&lasted.as_millis()), "it left after {lasted:?}");
    Ok(())
}

#[test]
fn leaves_only_after_the_last_connection() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--exit-idle-time=400ms"])?;
    let first = (scene.client()?, service.accept()?);
    let second = (scene.client()?, service.accept()?);
    expect_relayed(&first.0, &first.1)?;
    drop(first);
    forwarder.closings(1)?;
    // The first has ended; the second says nothing for twice the time, and counts.
    ensure!(forwarder.wait(Duration::from_millis(900))?.is_none(), "it left with a connection open");
    expect_relayed(&second.0, &second.1)?;
    drop(second);
    let begin = Instant::now();
    forwarder.expect_exit(0)?;
    ensure!(begin.elapsed() >= Duration::from_millis(350), "it left {:?} after the last", begin.elapsed());
    Ok(())
}

#[test]
fn a_client_that_waits_for_the_service_keeps_it_from_leaving() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&["--exit-idle-time=300ms"])?;
    let client = scene.client()?;
    ensure!(forwarder.wait(Duration::from_millis(900))?.is_none(), "it left with a client held");
    let service = scene.serve()?.accept()?;
    expect_relayed(&client, &service)?;
    drop((client, service));
    forwarder.expect_exit(0)
}

#[test]
fn sigterm_drains_and_cuts_nothing() -> Result<()> {
    require_namespaces!();
    let mut notify = Notify::new()?;
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).arg(scene.target());
    let mut forwarder = setup.start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    let half = 4 << 20;
    let (up, down) = (Pattern(1), Pattern(2));
    std::thread::scope(|scope| {
        let download = scope.spawn(|| {
            pair.0.drink(down, 0, 2 * half)?;
            pair.0.expect_eof()
        });
        pair.1.pour(down, 0, half)?;
        forwarder.signal(Signal::SIGTERM)?;
        notify.wait(PATIENCE, |line| line == "STOPPING=1")?;
        // A client that connects now is not this process's: the connection waits for the next.
        let late = scene.client()?;
        late.send(b"ping")?;
        ensure!(service.try_accept(MOMENT)?.is_none(), "accepted after SIGTERM");
        pair.1.pour(down, half, 2 * half)?;
        pair.1.close_writing()?;
        download.join().expect("the reader does not panic").context("the download over SIGTERM")?;
        // The other direction goes on as well.
        pair.0.pour(up, 0, 100_000)?;
        pair.1.drink(up, 0, 100_000)?;
        ensure!(forwarder.is_running()?, "it left with a connection open");
        pair.0.close_writing()?;
        pair.1.expect_eof()?;
        forwarder.expect_exit(0)?;
        ensure!(forwarder.closing()?.reason == "eof", "{:?}", forwarder.closing());

        let next = scene.start(&[])?;
        let served = service.accept()?;
        served.recv_exact(&mut [0; 4])?;
        served.send(b"pong")?;
        late.recv_exact(&mut [0; 4]).context("a client that came during the drain")?;
        drop((late, served));
        next.stop().map(drop)
    })
}

#[test]
fn sigterm_without_a_client_ends_at_once() -> Result<()> {
    require_namespaces!();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut notify = Notify::new()?;
        let scene = Scene::new()?;
        let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).arg(scene.target());
        let mut forwarder = setup.start()?;
        notify.wait(PATIENCE, |line| line == "READY=1")?;
        forwarder.signal(signal)?;
        forwarder.expect_exit_within(0, Duration::from_secs(1)).with_context(|| format!("{signal}"))?;
    }
    Ok(())
}

#[test]
fn a_held_client_is_served_although_sigterm_has_come() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&[])?;
    let client = scene.client()?;
    client.send(b"ping")?;
    scene.expect_held(&forwarder, 1)?;
    // To all of the unit's processes, as systemd sends it by default.
    // Beside itself and its relay process.
    let agent = || process::members(forwarder.pid()).len() > 2;
    ensure!(process::eventually(PATIENCE, agent), "no process has entered the namespace");
    for pid in process::members(forwarder.pid()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM)?;
    }
    ensure!(forwarder.wait(MOMENT)?.is_none(), "it left with a client held");
    let service = scene.serve()?.accept()?;
    service.recv_exact(&mut [0; 4])?;
    service.send(b"pong")?;
    client.recv_exact(&mut [0; 4])?;
    drop((client, service));
    forwarder.expect_exit(0)
}

#[test]
fn what_outlasts_the_drain_timeout_is_aborted() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&["--drain-timeout=500ms"])?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    let begin = Instant::now();
    forwarder.signal(Signal::SIGTERM)?;
    pair.0.expect_abort().context("client")?;
    pair.1.expect_abort().context("service")?;
    ensure!(begin.elapsed() >= Duration::from_millis(500), "cut after {:?}", begin.elapsed());
    forwarder.expect_exit(0)?;
    ensure!(forwarder.closing()?.reason == "drain-timeout", "{:?}", forwarder.closing());
    Ok(())
}

#[test]
fn a_second_sigterm_ends_at_once() -> Result<()> {
    require_namespaces!();
    let mut notify = Notify::new()?;
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).arg(scene.target());
    let mut forwarder = setup.start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    forwarder.signal(Signal::SIGTERM)?;
    notify.wait(PATIENCE, |line| line == "STOPPING=1")?;
    forwarder.signal(Signal::SIGTERM)?;
    let status = forwarder.wait(Duration::from_secs(2))?.context("still there after a second SIGTERM")?;
    ensure!(status.code().is_some(), "killed by the signal instead of ending: {status:?}");
    forwarder.expect_nothing_left()?;
    pair.0.expect_abort()?;
    ensure!(forwarder.closing()?.reason == "shutdown", "{:?}", forwarder.closing());
    Ok(())
}

#[test]
fn nothing_outlives_a_killed_forwarder() -> Result<()> {
    require_namespaces!();
    let mut notify = Notify::new()?;
    let mut scene = Scene::new()?;
    let setup = scene.setup().env("NOTIFY_SOCKET", notify.name()).arg("--ready=exec:sleep 1000; true");
    let mut forwarder = setup.arg(scene.target()).start()?;
    let _held = scene.client()?;
    let _service = scene.serve()?;
    let runs = |pid: &i32| process::name(*pid).as_deref() == Some("sleep");
    let started = || process::members(forwarder.pid()).iter().any(runs);
    ensure!(process::eventually(PATIENCE, started), "the readiness command never ran");
    forwarder.signal(Signal::SIGTERM)?;
    // Two signals before the first is handled are one.
    notify.wait(PATIENCE, |line| line == "STOPPING=1")?;
    forwarder.signal(Signal::SIGTERM)?;
    ensure!(forwarder.wait(PATIENCE)?.is_some(), "still there after a second SIGTERM");
    forwarder.expect_nothing_left().context("after SIGTERM, twice")?;

    // Its helper in the namespace notices by itself even when it gets no chance to say goodbye.
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&[])?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    forwarder.signal(Signal::SIGKILL)?;
    ensure!(forwarder.wait(PATIENCE)?.is_some(), "still there");
    // No side takes what it cut off for the end of the stream.
    pair.0.expect_abort().context("the client")?;
    pair.1.expect_abort().context("the service")?;
    forwarder.expect_nothing_left().context("after SIGKILL")
}

#[test]
fn each_named_socket_leads_to_its_target() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let v6 = Family::Tcp6.loopback().context("TCP has one")?;
    let unix = |name: &str| Address::Unix(scene.folder().join(name));
    let fronts =
        [Listener::new(&Here, &loopback)?, Listener::new(&Here, &v6)?, Listener::new(&Here, &unix("c"))?];
    let services = [
        Listener::new(&scene.namespace, &loopback)?,
        Listener::new(&scene.namespace, &unix("s"))?,
        Listener::new(&scene.namespace, &v6)?,
    ];
    let setup =
        scene.setup().named(&fronts[0], "http").named(&fronts[1], "metrics").named(&fronts[2], "admin");
    let target = |index: usize| services[index].address().to_string();
    let setup =
        setup.arg(format!("--target=http={}", target(0))).arg(format!("--target=metrics={}", target(1)));
    let setup = setup.arg("--target").arg(format!("admin={}", target(2))).arg(scene.target());
    let forwarder = setup.start()?;
    let plain = scene.serve()?;
    for (front, service) in fronts.iter().chain([&scene.front]).zip(services.iter().chain([&plain])) {
        let client = Conn::new(&Here, front.address())?;
        let served =
            service.accept().with_context(|| format!("from {} to {}", front.address(), service.address()))?;
        expect_relayed(&client, &served)?;
    }
    let closings = forwarder.closings(4)?;
    for service in services.iter().chain([&plain]) {
        let target = service.address().to_string();
        ensure!(closings.iter().any(|closing| closing.target == target), "{target} missing: {closings:?}");
    }
    forwarder.stop().map(drop)
}

#[test]
fn targets_are_read_as_systemd_socket_proxyd_reads_them() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    // In a namespace of its own every port is free, and its owner may take the low ones.
    let port_80 = Listener::new(&scene.namespace, &Address::Tcp("0.0.0.0:80".parse()?))?;
    let port_81 = Listener::new(&scene.namespace, &Address::Tcp("127.0.0.1:81".parse()?))?;
    let port_80_v6 = Listener::new(&scene.namespace, &Address::Tcp("[::1]:80".parse()?))?;
    for (target, service) in [
        ("127.0.0.1", &port_80),
        ("127.0.0.2:80", &port_80),
        ("81", &port_81),
        ("127.0.0.1:81", &port_81),
        ("[::1]", &port_80_v6),
        ("[::1]:80", &port_80_v6),
    ] {
        let forwarder = scene.setup().arg(target).start()?;
        let pair = (scene.client()?, service.accept().with_context(|| format!("TARGET {target}"))?);
        expect_relayed(&pair.0, &pair.1)?;
        drop(pair);
        forwarder.stop()?;
    }
    // A name may have several addresses: any that is served will do.
    let forwarder = scene.setup().arg("localhost").start()?;
    let client = scene.client()?;
    let served = match port_80.try_accept(MOMENT)? {
        Some(served) => served,
        None => port_80_v6.accept().context("TARGET localhost")?,
    };
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.stop().map(drop)
}

#[test]
fn one_target_that_sleeps_does_not_hold_up_another() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, awake) = (Listener::new(&Here, &loopback)?, Listener::new(&scene.namespace, &loopback)?);
    let setup = scene.setup().named(&front, "awake").arg(format!("--target=awake={}", awake.address()));
    let forwarder = setup.arg(scene.target()).start()?;
    let waits = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    let client = Conn::new(&Here, front.address())?;
    let served = awake.accept()?;
    expect_relayed(&client, &served)?;
    let service = scene.serve()?.accept()?;
    expect_relayed(&waits, &service)?;
    drop((waits, service, client, served));
    forwarder.stop().map(drop)
}

#[test]
fn listens_by_itself_without_systemd() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let path = scene.folder().join("own");
    let setup = Setup::new().netns(&scene.namespace).arg("--listen=127.0.0.1:0").arg("--listen").arg(&path);
    let forwarder = setup.arg(scene.target()).start()?;
    let mut addresses = Vec::new();
    process::eventually(PATIENCE, || {
        let sockets = process::sockets(forwarder.relay()).unwrap_or_default();
        let listening = sockets.iter().filter(|socket| {
            nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::AcceptConn).unwrap_or(false)
        });
        addresses =
            listening.filter_map(|socket| Address::of(std::os::fd::AsFd::as_fd(socket)).ok()).collect();
        addresses.len() >= 2
    });
    let tcp = addresses.iter().find(|address| address.port().is_some()).context("no TCP listener")?;
    for address in [tcp.clone(), Address::Unix(path.clone())] {
        let client = Conn::new(&Here, &address)?;
        let served = service.accept()?;
        expect_relayed(&client, &served).with_context(|| address.to_string())?;
    }
    forwarder.closings(2)?;
    forwarder.stop()?;
    ensure!(!path.exists(), "the unix socket's file is left behind");
    Ok(())
}

#[test]
fn enters_the_namespace_of_a_process_whichever_user_owns_it() -> Result<()> {
    require_namespaces!();
    for owner in [Owner::Usual, Owner::UserNamespace, Owner::KeepId] {
        let namespace = match Namespace::owned_by(owner) {
            Ok(namespace) => namespace,
            // Root on a host that forbids user namespaces: the usual one is what there is.
            Err(_) if nix::unistd::geteuid().is_root() && owner != Owner::Usual => continue,
            Err(error) => return Err(error),
        };
        let mut scene = Scene::between(namespace, Family::Tcp4, Family::Tcp4)?;
        let service = scene.serve()?;
        let setups = [
            Setup::new().pid(&scene.namespace).socket(&scene.front),
            Setup::new().netns(&scene.namespace).socket(&scene.front),
        ];
        for setup in setups {
            let forwarder = setup.arg(scene.target()).start()?;
            let pair = (scene.client()?, service.accept().with_context(|| format!("{owner:?}"))?);
            expect_relayed(&pair.0, &pair.1)?;
            drop(pair);
            forwarder.closings(1)?;
            forwarder.stop()?;
        }
    }
    Ok(())
}

#[test]
fn an_abstract_name_is_one_of_the_targets_namespace() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let name = Address::Abstract(format!("bro-tests{}", scene.folder().display()));
    let decoy = Listener::new(&Here, &name)?;
    let service = Listener::new(&scene.namespace, &name)?;
    let forwarder = scene.setup().arg(name.to_string()).start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    ensure!(decoy.try_accept(Duration::ZERO)?.is_none(), "the host's own name was taken");
    drop(pair);
    forwarder.stop().map(drop)
}

#[test]
fn without_a_place_the_target_is_in_its_own_namespace() -> Result<()> {
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, service) = (Listener::new(&Here, &loopback)?, Listener::new(&Here, &loopback)?);
    let forwarder = Setup::new().socket(&front).arg(service.address().to_string()).start()?;
    let pair = (Conn::new(&Here, front.address())?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    drop(pair);
    forwarder.stop().map(drop)
}
