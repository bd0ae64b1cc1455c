//! What adoption costs: a service in time, by each call that is notified; and bro in memory, which connections that a service accepts itself are to take
//! none of. The figures are printed.
//!
//! Needs: a network namespace. Takes: 10 s.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::adopt::{Adoption, Profile, Program, client, kernel};
use bro_tests::adopt_reports::eventually;
use bro_tests::bro;
use bro_tests::forwarder::Forwarder;
use bro_tests::netns::Namespace;
use bro_tests::peers::PATIENCE;
use bro_tests::require_namespaces;
use bro_user::commands::status::AdoptionReport;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Where services listen, the first of as many ports as there are listeners.
const INSIDE: u16 = 8080;

/// Other suites run beside this one.
const SLACK: u32 = 5;

/// The agent of a debug build takes longer for all that it does.
const DEBUG: u32 = 5;

/// Listeners of the host's, and who stands for the service manager.
fn stage(listeners: u16) -> Result<(Vec<TcpListener>, Adoption)> {
    let hosts: Vec<TcpListener> =
        (0..listeners).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    let passed = hosts.iter().zip(INSIDE..).map(|(host, port)| {
        let passed: OwnedFd = host.try_clone()?.into();
        Ok((passed, format!("127.0.0.1:{port}")))
    });
    let adoption = Adoption::new(passed.collect::<Result<_>>()?)?;
    Ok((hosts, adoption))
}

fn forwarder(adoption: &Adoption, namespace: &Namespace) -> Result<Forwarder> {
    // Shorter than by default, and so it looks more often.
    let forwarder = adoption.forwarder(namespace)?.arg("--exit-idle-time=16s").start()?;
    forwarder.log().line(PATIENCE, |line| line.contains("listening"))?;
    Ok(forwarder)
}

/// How long calls of a service took.
#[derive(Debug)]
struct Took {
    bind: Vec<Duration>,
    listen: Vec<Duration>,
    shutdown: Vec<Duration>,
}

impl Took {
    fn by(adoption: &Adoption, namespace: &Namespace, profile: Profile) -> Result<Self> {
        let service = adoption.service_in(namespace, profile, &["costs", &format!("127.0.0.1:{INSIDE}")])?;
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line| line != "done") {
            lines.push(service.line(|_| true)?);
        }
        service.end()?;
        let of = |call: &str| -> Result<Vec<Duration>> {
            let spans = lines.iter().filter_map(|line| line.strip_prefix(call)?.strip_prefix(' '));
            spans.map(|span| Ok(Duration::from_nanos(span.parse()?))).collect()
        };
        Ok(Self { bind: of("bind")?, listen: of("listen")?, shutdown: of("shutdown")? })
    }
}

/// The shortest: what others do on the machine at the same time is no cost of adoption's.
fn shortest(spans: &[Duration]) -> Result<Duration> {
    spans.iter().min().copied().context("no such call was made")
}

/// Whether caller and agent take turns on one processor (SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP, Linux 6.6).
fn wakes_in_turn() -> Result<bool> {
    Ok(kernel()? >= (6, 6))
}

#[test]
fn a_notified_call_costs_a_service_little() -> Result<()> {
    require_namespaces!();
    let (hosts, adoption) = stage(16)?;
    let namespace = Namespace::new()?;
    let forwarder = forwarder(&adoption, &namespace)?;
    let without = Took::by(&adoption, &namespace, Profile::None)?;
    let with = Took::by(&adoption, &namespace, Profile::Notifies)?;
    let adoptions = forwarder.report()?.own.counts.adoptions;
    ensure!(adoptions == hosts.len() as u64, "{adoptions} were adopted: {:?}", forwarder.report()?.listeners);
    let slow = if bro::is_packaged() { SLACK } else { SLACK * DEBUG };
    let (few, many) = (Duration::from_micros(12), Duration::from_micros(43));
    for (call, with, without, most) in [
        ("bind", &with.bind, &without.bind, Duration::from_micros(300)),
        ("listen", &with.listen, &without.listen, Duration::from_micros(300)),
        ("shutdown", &with.shutdown, &without.shutdown, if wakes_in_turn()? { few } else { many }),
    ] {
        let (notified, native) = (shortest(with)?, shortest(without)?);
        println!("{call}: {notified:?} notified, {native:?} else");
        let more = notified.saturating_sub(native);
        ensure!(more <= most * slow, "{call} takes {more:?} more, {notified:?} for {native:?}");
    }
    forwarder.stop().map(drop)
}

/// As docs/reference.md has it of a forwarder that is awake.
const PACKAGED_KIB: u64 = 1536;
const DEBUG_KIB: u64 = 4096;

/// Connections.
const MANY: usize = 9_900;

/// In which no 20 bytes for each connection would find room; what a busy machine has a process keep besides is less (96 KiB was seen).
const ROOM_KIB: u64 = 192;

/// An adopted service that keeps its clients, ten of which are there: what bro needs for any it has.
struct Awake {
    host: TcpListener,
    _adoption: Adoption,
    forwarder: Forwarder,
    _service: Program,
    clients: Vec<TcpStream>,
    _namespace: Namespace,
}

impl Awake {
    fn new() -> Result<Self> {
        let (hosts, adoption) = stage(1)?;
        let namespace = Namespace::new()?;
        let forwarder = forwarder(&adoption, &namespace)?;
        let place = format!("127.0.0.1:{INSIDE}");
        let service = adoption.service_in(&namespace, Profile::Notifies, &["keeps", &place])?;
        service.says("ready")?;
        let host = hosts.into_iter().next().context("a listener")?;
        let mut awake = Self {
            host,
            _adoption: adoption,
            forwarder,
            _service: service,
            clients: Vec::new(),
            _namespace: namespace,
        };
        awake.more(10)?;
        Ok(awake)
    }

    /// So many clients more, which bro has looked at.
    fn more(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            self.clients.push(client(&self.host)?);
        }
        let all = self.clients.len() as u64;
        let are_seen = |report: &AdoptionReport| matches!(report, AdoptionReport::Adopted { connections, .. } if *connections == all);
        let report = eventually(&self.forwarder, are_seen)?;
        ensure!(report.total.accepted == 0, "the relay has accepted {}", report.total.accepted);
        Ok(())
    }
}

#[test]
fn connections_of_an_adopted_service_take_no_memory_of_bros() -> Result<()> {
    require_namespaces!();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    // What two of them share, the program's pages, is the system's.
    let (mut one, _other) = (Awake::new()?, Awake::new()?);
    let before = one.forwarder.private_kib()?;
    one.more(MANY)?;
    let after = one.forwarder.private_kib()?;
    println!("{before:?} KiB with 10 connections, {after:?} KiB with {MANY} more");
    let (before, after) = (before.iter().sum::<u64>(), after.iter().sum::<u64>());
    ensure!(after <= before + ROOM_KIB, "{before} KiB before, {after} KiB with {MANY} connections more");
    let most = if bro::is_packaged() { PACKAGED_KIB } else { DEBUG_KIB };
    ensure!(after <= most, "{after} KiB, at most {most} KiB");
    Ok(())
}
