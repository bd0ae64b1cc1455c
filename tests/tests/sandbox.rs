//! The relay process, in the hands of an attacker who has taken it over: it holds no rights, and what it could do harm with the
//! kernel refuses.
//!
//! Needs: a network namespace. Takes: seconds.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::tests_outside_test_module, reason = "this is a test target")]

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use bro_relay::netns::identity::Identity;
use bro_relay::netns::wire;
use bro_relay::netns::wire::AgentRequest;
use bro_tests::hijack::{Argument, Hijacked, rights};
use bro_tests::netns::{Namespace, Owner};
use bro_tests::peers::{Family, PATIENCE};
use bro_tests::scene::Scene;
use bro_tests::{process, require_namespaces, sys};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockType, SockaddrLike as _, SockaddrStorage, getsockopt, sockopt};

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
    // A socket of netlink's in the namespace, with the rights of its owner, destroys any connection there.
    for socket in process::sockets(forwarder.relay())? {
        let address = nix::sys::socket::getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
        ensure!(address.family() != Some(AddressFamily::Netlink), "it holds {address:?}");
    }
    drop(pair);
    forwarder.stop().map(drop)
}

/// Answers to datagrams are another thread's, which has to enter the sandbox by itself.
#[test]
fn each_thread_of_the_relay_process_holds_no_rights() -> Result<()> {
    require_namespaces!();
    let scene = bro_tests::udp::UdpScene::new(false)?;
    let _echo = scene.echo()?;
    let forwarder = scene.setup()?.start()?;
    bro_tests::udp::expect_echo(&scene.client()?, b"ping")?;
    let threads = std::fs::read_dir(format!("/proc/{}/task", forwarder.relay()))?;
    let threads: Vec<i32> =
        threads.flatten().filter_map(|thread| thread.file_name().to_str()?.parse().ok()).collect();
    ensure!(threads.len() == 2, "there are {} threads", threads.len());
    let own = rights(forwarder.relay())?;
    ensure!(own.iter().any(|(name, value)| name == "Seccomp" && value == "2"), "{own:?}");
    let filters = |thread: i32| -> Result<Option<String>> {
        let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
        Ok(status.lines().find(|line| line.starts_with("Seccomp_filters:")).map(str::to_owned))
    };
    for thread in threads {
        let (its, is_filtered) = (rights(thread)?, filters(thread)?);
        ensure!(its == own, "thread {thread} has {its:?}, and not {own:?}");
        ensure!(is_filtered == filters(forwarder.relay())?, "thread {thread}: {is_filtered:?}");
    }
    forwarder.stop().map(drop)
}

