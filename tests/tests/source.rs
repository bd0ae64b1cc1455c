//! `--source`: from which addresses the service sees its clients, and what that leaves in its network.
//!
//! Needs: a network namespace; root and kernel BTF for some tests. Takes: seconds.
#![allow(clippy::tests_outside_test_module, reason = "this is a test target")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bro_tests::forwarder::Setup;
use bro_tests::netns::Namespace;
use bro_tests::peers::{Address, Conn, Family, Here, Listener, PATIENCE, Place, wait_for};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::street::{Street, inside};
use bro_tests::tier::{Need, met};
use bro_tests::{process, require_namespaces};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{SockaddrStorage, connect, getsockopt, sockopt};

const V4: &str = "203.0.113.5";
const V6: &str = "2001:db8::5";
/// Addresses that clients have on the street.
const CLIENTS: [&str; 5] = [V4, "198.51.100.7", V6, "240.0.0.9", "169.254.1.2"];

/// The two ways in: through a process, where the relay process connects itself, and through a file, where an agent does.
const WAYS: [fn(Setup, &Namespace) -> Setup; 2] = [Setup::pid, Setup::netns];

fn loopback(family: Family) -> Address {
    family.loopback().expect("TCP has one")
}

/// Whom the service sees.
fn seen(served: &Conn) -> Result<SocketAddr> {
    match Address::of_peer(served.as_fd())? {
        Address::Tcp(address) => Ok(address),
        other => bail!("{other} is no TCP address"),
    }
}

fn port(address: &Address) -> u16 {
    address.port().expect("a TCP address")
}

#[test]
fn the_service_sees_each_client_by_its_own_address_and_port() -> Result<()> {
    require_namespaces!();
    let street = Street::new(&CLIENTS)?;
    let relays = ["--relay=splice", "--relay=copy", "--relay=auto"];
    // The front, the service's family, the client, and how it is seen: `=` is as it is.
    let cases = [
        ("0.0.0.0:0", Family::Tcp4, V4, "="),
        ("[::]:0", Family::Tcp4, V4, "="),
        ("[::]:0", Family::Tcp6, V6, "="),
        ("0.0.0.0:0", Family::Tcp6, V4, "64:ff9b::cb00:7105"),
        ("0.0.0.0:0", Family::Tcp4, "127.0.0.1", "169.254.1.2"),
        ("0.0.0.0:0", Family::Tcp4, "127.0.0.9", "169.254.1.2"),
        ("[::]:0", Family::Tcp6, "::1", "fd62:726f::2"),
        ("0.0.0.0:0", Family::Tcp6, "127.0.0.1", "fd62:726f::2"),
        // Made of the first 64 bits: pinned, since services may have noted it.
        ("[::]:0", Family::Tcp4, V6, "24"),
        // Who really has an address of bro's own is another.
        ("0.0.0.0:0", Family::Tcp4, "169.254.1.2", "24"),
        ("0.0.0.0:0", Family::Tcp4, "240.0.0.9", "24"),
    ];
    for (way, relay) in WAYS.into_iter().flat_map(|way| relays.map(|relay| (way, relay))) {
        for (front, back, client, wanted) in cases {
            let namespace = Namespace::new()?;
            let front = street.front(front)?;
            let service = Listener::new(&namespace, &loopback(back))?;
            let setup = way(Setup::new().socket(&front), &namespace);
            let forwarder = setup.arg(relay).arg(service.address().to_string()).start()?;
            // Two, of which the second comes while it is awake.
            for _ in 0..2 {
                // An IPv4 client of a socket that takes both.
                let to = match client.parse()? {
                    std::net::IpAddr::V4(ip) => format!("{ip}:{}", port(front.address())),
                    std::net::IpAddr::V6(_) => format!("[{client}]:{}", port(front.address())),
                };
                let ours =
                    Conn::bound_to(&street.namespace, &Address::Tcp(to.parse()?), Some(client.parse()?))?;
                let served = service.accept()?;
                let came = seen(&served)?;
                let ip = came.ip().to_string();
                let what = format!("{client} through {} to {}: {came}", front.address(), service.address());
                match wanted {
                    "=" => ensure!(ip == client, "{what}"),
                    "24" => ensure!(ip.starts_with("24") || ip.starts_with("25"), "{what}"),
                    wanted => ensure!(ip == wanted, "{what}"),
                }
                ensure!(
                    came.port() == port(&ours.address()?),
                    "{what}, whose port is {}",
                    port(&ours.address()?)
                );
                expect_relayed(&ours, &served)?;
            }
            ensure!(forwarder.log().complaints().is_empty(), "{:?}", forwarder.log().complaints());
            forwarder.stop()?;
        }
    }
    Ok(())
}

