//! The relay process, in the hands of somebody who has taken it over: it holds no rights, and what it could do harm with the
//! kernel refuses.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::tests_outside_test_module, reason = "this is a test target")]

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, ensure};
use bro_tests::hijack::{Argument, Hijacked, rights};
use bro_tests::scene::Scene;
use bro_tests::{process, require_namespaces};
use bro_user::netns::wire::{self, Request};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{SockType, getsockopt, sockopt};

#[test]
fn the_relay_process_holds_no_rights() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&[])?;
    let pair = (scene.client()?, service.accept()?);
    for (name, value) in rights(forwarder.relay())? {
        let wanted = match name.as_str() {
            "NoNewPrivs" => "1",
            "Seccomp" => "2",
            // An ordinary user's bounding set cannot be lessened, and gives nothing either: no_new_privs.
            "CapBnd" if !nix::unistd::geteuid().is_root() => continue,
            _ => "0000000000000000",
        };
        ensure!(value == wanted, "{name} is {value}");
    }
    ensure!(forwarder.relay() != forwarder.pid(), "there is no relay process");
    for (number, what) in process::descriptors(forwarder.relay())? {
        let harmless = [
            "socket:",
            "pipe:",
            "anon_inode:[eventpoll]",
            "anon_inode:bpf-map",
            "anon_inode:bpf-prog",
            "/dev/null",
        ];
        ensure!(
            number <= 2 || harmless.iter().any(|kind| what.starts_with(kind)),
            "the relay process holds {number}: {what}"
        );
    }
    drop(pair);
    forwarder.stop().map(drop)
}

