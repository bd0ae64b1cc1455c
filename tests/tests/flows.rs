//! Very many clients of datagrams: 100,000 at once, or as many as descriptors allow, and one after another within the usual bound (20,000,
//! or as many as `BRO_CLIENTS` says); what they cost in memory, and that they come while the service sleeps. Each client has an address of
//! its own, in a namespace where all of 10.0.0.0/8 is local.
//!
//! Needs: root, ip. Takes: some 10 s.

use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_relay::flows::DatagramTally;
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::Namespace;
use bro_tests::peers::PATIENCE;
use bro_tests::process;
use bro_tests::street::inside;
use bro_tests::tier::{Need, met};
use bro_tests::udp::{Echo, bound, loopback};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt,
};

/// How many at once.
const CLIENTS: u32 = 100_000;

/// How many one after another: a quarter of them while the service sleeps.
const IN_TURN: u32 = 20_000;

/// What they write to: an address that none of them has.
const FRONT: Ipv4Addr = Ipv4Addr::new(10, 255, 255, 254);

/// How many of them wait for an answer at a time: fewer than a socket's buffer of the usual size has room for.
const WINDOW: usize = 100;

/// One that was lost in a full buffer is sent again.
const AGAIN: Duration = Duration::from_millis(200);

/// docs/reference.md says so. Seen: see there.
const OWN_BYTES: u64 = 768;
const KERNEL_BYTES: u64 = 4608;

/// What else happens on the host while kernel memory is looked at.
const NOISE: u64 = 48 << 20;

/// The service's namespace, and one for all clients with the socket that they write to.
struct Stage {
    clients: UdpSocket,
    front: UdpSocket,
    service: Namespace,
    _street: Namespace,
    target: std::net::SocketAddr,
}

impl Stage {
    fn new() -> Result<Self> {
        let (street, service) = (Namespace::new()?, Namespace::new()?);
        let _said = inside(&street, &["ip", "route", "add", "local", "10.0.0.0/8", "dev", "lo"])?;
        let clients = bound(&street, (Ipv4Addr::UNSPECIFIED, 0).into())?;
        clients.set_read_timeout(Some(AGAIN))?;
        setsockopt(&clients.as_fd(), sockopt::Ipv4PacketInfo, &true)?;
        let front = bound(&street, (FRONT, 0).into())?;
        let target = bound(&service, loopback(false, 0))?.local_addr()?;
        Ok(Self { clients, front, service, _street: street, target })
    }

    fn setup(&self) -> Result<Setup> {
        let socket = self.front.as_fd().try_clone_to_owned()?;
        let setup = Setup::new().netns(&self.service).descriptor(socket, "dns");
        Ok(setup.args(["--flow-timeout=1h".to_owned(), self.target.to_string()]))
    }

    fn echo(&self) -> Result<Echo> {
        Echo::new(bound(&self.service, self.target)?)
    }

    /// The address of a client.
    fn address(number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 1, 0, 0)) + number)
    }

    fn send(&self, number: u32, round: u32) -> Result<()> {
        let bytes = [number.to_be_bytes(), round.to_be_bytes()].concat();
        let ipi_spec_dst = libc::in_addr { s_addr: u32::from(Self::address(number)).to_be() };
        let ipi_addr = libc::in_addr { s_addr: 0 };
        let from = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst, ipi_addr };
        let to = SocketAddrV4::new(FRONT, self.front.local_addr()?.port());
        let part = [IoSlice::new(&bytes)];
        let along = [ControlMessage::Ipv4PacketInfo(&from)];
        let to = SockaddrIn::from(to);
        let _sent = sendmsg(self.clients.as_raw_fd(), &part, &along, MsgFlags::empty(), Some(&to))?;
        Ok(())
    }

    /// Whom an answer is for, and what it says; nothing for a while.
    fn answer(&self) -> Result<Option<(Ipv4Addr, u32, u32)>> {
        let (mut buffer, mut space) = ([0; 16], vec![0; 128]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let fd = self.clients.as_raw_fd();
        let message = match recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut space), MsgFlags::empty()) {
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            message => message?,
        };
        let from = message.address.context("an answer has a sender")?;
        ensure!(from.ip() == FRONT && message.bytes == 8, "{} bytes come from {from}", message.bytes);
        let to = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)))
            }
            _ => None,
        });
        let word = |at: usize| buffer[at..at + 4].try_into().map(u32::from_be_bytes);
        Ok(Some((to.context("it says where it came to")?, word(0)?, word(4)?)))
    }

    /// Each of these asks once, and again only where nothing comes, and each is answered with what it has asked.
    fn ask(&self, numbers: std::ops::Range<u32>, round: u32) -> Result<()> {
        let (mut next, mut asking) = (numbers.start, std::collections::HashSet::new());
        let deadline = Instant::now() + PATIENCE * 10;
        while next < numbers.end || !asking.is_empty() {
            while asking.len() < WINDOW && next < numbers.end {
                self.send(next, round)?;
                let _new = asking.insert(next);
                next += 1;
            }
            match self.answer()? {
                Some((to, number, said)) => {
                    ensure!(to == Self::address(number), "{to} has the answer of client {number}");
                    // One that was asked twice may be answered twice.
                    ensure!(said <= round, "client {number} is told {said} in round {round}");
                    let _one = asking.remove(&number);
                }
                None => asking.iter().try_for_each(|number| self.send(*number, round))?,
            }
            ensure!(Instant::now() < deadline, "{} clients have no answer", asking.len());
        }
        Ok(())
    }
}

