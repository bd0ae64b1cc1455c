//! What the kernel relay takes for granted of the running kernel, fact by fact. A kernel on which one of these fails is a kernel
//! on which the relay would lose bytes, hang a service or leak: better here than there.

mod kernel_relay;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bro_ebpf::MESSAGE_OVERHEAD;
use bro_sockmap::{
    Config, Event, Kernel, Reason, Refused, Role, SenderKind, Unavailable, netns_cookie, send_memory,
};
use bro_tests::require;
use bro_tests::tier::Need;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{self, MsgFlags};

use kernel_relay::content::Stream;
use kernel_relay::{Bench, LIMIT, await_poll, connect_nonblocking, pair, receive, receive_end, send};

const CONFIG: Config = Config { connections: 16, hook_blocking: false, bear_fionread: true, trace: false };
const BPFTOOL: Need = Need::Program("bpftool", "bpftool");

/// Runs in a network namespace of its own, with lo up. The thread ends with it, so nothing else ever runs there.
fn in_a_namespace(test: impl FnOnce() -> Result<()> + Send) {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
            bro_tests::sys::loopback_up()?;
            test()
        });
        inside.join().expect("the thread ends by itself").unwrap();
    });
}

fn set_listener_option(socket: &TcpListener, level: i32, name: i32, value: i32) -> std::io::Result<()> {
    let length = size_of::<i32>() as libc::socklen_t;
    let pointer = (&raw const value).cast();
    // SAFETY: the pointer is to `length` readable bytes.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer, length) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

// ---- order

#[test]
fn redirected_bytes_do_not_move_write_seq() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.hooked_lane(&ends).unwrap().0;
    let (mut sent, mut got) = (Stream::new(1), Stream::new(1));
    for _ in 0..100 {
        send(&ends.service, &mut sent, 1000).unwrap();
        receive(&ends.client, &mut got, 1000).unwrap();
        lane.grant(ends.accepted.as_fd()).unwrap();
    }
    // Had it moved, the order check would have failed from the second message on.
    assert_eq!((lane.bytes(), lane.snapshot().passed(Reason::Order)), (100_000, 0));
}

#[test]
fn a_passed_byte_closes_the_lane_until_it_is_reported_forwarded() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let (lane, before) = bench.hooked_lane(&ends).unwrap();
    let (mut sent, mut got) = (Stream::new(1), Stream::new(1));
    lane.enable(false);
    send(&ends.service, &mut sent, 10).unwrap();
    lane.enable(true);
    send(&ends.service, &mut sent, 10).unwrap();
    assert_eq!((lane.bytes(), lane.snapshot().passed(Reason::Order)), (0, 1));
    let mut passed = [0; 20];
    await_poll(ends.backend.as_fd(), PollFlags::POLLIN).unwrap();
    (&ends.backend).read_exact(&mut passed).unwrap();
    (&ends.accepted).write_all(&passed).unwrap();
    lane.forwarded(before + 20, ends.accepted.as_fd()).unwrap();
    send(&ends.service, &mut sent, 10).unwrap();
    assert_eq!(lane.bytes(), 10);
    receive(&ends.client, &mut got, 30).unwrap();
}

#[test]
fn redirected_bytes_are_in_the_targets_queue_when_send_returns() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    for seed in 0..50 {
        let ends = bench.connect().unwrap();
        let lane = bench.hooked_lane(&ends).unwrap().0;
        send(&ends.service, &mut Stream::new(seed), 30_000).unwrap();
        // The FIN of this half-close must come after every one of them.
        ends.accepted.shutdown(Shutdown::Write).unwrap();
        assert_eq!(lane.bytes(), 30_000);
        drop(lane);
        receive(&ends.client, &mut Stream::new(seed), 30_000).unwrap();
        receive_end(&ends.client).unwrap();
    }
}