#[test]
fn a_hijacked_relay_process_can_do_no_harm() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&[])?;
    let (client, served) = (scene.client()?, service.accept()?);
    exchange(&client, &served)?;

    let relay = forwarder.relay();
    let sockets = process::descriptors(relay)?.into_iter().filter(|(_, what)| what.starts_with("socket:"));
    let sockets: Vec<i64> = sockets.map(|(number, _)| number.into()).collect();
    let mut hijacked = Hijacked::new(relay)?;
    // That calls are made in its name at all.
    ensure!(hijacked.call(libc::SYS_getpid, &[])? == Ok(u64::try_from(relay)?), "not its pid");

    let number = |value: i32| Argument::from(i64::from(value));
    let parent = i64::from(forwarder.pid());
    // sockaddr_in of 127.0.0.1:80, sockaddr_un of the system bus, and one that dissolves a connection.
    let (inet, unix, unspecified) =
        (b"\x02\0\0\x50\x7f\0\0\x01\0\0\0\0\0\0\0\0", b"\x01\0/run/dbus/system_bus_socket\0", [0u8; 16]);
    let (zero, zeros) = (Argument::Number(0), Argument::Bytes(&[0; 128]));
    let path = Argument::Bytes(b"/etc/passwd\0");
    let mut harm: Vec<(&str, libc::c_long, Vec<Argument<'_>>)> = vec![
        ("make a TCP socket", libc::SYS_socket, vec![number(libc::AF_INET), number(libc::SOCK_STREAM), zero]),
        (
            "make a unix socket",
            libc::SYS_socket,
            vec![number(libc::AF_UNIX), number(libc::SOCK_STREAM), zero],
        ),
        (
            "make a packet socket",
            libc::SYS_socket,
            vec![number(libc::AF_PACKET), number(libc::SOCK_RAW), zero],
        ),
        ("make a socket pair", libc::SYS_socketpair, vec![number(1), number(1), zero, zeros]),
        ("open a file", libc::SYS_openat, vec![number(libc::AT_FDCWD), path, zero]),
        ("open a file the old way", libc::SYS_open, vec![path, zero]),
        (
            "open a file the new way",
            libc::SYS_openat2,
            vec![number(libc::AT_FDCWD), path, zeros, Argument::Number(24)],
        ),
        ("write a file", libc::SYS_creat, vec![Argument::Bytes(b"/tmp/bro-hijacked\0"), number(0o600)]),
        ("remove a file", libc::SYS_unlink, vec![Argument::Bytes(b"/tmp/nothing\0")]),
        ("look at a file", libc::SYS_newfstatat, vec![number(libc::AT_FDCWD), path, zeros, zero]),
        ("read a link", libc::SYS_readlink, vec![Argument::Bytes(b"/proc/self/exe\0"), zeros, number(100)]),
        ("execute", libc::SYS_execve, vec![Argument::Bytes(b"/bin/true\0"), zero, zero]),
        (
            "execute a descriptor",
            libc::SYS_execveat,
            vec![zero, Argument::Bytes(b"\0"), zero, zero, number(libc::AT_EMPTY_PATH)],
        ),
        ("fork", libc::SYS_fork, vec![]),
        ("clone", libc::SYS_clone, vec![number(libc::SIGCHLD), zero, zero, zero, zero]),
        ("clone the new way", libc::SYS_clone3, vec![zeros, Argument::Number(88)]),
        ("kill its parent", libc::SYS_kill, vec![parent.into(), number(libc::SIGKILL)]),
        (
            "kill its parent's thread",
            libc::SYS_tgkill,
            vec![parent.into(), parent.into(), number(libc::SIGKILL)],
        ),
        ("trace its parent", libc::SYS_ptrace, vec![number(16), parent.into(), zero, zero]),
        (
            "read its parent's memory",
            libc::SYS_process_vm_readv,
            vec![parent.into(), zeros, number(1), zeros, number(1), zero],
        ),
        ("watch its parent", libc::SYS_pidfd_open, vec![parent.into(), zero]),
        ("take a descriptor of its parent's", libc::SYS_pidfd_getfd, vec![zero, zero, zero]),
        (
            "write code",
            libc::SYS_mmap,
            vec![
                zero,
                number(4096),
                number(libc::PROT_READ | libc::PROT_EXEC),
                number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
                number(-1),
                zero,
            ],
        ),
        ("load a BPF program", libc::SYS_bpf, vec![number(5), zeros, number(128)]),
        ("make a BPF map", libc::SYS_bpf, vec![number(0), zeros, number(128)]),
        ("open a pinned BPF object", libc::SYS_bpf, vec![number(7), zeros, number(128)]),
        ("open a BPF map by its number", libc::SYS_bpf, vec![number(14), zeros, number(128)]),
        ("enter a namespace", libc::SYS_setns, vec![zero, zero]),
        ("make a namespace", libc::SYS_unshare, vec![number(libc::CLONE_NEWUSER)]),
        ("mount", libc::SYS_mount, vec![path, path, path, zero, zero]),
        ("become another user", libc::SYS_setuid, vec![zero]),
        (
            "change what it is",
            libc::SYS_prctl,
            vec![number(libc::PR_SET_DUMPABLE), number(1), zero, zero, zero],
        ),
        ("use io_uring", libc::SYS_io_uring_setup, vec![number(8), zeros]),
        ("make a memory file", libc::SYS_memfd_create, vec![path, zero]),
        ("use keys", libc::SYS_keyctl, vec![zero]),
    ];
    // Where the addresses stand that it may connect to.
    let book = std::fs::read_to_string(format!("/proc/{relay}/maps"))?;
    let book = book.lines().find(|line| line.contains("bro-addresses")).context("no address book")?;
    ensure!(book.contains(" r--s "), "not read-only: {book}");
    let start = i64::from_str_radix(book.split('-').next().unwrap_or_default(), 16)?;
    let (book, page) = (Argument::from(start), number(4096));
    let writable = number(libc::PROT_READ | libc::PROT_WRITE);
    let fixed = number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let (may_move, to) = (number(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED), Argument::from(start));
    harm.extend([
        ("write its addresses", libc::SYS_mprotect, vec![book, page, writable]),
        ("remove its addresses", libc::SYS_munmap, vec![book, page]),
        ("remove them from below", libc::SYS_munmap, vec![Argument::from(start - 4096), number(8192)]),
        ("replace its addresses", libc::SYS_mmap, vec![book, page, writable, fixed, number(-1), zero]),
        ("move others in their place", libc::SYS_mremap, vec![zeros, page, page, may_move, to]),
        ("move them away", libc::SYS_mremap, vec![book, page, page, number(libc::MREMAP_MAYMOVE)]),
        ("forget them", libc::SYS_madvise, vec![book, page, number(libc::MADV_DONTNEED)]),
        ("lock them elsewhere", libc::SYS_remap_file_pages, vec![book, page, zero, zero, zero]),
    ]);
    for &socket in &sockets {
        let socket = Argument::from(socket);
        let between = Argument::from(start + 8);
        harm.push((
            "connect to what lies between its addresses",
            libc::SYS_connect,
            vec![socket, between, number(16)],
        ));
        let beyond = Argument::from(start + 1024 * 1024);
        harm.push(("connect to what lies behind them", libc::SYS_connect, vec![socket, beyond, number(16)]));
        harm.push((
            "dissolve a connection",
            libc::SYS_connect,
            vec![socket, Argument::Bytes(&unspecified), number(16)],
        ));
        harm.push(("connect elsewhere", libc::SYS_connect, vec![socket, Argument::Bytes(inet), number(16)]));
        harm.push(("connect to the bus", libc::SYS_connect, vec![socket, Argument::Bytes(unix), number(31)]));
        harm.push(("bind", libc::SYS_bind, vec![socket, Argument::Bytes(inet), number(16)]));
        harm.push(("listen", libc::SYS_listen, vec![socket, number(1)]));
        harm.push((
            "send to an address",
            libc::SYS_sendto,
            vec![socket, zeros, number(1), number(libc::MSG_DONTWAIT), Argument::Bytes(unix), number(31)],
        ));
        harm.push(("send a descriptor", libc::SYS_sendmsg, vec![socket, zeros, number(libc::MSG_DONTWAIT)]));
        harm.push((
            "have signals sent",
            libc::SYS_fcntl,
            vec![socket, number(libc::F_SETOWN), parent.into()],
        ));
    }
    for (what, call, arguments) in harm {
        let came = hijacked.call(call, &arguments)?;
        ensure!(came == Err(Errno::EPERM), "it could {what}: {came:?}");
    }
    // A connection leads nowhere else, not even to the target; unconnected sockets that an agent has made lead there.
    let peers = || -> Result<Vec<_>> {
        let sockets = process::sockets(relay)?;
        Ok(sockets.iter().map(|socket| bro_tests::peers::Address::of_peer(socket.as_fd()).ok()).collect())
    };
    let before = peers()?;
    for socket in sockets {
        let came =
            hijacked.call(libc::SYS_connect, &[Argument::from(socket), Argument::from(start), number(16)])?;
        ensure!(came != Err(Errno::EPERM), "connect is not allowed at all");
    }
    let after = peers()?;
    let kept = before.iter().zip(&after).all(|(before, after)| before.is_none() || before == after);
    ensure!(kept && before.len() == after.len(), "before {before:?}, after {after:?}");
    drop(hijacked);
    // And nothing of it has hurt the connection.
    exchange(&client, &served)?;
    drop((client, served));
    forwarder.stop().map(drop)
}