fn tally(forwarder: &Forwarder) -> Result<DatagramTally> {
    Ok(forwarder.report()?.total.datagrams)
}

/// Of all processes of the forwarder, what is theirs of the pages that they have (proc_pid_smaps(5), PSS).
fn own_bytes(forwarder: &Forwarder) -> Result<u64> {
    let of = |pid: i32| -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find(|line| line.starts_with("Pss:")).context("no line Pss")?;
        Ok(line.split_whitespace().nth(1).context("a size")?.parse::<u64>()? * 1024)
    };
    let pid = forwarder.pid();
    std::iter::once(pid).chain(process::children(pid)).map(of).sum()
}

/// The kernel's slabs and page tables, of the whole host.
fn kernel_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let of = |name: &str| -> Result<u64> {
        let line = text.lines().find(|line| line.starts_with(name)).with_context(|| name.to_owned())?;
        Ok(line.split_whitespace().nth(1).context("a size")?.parse::<u64>()? * 1024)
    };
    Ok(of("Slab:")? + of("PageTables:")?)
}

/// As many flows as descriptors allow, up to all clients: flows get half of them at most.
fn at_once(setup: Setup) -> Result<(u32, Setup)> {
    const WANTED: u64 = 2 * CLIENTS as u64 + 1000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard >= WANTED {
        return Ok((CLIENTS, setup));
    }
    if may_raise()? {
        return Ok((CLIENTS, setup.launch(format!("nofile={WANTED}:{WANTED}"))));
    }
    let fits = u32::try_from(hard.saturating_sub(500) / 2)?;
    let line = format!(
        "only {fits} of {CLIENTS} flows at once: a process may have {hard} descriptors, and this user may not raise that (LimitNOFILE={WANTED})\n"
    );
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes())?;
    Ok((fits, setup))
}

/// May this user raise a limit beyond the hard one (CAP_SYS_RESOURCE)?
fn may_raise() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no line CapEff")?;
    let has = u64::from_str_radix(line.trim(), 16)? & (1 << 24) != 0;
    // Only in the first user namespace.
    Ok(has && std::fs::read_to_string("/proc/self/uid_map")?.contains("4294967295"))
}

#[test]
fn as_many_flows_as_descriptors_allow_are_there_at_once() -> Result<()> {
    let needs = [Need::Root, Need::Program("ip", "iproute2")];
    if !met("as_many_flows_as_descriptors_allow_are_there_at_once", &needs) {
        return Ok(());
    }
    let stage = Stage::new()?;
    let _echo = stage.echo()?;
    let (flows, setup) = at_once(stage.setup()?)?;
    let forwarder = setup.args([format!("--flows-max={flows}"), "--ready=none".to_owned()]).start()?;
    // What the first ones cost is not the flows'.
    stage.ask(0..500, 0)?;
    let before = (own_bytes(&forwarder)?, kernel_bytes()?);
    let begin = Instant::now();
    stage.ask(500..flows, 0)?;
    let made = begin.elapsed();
    let after = (own_bytes(&forwarder)?, kernel_bytes()?);
    // All of them are flows still, and each is known by its own.
    let begin = Instant::now();
    stage.ask(0..flows, 1)?;
    let again = begin.elapsed();
    let tally = tally(&forwarder)?;
    let own = (after.0 - before.0) / u64::from(flows - 500);
    let kernel = after.1.saturating_sub(before.1) / u64::from(flows - 500);
    println!(
        "{flows} flows, made in {made:.1?} and used once more in {again:.1?}: {own} bytes of bro's and {kernel} of the kernel's for each, {} MiB of \
         bro's in all; {tally:?}",
        after.0 >> 20
    );
    let flows = u64::from(flows);
    ensure!((tally.flows, tally.open, tally.evicted) == (flows, flows, 0), "{tally:?}");
    ensure!(tally.dropped.total() == 0, "{tally:?}");
    ensure!(own <= OWN_BYTES, "{own} bytes of bro's own for a flow");
    ensure!(
        after.1.saturating_sub(before.1) <= KERNEL_BYTES * flows + NOISE,
        "{kernel} bytes of the kernel's"
    );
    drop(forwarder.stop()?);
    Ok(())
}

