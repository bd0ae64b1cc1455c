//! Datagrams: each client's flow, whole and in order, answered from where it wrote to, and within bounds; and messages of connections
//! that keep them apart.
//!
//! Needs: a network namespace; dnsmasq for one test. Takes: seconds.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Forwarder;
use bro_tests::notify::Notify;
use bro_tests::peers::{Conn, Family, Here, Listener, PATIENCE};
use bro_tests::scene::expect_relayed;
use bro_tests::tier::{Need, met};
use bro_tests::udp::{Echo, UdpScene, bound, client, expect, expect_echo, loopback};
use bro_tests::{process, require_namespaces};
use bro_user::commands::status::UndeliveredReport;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{
    self, AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, UnixAddr,
    recvmsg, setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Long enough to see that something does not happen.
const MOMENT: Duration = Duration::from_millis(300);

/// Lengths at the edges: none, one, one of a tunnel, two pages, and the most that there can be.
const LENGTHS: [usize; 5] = [0, 1, 1200, 8192, 65_507];

fn bytes(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + seed) as u8).collect()
}

fn tally(forwarder: &Forwarder) -> Result<bro_relay::flows::DatagramTally> {
    Ok(forwarder.report()?.total.datagrams)
}

fn dropped(forwarder: &Forwarder, why: &str) -> Result<u64> {
    Ok(tally(forwarder)?.dropped.each().find(|(word, _)| *word == why).map_or(0, |(_, count)| count))
}

#[test]
fn every_length_comes_back_whole() -> Result<()> {
    require_namespaces!();
    for ipv6 in [false, true] {
        for source in ["auto", "loopback"] {
            let scene = UdpScene::new(ipv6)?;
            let echo = scene.echo()?;
            let forwarder = scene.setup()?.arg(format!("--source={source}")).start()?;
            let clients = [scene.client()?, scene.client()?];
            for (number, length) in LENGTHS.into_iter().enumerate() {
                for (which, client) in clients.iter().enumerate() {
                    expect_echo(client, &bytes(length, number * 2 + which))
                        .with_context(|| format!("IPv6: {ipv6}, --source={source}, length {length}"))?;
                }
            }
            let tally = tally(&forwarder)?;
            let sent: usize = LENGTHS.iter().sum::<usize>() * clients.len();
            let count = (LENGTHS.len() * clients.len()) as u64;
            ensure!(tally.flows == 2 && tally.open == 2 && tally.dropped.total() == 0, "{tally:?}");
            for amounts in [tally.to_service, tally.to_clients] {
                ensure!((amounts.datagrams, amounts.bytes) == (count, sent as u64), "{tally:?}");
            }
            ensure!(echo.stop() == count, "nothing is sent that was not received");
            drop(forwarder.stop()?);
        }
    }
    Ok(())
}

/// What goes through the kernel as one arrives as it was sent, also where the way is less wide than one of them.
#[test]
fn many_at_once_arrive_apart_and_in_order() -> Result<()> {
    require_namespaces!();
    for (mtu, ipv6) in [(65_536, false), (65_536, true), (1500, false), (1500, true)] {
        let scene = UdpScene::new(ipv6)?;
        let _said = bro_tests::street::inside(
            &scene.namespace,
            &["ip", "link", "set", "lo", "mtu", &mtu.to_string()],
        )?;
        let service = scene.service()?;
        setsockopt(&service.as_fd(), sockopt::RcvBuf, &(1 << 20)).ok();
        let forwarder = scene.setup()?.start()?;
        let client = scene.client()?;
        let _sent = client.send(b"first")?;
        let (_, from) = service.recv_from(&mut [0; 8])?;
        // Runs of one length, shorter ones in between and empty ones; less than a socket's buffer has room for.
        let lengths = [[1200; 8], [1200, 1200, 7, 1200, 0, 0, 1200, 1200], [64; 8], [4096; 8]].concat();
        for (number, length) in lengths.iter().enumerate() {
            let _sent = client.send(&bytes(*length, number))?;
        }
        for (number, length) in lengths.iter().enumerate() {
            let of = || format!("number {number}, MTU {mtu}, IPv6 {ipv6}");
            expect(&service, &bytes(*length, number)).with_context(of)?;
            let _sent = service.send_to(&bytes(*length, number), from)?;
        }
        for (number, length) in lengths.iter().enumerate() {
            let of = || format!("answer {number}, MTU {mtu}, IPv6 {ipv6}");
            expect(&client, &bytes(*length, number)).with_context(of)?;
        }
        // A service that sends several as one itself, as servers of QUIC do.
        setsockopt(&service.as_fd(), sockopt::UdpGsoSegment, &1000)?;
        let sent = bytes(9500, 3);
        let _sent = service.send_to(&sent, from)?;
        for part in sent.chunks(1000) {
            expect(&client, part).with_context(|| format!("MTU {mtu}, IPv6 {ipv6}"))?;
        }
        let tally = tally(&forwarder)?;
        ensure!(tally.dropped.total() == 0, "{tally:?}");
        ensure!(tally.to_clients.datagrams == lengths.len() as u64 + 10, "{tally:?}");
    }
    Ok(())
}