/// The agent connects to the target, and does nothing else for the relay process.
#[test]
fn the_agent_does_nothing_for_the_relay_process_but_connect() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&[])?;
    let (client, served) = (scene.client()?, service.accept()?);
    exchange(&client, &served)?;
    // The channel to the control process is the older one.
    let mut channels = process::sockets(forwarder.relay())?.into_iter();
    let channel = channels.rfind(|socket| getsockopt(socket, sockopt::SockType) == Ok(SockType::SeqPacket));
    let channel = channel.context("no channel to an agent")?;
    let sockets = Request::Sockets { domain: libc::AF_INET, kind: libc::SOCK_STREAM, protocol: 0, count: 1 };
    let elsewhere = wire::Address::Tcp(([127, 0, 0, 1], 1).into());
    let more = wire::Destinations { addresses: vec![elsewhere], ..Default::default() };
    for (request, refusal) in [
        (sockets, Errno::EPERM),
        (Request::Join, Errno::EPERM),
        (Request::Channel(more), Errno::EPERM),
        (Request::Dial(1, None), Errno::EADDRNOTAVAIL),
        (Request::Supply(1, 1), Errno::EPERM),
    ] {
        // The relay process itself reads there as well; it sleeps while nobody asks and gets no more than an answer it did not
        // ask for.
        let mut stopped = Hijacked::new(forwarder.relay())?;
        ensure!(stopped.call(libc::SYS_getpid, &[])?.is_ok(), "it does not answer");
        request.send(channel.as_fd(), &[])?;
        let waiting = bro_tests::peers::wait_for(
            channel.as_fd(),
            nix::poll::PollFlags::POLLIN,
            std::time::Duration::from_secs(5),
        )?;
        ensure!(!waiting.is_empty(), "the agent says nothing to {request:?}");
        let answer = wire::receive_answer(channel.as_fd())?;
        ensure!(
            answer.as_ref().err() == Some(&refusal),
            "{request:?} on {}: {answer:?}",
            channel.as_raw_fd()
        );
    }
    exchange(&client, &served)?;
    drop((client, served));
    forwarder.stop().map(drop)
}

fn exchange(client: &bro_tests::peers::Conn, service: &bro_tests::peers::Conn) -> Result<()> {
    client.send(b"ping")?;
    service.recv_exact(&mut [0; 4])?;
    service.send(b"pong")?;
    client.recv_exact(&mut [0; 4]).map(drop)
}
