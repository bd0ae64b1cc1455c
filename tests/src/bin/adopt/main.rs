//! What the adoption suite is made of, beside real services:
//!
//! - `adopt agent TARGET... -- NAME...`: an agent; descriptor 3 is the seccomp socket, then the listeners, then what was stored
//! - `adopt run PATH PROGRAM ARGS`: becomes PROGRAM in namespaces of its own and under the filter, as an OCI runtime makes a container
//! - `adopt executed PID PATH PROGRAM ARGS`: the same in the namespaces of PID, as `podman exec` does
//! - `adopt joined PID PATH PROGRAM ARGS`: as `run`, in the network namespace of PID
//! - `adopt serve KIND PLACE`: a small service that says to each client what address it has, and on its output what happens
//! - `adopt ask ADDRESS`: connects, and prints what it is told; `adopt hello ADDRESS`: the same by a datagram

mod datagrams;

use std::io::{BufRead as _, IoSlice, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use bro_adopt::socket::Place;
use bro_adopt::{Agent, Event, HostListener, Step, Stored, Surroundings};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrStorage, UnixAddr,
    accept, bind, getpeername, listen, setsockopt, shutdown, socket, sockopt,
};
use nix::unistd::{Gid, Uid};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["agent", ref rest @ ..] => agent(rest),
        ["run", path, program, ref rest @ ..] => run(path, program, rest),
        ["executed", pid, path, program, ref rest @ ..] => {
            join(pid)?;
            become_notified(path, "running", program, rest)
        }
        ["joined", pid, path, program, ref rest @ ..] => {
            join(pid)?;
            set_pdeathsig(Signal::SIGKILL)?;
            become_notified(path, "creating", program, rest)
        }
        ["serve", kind, place] => match kind.strip_prefix("datagrams") {
            Some(kind) => datagrams::serve(kind, place),
            None => serve(kind, place),
        },
        ["hello", address] => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            let _sent = socket.send_to(b"hello", address)?;
            let mut said = [0; 64];
            let (length, from) = socket.recv_from(&mut said)?;
            say(&format!("told {} by {from}", String::from_utf8_lossy(&said[..length])))
        }
        ["ask", address] => {
            let mut said = String::new();
            TcpStream::connect(address)?.read_to_string(&mut said)?;
            say(&format!("told {said}"))
        }
        _ => bail!("no such helper: {words:?}"),
    }
}

fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

/// The service manager, and a death at a chosen step.
struct Manager {
    socket: UnixDatagram,
    dies_at: Option<String>,
}

impl Manager {
    fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) {
        let sent = bro_relay::sys::send_with_descriptors(self.socket.as_fd(), text.as_bytes(), descriptors);
        sent.expect("the test's store is there");
    }
}

impl Surroundings for Manager {
    fn store(&mut self, name: &str, descriptor: BorrowedFd<'_>, polled: bool) {
        let poll = if polled { "" } else { "\nFDPOLL=0" };
        self.send(&format!("FDSTORE=1\nFDNAME={name}{poll}"), &[descriptor]);
    }

    fn forget(&mut self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        self.send("BARRIER=1", &[theirs.as_fd()]);
        drop(theirs);
        (&ours).read_exact(&mut [0]).expect_err("nothing is written to it");
    }

    fn tell(&mut self, event: Event) {
        say(&format!("{event:?}")).expect("the test reads");
    }

    fn reached(&mut self, step: Step) {
        if self.dies_at.as_ref().is_some_and(|at| *at == format!("{step:?}")) {
            nix::sys::signal::raise(Signal::SIGKILL).expect("a process may kill itself");
        }
    }
}

fn target(text: &str) -> Place {
    if let Some(address) = text.strip_prefix("udp:").and_then(|text| text.parse().ok()) {
        return Place::Udp(address);
    }
    match (text.strip_prefix('@'), text.parse::<SocketAddr>()) {
        (Some(name), _) => Place::Abstract(name.into()),
        (None, Ok(address)) => Place::Tcp(address),
        (None, Err(_)) => Place::Path(text.into()),
    }
}

