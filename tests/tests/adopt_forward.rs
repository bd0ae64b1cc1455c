//! `bro forward --adopt`: a first client wakes, the service has the host's listener from then on, and what it cannot have is relayed. The harness plays
//! the OCI runtime and the service manager's store.
//!
//! Needs: a network namespace. Takes: seconds.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::adopt::{self, Adoption, Profile, Program, expect_greeted, told};
use bro_tests::adopt_reports::{eventually, first, is_adopted, is_relayed, says};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::Namespace;
use bro_tests::peers::{Address, Conn, End, Here, PATIENCE};
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_user::commands::status::{AdoptionReport, ServiceState};
use bro_user::fallback::FallbackKind;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where services listen, in the namespace.
const INSIDE: &str = "127.0.0.1:8080";

/// How long a supervisor inside the container has for starting the service again (`GAP` of the agent).
const GAP: Duration = Duration::from_secs(10);

/// A listener as systemd passes it: blocking.
fn listener(address: &str) -> Result<(TcpListener, OwnedFd)> {
    let listener = TcpListener::bind(address)?;
    let passed = listener.try_clone()?.into();
    Ok((listener, passed))
}

/// A host's listener, where its services are to be, and what plays the service manager.
struct Stage {
    host: TcpListener,
    namespace: Namespace,
    adoption: Adoption,
}

impl Stage {
    fn new() -> Result<Self> {
        Self::at("127.0.0.1:0")
    }

    fn at(address: &str) -> Result<Self> {
        let (host, passed) = listener(address)?;
        let adoption = Adoption::new(vec![(passed, INSIDE.into())])?;
        Ok(Self { host, namespace: Namespace::new()?, adoption })
    }

    fn setup(&self) -> Result<Setup> {
        self.adoption.forwarder(&self.namespace)
    }

    fn forwarder(&self, options: &[&str]) -> Result<Forwarder> {
        let forwarder = self.setup()?.args(options).start()?;
        forwarder.log().line(PATIENCE, |line| line.contains("listening"))?;
        Ok(forwarder)
    }

    fn service(&self, profile: Profile, arguments: &[&str]) -> Result<Program> {
        self.adoption.service_in(&self.namespace, profile, arguments)
    }

    fn client(&self) -> Result<TcpStream> {
        adopt::client(&self.host)
    }
}

/// The service tells it another address: it was relayed.
fn expect_relayed(client: TcpStream) -> Result<()> {
    let own = client.local_addr()?.to_string();
    let said = told(client)?;
    ensure!(!said.is_empty() && said != own, "the client {own} was told {said:?}");
    Ok(())
}

/// A client that comes now, whom the kernel may tell of it before it is told of its connection.
fn expect_reset(stage: &Stage) -> Result<()> {
    let ended = TcpStream::connect(stage.host.local_addr()?).and_then(|mut client| {
        client.set_read_timeout(Some(PATIENCE))?;
        client.read(&mut [0])
    });
    let is_reset = ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
    ensure!(is_reset, "not reset: {ended:?}");
    Ok(())
}

fn is_waiting(report: &AdoptionReport) -> bool {
    *report == AdoptionReport::Waiting
}

