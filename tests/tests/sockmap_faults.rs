//! What goes wrong around the kernel relay: killed forwarders, services and clients, namespaces that go and come, users who
//! may not have it, services that must not be hooked, and readers who do not read.
//!
//! Needs: root, kernel BTF, python3. Takes: seconds.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_ebpf::{kind, role};
use bro_tests::bro;
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::{Namespace, Pinned};
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Address, Conn, End, Family, Here, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::programs::Programs;
use bro_tests::scene::{expect_relayed, talk_until};
use bro_tests::scratch::Scratch;
use bro_tests::short;
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::tier::{Need, met};
use nix::sys::signal::Signal;

const UP: Pattern = Pattern(0x5151);
const DOWN: Pattern = Pattern(0x6262);
const MIB: u64 = 1 << 20;
const NOBODY: u32 = 65534;
/// More than all buffers between two ends on loopback hold.
const BOUND: u64 = 128 * MIB;
const STUCK: Duration = Duration::from_millis(400);

/// Returns from the test, loudly, without bpf(2).
macro_rules! require_bpf {
    () => {
        if !met(std::thread::current().name().unwrap_or("?"), &[Need::Root, Need::Bpf]) {
            return Ok(());
        }
    };
}

fn rig() -> Result<Rig> {
    Rig::new(Lane::BothLanes, Legs::TCP4)
}

fn forwarder(rig: &Rig) -> Result<&Forwarder> {
    rig.forwarder().context("the lane has one")
}

fn programs(rig: &Rig) -> Result<Programs> {
    Programs::of(forwarder(rig)?.pid())
}

fn kernel_bytes(forwarder: &Forwarder) -> Result<u64> {
    Ok(forwarder.report()?.total.kernel)
}

/// A connection both ends of which are hooked.
fn talking(rig: &Rig) -> Result<(Conn, Conn)> {
    let programs = programs(rig)?;
    let (client, service) = rig.pair()?;
    talk_until(&client, &service, || programs.hooked().is_ok_and(|now| now == 2))?;
    Ok((client, service))
}

/// A connection through whose lane the service's bytes have begun to go, with more stuck on their way: how many were sent.
fn in_mid_stream(rig: &Rig) -> Result<(Conn, Conn, u64)> {
    let (client, service) = talking(rig)?;
    service.pour(UP, 0, 20_000)?;
    client.drink(UP, 0, 20_000)?;
    let sent = service.pour_until_stuck(DOWN, BOUND, STUCK)?;
    Ok((client, service, sent))
}

/// The client got a prefix of what was sent, in order, and then an end of some kind.
fn expect_cut(client: &Conn, sent: u64) -> Result<End> {
    let (came, end) = client.drink_to_end(DOWN, 0)?;
    ensure!(came <= sent, "{came} bytes came of {sent} sent");
    Ok(end)
}

#[test]
fn a_killed_forwarder_leaves_nothing_in_the_kernel() -> Result<()> {
    require_bpf!();
    let rig = rig()?;
    let (client, service, sent) = in_mid_stream(&rig)?;
    let programs = programs(&rig)?;
    let pid = forwarder(&rig)?.pid();
    ensure!(!programs.left().is_empty(), "nothing to leave behind");
    forwarder(&rig)?.signal(Signal::SIGKILL)?;
    ensure!(process::ends(pid, PATIENCE)?, "it survived SIGKILL");
    expect_cut(&client, sent).context("the client")?;
    service.expect_sending_fails().context("the service")?;
    programs.expect_gone()
}

#[test]
fn a_service_killed_in_mid_stream_is_an_abort() -> Result<()> {
    require_bpf!();
    let rig = rig()?;
    let (client, service, sent) = in_mid_stream(&rig)?;
    // What the kernel does to a killed process' socket with bytes unread: a reset.
    client.send(b"never read")?;
    ensure!(!service.stays_silent(PATIENCE)?, "the client's bytes never came");
    drop(service);
    let end = expect_cut(&client, sent)?;
    ensure!(end == End::Aborted, "a truncated stream ended with a clean end");
    forwarder(&rig)?.closings(1)?;
    programs(&rig)?.expect_nothing_in_use()?;
    rig.finish()
}

#[test]
fn a_client_killed_in_mid_stream_is_an_abort() -> Result<()> {
    require_bpf!();
    let rig = rig()?;
    // Its bytes unread, as a killed client's are.
    let (client, service, _) = in_mid_stream(&rig)?;
    drop(client);
    service.expect_sending_fails()?;
    forwarder(&rig)?.closings(1)?;
    programs(&rig)?.expect_nothing_in_use()?;
    rig.finish()
}