/// As many on their way as the sockets' buffers of the usual size hold, and no more, for a while: each comes, once and in order, and so does each
/// answer.
#[test]
fn within_the_sockets_buffers_nothing_is_lost() -> Result<()> {
    require_namespaces!();
    const ROUNDS: usize = 200;
    let scene = UdpScene::new(false)?;
    let service = scene.service()?;
    let forwarder = scene.setup()?.start()?;
    let client = scene.client()?;
    // A buffer counts what a datagram takes of the kernel's memory: at most 4 KiB for one of these.
    const AT_ONCE: usize = 48;
    let sizes = [64, 1200, 1200, 1, 700];
    let mut numbers = (0u32..).map(u32::to_be_bytes);
    for round in 0..ROUNDS {
        let datagram =
            |number: &[u8; 4], at: usize| [&number[..], &bytes(sizes[at % sizes.len()], at)].concat();
        let those: Vec<Vec<u8>> =
            numbers.by_ref().take(AT_ONCE).enumerate().map(|(at, number)| datagram(&number, at)).collect();
        for one in &those {
            let _sent = client.send(one)?;
        }
        let mut from = None;
        let mut buffer = vec![0; 1 << 16];
        for (at, one) in those.iter().enumerate() {
            let of = || format!("round {round}, number {at}: {:?}", tally(&forwarder));
            let (length, sender) = service.recv_from(&mut buffer).with_context(of)?;
            ensure!(buffer[..length] == **one, "another one comes: {}", of());
            from = Some(sender);
        }
        for one in &those {
            let _sent = service.send_to(one, from.context("there was one")?)?;
        }
        for (at, one) in those.iter().enumerate() {
            let of = || format!("round {round}, answer {at}: {:?}", tally(&forwarder));
            expect(&client, one).with_context(of)?;
        }
    }
    let (tally, count) = (tally(&forwarder)?, (ROUNDS * AT_ONCE) as u64);
    ensure!((tally.to_service.datagrams, tally.to_clients.datagrams) == (count, count), "{tally:?}");
    ensure!(tally.flows == 1 && tally.dropped.total() == 0, "{tally:?}");
    Ok(())
}

#[test]
fn a_service_at_every_address_answers_too() -> Result<()> {
    require_namespaces!();
    for ipv6 in [false, true] {
        let scene = UdpScene::new(ipv6)?;
        let any: IpAddr = if ipv6 { "::".parse()? } else { Ipv4Addr::UNSPECIFIED.into() };
        let _echo = Echo::new(bound(&scene.namespace, SocketAddr::new(any, scene.target.port()))?)?;
        let _forwarder = scene.setup()?.start()?;
        expect_echo(&scene.client()?, b"ping").with_context(|| format!("IPv6: {ipv6}"))?;
    }
    Ok(())
}

#[test]
fn the_service_sees_each_client() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::at("0.0.0.0:0".parse()?, false)?;
    let service = scene.service()?;
    let _forwarder = scene.setup()?.start()?;
    let front = loopback(false, scene.address()?.port());
    let mut seen = Vec::new();
    for _ in 0..3 {
        let client = client(front, None)?;
        let _sent = client.send(b"who")?;
        let (_, from) = service.recv_from(&mut [0; 8])?;
        // A client of this host, by its own port.
        ensure!(
            from == SocketAddr::new(Ipv4Addr::new(169, 254, 1, 2).into(), client.local_addr()?.port()),
            "{from}"
        );
        seen.push((client, from));
    }
    // Answers find their way whichever order they come in, and so do datagrams that are no answers.
    for (number, (client, from)) in seen.iter().enumerate().rev() {
        for _ in 0..2 {
            let _sent = service.send_to(&[number as u8], from)?;
            expect(client, &[number as u8])?;
        }
    }
    Ok(())
}

#[test]
fn answers_come_from_the_address_that_was_written_to() -> Result<()> {
    require_namespaces!();
    for front in ["0.0.0.0:0", "[::]:0"] {
        let scene = UdpScene::at(front.parse()?, false)?;
        let _echo = scene.echo()?;
        let forwarder = scene.setup()?.start()?;
        let port = scene.address()?.port();
        let mut addresses: Vec<SocketAddr> =
            (1..4).map(|last| (Ipv4Addr::new(127, 0, 0, last), port).into()).collect();
        if front.starts_with('[') {
            addresses.push(loopback(true, port));
        }
        // One client, from one port, to each address: each is a flow of its own.
        let own = UdpSocket::bind("127.0.0.9:0")?;
        own.set_read_timeout(Some(PATIENCE))?;
        for address in &addresses {
            let client = client(*address, None)?;
            expect_echo(&client, b"connected, so that no other address is heard")?;
            if address.is_ipv4() {
                let _sent = own.send_to(b"ping", address)?;
                let (_, from) = own.recv_from(&mut [0; 8])?;
                ensure!(from == *address, "{from} answers for {address}");
            }
        }
        ensure!(tally(&forwarder)?.flows == addresses.len() as u64 + 3, "{:?}", tally(&forwarder)?);
    }
    Ok(())
}

#[test]
fn datagrams_wait_in_order_while_the_service_starts() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let forwarder = scene.setup()?.start()?;
    let clients = [scene.client()?, scene.client()?];
    for number in 0..50u8 {
        for (which, client) in clients.iter().enumerate() {
            let _sent = client.send(&[which as u8, number])?;
        }
    }
    let waits = || tally(&forwarder).is_ok_and(|tally| tally.held == 2);
    ensure!(process::eventually(PATIENCE, waits), "{:?}", tally(&forwarder)?);
    let service = scene.service()?;
    let mut next = [0u8; 2];
    for _ in 0..100 {
        let mut datagram = [0; 4];
        let length = service.recv(&mut datagram).context("a datagram that waited is missing")?;
        let [which, number] = datagram[..length] else { anyhow::bail!("{length} bytes came") };
        ensure!(number == next[usize::from(which)], "{number} of client {which} comes for {next:?}");
        next[usize::from(which)] += 1;
    }
    service.set_read_timeout(Some(MOMENT))?;
    ensure!(service.recv(&mut [0; 4]).is_err(), "one came twice");
    ensure!(tally(&forwarder)?.dropped.total() == 0);
    Ok(())
}

