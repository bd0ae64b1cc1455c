//! The kernel relay's programs at work, with a forwarder in miniature between real sockets: every byte exact, both lanes, IPv4
//! and IPv6, random half-closes, lanes shut and opened at random, and nothing left behind.
//!
//! Needs: root, kernel BTF. Takes: seconds.

mod kernel_relay;

use std::io::{ErrorKind, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread::{JoinHandle, spawn};

use anyhow::{Context as _, Result, ensure};
use bro_sockmap::{Config, Event, Kernel, Reason, SenderKind, SenderRole};
use bro_tests::require;
use bro_tests::tier::Need;

use kernel_relay::content::{Numbers, Stream};
use kernel_relay::forwarder::{Connection, relay};
use kernel_relay::{Bench, connect_nonblocking, pair, receive, receive_end, send};

type Peer = JoinHandle<Result<()>>;

/// Sends `sends` bytes in random pieces while it receives `receives` bytes, then ends its side.
fn peer(socket: TcpStream, seeds: (u64, u64), sends: usize, receives: usize) -> Peer {
    let socket = Arc::new(socket);
    let reader = Arc::clone(&socket);
    spawn(move || {
        let reading = spawn(move || {
            receive(&reader, &mut Stream::new(seeds.1), receives)?;
            receive_end(&reader)
        });
        let mut stream = Stream::new(seeds.0);
        let mut numbers = Numbers::new(seeds.0);
        let mut left = sends;
        while left > 0 {
            let most = [3, 200, 5000, 70_000, 300_000][numbers.below(5) as usize];
            let size = (1 + numbers.below(most) as usize).min(left);
            send(&socket, &mut stream, size).context("peer sends")?;
            left -= size;
            if numbers.below(8) == 0 {
                std::thread::yield_now();
            }
        }
        socket.shutdown(Shutdown::Write)?;
        reading.join().expect("the reader ends by itself").context("peer receives")
    })
}

fn join(peers: Vec<Peer>) -> Result<()> {
    peers.into_iter().try_for_each(|peer| peer.join().expect("a peer ends by itself"))
}

/// `count` connections at once with streams both ways; the sum of what went where.
fn exchange(
    bench: &mut Bench,
    count: u64,
    sizes: u64,
    toggle: Option<u64>,
) -> Result<kernel_relay::forwarder::Moved> {
    let (mut peers, mut connections) = (Vec::new(), Vec::new());
    let mut numbers = Numbers::new(count ^ sizes);
    let mut sum = 0;
    for seed in 0..count {
        let ends = bench.connect()?;
        let lanes = (bench.service_lane(&ends)?, bench.client_lane(&ends)?);
        let (up, down) = (numbers.below(sizes) as usize, numbers.below(sizes) as usize);
        sum += up + down;
        peers.push(peer(ends.client, (seed, seed + 1000), up, down));
        peers.push(peer(ends.service, (seed + 1000, seed), down, up));
        connections.push(Connection::new(ends.accepted, ends.backend, Some(lanes.0), Some(lanes.1)));
    }
    let moved = relay(&mut bench.kernel, connections, toggle)?;
    join(peers)?;
    let through = moved.copied + moved.lanes.bytes;
    ensure!(through == sum as u64, "{through} bytes counted, {sum} sent: {moved:?}");
    Ok(moved)
}

#[test]
fn the_self_test_passes_and_leaves_nothing_behind() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    bench.kernel.selftest().unwrap();
    bench.kernel.selftest().unwrap();
    assert_eq!(bench.kernel.hooked_now(), 0);
    assert_eq!(bench.kernel.totals().open_lanes, 0);
}

#[test]
fn random_streams_both_ways_over_both_lanes() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let moved = exchange(&mut bench, 12, 3_000_000, None).unwrap();
    assert!(moved.lanes.bytes > 0, "no lane was ever taken: {moved:?}");
    // Those that sent more than one message.
    assert!((2..=24).contains(&bench.kernel.totals().hooked), "{:?}", bench.kernel.totals());
    assert_eq!(bench.kernel.hooked_now(), 0);
    assert_eq!(bench.kernel.totals().open_lanes, 0);
}

