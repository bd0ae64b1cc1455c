//! The small helper processes of the suites: one program, so that a test needs nothing but what cargo built.
//!
//! - `peer hold`: a new network namespace (for an ordinary user inside a new user namespace), and sockets made in it on request
//! - `peer launch [OPTIONS] -- PROGRAM ARGS`: becomes PROGRAM, as systemd would have started it
//! - `peer echo [nonblocking]`: answers every byte of every connection of the listening socket that is its stdin, with sockets
//!   in blocking mode or not
//! - `peer strict PROGRAM ARGS`: becomes PROGRAM, under a filter that kills what leaves half of an argument undefined
//! - `peer ask CALL WORD WORD WORD`: makes this system call with these words, in hexadecimal
//! - `peer eat-pipes`: uses up its user's pipe quota until its stdin closes

use std::collections::HashMap;
use std::io::{IoSlice, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result, bail, ensure};
use bro_tests::peers::Family;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    ControlMessage, MsgFlags, SockFlag, SockaddrStorage, accept4, recv, send, sendmsg, setsockopt, sockopt,
};
use nix::unistd::{Gid, Uid};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("hold") => hold(arguments.next().as_deref()),
        Some("launch") => launch(arguments.collect()),
        Some("echo") => echo(arguments.next().as_deref() == Some("nonblocking")),
        Some("strict") => strict(arguments.collect()),
        Some("ask") => ask(arguments.collect()),
        Some("eat-pipes") => eat_pipes(),
        other => bail!("no such helper: {other:?}"),
    }
}

/// `user` asks for a user namespace whatever who we are, `self` for one that maps us to ourselves and not to root.
fn hold(kind: Option<&str>) -> Result<()> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    if !uid.is_root() || kind.is_some() {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context("a user namespace")?;
        std::fs::write("/proc/self/setgroups", "deny")?;
        let inside = |id: u32| if kind == Some("self") { id } else { 0 };
        std::fs::write("/proc/self/uid_map", format!("{} {uid} 1", inside(uid.as_raw())))?;
        std::fs::write("/proc/self/gid_map", format!("{} {gid} 1", inside(gid.as_raw())))?;
    } else {
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
    }
    bro_tests::sys::loopback_up().context("bringing up lo")?;

    let control = std::io::stdin().as_raw_fd();
    send(control, b"ready", MsgFlags::empty())?;
    loop {
        let mut request = [0];
        // The end of the test, however it came, is the end of the namespace.
        if recv(control, &mut request, MsgFlags::empty())? == 0 {
            return Ok(());
        }
        let socket = match request[0] {
            b'4' => Family::Tcp4.socket()?,
            b'6' => Family::Tcp6.socket()?,
            b'd' => bro_tests::udp::socket(false)?,
            b'g' => bro_tests::udp::unix_socket()?,
            b'e' => bro_tests::udp::socket(true)?,
            _ => Family::Unix.socket()?,
        };
        let fds: [RawFd; 1] = [socket.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<SockaddrStorage>(control, &[IoSlice::new(b"s")], &rights, MsgFlags::empty(), None)?;
    }
}

