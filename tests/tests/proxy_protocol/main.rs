//! The PROXY protocol: a service is told who its client is (`--proxy-protocol`), and a trusted balancer in front is believed
//! (`--accept-proxy`).
//!
//! Needs: a network namespace, haproxy, nginx. Takes: seconds.

mod others;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::{Conn, Family, Here, PATIENCE};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::{process, require_namespaces};

/// Long enough for something to happen that must not.
const MOMENT: Duration = Duration::from_millis(300);

/// The suite's behaviours, each connection through a balancer and with a header for the service.
macro_rules! introduced {
    ($($module:ident: $lane:ident over $legs:ident),+ $(,)?) => {
        $(mod $module {
            introduced!(@tests $lane $legs
                both_ends_at_once,
                answer_after_the_clients_half_close,
                service_half_closes_first_and_reads_on,
                nothing_is_sent_at_all,
                client_closes_with_bytes_still_under_way,
                client_abort_is_seen_as_an_abort,
                service_abort_is_seen_as_an_abort,
                service_that_never_reads_then_reads_everything,
                one_byte_at_a_time,
                megabytes_with_pauses,
                mixed_torture,
                descriptors_return_to_the_start,
                closing_line_counts_every_byte,
            );
        })+
    };
    (@tests $lane:ident $legs:ident $($behaviour:ident,)+) => {
        $(#[test]
        fn $behaviour() -> anyhow::Result<()> {
            use bro_tests::suite::{Lane, Legs, run_introduced};
            run_introduced(Lane::$lane, Legs::$legs, bro_tests::behaviours::$behaviour)
        })+
    };
}

introduced!(
    splice_tcp4: Splice over TCP4,
    splice_tcp6: Splice over TCP6,
    splice_unix: Splice over UNIX,
    copy_tcp4: Copy over TCP4,
    service_lane: ServiceLane over TCP4,
    both_lanes: BothLanes over TCP4,
    flapping_lanes: FlappingLanes over TCP4,
);

/// With both lanes the client's bytes really take one, although the first of what it sent was for the forwarder.
#[test]
fn a_lane_is_open_behind_both_headers() -> Result<()> {
    const ROUNDS: u64 = 5000;
    if !bro_tests::tier::met("a_lane_is_open_behind_both_headers", &Lane::BothLanes.needs()) {
        return Ok(());
    }
    let rig = Rig::introduced(Lane::BothLanes, Legs::TCP4)?;
    let (client, service) = rig.pair()?;
    // Far longer than it takes until both ends are hooked.
    for _ in 0..ROUNDS {
        expect_relayed(&client, &service)?;
    }
    drop((client, service));
    let forwarder = rig.forwarder().context("the lane has one")?;
    let closing = forwarder.closing()?;
    ensure!(closing.relay == "sockmap" && closing.to_service == 4 * ROUNDS, "{closing:?}");
    let total = forwarder.report()?.total;
    // Of 8 bytes a round, those of the first rounds are spliced.
    ensure!(total.kernel > 4 * ROUNDS, "few bytes took the lanes: {total:?}");
    rig.finish()
}

/// Reads what comes before `ping`.
fn heard(service: &Conn, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    service.recv_exact(&mut bytes)?;
    Ok(bytes)
}

#[test]
fn a_service_is_told_each_clients_own_address_before_its_first_byte() -> Result<()> {
    require_namespaces!();
    for family in [Family::Tcp4, Family::Tcp6, Family::Unix] {
        for (version, relay) in [("v1", "splice"), ("v1", "copy"), ("v2", "splice"), ("v2", "auto")] {
            let mut scene = Scene::of(family)?;
            let service = scene.serve()?;
            let (protocol, relay) = (format!("--proxy-protocol={version}"), format!("--relay={relay}"));
            let forwarder = scene.start(&[&protocol, &relay])?;
            let client = scene.client()?;
            client.send(b"ping")?;
            let accepted = service.accept()?;
            // A unix client's own is none.
            let own = client.address().map(|address| address.to_string()).unwrap_or_default();
            let ends = match (own.parse(), scene.front.address().to_string().parse()) {
                (Ok(source), Ok(destination)) => Some((source, destination)),
                _ => None,
            };
            let expected = if version == "v1" {
                match ends {
                    Some((source, destination)) => {
                        let (source, destination): (std::net::SocketAddr, std::net::SocketAddr) =
                            (source, destination);
                        let number = if source.is_ipv4() { 4 } else { 6 };
                        let ips = format!("{} {}", source.ip(), destination.ip());
                        format!("PROXY TCP{number} {ips} {} {}\r\n", source.port(), destination.port())
                            .into_bytes()
                    }
                    None => b"PROXY UNKNOWN\r\n".to_vec(),
                }
            } else {
                bro_relay::proxy_protocol::Version::V2.header(ends)
            };
            let told = heard(&accepted, expected.len())?;
            ensure!(told == expected, "{family:?} {version}: {:?}", String::from_utf8_lossy(&told));
            accepted.recv_exact(&mut [0; 4])?;
            drop((client, accepted));
            let closing = forwarder.closing()?;
            ensure!((closing.to_service, closing.to_client) == (4, 0), "{closing:?}");
            forwarder.stop()?;
        }
    }
    Ok(())
}

