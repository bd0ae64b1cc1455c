//! New connections: connect, a byte each way, close; one after the other.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Args, Figures, ping};
use crate::bench::cpu::Meter;

pub fn measure(args: &Args) -> Result<Figures> {
    let how_long = Duration::from_secs_f64(args.seconds);
    let meter = Meter::start(args.group)?;
    let begin = Instant::now();
    let mut count = 0.0;
    while begin.elapsed() < how_long {
        ping(&args.address)?;
        count += 1.0;
    }
    let spent = meter.stop()?;
    let mut figures = Figures::new();
    figures.insert("connections.per_second".into(), count / spent.elapsed);
    figures.insert("connections.system_cpu".into(), spent.system / count);
    Ok(figures)
}