/// The kernel queues what a sender sends with the sender's own flags: an urgent byte stays one, as on a direct connection.
#[test]
fn an_urgent_byte_is_urgent_behind_the_lane_too() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.hooked_lane(&ends).unwrap().0;
    for (bytes, flags) in [(b"in", MsgFlags::empty()), (b"d!", MsgFlags::MSG_OOB), (b"on", MsgFlags::empty())]
    {
        assert_eq!(socket::send(ends.service.as_raw_fd(), bytes, flags | MsgFlags::MSG_NOSIGNAL), Ok(2));
    }
    assert_eq!(lane.bytes(), 6);
    await_poll(ends.client.as_fd(), PollFlags::POLLPRI).unwrap();
    let mut urgent = [0];
    assert_eq!(socket::recv(ends.client.as_raw_fd(), &mut urgent, MsgFlags::MSG_OOB), Ok(1));
    assert_eq!(&urgent, b"!");
    let mut rest = [0; 5];
    ends.client.set_nonblocking(false).unwrap();
    (&ends.client).read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"indon");
}

// ---- credit

#[test]
fn so_meminfo_tells_what_is_queued_and_what_fits() {
    require!(Need::Bpf);
    let bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let empty = send_memory(ends.accepted.as_fd()).unwrap();
    assert_eq!(empty.queued, 0, "{empty:?}");
    let sndbuf = nix::sys::socket::getsockopt(&ends.accepted, nix::sys::socket::sockopt::SndBuf).unwrap();
    assert_eq!(empty.sndbuf, sndbuf as u64);
    while (&ends.accepted).write(&[0; 65536]).is_ok() {}
    let full = send_memory(ends.accepted.as_fd()).unwrap();
    assert!(full.queued >= full.sndbuf, "{full:?}");
}

/// With lo down nothing is acknowledged, so each message's socket memory stays where it can be measured.
#[test]
fn a_message_costs_no_more_socket_memory_than_it_is_charged() {
    require!(Need::Bpf, Need::Root, Need::Program("ip", "iproute2"));
    in_a_namespace(|| {
        let mut bench = Bench::new()?;
        let ends = bench.connect()?;
        let lane = bench.hooked_lane(&ends)?.0;
        let down = Command::new("ip").args(["link", "set", "lo", "down"]).status()?;
        ensure!(down.success(), "ip link set lo down");
        for size in [1usize, 100, 1448, 16 * 1024, 40_000] {
            let before = send_memory(ends.accepted.as_fd())?.queued;
            let (messages, bytes) = (lane.snapshot().messages, lane.bytes());
            (&ends.service).write_all(&vec![0; size])?;
            lane.grant(ends.accepted.as_fd())?;
            let took = send_memory(ends.accepted.as_fd())?.queued - before;
            ensure!(
                lane.snapshot().messages == messages + 1,
                "{size} bytes were passed: {:?}",
                lane.snapshot()
            );
            ensure!(lane.bytes() == bytes + size as u64);
            let charged = bro_ebpf::charge(size as u32);
            ensure!(took <= charged, "{size} bytes took {took}, charged {charged}");
            ensure!(took > 0 && took <= size as u64 + 4 * MESSAGE_OVERHEAD, "{size} bytes took {took}");
        }
        Ok(())
    });
}

#[test]
fn a_hosts_notsent_lowat_is_out_of_the_way() {
    require!(Need::Bpf, Need::Root);
    in_a_namespace(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_notsent_lowat", "4096")?;
        let mut bench = Bench::new()?;
        let ends = bench.connect()?;
        let lane = bench.hooked_lane(&ends)?.0;
        // Far more than 4 KiB not yet sent: the reader's window is full long before.
        let mut sent = 0;
        while let Ok(count) = (&ends.service).write(&[0; 32768]) {
            sent += count;
        }
        ensure!(sent > 0);
        let mut poll = [nix::poll::PollFd::new(ends.service.as_fd(), PollFlags::POLLOUT)];
        ensure!(nix::poll::poll(&mut poll, 0u8)? == 0, "EAGAIN although writable: {:?}", lane.snapshot());
        Ok(())
    });
}

// ---- who is hooked

