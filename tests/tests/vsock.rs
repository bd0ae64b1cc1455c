//! Clients over vsock(7): what any relay does to their bytes and ends, and who they are in log lines, limits and headers.
//!
//! Most of it takes a kernel with vsock_loopback, and is left out without, with a word. `vm` and `emulator` run this suite on kernels that have it, with a
//! few of the behaviours (`BRO_FEW`).
//!
//! Needs: a network namespace. Takes: 30 s with vsock_loopback.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Setup;
use bro_tests::netns::Namespace;
use bro_tests::peers::{Address, Conn, Family, PATIENCE};
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::{relay_behaviours, require_namespaces, vsock};
use nix::sys::socket::{SockType, SockaddrStorage, getsockname};

/// With this variable of the environment only these, for a machine with an emulated processor: bytes, ends, back-pressure and resets, once each.
const FEW: &str = "BRO_FEW";
const THESE_FEW: [&str; 7] = [
    "both_ends_at_once",
    "answer_after_the_clients_half_close",
    "service_half_closes_first_and_reads_on",
    "client_leaves_in_mid_download",
    "client_abort_under_back_pressure",
    "no_side_reads_in_either_direction",
    "closing_line_counts_every_byte",
];

type Behaviour = (&'static str, fn(&Rig) -> Result<()>);

/// Everything that any relay must do, several at once.
fn behaves(test: &str, lane: Lane, legs: Legs) -> Result<()> {
    if !vsock::met(test) {
        return Ok(());
    }
    let mut all: Vec<Behaviour> = relay_behaviours!(relay_suite @list).into();
    if std::env::var_os(FEW).is_some() {
        all.retain(|(name, _)| THESE_FEW.contains(name));
        ensure!(all.len() == THESE_FEW.len(), "only {all:?}");
    }
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some((name, behaviour)) = all.get(next.fetch_add(1, Relaxed)) {
            let run = || {
                let rig = Rig::new(lane, legs)?;
                behaviour(&rig)?;
                rig.finish()
            };
            let began = std::time::Instant::now();
            let ran = run();
            println!("{name}: {:.1} s", began.elapsed().as_secs_f64());
            if let Err(error) = ran {
                failed.lock().expect("no holder of this lock panics").push(format!("{name}: {error:#}"));
            }
        }
    };
    std::thread::scope(|scope| (0..4).map(|_| scope.spawn(work)).for_each(drop));
    let failed = failed.into_inner()?;
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// No relay at all: shows that the suite asks for nothing but what a plain connection does.
#[test]
fn direct() -> Result<()> {
    require_namespaces!();
    behaves("direct", Lane::Direct, Legs::VSOCK)
}

#[test]
fn splice_to_tcp() -> Result<()> {
    require_namespaces!();
    behaves("splice_to_tcp", Lane::Splice, Legs::VSOCK_TO_TCP)
}

#[test]
fn splice_to_a_unix_socket() -> Result<()> {
    require_namespaces!();
    behaves("splice_to_a_unix_socket", Lane::Splice, Legs::VSOCK_TO_UNIX)
}

#[test]
fn copy_to_tcp() -> Result<()> {
    require_namespaces!();
    behaves("copy_to_tcp", Lane::Copy, Legs::VSOCK_TO_TCP)
}

fn scene() -> Result<Scene> {
    Scene::between(Namespace::new()?, Family::Vsock, Family::Tcp4)
}

/// As its log lines name it. Until it is connected, the kernel has it bound to every address.
fn peer(client: &Conn) -> Result<String> {
    match client.address()? {
        Address::Vsock(_, port) => Ok(format!("vsock:1:{port}")),
        other => anyhow::bail!("{other} is no address of vsock"),
    }
}

/// In log lines, and to the limit on one source's connections, which is one machine here. The service sees a client of this machine.
#[test]
fn who_they_are() -> Result<()> {
    require_namespaces!();
    if !vsock::met("who_they_are") {
        return Ok(());
    }
    let mut scene = scene()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--connections-per-source=1"])?;
    let (first, served) = (scene.client()?, service.accept()?);
    expect_relayed(&first, &served)?;
    let seen = Address::of_peer(served.as_fd())?.to_string();
    ensure!(seen.starts_with("169.254.1.2:"), "the service sees {seen}");
    let second = scene.client()?;
    ensure!(second.read_to_end()?.0.is_empty(), "a refused client got bytes");
    let closing = forwarder.closing()?;
    ensure!(closing.reason == "source-limit" && closing.peer == peer(&second)?, "{closing:?}");
    let listens = &forwarder.report()?.listeners[0].address;
    ensure!(*listens == scene.front.address().to_string(), "the status says {listens}");
    let name = peer(&first)?;
    drop((first, served, second));
    let closing = forwarder.closings(2)?.remove(1);
    ensure!(closing.reason == "eof" && closing.peer == name, "{closing:?}");
    forwarder.stop().map(drop)
}

/// Only as `vsock` or `vsock:CID`: a network has none of them in it.
#[test]
fn who_of_them_wakes_nothing() -> Result<()> {
    require_namespaces!();
    if !vsock::met("who_of_them_wakes_nothing") {
        return Ok(());
    }
    for (ignored, is_meant) in
        [("vsock", true), ("vsock:1", true), ("vsock:2", false), ("0.0.0.0/0,::/0,unix", false)]
    {
        let scene = scene()?;
        let forwarder = scene.start(&[&format!("--wake-ignore={ignored}")])?;
        let client = scene.client()?;
        if is_meant {
            client.expect_abort()?;
            ensure!(forwarder.closing()?.reason == "wake-ignored", "{ignored}");
            forwarder.stop()?;
        } else {
            forwarder.log().line(PATIENCE, |line| line.contains("waking the service")).context(ignored)?;
            // Who is held is not seen to leave, as over TCP without a reset: its drain is not waited for.
            forwarder.expect_no_panic()?;
        }
    }
    Ok(())
}

/// The first byte wakes, and nothing before it.
#[test]
fn a_silent_one_wakes_nothing() -> Result<()> {
    require_namespaces!();
    if !vsock::met("a_silent_one_wakes_nothing") {
        return Ok(());
    }
    let mut scene = scene()?;
    let forwarder = scene.start(&["--wake-on=data"])?;
    let (silent, speaks) = (scene.client()?, scene.client()?);
    scene.expect_held(&forwarder, 2)?;
    forwarder.expect_no_spin(Duration::from_millis(300))?;
    ensure!(forwarder.report()?.total.silent == 2, "{:?}", forwarder.report()?.total);
    drop(silent);
    ensure!(forwarder.closing()?.reason == "client-left");
    speaks.send(b"ping")?;
    let served = scene.serve()?.accept()?;
    served.recv_exact(&mut [0; 4])?;
    drop((speaks, served));
    ensure!(forwarder.closings(2)?[1].reason == "eof");
    forwarder.stop().map(drop)
}

/// There is no family for them in the PROXY protocol: the service hears that nothing is known. A trusted one may introduce a client.
#[test]
fn headers() -> Result<()> {
    const NOTHING: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
    require_namespaces!();
    if !vsock::met("headers") {
        return Ok(());
    }
    let mut scene = scene()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--proxy-protocol=v2"])?;
    let (client, served) = (scene.client()?, service.accept()?);
    let mut heard = [0; NOTHING.len()];
    served.recv_exact(&mut heard)?;
    ensure!(heard == NOTHING, "it heard {heard:?}");
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.stop()?;
    let forwarder = scene.start(&["--accept-proxy", "--trusted=vsock:1"])?;
    let client = scene.client()?;
    client.send(b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 443\r\n")?;
    let served = service.accept()?;
    expect_relayed(&client, &served)?;
    let through = peer(&client)?;
    drop((client, served));
    let closing = forwarder.closing()?;
    ensure!(closing.peer == "198.51.100.7:4711", "{closing:?}");
    forwarder.log().line(PATIENCE, |line| line.contains("through=") && line.contains(&through))?;
    forwarder.stop().map(drop)
}

/// Those whom `--connections-max` does not let in are seen waiting.
#[test]
fn those_who_wait() -> Result<()> {
    require_namespaces!();
    if !vsock::met("those_who_wait") {
        return Ok(());
    }
    let mut scene = scene()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&["--connections-max=1"])?;
    let (first, served) = (scene.client()?, service.accept()?);
    expect_relayed(&first, &served)?;
    let second = scene.client()?;
    forwarder.log().line(PATIENCE, |line| line.contains("--connections-max=1"))?;
    drop((first, served));
    let served = service.accept()?;
    expect_relayed(&second, &served)?;
    drop((second, served));
    forwarder.closings(2)?;
    forwarder.stop().map(drop)
}

/// On any kernel with vsock: its streams are listened to, and its messages are refused by their descriptor's name.
#[test]
fn streams_are_taken_and_messages_are_refused() -> Result<()> {
    require_namespaces!();
    let Ok(streams) = vsock::any(SockType::Stream) else {
        let test = "streams_are_taken_and_messages_are_refused";
        bro_tests::tier::lacks(test, "this kernel has no vsock (CONFIG_VSOCKETS)");
        return Ok(());
    };
    let namespace = Namespace::new()?;
    let name: SockaddrStorage = getsockname(streams.as_raw_fd())?;
    let port = name.as_vsock_addr().context("an address of vsock")?.port();
    let setup = || Setup::new().netns(&namespace).arg("127.0.0.1:80");
    let forwarder = setup().descriptor(streams, "vm").start()?;
    forwarder.log().line(PATIENCE, |line| line.contains("listening"))?;
    let said = forwarder.report()?.listeners.remove(0).address;
    ensure!(said == format!("vsock::{port}"), "the status says {said}");
    forwarder.stop()?;
    // Linux has them since 5.14.
    let Ok(messages) = vsock::any(SockType::SeqPacket) else { return Ok(()) };
    let mut refused = setup().descriptor(messages, "vm").start()?;
    refused.expect_exit(3)?;
    let log = refused.log().lines().join("\n");
    ensure!(log.contains("(vm) takes messages over vsock"), "{log}");
    Ok(())
}