#[test]
fn what_waits_is_bounded_and_the_oldest_goes() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let forwarder = scene.setup()?.start()?;
    let client = scene.client()?;
    // More than 4 MiB, in steps that the listener's own buffer has room for.
    let (length, count) = (60_000, 100u64);
    for number in 0..count {
        let _sent = client.send(&bytes(length, number as usize))?;
        let taken = || tally(&forwarder).is_ok_and(|tally| tally.dropped.total() + 70 > number);
        ensure!(process::eventually(PATIENCE, taken), "{:?}", tally(&forwarder)?);
    }
    let fits = (4 << 20) / length as u64;
    let over = || dropped(&forwarder, "queue").is_ok_and(|dropped| dropped == count - fits);
    ensure!(process::eventually(PATIENCE, over), "{:?}", tally(&forwarder)?);
    let service = scene.service()?;
    setsockopt(&service.as_fd(), sockopt::RcvBuf, &(1 << 24)).ok();
    expect(&service, &bytes(length, (count - fits) as usize)).context("the oldest that was kept")?;
    Ok(())
}

#[test]
fn the_least_recently_used_flow_makes_room() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let forwarder = scene.setup()?.arg("--flows-max=50").start()?;
    let before = {
        expect_echo(&scene.client()?, b"first")?;
        forwarder.descriptors()?
    };
    for number in 0..1000u32 {
        expect_echo(&scene.client()?, &number.to_be_bytes()).with_context(|| format!("client {number}"))?;
    }
    let tally = tally(&forwarder)?;
    // The kernel gives a port to more than one client, now and then.
    ensure!((900..=1001).contains(&tally.flows), "{tally:?}");
    ensure!(tally.open == 50 && tally.evicted == tally.flows - 50, "{tally:?}");
    ensure!(tally.dropped.total() == 0, "{tally:?}");
    let after = forwarder.descriptors()?;
    ensure!(after <= before + 50, "{after} descriptors, {before} before");
    drop(forwarder.log().line(PATIENCE, |line| line.contains("--flows-max"))?);
    Ok(())
}

#[test]
fn a_flood_leaves_another_source_alone() -> Result<()> {
    require_namespaces!();
    // Each that is lost at the listener takes a moment; a busy machine loses several in a row.
    const ENOUGH: usize = 100;
    let scene = UdpScene::at("0.0.0.0:0".parse()?, false)?;
    let service = scene.service()?;
    let forwarder = scene.setup()?.arg("--flows-max=32").start()?;
    let front = loopback(false, scene.address()?.port());
    let good = client(front, Some("127.0.0.2:0".parse()?))?;
    good.set_read_timeout(Some(MOMENT))?;
    let own = good.local_addr()?.port();
    let over = AtomicBool::new(false);
    let seen = std::thread::scope(|threads| -> Result<usize> {
        let flood = threads.spawn(|| -> Result<()> {
            while !over.load(Ordering::Acquire) {
                let client = client(front, Some("127.0.0.3:0".parse()?))?;
                for _ in 0..4 {
                    let _sent = client.send(b"flood");
                }
            }
            Ok(())
        });
        let answering = threads.spawn(|| -> Result<usize> {
            service.set_read_timeout(Some(Duration::from_millis(20)))?;
            let (mut buffer, mut others) = ([0; 64], 0);
            while !over.load(Ordering::Acquire) {
                let Ok((length, from)) = service.recv_from(&mut buffer) else { continue };
                if buffer[..length].starts_with(b"good") {
                    let _sent = service.send_to(&buffer[..length], from);
                    others += usize::from(from.port() != own);
                }
            }
            Ok(others)
        });
        let (mut answered, deadline) = (0, Instant::now() + PATIENCE);
        while answered < ENOUGH && Instant::now() < deadline {
            // The listener's own buffer is everybody's, so that one may be lost there; a client asks again.
            answered += usize::from(expect_echo(&good, format!("good {answered}").as_bytes()).is_ok());
        }
        over.store(true, Ordering::Release);
        drop(flood.join());
        ensure!(answered == ENOUGH, "only {answered} answers beside the flood");
        answering.join().map_err(|_| anyhow::anyhow!("the service failed"))?
    })?;
    ensure!(seen == 0, "{seen} came from another port: the flow of the other client made room for the flood");
    let tally = tally(&forwarder)?;
    ensure!(tally.evicted > 0 && tally.open <= 32, "{tally:?}");
    forwarder.expect_no_spin(MOMENT)
}

#[test]
fn a_source_may_have_so_many_flows() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let forwarder = scene.setup()?.arg("--connections-per-source=2").start()?;
    let clients = [scene.client()?, scene.client()?, scene.client()?];
    for client in &clients {
        expect_echo(client, b"ping")?;
    }
    let first = tally(&forwarder)?;
    ensure!((first.open, first.evicted) == (2, 1), "{first:?}");
    expect_echo(&clients[0], b"again").context("the one that made room is served anew")?;
    Ok(())
}

#[test]
fn a_service_that_is_not_bound_any_more_is_waited_for() -> Result<()> {
    require_namespaces!();
    for ipv6 in [false, true] {
        for source in ["auto", "loopback"] {
            let scene = UdpScene::new(ipv6)?;
            let forwarder = scene.setup()?.arg(format!("--source={source}")).start()?;
            let client = scene.client()?;
            let echo = scene.echo()?;
            expect_echo(&client, b"ping")?;
            drop(echo);
            // The kernel says so of the one that it refuses; the next one waits.
            let _sent = client.send(b"lost")?;
            let refused = || dropped(&forwarder, "refused").is_ok_and(|count| count >= 1);
            ensure!(
                process::eventually(PATIENCE, refused),
                "IPv6 {ipv6}, {source}: {:?}",
                tally(&forwarder)?
            );
            // Nor is the client told: only the kernel may send it “port unreachable”.
            client.set_read_timeout(Some(MOMENT))?;
            let heard = client.recv(&mut [0; 8]).map_err(|error| error.kind());
            ensure!(heard == Err(std::io::ErrorKind::WouldBlock), "{heard:?}");
            client.set_read_timeout(Some(PATIENCE))?;
            let _sent = client.send(b"waits")?;
            let waits = || tally(&forwarder).is_ok_and(|tally| tally.held == 1);
            ensure!(process::eventually(PATIENCE, waits), "{:?}", tally(&forwarder)?);
            let _echo = scene.echo()?;
            expect(&client, b"waits")?;
        }
    }
    Ok(())
}