fn agent(words: &[&str]) -> Result<()> {
    let split = words.iter().position(|word| *word == "--").context("agent needs `--`")?;
    let mut numbers = 3..;
    let mut next = || bro_relay::sys::adopt(numbers.next().unwrap_or(-1)).context("a descriptor was passed");
    let seccomp = next()?;
    let listeners = words[..split]
        .iter()
        .map(|text| Ok(HostListener { socket: next()?, target: target(text) }))
        .collect::<Result<_>>()?;
    let stored = words[split + 1..]
        .iter()
        .map(|name| Ok(Stored { name: (*name).into(), descriptor: next()? }))
        .collect::<Result<_>>()?;
    let socket = UnixDatagram::unbound()?;
    socket.connect(std::env::var_os("NOTIFY_SOCKET").context("a store")?)?;
    let manager = Manager { socket, dies_at: std::env::var("DIES_AT").ok() };
    let mut agent = Agent::new(listeners, seccomp, stored, manager)?;
    say("answering")?;
    let input = std::io::stdin();
    Ok(agent.run(input.as_fd())?)
}

/// The filter, the state and the descriptor to `path`, the program: what crun does.
fn become_notified(path: &str, status: &str, program: &str, arguments: &[&str]) -> Result<()> {
    let runtime = UnixStream::connect(path).context("opening the seccomp receiver")?;
    let notify = bro_tests::sys::notify_of_listening().context("seccomp(2)")?;
    let pid = std::process::id();
    let state = format!(
        r#"{{"ociVersion":"1.0","fds":["seccompFd"],"pid":{pid},"metadata":"bro","state":{{"ociVersion":"1.0","id":"test","status":"{status}","pid":{pid},"bundle":"/"}}}}"#
    );
    let rights = [notify.as_raw_fd()];
    let rights = [nix::sys::socket::ControlMessage::ScmRights(&rights)];
    let parts = [IoSlice::new(state.as_bytes())];
    let flags = nix::sys::socket::MsgFlags::empty();
    nix::sys::socket::sendmsg::<SockaddrStorage>(runtime.as_raw_fd(), &parts, &rights, flags, None)?;
    drop((runtime, notify));
    Err(std::process::Command::new(program).args(arguments).exec())
        .with_context(|| format!("starting {program}"))
}

fn run(path: &str, program: &str, arguments: &[&str]) -> Result<()> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context("namespaces")?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    set_pdeathsig(Signal::SIGKILL)?;
    bro_tests::sys::loopback_up()?;
    // As a container's, which may bind ports below 1024 (net.ipv4.ip_unprivileged_port_start, as Podman sets it).
    std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0").ok();
    become_notified(path, "creating", program, arguments)
}

/// Enters that process's namespaces.
fn join(pid: &str) -> Result<()> {
    let path = |of: &str, name: &str| format!("/proc/{of}/ns/{name}");
    let (user, net) = (std::fs::File::open(path(pid, "user"))?, std::fs::File::open(path(pid, "net"))?);
    // The own one cannot be entered.
    if std::fs::read_link(path(pid, "user"))? != std::fs::read_link(path("self", "user"))? {
        setns(user, CloneFlags::CLONE_NEWUSER)?;
    }
    Ok(setns(net, CloneFlags::CLONE_NEWNET)?)
}

fn bound(place: &str, flags: SockFlag) -> Result<OwnedFd> {
    let stream = |family| socket(family, SockType::Stream, flags, None);
    Ok(match place.trim_start_matches("only").parse::<SocketAddr>() {
        Ok(SocketAddr::V4(address)) => {
            let made = stream(AddressFamily::Inet)?;
            setsockopt(&made, sockopt::ReuseAddr, &true)?;
            bind(made.as_raw_fd(), &SockaddrIn::from(address))?;
            made
        }
        Ok(SocketAddr::V6(address)) => {
            let made = stream(AddressFamily::Inet6)?;
            setsockopt(&made, sockopt::ReuseAddr, &true)?;
            setsockopt(&made, sockopt::Ipv6V6Only, &place.starts_with("only"))?;
            bind(made.as_raw_fd(), &SockaddrIn6::from(address))?;
            made
        }
        Err(_) => {
            let made = stream(AddressFamily::Unix)?;
            bind(made.as_raw_fd(), &UnixAddr::new(place)?)?;
            made
        }
    })
}

