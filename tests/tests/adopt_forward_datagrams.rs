//! `bro forward --adopt=udp`: a first datagram wakes, the service has the host's socket from its bind(2) on, and what it cannot have is relayed. The harness
//! plays the OCI runtime and the service manager's store.
//!
//! Needs: a network namespace. Takes: seconds.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::adopt::{
    self, Adoption, Profile, Program, answered, datagrams, expect_answered, expect_greeted, says_hello,
};
use bro_tests::adopt_reports::{eventually, first, is_adopted, is_relayed, says};
use bro_tests::forwarder::Forwarder;
use bro_tests::netns::Namespace;
use bro_tests::peers::PATIENCE;
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_user::commands::status::{AdoptionReport, DatagramsReport, ServiceState};
use bro_user::fallback::FallbackKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where services have their datagrams from, in the namespace.
const INSIDE: &str = "127.0.0.1:5353";

/// A socket of the host's, where its services are to be, and what plays the service manager.
struct Stage {
    host: UdpSocket,
    namespace: Namespace,
    adoption: Adoption,
}

impl Stage {
    fn new() -> Result<Self> {
        Self::at("127.0.0.1:0")
    }

    fn at(address: &str) -> Result<Self> {
        let (host, passed) = datagrams(address)?;
        let adoption = Adoption::new(vec![(passed, INSIDE.into())])?;
        Ok(Self { host, namespace: Namespace::new()?, adoption })
    }

    fn forwarder(&self, options: &[&str]) -> Result<Forwarder> {
        self.forwarder_that("--adopt=udp", options)
    }

    fn forwarder_that(&self, adopts: &str, options: &[&str]) -> Result<Forwarder> {
        let forwarder = self.adoption.forwarder_that(adopts, &self.namespace)?.args(options).start()?;
        forwarder.log().line(PATIENCE, |line| line.contains("listening"))?;
        Ok(forwarder)
    }

    fn service(&self, arguments: &[&str]) -> Result<Program> {
        self.adoption.service_in(&self.namespace, Profile::Notifies, arguments)
    }
}

/// The service tells it another address: it was relayed.
fn expect_relayed(client: &UdpSocket) -> Result<()> {
    let (own, said) = (client.local_addr()?.to_string(), answered(client)?);
    ensure!(!said.is_empty() && said != own, "the client {own} was told {said:?}");
    Ok(())
}

fn has_seen(report: &AdoptionReport) -> bool {
    matches!(report, AdoptionReport::Adopted { datagrams: Some(DatagramsReport::Last { .. }), .. })
}

