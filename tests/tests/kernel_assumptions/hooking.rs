//! Which sockets the programs hook, and which they leave alone.

use super::*;

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

/// A client that turns to blocking later is let go in the kernel, by the acknowledgement of what it then sends: no process has to
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