#[test]
fn random_streams_over_ipv6() {
    require!(Need::Bpf);
    let config = Config { connections: 64, hook_blocking: false, bear_fionread: true, trace: false };
    let mut bench = Bench::with("[::1]:0", config).unwrap();
    let moved = exchange(&mut bench, 4, 2_000_000, None).unwrap();
    assert!(moved.lanes.bytes > 0, "{moved:?}");
}

#[test]
fn lanes_that_open_and_shut_while_bytes_flow() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let moved = exchange(&mut bench, 12, 3_000_000, Some(7)).unwrap();
    assert!(moved.lanes.passed(Reason::Off) > 0, "no lane was ever shut: {moved:?}");
    assert!(moved.lanes.bytes > 0 && moved.copied > 0, "{moved:?}");
}

/// A dual-stack listener sees an IPv4 client under a v4-mapped address; the client itself is plain IPv4.
#[test]
fn an_ipv4_client_of_a_dual_stack_listener_gets_its_lane() {
    require!(Need::Bpf);
    let config = Config { connections: 64, hook_blocking: false, bear_fionread: true, trace: false };
    let mut bench = Bench::with("[::]:0", config).unwrap();
    let port = bench.front.local_addr().unwrap().port();
    let client = connect_nonblocking(([127, 0, 0, 1], port).into()).unwrap();
    let (accepted, _) = bench.front.accept().unwrap();
    let port = bench.port();
    let backend = connect_nonblocking(([127, 0, 0, 1], port).into()).unwrap();
    let (service, _) = bench.service.accept().unwrap();
    let ends = kernel_relay::Ends { client, accepted, backend, service };
    let lane = bench.client_lane(&ends).unwrap();
    bench.prove(&ends, &lane).unwrap();
    send(&ends.client, &mut Stream::new(1), 5000).unwrap();
    receive(&ends.service, &mut Stream::new(1), 5000).unwrap();
    assert_eq!(lane.bytes(), 5000);
}

/// Requests and answers: the messages take the lanes, the forwarder moves next to nothing and is seldom woken.
#[test]
fn round_trips_take_the_lanes() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let (down, up) = (bench.service_lane(&ends).unwrap(), bench.client_lane(&ends).unwrap());
    let connection = Connection::new(ends.accepted, ends.backend, Some(down), Some(up));
    let service = ends.service;
    let answering = spawn(move || -> Result<()> {
        let (mut requests, mut answers) = (Stream::new(1), Stream::new(2));
        for _ in 0..5000 {
            receive(&service, &mut requests, 64)?;
            send(&service, &mut answers, 64)?;
        }
        receive_end(&service)
    });
    let client = ends.client;
    let asking = spawn(move || -> Result<()> {
        let (mut requests, mut answers) = (Stream::new(1), Stream::new(2));
        for _ in 0..5000 {
            send(&client, &mut requests, 64)?;
            receive(&client, &mut answers, 64)?;
        }
        client.shutdown(Shutdown::Write)?;
        receive_end(&client)
    });
    let moved = relay(&mut bench.kernel, vec![connection], None).unwrap();
    join(vec![answering, asking]).unwrap();
    // On a busy machine a grant may come a message late.
    assert!(moved.copied * 50 < moved.lanes.bytes, "{moved:?}");
    assert_eq!(moved.copied + moved.lanes.bytes, 2 * 5000 * 64);
    assert!(moved.lanes.grants < 200, "a grant for every few messages: {moved:?}");
}

