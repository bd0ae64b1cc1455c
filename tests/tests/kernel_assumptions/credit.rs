//! How much socket memory a message costs, and how much there is.

use super::*;

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