/// The layout of real use: the service in a container's network namespace, the clients outside.
#[test]
fn a_redirect_crosses_network_namespaces_and_cookies_tell_them_apart() {
    require!(Need::Bpf, Need::Root);
    let outside = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let home = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    in_a_namespace(|| {
        let mut bench = Bench::new()?;
        let host = netns_cookie(outside.as_fd())?;
        ensure!(host != bench.netns, "the cookies agree");
        bench.kernel.unwatch(bench.netns, bench.front.local_addr()?.port());
        bench.front = outside;
        let (backend, service) = pair(&bench.service)?;
        let front = bench.front.local_addr()?;
        // A client of the host: made by a thread that never entered the namespace.
        let client = std::thread::spawn(move || -> Result<TcpStream> {
            nix::sched::setns(home, nix::sched::CloneFlags::CLONE_NEWNET)?;
            connect_nonblocking(front)
        });
        let client = client.join().expect("the thread ends by itself")?;
        let (accepted, _) = bench.front.accept()?;
        accepted.set_nonblocking(true)?;
        let ends = kernel_relay::Ends { client, accepted, backend, service };
        let lane = bench.hooked_lane(&ends)?.0;
        send(&ends.service, &mut Stream::new(3), 50_000)?;
        receive(&ends.client, &mut Stream::new(3), 50_000)?;
        ensure!(lane.bytes() > 0, "{:?} {:?}", lane.snapshot(), bench.kernel.totals());
        Ok(())
    });
}

#[test]
fn o_nonblock_of_a_client_is_seen_when_it_is_connected_and_when_it_sends() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let address = bench.front.local_addr().unwrap();
    let _blocking = TcpStream::connect(address).unwrap();
    let _its_other_end = bench.front.accept().unwrap();
    assert_eq!(bench.kernel.totals().blocking, 1);
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    let before = bench.kernel.totals();
    bench.pass(&ends, &lane, 1).unwrap();
    assert!(!bench.proved(Duration::from_millis(100)).unwrap(), "hooked after one message");
    bench.pass(&ends, &lane, 2).unwrap();
    assert!(bench.proved(LIMIT).unwrap(), "not hooked after two messages: {:?}", bench.kernel.totals());
    assert_eq!(bench.kernel.totals().hooked - before.hooked, 1);
    // What was passed counts: the next message finds the order kept, and takes the lane.
    send(&ends.client, &mut Stream::new(1), 100).unwrap();
    receive(&ends.service, &mut Stream::new(1), 100).unwrap();
    assert_eq!(lane.bytes(), 100, "{:?}", lane.snapshot());
}

/// hiredis, and so redis-cli: connects without blocking, for the sake of a time-out, and then turns to blocking.
#[test]
fn a_client_that_turns_to_blocking_after_it_connected_is_never_hooked() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    let before = bench.kernel.totals();
    ends.client.set_nonblocking(false).unwrap();
    for nth in 1..=5 {
        bench.pass(&ends, &lane, nth).unwrap();
    }
    assert!(!bench.proved(Duration::from_millis(100)).unwrap());
    let after = bench.kernel.totals();
    assert_eq!((after.hooked - before.hooked, after.blocking - before.blocking), (0, 1), "{after:?}");
    assert_eq!(bench.kernel.hooked_now(), 0);
    assert_eq!(lane.snapshot().passed.iter().sum::<u64>(), 0, "it was asked about");
}

/// A client that turns to blocking later is let go in the kernel, by the acknowledgement of what it then sends: nobody has to
/// hear of it first.
#[test]
fn a_hooked_client_that_turns_to_blocking_is_let_go_when_its_next_message_is_acknowledged() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    let passed = bench.prove(&ends, &lane).unwrap();
    assert_eq!(bench.kernel.hooked_now(), 1);
    ends.client.set_nonblocking(false).unwrap();
    bench.pass(&ends, &lane, passed + 1).unwrap();
    let deadline = Instant::now() + LIMIT;
    // No event is taken from the ring: user space has no part in this.
    while bench.kernel.hooked_now() == 1 {
        assert!(Instant::now() < deadline, "never let go: {:?}", bench.kernel.totals());
        std::thread::yield_now();
    }
    assert_eq!(lane.snapshot().passed(Reason::Blocking), 1);
    // Without blocking again it is not hooked again.
    ends.client.set_nonblocking(true).unwrap();
    for nth in 2..=4 {
        bench.pass(&ends, &lane, passed + nth).unwrap();
    }
    assert!(!bench.proved(Duration::from_millis(100)).unwrap());
}

