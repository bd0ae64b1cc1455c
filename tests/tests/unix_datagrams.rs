//! Datagrams over unix sockets: each sender's flow, answered where it is bound, nothing lost by a slow service, nothing passed that
//! cannot be.
//!
//! Needs: a network namespace. Takes: seconds.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::Namespace;
use bro_tests::peers::PATIENCE;
use bro_tests::scratch::Scratch;
use bro_tests::{process, require_namespaces};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, bind, sendmsg};

/// Long enough to see that something does not happen.
const MOMENT: Duration = Duration::from_millis(300);

/// A forwarder between a socket here and one of the service's.
struct Scene {
    forwarder: Forwarder,
    folder: Scratch,
    front: UnixAddr,
    back: UnixAddr,
    namespace: Namespace,
}

fn scene(is_abstract: bool, options: &[&str]) -> Result<Scene> {
    let (folder, namespace) = (Scratch::new()?, Namespace::new()?);
    let path = |end: &str| folder.join(end).display().to_string();
    let address = |end: &str| {
        let name = path(end);
        if is_abstract { UnixAddr::new_abstract(name.as_bytes()) } else { UnixAddr::new(name.as_str()) }
    };
    let (front, back) = (address("front")?, address("back")?);
    let target = if is_abstract { format!("@{}", path("back")) } else { path("back") };
    let socket = bro_tests::udp::unix_socket()?;
    bind(socket.as_raw_fd(), &front)?;
    let setup = Setup::new().netns(&namespace).descriptor(socket, "log");
    let forwarder = setup.args(options.iter().map(ToString::to_string)).arg(target).start()?;
    Ok(Scene { forwarder, folder, front, back, namespace })
}

impl Scene {
    fn service(&self) -> Result<UnixDatagram> {
        let socket = self.namespace.unix_datagram_socket()?;
        bind(socket.as_raw_fd(), &self.back)?;
        patient(socket)
    }

    /// Bound to this name in the folder, or to one of the kernel's choice, or not at all.
    fn client(&self, bound: Option<&str>) -> Result<UnixDatagram> {
        let socket = bro_tests::udp::unix_socket()?;
        match bound {
            Some("") => bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?,
            Some(name) => bind(socket.as_raw_fd(), &UnixAddr::new(&self.folder.join(name))?)?,
            None => {}
        }
        nix::sys::socket::connect(socket.as_raw_fd(), &self.front)?;
        patient(socket)
    }

    fn tally(&self) -> Result<bro_relay::flows::DatagramTally> {
        Ok(self.forwarder.report()?.total.datagrams)
    }

    fn dropped(&self, why: &str) -> Result<u64> {
        Ok(self.tally()?.dropped.each().find(|(word, _)| *word == why).map_or(0, |(_, count)| count))
    }
}

