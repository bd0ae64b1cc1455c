//! Lost wake-ups: bytes that wait at a socket while its owner sleeps in epoll_wait(2). They are reported for sockets in a sockmap on
//! kernels of 2026. Round trips and bursts of large answers between peers that use edge-triggered epoll (as Go and Node do) and so
//! depend on being woken, directly, through splice and through both lanes, in one run. Bursts of 5 MB leave their lane, those of 200 KiB
//! do not. `BRO_GAPS=full` makes as many as one needs to see a rare one: 200,000 round trips and 2,000 bursts of each size.
//!
//! Needs: root, kernel BTF. Takes: seconds.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::peers::{Conn, PATIENCE};
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::tier::{Need, met};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv, send};

/// No side sleeps longer than this while something waits for it.
const GAP: Duration = Duration::from_millis(500);
const ANSWER: usize = 5 << 20;
/// Small enough for the lane to be kept, large enough to fill the queues.
const LANES_LARGEST: usize = 200 << 10;

/// One end of a connection, watched by edge-triggered epoll.
struct Edge<'a> {
    conn: &'a Conn,
    epoll: Epoll,
    longest: Duration,
}

impl<'a> Edge<'a> {
    fn new(conn: &'a Conn) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(conn, EpollEvent::new(flags, 0))?;
        Ok(Self { conn, epoll, longest: Duration::ZERO })
    }

    /// Sleeps until an edge comes. An error if there was none although what is wanted was there.
    fn sleep(&mut self, wanted: PollFlags) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.epoll.wait(&mut [EpollEvent::empty()], u16::try_from(GAP.as_millis())?) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(0) => {
                    let is = self.conn.wait(wanted, Duration::ZERO)?;
                    ensure!(
                        !is.intersects(wanted),
                        "{is:?} for {:?}, and the sleeper was not woken",
                        began.elapsed()
                    );
                    ensure!(began.elapsed() < PATIENCE, "nothing came");
                }
                Ok(_) => {
                    self.longest = self.longest.max(began.elapsed());
                    return Ok(());
                }
            }
        }
    }

    /// False at the end of the stream.
    fn receive(&mut self, buffer: &mut [u8], mut count: usize) -> Result<bool> {
        while count > 0 {
            let most = count.min(buffer.len());
            match recv(self.conn.as_fd().as_raw_fd(), &mut buffer[..most], MsgFlags::empty()) {
                Ok(0) => return Ok(false),
                Ok(got) => count -= got,
                Err(Errno::EAGAIN) => self.sleep(PollFlags::POLLIN)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            match send(self.conn.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::EAGAIN) => self.sleep(PollFlags::POLLOUT)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

/// So many requests of 64 bytes, each with an answer of that size, and a pause after every so many.
fn ask(rig: &Rig, count: usize, answer: usize, pause_after: usize) -> Result<()> {
    let (client, service) = rig.pair()?;
    let took = std::thread::scope(|scope| -> Result<[Duration; 3]> {
        let serving = scope.spawn(|| -> Result<Duration> {
            let mut edge = Edge::new(&service)?;
            let (mut request, block) = ([0; 64], vec![7; answer]);
            while edge.receive(&mut request, 64).context("the service waits for a request")? {
                edge.send(&block).context("the service answers")?;
            }
            Ok(edge.longest)
        });
        let mut edge = Edge::new(&client)?;
        let mut buffer = vec![0; 256 * 1024];
        let mut longest = Duration::ZERO;
        let asking = (0..count).try_for_each(|nth| -> Result<()> {
            let began = Instant::now();
            edge.send(&[1; 64])?;
            ensure!(edge.receive(&mut buffer, answer)?, "the end instead of answer {nth}");
            longest = longest.max(began.elapsed());
            // A service that sleeps when a request comes, as after every burst.
            if nth.is_multiple_of(pause_after) {
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        });
        client.close_writing()?;
        let served = serving.join().expect("the service does not panic");
        asking.context("the client")?;
        Ok([longest, edge.longest, served?])
    })?;
    println!(
        "{:?}: {count} answers of {answer} bytes, the longest {:?} (asleep at most {:?} and {:?})",
        rig.lane, took[0], took[1], took[2]
    );
    Ok(())
}

#[test]
fn no_side_sleeps_while_bytes_wait() -> Result<()> {
    if !met("no_side_sleeps_while_bytes_wait", &[Need::Root, Need::Bpf]) {
        return Ok(());
    }
    let full = std::env::var("BRO_GAPS").is_ok_and(|asked| asked == "full");
    let (trips, bursts) = if full { (200_000, 2_000) } else { (4_000, 30) };
    for lane in [Lane::Direct, Lane::Splice, Lane::BothLanes] {
        let rig = Rig::new(lane, Legs::TCP4)?;
        ask(&rig, trips, 64, 50)?;
        ask(&rig, trips / 10, 20_000, 10)?;
        ask(&rig, bursts, LANES_LARGEST, 1)?;
        ask(&rig, bursts, ANSWER, 1)?;
        if let (Lane::BothLanes, Some(forwarder)) = (lane, rig.forwarder()) {
            let total = forwarder.report()?.total;
            println!("{total:?}");
            let large = (bursts * LANES_LARGEST / 2) as u64;
            ensure!(total.kernel > 64 * trips as u64 + large, "the lanes were not used: {total:?}");
        }
        rig.finish()?;
    }
    Ok(())
}