/// A request for a socket that is not the one it was made for: another one has its addresses by now.
#[test]
fn a_hook_that_comes_late_finds_nothing() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    let hooked = bench.kernel.totals().hooked;
    bench.pass(&ends, &lane, 1).unwrap();
    // What is acknowledged last is the half-close's own business.
    bench.pass(&ends, &lane, 2).unwrap();
    await_poll(bench.kernel.events_fd(), nix::poll::PollFlags::POLLIN).unwrap();
    ends.client.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(bench.proved(LIMIT).unwrap());
    assert_eq!(bench.kernel.totals().hooked, hooked, "hooked after its half-close");
}

/// A service is hooked by the same rules as a client, and no sooner; before it has a lane it is only looked at, and has all its own.
#[test]
fn a_service_is_hooked_after_two_messages_and_only_with_a_lane() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let (mut sent, mut seen) = (Stream::new(1), Stream::new(1));
    let size = |socket| nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::SndBuf).unwrap();
    let at_once =
        |socket| nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::TcpNoDelay).unwrap();
    ends.service.set_nodelay(false).unwrap();
    let before = size(&ends.service);
    for _ in 0..20 {
        send(&ends.service, &mut sent, 10).unwrap();
        receive(&ends.backend, &mut seen, 10).unwrap();
        (&ends.backend).write_all(b"x").unwrap();
        await_poll(ends.service.as_fd(), PollFlags::POLLIN).unwrap();
        (&ends.service).read_exact(&mut [0]).unwrap();
    }
    assert!(!bench.proved(Duration::from_millis(50)).unwrap());
    assert_eq!((bench.kernel.hooked_now(), bench.kind()), (0, Some(SenderKind::Unknown)));
    assert!(!at_once(&ends.service), "TCP_NODELAY of a socket without a lane was set");
    let sender = kernel_relay::sender(bench.netns, &ends.backend).unwrap();
    let lane = bench.kernel.open_lane(&sender, ends.accepted.as_fd(), 200).unwrap();
    bench.pass_down(&ends, &lane, 201).unwrap();
    assert!(bench.proved(LIMIT).unwrap());
    assert_eq!((bench.kernel.hooked_now(), bench.kind()), (1, Some(SenderKind::Fit)));
    send(&ends.service, &mut sent, 10).unwrap();
    assert_eq!(lane.bytes(), 10, "{:?}", lane.snapshot());
    assert_eq!(size(&ends.service), before, "SO_SNDBUF was changed");
}

/// What loses its lane is let go; with a lane again it is hooked again, at its next message.
#[test]
fn a_sender_is_let_go_and_hooked_again() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let sender = kernel_relay::sender(bench.netns, &ends.backend).unwrap();
    let mut total = 0;
    for round in 1..=3 {
        let lane = bench.kernel.open_lane(&sender, ends.accepted.as_fd(), total).unwrap();
        let socket = loop {
            total += 1;
            bench.pass_down(&ends, &lane, total).unwrap();
            let patience = if total > 1 { 100u16 } else { 0 };
            let mut events = [nix::poll::PollFd::new(bench.kernel.events_fd(), PollFlags::POLLIN)];
            nix::poll::poll(&mut events, patience).unwrap();
            let mut proved = None;
            bench.kernel.drain_events(|event| {
                if let Event::Proved { flow, socket, record, serial } = event {
                    proved = Some((flow, socket, record, serial));
                }
            });
            let Some((flow, socket, record, serial)) = proved else { continue };
            assert_eq!((record, serial), (lane.id().record, lane.id().serial));
            bench.kernel.hook(flow, socket);
            break socket;
        };
        assert_eq!(bench.kernel.hooked_now(), 1, "round {round}: {:?}", bench.kernel.totals());
        send(&ends.service, &mut Stream::new(round), 100).unwrap();
        receive(&ends.client, &mut Stream::new(round), 100).unwrap();
        assert_eq!(lane.bytes(), 100, "{:?}", lane.snapshot());
        bench.kernel.release(socket);
        drop(lane);
        assert_eq!(bench.kernel.hooked_now(), 0);
    }
}