/// Greets one client after the other.
fn greets_all(listener: &OwnedFd) -> Result<()> {
    loop {
        greet(&taken(listener.as_fd())?)?;
    }
}

/// Says to the client what address it has.
fn greet(connection: &OwnedFd) -> Result<()> {
    let peer = getpeername::<SockaddrStorage>(connection.as_raw_fd())?;
    let text = match (peer.as_sockaddr_in(), peer.as_sockaddr_in6()) {
        (Some(v4), _) => v4.to_string(),
        (_, Some(v6)) => v6.to_string(),
        _ => "unix".into(),
    };
    nix::unistd::write(connection, text.as_bytes())?;
    Ok(())
}

fn taken(listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    bro_relay::sys::accept(listener)
        .map(|(connection, _)| connection)
        .map_err(|error| bro_relay::sys::errno_of(&error))
}

fn serve(kind: &str, place: &str) -> Result<()> {
    match kind {
        "plain" => plain(place),
        "epoll" | "epoll-edge" => watched(place, kind == "epoll-edge"),
        "workers" => workers(place),
        "slow" => slow(place),
        "asked" => asked(place),
        "shut" => shut(place),
        "callers" => callers(place),
        "closes" => closes(place),
        "options" => options(place),
        "keeps" => keeps(place),
        "costs" => costs(place),
        "timed" => timed(place),
        "lies" => lies(place),
        "flood" => {
            flood();
            plain(place)
        }
        "flood-later" => flood_later(place),
        #[cfg(target_arch = "x86_64")]
        "foreign" => foreign(place),
        _ => bail!("no such service: {kind}"),
    }
}

/// Blocking, one client after the other.
fn plain(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    listen(&listener, Backlog::new(16)?)?;
    listen(&listener, Backlog::new(8)?).context("a second time")?;
    let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", listener.as_raw_fd()))?;
    say(&format!("ready {}", flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default()))?;
    greets_all(&listener)
}

/// Says when it is about to listen, and serves.
fn timed(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    let listens = bro_tests::process::monotonic()?;
    listen(&listener, Backlog::new(16)?)?;
    let client = taken(listener.as_fd())?;
    greet(&client)?;
    drop(client);
    say(&format!("listens {}", listens.as_nanos()))?;
    greets_all(&listener)
}