#[test]
fn a_first_client_wakes_a_service_that_accepts_it_itself() -> Result<()> {
    require_namespaces!();
    for kind in ["plain", "epoll", "epoll-edge"] {
        let stage = Stage::new()?;
        let forwarder = stage.forwarder(&[])?;
        ensure!(first(&forwarder.report()?).is_some_and(is_waiting));
        for round in 0..2 {
            let early = stage.client()?;
            says(&forwarder, "for its first client")?;
            let service = stage.service(Profile::Notifies, &[kind, INSIDE])?;
            service.says("ready")?;
            expect_greeted(early).with_context(|| format!("{kind}, round {round}"))?;
            eventually(&forwarder, is_adopted)?;
            for _ in 0..3 {
                expect_greeted(stage.client()?)?;
            }
            // Or the next client finds a wake that goes on, of which no line is written.
            let found =
                || forwarder.report().is_ok_and(|report| report.activity.state == ServiceState::Awake);
            ensure!(process::eventually(PATIENCE, found), "{kind}: the service is not found");
            service.end()?;
            eventually(&forwarder, is_waiting)?;
            forwarder.log().forget();
        }
        let report = forwarder.report()?;
        ensure!(
            report.own.counts.adoptions == 2 && report.own.counts.fallbacks.is_empty(),
            "{:?}",
            report.own
        );
        ensure!(report.total.accepted == 0, "the relay has accepted {}", report.total.accepted);
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn a_service_that_the_listener_does_not_fit_is_relayed_until_its_end() -> Result<()> {
    require_namespaces!();
    let stage = Stage::at("[::1]:0")?;
    let forwarder = stage.forwarder(&[])?;
    let early = stage.client()?;
    let service = stage.service(Profile::Notifies, &["plain", "0.0.0.0:8080"])?;
    expect_relayed(early)?;
    let report = eventually(&forwarder, is_relayed(FallbackKind::Family))?;
    ensure!(report.own.counts.fallbacks.get(&FallbackKind::Family) == Some(&1), "{:?}", report.own);
    expect_relayed(stage.client()?)?;
    service.end()?;
    // The namespace stays, so that the relay's next client finds out.
    forwarder.stop().map(drop)
}

#[test]
fn a_container_without_the_profile_is_relayed() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&[])?;
    let early = stage.client()?;
    let _service = stage.service(Profile::None, &["plain", INSIDE])?;
    expect_relayed(early)?;
    eventually(&forwarder, is_relayed(FallbackKind::NoProfile))?;
    says(&forwarder, "no seccomp profile")?;
    expect_relayed(stage.client()?)?;
    forwarder.stop().map(drop)
}

#[test]
fn a_service_that_listens_too_late_is_relayed() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--start-timeout=2s"])?;
    let early = stage.client()?;
    eventually(&forwarder, is_relayed(FallbackKind::StartTimeout))?;
    let _service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_relayed(early)?;
    expect_relayed(stage.client()?)?;
    forwarder.stop().map(drop)
}

#[test]
fn a_forwarder_that_is_killed_is_followed_by_one_that_goes_on() -> Result<()> {
    require_namespaces!();
    for kind in ["plain", "epoll"] {
        let stage = Stage::new()?;
        let forwarder = stage.forwarder(&[])?;
        let early = stage.client()?;
        let service = stage.service(Profile::Notifies, &[kind, INSIDE])?;
        expect_greeted(early)?;
        eventually(&forwarder, is_adopted)?;
        forwarder.signal(Signal::SIGKILL)?;
        drop(forwarder);
        expect_greeted(stage.client()?)?;
        let stored = stage.adoption.stored();
        ensure!(stored.iter().any(|name| name.starts_with("adopt-container-")), "{stored:?}");
        let next = stage.forwarder(&[])?;
        says(&next, "as before this process")?;
        eventually(&next, is_adopted)?;
        // Which is the service's, and not systemd's.
        let flags = OFlag::from_bits_retain(fcntl(&stage.host, FcntlArg::F_GETFL)?);
        ensure!(flags.contains(OFlag::O_NONBLOCK) == (kind == "epoll"), "{kind}: {flags:?}");
        expect_greeted(stage.client()?)?;
        ensure!(next.report()?.total.accepted == 0, "the relay has accepted");
        service.end()?;
        eventually(&next, is_waiting)?;
        let client = stage.client()?;
        let _service = stage.service(Profile::Notifies, &[kind, INSIDE])?;
        expect_greeted(client)?;
        next.stop()?;
    }
    Ok(())
}