/// A client whose socket is connected hears of what was not received, and no other does; not while it waits.
#[test]
fn who_sent_what_was_not_received_is_told() -> Result<()> {
    require_namespaces!();
    bro_tests::require_or_ok!(Need::Root);
    let told = |client: &UdpSocket| {
        let heard = client.recv(&mut [0; 8]).map_err(|error| error.kind());
        ensure!(heard == Err(std::io::ErrorKind::ConnectionRefused), "{heard:?}");
        Ok(())
    };
    for (at, front) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")] {
        let scene = UdpScene::at(at.parse()?, false)?;
        let mut notify = Notify::new()?;
        let setup = scene.setup()?.env("NOTIFY_SOCKET", notify.name());
        // As in a service: what was given up does not come back.
        let setup = setup.through(["setpriv", "--no-new-privs"]).arg("--icmp-port-unreachable");
        let forwarder = setup.start()?;
        notify.wait(PATIENCE, |line| line == "READY=1")?;
        let front = SocketAddr::new(front.parse()?, scene.address()?.port());
        let (one, other) = (client(front, None)?, client(front, None)?);
        let refused_once = || -> Result<()> {
            let echo = scene.echo()?;
            expect_echo(&one, b"ping")?;
            expect_echo(&other, b"ping")?;
            drop(echo);
            let _sent = one.send(b"lost")?;
            told(&one).context("the one")?;
            let heard = other.take_error()?;
            ensure!(heard.is_none(), "the other: {heard:?}");
            let _sent = one.send(b"waits")?;
            let _echo = scene.echo()?;
            expect(&one, b"waits").context("what waits is not lost")
        };
        refused_once().with_context(|| at.to_owned())?;
        let said = forwarder.report()?.undelivered;
        ensure!(said == Some(UndeliveredReport::Tells { told: 1, failed: None }), "{at}: {said:?}");
        // The right is given up, and what it was for is not the relay process's.
        let status = std::fs::read_to_string(format!("/proc/{}/status", forwarder.pid()))?;
        let held = status.lines().find_map(|line| line.strip_prefix("CapPrm:\t")).context("CapPrm")?;
        ensure!(u64::from_str_radix(held, 16)? & 1 << 13 == 0, "CAP_NET_RAW in {held}");
        let raw = |pid| -> Result<usize> {
            let kind = |socket: &OwnedFd| socket::getsockopt(socket, sockopt::SockType);
            let sockets = process::sockets(pid)?;
            Ok(sockets.iter().filter(|socket| kind(socket) == Ok(SockType::Raw)).count())
        };
        let wanted = if at.starts_with('[') { 2 } else { 1 };
        ensure!((raw(forwarder.pid())?, raw(forwarder.relay())?) == (wanted, 0), "{at}: whose it is");
        if at != "[::]:0" {
            continue;
        }
        let main = forwarder.pid();
        forwarder.signal(Signal::SIGHUP)?;
        let line = notify.wait(PATIENCE, |line| {
            line.strip_prefix("MAINPID=").is_some_and(|pid| pid != main.to_string())
        })?;
        ensure!(process::ends(main, PATIENCE)?, "the old process does not end");
        refused_once().context("after a reload")?;
        let successor = line.trim_start_matches("MAINPID=").parse()?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(successor), Signal::SIGTERM)?;
        ensure!(process::ends(successor, PATIENCE)?, "the successor does not end");
    }
    // Of each where refusals are not waited out; and where the service does not come in time.
    for option in ["--ready=none", "--start-timeout=300ms"] {
        let scene = UdpScene::new(false)?;
        let _forwarder = scene.setup()?.args(["--icmp-port-unreachable", option]).start()?;
        let client = scene.client()?;
        let _sent = client.send(b"lost")?;
        told(&client).context(option)?;
    }
    Ok(())
}

#[test]
fn who_has_no_client_to_tell_says_so() -> Result<()> {
    require_namespaces!();
    let mut scene = bro_tests::scene::Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.setup().arg("--icmp-port-unreachable").arg(scene.target()).start()?;
    let served = (scene.client()?, service.accept()?);
    let said = forwarder.report()?.undelivered;
    ensure!(said == Some(UndeliveredReport::NoSocket), "{said:?}");
    drop(served);
    forwarder.stop().map(drop)
}

#[test]
fn who_may_not_tell_clients_says_so() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let refused = |setup: bro_tests::forwarder::Setup, words: &str| -> Result<()> {
        let mut forwarder = setup.arg("--icmp-port-unreachable").start()?;
        drop(forwarder.log().line(PATIENCE, |line| line.contains(words)).with_context(|| words.to_owned())?);
        forwarder.expect_exit(5)
    };
    if nix::unistd::geteuid().is_root() {
        refused(scene.setup()?.without("net_raw"), "takes CAP_NET_RAW")?;
        // Clients of another network than its own.
        let socket = bound(&scene.namespace, loopback(false, 0))?;
        let elsewhere =
            bro_tests::forwarder::Setup::new().descriptor(socket.into(), "dns").arg("127.0.0.1:53");
        refused(elsewhere, "PrivateNetwork=")
    } else {
        refused(scene.setup()?, "takes CAP_NET_RAW")
    }
}