#[test]
fn bytes_that_all_take_the_lane_keep_a_connection_alive() -> Result<()> {
    require_bpf!();
    let rig = Rig::with(Lane::BothLanes, Legs::TCP4, |setup| setup.arg("--idle-timeout=1s"))?;
    let (client, service) = talking(&rig)?;
    let begin = std::time::Instant::now();
    let before = kernel_bytes(forwarder(&rig)?)?;
    let mut at = 0;
    while begin.elapsed() < Duration::from_millis(3500) {
        service.pour(DOWN, at, at + 100).context("cut although it was not idle")?;
        client.drink(DOWN, at, at + 100).context("cut although it was not idle")?;
        at += 100;
        // A trickle, far more often than the timeout: a pause, not a wait for something.
        std::thread::sleep(Duration::from_millis(200));
    }
    // Silence does end it.
    client.read_to_end().context("silence never ended it")?;
    let closing = forwarder(&rig)?.closing()?;
    ensure!(closing.reason == "idle-timeout", "{closing:?}");
    ensure!(closing.to_client >= at, "{closing:?}");
    let moved = kernel_bytes(forwarder(&rig)?)? - before;
    ensure!(moved >= at, "{moved} of {at} bytes took the lane: nothing was tested");
    drop(service);
    rig.finish()
}

/// The same for the forwarder's own idle exit, which counts bytes that woke no service.
#[test]
fn bytes_that_all_take_the_lane_keep_the_service_awake() -> Result<()> {
    require_bpf!();
    let idle = |setup: Setup| setup.arg("--idle-by=bytes").arg("--exit-idle-time=1s");
    let rig = Rig::with(Lane::BothLanes, Legs::TCP4, idle)?;
    let (client, service) = talking(&rig)?;
    let begin = std::time::Instant::now();
    let before = kernel_bytes(forwarder(&rig)?)?;
    let (mut at, mut moved) = (0, 0);
    while begin.elapsed() < Duration::from_millis(3500) {
        service.pour(DOWN, at, at + 100).context("left although bytes moved")?;
        client.drink(DOWN, at, at + 100).context("left although bytes moved")?;
        at += 100;
        moved = kernel_bytes(forwarder(&rig)?)? - before;
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(moved >= at, "{moved} of {at} bytes took the lane: nothing was tested");
    let last = std::time::Instant::now();
    ensure!(client.read_to_end()?.1 == End::Eof, "a connection that slept was reset");
    ensure!(last.elapsed() >= Duration::from_millis(700), "left {:?} after the last byte", last.elapsed());
    let closing = forwarder(&rig)?.closing()?;
    ensure!(closing.reason == "idle-exit" && closing.relay == "sockmap", "{closing:?}");
    Ok(())
}

#[test]
fn a_reader_who_does_not_read_stops_the_sender_and_costs_nothing() -> Result<()> {
    require_bpf!();
    let rig = rig()?;
    let (client, service, sent) = in_mid_stream(&rig)?;
    ensure!(kernel_bytes(forwarder(&rig)?)? > 0, "no byte took the lane: nothing was tested");
    forwarder(&rig)?.expect_no_spin(Duration::from_millis(1000))?;
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| -> Result<()> {
            service.pour(DOWN, sent, sent + MIB)?;
            Ok(service.close_writing()?)
        });
        client.drink(DOWN, 0, sent + MIB)?;
        client.expect_eof()?;
        sender.join().expect("the sender does not panic")
    })?;
    drop((client, service));
    rig.finish()
}

