//! Sides that vanish: a link that goes down says nothing to either side. And sides that are there and take their time, which is no reason to
//! end a connection.
//!
//! Needs: a network namespace; root and ip for two tests. Takes: seconds.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::Namespace;
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Conn, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::street::{Street, inside};
use bro_tests::tier::{Need, met};
use nix::sys::socket::{setsockopt, sockopt};

/// How long nothing is acknowledged in these tests.
const LIMIT: Duration = Duration::from_secs(2);

const PATTERN: Pattern = Pattern(17);

/// Cables need root.
const NEEDS: [Need; 2] = [Need::Root, Need::Program("ip", "iproute2")];

fn cut(namespace: &Namespace) -> Result<()> {
    inside(namespace, &["ip", "link", "set", "eth0", "down"]).map(drop)
}

/// A client behind a cable, and a service in a container.
struct Far {
    there: Namespace,
    forwarder: Forwarder,
    _client: Conn,
    service: Conn,
    _street: Street,
    _inside: Namespace,
    _front: Listener,
}

impl Far {
    fn connected(options: &[&str]) -> Result<Self> {
        let street = Street::new(&[])?;
        let there = street.neighbour(1)?;
        let front = street.front("10.66.1.1:0")?;
        let inside = Namespace::new()?;
        let listening = Listener::new(&inside, &bro_tests::peers::Address::Tcp("127.0.0.1:0".parse()?))?;
        let setup = Setup::new().socket(&front).netns(&inside).args(options.iter().copied());
        let forwarder = setup.arg(listening.address().to_string()).start()?;
        let client = Conn::new(&there, front.address())?;
        let service = listening.accept()?;
        expect_relayed(&client, &service)?;
        Ok(Self {
            there,
            forwarder,
            _client: client,
            service,
            _street: street,
            _inside: inside,
            _front: front,
        })
    }
}

#[test]
fn a_client_that_vanishes_in_the_middle_of_an_answer_is_let_go() -> Result<()> {
    if !met("a_client_that_vanishes_in_the_middle_of_an_answer_is_let_go", &NEEDS) {
        return Ok(());
    }
    for relay in ["--relay=splice", "--relay=copy"] {
        // A whole answer, which is only in the kernel's buffer; more than fits; and one with its end.
        for answer in [20_000, 16 << 20, 0] {
            let far = Far::connected(&[relay, "--user-timeout=2s"])?;
            cut(&far.there)?;
            let began = Instant::now();
            if answer == 0 {
                far.service.close_writing()?;
            } else {
                far.service.pour_until_stuck(PATTERN, answer, Duration::from_millis(300)).ok();
            }
            let closing = far.forwarder.closing().with_context(|| format!("{relay} {answer}"))?;
            ensure!(closing.reason == "client-vanished", "{closing:?}");
            let span = began.elapsed();
            ensure!(span > LIMIT && span < LIMIT * 4, "{relay} {answer}: ended after {span:?}");
            far.service.expect_abort()?;
            far.forwarder.stop()?;
        }
    }
    Ok(())
}

/// Where nothing was sent to it there is nothing to acknowledge; then keepalive finds out.
#[test]
fn a_client_that_vanishes_idle_is_let_go() -> Result<()> {
    if !met("a_client_that_vanishes_idle_is_let_go", &NEEDS) {
        return Ok(());
    }
    let far = Far::connected(&[
        "--keepalive-time=1s",
        "--keepalive-interval=1s",
        "--keepalive-probes=2",
        "--user-timeout=2s",
    ])?;
    cut(&far.there)?;
    let closing = far.forwarder.closing()?;
    // Which of both ways is first does not matter.
    ensure!(["client-reset", "client-vanished"].contains(&closing.reason.as_str()), "{closing:?}");
    far.service.expect_abort()?;
    far.forwarder.stop().map(drop)
}

#[test]
fn a_service_that_vanishes_under_a_request_is_let_go() -> Result<()> {
    if !met("a_service_that_vanishes_under_a_request_is_let_go", &NEEDS) {
        return Ok(());
    }
    let street = Street::new(&[])?;
    let there = street.neighbour(1)?;
    let listening = Listener::new(&there, &bro_tests::peers::Address::Tcp("10.66.1.2:0".parse()?))?;
    let front = street.front("10.66.1.1:0")?;
    let setup = Setup::new().socket(&front).netns(&street.namespace).arg("--user-timeout=2s");
    let forwarder = setup.arg(listening.address().to_string()).start()?;
    let client = Conn::new(&street.namespace, front.address())?;
    let service = listening.accept()?;
    expect_relayed(&client, &service)?;
    cut(&there)?;
    client.send(b"a request")?;
    let closing = forwarder.closing()?;
    ensure!(closing.reason == "service-vanished", "{closing:?}");
    client.expect_abort()?;
    forwarder.stop().map(drop)
}

/// Its window is closed for many times the limit, and it answers each probe of that: it is there.
#[test]
fn a_side_that_takes_its_time_is_not_let_go() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--user-timeout=1s"])?;
    let idle = (scene.client()?, service.accept()?);
    expect_relayed(&idle.0, &idle.1)?;
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    // Both ways, and one of them ends behind what is not read.
    let down = served.pour_until_stuck(PATTERN, 1 << 30, Duration::from_millis(300))?;
    let up = client.pour_until_stuck(PATTERN, 1 << 30, Duration::from_millis(300))?;
    served.close_writing()?;
    let (began, spun) = (Instant::now(), Duration::from_millis(500));
    while began.elapsed() < Duration::from_secs(12) {
        forwarder.expect_no_spin(spun)?;
        ensure!(
            !forwarder.log().lines().iter().any(|line| line.contains("connection closed")),
            "it was let go"
        );
    }
    let (got, end) = client.drink_to_end(PATTERN, 0)?;
    ensure!((got, end) == (down, bro_tests::peers::End::Eof), "{got} of {down}: {end:?}");
    served.drink(PATTERN, 0, up)?;
    expect_relayed(&idle.0, &idle.1).context("the idle one")?;
    drop((client, served, idle));
    forwarder.stop().map(drop)
}

/// Why `--user-timeout` is not the socket option: that ends the connection of a reader that is there.
#[test]
fn the_kernels_own_timeout_ends_a_reader_that_takes_its_time() -> Result<()> {
    require_namespaces!();
    let namespace = Namespace::new()?;
    let listening = Listener::new(&namespace, &bro_tests::peers::Address::Tcp("127.0.0.1:0".parse()?))?;
    let client = Conn::new(&namespace, listening.address())?;
    let sender = listening.accept()?;
    setsockopt(&sender.as_fd(), sockopt::TcpUserTimeout, &1000)?;
    sender.pour_until_stuck(PATTERN, 1 << 30, Duration::from_millis(300))?;
    let ended =
        || sender.wait(nix::poll::PollFlags::POLLERR, Duration::ZERO).is_ok_and(|seen| !seen.is_empty());
    ensure!(
        process::eventually(PATIENCE, ended),
        "it is not ended: --user-timeout could be TCP_USER_TIMEOUT"
    );
    drop(client);
    Ok(())
}
