//! Where redirected bytes are, and in which order they arrive.

use super::*;

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