#[test]
fn flows_count_as_connections() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let mut forwarder = scene.setup()?.args(["--flow-timeout=800ms", "--exit-idle-time=300ms"]).start()?;
    let client = scene.client()?;
    let start = Instant::now();
    // Longer than either span, with pauses shorter than the flow's.
    while start.elapsed() < Duration::from_secs(2) {
        expect_echo(&client, b"still here")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(forwarder.is_running()? && tally(&forwarder)?.flows == 1, "{:?}", tally(&forwarder)?);
    let last = Instant::now();
    forwarder.expect_exit(0)?;
    ensure!(last.elapsed() >= Duration::from_millis(900), "it left after {:?}", last.elapsed());
    forwarder.expect_nothing_left()
}

#[test]
fn a_flow_that_waited_for_the_service_has_its_time_for_the_answer() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let forwarder = scene.setup()?.arg("--flow-timeout=400ms").start()?;
    let client = scene.client()?;
    let _sent = client.send(b"ping")?;
    let waits = || tally(&forwarder).is_ok_and(|tally| tally.held == 1);
    ensure!(process::eventually(PATIENCE, waits), "{:?}", tally(&forwarder)?);
    // The service is slower than a flow may be silent for, which is what is tested and no wait for anything.
    std::thread::sleep(Duration::from_millis(600));
    let service = scene.service()?;
    let (_, from) = service.recv_from(&mut [0; 8])?;
    std::thread::sleep(Duration::from_millis(150));
    let _sent = service.send_to(b"answer", from)?;
    expect(&client, b"answer")
}

#[test]
fn ecn_is_passed_on_both_ways() -> Result<()> {
    require_namespaces!();
    for ipv6 in [false, true] {
        let scene = UdpScene::new(ipv6)?;
        let service = scene.service()?;
        let _forwarder = scene.setup()?.start()?;
        let client = scene.client()?;
        for ecn in [2u8, 1, 3, 0] {
            for (sender, receiver) in [(&client, &service), (&service, &client)] {
                hears_ecn(receiver, ipv6)?;
                // What is not ECN's stays where it is.
                let class = 0x20 | ecn;
                if ipv6 {
                    setsockopt(&sender.as_fd(), sockopt::Ipv6TClass, &class.into())?;
                } else {
                    setsockopt(&sender.as_fd(), sockopt::Ipv4Tos, &class.into())?;
                }
                let _sent = if sender.peer_addr().is_ok() {
                    sender.send(b"marked")?
                } else {
                    let from = SERVICE_SEES.with(std::cell::Cell::get).context("it has seen a client")?;
                    sender.send_to(b"marked", from)?
                };
                let (seen, from) = receive_ecn(receiver)?;
                if receiver.peer_addr().is_err() {
                    SERVICE_SEES.with(|seen| seen.set(from));
                }
                ensure!(seen == ecn, "IPv6 {ipv6}: {seen:#x} comes of {class:#x}");
            }
        }
    }
    Ok(())
}

thread_local! {
    /// The client, as the service has seen it last.
    static SERVICE_SEES: std::cell::Cell<Option<SocketAddr>> = const { std::cell::Cell::new(None) };
}

fn hears_ecn(socket: &UdpSocket, ipv6: bool) -> Result<()> {
    if ipv6 {
        setsockopt(&socket.as_fd(), sockopt::Ipv6RecvTClass, &true)?;
    } else {
        setsockopt(&socket.as_fd(), sockopt::IpRecvTos, &true)?;
    }
    Ok(())
}

/// The class of the next datagram, and its sender.
fn receive_ecn(socket: &UdpSocket) -> Result<(u8, Option<SocketAddr>)> {
    let (mut buffer, mut space) = ([0; 64], vec![0; 256]);
    let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let from = message.address.as_ref().and_then(bro_relay::sockaddr::tcp);
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::Ipv4Tos(class) => return Ok((class, from)),
            ControlMessageOwned::Ipv6TClass(class) => return Ok((u8::try_from(class)?, from)),
            _ => {}
        }
    }
    anyhow::bail!("no class comes along")
}

#[test]
fn streams_and_datagrams_by_one_name() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let stream = Family::Tcp4.loopback().context("TCP has one")?;
    let front = Listener::new(&Here, &stream)?;
    let at = bro_tests::peers::Address::Tcp(scene.target);
    let service = Listener::new(&scene.namespace, &at)?;
    let forwarder = bro_tests::forwarder::Setup::new()
        .netns(&scene.namespace)
        .named(&front, "dns")
        .descriptor(scene.front.as_fd().try_clone_to_owned()?, "dns")
        .arg(format!("--target=dns={}", scene.target))
        .start()?;
    let connection = (Conn::new(&Here, front.address())?, service.accept()?);
    expect_relayed(&connection.0, &connection.1)?;
    expect_echo(&scene.client()?, b"ping")?;
    let report = forwarder.report()?;
    ensure!(report.total.accepted == 1 && report.total.datagrams.flows == 1, "{report:?}");
    ensure!(report.listeners[1].address.ends_with("/udp") && report.listeners[1].target.ends_with("/udp"));
    Ok(())
}