/// The interface that a link-local address is of is known on the client's side alone.
#[test]
fn a_link_local_client_keeps_its_address() -> Result<()> {
    if !met("a_link_local_client_keeps_its_address", &[Need::Root]) {
        return Ok(());
    }
    let street = Street::new(&[])?;
    let client = street.neighbour(1)?;
    for (namespace, interface, ip) in [(&street.namespace, "n1", "fe80::1"), (&client, "eth0", "fe80::2")] {
        // Without the kernel's own, which it may choose as well.
        inside(namespace, &["ip", "-6", "address", "flush", "dev", interface])?;
        inside(namespace, &["ip", "address", "add", &format!("{ip}/64"), "dev", interface, "nodad"])?;
    }
    let (near, far) = (index(&street.namespace, "n1")?, index(&client, "eth0")?);
    let ways = [(WAYS[0], "--relay=splice"), (WAYS[1], "--relay=copy"), (WAYS[0], "--relay=auto")];
    for (way, relay) in ways {
        for (front, back) in [
            ("[::]:0".to_owned(), Family::Tcp6),
            (format!("[fe80::1%{near}]:0"), Family::Tcp6),
            ("[::]:0".to_owned(), Family::Tcp4),
        ] {
            let namespace = Namespace::new()?;
            let front = street.front(&front)?;
            let service = Listener::new(&namespace, &loopback(back))?;
            let setup = way(Setup::new().socket(&front), &namespace).arg(relay);
            let forwarder = setup.arg(service.address().to_string()).start()?;
            for _ in 0..2 {
                let to = format!("[fe80::1%{far}]:{}", port(front.address()));
                let ours = Conn::new(&client, &Address::Tcp(to.parse()?))?;
                let served = service.accept().with_context(|| format!("{:#?}", forwarder.log().lines()))?;
                let came = seen(&served)?;
                let what = format!("through {} to {}: {came}", front.address(), service.address());
                ensure!(came.port() == port(&ours.address()?), "{what}");
                match came {
                    SocketAddr::V6(came) => ensure!(came.ip().to_string() == "fe80::2", "{what}"),
                    // Of the whole address: all of them are of one network.
                    SocketAddr::V4(came) => ensure!(came.ip().octets()[0] >= 240, "{what}"),
                }
                expect_relayed(&ours, &served)?;
            }
            forwarder.stop()?;
        }
    }
    Ok(())
}

/// The number of an interface.
fn index(namespace: &Namespace, interface: &str) -> Result<u32> {
    let said = inside(namespace, &["ip", "-o", "link", "show", "dev", interface])?;
    Ok(said.split(':').next().unwrap_or_default().parse()?)
}

#[test]
fn a_client_over_a_unix_socket_is_no_local_one() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::between(Namespace::new()?, Family::Unix, Family::Tcp4)?;
    let service = scene.serve()?;
    let forwarder = scene.start(&[])?;
    let (client, served) = (scene.client()?, service.accept()?);
    ensure!(seen(&served)?.ip().to_string() == "169.254.1.2", "{}", seen(&served)?);
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.stop().map(drop)
}

#[test]
fn loopback_is_granted_only_where_it_is_asked_for() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--source=loopback"])?;
    let (client, served) = (scene.client()?, service.accept()?);
    ensure!(seen(&served)?.ip().is_loopback(), "{}", seen(&served)?);
    drop((client, served));
    forwarder.stop()?;
    // And it leaves nothing in the namespace.
    ensure!(!rules(&scene.namespace)?.contains("6451823"), "{}", rules(&scene.namespace)?);
    Ok(())
}

fn rules(namespace: &Namespace) -> Result<String> {
    Ok(inside(namespace, &["ip", "-4", "rule"])? + &inside(namespace, &["ip", "-6", "rule"])?)
}