/// SIGUSR1 is caught, with SA_RESTART, by a handler that does nothing.
fn harmless_signals() {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler = nix::sys::signal::SigHandler::Handler(nothing);
    let flags = nix::sys::signal::SaFlags::SA_RESTART;
    let action = nix::sys::signal::SigAction::new(handler, flags, nix::sys::signal::SigSet::empty());
    // SAFETY: the handler does nothing at all.
    unsafe { nix::sys::signal::sigaction(nix::sys::signal::Signal::SIGUSR1, &action) }.unwrap();
}

type Reading = std::thread::JoinHandle<std::io::Result<(usize, [u8; 1])>>;

/// Reads one byte in a thread, and says which.
fn read_in_a_thread(mut from: TcpStream) -> (Reading, u32, i32) {
    let (told, thread) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        let id = (std::process::id(), nix::unistd::gettid().as_raw());
        told.send(id).expect("the test waits for it");
        let mut byte = [0];
        from.read(&mut byte).map(|count| (count, byte))
    });
    let (process, thread) = thread.recv().expect("the thread says who it is");
    (reading, process, thread)
}

/// Signals a thread again and again while it waits.
fn interrupt(process: u32, thread: i32) -> Result<()> {
    for _ in 0..20 {
        await_sleep(thread)?;
        // SAFETY: a signal with a handler, to a thread that exists until it is joined by the caller.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1) };
        ensure!(sent == 0, "the signal was not sent");
    }
    Ok(())
}

/// The reason for all the care about O_NONBLOCK: a signal with SA_RESTART must not make recv fail.
#[test]
fn an_unmodified_blocking_service_never_sees_eagain_from_a_signal() {
    require!(Need::Bpf);
    harmless_signals();
    let bench = Bench::new().unwrap();
    let backend = connect_nonblocking(bench.service.local_addr().unwrap()).unwrap();
    let (service, _) = bench.service.accept().unwrap();
    let (reading, process, thread) = read_in_a_thread(service);
    interrupt(process, thread).unwrap();
    (&backend).write_all(b"x").unwrap();
    assert_eq!(reading.join().unwrap().unwrap(), (1, *b"x"));
}

/// The same for a client that connected without blocking, has exchanged some messages, and then turned to blocking.
#[test]
fn a_client_that_turned_to_blocking_never_sees_eagain_from_a_signal() {
    require!(Need::Bpf);
    harmless_signals();
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    bench.pass(&ends, &lane, 1).unwrap();
    ends.client.set_nonblocking(false).unwrap();
    bench.pass(&ends, &lane, 2).unwrap();
    assert!(!bench.proved(Duration::from_millis(50)).unwrap());
    let kernel_relay::Ends { client, mut accepted, .. } = ends;
    let (reading, process, thread) = read_in_a_thread(client);
    interrupt(process, thread).unwrap();
    accepted.write_all(b"x").unwrap();
    assert_eq!(reading.join().unwrap().unwrap(), (1, *b"x"));
}

/// Waits until a thread of this process sleeps in a system call.
fn await_sleep(thread: i32) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat"))?;
        if stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S')) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the thread never sleeps");
        std::thread::yield_now();
    }
}

#[test]
fn a_socket_that_wants_zerocopy_completions_is_seen_and_left_alone() {
    require!(Need::Bpf);
    let bench = Bench::new().unwrap();
    set_listener_option(&bench.service, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1).unwrap();
    let _ends = pair(&bench.service).unwrap();
    assert_eq!(bench.kernel.totals().zerocopy, 1);
    assert_eq!(bench.kernel.hooked_now(), 0);
    assert_eq!(bench.kind(), Some(SenderKind::Zerocopy));
}