/// A client that was held is told of as well, and one that has nothing to say.
#[test]
fn a_held_client_is_told_of_when_the_service_is_there() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--proxy-protocol=v1"])?;
    let (silent, done) = (scene.client()?, scene.client()?);
    done.close_writing()?;
    scene.expect_held(&forwarder, 2)?;
    let service = scene.serve()?;
    for client in [&silent, &done] {
        let accepted = service.accept()?;
        let expected =
            format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} ", client.address()?.port().context("TCP")?);
        let told = heard(&accepted, expected.len())?;
        ensure!(told == expected.as_bytes(), "{:?}", String::from_utf8_lossy(&told));
    }
    drop((silent, done));
    forwarder.closings(2)?;
    forwarder.stop().map(drop)
}

const TRUST: [&str; 2] = ["--accept-proxy", "--trusted=127.0.0.0/8,::1,unix"];

fn with<'a>(options: &[&'a str]) -> Vec<&'a str> {
    TRUST.iter().chain(options).copied().collect()
}

/// In one piece with what follows, byte by byte, and in every family.
#[test]
fn a_trusted_header_is_read_to_its_end_and_no_further() -> Result<()> {
    require_namespaces!();
    let v1 = b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 443\r\n".to_vec();
    let ends = ("[2001:db8::7]:4711".parse()?, "[2001:db8::1]:443".parse()?);
    let mut v2 = bro_relay::proxy_protocol::Version::V2.header(Some(ends));
    // With an unknown field, of 300 bytes.
    v2[15] = 0;
    let rest = u16::try_from(36 + 303)?.to_be_bytes();
    v2[14..16].copy_from_slice(&rest);
    v2.extend([0xea, 1, 44]);
    v2.extend([b'x'; 300]);
    for family in [Family::Tcp4, Family::Tcp6, Family::Unix] {
        let mut scene = Scene::of(family)?;
        let service = scene.serve()?;
        let forwarder = scene.start(&with(&[]))?;
        for header in [&v1, &v2] {
            // What follows looks like a header too, and is the service's.
            let stream = [&header[..], b"PROXY ping"].concat();
            for piece in [stream.len(), 1, 7] {
                let client = scene.client()?;
                for part in stream.chunks(piece) {
                    client.send(part)?;
                }
                let accepted = service.accept()?;
                ensure!(heard(&accepted, 10)? == b"PROXY ping", "{family:?} in pieces of {piece}");
                drop((client, accepted));
            }
        }
        let closings = forwarder.closings(6)?;
        ensure!(
            closings.iter().all(|one| one.peer == "[2001:db8::7]:4711" && one.to_service == 10),
            "{closings:?}"
        );
        ensure!(
            forwarder.log().lines().iter().any(|line| line.contains("through=")),
            "not said through whom"
        );
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn a_balancers_own_connections_are_its_own() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&with(&["--proxy-protocol=v1"]))?;
    let mut local = bro_relay::proxy_protocol::Version::V2.header(None);
    local.extend(b"ping");
    for sent in [&b"PROXY UNKNOWN\r\nping"[..], &local] {
        let client = scene.client()?;
        client.send(sent)?;
        let accepted = service.accept()?;
        let expected =
            format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} ", client.address()?.port().context("TCP")?);
        ensure!(heard(&accepted, expected.len())? == expected.as_bytes());
    }
    let closings = forwarder.closings(2)?;
    ensure!(closings.iter().all(|one| one.peer.starts_with("127.0.0.1:")), "{closings:?}");
    // One that only looks whether there is a listener.
    drop(scene.client()?);
    ensure!(forwarder.closings(3)?[2].reason == "client-left");
    forwarder.stop().map(drop)
}