#[test]
fn a_namespace_destroyed_in_mid_stream_ends_its_connections() -> Result<()> {
    require_bpf!();
    let scratch = Scratch::new()?;
    let namespace = Namespace::new()?;
    let pinned = Pinned::new(&namespace, scratch.join("ns"))?;
    let service = Listener::new(&namespace, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().args(["--relay=sockmap", "--local-clients=on"]).socket(&front).arg("--netns");
    let forwarder = setup.arg(pinned.path()).arg(service.address().to_string()).start()?;
    let programs = forwarder.kernel_relay()?;
    warm(&forwarder, &front, &service, 1)?;
    let client = Conn::new(&Here, front.address())?;
    let served = service.accept()?;
    expect_relayed(&client, &served)?;
    let sent = served.pour_until_stuck(DOWN, BOUND, STUCK)?;
    // Everything that belongs to it, and the service with it: only the forwarder's own sockets are left inside.
    drop(pinned);
    namespace.destroy();
    drop((served, service));
    let (came, end) = client.drink_to_end(DOWN, 0)?;
    println!("{came} of {sent} bytes came, then {end:?}");
    ensure!(came == sent || end == End::Aborted, "cut after {came} of {sent} bytes, with a clean end");
    drop(client);
    forwarder.closings(2)?;
    programs.expect_nothing_in_use()?;
    forwarder.expect_no_spin(Duration::from_millis(400))?;
    forwarder.stop()?;
    programs.expect_gone()
}

/// One connection after the other until one was hooked: the first shows what the service is.
fn warm(forwarder: &Forwarder, front: &Listener, service: &Listener, count: usize) -> Result<()> {
    for nth in 1..=count {
        let client = Conn::new(&Here, front.address())?;
        let served = service.accept()?;
        expect_relayed(&client, &served)?;
        drop((client, served));
        forwarder.closings(nth)?;
    }
    Ok(())
}

/// Some exchanges over a new connection, some of whose bytes must take a lane.
fn expect_lane(forwarder: &Forwarder, front: &Listener, service: &Listener) -> Result<()> {
    let before = kernel_bytes(forwarder)?;
    let client = Conn::new(&Here, front.address())?;
    let served = service.accept()?;
    for at in 0..20 {
        client.pour(UP, at * 100, (at + 1) * 100)?;
        served.drink(UP, at * 100, (at + 1) * 100)?;
        served.pour(DOWN, at * 500, (at + 1) * 500)?;
        client.drink(DOWN, at * 500, (at + 1) * 500)?;
    }
    drop((client, served));
    let moved = || kernel_bytes(forwarder).is_ok_and(|now| now > before + 1000);
    ensure!(process::eventually(PATIENCE, moved), "no lane: {:?}", forwarder.report()?.total);
    Ok(())
}

#[test]
fn a_service_restarted_in_a_new_namespace_has_lanes_again() -> Result<()> {
    require_bpf!();
    let scratch = Scratch::new()?;
    let path = scratch.join("ns");
    let first = Namespace::new()?;
    let pinned = Pinned::new(&first, path.clone())?;
    let service = Listener::new(&first, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let target = service.address().clone();
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    // The service's lane alone: a client's would hide that there is none.
    let setup = Setup::new().arg("--relay=sockmap").socket(&front).arg("--netns");
    let forwarder = setup.arg(&path).arg(target.to_string()).start()?;
    let programs = forwarder.kernel_relay()?;
    warm(&forwarder, &front, &service, 2)?;
    expect_lane(&forwarder, &front, &service)?;
    for round in 0..2 {
        // The container ends, and another takes its name, its path and its port.
        forwarder.log().forget();
        let fresh = Namespace::new()?;
        nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH)?;
        nix::mount::mount(
            Some(&fresh.path()),
            &path,
            None::<&str>,
            nix::mount::MsFlags::MS_BIND,
            None::<&str>,
        )?;
        let again = Listener::new(&fresh, &target)?;
        warm(&forwarder, &front, &again, 2).with_context(|| format!("round {round}"))?;
        expect_lane(&forwarder, &front, &again).with_context(|| format!("round {round}"))?;
    }
    drop((pinned, service));
    programs.expect_nothing_in_use()?;
    forwarder.stop()?;
    programs.expect_gone()
}

#[test]
fn two_forwarders_to_the_same_address_in_two_namespaces_both_have_lanes() -> Result<()> {
    require_bpf!();
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (one, two) = (Namespace::new()?, Namespace::new()?);
    let first = Listener::new(&one, &loopback)?;
    let second = Listener::new(&two, first.address())?;
    let mut stands = Vec::new();
    for (namespace, service) in [(&one, &first), (&two, &second)] {
        let front = Listener::new(&Here, &loopback)?;
        let setup = Setup::new().arg("--relay=sockmap").netns(namespace).socket(&front);
        let forwarder = setup.arg(service.address().to_string()).start()?;
        let programs = forwarder.kernel_relay()?;
        stands.push((forwarder, programs, front, service));
    }
    for (forwarder, _, front, service) in &stands {
        warm(forwarder, front, service, 2)?;
    }
    for _ in 0..3 {
        for (forwarder, _, front, service) in &stands {
            expect_lane(forwarder, front, service)?;
        }
    }
    // The end of one is nothing to the other.
    let (forwarder, programs, ..) = stands.remove(0);
    forwarder.stop()?;
    programs.expect_gone()?;
    let (forwarder, programs, front, service) = stands.remove(0);
    expect_lane(&forwarder, &front, service)?;
    forwarder.stop()?;
    programs.expect_gone()
}

#[test]
fn an_ordinary_user_who_insists_is_told_why_not() -> Result<()> {
    require_bpf!();
    let service = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().user(NOBODY).arg("--relay=sockmap").socket(&front);
    let mut forwarder = setup.arg(service.address().to_string()).start()?;
    forwarder.expect_exit(5)?;
    let lines = forwarder.log().lines();
    ensure!(
        lines.len() == 1 && lines[0].starts_with("bro: ") && lines[0].contains("CAP_BPF"),
        "not one sentence alone, that tells the mend: {lines:#?}"
    );
    Ok(())
}

#[test]
fn an_ordinary_user_who_does_not_insist_is_served_and_told_once() -> Result<()> {
    require_bpf!();
    let service = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().user(NOBODY).arg("--relay=auto").socket(&front);
    let forwarder = setup.arg(service.address().to_string()).start()?;
    forwarder.log().line(PATIENCE, |line| line.contains("without the kernel relay"))?;
    warm(&forwarder, &front, &service, 3)?;
    let client = Conn::new(&Here, front.address())?;
    let served = service.accept()?;
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| -> Result<()> {
            served.pour(DOWN, 0, 4 * MIB)?;
            Ok(served.close_writing()?)
        });
        client.drink(DOWN, 0, 4 * MIB)?;
        client.expect_eof()?;
        sender.join().expect("the sender does not panic")
    })?;
    drop((client, served));
    let closings = forwarder.closings(4)?;
    ensure!(closings.iter().all(|closing| closing.relay == "splice"), "{closings:?}");
    let log = forwarder.stop()?;
    let says_why = |line: &&String| line.contains("kernel relay") || line.contains("sockmap");
    let lines = log.lines();
    ensure!(lines.iter().filter(says_why).count() == 1, "not exactly one line says why: {lines:#?}");
    ensure!(log.complaints().is_empty(), "{:?}", log.complaints());
    Ok(())
}

