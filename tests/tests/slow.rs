//! What takes longer: thousands of connections at rest, thousands that come and go, more of the torture.
//!
//! Needs: a network namespace. Takes: 1 min.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Setup;
use bro_tests::netns::Namespace;
use bro_tests::peers::{Conn, Family, Here, Listener, PATIENCE};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::{bro, process, require_namespaces, torture};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// A service in a process of its own, so that its descriptors do not count against the test's limit.
struct Echo(Child);

impl Echo {
    fn start(listener: &Listener) -> Result<Self> {
        let fd = std::os::fd::AsFd::as_fd(listener).try_clone_to_owned()?;
        Ok(Self(Command::new(bro::helper()).arg("echo").stdin(Stdio::from(fd)).spawn()?))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn echoed(client: &Conn, text: &[u8]) -> Result<()> {
    client.send(text)?;
    let mut came = vec![0; text.len()];
    client.recv_exact(&mut came)?;
    ensure!(came == text, "another answer came: {came:?}");
    Ok(())
}

/// As many connections at rest as the descriptor limit allows beside the pipes, at most 9,600.
fn thousands_at_rest(lane: Lane) -> Result<()> {
    require_namespaces!();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let count = usize::try_from(hard.saturating_sub(800) / 2)?.min(9_600);
    let namespace = Namespace::new()?;
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, service) = (Listener::new(&Here, &loopback)?, Listener::new(&namespace, &loopback)?);
    let _echo = Echo::start(&service)?;
    let setup = Setup::new()
        .netns(&namespace)
        .socket(&front)
        .args(lane.arguments().unwrap_or_default().iter().copied());
    // systemd's usual limit: the program must raise its own.
    let setup = setup.launch(format!("nofile=1024:{hard}")).arg("--connections-max=20000");
    let forwarder = setup.arg(service.address().to_string()).start()?;

    let connect = || -> Result<Conn> {
        let client = Conn::new(&Here, front.address())?;
        echoed(&client, b"hello")?;
        Ok(client)
    };
    let mut clients = (0..100).map(|_| connect()).collect::<Result<Vec<_>>>()?;
    let descriptors = forwarder.descriptors()?;
    let before = forwarder.memory_kib()?;
    let more = count - clients.len();
    for _ in 0..more {
        clients.push(connect()?);
    }
    let grown = forwarder.memory_kib()?.saturating_sub(before);
    ensure!(grown <= 4 * more as u64, "{more} idle connections cost {grown} KiB");
    println!("{count} idle connections: {:.2} KiB each", grown as f64 / more as f64);
    let pipes = process::pipe_ends(forwarder.relay())?;
    ensure!(pipes <= 2048 && pipes < count / 4, "{pipes} pipe ends are held while {count} connections rest");
    forwarder.expect_no_spin(Duration::from_secs(1))?;
    for client in clients.iter().rev() {
        echoed(client, b"still there?")?;
    }
    drop(clients);
    let rested = || forwarder.descriptors().is_ok_and(|now| now <= descriptors);
    ensure!(
        process::eventually(PATIENCE, rested),
        "{} descriptors are left, {descriptors} with 100 connections",
        forwarder.descriptors()?
    );
    forwarder.closings(count)?;
    forwarder.stop().map(drop)
}

/// One after the other: each takes nearly all descriptors that a process may have.
#[test]
fn thousands_of_connections_at_rest_cost_little_and_still_work() -> Result<()> {
    thousands_at_rest(Lane::Splice).context("splice")?;
    thousands_at_rest(Lane::Copy).context("copy")
}

#[test]
fn thousands_of_connections_leave_nothing_behind() -> Result<()> {
    require_namespaces!();
    let rig = Rig::new(Lane::Splice, Legs::TCP4)?;
    let forwarder = rig.forwarder().context("the lane has one")?;
    let mut start = None;
    let begin = Instant::now();
    for round in 0..5_000 {
        let (client, service) = rig.pair()?;
        client.pour(bro_tests::pattern::Pattern(1), 0, 100)?;
        service.drink(bro_tests::pattern::Pattern(1), 0, 100)?;
        match round % 4 {
            0 => client.abort()?,
            1 => service.abort()?,
            _ => {}
        }
        if round == 500 {
            drop((
                forwarder.closings(500)?,
                start.replace((forwarder.descriptors()?, forwarder.memory_kib()?)),
            ));
        }
    }
    let took = begin.elapsed();
    forwarder.closings(5_000)?;
    let (descriptors, memory) = start.context("500 rounds are over")?;
    let rested = || forwarder.descriptors().is_ok_and(|now| now <= descriptors);
    ensure!(
        process::eventually(PATIENCE, rested),
        "{} descriptors, {descriptors} before",
        forwarder.descriptors()?
    );
    let grown = forwarder.memory_kib()?.saturating_sub(memory);
    ensure!(grown < 1024, "memory has grown by {grown} KiB over 4,500 connections ({took:?})");
    rig.finish()
}

#[test]
fn long_torture_over_splice() -> Result<()> {
    long_torture(Lane::Splice)
}

#[test]
fn long_torture_over_copy() -> Result<()> {
    long_torture(Lane::Copy)
}

fn long_torture(lane: Lane) -> Result<()> {
    require_namespaces!();
    for (seed, legs) in [(1, Legs::TCP4), (2, Legs::TCP6), (3, Legs::UNIX), (4, Legs::TCP_TO_UNIX)] {
        let rig = Rig::new(lane, legs)?;
        torture::torture(&rig, seed << 32, 600).with_context(|| format!("{legs:?}"))?;
        rig.finish().with_context(|| format!("{legs:?}"))?;
    }
    Ok(())
}

/// Each try of a readiness command is bounded: one that hangs is ended, with what it has started, and tried again.
#[test]
fn a_readiness_command_that_hangs_is_ended_and_tried_again() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let tried = scene.folder().join("tried");
    let ready = format!("--ready=exec:test -e {0} || {{ touch {0}; sleep 1000; }}", tried.display());
    let forwarder = scene.start(&[&ready])?;
    let client = scene.client()?;
    let served = service.accept().context("after the first try has been ended")?;
    expect_relayed(&client, &served)?;
    let left = |pid: &i32| process::name(*pid).as_deref() == Some("sleep");
    ensure!(!process::members(forwarder.pid()).iter().any(left), "the hanging command is left behind");
    drop((client, served));
    forwarder.stop().map(drop)
}