/// What connecting there says, from wherever the kernel would, or from this address.
fn outwards(namespace: &Namespace, to: &str, from: Option<&str>) -> Result<Errno> {
    let to: SocketAddr = to.parse()?;
    let socket = namespace.socket(Address::Tcp(to).family())?;
    if let Some(from) = from {
        let from: SocketAddr = from.parse()?;
        nix::sys::socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
    }
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => bail!("{to} is connected"),
        Err(Errno::EINPROGRESS) => {
            wait_for(socket.as_fd(), PollFlags::POLLOUT, PATIENCE)?;
            Ok(Errno::from_raw(getsockopt(&socket, sockopt::SocketError)?))
        }
        Err(errno) => Ok(errno),
    }
}

#[test]
fn the_container_reaches_no_more_and_no_less_than_before() -> Result<()> {
    require_namespaces!();
    let street = Street::new(&CLIENTS)?;
    let namespace = Namespace::new()?;
    let services = [Family::Tcp4, Family::Tcp6].map(|family| Listener::new(&namespace, &loopback(family)));
    let [v4, v6] = services;
    let (v4, v6) = (v4?, v6?);
    let same = |service: &Listener, ip: &str| format!("{ip}:{}", port(service.address()));
    // Elsewhere, at any port and at the service's own; unbound, and from the service's own address.
    let tries = [
        ("192.0.2.80:80".to_owned(), None),
        (same(&v4, "192.0.2.80"), None),
        (same(&v4, "203.0.113.5"), None),
        (same(&v4, "192.0.2.80"), Some("127.0.0.1:0")),
        ("[2001:db8::80]:80".to_owned(), None),
        (same(&v6, "[2001:db8::80]"), None),
        (same(&v6, "[2001:db8::5]"), None),
        (same(&v6, "[2001:db8::80]"), Some("[::1]:0")),
    ];
    let look = || -> Result<_> {
        let errors =
            tries.iter().map(|(to, from)| outwards(&namespace, to, *from)).collect::<Result<Vec<_>>>()?;
        let routes = [["ip", "-4", "route"], ["ip", "-6", "route"]].map(|words| inside(&namespace, &words));
        Ok((errors, routes.into_iter().collect::<Result<Vec<_>>>()?))
    };
    let before = look()?;
    ensure!(before.0.iter().all(|errno| *errno == Errno::ENETUNREACH), "{before:?}");
    let fronts = (street.front("0.0.0.0:0")?, street.front("[::]:0")?);
    let setup = Setup::new().named(&fronts.0, "four").named(&fronts.1, "six").pid(&namespace);
    let (to4, to6) = (format!("--target=four={}", v4.address()), format!("--target=six={}", v6.address()));
    let forwarder = setup.arg(to4).arg(to6).start()?;
    let at = |front: &Listener, ip: &str| -> Result<Conn> {
        let to = SocketAddr::new(ip.parse()?, port(front.address()));
        Conn::bound_to(&street.namespace, &Address::Tcp(to), Some(ip.parse()?))
    };
    let four = (at(&fronts.0, V4)?, v4.accept()?);
    let six = (at(&fronts.1, V6)?, v6.accept()?);
    ensure!(seen(&four.1)?.ip().to_string() == V4 && seen(&six.1)?.ip().to_string() == V6);
    let during = look()?;
    ensure!(during == before, "before {before:?}, now {during:?}");
    let rules = rules(&namespace)?;
    ensure!(rules.matches("6451823").count() == 2, "a rule each: {rules}");
    drop((four, six));
    forwarder.stop()?;
    Ok(())
}