fn patient(socket: OwnedFd) -> Result<UnixDatagram> {
    let socket = UnixDatagram::from(socket);
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn expect(at: &UnixDatagram, bytes: &[u8]) -> Result<SocketAddr> {
    let mut buffer = vec![0; 1 << 18];
    let (length, from) =
        at.recv_from(&mut buffer).with_context(|| format!("none of {} bytes", bytes.len()))?;
    ensure!(buffer[..length] == *bytes, "{length} bytes came for {}", bytes.len());
    Ok(from)
}

#[test]
fn each_sender_that_is_bound_is_answered() -> Result<()> {
    require_namespaces!();
    for is_abstract in [false, true] {
        let scene = scene(is_abstract, &[])?;
        // It waits for the service, which is not there yet.
        let clients = [scene.client(Some("one"))?, scene.client(Some(""))?];
        let _sent = clients[0].send(b"early")?;
        let waits = || scene.tally().is_ok_and(|tally| tally.held == 1);
        ensure!(process::eventually(PATIENCE, waits), "{:?}", scene.tally()?);
        let service = scene.service()?;
        let early = expect(&service, b"early").with_context(|| format!("abstract: {is_abstract}"))?;
        let mut from = Vec::new();
        for (client, length) in clients.iter().zip([0, 60_000]) {
            let _sent = client.send(&vec![7; length])?;
            from.push(expect(&service, &vec![7; length])?);
        }
        ensure!(from[0].as_abstract_name() == early.as_abstract_name(), "one sender has two flows");
        ensure!(from[0].as_abstract_name() != from[1].as_abstract_name(), "two senders have one flow");
        for (client, from) in clients.iter().zip(&from).rev() {
            let _sent = service.send_to_addr(b"answer", from)?;
            let seen = expect(client, b"answer")?;
            // From the socket that it wrote to.
            let name = seen.as_pathname().map(|path| path.as_os_str().as_encoded_bytes());
            let name = name.or_else(|| seen.as_abstract_name());
            let front = scene.front.path().map(|path| path.as_os_str().as_encoded_bytes());
            ensure!(name == front.or_else(|| scene.front.as_abstract()), "{seen:?}");
        }
        let tally = scene.tally()?;
        ensure!(
            (tally.flows, tally.to_service.datagrams, tally.to_clients.datagrams) == (2, 3, 2),
            "{tally:?}"
        );
        ensure!(tally.dropped.total() == 0, "{tally:?}");
    }
    Ok(())
}

#[test]
fn a_sender_that_is_not_bound_is_heard() -> Result<()> {
    require_namespaces!();
    let scene = scene(false, &[])?;
    let service = scene.service()?;
    let mut from = Vec::new();
    for word in [b"one", b"two"] {
        let _sent = scene.client(None)?.send(word)?;
        from.push(expect(&service, word)?);
    }
    ensure!(scene.tally()?.flows == 1, "{:?}", scene.tally()?);
    let _sent = service.send_to_addr(b"to none", &from[0])?;
    let dropped = || scene.dropped("unsendable").is_ok_and(|count| count == 1);
    ensure!(process::eventually(PATIENCE, dropped), "{:?}", scene.tally()?);
    scene.forwarder.expect_no_spin(MOMENT)
}

#[test]
fn a_service_that_is_slow_loses_nothing() -> Result<()> {
    require_namespaces!();
    const COUNT: u32 = 3000;
    let scene = scene(false, &[])?;
    let service = scene.service()?;
    let client = scene.client(None)?;
    std::thread::scope(|threads| -> Result<()> {
        let sending = threads.spawn(|| (0..COUNT).try_for_each(|n| client.send(&n.to_be_bytes()).map(drop)));
        // All buffers on the way are full by then, and the forwarder waits as the sender does.
        let full =
            || scene.tally().is_ok_and(|tally| tally.to_service.datagrams > 0 && !sending.is_finished());
        ensure!(process::eventually(PATIENCE, full), "{:?}", scene.tally()?);
        scene.forwarder.expect_no_spin(MOMENT)?;
        for number in 0..COUNT {
            let _from =
                expect(&service, &number.to_be_bytes()).with_context(|| format!("number {number}"))?;
        }
        sending.join().map_err(|_| anyhow::anyhow!("the sender failed"))?.context("sending")
    })?;
    ensure!(scene.tally()?.dropped.total() == 0, "{:?}", scene.tally()?);
    scene.forwarder.expect_no_panic()
}

/// As many as there is room for wait in the forwarder, and then the senders: of one flow, or of many.
#[test]
fn a_service_that_is_late_loses_nothing() -> Result<()> {
    require_namespaces!();
    const COUNT: u32 = 3000;
    let scene = scene(false, &[])?;
    for length in [4, 20_000] {
        let number = |n: u32| {
            let mut bytes = vec![0; length];
            bytes[..4].copy_from_slice(&n.to_be_bytes());
            bytes
        };
        let client = scene.client(None)?;
        let service = std::thread::scope(|threads| -> Result<UnixDatagram> {
            let sending = threads.spawn(|| (0..COUNT).try_for_each(|n| client.send(&number(n)).map(drop)));
            scene.forwarder.expect_no_spin(MOMENT)?;
            ensure!(!sending.is_finished(), "the forwarder takes whatever comes");
            let service = scene.service()?;
            for n in 0..COUNT {
                let _from =
                    expect(&service, &number(n)).with_context(|| format!("number {n} of {length}"))?;
            }
            sending.join().map_err(|_| anyhow::anyhow!("the sender failed"))?.context("sending")?;
            Ok(service)
        })?;
        // Bound senders have a flow each.
        drop(service);
        std::fs::remove_file(scene.back.path().context("a path")?)?;
        let clients: Vec<_> =
            (0..20).map(|name| scene.client(Some(&format!("{length}-{name}")))).collect::<Result<_>>()?;
        std::thread::scope(|threads| -> Result<()> {
            let sending: Vec<_> = clients
                .iter()
                .map(|client| {
                    threads.spawn(|| (0..COUNT / 20).try_for_each(|n| client.send(&number(n)).map(drop)))
                })
                .collect();
            scene.forwarder.expect_no_spin(MOMENT)?;
            let service = scene.service()?;
            let mut next = std::collections::HashMap::<_, u32>::new();
            let mut buffer = vec![0; 1 << 18];
            for _ in 0..COUNT {
                let (got, from) = service.recv_from(&mut buffer).context("not all have come")?;
                let next = next.entry(from.as_abstract_name().map(<[u8]>::to_vec)).or_default();
                ensure!(buffer[..got] == *number(*next), "not the one after {next} of {length}");
                *next += 1;
            }
            ensure!(next.len() == clients.len(), "{} flows", next.len());
            let sent: Vec<_> = sending
                .into_iter()
                .map(|one| one.join().map_err(|_| anyhow::anyhow!("a sender failed")))
                .collect();
            sent.into_iter().try_for_each(|sent| sent?.context("sending"))
        })?;
        std::fs::remove_file(scene.back.path().context("a path")?)?;
    }
    ensure!(scene.tally()?.dropped.total() == 0, "{:?}", scene.tally()?);
    scene.forwarder.expect_no_panic()
}

#[test]
fn a_service_that_has_gone_is_waited_for() -> Result<()> {
    require_namespaces!();
    let scene = scene(false, &[])?;
    let client = scene.client(Some("one"))?;
    let service = scene.service()?;
    let _sent = client.send(b"before")?;
    let _from = expect(&service, b"before")?;
    drop(service);
    std::fs::remove_file(scene.back.path().context("a path")?)?;
    let _sent = client.send(b"waits")?;
    let waits = || scene.tally().is_ok_and(|tally| tally.held == 1);
    ensure!(process::eventually(PATIENCE, waits), "{:?}", scene.tally()?);
    let service = scene.service()?;
    let from = expect(&service, b"waits")?;
    let _sent = service.send_to_addr(b"answer", &from)?;
    let _from = expect(&client, b"answer")?;
    Ok(())
}

#[test]
fn descriptors_are_refused_or_closed_and_counted() -> Result<()> {
    require_namespaces!();
    let scene = scene(false, &[])?;
    let (service, client) = (scene.service()?, scene.client(None)?);
    let _sent = client.send(b"before")?;
    let _from = expect(&service, b"before")?;
    let before = scene.forwarder.descriptors()?;
    let (number, parts) = ([client.as_raw_fd()], [std::io::IoSlice::new(b"with one")]);
    let mut passed = 0;
    for _ in 0..20 {
        let rights = [ControlMessage::ScmRights(&number)];
        match sendmsg::<()>(client.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => passed += 1,
            // A newer kernel refuses them itself.
            Err(Errno::EPERM) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let dropped = || scene.dropped("unsendable").is_ok_and(|count| count == passed);
    ensure!(process::eventually(PATIENCE, dropped), "{:?}", scene.tally()?);
    let _sent = client.send(b"after")?;
    let _from = expect(&service, b"after")?;
    let as_before = || scene.forwarder.descriptors().is_ok_and(|now| now <= before);
    ensure!(
        process::eventually(PATIENCE, as_before),
        "{before} descriptors before, {} now",
        scene.forwarder.descriptors()?
    );
    if passed > 0 {
        drop(scene.forwarder.log().line(PATIENCE, |line| line.contains("datagrams with descriptors"))?);
    }
    Ok(())
}

#[test]
fn flows_are_bounded() -> Result<()> {
    require_namespaces!();
    let scene = scene(false, &["--flows-max=8"])?;
    let service = scene.service()?;
    let mut kept = Vec::new();
    for number in 0..40u8 {
        let client = scene.client(Some(&format!("c{number}")))?;
        let _sent = client.send(&[number])?;
        let from = expect(&service, &[number])?;
        let _sent = service.send_to_addr(&[number], &from)?;
        let _from = expect(&client, &[number])?;
        kept.push(client);
    }
    let tally = scene.tally()?;
    ensure!((tally.flows, tally.open, tally.evicted) == (40, 8, 32), "{tally:?}");
    Ok(())
}