/// An echo of a megabyte is a flow in bulk both ways: its lanes are closed while both ends send. A send that was to go through a lane
/// when that happened once failed with EPIPE, two or three times in a thousand.
#[test]
fn a_stream_is_not_cut_off_where_it_leaves_its_lane() -> Result<()> {
    const ROUNDS: usize = 1000;
    require_bpf!();
    let rig = rig()?;
    for round in 0..ROUNDS {
        let (client, service) = rig.pair()?;
        let echoed = std::thread::scope(|scope| {
            let serving = scope.spawn(|| -> Result<()> {
                let mut buffer = vec![0; 64 * 1024];
                loop {
                    match service.recv(&mut buffer).context("the service reads")? {
                        0 => return Ok(service.close_writing()?),
                        got => service.send(&buffer[..got]).context("the service answers")?,
                    }
                }
            });
            // In turn at first, so that there are lanes.
            for _ in 0..4 {
                client.send(b"turn")?;
                client.recv_exact(&mut [0; 4])?;
            }
            let sending = scope.spawn(|| -> Result<()> {
                client.pour(UP, 0, MIB).context("the client sends")?;
                Ok(client.close_writing()?)
            });
            let came = client.drink_to_end(UP, 0).context("the client reads")?;
            serving.join().expect("the service does not panic")?;
            sending.join().expect("the client does not panic")?;
            ensure!(came == (MIB, End::Eof), "{came:?} came back");
            anyhow::Ok(())
        });
        echoed.with_context(|| format!("connection {round}"))?;
    }
    ensure!(kernel_bytes(forwarder(&rig)?)? > 0, "no connection had lanes");
    rig.finish()
}

#[test]
fn thousands_of_short_connections_leave_nothing() -> Result<()> {
    require_bpf!();
    short::leave_nothing(10_000)
}