/// A client that sends data in its SYN: its sequence numbers start with bytes that no lane knows of.
#[test]
fn tcp_fast_open_is_seen_and_left_alone() {
    require!(Need::Bpf, Need::Root);
    in_a_namespace(|| {
        // Both sides, without asking for a cookie first.
        std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "519")?;
        let bench = Bench::new()?;
        set_listener_option(&bench.front, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16)?;
        let client = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        let to = nix::sys::socket::SockaddrStorage::from(bench.front.local_addr()?);
        let flags = nix::sys::socket::MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
        match nix::sys::socket::sendto(client.as_raw_fd(), b"early", &to, flags) {
            Ok(_) | Err(nix::errno::Errno::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let (mut accepted, _) = bench.front.accept()?;
        let mut early = [0; 5];
        accepted.read_exact(&mut early)?;
        ensure!(&early == b"early");
        let totals = bench.kernel.totals();
        ensure!((totals.fast_open, totals.hooked) == (1, 0), "{totals:?}");
        Ok(())
    });
}

// ---- letting go

#[test]
fn a_sender_is_let_go_at_its_half_close_and_at_its_close() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    bench.prove(&ends, &lane).unwrap();
    let _down = bench.hooked_lane(&ends).unwrap();
    assert_eq!(bench.kernel.hooked_now(), 2);
    ends.service.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.kernel.hooked_now(), 1, "FIN_WAIT1");
    drop(ends.client);
    assert_eq!(bench.kernel.hooked_now(), 0, "close");
    // The other order: the peer's FIN first, then LAST_ACK.
    let ends = bench.connect().unwrap();
    let lane = bench.client_lane(&ends).unwrap();
    bench.prove(&ends, &lane).unwrap();
    let _down = bench.hooked_lane(&ends).unwrap();
    ends.backend.shutdown(Shutdown::Write).unwrap();
    receive_end(&ends.service).unwrap();
    assert_eq!(bench.kernel.hooked_now(), 2, "a sender that has seen the end may still send");
    ends.service.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.kernel.hooked_now(), 1, "LAST_ACK");
    // An abort.
    nix::sys::socket::setsockopt(
        &ends.client,
        nix::sys::socket::sockopt::Linger,
        &libc::linger { l_onoff: 1, l_linger: 0 },
    )
    .unwrap();
    drop(ends.client);
    assert_eq!(bench.kernel.hooked_now(), 0, "abort");
}

#[test]
fn a_half_closed_target_is_refused() {
    require!(Need::Bpf);
    let bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    ends.client.shutdown(Shutdown::Write).unwrap();
    receive_end(&ends.accepted).unwrap();
    let sender = kernel_relay::sender(bench.netns, &ends.backend).unwrap();
    let refused = bench.kernel.open_lane(&sender, ends.accepted.as_fd(), 0).unwrap_err();
    assert!(matches!(refused, Refused::NotEstablished), "{refused:?}");
    assert_eq!(bench.kernel.totals().open_lanes, 0);
}

#[test]
fn a_lane_whose_target_is_gone_passes() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let kernel_relay::Ends { client, accepted, backend, service } = bench.connect().unwrap();
    let ends = kernel_relay::Ends { client, accepted, backend, service };
    let lane = bench.hooked_lane(&ends).unwrap().0;
    let kernel_relay::Ends { client, accepted, backend, service } = ends;
    drop(accepted);
    send(&service, &mut Stream::new(1), 100).unwrap();
    receive(&backend, &mut Stream::new(1), 100).unwrap();
    assert_eq!((lane.bytes(), lane.snapshot().passed(Reason::Gone)), (0, 1));
    drop(client);
}

#[test]
fn splice_works_on_a_target() {
    require!(Need::Bpf);
    let bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let _lane = bench.service_lane(&ends).unwrap();
    let (read, write) = nix::unistd::pipe().unwrap();
    let flags = nix::fcntl::SpliceFFlags::SPLICE_F_NONBLOCK;
    send(&ends.client, &mut Stream::new(5), 3000).unwrap();
    // The client is not routed, so what it sends arrives at the accepted socket.
    let mut moved = 0;
    while moved < 3000 {
        await_poll(ends.accepted.as_fd(), PollFlags::POLLIN).unwrap();
        moved += nix::fcntl::splice(&ends.accepted, None, &write, None, 3000, flags).unwrap();
    }
    let mut back = 0;
    while back < 3000 {
        back += nix::fcntl::splice(&read, None, &ends.accepted, None, 3000, flags).unwrap();
    }
    receive(&ends.client, &mut Stream::new(5), 3000).unwrap();
}

// ---- attaching, and the process's rights