#[test]
fn two_forwarders_share_a_namespace_and_a_client_its_port() -> Result<()> {
    require_namespaces!();
    for way in WAYS {
        let street = Street::new(&CLIENTS)?;
        let namespace = Namespace::new()?;
        let service = Listener::new(&namespace, &loopback(Family::Tcp4))?;
        let other = Listener::new(&namespace, &loopback(Family::Tcp4))?;
        let fronts = [street.front("0.0.0.0:0")?, street.front("0.0.0.0:0")?, street.front("0.0.0.0:0")?];
        let start = |front: &Listener, service: &Listener| {
            way(Setup::new().socket(front), &namespace).arg(service.address().to_string()).start()
        };
        // Two lead to the same service, so that one of the two connections has to come from another port.
        let forwarders =
            [start(&fronts[0], &service)?, start(&fronts[1], &service)?, start(&fronts[2], &other)?];
        let from = Address::Tcp(format!("{V4}:41000").parse()?);
        let mut ends = Vec::new();
        for (nth, front) in fronts.iter().enumerate() {
            let socket = street.socket(&from)?;
            let Address::Tcp(to) = front.address() else { bail!("TCP") };
            let to = SocketAddr::new(V4.parse()?, to.port());
            match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
                Ok(()) | Err(Errno::EINPROGRESS) => {}
                Err(errno) => bail!("{to}: {errno}"),
            }
            let served = if nth == 2 { other.accept()? } else { service.accept()? };
            ends.push((seen(&served)?, socket, served));
        }
        let seen: Vec<SocketAddr> = ends.iter().map(|(seen, ..)| *seen).collect();
        ensure!(seen.iter().all(|seen| seen.ip().to_string() == V4), "{seen:?}");
        ensure!(seen[0].port() == 41000 && seen[1].port() != 41000, "{seen:?}");
        drop(ends);
        let rules = rules(&namespace)?;
        ensure!(rules.matches("6451823").count() == 2, "one rule for each service: {rules}");
        for forwarder in forwarders {
            forwarder.stop()?;
        }
        // Started again, it finds what is there already.
        let again = start(&fronts[0], &service)?;
        let pair =
            (Conn::bound_to(&street.namespace, &at(&fronts[0], V4)?, Some(V4.parse()?))?, service.accept()?);
        expect_relayed(&pair.0, &pair.1)?;
        drop(pair);
        again.stop()?;
    }
    Ok(())
}

fn at(front: &Listener, ip: &str) -> Result<Address> {
    Ok(Address::Tcp(SocketAddr::new(ip.parse()?, port(front.address()))))
}