#[test]
fn with_the_usual_bound_clients_come_one_after_another() -> Result<()> {
    let needs = [Need::Root, Need::Program("ip", "iproute2")];
    if !met("with_the_usual_bound_clients_come_one_after_another", &needs) {
        return Ok(());
    }
    const FLOWS: u32 = 4096;
    let clients = match std::env::var("BRO_CLIENTS") {
        Ok(said) => said.parse().context("BRO_CLIENTS is a number")?,
        Err(_) => IN_TURN,
    };
    let early = clients / 4;
    ensure!(early > FLOWS, "so few clients do not take each other's places");
    let stage = Stage::new()?;
    let forwarder = stage.setup()?.start()?;
    // The first of them while the service sleeps: each has its flow, and takes another's place.
    let begin = Instant::now();
    for number in 0..early {
        stage.send(number, 0)?;
        if number % WINDOW as u32 == 0 {
            let taken = || tally(&forwarder).is_ok_and(|tally| tally.flows > u64::from(number));
            ensure!(process::eventually(PATIENCE, taken), "{:?}", tally(&forwarder)?);
        }
    }
    let taken = || tally(&forwarder).is_ok_and(|tally| tally.flows == u64::from(early));
    ensure!(process::eventually(PATIENCE, taken), "{:?}", tally(&forwarder)?);
    let waiting = tally(&forwarder)?;
    ensure!((waiting.open, waiting.held) == (u64::from(FLOWS), u64::from(FLOWS)), "{waiting:?}");
    let early_took = begin.elapsed();
    let echo = stage.echo()?;
    // Of those that waited the last ones are answered without asking again; a busy machine's sockets may lose some.
    let mut answered = std::collections::HashSet::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some((to, number, _)) = stage.answer()? else {
            if tally(&forwarder)?.held == 0 {
                break;
            }
            ensure!(Instant::now() < deadline, "some wait still: {:?}", tally(&forwarder)?);
            continue;
        };
        ensure!(to == Stage::address(number) && number >= early - 1024, "{to} has the answer of {number}");
        ensure!(answered.insert(number), "client {number} is answered twice");
    }
    ensure!(
        answered.len() > 512,
        "of 1024 that waited {} are answered: {:?}",
        answered.len(),
        tally(&forwarder)?
    );
    let before = (own_bytes(&forwarder)?, forwarder.descriptors()?);
    let begin = Instant::now();
    stage.ask(early..clients, 0)?;
    let took = begin.elapsed();
    let after = (own_bytes(&forwarder)?, forwarder.descriptors()?);
    let end = tally(&forwarder)?;
    println!(
        "{early} clients of a service that sleeps in {early_took:.1?}, {} of one that is awake in {took:.1?}; bytes and descriptors: {before:?} \
         before, {after:?} after; {end:?}",
        clients - early
    );
    ensure!(end.flows >= u64::from(clients) && end.open == u64::from(FLOWS), "{end:?}");
    ensure!(end.evicted == end.flows - end.open, "{end:?}");
    // As much as for the first 4096 of them.
    ensure!(after.0 <= before.0 + (1 << 20) && after.1 <= before.1, "{before:?} before, {after:?} after");
    // Those that came last have their flows; the first has to have a new one.
    stage.ask(clients - FLOWS / 2..clients, 1)?;
    ensure!(tally(&forwarder)?.flows == end.flows, "one of the last has lost its flow");
    stage.ask(0..1, 1)?;
    ensure!(tally(&forwarder)?.flows == end.flows + 1, "the first one's flow was there still");
    drop(echo);
    drop(forwarder.stop()?);
    Ok(())
}