/// Sockets in blocking mode at both ends: spliced, unless the user asks for more (`--blocking-sockets`).
#[test]
fn blocking_sockets_take_the_lanes_only_when_the_user_asks_for_it() -> Result<()> {
    require_bpf!();
    for asked in [false, true] {
        let namespace = Namespace::new()?;
        let loopback = Family::Tcp4.loopback().context("TCP has one")?;
        let (front, service) = (Listener::new(&Here, &loopback)?, Listener::new(&namespace, &loopback)?);
        let mut setup = Setup::new().args(["--relay=sockmap", "--local-clients=on"]);
        if asked {
            setup = setup.arg("--blocking-sockets");
        }
        let setup = setup.netns(&namespace).socket(&front);
        let forwarder = setup.arg(service.address().to_string()).start()?;
        let programs = forwarder.kernel_relay()?;
        for nth in 1..=3 {
            let client = Conn::new(&Here, front.address())?;
            let served = service.accept()?;
            block(&client)?;
            block(&served)?;
            for at in 0..20 {
                client.pour(UP, at * 100, (at + 1) * 100)?;
                served.drink(UP, at * 100, (at + 1) * 100)?;
                served.pour(DOWN, at * 500, (at + 1) * 500)?;
                client.drink(DOWN, at * 500, (at + 1) * 500)?;
            }
            // The first may have been accepted before there were programs.
            let wanted = if asked { 2 } else { 0 };
            let as_wanted = || programs.hooked().is_ok_and(|hooked| hooked == wanted);
            ensure!(
                nth == 1 || process::eventually(PATIENCE, as_wanted),
                "{:?} hooked, asked: {asked}",
                programs.hooked()
            );
            client.close_writing()?;
            served.expect_eof()?;
            drop((client, served));
            let closing = forwarder.closings(nth)?.remove(nth - 1);
            ensure!((closing.to_service, closing.to_client) == (2000, 10_000), "miscounted: {closing:?}");
            let relay = if asked { "sockmap" } else { "splice" };
            ensure!(nth == 1 || closing.relay == relay, "asked: {asked}, {closing:?}");
        }
        ensure!((kernel_bytes(&forwarder)? > 5_000) == asked, "asked: {asked}, {:?}", forwarder.report()?);
        forwarder.stop()?;
        programs.expect_gone()?;
    }
    Ok(())
}

/// Sets a connection's end to blocking. Its every wait still has a limit.
fn block(conn: &Conn) -> Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::socket::{setsockopt, sockopt};
    let limit = nix::sys::time::TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
    setsockopt(conn, sockopt::ReceiveTimeout, &limit)?;
    setsockopt(conn, sockopt::SendTimeout, &limit)?;
    let flags = OFlag::from_bits_retain(fcntl(conn, FcntlArg::F_GETFL)?);
    fcntl(conn, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A service with blocking sockets, and a timer whose signal comes while it is blocked in send: an SA_RESTART handler lets the
/// call go on, unless something makes it fail.
const TIMED: &str = r#"
import ctypes, signal, socket, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
block = bytes(range(256)) * 256
libc = ctypes.CDLL(None, use_errno=True)
while True:
    connection, _ = listener.accept()
    # libc's own calls: Python would hide an EINTR.
    request = ctypes.create_string_buffer(4)
    longest = 0
    begin = time.monotonic()
    got = libc.recv(connection.fileno(), request, 4, 0)
    waited = time.monotonic() - begin
    if got != 4:
        print("recv", got, ctypes.get_errno(), flush=True)
    for _ in range(256):
        rest = block
        while rest:
            begin = time.monotonic()
            sent = libc.send(connection.fileno(), rest, len(rest), 0)
            longest = max(longest, time.monotonic() - begin)
            # Less than everything is what a signal may do to a send; an error is not.
            if sent < 0:
                print("send", sent, ctypes.get_errno(), flush=True)
                break
            rest = rest[sent:]
        if rest:
            break
    print("blocked", int(waited * 1000), int(longest * 1000), flush=True)
    connection.close()
"#;

/// The same of one that greets its clients while it does not block, and blocks from then on.
const GREETS: &str = r#"
import ctypes, fcntl, os, signal, socket
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, False)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
libc = ctypes.CDLL(None, use_errno=True)
while True:
    connection, _ = listener.accept()
    connection.setblocking(False)
    connection.send(b"hello ")
    connection.send(b"there ")
    fd = connection.fileno()
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    request = ctypes.create_string_buffer(4)
    while (got := libc.recv(fd, request, 4, 0)) > 0:
        libc.send(fd, request, got, 0)
    if got < 0:
        print("recv", ctypes.get_errno(), flush=True)
    connection.close()
"#;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The service, and its namespace.
type PythonSite = (Killed, Namespace);

