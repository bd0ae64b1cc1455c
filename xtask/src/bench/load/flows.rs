//! Many connections at once, each with small requests, from one event loop.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{Args, Figures};
use crate::bench::cpu::Meter;
use crate::bench::statistics::Percentiles;
use crate::bench::stream::{PATIENCE, Stream};
use crate::bench::wire::Ask;

const FLOWS: usize = 64;
const SIZE: usize = 1024;

struct Flow {
    stream: Stream,
    came: usize,
    asked: Instant,
}

pub fn measure(args: &Args) -> Result<Figures> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut flows = Vec::with_capacity(FLOWS);
    for number in 0..FLOWS {
        let stream = Stream::connect(&args.address)?;
        stream.write_all(&Ask::Echo.encode())?;
        epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
        flows.push(Flow { stream, came: 0, asked: Instant::now() });
    }
    // Each has its way through before time is taken.
    run(&epoll, &mut flows, Duration::from_secs_f64(args.seconds / 10.0))?;
    let meter = Meter::start(args.group)?;
    let trips = run(&epoll, &mut flows, Duration::from_secs_f64(args.seconds))?;
    let spent = meter.stop()?;
    let count = trips.count() as f64;
    let mut figures = trips.figures("flows");
    figures.insert("flows.per_second".into(), count / spent.elapsed);
    figures.insert("flows.system_cpu_per_request".into(), spent.system / count);
    if let Some(own) = spent.group {
        figures.insert("flows.own_cpu_per_request".into(), own / count);
    }
    Ok(figures)
}

/// Lets every flow ask as fast as it is answered, and ends when every answer is there.
fn run(epoll: &Epoll, flows: &mut [Flow], how_long: Duration) -> Result<Percentiles> {
    let (request, mut buffer) = ([0x5a; SIZE], [0; SIZE]);
    let end = Instant::now() + how_long;
    let mut trips = Vec::with_capacity(1 << 16);
    for flow in &mut *flows {
        flow.asked = Instant::now();
        flow.stream.write_all(&request)?;
    }
    let mut asking = flows.len();
    let mut events = [EpollEvent::empty(); FLOWS];
    while asking > 0 {
        let ready = match epoll.wait(&mut events, EpollTimeout::try_from(PATIENCE)?) {
            Err(Errno::EINTR) => continue,
            ready => ready.context("epoll")?,
        };
        ensure!(ready > 0, "no answer for {PATIENCE:?}");
        for event in &events[..ready] {
            let flow = &mut flows[event.data() as usize];
            match flow.stream.try_read(&mut buffer[flow.came..]) {
                Ok(0) => anyhow::bail!("a flow ended early"),
                Ok(read) => flow.came += read,
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno).context("receiving"),
            }
            if flow.came < SIZE {
                continue;
            }
            let now = Instant::now();
            trips.push(now.duration_since(flow.asked).as_secs_f64());
            flow.came = 0;
            if now < end {
                flow.asked = now;
                flow.stream.write_all(&request)?;
            } else {
                asking -= 1;
            }
        }
    }
    Ok(Percentiles::of(trips))
}