/// A sender in bulk: so much takes the lane and no more, until it reads something itself. Then the lane is its own again.
#[test]
fn a_stream_leaves_the_lane_until_its_sender_reads() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let (lane, mut total) = bench.hooked_lane(&ends).unwrap();
    let bulk = bro_ebpf::BULK;
    let block = vec![7u8; 16 * 1024];
    for round in 1..=3 {
        let before = lane.bytes();
        for _ in 0..bulk / block.len() as u64 {
            write_all(&ends.service, &block).unwrap();
            drink(&ends.client, block.len()).unwrap();
            lane.grant(ends.accepted.as_fd()).unwrap();
        }
        assert_eq!((lane.bytes() - before, lane.is_in_bulk()), (bulk, round > 1), "{:?}", lane.snapshot());
        // One more byte is beyond it, and goes the long way.
        bench
            .pass_down(&ends, &lane, {
                total += 1;
                total
            })
            .unwrap();
        assert!(lane.is_in_bulk());
        assert_eq!(lane.bytes() - before, bulk);
        (&ends.backend).write_all(b"x").unwrap();
        drink(&ends.service, 1).unwrap();
    }
}

fn drink(mut from: &TcpStream, mut count: usize) -> Result<()> {
    let mut buffer = vec![0; count];
    while count > 0 {
        kernel_relay::await_poll(from.as_fd(), nix::poll::PollFlags::POLLIN)?;
        count -= std::io::Read::read(&mut from, &mut buffer[..count])?;
    }
    Ok(())
}

fn write_all(mut to: &TcpStream, block: &[u8]) -> Result<()> {
    let mut sent = 0;
    while sent < block.len() {
        match to.write(&block[sent..]) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                kernel_relay::await_poll(to.as_fd(), nix::poll::PollFlags::POLLOUT)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// No side reads: what the lane takes is bounded by the target's send buffer, and the sender meets ordinary back-pressure.
#[test]
fn a_reader_that_never_reads_bounds_what_the_lane_takes() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.hooked_lane(&ends).unwrap().0;
    let block = vec![0; 16 * 1024];
    let mut sent = 0u64;
    loop {
        match (&ends.service).write(&block) {
            Ok(count) => sent += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 1 << 28, "no bound");
    }
    let memory = bro_sockmap::send_memory(ends.accepted.as_fd()).unwrap();
    let taken = lane.bytes();
    assert!(taken > 0 && taken <= memory.sndbuf, "{taken} bytes taken, {memory:?}");
    let mut poll = [nix::poll::PollFd::new(ends.service.as_fd(), nix::poll::PollFlags::POLLOUT)];
    assert_eq!(nix::poll::poll(&mut poll, 0u8), Ok(0), "a full sender polls writable: it would spin");
}

/// A service that leaves its sockets blocking is found out by its first message and left alone, and so are its later sockets.
#[test]
fn a_blocking_service_is_learned_and_never_hooked() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    for _ in 0..3 {
        let backend = connect_nonblocking(bench.service.local_addr().unwrap()).unwrap();
        let (service, _) = bench.service.accept().unwrap();
        send(&service, &mut Stream::new(1), 10).unwrap();
        receive(&backend, &mut Stream::new(1), 10).unwrap();
        if bench.kind() == Some(SenderKind::Unknown) {
            bench.await_event(|event| matches!(event, Event::Learned { .. })).unwrap();
        }
    }
    assert_eq!(bench.kind(), Some(SenderKind::Blocking));
    let totals = bench.kernel.totals();
    assert_eq!((totals.hooked, totals.watched, totals.blocking), (0, 1, 1), "{totals:?}");
}

/// A service whose sockets are non-blocking has one that turns to blocking once it is hooked: its next message is passed, it is let
/// go, and the service counts as blocking from then on.
#[test]
fn a_hooked_socket_that_turns_to_blocking_is_let_go_at_its_next_message() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    let ends = bench.connect().unwrap();
    let lane = bench.hooked_lane(&ends).unwrap().0;
    assert_eq!(bench.kernel.hooked_now(), 1);
    ends.service.set_nonblocking(false).unwrap();
    send(&ends.service, &mut Stream::new(1), 100).unwrap();
    receive(&ends.backend, &mut Stream::new(1), 100).unwrap();
    bench.await_event(|event| matches!(event, Event::BlockingSender { .. })).unwrap();
    assert_eq!(lane.snapshot().passed(Reason::Blocking), 1);
    assert_eq!(lane.bytes(), 0);
    assert_eq!(bench.kind(), Some(SenderKind::Blocking));
    assert_eq!(bench.kernel.hooked_now(), 0);
}