/// By the sockets' own ports, whatever the order in which they are passed.
#[test]
fn each_port_of_a_range_has_its_own_target() -> Result<()> {
    require_namespaces!();
    let namespace = bro_tests::netns::Namespace::new()?;
    let first = 40_000;
    let services =
        [bound(&namespace, loopback(false, first))?, bound(&namespace, loopback(false, first + 1))?];
    let stream = |port| bro_tests::peers::Address::Tcp(loopback(false, port));
    let listeners = [first, first + 1].map(|port| Listener::new(&namespace, &stream(port)));
    // The same number over both protocols: one that the kernel gives for the one may be another program's over the other.
    let pair = || -> Result<(UdpSocket, Listener)> {
        let front = UdpSocket::bind("127.0.0.4:0")?;
        let listener = Listener::new(&Here, &bro_tests::peers::Address::Tcp(front.local_addr()?))?;
        Ok((front, listener))
    };
    let mut fronts = [pair()?, pair()?];
    fronts
        .sort_by_key(|(front, _)| std::cmp::Reverse(front.local_addr().map_or(0, |address| address.port())));
    let mut setup = bro_tests::forwarder::Setup::new()
        .netns(&namespace)
        .arg(format!("--target=web=127.0.0.1:{first}-{}", first + 1));
    for (front, listener) in &fronts {
        setup = setup.named(listener, "web").descriptor(front.as_fd().try_clone_to_owned()?, "web");
    }
    let _forwarder = setup.start()?;
    for (number, (front, listener)) in fronts.iter().rev().enumerate() {
        let client = client(front.local_addr()?, None)?;
        let _sent = client.send(&[number as u8])?;
        expect(&services[number], &[number as u8])?;
        let connection = Conn::new(&Here, listener.address())?;
        let service = listeners[number].as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?.accept()?;
        expect_relayed(&connection, &service)?;
    }
    Ok(())
}

#[test]
fn a_socket_of_its_own() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let forwarder = bro_tests::forwarder::Setup::new()
        .netns(&scene.namespace)
        .args(["--listen=127.0.0.1:0/udp".to_owned(), scene.target.to_string()])
        // Any datagram is data.
        .arg("--wake-on=data")
        .start()?;
    let address = || forwarder.report().ok().map(|report| report.listeners[0].address.clone());
    ensure!(process::eventually(PATIENCE, || address().is_some()), "no report");
    let address: SocketAddr = address().context("no report")?.trim_end_matches("/udp").parse()?;
    expect_echo(&client(address, None)?, b"ping")
}

#[test]
fn a_reload_loses_no_flow() -> Result<()> {
    require_namespaces!();
    let mut notify = Notify::new()?;
    let scene = UdpScene::new(false)?;
    let service = scene.service()?;
    let forwarder = scene.setup()?.env("NOTIFY_SOCKET", notify.name()).start()?;
    notify.wait(PATIENCE, |line| line == "READY=1")?;
    let client = scene.client()?;
    let _sent = client.send(b"before")?;
    let (_, from) = service.recv_from(&mut [0; 64])?;
    let main = forwarder.pid();
    forwarder.signal(Signal::SIGHUP)?;
    notify.wait_anew(PATIENCE, |line| line == "RELOADING=1")?;
    let line = notify
        .wait(PATIENCE, |line| line.strip_prefix("MAINPID=").is_some_and(|pid| pid != main.to_string()))?;
    let successor: i32 = line.trim_start_matches("MAINPID=").parse()?;
    // What the old process was asked is still answered by it, and the client notices nothing.
    let _sent = service.send_to(b"late", from)?;
    expect(&client, b"late")?;
    let echo = Echo::new(service)?;
    for number in 0..20u8 {
        expect_echo(&client, &[number])?;
    }
    ensure!(process::ends(main, PATIENCE)?, "the old process does not end");
    expect_echo(&client, b"after")?;
    drop(echo);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(successor), Signal::SIGTERM)?;
    ensure!(process::ends(successor, PATIENCE)?, "the successor does not end");
    forwarder.expect_no_panic()
}

#[test]
fn what_was_asked_before_a_stop_is_answered() -> Result<()> {
    require_namespaces!();
    let mut notify = Notify::new()?;
    let scene = UdpScene::new(false)?;
    let service = scene.service()?;
    let mut forwarder = scene.setup()?.env("NOTIFY_SOCKET", notify.name()).start()?;
    let client = scene.client()?;
    let _sent = client.send(b"before")?;
    let (_, from) = service.recv_from(&mut [0; 64])?;
    forwarder.signal(Signal::SIGTERM)?;
    notify.wait(PATIENCE, |line| line == "STOPPING=1")?;
    let _sent = service.send_to(b"late", from)?;
    expect(&client, b"late")?;
    // What is sent now is the next forwarder's.
    let _sent = client.send(b"after")?;
    forwarder.expect_exit(0)?;
    service.set_nonblocking(true)?;
    ensure!(service.recv(&mut [0; 64]).is_err(), "it takes datagrams while it leaves");
    Ok(())
}

#[test]
fn what_cannot_be_forwarded_is_named() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let folder = bro_tests::scratch::Scratch::new()?;
    let unix = || UnixDatagram::bind(folder.join("log"));
    let refused = |setup: bro_tests::forwarder::Setup, words: &str| -> Result<()> {
        let mut forwarder = setup.start()?;
        drop(forwarder.log().line(PATIENCE, |line| line.contains(words)).with_context(|| words.to_owned())?);
        ensure!(forwarder.wait(PATIENCE)?.is_some_and(|status| !status.success()), "it goes on");
        Ok(())
    };
    let bare = || bro_tests::forwarder::Setup::new().netns(&scene.namespace);
    refused(
        bare().descriptor(unix()?.into(), "log").arg("127.0.0.1:1"),
        "takes datagrams over a unix socket, and its target 127.0.0.1:1 is none",
    )?;
    let raw = socket::socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    refused(
        bare().descriptor(raw, "kernel").arg("127.0.0.1:1"),
        "descriptor 3 (kernel) takes datagrams and is of family",
    )?;
    let udp = || scene.front.as_fd().try_clone_to_owned();
    refused(bare().descriptor(udp()?, "dns").arg("/run/x"), "the socket “dns” (127.0.0.1:")?;
    let tcp = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    refused(bare().named(&tcp, "web").arg("127.0.0.1:53/udp"), "the socket “web” (127.0.0.1:")
}