/// A port more, for the same place in the container, while the service has the first one: it makes no listen(2) for that, and is found by the socket
/// that it had made itself.
#[test]
fn a_listener_that_comes_later_for_the_same_target_is_relayed() -> Result<()> {
    require_namespaces!();
    for number in [0, 1] {
        let mut stage = Stage::new()?;
        let forwarder = stage.forwarder(&[])?;
        let early = stage.client()?;
        let service = stage.service(Profile::Notifies, &["epoll", INSIDE])?;
        expect_greeted(early)?;
        eventually(&forwarder, is_adopted)?;
        forwarder.signal(Signal::SIGKILL)?;
        drop(forwarder);
        let (more, passed) = listener("127.0.0.1:0")?;
        stage.adoption.insert(number, passed, INSIDE);
        let next = stage.forwarder(&[])?;
        says(&next, "as before this process")?;
        let later = || -> Result<TcpStream> {
            let client = TcpStream::connect(more.local_addr()?)?;
            client.set_read_timeout(Some(PATIENCE))?;
            Ok(client)
        };
        expect_relayed(later()?).with_context(|| format!("the new one is number {number}"))?;
        expect_greeted(stage.client()?)?;
        next.signal(Signal::SIGHUP)?;
        let main = stage.adoption.main_process(next.pid())?;
        ensure!(process::ends(next.pid(), PATIENCE)?, "the predecessor stays");
        expect_relayed(later()?)
            .with_context(|| format!("after a reload; the new one is number {number}"))?;
        expect_greeted(stage.client()?)?;
        service.end()?;
        kill(Pid::from_raw(main), Signal::SIGTERM)?;
        ensure!(process::ends(main, PATIENCE)?, "the successor stays");
    }
    Ok(())
}

#[test]
fn a_successor_answers_for_the_container() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&[])?;
    let early = stage.client()?;
    let service = stage.service(Profile::Notifies, &["epoll", INSIDE])?;
    expect_greeted(early)?;
    eventually(&forwarder, is_adopted)?;
    forwarder.signal(Signal::SIGHUP)?;
    let main = stage.adoption.main_process(forwarder.pid())?;
    says(&forwarder, "as before this process")?;
    expect_greeted(stage.client()?)?;
    ensure!(process::ends(forwarder.pid(), PATIENCE)?, "the predecessor stays");
    ensure!(first(&forwarder.report()?).is_some_and(is_adopted));
    service.end()?;
    eventually(&forwarder, is_waiting)?;
    let client = stage.client()?;
    let _service = stage.service(Profile::Notifies, &["epoll", INSIDE])?;
    expect_greeted(client)?;
    kill(Pid::from_raw(main), Signal::SIGTERM)?;
    ensure!(process::ends(main, PATIENCE)?, "the successor stays");
    Ok(())
}

#[test]
fn it_stays_while_a_container_has_its_socket_and_leaves_when_idle() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let mut forwarder = stage.forwarder(&["--exit-idle-time=500ms"])?;
    let early = stage.client()?;
    let service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_greeted(early)?;
    says(&forwarder, "there is no --unit to stop")?;
    ensure!(forwarder.is_running()?, "it left a container behind");
    service.end()?;
    forwarder.expect_exit(0)
}

/// Nothing has accepted it.
#[test]
fn a_client_that_waits_for_a_slow_service_is_not_left_when_the_idle_time_is_over() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let mut forwarder = stage.forwarder(&["--exit-idle-time=200ms"])?;
    let early = stage.client()?;
    says(&forwarder, "for its first client")?;
    ensure!(forwarder.wait(Duration::from_millis(900))?.is_none(), "it has left a client behind");
    let _service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_greeted(early)?;
    says(&forwarder, "the idle time is over")?;
    Ok(())
}

#[test]
fn a_client_of_the_service_counts_although_nothing_of_it_passes() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--exit-idle-time=700ms"])?;
    let mut client = stage.client()?;
    let mut service = stage.service(Profile::Notifies, &["slow", INSIDE])?;
    service.says("accepted")?;
    let connected =
        |report: &AdoptionReport| matches!(report, AdoptionReport::Adopted { connections: 1, .. });
    eventually(&forwarder, connected)?;
    // The service may have the socket before it is found to be ready.
    let said = || forwarder.report().is_ok_and(|report| report.state == "Adopted, 1 connection now");
    ensure!(process::eventually(PATIENCE, said), "{}", forwarder.report()?.state);
    let idle = || forwarder.log().lines().iter().any(|line| line.contains("the idle time is over"));
    ensure!(!process::eventually(Duration::from_secs(2), idle), "the client did not count");
    service.input.as_mut().context("an input")?.write_all(b"now\n")?;
    let mut said = String::new();
    client.read_to_string(&mut said)?;
    ensure!(said == client.local_addr()?.to_string(), "{said}");
    drop(client);
    says(&forwarder, "the idle time is over")?;
    Ok(())
}

