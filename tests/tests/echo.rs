//! One activation with a socket of every kind that is relayed, and a service behind it that answers whatever comes with the same: TCP and
//! UDP over both families, unix sockets of streams, datagrams and messages, and from one family of streams to the other. And with the same service having
//! all of them itself that can be adopted. (As it takes them from systemd: `host_activate`; over vsock: `vm`.)
//!
//! Needs: a network namespace, python3; MPTCP in the kernel for one test. Takes: seconds.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use anyhow::{Context as _, Result, ensure};
use bro_tests::adopt::{self, Adoption};
use bro_tests::adopt_reports::{is_adopted, is_relayed, says};
use bro_tests::forwarder::Setup;
use bro_tests::netns::Namespace;
use bro_tests::peers::PATIENCE;
use bro_tests::process::Session;
use bro_tests::require_namespaces;
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, find_program, met, skip};
use bro_user::commands::status::{AdoptionReport, ListenerReport};
use bro_user::fallback::FallbackKind;
use nix::libc;
use nix::sys::socket::{
    self, AddressFamily, Backlog, MsgFlags, SockFlag, SockType, SockaddrStorage, UnixAddr, setsockopt,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// The service, in a namespace of its own.
struct Service {
    namespace: Namespace,
    folder: Scratch,
    _process: Session,
}

/// The port of the service, as in the article that this goes back to.
const PORT: u16 = 3000;

/// The service's command line, with its unix sockets in this folder.
fn words(folder: &Scratch) -> Result<Vec<String>> {
    let program = find_program("python3").context("it is there")?.display().to_string();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/services/echo.py").to_owned();
    let mut words = vec![program, script];
    for host in ["127.0.0.1", "::1"] {
        words.extend(["tcp", "udp"].map(|kind| format!("{kind}:{host}:{PORT}")));
    }
    for kind in ["stream", "datagrams", "messages"] {
        words.push(format!("{kind}:{}", folder.join(kind).display()));
    }
    Ok(words)
}

impl Service {
    fn start() -> Result<Self> {
        let (namespace, folder) = (Namespace::new()?, Scratch::new()?);
        let words = words(&folder)?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = bro_tests::street::command(&namespace, &words);
        let mut process = Session(command.stdout(std::process::Stdio::piped()).spawn()?);
        let mut said = [0; 6];
        process.0.stdout.take().context("a pipe")?.read_exact(&mut said).context("the service ended")?;
        ensure!(said == *b"ready\n");
        Ok(Self { namespace, folder, _process: process })
    }

    fn path(&self, kind: &str) -> String {
        self.folder.join(kind).display().to_string()
    }
}

/// A short one, and one that no buffer on the way has room for.
fn expect_stream(mut stream: impl Read + Write + Send, end: impl Fn() -> std::io::Result<()>) -> Result<()> {
    let sent: Vec<u8> = (0..3 << 20).map(|at: u32| (at * 31 + at / 256) as u8).collect();
    stream.write_all(&sent[..5])?;
    let mut first = [0; 5];
    stream.read_exact(&mut first)?;
    ensure!(first == sent[..5]);
    let mut came = Vec::new();
    // The service's answer fills the way back while more is sent, so in steps.
    for part in sent.chunks(1 << 16) {
        stream.write_all(part)?;
        let mut back = vec![0; part.len()];
        stream.read_exact(&mut back)?;
        came.extend(back);
    }
    ensure!(came == sent, "other bytes came back");
    end()?;
    ensure!(stream.read(&mut [0])? == 0, "no end comes back");
    Ok(())
}

fn expect_tcp(stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    expect_stream(&stream, || stream.shutdown(Shutdown::Write))
}

fn expect_unix(stream: UnixStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    expect_stream(&stream, || stream.shutdown(Shutdown::Write))
}

fn messages_listener(path: &str) -> Result<OwnedFd> {
    let listener = messages_socket()?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&listener, Backlog::new(16)?)?;
    Ok(listener)
}

fn messages_socket() -> Result<OwnedFd> {
    let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(20))?;
    Ok(socket)
}

fn expect_streams(addresses: &[SocketAddr], paths: &[String]) -> Result<()> {
    for address in addresses {
        expect_tcp(TcpStream::connect(address)?).with_context(|| format!("TCP at {address}"))?;
    }
    for path in paths {
        expect_unix(UnixStream::connect(path)?).with_context(|| path.clone())?;
    }
    Ok(())
}