/// A real name server, asked by many clients at once; each question is a flow.
#[test]
fn a_name_server_answers_every_question() -> Result<()> {
    require_namespaces!();
    if !met("a_name_server_answers_every_question", &[Need::Program("dnsmasq", "dnsmasq-base")]) {
        return Ok(());
    }
    const CLIENTS: u16 = 8;
    const QUESTIONS: u16 = 1250;
    let scene = UdpScene::new(false)?;
    let program = bro_tests::tier::find_program("dnsmasq").context("it is there")?;
    let (program, port) = (program.display().to_string(), format!("--port={}", scene.target.port()));
    let words = [
        program.as_str(),
        // It changes neither its user nor its group, which an ordinary user's namespace does not let it.
        "--no-daemon",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        &port,
        "--address=/example.test/10.1.2.3",
        "--listen-address=127.0.0.1",
        "--bind-interfaces",
    ];
    let mut command = bro_tests::street::command(&scene.namespace, &words);
    let mut server = process::Session(command.stderr(std::process::Stdio::null()).spawn()?);
    let forwarder = scene.setup()?.arg("--flows-max=256").start()?;
    let address = scene.address()?;
    let asked = std::thread::scope(|threads| -> Result<()> {
        let all: Vec<_> = (0..CLIENTS)
            .map(|client| {
                threads.spawn(move || (0..QUESTIONS).try_for_each(|n| ask(address, client * QUESTIONS + n)))
            })
            .collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow::anyhow!("a client failed"))?)
    });
    ensure!(server.0.try_wait()?.is_none(), "dnsmasq has ended");
    asked.with_context(|| format!("{:?}", forwarder.report().map(|report| report.total.datagrams)))?;
    let tally = tally(&forwarder)?;
    ensure!(tally.to_service.datagrams >= u64::from(CLIENTS * QUESTIONS), "{tally:?}");
    ensure!(tally.evicted > 0 && tally.open <= 256, "{tally:?}");
    forwarder.expect_no_panic()
}

/// Asks for a name's address from a port of its own, again if nothing comes within a second, as resolvers do.
fn ask(server: SocketAddr, id: u16) -> Result<()> {
    let mut question = Vec::from(id.to_be_bytes());
    question.extend(b"\x01\0\0\x01\0\0\0\0\0\0");
    let host = format!("h{id}");
    for label in [host.as_str(), "example", "test", ""] {
        question.push(u8::try_from(label.len())?);
        question.extend(label.as_bytes());
    }
    question.extend(b"\0\x01\0\x01");
    let socket = client(server, None)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    for _ in 0..20 {
        let _sent = socket.send(&question)?;
        let mut answer = [0; 512];
        let Ok(length) = socket.recv(&mut answer) else { continue };
        ensure!(
            answer[..2] == question[..2] && answer[12..question.len()] == question[12..],
            "to another question"
        );
        ensure!(answer[..length].ends_with(&[0, 4, 10, 1, 2, 3]), "{:?}", &answer[..length]);
        return Ok(());
    }
    anyhow::bail!("no answer to {host}")
}

/// A connected pair through a forwarder, of sockets that keep messages apart.
struct Packets {
    client: OwnedFd,
    service: OwnedFd,
    forwarder: Forwarder,
    _folder: bro_tests::scratch::Scratch,
    _namespace: bro_tests::netns::Namespace,
}

fn packet_socket() -> Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

fn packet_listener(path: &std::path::Path) -> Result<OwnedFd> {
    let listener = packet_socket()?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&listener, socket::Backlog::new(16)?)?;
    setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::seconds(20))?;
    Ok(listener)
}

fn packets() -> Result<Packets> {
    let (folder, namespace) = (bro_tests::scratch::Scratch::new()?, bro_tests::netns::Namespace::new()?);
    let (front, back) = (folder.join("front"), folder.join("back"));
    let (listener, serving) = (packet_listener(&front)?, packet_listener(&back)?);
    let forwarder = bro_tests::forwarder::Setup::new()
        .netns(&namespace)
        .descriptor(listener, "bus")
        .arg(back.display().to_string())
        .start()?;
    let client = packet_socket()?;
    socket::connect(client.as_raw_fd(), &UnixAddr::new(&front)?)?;
    // SAFETY: accept has just made this descriptor for us and nothing else knows it.
    let service = unsafe { OwnedFd::from_raw_fd(socket::accept(serving.as_raw_fd())?) };
    for end in [&client, &service] {
        setsockopt(end, sockopt::ReceiveTimeout, &TimeVal::seconds(20))?;
        setsockopt(end, sockopt::SendTimeout, &TimeVal::seconds(20))?;
    }
    Ok(Packets { client, service, forwarder, _folder: folder, _namespace: namespace })
}

fn send_packet(to: &OwnedFd, bytes: &[u8]) -> nix::Result<usize> {
    socket::send(to.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)
}