#[test]
fn clients_that_come_and_go_between_two_looks_keep_a_service_awake() -> Result<()> {
    require_namespaces!();
    // It is looked at once a second.
    const IDLE_TIME: Duration = Duration::from_secs(1);
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--exit-idle-time=1s"])?;
    let early = stage.client()?;
    let _service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_greeted(early)?;
    eventually(&forwarder, is_adopted)?;
    let is_over = || forwarder.log().lines().iter().any(|line| line.contains("the idle time is over"));
    let started = Instant::now();
    while started.elapsed() < 4 * IDLE_TIME {
        expect_greeted(stage.client()?)?;
        let over = process::eventually(Duration::from_millis(300), is_over);
        ensure!(!over, "the idle time was over after {:?} of short clients", started.elapsed());
    }
    says(&forwarder, "the idle time is over")?;
    Ok(())
}

/// Is it said that the idle time is over? The forwarder stays, for it has not started the service.
fn is_over(forwarder: &Forwarder) -> bool {
    forwarder.log().lines().iter().any(|line| line.contains("the idle time is over"))
}

/// A client that the service serves, which is then left alone.
fn served(stage: &Stage, options: &[&str]) -> Result<(Forwarder, TcpStream, Program)> {
    let forwarder = stage.forwarder(options)?;
    let client = stage.client()?;
    let service = stage.service(Profile::Notifies, &["slow", INSIDE])?;
    service.says("accepted")?;
    eventually(&forwarder, is_adopted)?;
    Ok((forwarder, client, service))
}

#[test]
fn bytes_keep_an_adopted_service_awake_and_connections_do_not() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let (forwarder, mut client, _service) = served(&stage, &["--idle-by=bytes", "--exit-idle-time=1s"])?;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        client.write_all(b".")?;
        let over = process::eventually(Duration::from_millis(300), || is_over(&forwarder));
        ensure!(!over, "bytes did not count, after {:?}", began.elapsed());
    }
    let silent = Instant::now();
    says(&forwarder, "the idle time is over")?;
    ensure!(silent.elapsed() > Duration::from_millis(600), "after {:?}", silent.elapsed());
    // It is there all the same in a report.
    let report = forwarder.report()?;
    ensure!(matches!(first(&report), Some(AdoptionReport::Adopted { connections: 1, .. })), "{report:?}");
    ensure!(report.connections() == 1 && report.total.open == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_heartbeat_of_an_adopted_service_keeps_nothing_awake() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let (forwarder, mut client, _service) =
        served(&stage, &["--idle-below=1K/1s", "--exit-idle-time=600ms"])?;
    // More than that, and then less.
    for _ in 0..10 {
        client.write_all(&[0; 1024])?;
        let over = process::eventually(Duration::from_millis(200), || is_over(&forwarder));
        ensure!(!over, "so many bytes did not count");
    }
    let began = Instant::now();
    while !is_over(&forwarder) {
        ensure!(began.elapsed() < PATIENCE, "a heartbeat keeps it awake");
        client.write_all(b"beat")?;
        process::eventually(Duration::from_millis(100), || is_over(&forwarder));
    }
    Ok(())
}

#[test]
fn ignored_clients_of_an_adopted_service_keep_nothing_awake_however_they_come() -> Result<()> {
    require_namespaces!();
    let options = ["--idle-ignore=10.0.0.0/8,127.0.0.1", "--exit-idle-time=1s"];
    let stage = Stage::new()?;
    let (forwarder, _client, _service) = served(&stage, &options)?;
    says(&forwarder, "the idle time is over")?;
    let report = forwarder.report()?;
    ensure!(report.connections() == 1, "it is not seen at all: {report:?}");
    // Checks that come and go.
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&options)?;
    let check = stage.client()?;
    let _service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_greeted(check)?;
    eventually(&forwarder, is_adopted)?;
    let began = Instant::now();
    while !is_over(&forwarder) {
        ensure!(began.elapsed() < PATIENCE, "checks keep it awake");
        expect_greeted(stage.client()?)?;
        process::eventually(Duration::from_millis(100), || is_over(&forwarder));
    }
    Ok(())
}