/// At these addresses, and at the unix sockets in this folder.
fn expect_datagrams_and_messages(here: &Scratch, udp: &[SocketAddr]) -> Result<()> {
    for address in udp {
        let client = bro_tests::udp::client(*address, None)?;
        for length in [0, 5, 60_000] {
            bro_tests::udp::expect_echo(&client, &vec![7; length])
                .with_context(|| format!("UDP at {address}"))?;
        }
    }
    let client = UnixDatagram::bind(here.join("client"))?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.connect(here.join("datagrams"))?;
    let mut buffer = vec![0; 1 << 18];
    for length in [0, 5, 60_000] {
        let _sent = client.send(&vec![7; length])?;
        ensure!(client.recv(&mut buffer).context("a unix datagram")? == length);
    }
    let client = messages_socket()?;
    socket::connect(client.as_raw_fd(), &UnixAddr::new(&here.join("messages"))?)?;
    for length in [1, 5, 60_000] {
        let _sent = socket::send(client.as_raw_fd(), &vec![7; length], MsgFlags::MSG_NOSIGNAL)?;
        ensure!(
            socket::recv(client.as_raw_fd(), &mut buffer, MsgFlags::empty()).context("a message")? == length
        );
    }
    Ok(())
}

#[test]
fn every_kind_of_socket_of_one_activation() -> Result<()> {
    require_namespaces!();
    if !met("every_kind_of_socket_of_one_activation", &[Need::Program("python3", "python3")]) {
        return Ok(());
    }
    let service = Service::start()?;
    let here = Scratch::new()?;
    let path = |kind: &str| here.join(kind).display().to_string();
    let (tcp4, tcp6) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("[::1]:0")?);
    let (udp4, udp6) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("[::1]:0")?);
    let to_unix = TcpListener::bind("127.0.0.1:0")?;
    let addresses = [
        tcp4.local_addr()?,
        tcp6.local_addr()?,
        udp4.local_addr()?,
        udp6.local_addr()?,
        to_unix.local_addr()?,
    ];
    let inet = |host: &str| format!("{host}:{PORT}");
    // Streams and datagrams of one family share a name, as in one socket unit.
    let sockets: [(OwnedFd, &str); 9] = [
        (tcp4.into(), "v4"),
        (udp4.into(), "v4"),
        (tcp6.into(), "v6"),
        (udp6.into(), "v6"),
        (UnixListener::bind(path("stream"))?.into(), "stream"),
        (UnixDatagram::bind(path("datagrams"))?.into(), "datagrams"),
        (messages_listener(&path("messages"))?, "messages"),
        (to_unix.into(), "tcp-to-unix"),
        (UnixListener::bind(path("to-tcp"))?.into(), "unix-to-tcp"),
    ];
    let targets = [
        ("v4", inet("127.0.0.1")),
        ("v6", inet("[::1]")),
        ("stream", service.path("stream")),
        ("datagrams", service.path("datagrams")),
        ("messages", service.path("messages")),
        ("tcp-to-unix", service.path("stream")),
        ("unix-to-tcp", inet("127.0.0.1")),
    ];
    let setup = Setup::new().netns(&service.namespace);
    let setup = sockets.into_iter().fold(setup, |setup, (socket, name)| setup.descriptor(socket, name));
    let forwarder =
        setup.args(targets.iter().map(|(name, target)| format!("--target={name}={target}"))).start()?;

    expect_streams(&[addresses[0], addresses[1], addresses[4]], &[path("stream"), path("to-tcp")])?;
    expect_datagrams_and_messages(&here, &addresses[2..4])?;
    let report = forwarder.report()?;
    ensure!((report.total.accepted, report.total.datagrams.flows) == (6, 3), "{report:?}");
    ensure!(report.total.datagrams.dropped.total() == 0, "{report:?}");
    forwarder.expect_no_panic()
}