/// Each connection says who it is, and the service compares. Few ports, so that each is had again and again, while the kernel still
/// remembers its last connection.
#[test]
fn no_client_is_ever_seen_by_anothers_address() -> Result<()> {
    const ROUNDS: usize = 2000;
    require_namespaces!();
    for (way, relay) in [(WAYS[0], "--relay=splice"), (WAYS[1], "--relay=splice"), (WAYS[0], "--relay=auto")]
    {
        let clients = ["203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.113.4", "203.0.113.5"];
        let street = Street::new(&clients)?;
        let namespace = Namespace::new()?;
        let service = Listener::new(&namespace, &loopback(Family::Tcp4))?;
        let front = street.front("0.0.0.0:0")?;
        let setup = way(Setup::new().socket(&front), &namespace);
        let forwarder = setup.arg(relay).arg(service.address().to_string()).start()?;
        let mut kept: HashMap<bool, usize> = HashMap::new();
        for round in 0..ROUNDS {
            let (ip, own) = (clients[round % clients.len()], 42000 + (round / clients.len() % 7));
            let from = Address::Tcp(format!("{ip}:{own}").parse()?);
            let socket = street.socket(&from)?;
            let to: SocketAddr = format!("{ip}:{}", port(front.address())).parse()?;
            let deadline = Instant::now() + PATIENCE;
            loop {
                match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
                    Ok(()) | Err(Errno::EINPROGRESS) => break,
                    // Its last connection there is not over: what another test is just starting has a copy of that socket.
                    Err(Errno::EADDRNOTAVAIL) if Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(errno) => bail!("round {round}, {from} to {to}: {errno}"),
                }
            }
            let served = service.accept()?;
            let said = from.to_string();
            nix::sys::socket::send(socket.as_raw_fd(), said.as_bytes(), nix::sys::socket::MsgFlags::empty())?;
            let mut heard = vec![0; said.len()];
            served.recv_exact(&mut heard)?;
            ensure!(heard == said.as_bytes(), "{heard:?} came for {said}");
            let came = seen(&served)?;
            ensure!(came.ip().to_string() == ip, "round {round}: {said} is seen as {came}");
            *kept.entry(came.to_string() == said).or_default() += 1;
            // Who ends it first leaves different traces in the kernel.
            if round % 3 == 0 {
                drop(served);
                wait_for(socket.as_fd(), PollFlags::POLLIN, PATIENCE)?;
            }
        }
        println!("{relay}: the client's own port was kept {kept:?}");
        ensure!(kept.get(&true).is_some_and(|kept| *kept > ROUNDS / 2), "{kept:?}");
        ensure!(forwarder.log().complaints().is_empty(), "{:?}", forwarder.log().complaints());
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn a_container_with_a_network_is_shown_its_own_address() -> Result<()> {
    require_namespaces!();
    for way in WAYS {
        let street = Street::new(&CLIENTS)?;
        let namespace = Namespace::new()?;
        inside(&namespace, &["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far"])?;
        inside(&namespace, &["ip", "address", "add", "10.89.7.5/24", "dev", "eth0"])?;
        inside(&namespace, &["ip", "link", "set", "eth0", "up"])?;
        let service = Listener::new(&namespace, &loopback(Family::Tcp4))?;
        let front = street.front("0.0.0.0:0")?;
        for source in ["--source=auto", "--source=container"] {
            let setup = way(Setup::new().socket(&front), &namespace);
            let forwarder = setup.arg(source).arg(service.address().to_string()).start()?;
            for client in [V4, "127.0.0.1"] {
                let ours = Conn::bound_to(&street.namespace, &at(&front, client)?, Some(client.parse()?))?;
                let served = service.accept()?;
                ensure!(seen(&served)?.ip().to_string() == "10.89.7.5", "{source}: {}", seen(&served)?);
                expect_relayed(&ours, &served)?;
            }
            forwarder.stop()?;
        }
        ensure!(!rules(&namespace)?.contains("6451823"), "{}", rules(&namespace)?);
        // Asked for, the client's own can be had there too, for a service on loopback.
        let setup = way(Setup::new().socket(&front), &namespace);
        let forwarder = setup.arg("--source=client").arg(service.address().to_string()).start()?;
        let ours = Conn::bound_to(&street.namespace, &at(&front, V4)?, Some(V4.parse()?))?;
        let served = service.accept()?;
        ensure!(seen(&served)?.ip().to_string() == V4, "{}", seen(&served)?);
        expect_relayed(&ours, &served)?;
        drop((ours, served));
        forwarder.stop()?;
    }
    Ok(())
}

/// As `Network=host`: the service is where its clients come in, and so is their loopback interface.
#[test]
fn on_the_hosts_own_network_clients_are_the_host_and_not_local_ones() -> Result<()> {
    if !met("on_the_hosts_own_network_clients_are_the_host_and_not_local_ones", &[Need::Root]) {
        return Ok(());
    }
    let street = Street::new(&[])?;
    let stranger = street.neighbour(1)?;
    let service = Listener::new(&street.namespace, &loopback(Family::Tcp4))?;
    let front = street.front("0.0.0.0:0")?;
    for way in WAYS {
        let setup = way(Setup::new().socket(&front), &street.namespace);
        let forwarder = setup.arg(service.address().to_string()).start()?;
        for (place, to) in
            [(&stranger, "10.66.1.1"), (&street.namespace, "10.66.1.1"), (&street.namespace, "127.0.0.1")]
        {
            let ours = Conn::new(place, &at(&front, to)?)?;
            let served = service.accept()?;
            ensure!(seen(&served)?.ip().to_string() == "10.66.1.1", "{to}: {}", seen(&served)?);
            expect_relayed(&ours, &served)?;
        }
        forwarder.stop()?;
    }
    ensure!(!rules(&street.namespace)?.contains("6451823"), "{}", rules(&street.namespace)?);
    Ok(())
}

/// The client is reset, and one sentence in the log says why and what mends it.
fn expect_refused(setup: Setup, front: &Listener, service: &Listener, wanted: &str) -> Result<()> {
    let forwarder = setup.socket(front).arg(service.address().to_string()).start()?;
    let client = Conn::new(&Here, front.address())?;
    client.expect_abort()?;
    forwarder
        .log()
        .line(PATIENCE, |line| line.contains(wanted))
        .with_context(|| format!("{:?}", forwarder.log().lines()))?;
    ensure!(service.try_accept(Duration::from_millis(100))?.is_none(), "the service was connected to");
    Ok(())
}

#[test]
fn what_cannot_be_had_is_an_error_and_never_loopback() -> Result<()> {
    require_namespaces!();
    let namespace = Namespace::new()?;
    let service = Listener::new(&namespace, &loopback(Family::Tcp4))?;
    let front = Listener::new(&Here, &loopback(Family::Tcp4))?;
    let setup = Setup::new().pid(&namespace).arg("--source=container");
    expect_refused(setup, &front, &service, "--source=container cannot be had")?;
    if nix::unistd::geteuid().is_root() {
        // In a service that was written before there was this.
        for source in ["--source=auto", "--source=client"] {
            let setup = Setup::new().pid(&namespace).without("net_admin").arg(source);
            expect_refused(setup, &front, &service, "CAP_NET_ADMIN over its network")?;
        }
    }
    inside(&namespace, &["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far"])?;
    inside(&namespace, &["ip", "address", "add", "10.89.7.6/24", "dev", "eth0"])?;
    inside(&namespace, &["ip", "link", "set", "eth0", "up"])?;
    let own = Listener::new(&namespace, &Address::Tcp("10.89.7.6:0".parse()?))?;
    let setup = Setup::new().pid(&namespace).arg("--source=client");
    expect_refused(setup, &front, &own, "a target on the container's network")
}

#[test]
fn clients_of_this_very_network_are_left_as_they_are() -> Result<()> {
    require_namespaces!();
    // All are on one loopback interface, the service too: no client gains anything.
    let namespace = Namespace::new()?;
    let service = Listener::new(&namespace, &loopback(Family::Tcp4))?;
    let front = Listener::new(&namespace, &loopback(Family::Tcp4))?;
    let forwarder = Setup::new().pid(&namespace).socket(&front).arg(service.address().to_string()).start()?;
    let ours = Conn::new(&namespace, front.address())?;
    let served = service.accept()?;
    ensure!(seen(&served)?.ip().is_loopback(), "{}", seen(&served)?);
    ensure!(!rules(&namespace)?.contains("6451823"), "{}", rules(&namespace)?);
    drop((ours, served));
    forwarder.stop().map(drop)
}

/// The kernel relay finds its sockets by these addresses.
#[test]
fn the_kernel_relay_works_with_clients_addresses() -> Result<()> {
    if !met("the_kernel_relay_works_with_clients_addresses", &[Need::Root, Need::Bpf]) {
        return Ok(());
    }
    for (family, client, options) in [
        (Family::Tcp4, V4, &["--relay=sockmap"][..]),
        (Family::Tcp6, V6, &["--relay=sockmap"]),
        (Family::Tcp4, V4, &["--relay=sockmap", "--local-clients=on"]),
        (Family::Tcp4, "127.0.0.1", &["--relay=sockmap", "--local-clients=on"]),
    ] {
        let street = Street::new(&CLIENTS)?;
        let namespace = Namespace::new()?;
        let service = Listener::new(&namespace, &loopback(family))?;
        let front = street.front(if family == Family::Tcp4 { "0.0.0.0:0" } else { "[::]:0" })?;
        let setup = Setup::new().socket(&front).pid(&namespace).args(options.iter().copied());
        let forwarder = setup.arg(service.address().to_string()).start()?;
        let programs = forwarder.kernel_relay()?;
        for _ in 0..4 {
            let ours = Conn::bound_to(&street.namespace, &at(&front, client)?, Some(client.parse()?))?;
            let served = service.accept()?;
            for _ in 0..20 {
                expect_relayed(&ours, &served)?;
            }
            let ip = seen(&served)?.ip().to_string();
            ensure!(ip == if client == "127.0.0.1" { "169.254.1.2" } else { client }, "{ip}");
        }
        let moved =
            process::eventually(PATIENCE, || forwarder.report().is_ok_and(|report| report.total.kernel > 0));
        ensure!(moved, "no byte took a lane: {:?}", forwarder.report()?.total);
        programs.expect_nothing_in_use()?;
        forwarder.stop()?;
    }
    Ok(())
}

/// A successor sees the same namespace.
#[test]
fn a_reload_keeps_the_addresses() -> Result<()> {
    require_namespaces!();
    let street = Street::new(&CLIENTS)?;
    let namespace = Namespace::new()?;
    let service = Listener::new(&namespace, &loopback(Family::Tcp4))?;
    let front = street.front("0.0.0.0:0")?;
    let forwarder = Setup::new().socket(&front).pid(&namespace).arg(service.address().to_string()).start()?;
    let client = || Conn::bound_to(&street.namespace, &at(&front, V4)?, Some(V4.parse()?));
    let (old, served) = (client()?, service.accept()?);
    forwarder.signal(nix::sys::signal::Signal::SIGHUP)?;
    // Both accept for a moment; then the successor does alone.
    for _ in 0..20 {
        let (new, served) = (client()?, service.accept()?);
        ensure!(seen(&served)?.ip().to_string() == V4, "{}", seen(&served)?);
        expect_relayed(&new, &served)?;
    }
    expect_relayed(&old, &served)?;
    Ok(())
}
