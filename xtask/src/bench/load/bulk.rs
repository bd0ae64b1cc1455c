//! Bulk: as many bytes as take about the wanted time, counted where they arrive.

use std::os::fd::AsFd as _;
use std::time::Instant;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use super::{Args, Figures, Load};
use crate::bench::cpu::Meter;
use crate::bench::stream::{Address, PATIENCE, Stream, wait_for};
use crate::bench::wire::Ask;

const GIB: f64 = (1u64 << 30) as f64;
/// What the first guess at the rate is made with.
const TRIAL: u64 = 16 << 20;
const BUFFER: usize = 256 * 1024;

pub fn measure(args: &Args) -> Result<Figures> {
    let mut buffer = vec![0x5a; BUFFER];
    let trial = Instant::now();
    transfer(args.load, &args.address, TRIAL, &mut buffer).context("trial transfer")?;
    let rate = TRIAL as f64 / trial.elapsed().as_secs_f64();
    let bytes = ((rate * args.seconds) as u64).clamp(TRIAL, 64 << 30);

    let meter = Meter::start(args.group)?;
    transfer(args.load, &args.address, bytes, &mut buffer)?;
    let spent = meter.stop()?;
    // Both ways: the sum of them.
    let moved = if args.load == Load::Duplex { 2 * bytes } else { bytes } as f64;
    let name = args.load.name();
    let mut figures = Figures::new();
    figures.insert(format!("{name}.bytes_per_second"), moved / spent.elapsed);
    figures.insert(format!("{name}.system_cpu_per_gib"), spent.system / moved * GIB);
    if let Some(own) = spent.group {
        figures.insert(format!("{name}.own_cpu_per_gib"), own / moved * GIB);
    }
    Ok(figures)
}

fn transfer(load: Load, address: &Address, bytes: u64, buffer: &mut [u8]) -> Result<()> {
    let stream = Stream::connect(address)?;
    let (ask, to_send, to_come) = match load {
        Load::Upload => (Ask::Sink(bytes), bytes, 8),
        Load::Duplex => (Ask::Both(bytes), bytes, bytes + 8),
        _ => (Ask::Source(bytes), 0, bytes),
    };
    stream.write_all(&ask.encode())?;
    pump(&stream, to_send, to_come, buffer)
}

/// Sends and receives so much, both at once.
fn pump(stream: &Stream, mut to_send: u64, mut to_come: u64, buffer: &mut [u8]) -> Result<()> {
    while to_send > 0 || to_come > 0 {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::POLLOUT, to_send > 0);
        wanted.set(PollFlags::POLLIN, to_come > 0);
        let mut polled = [PollFd::new(stream.as_fd(), wanted)];
        wait_for(&mut polled, PATIENCE)?;
        let ready = polled[0].revents().unwrap_or(PollFlags::empty());
        if ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) && to_come > 0 {
            match stream.try_read(buffer) {
                Ok(0) => anyhow::bail!("the connection ended {to_come} bytes early"),
                Ok(read) => to_come -= (read as u64).min(to_come),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno).context("receiving"),
            }
        }
        if ready.contains(PollFlags::POLLOUT) && to_send > 0 {
            let now = usize::try_from(to_send).unwrap_or(usize::MAX).min(buffer.len());
            match stream.try_write(&buffer[..now]) {
                Ok(written) => to_send -= written as u64,
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno).context("sending"),
            }
        }
    }
    Ok(())
}
