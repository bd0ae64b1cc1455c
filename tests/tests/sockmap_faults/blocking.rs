//! Services that block, which must not be hooked.

use super::*;

/// Sockets in blocking mode at both ends: spliced, unless the user asks for more (`--blocking-sockets`).
#[test]
fn blocking_sockets_take_the_lanes_only_when_the_user_asks_for_it() -> Result<()> {
    bro_tests::require_bpf!();
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
    bro_tests::require_bpf!();
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
    bro_tests::require_bpf!();
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