/// What is newer than the list that its service manager has, the control process refuses to itself where it is confined.
#[test]
fn a_confined_control_process_makes_no_new_call_that_it_has_no_need_of() -> Result<()> {
    require_namespaces!();
    for confined in [true, false] {
        let mut scene = Scene::new()?;
        let service = scene.serve()?;
        let setup = scene.setup().arg(scene.target());
        let forwarder = if confined { setup.strict() } else { setup }.start()?;
        let served = (scene.client()?, service.accept()?);
        let waits = || {
            let call = std::fs::read_to_string(format!("/proc/{}/syscall", forwarder.pid()));
            call.is_ok_and(|call| call.split(' ').next() == Some(&libc::SYS_epoll_pwait.to_string()))
        };
        ensure!(process::eventually(PATIENCE, waits), "it does not come to rest");
        let mut hijacked = Hijacked::new(forwarder.pid())?;
        let own = [Argument::Number(forwarder.pid().unsigned_abs().into()), Argument::Number(0)];
        ensure!(hijacked.call(libc::SYS_pidfd_open, &own)?.is_ok(), "no descriptor of itself");
        let nowhere = [Argument::Number(u64::from(u32::MAX)), Argument::Number(0)];
        let answer = hijacked.call(libc::SYS_mount_setattr, &nowhere)?;
        ensure!((answer == Err(Errno::ENOSYS)) == confined, "{confined}: {answer:?}");
        // The kernel may not have these, or may forbid them.
        for call in [libc::SYS_io_uring_setup, libc::SYS_memfd_secret, 1000] {
            let answer = hijacked.call(call, &nowhere)?;
            ensure!(!confined || answer == Err(Errno::ENOSYS), "{call}: {answer:?}");
        }
        drop((hijacked, served));
        forwarder.stop()?;
    }
    Ok(())
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
    let (listeners, sockets): (Vec<_>, Vec<_>) = numbered_sockets(relay)?
        .into_iter()
        .partition(|(_, socket)| getsockopt(socket, sockopt::AcceptConn) == Ok(true));
    ensure!(listeners.len() == 1, "listeners: {listeners:?}");
    let numbers = |of: &[(i64, OwnedFd)]| of.iter().map(|(number, _)| *number).collect::<Vec<_>>();
    let (listeners, sockets) = (numbers(&listeners), numbers(&sockets));
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
    for &listener in &listeners {
        let beyond = Argument::from((7 << 32) | listener);
        let (listener, on) = (Argument::from(listener), Argument::Bytes(&[1, 0, 0, 0]));
        for how in [libc::SHUT_RD, libc::SHUT_WR, libc::SHUT_RDWR] {
            harm.push(("stop systemd's listening", libc::SYS_shutdown, vec![listener, number(how)]));
        }
        // Of an int the kernel looks at the lower half alone.
        harm.push(("stop it in another way", libc::SYS_shutdown, vec![beyond, number(libc::SHUT_RDWR)]));
        let option = vec![listener, number(libc::SOL_SOCKET), number(libc::SO_KEEPALIVE), on, number(4)];
        harm.push(("change what all accepted ones have", libc::SYS_setsockopt, option));
        harm.push(("connect a listener", libc::SYS_connect, vec![listener, book, number(16)]));
        let command = vec![listener, number(libc::F_DUPFD_CLOEXEC), zero];
        harm.push(("give a listener another number", libc::SYS_fcntl, command));
        let command = vec![listener, number(libc::F_SETFL), zero];
        harm.push(("change a listener's flags", libc::SYS_fcntl, command));
    }
    for &socket in sockets.iter().chain(&listeners) {
        let socket = Argument::from(socket);
        let between = Argument::from(start + 8);
        harm.push((
            "connect to what lies between its addresses",
            libc::SYS_connect,
            vec![socket, between, number(16)],
        ));
        let beyond = Argument::from(start + 1024 * 1024);
        harm.push(("connect to what lies behind them", libc::SYS_connect, vec![socket, beyond, number(16)]));
        // There is room for sixteen addresses of one target, and the rest of the page is no address either.
        let rest = Argument::from(start + 16 * ROOM);
        harm.push(("connect to what fills the page", libc::SYS_connect, vec![socket, rest, number(16)]));
        let last = Argument::from(start + 4096 - ROOM);
        harm.push(("connect to the end of the page", libc::SYS_connect, vec![socket, last, number(16)]));
        harm.push((
            "dissolve a connection",
            libc::SYS_connect,
            vec![socket, Argument::Bytes(&unspecified), number(16)],
        ));
        harm.push(("connect elsewhere", libc::SYS_connect, vec![socket, Argument::Bytes(inet), number(16)]));
        harm.push(("connect to the bus", libc::SYS_connect, vec![socket, Argument::Bytes(unix), number(31)]));
        harm.push((
            "bind like a unix socket",
            libc::SYS_bind,
            vec![socket, Argument::Bytes(unix), number(31)],
        ));
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
    let expect_unchanged = || {
        let after = peers()?;
        let kept = before.iter().zip(&after).all(|(before, after)| before.is_none() || before == after);
        ensure!(kept && before.len() == after.len(), "before {before:?}, after {after:?}");
        Ok(())
    };
    // A place of the book where no address stands is none that dissolves a connection. (One that was made without waiting for it
    // says once that it is connected, wherever it is told to.)
    for &socket in &sockets {
        for place in 1..16 {
            for length in [2, 16, 28, 110, 128] {
                let empty = Argument::from(start + place * ROOM);
                let _came = hijacked.call(libc::SYS_connect, &[socket.into(), empty, number(length)])?;
            }
        }
    }
    expect_unchanged()?;
    for socket in sockets {
        let came =
            hijacked.call(libc::SYS_connect, &[Argument::from(socket), Argument::from(start), number(16)])?;
        ensure!(came != Err(Errno::EPERM), "connect is not allowed at all");
    }
    expect_unchanged()?;
    drop(hijacked);
    // And nothing of it has hurt the connection, nor the listener.
    exchange(&client, &served)?;
    let next = (scene.client()?, service.accept()?);
    exchange(&next.0, &next.1)?;
    drop((client, served, next));
    forwarder.stop().map(drop)
}

/// A listener for datagrams has to answer to any address, and so may send from its own; nothing else may come to be in its place.
#[test]
fn a_hijacked_relay_process_sends_datagrams_from_listeners_alone() -> Result<()> {
    require_namespaces!();
    let scene = bro_tests::udp::UdpScene::new(false)?;
    let echo = scene.echo()?;
    let forwarder = scene.setup()?.start()?;
    let client = scene.client()?;
    bro_tests::udp::expect_echo(&client, b"ping")?;
    let relay = forwarder.relay();
    let front = scene.address()?;
    let is_front = |socket: &OwnedFd| {
        let address = nix::sys::socket::getsockname::<SockaddrStorage>(socket.as_raw_fd());
        address.is_ok_and(|address| bro_relay::sockaddr::tcp(&address) == Some(front))
    };
    let (listeners, others): (Vec<_>, Vec<_>) =
        numbered_sockets(relay)?.into_iter().partition(|(_, socket)| is_front(socket));
    let listeners: Vec<i64> = listeners.into_iter().map(|(number, _)| number).collect();
    let [listener] = listeners[..] else { anyhow::bail!("listeners: {listeners:?}") };
    let flow =
        others.iter().find(|(_, socket)| getsockopt(socket, sockopt::SockType) == Ok(SockType::Datagram));
    let flow = flow.context("there is no flow")?.0;
    let mut hijacked = Hijacked::new(relay)?;
    let (zeros, number) = (Argument::Bytes(&[0; 128]), |value: i32| Argument::from(i64::from(value)));
    for (other, _) in &others {
        let socket = Argument::from(*other);
        for call in [libc::SYS_sendmmsg, libc::SYS_sendmsg] {
            let came = hijacked.call(call, &[socket, zeros, number(1), number(libc::MSG_DONTWAIT)])?;
            ensure!(came == Err(Errno::EPERM), "{call} on {other}: {came:?}");
        }
    }
    let socket = Argument::from(listener);
    for (what, call, arguments) in [
        ("close a listener", libc::SYS_close, vec![socket]),
        ("put a flow in its place", libc::SYS_dup2, vec![flow.into(), socket]),
        ("put a flow in its place", libc::SYS_dup3, vec![flow.into(), socket, number(0)]),
        ("connect a listener", libc::SYS_connect, vec![socket, zeros, number(16)]),
        ("send a descriptor", libc::SYS_sendmsg, vec![socket, zeros, number(libc::MSG_DONTWAIT)]),
    ] {
        let came = hijacked.call(call, &arguments)?;
        ensure!(came == Err(Errno::EPERM), "it could {what}: {came:?}");
    }
    drop(hijacked);
    bro_tests::udp::expect_echo(&client, b"pong")?;
    drop(echo);
    forwarder.stop().map(drop)
}

/// Who has made a user namespace has every capability over the network namespaces that belong to it, and holds none.
#[test]
fn a_hijacked_relay_process_has_no_power_over_a_network_of_its_users() -> Result<()> {
    require_namespaces!();
    let namespace = Namespace::owned_by(Owner::UserNamespace)?;
    let mut scene = Scene::between(namespace, Family::Tcp4, Family::Tcp4)?;
    let service = scene.serve()?;
    let forwarder = scene.start(&[])?;
    let (client, served) = (scene.client()?, service.accept()?);
    exchange(&client, &served)?;

    let relay = forwarder.relay();
    let sockets = numbered_sockets(relay)?;
    for (_, socket) in &sockets {
        let address = nix::sys::socket::getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
        ensure!(address.family() != Some(AddressFamily::Netlink), "it holds {address:?}");
    }
    let mut hijacked = Hijacked::new(relay)?;
    let one = Argument::Bytes(&[1, 0, 0, 0]);
    let zeros = Argument::Bytes(&[0; 128]);
    let anything = i64::from(u32::MAX) << 32;
    let (repair, replace, information) = (19, 64, 64);
    let set = [
        ("mark packets", libc::SOL_SOCKET, libc::SO_MARK, one),
        ("repair a connection", libc::IPPROTO_TCP, repair, one),
        ("replace netfilter's tables", libc::SOL_IP, replace, zeros),
        ("replace netfilter's tables for IPv6", libc::SOL_IPV6, replace, zeros),
        ("be transparent", libc::SOL_IP, libc::IP_TRANSPARENT, one),
        ("take more memory than may be", libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, one),
        ("bind to a device", libc::SOL_SOCKET, libc::SO_BINDTODEVICE, Argument::Bytes(b"lo\0\0")),
        ("filter", libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, zeros),
        ("filter by BPF", libc::SOL_SOCKET, libc::SO_ATTACH_BPF, zeros),
        ("lock a filter", libc::SOL_SOCKET, libc::SO_LOCK_FILTER, one),
        ("have another protocol above", libc::IPPROTO_TCP, libc::TCP_ULP, Argument::Bytes(b"tls\0")),
    ];
    for &(number, _) in &sockets {
        let socket = Argument::from(number);
        for (what, level, name, value) in set {
            for noise in [0, anything] {
                let option = [(i64::from(level) | noise).into(), (i64::from(name) | noise).into()];
                let arguments = [socket, option[0], option[1], value, Argument::Number(4)];
                let came = hijacked.call(libc::SYS_setsockopt, &arguments)?;
                ensure!(came == Err(Errno::EPERM), "with {number} it could {what}: {came:?}");
            }
        }
        for (what, level, name) in [
            ("read netfilter's tables", libc::SOL_IP, information),
            ("read a filter", libc::SOL_SOCKET, libc::SO_ATTACH_FILTER),
            ("read a connection's queues", libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE),
        ] {
            let length = Argument::Bytes(&[128, 0, 0, 0]);
            let arguments = [socket, i64::from(level).into(), i64::from(name).into(), zeros, length];
            let came = hijacked.call(libc::SYS_getsockopt, &arguments)?;
            ensure!(came == Err(Errno::EPERM), "with {number} it could {what}: {came:?}");
        }
    }
    // What it needs goes, whatever the unused half of an int holds.
    let connection = sockets.iter().find(|(_, socket)| {
        let peer = bro_tests::peers::Address::of_peer(socket.as_fd());
        peer.is_ok_and(|peer| peer.to_string() == scene.target())
    });
    let connection = Argument::from(connection.context("no connection to the service")?.0);
    let option = [i64::from(libc::SOL_SOCKET) | anything, i64::from(libc::SO_KEEPALIVE) | anything];
    let arguments = [connection, option[0].into(), option[1].into(), one, Argument::Number(4)];
    ensure!(hijacked.call(libc::SYS_setsockopt, &arguments)? == Ok(0), "it cannot do its work");
    drop(hijacked);
    exchange(&client, &served)?;
    drop((client, served));
    forwarder.stop().map(drop)
}

/// What is left to it of bind(2): its targets see a client of its choice, and no other process sees anything.
#[test]
fn a_hijacked_relay_process_is_at_most_a_false_client_of_its_target() -> Result<()> {
    require_namespaces!();
    for source in ["--source=auto", "--source=loopback"] {
        let mut scene = Scene::new()?;
        let service = scene.serve()?;
        let setup = bro_tests::forwarder::Setup::new().socket(&scene.front).pid(&scene.namespace);
        let forwarder = setup.arg(source).arg(scene.target()).start()?;
        let (client, served) = (scene.client()?, service.accept()?);
        exchange(&client, &served)?;
        let relay = forwarder.relay();
        let mut spare = None;
        for ((number, _), socket) in process::descriptors(relay)?
            .into_iter()
            .filter(|(_, what)| what.starts_with("socket:"))
            .zip(process::sockets(relay)?)
        {
            let is_tcp = getsockopt(&socket, sockopt::SockType) == Ok(SockType::Stream)
                && getsockopt(&socket, sockopt::AcceptConn) == Ok(false)
                && matches!(
                    bro_tests::peers::Address::of(socket.as_fd()),
                    Ok(bro_tests::peers::Address::Tcp(_))
                );
            if is_tcp && bro_tests::peers::Address::of_peer(socket.as_fd()).is_err() {
                spare = Some(Argument::from(i64::from(number)));
            }
        }
        let spare = spare.context("the agent has made no spare socket")?;
        let mut hijacked = Hijacked::new(relay)?;
        let number = |value: i32| Argument::from(i64::from(value));
        // sockaddr_in of 203.0.113.99:4242, a path, and an address that is no host's.
        let stranger = Argument::Bytes(b"\x02\0\x10\x92\xcb\0\x71\x63\0\0\0\0\0\0\0\0");
        let path = Argument::Bytes(b"\x01\0/tmp/bro-hija\0");
        let bound = hijacked.call(libc::SYS_bind, &[spare, stranger, number(16)])?;
        if source == "--source=loopback" {
            ensure!(bound == Err(Errno::EPERM), "{bound:?}");
        } else {
            ensure!(bound == Ok(0), "{bound:?}");
            ensure!(
                hijacked.call(libc::SYS_listen, &[spare, number(1)])? == Err(Errno::EPERM),
                "it may listen"
            );
            let elsewhere = Argument::Bytes(b"\x02\0\0\x50\x7f\0\0\x01\0\0\0\0\0\0\0\0");
            let came = hijacked.call(libc::SYS_connect, &[spare, elsewhere, number(16)])?;
            ensure!(came == Err(Errno::EPERM), "it may connect elsewhere: {came:?}");
            let book = std::fs::read_to_string(format!("/proc/{relay}/maps"))?;
            let book = book.lines().find(|line| line.contains("bro-addresses")).context("no address book")?;
            let start = i64::from_str_radix(book.split('-').next().unwrap_or_default(), 16)?;
            let came = hijacked.call(libc::SYS_connect, &[spare, Argument::from(start), number(16)])?;
            ensure!(matches!(came, Ok(0) | Err(Errno::EINPROGRESS)), "{came:?}");
            let false_client = service.accept()?;
            let seen = bro_tests::peers::Address::of_peer(false_client.as_fd())?.to_string();
            ensure!(seen == "203.0.113.99:4242", "{seen}");
            // No file comes of a name that a channel is given.
            for (number_of, _) in
                process::descriptors(relay)?.into_iter().filter(|(_, what)| what.starts_with("socket:"))
            {
                hijacked
                    .call(libc::SYS_bind, &[Argument::from(i64::from(number_of)), path, number(16)])?
                    .ok();
            }
            ensure!(!std::path::Path::new("/tmp/bro-hija").exists(), "it has made a file");
        }
        drop(hijacked);
        exchange(&client, &served)?;
        drop((client, served));
        forwarder.stop()?;
    }
    Ok(())
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
    // There is one to the control process as well. Both ends of a pair are made at once, so their numbers follow each other.
    let number = |socket: &OwnedFd| nix::sys::stat::fstat(socket).map_or(0, |stat| stat.st_ino);
    let agents = process::children(forwarder.pid()).into_iter().filter(|child| *child != forwarder.relay());
    let theirs = agents.map(process::sockets).collect::<Result<Vec<_>>>()?;
    let theirs: Vec<u64> = theirs.iter().flatten().map(number).collect();
    let mut channels = process::sockets(forwarder.relay())?.into_iter();
    let channel = channels.find(|socket| {
        getsockopt(socket, sockopt::SockType) == Ok(SockType::SeqPacket)
            && theirs.contains(&(number(socket) + 1))
    });
    let channel = channel.context("no channel to an agent")?;
    let sockets =
        AgentRequest::Sockets { domain: libc::AF_INET, kind: libc::SOCK_STREAM, protocol: 0, count: 1 };
    let elsewhere = wire::Address::Tcp(([127, 0, 0, 1], 1).into());
    let more = wire::TargetAddresses { addresses: vec![elsewhere], ..Default::default() };
    for (request, refusal) in [
        (sockets, Errno::EPERM),
        (AgentRequest::Join(Identity::Unused), Errno::EPERM),
        (AgentRequest::KeepReplies(wire::Address::Tcp(([127, 0, 0, 1], 1).into())), Errno::EPERM),
        (AgentRequest::Channel(more), Errno::EPERM),
        (AgentRequest::Dial(1, None), Errno::EADDRNOTAVAIL),
        (AgentRequest::Supply(1, 1), Errno::EPERM),
        (AgentRequest::Program, Errno::EPERM),
    ] {
        // The relay process itself reads there as well; it sleeps while nothing is asked and gets no more than an answer it did not
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

/// The relay process ends when it is told to. One that ends without, in whatever order, has failed with all its connections.
#[test]
fn a_relay_process_that_ends_by_itself_is_a_failure() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.start(&[])?;
    let (client, served) = (scene.client()?, service.accept()?);
    exchange(&client, &served)?;
    // It is gone after that, so there is no answer.
    Hijacked::new(forwarder.relay())?.call(libc::SYS_exit_group, &[Argument::Number(0)]).unwrap_err();
    forwarder.expect_exit(1)?;
    let line = forwarder.log().line(bro_tests::peers::PATIENCE, |line| line.starts_with("bro: "))?;
    ensure!(line.contains("the relay process has ended by itself"), "{line}");
    Ok(())
}

/// The room of an address in the address book.
const ROOM: i64 = 128;

/// The sockets of `pid` with the numbers that they have there.
fn numbered_sockets(pid: i32) -> Result<Vec<(i64, OwnedFd)>> {
    let pidfd = sys::pidfd_open(pid)?;
    let sockets = process::descriptors(pid)?.into_iter().filter(|(_, what)| what.starts_with("socket:"));
    sockets.map(|(number, _)| Ok((number.into(), sys::pidfd_getfd(pidfd.as_fd(), number)?))).collect()
}

fn exchange(client: &bro_tests::peers::Conn, service: &bro_tests::peers::Conn) -> Result<()> {
    client.send(b"ping")?;
    service.recv_exact(&mut [0; 4])?;
    service.send(b"pong")?;
    client.recv_exact(&mut [0; 4]).map(drop)
}