#[test]
fn the_sixty_fifth_program_of_a_cgroup_is_refused_as_full() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let name = bench.cgroup.path().file_name().unwrap().to_owned();
    let mut path = bench.cgroup.path().to_path_buf();
    for attached in 1.. {
        // Another way to write the same folder.
        path = path.join("..").join(&name);
        match bench.kernel.attach(&path) {
            Ok(()) => assert!(attached < 64, "more than 64"),
            Err(Unavailable::CgroupFull(_)) => break,
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
fn a_program_that_somebody_attached_exclusively_is_reported_as_that() {
    require!(Need::Bpf, BPFTOOL);
    let bench = Bench::new().unwrap();
    let other = bench.cgroup.sibling().unwrap();
    let [_, watch, _] = bench.kernel.program_ids().unwrap();
    let id = watch.to_string();
    let attach = ["cgroup", "attach", other.to_str().unwrap(), "sock_ops", "id", &id];
    assert!(Command::new("bpftool").args(attach).status().unwrap().success());
    let mut late = Kernel::load(&CONFIG).unwrap();
    let refused = late.attach(&other).unwrap_err();
    std::fs::remove_dir(&other).unwrap();
    assert!(matches!(refused, Unavailable::CgroupExclusive(_)), "{refused:?}");
}

/// What a forwarder does for each connection, it may do after it dropped its capabilities.
#[test]
fn lanes_need_no_capability_once_everything_is_loaded() {
    require!(Need::Bpf, Need::Root);
    let mut bench = Bench::new().unwrap();
    std::thread::scope(|scope| {
        let ordinary = scope.spawn(|| {
            const NOBODY: libc::uid_t = 65534;
            // SAFETY: the bare system call changes this thread alone, which ends with this closure. All capabilities go.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
            ensure!(changed == 0, "setresuid");
            let ends = bench.connect()?;
            let lane = bench.hooked_lane(&ends)?.0;
            send(&ends.service, &mut Stream::new(1), 100)?;
            receive(&ends.client, &mut Stream::new(1), 100)?;
            ensure!(lane.bytes() == 100, "{:?}", lane.snapshot());
            drop(lane);
            ensure!(bench.kernel.totals().open_lanes == 0);
            match Kernel::load(&CONFIG) {
                Err(Unavailable::NotPermitted(..)) => Ok(()),
                other => anyhow::bail!("loading as nobody: {other:?}"),
            }
        });
        ordinary.join().expect("the thread ends by itself").unwrap();
    });
}

/// What `kill_9` starts again as its child: a forwarder's kernel side that waits to be killed.
#[test]
#[ignore = "a part of another test"]
fn child_that_loads_and_waits() {
    let mut kernel = Kernel::load(&CONFIG).unwrap();
    kernel.attach(std::env::var_os("BRO_TEST_CGROUP").unwrap().as_ref()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (netns, port) = (netns_cookie(listener.as_fd()).unwrap(), listener.local_addr().unwrap().port());
    kernel.watch(netns, port, Role::Service).unwrap();
    let [send, watch, _] = kernel.program_ids().unwrap();
    println!("ready {port} {send} {watch}");
    listener.accept().unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn kill_9_leaves_no_program_and_sockets_go_back_to_plain_tcp() {
    require!(Need::Bpf, BPFTOOL);
    let bench = Bench::new().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "child_that_loads_and_waits"])
        .env("BRO_TEST_CGROUP", bench.cgroup.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let ready = lines.find_map(|line| Some(line.ok()?.split_once("ready ")?.1.to_owned())).unwrap();
    let ids: Vec<u32> = ready.split(' ').map(|id| id.parse().unwrap()).collect();
    let loaded = |id: u32| {
        let shown = Command::new("bpftool").args(["prog", "show", "id", &id.to_string()]).output();
        shown.is_ok_and(|shown| shown.status.success())
    };
    assert!(loaded(ids[1]) && loaded(ids[2]));
    // A socket of ours that the child's programs hooked outlives the child.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let survivor = pair(&listener).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while loaded(ids[1]) || loaded(ids[2]) {
        assert!(Instant::now() < deadline, "a program stayed");
    }
    send(&survivor.0, &mut Stream::new(1), 1000).unwrap();
    receive(&survivor.1, &mut Stream::new(1), 1000).unwrap();
    assert!(matches!((&survivor.1).read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock));
}