#[test]
fn the_listen_call_of_a_watched_service_is_an_event() {
    require!(Need::Bpf);
    let mut bench = Bench::new().unwrap();
    // A port that is free for sure: one of our own, given back.
    let old = std::mem::replace(&mut bench.service, std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let address = old.local_addr().unwrap();
    drop(old);
    let _again = std::net::TcpListener::bind(address).unwrap();
    let wanted = Event::Listening { netns: bench.netns, port: address.port() };
    assert_eq!(bench.await_event(|event| *event == wanted).unwrap(), wanted);
}

/// Several forwarders on one host, each with its own programs, service and clients.
#[test]
fn two_sets_of_programs_side_by_side() {
    require!(Need::Bpf);
    let mut one = Bench::new().unwrap();
    let mut two =
        Kernel::load(&Config { connections: 8, hook_blocking: false, bear_fionread: true, trace: false })
            .unwrap();
    two.attach(one.cgroup.path()).unwrap();
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    two.watch(one.netns, port, SenderRole::Service).unwrap();
    let ends = one.connect().unwrap();
    let _other_ends = pair(&other).unwrap();
    assert_eq!((one.kernel.totals().watched, two.totals().watched), (2, 1));
    let _lane = one.hooked_lane(&ends).unwrap();
    assert_eq!((one.kernel.totals().hooked, two.totals().hooked), (1, 0));
    drop(ends);
    exchange(&mut one, 2, 500_000, None).unwrap();
}

/// Watched by both, a socket is hooked by the forwarder whose connection it is; the other leaves it alone.
#[test]
fn a_socket_at_a_port_that_two_forwarders_watch_is_hooked_for_its_own() {
    require!(Need::Bpf);
    let mut one = Bench::new().unwrap();
    let mut two =
        Kernel::load(&Config { connections: 8, hook_blocking: false, bear_fionread: true, trace: false })
            .unwrap();
    two.attach(one.cgroup.path()).unwrap();
    two.watch(one.netns, one.port(), SenderRole::Service).unwrap();
    let (ends, stranger) = (one.connect().unwrap(), one.connect().unwrap());
    let (lane, _) = one.hooked_lane(&ends).unwrap();
    for _ in 0..5 {
        send(&stranger.service, &mut Stream::new(1), 100).unwrap();
        receive(&stranger.backend, &mut Stream::new(1), 100).unwrap();
    }
    assert!(!kernel_relay::hook_who_has_proved(&mut two, |_| {}), "a stranger was to be hooked");
    assert_eq!((one.kernel.totals().hooked, two.totals().hooked, two.totals().hook_refused), (1, 0, 0));
    send(&ends.service, &mut Stream::new(1), 100).unwrap();
    receive(&ends.client, &mut Stream::new(1), 100).unwrap();
    assert_eq!(lane.bytes(), 100);
}

/// A slot that is used again never gets the bytes of its former sender.
#[test]
fn a_closed_lane_is_never_hit_again() {
    require!(Need::Bpf);
    let config = Config { connections: 1, hook_blocking: false, bear_fionread: true, trace: false };
    let mut bench = Bench::with("127.0.0.1:0", config).unwrap();
    let (old, new) = (bench.connect().unwrap(), bench.connect().unwrap());
    let (lane, _) = bench.hooked_lane(&old).unwrap();
    send(&old.service, &mut Stream::new(1), 100).unwrap();
    assert_eq!(lane.bytes(), 100);
    let first = lane.id();
    drop(lane);
    // Its socket stays hooked, as that of a connection that ends does for a moment.
    let (lane, passed) = bench.hooked_lane(&new).unwrap();
    drop(lane);
    let sender = kernel_relay::sender(bench.netns, &new.backend).unwrap();
    // Every slot in turn goes to the new connection.
    for turn in 0..20 {
        let lane = bench.kernel.open_lane(&sender, new.accepted.as_fd(), passed).unwrap();
        assert_ne!(lane.id(), first);
        send(&old.service, &mut Stream::new(9), 10).unwrap();
        receive(&old.backend, &mut Stream::new(9), 10).unwrap();
        send(&new.service, &mut Stream::new(turn), 10).unwrap();
        receive(&new.client, &mut Stream::new(turn), 10).unwrap();
        assert_eq!(lane.bytes(), 10, "turn {turn}");
    }
}

#[test]
fn when_all_lanes_are_taken_the_next_is_refused() {
    require!(Need::Bpf);
    let config = Config { connections: 1, hook_blocking: false, bear_fionread: true, trace: false };
    let bench = Bench::with("127.0.0.1:0", config).unwrap();
    let ends: Vec<_> = (0..5).map(|_| bench.connect().unwrap()).collect();
    let lanes: Vec<_> = ends.iter().map(|ends| bench.service_lane(ends)).collect();
    assert!(lanes[..4].iter().all(Result::is_ok), "{lanes:?}");
    assert!(lanes[4].is_err());
    drop(lanes);
    assert!(bench.service_lane(&ends[4]).is_ok());
}

/// The self-test has the third program hook senders. Where it cannot be run there is no kernel relay, for that reason.
#[test]
fn where_no_sender_can_be_hooked_there_is_no_kernel_relay() {
    require!(Need::Bpf, Need::Root);
    let config = Config { connections: 4, hook_blocking: false, bear_fionread: true, trace: false };
    let mut kernel = Kernel::load(&config).unwrap();
    kernel.selftest().unwrap();
    kernel.programs.hook_clients().unwrap();

    let without = spawn(move || {
        refuse_test_run()?;
        let mut kernel = Kernel::load(&config)?;
        anyhow::Ok(kernel.selftest().expect_err("the self-test cannot run").to_string())
    });
    let why = without.join().expect("the thread ends by itself").unwrap();
    assert!(why.contains("self-test") && why.contains("cannot be run"), "{why}");
}

/// Has bpf(2) refuse BPF_PROG_TEST_RUN to this thread, for good.
fn refuse_test_run() -> Result<()> {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, apply_filter,
    };
    const BPF_PROG_TEST_RUN: u64 = 10;
    let run = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, BPF_PROG_TEST_RUN)?;
    let rules = [(nix::libc::SYS_bpf, vec![SeccompRule::new(vec![run])?])].into();
    let refuse = SeccompAction::Errno(nix::libc::EOPNOTSUPP as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?;
    Ok(apply_filter(&BpfProgram::try_from(filter)?)?)
}

/// Connections that are too short to prove anything are never put into a map.
#[test]
fn thousands_of_short_connections_leave_nothing_in_the_maps() {
    require!(Need::Bpf);
    let bench = Bench::new().unwrap();
    for turn in 0..3000u64 {
        let ends = bench.connect().unwrap();
        let lanes = (bench.service_lane(&ends).unwrap(), bench.client_lane(&ends).unwrap());
        send(&ends.service, &mut Stream::new(turn), 1).unwrap();
        receive(&ends.backend, &mut Stream::new(turn), 1).unwrap();
        match turn % 3 {
            0 => drop(lanes),
            1 => drop(ends),
            _ => {}
        }
    }
    let totals = bench.kernel.totals();
    assert_eq!((totals.hooked, totals.hook_refused, totals.open_lanes), (0, 0, 0), "{totals:?}");
    assert_eq!(bench.kernel.hooked_now(), 0);
}