fn expect_packet(from: &OwnedFd, bytes: &[u8]) -> Result<()> {
    let mut buffer = vec![0; 1 << 18];
    let length = socket::recv(from.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    ensure!(buffer[..length] == *bytes, "{length} bytes came for {}", bytes.len());
    Ok(())
}

#[test]
fn messages_of_a_connection_stay_apart() -> Result<()> {
    require_namespaces!();
    let Packets { client, service, forwarder, _folder, _namespace } = packets()?;
    // One of more than a shared buffer, and one that is empty, among others; all sent before the first is read.
    let lengths = [1, 3, 0, 8192, 150_000, 0, 2];
    for (from, to) in [(&client, &service), (&service, &client)] {
        for length in lengths {
            let _sent =
                send_packet(from, &bytes(length, length)).with_context(|| format!("sending {length}"))?;
        }
        for length in lengths {
            expect_packet(to, &bytes(length, length)).with_context(|| format!("of {length}"))?;
        }
    }
    // More than all buffers on the way hold: the reader is slower, and nothing is lost or joined.
    std::thread::scope(|threads| -> Result<()> {
        let sending =
            threads.spawn(|| (0..2000).try_for_each(|n| send_packet(&client, &bytes(n % 5000, n)).map(drop)));
        std::thread::sleep(MOMENT);
        (0..2000).try_for_each(|n| {
            expect_packet(&service, &bytes(n % 5000, n)).with_context(|| format!("number {n}"))
        })?;
        sending.join().map_err(|_| anyhow::anyhow!("the sender failed"))??;
        Ok(())
    })?;
    // The end of one direction is no end of the other.
    socket::shutdown(client.as_raw_fd(), socket::Shutdown::Write)?;
    expect_packet(&service, b"").context("the end")?;
    let _sent = send_packet(&service, b"goodbye")?;
    expect_packet(&client, b"goodbye")?;
    drop(service);
    expect_packet(&client, b"").context("the end of the other")?;
    drop(client);
    let closing = forwarder.closing()?;
    ensure!(closing.reason == "eof", "{closing:?}");
    forwarder.expect_no_panic()
}

#[test]
fn descriptors_among_messages_are_not_lost_in_silence() -> Result<()> {
    require_namespaces!();
    let Packets { client, service, forwarder, _folder, _namespace } = packets()?;
    let _sent = send_packet(&client, b"before")?;
    expect_packet(&service, b"before")?;
    let (number, parts) = ([client.as_raw_fd()], [std::io::IoSlice::new(b"with one")]);
    let rights = [socket::ControlMessage::ScmRights(&number)];
    match socket::sendmsg::<()>(client.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None) {
        // The kernel refuses them, and the connection goes on.
        Err(Errno::EPERM) => {
            let _sent = send_packet(&client, b"after")?;
            expect_packet(&service, b"after")
        }
        Ok(_) => {
            let closing = forwarder.closing()?;
            ensure!(closing.reason == "descriptors", "{closing:?}");
            Ok(())
        }
        Err(errno) => Err(errno.into()),
    }
}

#[test]
fn streams_and_messages_are_not_mixed() -> Result<()> {
    require_namespaces!();
    let (folder, namespace) = (bro_tests::scratch::Scratch::new()?, bro_tests::netns::Namespace::new()?);
    let (front, back) = (folder.join("front"), folder.join("back"));
    let (listener, _serving) = (packet_listener(&front)?, std::os::unix::net::UnixListener::bind(&back)?);
    let forwarder = bro_tests::forwarder::Setup::new()
        .netns(&namespace)
        .descriptor(listener, "bus")
        .arg(back.display().to_string())
        .start()?;
    let client = packet_socket()?;
    socket::connect(client.as_raw_fd(), &UnixAddr::new(&front)?)?;
    let closing = forwarder.closing()?;
    ensure!(closing.reason == "refused", "{closing:?}");
    Ok(())
}

#[test]
fn a_name_with_two_addresses_leads_to_the_one_that_is_bound() -> Result<()> {
    use std::net::ToSocketAddrs as _;
    require_namespaces!();
    // Not every host's own name table has the second.
    let families: Vec<bool> = ("localhost", 0).to_socket_addrs()?.map(|address| address.is_ipv6()).collect();
    for ipv6 in families {
        for ready in ["auto", "none"] {
            let scene = UdpScene::new(ipv6)?;
            let _echo = scene.echo()?;
            let socket = scene.front.as_fd().try_clone_to_owned()?;
            let _forwarder = bro_tests::forwarder::Setup::new()
                .pid(&scene.namespace)
                .descriptor(socket, "dns")
                .args([format!("--ready={ready}"), format!("localhost:{}", scene.target.port())])
                .start()?;
            expect_echo(&scene.client()?, b"ping")
                .with_context(|| format!("IPv6 {ipv6}, --ready={ready}"))?;
        }
    }
    Ok(())
}

#[test]
fn by_bytes_a_flow_that_is_silent_keeps_nothing_awake() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let options = ["--idle-by=bytes", "--exit-idle-time=700ms", "--idle-ignore=127.0.0.9"];
    let mut forwarder = scene.setup()?.args(options).start()?;
    let client = scene.client()?;
    for _ in 0..15 {
        expect_echo(&client, b"ping")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    ensure!(forwarder.is_running()?, "it left between datagrams");
    // Nor does one that is not silent, of a client that is ignored.
    let monitor = bro_tests::udp::client(scene.address()?, Some("127.0.0.9:0".parse()?))?;
    expect_echo(&monitor, b"ping")?;
    let start = Instant::now();
    while forwarder.is_running()? {
        ensure!(start.elapsed() < PATIENCE, "it is kept awake");
        let _sent = monitor.send(b"ping")?;
        std::thread::sleep(Duration::from_millis(50));
    }
    forwarder.expect_exit(0)
}

#[test]
fn who_is_ignored_wakes_nothing_and_keeps_nothing_awake() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let mut forwarder = scene
        .setup()?
        .args(["--wake-ignore=127.0.0.0/8", "--idle-ignore=127.0.0.0/8", "--exit-idle-time=1s"])
        .start()?;
    let client = scene.client()?;
    let _sent = client.send(b"nothing to wake for")?;
    let ignored = || dropped(&forwarder, "wake-ignored").is_ok_and(|count| count == 1);
    ensure!(process::eventually(PATIENCE, ignored), "{:?}", tally(&forwarder)?);
    ensure!(tally(&forwarder)?.flows == 0, "{:?}", tally(&forwarder)?);
    forwarder.expect_exit(0)
}