/// The same service has all of them itself that `--adopt=all` gives it, from its listen(2) or bind(2) on; what no service gets is relayed beside them.
#[test]
fn every_kind_of_socket_adopted_as_far_as_it_can_be() -> Result<()> {
    require_namespaces!();
    let test = "every_kind_of_socket_adopted_as_far_as_it_can_be";
    if !met(test, &[Need::Program("python3", "python3")]) {
        return Ok(());
    }
    let (here, inside, namespace) = (Scratch::new()?, Scratch::new()?, Namespace::new()?);
    let path = |kind: &str| here.join(kind).display().to_string();
    let (tcp4, tcp6) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("[::1]:0")?);
    let ((udp4, udp4_passed), (udp6, udp6_passed)) =
        (adopt::datagrams("127.0.0.1:0")?, adopt::datagrams("[::1]:0")?);
    let streams = [tcp4.local_addr()?, tcp6.local_addr()?];
    let datagrams = [udp4.local_addr()?, udp6.local_addr()?];
    let (v4, v6) = (format!("127.0.0.1:{PORT}"), format!("[::1]:{PORT}"));
    let within = |kind: &str| inside.join(kind).display().to_string();
    let adoption = Adoption::new(vec![
        (tcp4.into(), v4.clone()),
        (tcp6.into(), v6.clone()),
        (udp4_passed, v4),
        (udp6_passed, v6),
        (UnixListener::bind(path("stream"))?.into(), within("stream")),
        // Those that no service gets.
        (UnixDatagram::bind(path("datagrams"))?.into(), within("datagrams")),
        (messages_listener(&path("messages"))?, within("messages")),
    ])?;
    let forwarder = adoption.forwarder_that("--adopt=all", &namespace)?.start()?;
    says(&forwarder, "listening")?;
    let early = TcpStream::connect(streams[0])?;
    says(&forwarder, "for its first client")?;
    let words = words(&inside)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let service = adoption.container_in(&namespace, &words)?;
    service.says("ready")?;
    expect_tcp(early).context("the client that has woken it")?;
    expect_streams(&streams, &[path("stream")])?;
    expect_datagrams_and_messages(&here, &datagrams)?;
    let report = forwarder.report()?;
    let (adopted, relayed) = report.listeners.split_at(5);
    let is = |listener: &ListenerReport, so: &dyn Fn(&AdoptionReport) -> bool| {
        listener.adoption.as_ref().is_some_and(so)
    };
    ensure!(adopted.iter().all(|listener| is(listener, &is_adopted)), "{adopted:?}");
    ensure!(relayed.iter().all(|listener| is(listener, &is_relayed(FallbackKind::Kind))), "{relayed:?}");
    // Of the streams it had none, and of the datagrams those of the unix socket.
    ensure!((report.total.accepted, report.total.datagrams.flows) == (1, 1), "{report:?}");
    service.end()?;
    forwarder.stop().map(drop)
}

/// `SocketProtocol=mptcp`: a listener whose clients may speak either, and whose connections no sockmap takes.
#[test]
fn clients_of_multipath_tcp() -> Result<()> {
    require_namespaces!();
    let test = "clients_of_multipath_tcp";
    if !met(test, &[Need::Program("python3", "python3")]) {
        return Ok(());
    }
    if let Err(error) = multipath_socket() {
        skip(test, &format!("this kernel has no MPTCP (CONFIG_MPTCP, net.mptcp.enabled): {error}"));
        return Ok(());
    }
    let service = Service::start()?;
    let root = nix::unistd::geteuid().is_root();
    let relays: &[&[&str]] =
        &[&["--relay=splice"], &["--relay=copy"], &["--relay=sockmap", "--local-clients=on"]];
    for relay in relays.iter().filter(|relay| root || relay.len() == 1) {
        let listener = multipath_socket()?;
        socket::bind(listener.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(([127, 0, 0, 1], 0))))?;
        socket::listen(&listener, Backlog::new(16)?)?;
        let address: SocketAddr = TcpListener::from(listener.try_clone()?).local_addr()?;
        let forwarder = Setup::new()
            .netns(&service.namespace)
            .descriptor(listener, "echo")
            .args(relay.iter().map(ToString::to_string))
            .arg(format!("127.0.0.1:{PORT}"))
            .start()?;
        expect_tcp(TcpStream::connect(address)?).with_context(|| format!("{relay:?}: a client of TCP"))?;
        let client = multipath_socket()?;
        socket::connect(client.as_raw_fd(), &SockaddrStorage::from(address))?;
        expect_tcp(client.into()).with_context(|| format!("{relay:?}: a client of MPTCP"))?;
        forwarder.expect_no_panic()?;
    }
    Ok(())
}

/// In blocking mode; nix has no word for this protocol.
fn multipath_socket() -> Result<OwnedFd> {
    let socket = bro_relay::sys::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)?;
    let socket = TcpStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}
