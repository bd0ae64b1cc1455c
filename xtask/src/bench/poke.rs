//! The first word to a service: sent again and again until it answers, and often enough that a kernel relay knows it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::stream::{self, Address, Stream};
use crate::run::process::die_with_parent;

const FINDS_WITHIN: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// What is told the poke.
#[derive(Debug, clap::Args)]
pub struct Args {
    address: Address,
    /// What to send: `\r` and `\n` stand for those bytes, and all of it may be in hexadecimal, as `hex:0d0a`
    words: String,
    /// How often to be answered
    #[arg(long, default_value_t = 1)]
    times: usize,
}

/// The part.
pub fn main(args: &Args) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    stream::set_patience(FINDS_WITHIN / 3);
    let words = unescape(&args.words)?;
    let deadline = Instant::now() + FINDS_WITHIN;
    let mut answered = 0;
    while answered < args.times {
        match once(&args.address, &words) {
            Ok(()) => answered += 1,
            Err(error) if Instant::now() > deadline => return Err(error).context("no answer"),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
    Ok(())
}

fn once(address: &Address, words: &[u8]) -> Result<()> {
    let stream = Stream::connect(address)?;
    stream.write_all(words)?;
    stream.read_answer(&mut [0])?;
    Ok(())
}

fn unescape(words: &str) -> Result<Vec<u8>> {
    let Some(digits) = words.strip_prefix("hex:") else {
        return Ok(words.replace("\\r", "\r").replace("\\n", "\n").into_bytes());
    };
    let byte = |at: usize| Ok(u8::from_str_radix(digits.get(at..at + 2).context("an odd digit")?, 16)?);
    (0..digits.len()).step_by(2).map(byte).collect()
}
