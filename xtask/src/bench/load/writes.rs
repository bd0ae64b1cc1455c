//! One way in writes of several sizes, each tried first and waited for only when it does not fit: how a sender goes about it decides
//! what a forwarder costs it.

use std::time::Instant;

use anyhow::{Context as _, Result};

use super::{Args, Figures};
use crate::bench::stream::{Address, Stream};
use crate::bench::wire::Ask;

/// The sizes as powers of two, with their names.
const SIZES: [(&str, u8); 4] = [("4k", 12), ("64k", 16), ("256k", 18), ("1m", 20)];
/// What the first guess at the rate is made with.
const TRIAL: u64 = 16 << 20;

pub fn measure(args: &Args) -> Result<Figures> {
    let mut figures = Figures::new();
    let mut buffer = vec![0x5a; 1 << 20];
    // As long in all as other measurements, or each would be too short to tell anything.
    let seconds = (args.seconds / 4.0).max(0.1);
    for (name, log) in SIZES {
        for (way, transfer) in [("down", download as Transfer), ("up", upload)] {
            let trial = Instant::now();
            transfer(&args.address, TRIAL, log, &mut buffer).context("trial transfer")?;
            let rate = TRIAL as f64 / trial.elapsed().as_secs_f64();
            let bytes = ((rate * seconds) as u64).clamp(TRIAL, 64 << 30);
            let begin = Instant::now();
            transfer(&args.address, bytes, log, &mut buffer)?;
            figures.insert(
                format!("writes{name}.{way}_bytes_per_second"),
                bytes as f64 / begin.elapsed().as_secs_f64(),
            );
        }
    }
    Ok(figures)
}

type Transfer = fn(&Address, u64, u8, &mut [u8]) -> Result<()>;

fn download(address: &Address, bytes: u64, log: u8, buffer: &mut [u8]) -> Result<()> {
    let stream = Stream::connect(address)?;
    stream.write_all(&Ask::Writes(bytes, log).encode())?;
    let mut to_come = bytes;
    while to_come > 0 {
        let read = stream.read(buffer)?;
        anyhow::ensure!(read > 0, "the connection ended {to_come} bytes early");
        to_come -= (read as u64).min(to_come);
    }
    Ok(())
}

fn upload(address: &Address, bytes: u64, log: u8, buffer: &mut [u8]) -> Result<()> {
    let stream = Stream::connect(address)?;
    stream.write_all(&Ask::Sink(bytes).encode())?;
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(1 << log);
        stream.write_all(&buffer[..now])?;
        left -= now as u64;
    }
    stream.read_answer(&mut [0; 8])?;
    Ok(())
}