#[test]
fn a_first_datagram_wakes_a_service_that_receives_it_itself() -> Result<()> {
    require_namespaces!();
    for kind in ["datagrams", "datagrams-epoll"] {
        let stage = Stage::new()?;
        let forwarder = stage.forwarder(&[])?;
        ensure!(first(&forwarder.report()?) == Some(&AdoptionReport::Waiting));
        for round in 0..2 {
            let early = says_hello(&stage.host)?;
            says(&forwarder, "for its first client")?;
            let service = stage.service(&[kind, INSIDE])?;
            service.says("ready")?;
            expect_answered(&early).with_context(|| format!("{kind}, round {round}"))?;
            eventually(&forwarder, has_seen)?;
            for _ in 0..3 {
                expect_answered(&says_hello(&stage.host)?)?;
            }
            // It is awake as soon as it has the socket; whether it is found as well shows a moment later.
            let mut report = forwarder.report()?;
            process::eventually(PATIENCE, || {
                forwarder.report().is_ok_and(|now| {
                    report = now;
                    !report.state.starts_with("Starting")
                })
            });
            let said = &report.state;
            ensure!(report.activity.state == ServiceState::Awake, "{kind}: the service is not found");
            ensure!(said.starts_with("Adopted, last datagram ") && !said.contains("connection"), "{said}");
            service.end()?;
            eventually(&forwarder, |report| *report == AdoptionReport::Waiting)?;
            forwarder.log().forget();
        }
        let report = forwarder.report()?;
        let counts = &report.own.counts;
        ensure!(counts.adoptions == 2 && counts.fallbacks.is_empty(), "{counts:?}");
        ensure!(
            report.total.datagrams == bro_relay::flows::DatagramTally::default(),
            "the relay has moved {:?}",
            report.total.datagrams
        );
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn what_the_option_does_not_name_is_relayed_beside_what_is_adopted() -> Result<()> {
    require_namespaces!();
    for (adopts, streams, udp) in
        [("--adopt", true, false), ("--adopt=udp", false, true), ("--adopt=all", true, true)]
    {
        let mut stage = Stage::new()?;
        let tcp = std::net::TcpListener::bind("127.0.0.1:0")?;
        stage.adoption.insert(1, tcp.try_clone()?.into(), "127.0.0.1:8080");
        let forwarder = stage.forwarder_that(adopts, &[])?;
        let (datagram, stream) = (says_hello(&stage.host)?, adopt::client(&tcp)?);
        let services = [stage.service(&["datagrams", INSIDE])?, stage.service(&["plain", "127.0.0.1:8080"])?];
        services.iter().try_for_each(|service| service.says("ready").map(drop))?;
        let with = || adopts.to_owned();
        if udp {
            expect_answered(&datagram).with_context(with)?;
        } else {
            expect_relayed(&datagram).with_context(with)?;
        }
        if streams {
            expect_greeted(stream).with_context(with)?;
        } else {
            let own = stream.local_addr()?.to_string();
            let said = adopt::told(stream)?;
            ensure!(!said.is_empty() && said != own, "{adopts}: the client {own} was told {said:?}");
        }
        let report = forwarder.report()?;
        let told = |index: usize| report.listeners[index].adoption.is_some();
        ensure!((told(0), told(1)) == (udp, streams), "{adopts}: {:?}", report.listeners);
        drop(services);
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn a_service_that_the_socket_does_not_fit_is_relayed() -> Result<()> {
    require_namespaces!();
    let stage = Stage::at("[::1]:0")?;
    let forwarder = stage.forwarder(&[])?;
    let early = says_hello(&stage.host)?;
    let _service = stage.service(&["datagrams", "0.0.0.0:5353"])?;
    expect_relayed(&early)?;
    eventually(&forwarder, is_relayed(FallbackKind::Family))?;
    expect_relayed(&says_hello(&stage.host)?)?;
    forwarder.stop()?;

    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&[])?;
    let early = says_hello(&stage.host)?;
    let _service = stage.adoption.service_in(&stage.namespace, Profile::None, &["datagrams", INSIDE])?;
    expect_relayed(&early)?;
    eventually(&forwarder, is_relayed(FallbackKind::NoProfile))?;
    forwarder.stop()?;

    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--start-timeout=2s"])?;
    let early = says_hello(&stage.host)?;
    eventually(&forwarder, is_relayed(FallbackKind::StartTimeout))?;
    let _service = stage.service(&["datagrams", INSIDE])?;
    expect_relayed(&early)?;
    forwarder.stop().map(drop)
}

#[test]
fn one_that_is_killed_or_reloaded_is_followed_by_one_that_goes_on() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&[])?;
    let early = says_hello(&stage.host)?;
    let service = stage.service(&["datagrams-epoll", INSIDE])?;
    expect_answered(&early)?;
    eventually(&forwarder, is_adopted)?;
    forwarder.signal(Signal::SIGKILL)?;
    drop(forwarder);
    expect_answered(&says_hello(&stage.host)?)?;
    let next = stage.forwarder(&[])?;
    says(&next, "as before this process")?;
    eventually(&next, has_seen)?;
    expect_answered(&says_hello(&stage.host)?)?;
    next.log().forget();
    next.signal(Signal::SIGHUP)?;
    let main = stage.adoption.main_process(next.pid())?;
    says(&next, "as before this process")?;
    ensure!(process::ends(next.pid(), PATIENCE)?, "the predecessor stays");
    expect_answered(&says_hello(&stage.host)?)?;
    service.end()?;
    let client = says_hello(&stage.host)?;
    let _service = stage.service(&["datagrams-epoll", INSIDE])?;
    expect_answered(&client)?;
    kill(Pid::from_raw(main), Signal::SIGTERM)?;
    ensure!(process::ends(main, PATIENCE)?, "the successor stays");
    Ok(())
}

#[test]
fn a_datagram_keeps_the_service_awake_as_long_as_a_flow_would() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--exit-idle-time=500ms", "--flow-timeout=1500ms"])?;
    let early = says_hello(&stage.host)?;
    let _service = stage.service(&["datagrams", INSIDE])?;
    expect_answered(&early)?;
    eventually(&forwarder, is_adopted)?;
    let is_over = || forwarder.log().lines().iter().any(|line| line.contains("the idle time is over"));
    let started = Instant::now();
    let mut last = Instant::now();
    while started.elapsed() < Duration::from_secs(3) {
        last = Instant::now();
        expect_answered(&says_hello(&stage.host)?)?;
        ensure!(
            !process::eventually(Duration::from_millis(300), is_over),
            "idle after {:?}",
            started.elapsed()
        );
    }
    says(&forwarder, "the idle time is over")?;
    // Of the wall clock that the kernel stamps with, and the other.
    ensure!(last.elapsed() > Duration::from_millis(1900), "idle {:?} after the last one", last.elapsed());
    Ok(())
}

#[test]
fn a_service_that_takes_the_times_itself_stays_awake_and_so_does_one_that_does_not_read() -> Result<()> {
    require_namespaces!();
    for (kind, expected) in
        [("datagrams-times", DatagramsReport::Unseen), ("datagrams-asleep", DatagramsReport::None)]
    {
        let stage = Stage::new()?;
        let forwarder = stage.forwarder(&["--exit-idle-time=300ms", "--flow-timeout=300ms"])?;
        let early = says_hello(&stage.host)?;
        let _service = stage.service(&[kind, INSIDE])?;
        if kind == "datagrams-times" {
            expect_answered(&early)?;
        }
        eventually(
            &forwarder,
            |report| matches!(report, AdoptionReport::Adopted { datagrams: Some(said), .. } if *said == expected),
        )?;
        let is_over = || forwarder.log().lines().iter().any(|line| line.contains("the idle time is over"));
        ensure!(!process::eventually(Duration::from_millis(1700), is_over), "{kind}: idle");
        forwarder.stop()?;
    }
    Ok(())
}