/// As a health check is, and a command that is executed in the container.
#[test]
fn clients_inside_the_container_keep_nothing_awake_and_are_not_counted() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--exit-idle-time=1s"])?;
    let early = stage.client()?;
    let _service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_greeted(early)?;
    eventually(&forwarder, is_adopted)?;
    let began = Instant::now();
    while !is_over(&forwarder) {
        ensure!(began.elapsed() < PATIENCE, "checks keep it awake");
        let check = Conn::bound_to(&stage.namespace, &Address::Tcp(INSIDE.parse()?), None)?;
        ensure!(!check.read_to_end()?.0.is_empty(), "a client inside was told nothing");
        process::eventually(Duration::from_millis(100), || is_over(&forwarder));
    }
    // Nor one that stays.
    let stage = Stage::new()?;
    let (forwarder, client, mut service) = served(&stage, &["--exit-idle-time=1s"])?;
    service.input.as_mut().context("an input")?.write_all(b"now\n")?;
    told(client)?;
    service.end()?;
    eventually(&forwarder, is_waiting)?;
    let service = stage.service(Profile::Notifies, &["slow", INSIDE])?;
    eventually(&forwarder, is_adopted)?;
    let _check = Conn::bound_to(&stage.namespace, &Address::Tcp(INSIDE.parse()?), None)?;
    service.says("accepted")?;
    let report = forwarder.report()?;
    ensure!(report.connections() == 0, "{report:?}");
    says(&forwarder, "the idle time is over").map(drop)
}

/// Says something, and is told its address as the service sees it.
fn speak(mut client: TcpStream) -> Result<(String, String)> {
    client.write_all(b"?")?;
    Ok((client.local_addr()?.to_string(), told(client)?))
}

#[test]
fn a_first_byte_wakes_and_those_who_come_later_are_the_services() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--wake-on=data"])?;
    let wakes = || forwarder.log().lines().iter().any(|line| line.contains("for its first client"));
    for round in 1..=2 {
        let silent = stage.client()?;
        ensure!(!process::eventually(Duration::from_millis(300), wakes), "a silent client has woken it");
        let mut talks = stage.client()?;
        talks.write_all(b"?")?;
        says(&forwarder, "for its first client")?;
        // From now on nothing is accepted by the forwarder.
        let accepted = forwarder.report()?.total.accepted;
        let later = stage.client()?;
        let service = stage.service(Profile::Notifies, &["asked", INSIDE])?;
        service.says("ready")?;
        let (own, said) = (talks.local_addr()?.to_string(), told(talks)?);
        ensure!(!said.is_empty() && said != own, "round {round}: {own} was told {said:?}");
        let (own, said) = speak(later)?;
        ensure!(own == said, "round {round}: one that came later, {own}, was told {said:?}");
        let (own, said) = speak(silent)?;
        ensure!(!said.is_empty() && own != said, "round {round}: the silent one, {own}, was told {said:?}");
        eventually(&forwarder, is_adopted)?;
        let (own, said) = speak(stage.client()?)?;
        ensure!(own == said, "round {round}: {own} was told {said:?}");
        ensure!(accepted == 2 * round && forwarder.report()?.total.accepted == accepted, "{accepted}");
        let found = || forwarder.report().is_ok_and(|report| report.activity.state == ServiceState::Awake);
        ensure!(process::eventually(PATIENCE, found), "the service is not found");
        service.end()?;
        eventually(&forwarder, is_waiting)?;
        forwarder.log().forget();
    }
    forwarder.stop().map(drop)
}

