//! Services that ask how much waits (FIONREAD) before they read, as Java's `ready()` and nginx do: many kernels answer 0 for sockets in a
//! sockmap, whatever waits. So no relay that is chosen without being named, and no connection that is not the kernel relay's own, may
//! ever show them one.
//!
//! Needs: root, kernel BTF. Takes: seconds.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_sockmap::fionread;
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::loader::{ALICE, Site, Stage};
use bro_tests::netns::Namespace;
use bro_tests::peers::{Address, Conn, Family, Here, Listener, PATIENCE, Place};
use bro_tests::process;
use bro_tests::programs::Programs;
use bro_tests::scene::{talk, talk_until};
use bro_tests::scratch::Scratch;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

/// The longest gap in a service's day: what waits has been announced within it.
const GAP: Duration = Duration::from_millis(500);
/// A request with a large cookie: more than nginx's first buffer.
const REQUEST: usize = 3000;
/// As many as a connection needs to be hooked, if it ever is, and some more.
const ROUNDS: usize = 12;

/// A request is read by a service that asks before each read, and answered.
fn ask(client: &Conn, service: &Conn, size: usize) -> Result<()> {
    client.send(&vec![b'r'; size])?;
    let mut left = size;
    while left > 0 {
        let began = Instant::now();
        let waits = loop {
            let waits = usize::try_from(fionread(std::os::fd::AsFd::as_fd(service))?)?;
            if waits > 0 {
                break waits;
            }
            let readable = service.wait(PollFlags::POLLIN, Duration::ZERO)?;
            ensure!(
                began.elapsed() < GAP,
                "a service that asks first hangs: FIONREAD says 0 after {left} of {size} bytes, poll says {readable:?}"
            );
            // Until the relay has carried the next bytes.
            std::thread::sleep(Duration::from_micros(100));
        };
        service.recv_exact(&mut vec![0; waits])?;
        left -= waits;
    }
    service.send(b"answer")?;
    ensure!(client.wait(PollFlags::POLLIN, GAP)?.contains(PollFlags::POLLIN), "no answer within {GAP:?}");
    client.recv_exact(&mut [0; 6])
}

/// Connections from `place` to `address`, each with small and large requests to such a service.
fn serve(place: &dyn Place, address: &Address, service: &Listener) -> Result<()> {
    for nth in 0..3 {
        let client = Conn::new(place, address)?;
        let served = service.accept()?;
        for round in 0..ROUNDS {
            let size = if round % 2 == 0 { REQUEST } else { 10 };
            ask(&client, &served, size).with_context(|| format!("connection {nth}, request {round}"))?;
        }
    }
    Ok(())
}

fn loopback() -> Result<Address> {
    Family::Tcp4.loopback().context("TCP has one")
}

#[test]
fn every_relay_but_the_one_with_the_warning_serves_who_asks_first() -> Result<()> {
    bro_tests::require_bpf!();
    let namespace = Namespace::new()?;
    let service = Listener::new(&namespace, &loopback()?)?;
    serve(&namespace, service.address(), &service).context("direct")?;
    for relay in ["copy", "splice", "auto"] {
        let scratch = Scratch::new()?;
        let front = Listener::new(&Here, &loopback()?)?;
        let unix = Listener::new(&Here, &Address::Unix(scratch.join("front")))?;
        let setup =
            Setup::new().args([format!("--relay={relay}")]).netns(&namespace).socket(&front).socket(&unix);
        let forwarder = setup.arg(service.address().to_string()).start()?;
        if relay == "auto" {
            let decided = |line: &str| {
                line.contains("kernel relay loaded") || line.contains("without the kernel relay")
            };
            forwarder.log().line(PATIENCE, decided)?;
        }
        serve(&Here, front.address(), &service).with_context(|| relay.to_owned())?;
        serve(&Here, unix.address(), &service).with_context(|| format!("{relay}, a unix client"))?;
        serve(&namespace, service.address(), &service).with_context(|| format!("past --relay={relay}"))?;
        forwarder.stop()?;
    }
    Ok(())
}

/// What `auto` does on a kernel with that defect, and what it says; and that who insists is warned.
#[test]
fn auto_is_splice_where_the_kernel_answers_wrongly_and_says_why() -> Result<()> {
    bro_tests::require_bpf!();
    let (service, front) = (Listener::new(&Here, &loopback()?)?, Listener::new(&Here, &loopback()?)?);
    let insists =
        Setup::new().arg("--relay=sockmap").socket(&front).arg(service.address().to_string()).start()?;
    let _programs = insists.kernel_relay()?;
    // Of all that it said: the warning comes after the line that was awaited.
    let warned = insists.stop()?.lines().iter().any(|line| line.contains("FIONREAD"));

    let front = Listener::new(&Here, &loopback()?)?;
    let setup = Setup::new().args(["--relay=auto", "--local-clients=on"]).socket(&front);
    let forwarder = setup.arg(service.address().to_string()).start()?;
    let decided =
        |line: &str| line.contains("kernel relay loaded") || line.contains("without the kernel relay");
    let line = forwarder.log().line(PATIENCE, decided)?;
    let relay = forwarder.report()?.relay;
    if warned {
        ensure!(
            line.contains("FIONREAD") && line.contains("6.12.75") && line.contains("04af4efde58a"),
            "{line}"
        );
        ensure!(line.contains("--local-clients has no effect"), "{line}");
        ensure!(relay.name == "splice", "{relay:?}");
        ensure!(relay.reason.as_ref().is_some_and(|reason| reason.contains("FIONREAD")), "{relay:?}");
        ensure!(Programs::of(forwarder.pid()).is_err(), "the programs are still loaded");
    } else {
        ensure!(relay.name == "sockmap", "{relay:?}");
    }
    forwarder.stop().map(drop)
}

