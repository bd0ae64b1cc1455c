//! Connections that have each moved a byte both ways and now do nothing: what they cost in memory.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::poll::PollFlags;

use super::{Args, Figures};
use crate::bench::memory::{self, Memory};
use crate::bench::stream::Stream;
use crate::bench::wire::Ask;

/// How many are on their way at once: less than any backlog.
const BATCH: usize = 64;

pub fn measure(args: &Args) -> Result<Figures> {
    memory::more_descriptors();
    let before = Memory::now(args.group)?;
    let begin = Instant::now();
    let mut held = Vec::with_capacity(args.count);
    while held.len() < args.count {
        let batch = BATCH.min(args.count - held.len());
        let place = held.len();
        for _ in 0..batch {
            held.push(Stream::begin(&args.address).with_context(|| format!("connection {}", held.len()))?);
        }
        for stream in &held[place..] {
            stream.wait(PollFlags::POLLOUT)?;
            stream.connected()?;
            stream.write_all(&Ask::Ping.encode())?;
        }
        for (number, stream) in held[place..].iter().enumerate() {
            stream.read_answer(&mut [0]).with_context(|| format!("connection {}", place + number))?;
        }
    }
    let took = begin.elapsed().as_secs_f64();
    let after = Memory::now(args.group)?;
    let count = args.count as f64;
    let name = format!("idle{}", args.count);
    let mut figures = Figures::new();
    figures.insert(format!("{name}.kernel_bytes"), (after.kernel - before.kernel) / count);
    figures.insert(format!("{name}.tcp_pages_bytes"), (after.tcp - before.tcp) / count);
    figures.insert(format!("{name}.seconds_to_connect"), took);
    if let (Some(before), Some(after)) = (before.process, after.process) {
        figures.insert(format!("{name}.process_bytes"), (after - before) / count);
        figures.insert(format!("{name}.process_total_bytes"), after);
    }
    drop(held);
    memory::settle(before.sockets, Duration::from_secs(5));
    Ok(figures)
}
