//! Requests and answers on one connection, one at a time.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{Args, Figures};
use crate::bench::awake::Awake;
use crate::bench::cpu::Meter;
use crate::bench::statistics::Percentiles;
use crate::bench::stream::{Address, Stream};
use crate::bench::wire::Ask;

pub fn measure(args: &Args, size: usize) -> Result<Figures> {
    let mut requests = Requests::begin(&args.address, size)?;
    requests.run(Duration::from_secs_f64(args.seconds / 10.0))?;

    let meter = Meter::start(args.group)?;
    let trips = requests.run(Duration::from_secs_f64(args.seconds))?;
    let spent = meter.stop()?;
    let count = trips.count() as f64;
    let name = args.load.name();
    let mut figures = trips.figures(&name);
    figures.insert(format!("{name}.system_cpu_per_request"), spent.system / count);
    if let Some(own) = spent.group {
        figures.insert(format!("{name}.own_cpu_per_request"), own / count);
    }
    if size == SMALL {
        let awake = Awake::keep()?;
        requests.run(Duration::from_secs_f64(args.seconds / 20.0))?;
        let trips = requests.run(Duration::from_secs_f64(args.seconds / 2.0))?;
        drop(awake);
        figures.extend(trips.figures("requests64_awake"));
    }
    Ok(figures)
}

/// The size at which waking processors is most of a round trip.
const SMALL: usize = 64;

/// A connection to the echo.
pub struct Requests {
    stream: Stream,
    sent: Vec<u8>,
    came: Vec<u8>,
}

impl Requests {
    pub fn begin(address: &Address, size: usize) -> Result<Self> {
        let stream = Stream::connect(address)?;
        stream.write_all(&Ask::Echo.encode())?;
        Ok(Self { stream, sent: vec![0x5a; size], came: vec![0; size] })
    }

    /// Asks for so long; how long each answer took.
    pub fn run(&mut self, how_long: Duration) -> Result<Percentiles> {
        let mut trips = Vec::with_capacity(1 << 16);
        let end = Instant::now() + how_long;
        loop {
            let begin = Instant::now();
            if begin >= end && !trips.is_empty() {
                return Ok(Percentiles::of(trips));
            }
            self.sent[0] = trips.len() as u8;
            self.stream.write_all(&self.sent)?;
            self.stream.read_answer(&mut self.came).context("waiting for an answer")?;
            trips.push(begin.elapsed().as_secs_f64());
            anyhow::ensure!(self.came == self.sent, "another answer than the one asked for");
        }
    }
}