#[test]
fn whom_it_does_not_wake_for_is_reset_while_it_sleeps_and_served_while_it_is_awake() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&["--wake-ignore=127.0.0.2"])?;
    let scanner = || -> Result<String> {
        let scanner =
            Conn::bound_to(&Here, &Address::Tcp(stage.host.local_addr()?), Some("127.0.0.2".parse()?))?;
        let (said, end) = scanner.read_to_end()?;
        Ok(if end == End::Eof { String::from_utf8(said)? } else { "a reset".into() })
    };
    for _ in 0..3 {
        ensure!(scanner()? == "a reset", "a scanner waits, or is served");
    }
    ensure!(!forwarder.log().lines().iter().any(|line| line.contains("first client")), "it was woken");
    let early = stage.client()?;
    says(&forwarder, "for its first client")?;
    let _service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_relayed(early)?;
    eventually(&forwarder, is_adopted)?;
    ensure!(scanner()?.starts_with("127.0.0.2:"), "it is not served");
    expect_greeted(stage.client()?)?;
    forwarder.stop().map(drop)
}

/// Its listen(2) waits until the forwarder accepts no more.
#[test]
fn a_service_that_starts_by_itself_gets_a_listener_at_which_clients_are_sifted() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    // The silent one may have been led to a service that ended at once, and is waited for at the end.
    let forwarder = stage.forwarder(&["--wake-on=data", "--drain-timeout=1s"])?;
    let silent = stage.client()?;
    let accepted = || forwarder.report().is_ok_and(|report| report.total.accepted == 1);
    ensure!(process::eventually(PATIENCE, accepted), "the forwarder does not sift");
    for kind in ["asked", "epoll"] {
        let service = stage.service(Profile::Notifies, &[kind, INSIDE])?;
        service.says("ready")?;
        eventually(&forwarder, is_adopted)?;
        if kind == "asked" {
            let (own, said) = speak(stage.client()?)?;
            ensure!(own == said, "{own} was told {said:?}");
        } else {
            expect_greeted(stage.client()?)?;
        }
        service.end()?;
        eventually(&forwarder, is_waiting)?;
    }
    ensure!(forwarder.report()?.own.counts.fallbacks.is_empty(), "something was relayed");
    drop(silent);
    // And sifts again.
    let _silent = stage.client()?;
    // The silent one was led to the service, and may be accepted once more where that has ended before it did.
    let accepted = || forwarder.report().is_ok_and(|report| report.total.accepted >= 2);
    ensure!(process::eventually(PATIENCE, accepted), "the forwarder does not sift again");
    forwarder.stop().map(drop)
}

/// Without adoption they would be refused.
#[test]
fn clients_of_a_service_that_has_closed_its_listener_are_reset_until_it_listens_again() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&[])?;
    let early = stage.client()?;
    let mut service = stage.service(Profile::Notifies, &["closes", INSIDE])?;
    service.says("ready")?;
    eventually(&forwarder, is_adopted)?;
    let mut input = service.input.take().context("an input")?;
    let mut tell = |reader: &Program, answer: &str| -> Result<()> {
        input.write_all(b"now\n")?;
        reader.says(answer).map(drop)
    };
    let is_given_up = |within: Duration| {
        process::eventually(within, || {
            forwarder.report().is_ok_and(|report| first(&report) == Some(&AdoptionReport::Closed))
        })
    };
    // It is slow to accept, and is not taken for one that has closed it.
    let slow = is_given_up(GAP + Duration::from_secs(3));
    ensure!(!slow, "a service that has a listener and does not accept is taken for one that has closed it");
    tell(&service, "closed")?;
    expect_greeted(early)?;
    // Nor is one that is being started again.
    let client = stage.client()?;
    ensure!(!is_given_up(GAP / 2), "the service has no time to listen again");
    tell(&service, "ready")?;
    eventually(&forwarder, is_adopted)?;
    tell(&service, "closed")?;
    expect_greeted(client)?;
    expect_reset(&stage)?;
    eventually(&forwarder, |report| *report == AdoptionReport::Closed)?;
    // At once, by now.
    for _ in 0..3 {
        expect_reset(&stage)?;
    }
    tell(&service, "ready")?;
    eventually(&forwarder, is_adopted)?;
    let client = stage.client()?;
    tell(&service, "closed")?;
    expect_greeted(client)?;
    ensure!(forwarder.report()?.total.accepted == 0, "the relay has accepted");
    forwarder.stop().map(drop)
}