/// While one connection has its lanes, sockets of others at the same port are plain TCP in every respect.
#[test]
fn strangers_at_a_hooked_port_stay_plain_tcp() -> Result<()> {
    bro_tests::require_bpf!();
    let (namespace, scratch) = (Namespace::new()?, Scratch::new()?);
    let service = Listener::new(&namespace, &loopback()?)?;
    let front = Listener::new(&Here, &loopback()?)?;
    let unix = Listener::new(&Here, &Address::Unix(scratch.join("front")))?;
    let setup = Setup::new().arg("--relay=sockmap").netns(&namespace).socket(&front).socket(&unix);
    let forwarder = setup.arg(service.address().to_string()).start()?;
    let programs = forwarder.kernel_relay()?;
    let hooked = || programs.hooked().is_ok_and(|now| now == 1);
    // The first wakes the service, before its port is watched.
    let (client, served) = (Conn::new(&Here, front.address())?, service.accept()?);
    talk(&client, &served)?;
    drop((client, served));
    let (client, served) = (Conn::new(&Here, front.address())?, service.accept()?);
    talk_until(&client, &served, hooked)?;

    serve(&namespace, service.address(), &service).context("past bro, within the namespace")?;
    serve(&Here, unix.address(), &service).context("a unix client of the same forwarder")?;
    let second = Listener::new(&Here, &loopback()?)?;
    let splicing = Setup::new().arg("--relay=splice").netns(&namespace).socket(&second);
    let splicing = splicing.arg(service.address().to_string()).start()?;
    serve(&Here, second.address(), &service).context("a second forwarder, with --relay=splice")?;
    untouched(&namespace, &service)?;
    ensure!(hooked(), "{:?} hooked", programs.hooked());
    talk(&client, &served)?;
    splicing.stop()?;
    drop((client, served));
    programs.expect_nothing_in_use()?;
    forwarder.stop().map(drop)
}

/// A stranger's socket has the options that it had.
fn untouched(namespace: &Namespace, service: &Listener) -> Result<()> {
    use nix::sys::socket::{getsockopt, sockopt};
    let (client, served) = (Conn::new(namespace, service.address())?, service.accept()?);
    let options = |conn: &Conn| -> Result<(usize, bool)> {
        Ok((getsockopt(conn, sockopt::SndBuf)?, getsockopt(conn, sockopt::TcpNoDelay)?))
    };
    let before = options(&served)?;
    talk(&client, &served)?;
    ensure!(options(&served)? == before, "{:?}, before {before:?}", options(&served));
    Ok(())
}

/// Short connections are never hooked: they cost what they cost without the kernel relay.
#[test]
fn a_connection_with_one_request_is_not_hooked() -> Result<()> {
    bro_tests::require_bpf!();
    let service = Listener::new(&Here, &loopback()?)?;
    let front = Listener::new(&Here, &loopback()?)?;
    let setup = Setup::new().args(["--relay=sockmap", "--local-clients=on"]).socket(&front);
    let forwarder = setup.arg(service.address().to_string()).start()?;
    let programs = forwarder.kernel_relay()?;
    for _ in 0..20 {
        let (client, served) = (Conn::new(&Here, front.address())?, service.accept()?);
        ask(&client, &served, REQUEST)?;
        ensure!(programs.in_use()? == [0; 3], "{:?}", programs.in_use());
    }
    forwarder.stop().map(drop)
}

/// `bro loader` has loaded for one connection's lanes: the others are spliced, and not hooked.
#[test]
fn connections_beyond_the_lanes_are_not_hooked() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let path = stage.cgroup().to_str().context("a cgroup's path")?;
    let ran = stage.loader(&[&ALICE.to_string(), "--cgroup", path, "--connections", "1"])?;
    ensure!(ran.status.success(), "{ran:?}");
    let programs = Programs::pinned(&bro_sockmap::pinned::folder(ALICE))?;
    let site = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    site.expect_lane(ALICE)?;
    // Two lanes each way round: a service's lane for each of two connections.
    let open: Vec<_> = (0..2).map(|_| site.connect(ALICE)).collect::<Result<_>>()?;
    for (nth, (client, service)) in open.iter().enumerate() {
        talk_until(client, service, || programs.hooked().is_ok_and(|now| now == nth + 1))?;
    }
    let (client, service) = site.connect(ALICE)?;
    for round in 0..ROUNDS {
        ask(&client, &service, REQUEST).with_context(|| format!("request {round}"))?;
    }
    ensure!(programs.hooked()? == 2, "{} hooked", programs.hooked()?);
    Ok(())
}

/// A forwarder that was killed under `bro loader` leaves its ports watched until the loader tidies up: nothing is hooked for that.
#[test]
fn nothing_is_hooked_after_a_forwarder_was_killed() -> Result<()> {
    bro_tests::require_bpf!();
    let stage = Stage::new()?;
    let programs = stage.load(ALICE)?;
    let Site { forwarder, front, service } = Site::start(ALICE, ALICE, &["--relay=sockmap"])?;
    let site = Site { forwarder, front, service };
    site.expect_lane(ALICE)?;
    let Site { forwarder, service, front: _front } = site;
    kill(&forwarder)?;
    ensure!(!programs.watched()?.is_empty(), "nothing is watched: nothing is shown");
    serve(&Here, service.address(), &service).context("past bro")?;
    ensure!(programs.hooked()? == 0, "{} hooked", programs.hooked()?);
    Ok(())
}

fn kill(forwarder: &Forwarder) -> Result<()> {
    forwarder.signal(Signal::SIGKILL)?;
    ensure!(process::ends(forwarder.pid(), PATIENCE)?, "it survived SIGKILL");
    Ok(())
}
