//! When a socket leaves the map, and what becomes of a lane whose end is gone.

use super::*;

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
    assert!(matches!(refused, LaneRefused::NotEstablished), "{refused:?}");
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