fn launch(arguments: Vec<String>) -> Result<()> {
    let split =
        arguments.iter().position(|argument| argument == "--").context("launch needs `-- PROGRAM`")?;
    let mut command = std::process::Command::new(&arguments[split + 1]);
    command.args(&arguments[split + 2..]);
    let own_pid = std::process::id().to_string();
    let (mut uid, mut without, mut clock) = (None, None, None);
    for option in &arguments[..split] {
        let (name, value) = option.split_once('=').context("options are NAME=VALUE")?;
        match name {
            "listen-fds" => {
                command.env("LISTEN_FDS", value).env("LISTEN_PID", &own_pid);
            }
            "listen-pid" => {
                command.env("LISTEN_PID", value);
            }
            "listen-names" => {
                command.env("LISTEN_FDNAMES", value);
            }
            "watchdog-usec" => {
                command.env("WATCHDOG_USEC", value).env("WATCHDOG_PID", &own_pid);
            }
            "nofile" => {
                let (soft, hard) = value.split_once(':').unwrap_or((value, value));
                setrlimit(Resource::RLIMIT_NOFILE, soft.parse()?, hard.parse()?)?;
            }
            "uid" => uid = Some(value.parse()?),
            "clock" => clock = Some(value),
            "netlink-without" => without = Some(value.parse()?),
            _ => bail!("no such option: {option}"),
        }
    }
    if let Some(uid) = uid {
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(Gid::from_raw(uid), Gid::from_raw(uid), Gid::from_raw(uid))?;
        nix::unistd::setresuid(Uid::from_raw(uid), Uid::from_raw(uid), Uid::from_raw(uid))?;
    }
    if let Some(protocol) = without {
        bro_tests::words::lack_netlink(protocol)?;
    }
    // A session of its own: whatever the program starts can be found, and ended, by its session. After the change of
    // user, which clears the death signal.
    nix::unistd::setsid()?;
    set_pdeathsig(Signal::SIGKILL)?;
    if let Some(path) = clock {
        // The last thing before execve(2), from which on what happens is the program's.
        let computed = bro_tests::process::first_thread_time(std::process::id().cast_signed())?.as_nanos();
        let now = bro_tests::process::monotonic()?.as_nanos();
        std::fs::write(path, format!("{now} {computed}"))?;
    }
    Err(command.exec()).with_context(|| format!("starting {}", arguments[split + 1]))
}

fn strict(arguments: Vec<String>) -> Result<()> {
    let (program, arguments) = arguments.split_first().context("strict needs a program")?;
    let mut command = std::process::Command::new(program);
    command.args(arguments);
    bro_tests::words::be_strict()?;
    Err(command.exec()).with_context(|| format!("starting {program}"))
}

fn ask(arguments: Vec<String>) -> Result<()> {
    let words: Vec<i64> = arguments
        .iter()
        .map(|word| Ok(u64::from_str_radix(word, 16)?.cast_signed()))
        .collect::<Result<_>>()?;
    let [call, first, second, third] = words[..] else { bail!("ask takes a number and three words") };
    bro_tests::sys::ask(call, [first, second, third])?;
    Ok(())
}

fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn echo(nonblocking: bool) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    raise_descriptor_limit()?;
    let listener = std::io::stdin();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let mut connections: HashMap<u64, OwnedFd> = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 1024];
    let mut buffer = vec![0; 64 * 1024];
    let mut flags = SockFlag::SOCK_CLOEXEC;
    flags.set(SockFlag::SOCK_NONBLOCK, nonblocking);
    loop {
        let count = match epoll.wait(&mut events, nix::sys::epoll::EpollTimeout::NONE) {
            Err(Errno::EINTR) => 0,
            result => result?,
        };
        for event in &events[..count] {
            if event.data() == 0 {
                let Ok(raw) = accept4(listener.as_raw_fd(), flags) else { continue };
                // SAFETY: accept4 has just made this descriptor for us and nothing else knows it.
                let socket = unsafe { OwnedFd::from_raw_fd(raw) };
                setsockopt(&socket, sockopt::TcpNoDelay, &true).ok();
                let key = raw.cast_unsigned().into();
                epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
                connections.insert(key, socket);
                continue;
            }
            let Some(socket) = connections.get(&event.data()) else { continue };
            match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EAGAIN) => {}
                Ok(0) | Err(_) => drop(connections.remove(&event.data())),
                // What is sent to this helper is a few bytes at a time: there is room for them.
                Ok(got) => drop(send(socket.as_raw_fd(), &buffer[..got], MsgFlags::MSG_NOSIGNAL)),
            }
        }
    }
}

fn eat_pipes() -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    raise_descriptor_limit()?;
    let mut pipes = Vec::new();
    // Over the soft quota pipe(2) still succeeds, with two pages instead of sixteen.
    loop {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let size = fcntl(&write, FcntlArg::F_GETPIPE_SZ)?;
        pipes.push((read, write));
        if size < 64 * 1024 {
            break;
        }
        ensure!(pipes.len() < 9_000, "the quota never ends: is this an ordinary user?");
    }
    writeln!(std::io::stdout(), "{}", pipes.len())?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
