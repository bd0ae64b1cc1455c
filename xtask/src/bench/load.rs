//! The load generators: one process a measurement, so that it can be inside the namespace or outside, and brings its own
//! threads. Each warms the way with two connections first, for the kernel relay learns a service's kind on the first.

mod bulk;
mod connections;
pub mod datagrams;
mod flows;
mod idle;
mod requests;
mod slow;
mod writes;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use nix::sys::signal::Signal;

use super::stream::{Address, Stream};
use super::wire::{Ask, PING};
use crate::run::process::die_with_parent;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// One connection, service to client
    Download,
    /// One connection, client to service
    Upload,
    /// One connection, both ways at once
    Duplex,
    /// One way, in writes of 4 KiB to 1 MiB that are tried first
    Writes,
    /// A request and its answer of 64 bytes, one at a time
    Requests64,
    /// The same of 1 KiB
    Requests1k,
    /// The same of 16 KiB
    Requests16k,
    /// Connect, a byte each way, close; one at a time
    Connections,
    /// 64 connections with requests of 1 KiB
    Flows,
    /// Requests of 64 bytes beside four readers that are slow
    Slow,
    /// Connections that do nothing
    Idle,
}

impl Load {
    /// What is measured in rounds.
    pub const TIMED: [Self; 10] = [
        Self::Download,
        Self::Upload,
        Self::Duplex,
        Self::Writes,
        Self::Requests64,
        Self::Requests1k,
        Self::Requests16k,
        Self::Connections,
        Self::Flows,
        Self::Slow,
    ];

    /// As the command line has it.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// What `cargo xtask bench` gives a load generator.
#[derive(Debug, clap::Args)]
pub struct Args {
    load: Load,
    /// Where the forwarder listens
    address: Address,
    /// How long to measure
    #[arg(long, default_value_t = 0.2)]
    seconds: f64,
    /// How many connections
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// The process group of the forwarder, to count its own time and memory
    #[arg(long)]
    group: Option<i32>,
}

/// What a measurement gave, by the names of [`super::metrics`].
pub type Figures = BTreeMap<String, f64>;

/// The load generator: its figures as one line of JSON.
pub fn main(args: &Args) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    for _ in 0..2 {
        ping(&args.address).context("the way to the service does not work")?;
    }
    let figures = match args.load {
        Load::Download | Load::Upload | Load::Duplex => bulk::measure(args),
        Load::Writes => writes::measure(args),
        Load::Requests64 => requests::measure(args, 64),
        Load::Requests1k => requests::measure(args, 1024),
        Load::Requests16k => requests::measure(args, 16 * 1024),
        Load::Connections => connections::measure(args),
        Load::Flows => flows::measure(args),
        Load::Slow => slow::measure(args),
        Load::Idle => idle::measure(args),
    }?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

/// The cheapest proof that the way works: a byte there, a byte back.
pub fn ping(address: &Address) -> Result<()> {
    let stream = Stream::connect(address)?;
    stream.write_all(&Ask::Ping.encode())?;
    let mut answer = [0];
    stream.read_answer(&mut answer)?;
    anyhow::ensure!(answer == [PING], "another byte came back");
    Ok(())
}