/// And where it ends meanwhile, the next client wakes it.
#[test]
fn a_service_that_has_closed_its_listener_and_ends_is_woken_again() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&[])?;
    let early = stage.client()?;
    let mut service = stage.service(Profile::Notifies, &["closes", INSIDE])?;
    service.says("ready")?;
    eventually(&forwarder, is_adopted)?;
    service.input.as_mut().context("an input")?.write_all(b"now\n")?;
    service.says("closed")?;
    expect_greeted(early)?;
    expect_reset(&stage)?;
    service.end()?;
    eventually(&forwarder, is_waiting)?;
    let client = stage.client()?;
    let _next = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_greeted(client)?;
    forwarder.stop().map(drop)
}

/// Before its first client is touched. Who listens it is not told either, and finds out by connecting.
#[test]
fn without_the_kernels_tables_it_is_relayed() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let setup = stage.setup()?.launch(format!("netlink-without={}", nix::libc::NETLINK_SOCK_DIAG));
    let forwarder = setup.arg("--exit-idle-time=1s").start()?;
    eventually(&forwarder, is_relayed(FallbackKind::Uncountable))?;
    let early = stage.client()?;
    let service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_relayed(early)?;
    expect_relayed(stage.client()?)?;
    says(&forwarder, "this kernel does not say who listens")?;
    // With its container the reason does not go.
    service.end()?;
    eventually(&forwarder, is_relayed(FallbackKind::Uncountable))?;
    says(&forwarder, "exiting").map(drop)
}

/// Here is no systemd that could start its socket unit anew; with one that is tried on a host.
#[test]
fn a_damaged_listener_is_said_with_why_it_stays_so() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    let forwarder = stage.forwarder(&[])?;
    let early = stage.client()?;
    let service = stage.service(Profile::Notifies, &["plain", INSIDE])?;
    expect_greeted(early)?;
    eventually(&forwarder, is_adopted)?;
    nix::sys::socket::shutdown(stage.host.as_raw_fd(), nix::sys::socket::Shutdown::Both)?;
    service.end()?;
    let is_said = |report: &AdoptionReport| match report {
        AdoptionReport::Broken { why } => {
            why.contains("it does not listen any more, and its socket unit cannot")
        }
        _ => false,
    };
    eventually(&forwarder, is_said)?;
    says(&forwarder, "nothing can be accepted at the socket")?;
    says(&forwarder, "the damaged socket cannot be started anew from here")?;
    forwarder.stop().map(drop)
}

#[test]
fn what_does_not_go_together_is_said_at_once() -> Result<()> {
    require_namespaces!();
    let stage = Stage::new()?;
    for (option, expected) in [
        ("--accept-proxy", "--accept-proxy does not go with --adopt"),
        ("--connections-per-source=3", "--connections-per-source does not go with --adopt"),
        ("--proxy-protocol=v2", "--proxy-protocol does not go with --adopt"),
        ("--ready=connect", "--ready other than auto or listen does not go with --adopt"),
        ("--target=socket-1=localhost:80", "matches no socket"),
    ] {
        let mut forwarder = stage.setup()?.arg(option).start()?;
        forwarder.expect_exit(2).with_context(|| option.to_owned())?;
        let said = forwarder.log().lines().join("\n");
        ensure!(said.contains(expected), "{option}: {said}");
    }
    let (_host, passed) = listener("127.0.0.1:0")?;
    let setup = Setup::new().netns(&stage.namespace).descriptor(passed, "seccomp").arg(INSIDE);
    let mut forwarder = setup.start()?;
    forwarder.expect_exit(2)?;
    let said = forwarder.log().lines().join("\n");
    ensure!(said.contains("the passed socket “seccomp” is for --adopt"), "{said}");
    let (_host, passed) = listener("127.0.0.1:0")?;
    let setup = Setup::new().netns(&stage.namespace).descriptor(passed, "web").args(["--adopt", INSIDE]);
    let mut forwarder = setup.start()?;
    forwarder.expect_exit(2)?;
    let said = forwarder.log().lines().join("\n");
    ensure!(said.contains("--adopt needs a passed socket with FileDescriptorName=seccomp"), "{said}");
    Ok(())
}