/// Takes one client, and answers it when it is told to.
fn slow(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    listen(&listener, Backlog::new(16)?)?;
    let client = taken(listener.as_fd())?;
    say("accepted")?;
    drop(std::io::stdin().lock().lines().next().transpose()?);
    greet(&client)?;
    drop(client);
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Takes all clients, and keeps them.
fn keeps(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    listen(&listener, Backlog::new(16)?)?;
    say("ready")?;
    let mut kept = Vec::new();
    loop {
        kept.push(taken(listener.as_fd())?);
    }
}

/// Says how long calls took, in nanoseconds: bind(2) and listen(2) at sixteen ports from this one on, then shutdown(2) of a socket that no one waits at.
fn costs(place: &str) -> Result<()> {
    const CALLS: u32 = 10;
    let first: SocketAddr = place.parse()?;
    for number in 0..16 {
        let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let address = SockaddrStorage::from(SocketAddr::new(first.ip(), first.port() + number));
        let began = Instant::now();
        bind(made.as_raw_fd(), &address)?;
        let bound = began.elapsed();
        listen(&made, Backlog::new(16)?)?;
        let listening = began.elapsed();
        say(&format!("bind {}", bound.as_nanos()))?;
        say(&format!("listen {}", (listening - bound).as_nanos()))?;
    }
    let (one, _other) = UnixStream::pair()?;
    for _ in 0..300 {
        let began = Instant::now();
        for _ in 0..CALLS {
            shutdown(one.as_raw_fd(), Shutdown::Both)?;
        }
        say(&format!("shutdown {}", (began.elapsed() / CALLS).as_nanos()))?;
    }
    say("done")?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Answers each client when that has said something.
fn asked(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    listen(&listener, Backlog::new(16)?)?;
    say("ready")?;
    loop {
        let client = taken(listener.as_fd())?;
        std::thread::spawn(move || -> Result<()> {
            let mut stream = std::net::TcpStream::from(client.try_clone()?);
            stream.set_nonblocking(false)?;
            stream.read_exact(&mut [0])?;
            greet(&client)
        });
    }
}

/// Two processes that listen at a socket which their parent has bound.
fn workers(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    for _ in 0..2 {
        if bro_relay::sys::fork()?.is_some() {
            continue;
        }
        listen(&listener, Backlog::new(16)?)?;
        let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", listener.as_raw_fd()))?;
        say(&format!("ready {}", flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default()))?;
        return greets_all(&listener);
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Has its socket watched before it is bound.
fn watched(place: &str, edge: bool) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let listener = bound(place, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    let mut wanted = EpollFlags::EPOLLIN;
    wanted.set(EpollFlags::EPOLLET, edge);
    epoll.add(&listener, EpollEvent::new(wanted, 0xfeed_0000_0000_0007))?;
    listen(&listener, Backlog::new(16)?)?;
    // The service goes on to know its registration by the number.
    epoll.modify(&listener, &mut EpollEvent::new(wanted, 0xfeed_0000_0000_0008)).context("EPOLL_CTL_MOD")?;
    say("ready")?;
    loop {
        let mut events = [EpollEvent::empty(); 8];
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) => ensure!(events[0].data() == 0xfeed_0000_0000_0008, "foreign data"),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        loop {
            match taken(listener.as_fd()) {
                Ok(connection) => greet(&connection)?,
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Has processes and threads, more than an agent remembers, shut connections down one after the other, each twice. The processes' sockets have one
/// number, and are other sockets.
fn callers(place: &str) -> Result<()> {
    const EACH: usize = 2 * bro_adopt::caller::MOST_LATE;
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    listen(&listener, Backlog::new(16)?)?;
    say("ready")?;
    for _ in 0..EACH {
        match bro_relay::sys::fork()? {
            None => std::process::exit(i32::from(shuts_its_own().is_err())),
            Some(child) => {
                let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None)?;
                ensure!(matches!(ended, nix::sys::wait::WaitStatus::Exited(_, 0)), "{ended:?}");
            }
        }
    }
    for _ in 0..EACH {
        std::thread::spawn(shuts_its_own)
            .join()
            .map_err(|_panicked| anyhow::anyhow!("the thread panicked"))??;
    }
    say("each its own")?;
    greets_all(&listener)
}

/// Shuts one end of each of two connections down, which the other end of that one sees.
fn shuts_its_own() -> Result<()> {
    for _ in 0..2 {
        let (one, mut other) = UnixStream::pair()?;
        other.set_nonblocking(true)?;
        let before = other.read(&mut [0]).map_err(|error| error.kind());
        ensure!(before == Err(std::io::ErrorKind::WouldBlock), "{before:?}");
        shutdown(one.as_raw_fd(), Shutdown::Both)?;
        let after = other.read(&mut [0]).map_err(|error| error.kind());
        ensure!(after == Ok(0), "{after:?}");
    }
    Ok(())
}

/// Shuts its listener down while a thread waits in accept(2).
fn shut(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    listen(&listener, Backlog::new(16)?)?;
    let number = listener.as_raw_fd();
    let waiting = std::thread::spawn(move || {
        loop {
            match accept(number) {
                Ok(connection) => {
                    say("accepted").ok();
                    nix::unistd::close(connection).ok();
                }
                Err(errno) => return errno,
            }
        }
    });
    say("ready")?;
    drop(std::io::stdin().lock().lines().next().transpose()?);
    let how = shutdown(number, Shutdown::Both);
    say(&format!("shutdown {how:?}"))?;
    let errno = waiting.join().map_err(|_panicked| anyhow::anyhow!("the thread panicked"))?;
    say(&format!("accept {errno:?}"))?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Closes its listener when it is told to, and listens again when it is told so once more.
fn closes(place: &str) -> Result<()> {
    let mut lines = std::io::stdin().lines();
    loop {
        let listener = bound(place, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        listen(&listener, Backlog::new(16)?)?;
        say("ready")?;
        let word = lines.next();
        // All that are there are served before.
        while let Ok(client) = taken(listener.as_fd()) {
            greet(&client)?;
        }
        drop(listener);
        say("closed")?;
        if word.is_none() || lines.next().is_none() {
            return Ok(());
        }
    }
}

/// Sets options before it listens, and says what its clients' sockets have of them.
fn options(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
    setsockopt(&listener, sockopt::KeepAlive, &true)?;
    setsockopt(&listener, sockopt::TcpKeepIdle, &77)?;
    setsockopt(&listener, sockopt::RcvBuf, &30_000)?;
    listen(&listener, Backlog::new(16)?)?;
    say("ready")?;
    loop {
        let connection = taken(listener.as_fd())?;
        let get = |level, name| bro_adopt::socket::number(connection.as_fd(), level, name);
        let text = format!(
            "nodelay {} keepalive {} idle {} buffer {}",
            get(libc::SOL_TCP, libc::TCP_NODELAY)?,
            get(libc::SOL_SOCKET, libc::SO_KEEPALIVE)?,
            get(libc::SOL_TCP, libc::TCP_KEEPIDLE)?,
            get(libc::SOL_SOCKET, libc::SO_RCVBUF)?,
        );
        nix::unistd::write(&connection, text.as_bytes())?;
    }
}

/// Calls that mean nothing, and what it is answered; then it serves.
fn lies(place: &str) -> Result<()> {
    let file = std::fs::File::open("/dev/null")?;
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let fresh = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let ask = |call: libc::c_long, number: i64, word: i64| {
        let result = bro_tests::sys::ask(call, [number, word, 0]);
        result
            .map_or_else(|error| format!("{:?}", bro_relay::sys::errno_of(&error)), |value| value.to_string())
    };
    let number = |fd: BorrowedFd<'_>| i64::from(fd.as_raw_fd());
    for (what, said) in [
        ("listen at nothing", ask(libc::SYS_listen, 999, 1)),
        ("listen at a file", ask(libc::SYS_listen, number(file.as_fd()), 1)),
        ("listen at datagrams", ask(libc::SYS_listen, number(datagrams.as_fd()), 1)),
        ("listen unbound", ask(libc::SYS_listen, number(fresh.as_fd()), 1)),
        ("bind at no address", ask(libc::SYS_bind, number(fresh.as_fd()), 8)),
        ("shutdown of nothing", ask(libc::SYS_shutdown, 999, 2)),
        ("shutdown of a file", ask(libc::SYS_shutdown, number(file.as_fd()), 2)),
        ("shutdown in no way", ask(libc::SYS_shutdown, number(fresh.as_fd()), 7)),
        ("shutdown of datagrams", ask(libc::SYS_shutdown, number(datagrams.as_fd()), 2)),
    ] {
        say(&format!("{what}: {said}"))?;
    }
    plain(place)
}

/// Listens before its threads begin to make calls.
fn flood_later(place: &str) -> Result<()> {
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    listen(&listener, Backlog::new(16)?)?;
    flood();
    say("ready")?;
    greets_all(&listener)
}

/// Has threads make notified calls without a pause.
fn flood() {
    for _ in 0..4 {
        std::thread::spawn(|| {
            let Ok(made) = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None) else {
                return;
            };
            loop {
                let number = i64::from(made.as_raw_fd());
                drop(bro_tests::sys::ask(libc::SYS_shutdown, [number, 2, 0]));
                drop(bro_tests::sys::ask(libc::SYS_listen, [-1, 0, 0]));
            }
        });
    }
}

/// Calls of i386, at the listener: listen, and what would end systemd's listening.
#[cfg(target_arch = "x86_64")]
fn foreign(place: &str) -> Result<()> {
    const LISTEN: i64 = 363;
    const SHUTDOWN: i64 = 373;
    let listener = bound(place, SockFlag::SOCK_CLOEXEC)?;
    let number = i64::from(listener.as_raw_fd());
    say(&format!("listen {}", bro_tests::sys::ask_as_i386(LISTEN, [number, 16])))?;
    listen(&listener, Backlog::new(16)?)?;
    say(&format!("shutdown {}", bro_tests::sys::ask_as_i386(SHUTDOWN, [number, 2])))?;
    say("ready")?;
    greets_all(&listener)
}