/// A service in Python in a namespace of its own, with what it says, and a forwarder to it with the kernel relay.
fn in_python(
    program: &str,
    options: &[&str],
) -> Result<(PythonSite, bro_tests::log::Log, Listener, Forwarder)> {
    let namespace = Namespace::new()?;
    let mut command = Command::new(bro::helper());
    command.arg("launch").arg("--").args(namespace.enter()).args(["python3", "-c", program]);
    let mut service = Killed(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
    let says = bro_tests::log::Log::collect(service.0.stdout.take().context("stdout is piped")?);
    let port: u16 = says.line(PATIENCE, |_| true)?.trim().parse()?;
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().args(["--relay=sockmap"]).args(options.iter().copied());
    let target = Address::Tcp(std::net::SocketAddr::from(([127, 0, 0, 1], port)));
    let forwarder = setup.netns(&namespace).socket(&front).arg(target.to_string()).start()?;
    Ok(((service, namespace), says, front, forwarder))
}

#[test]
fn a_service_that_turns_to_blocking_after_its_greeting_never_sees_an_error() -> Result<()> {
    require_bpf!();
    if !met(
        "a_service_that_turns_to_blocking_after_its_greeting_never_sees_an_error",
        &[Need::Program("python3", "python3")],
    ) {
        return Ok(());
    }
    let (_site, says, front, forwarder) = in_python(GREETS, &[])?;
    let programs = forwarder.kernel_relay()?;
    for nth in 1..=4 {
        let client = Conn::new(&Here, front.address())?;
        client.recv_exact(&mut [0; 12])?;
        ensure!(client.stays_silent(STUCK)?, "an answer before the request");
        // Often enough for a lane.
        for _ in 0..10 {
            client.send(b"ping")?;
            client
                .recv_exact(&mut [0; 4])
                .with_context(|| format!("connection {nth}: {:?}", says.lines()))?;
        }
        ensure!(client.stays_silent(STUCK)?, "more than was asked for");
        client.close_writing()?;
        client.expect_eof()?;
        drop(client);
        forwarder.closings(nth)?;
    }
    ensure!(says.lines().len() == 1, "{:?}", says.lines());
    let blocking = |watch: &bro_ebpf::Watch| watch.role == role::SERVICE && watch.kind == kind::BLOCKING;
    ensure!(programs.watched()?.iter().any(blocking), "{:?}", programs.watched());
    forwarder.stop()?;
    programs.expect_gone()
}

#[test]
fn a_blocking_service_with_a_timer_never_sees_an_error() -> Result<()> {
    require_bpf!();
    if !met("a_blocking_service_with_a_timer_never_sees_an_error", &[Need::Program("python3", "python3")]) {
        return Ok(());
    }
    let (_site, says, front, forwarder) = in_python(TIMED, &["--local-clients=on"])?;
    let programs = forwarder.kernel_relay()?;
    for nth in 1..=4 {
        let client = Conn::new(&Here, front.address())?;
        // The service blocks in recv, and its timer goes off there again and again.
        ensure!(client.stays_silent(STUCK)?, "an answer before the request");
        client.send(b"give")?;
        // Not read for a while: and now in send.
        forwarder.expect_no_spin(STUCK)?;
        let (all, end) = client.read_to_end()?;
        ensure!(end == End::Eof && all.len() == 256 * 65536, "{} bytes, {end:?}", all.len());
        ensure!(all.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 256), "wrong bytes");
        drop(client);
        forwarder.closings(nth)?;
    }
    let lines = says.lines();
    ensure!(!lines.iter().any(|line| line.starts_with("send") || line.starts_with("recv")), "{lines:?}");
    // Otherwise no signal had anything to interrupt. (A send that a signal cuts short counts only up to there.)
    let recv_ms = |line: &String| line.strip_prefix("blocked ")?.split(' ').next()?.parse::<u32>().ok();
    let blocked: Vec<u32> = lines.iter().filter_map(recv_ms).collect();
    ensure!(blocked.len() == 4 && blocked.iter().all(|ms| *ms > 100), "never blocked for long: {lines:?}");
    println!("{lines:?}");
    let fit = |watch: &bro_ebpf::Watch| watch.role == role::SERVICE && watch.kind == kind::FIT;
    ensure!(!programs.watched()?.iter().any(fit), "it was hooked: {:?}", programs.watched());
    forwarder.stop()?;
    programs.expect_gone()
}