/// What one side sent before its reset waits for a reader that does not read: half a minute, at no cost but the kernel's queues.
#[test]
fn a_reader_that_never_reads_is_waited_for_half_a_minute() -> Result<()> {
    require_namespaces!();
    const COUNT: usize = 40;
    let rig = Rig::with(Lane::Splice, Legs::TCP4, |setup| setup.arg("--connections-max=1000"))?;
    let forwarder = rig.forwarder().context("the lane has one")?;
    let pattern = bro_tests::pattern::Pattern(7);
    let mut readers = Vec::new();
    for round in 0..COUNT {
        let (client, service) = rig.pair()?;
        expect_relayed(&client, &service)?;
        let (sender, reader) = if round % 2 == 0 { (service, client) } else { (client, service) };
        // More than the reader's kernel takes of its own.
        let sent = sender.pour_until_stuck(pattern, u64::MAX, Duration::from_millis(20))?;
        readers.push((sender, reader, sent));
    }
    let (memory, begin) = (forwarder.memory_kib()?, Instant::now());
    let mut stayers = Vec::new();
    for (sender, reader, _) in readers {
        sender.abort()?;
        stayers.push(reader);
    }
    std::thread::sleep(Duration::from_secs(2));
    forwarder.expect_no_spin(Duration::from_secs(1))?;
    let closings = forwarder.log().closings(COUNT, Duration::from_secs(40))?;
    let took = begin.elapsed();
    let limit = bro_relay::connection::STALLED;
    ensure!(took >= limit && took < limit + Duration::from_secs(6), "the last one ended after {took:?}");
    ensure!(closings.iter().all(|closing| closing.reason.ends_with("-reset")), "{closings:?}");
    ensure!(closings.iter().all(|closing| closing.duration_ms >= 29_000), "{closings:?}");
    let grown = forwarder.memory_kib()?.saturating_sub(memory);
    ensure!(grown < 4096, "{COUNT} resets that were not taken cost {grown} KiB");
    for reader in stayers {
        reader.expect_abort()?;
    }
    rig.finish()
}

/// A thousand services reset at once, with what they have sent still on its way: every client gets all of it.
#[test]
fn a_thousand_resets_at_once_lose_nothing() -> Result<()> {
    require_namespaces!();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    const SIZE: u64 = 200_000;
    let rig = Rig::with(Lane::Splice, Legs::TCP4, |setup| setup.arg("--connections-max=2000"))?;
    let pattern = bro_tests::pattern::Pattern(8);
    let mut pairs = Vec::new();
    for _ in 0..1000 {
        let (client, service) = rig.pair()?;
        service.pour(pattern, 0, SIZE)?;
        pairs.push((client, service));
    }
    for (_, service) in &pairs {
        service.wait_acknowledged()?;
    }
    let clients = pairs.into_iter().map(|(client, service)| service.abort().map(|()| client));
    let clients: Vec<Conn> = clients.collect::<Result<_>>()?;
    // All at once, for there is half a minute for it.
    let read = |part: &[Conn]| part.iter().try_for_each(|client| client.drink(pattern, 0, SIZE));
    std::thread::scope(|scope| {
        let readers: Vec<_> = clients.chunks(25).map(|part| scope.spawn(move || read(part))).collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("it does not panic"))
    })?;
    for client in &clients {
        client.expect_abort()?;
    }
    drop(clients);
    rig.finish()
}