#[test]
fn what_is_no_header_ends_a_trusted_connection() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&with(&[]))?;
    let long = [&b"PROXY UNKNOWN "[..], &[b'x'; 200]].concat();
    let bad: [&[u8]; 4] = [
        b"GET / HTTP/1.0\r\n\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 99999\r\n",
        &long,
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff",
    ];
    for (count, sent) in bad.iter().enumerate() {
        let client = scene.client()?;
        client.send(sent)?;
        client.expect_abort()?;
        let closing = forwarder.closings(count + 1)?.pop().context("a line")?;
        ensure!(closing.reason == "bad-proxy-header" && closing.to_service == 0, "{closing:?}");
    }
    ensure!(forwarder.log().lines().iter().any(|line| line.contains("does not begin with a PROXY header")));
    ensure!(service.try_accept(MOMENT)?.is_none(), "the service was connected to");
    forwarder.stop().map(drop)
}

/// It costs no processor time to wait for the rest of one, and not for ever.
#[test]
fn a_header_that_does_not_come_to_its_end_is_not_waited_for_for_ever() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&with(&[]))?;
    let begins = std::time::Instant::now();
    let (silent, slow) = (scene.client()?, scene.client()?);
    slow.send(b"PROXY TCP4 198.51.")?;
    scene.expect_held(&forwarder, 2)?;
    forwarder.expect_no_spin(MOMENT * 2)?;
    for client in [silent, slow] {
        client.with_patience(Duration::from_secs(20)).expect_abort()?;
    }
    ensure!(begins.elapsed() >= Duration::from_millis(4900), "given up after {:?}", begins.elapsed());
    let closings = forwarder.closings(2)?;
    ensure!(closings.iter().all(|one| one.reason == "proxy-header-timeout"), "{closings:?}");
    ensure!(!forwarder.log().lines().iter().any(|line| line.contains("waking")), "it woke the service");
    forwarder.stop().map(drop)
}

/// The service sees the header of a client that is not trusted, as it sees all that a client sends.
#[test]
fn a_client_that_is_not_trusted_is_not_believed() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--accept-proxy", "--trusted=10.0.0.0/8", "--trusted=unix"])?;
    let client = scene.client()?;
    let header = b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 443\r\n";
    client.send(header)?;
    let accepted = service.accept()?;
    ensure!(heard(&accepted, header.len())? == header);
    let own = client.address()?.to_string();
    drop((client, accepted));
    ensure!(forwarder.closing()?.peer == own, "{:?}", forwarder.closing());
    forwarder.stop().map(drop)
}

#[test]
fn one_source_is_one_client_of_the_balancers() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&with(&["--connections-per-source=1"]))?;
    let from = |last: u8| -> Result<Conn> {
        let client = Conn::new(&Here, scene.front.address())?;
        client.send(format!("PROXY TCP4 198.51.100.{last} 203.0.113.1 4711 443\r\n").as_bytes())?;
        Ok(client)
    };
    let one = (from(1)?, service.accept()?);
    expect_relayed(&one.0, &one.1)?;
    from(1)?.expect_abort()?;
    let other = (from(2)?, service.accept()?);
    expect_relayed(&other.0, &other.1)?;
    drop(one);
    forwarder.closings(2)?;
    let again = (from(1)?, service.accept()?);
    expect_relayed(&again.0, &again.1)?;
    drop((other, again));
    let closings = forwarder.closings(4)?;
    let refused: Vec<_> = closings.iter().filter(|closing| closing.reason == "source-limit").collect();
    ensure!(refused.len() == 1 && refused[0].peer.starts_with("198.51.100.1:"), "{closings:?}");
    forwarder.stop().map(drop)
}

/// A header alone is no byte of the client's.
#[test]
fn a_header_does_not_wake_where_a_byte_is_to() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&with(&["--wake-on=data"]))?;
    let client = scene.client()?;
    client.send(b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 443\r\n")?;
    let silent = || forwarder.report().is_ok_and(|report| report.total.silent == 1);
    ensure!(process::eventually(PATIENCE, silent), "{:?}", forwarder.report());
    ensure!(
        !forwarder.log().lines().iter().any(|line| line.contains("waking")),
        "the header woke the service"
    );
    client.send(b"ping")?;
    let line = forwarder.log().line(PATIENCE, |line| line.contains("waking"))?;
    ensure!(line.contains("198.51.100.7:4711"), "{line}");
    let service = scene.serve()?;
    service.accept()?.recv_exact(&mut [0; 4])?;
    drop(client);
    ensure!(forwarder.closing()?.peer == "198.51.100.7:4711");
    forwarder.stop().map(drop)
}

#[test]
fn whom_to_trust_has_to_be_said() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let mut forwarder = scene.start(&["--accept-proxy"])?;
    forwarder.expect_exit(2)?;
    ensure!(
        forwarder.log().lines().iter().any(|line| line.contains("--trusted")),
        "{:?}",
        forwarder.log().lines()
    );
    Ok(())
}
