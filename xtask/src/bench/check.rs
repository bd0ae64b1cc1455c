//! What a forwarder must get right beside being fast: half-close, aborts, and partners that do not read.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::stream::{self, Address, Stream};
use super::wire::{self, Ask, End};
use super::{clock, load};
use crate::run::process::die_with_parent;

/// For all cases together.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Longer than any answer takes here, short enough to get through with those that never answer.
const HAPPENS_WITHIN: Duration = Duration::from_secs(3);
/// What a forwarder and the sockets' own buffers may hold of a stream that is not read.
const BOUND: u64 = 64 << 20;

/// What is told the part.
#[derive(Debug, clap::Args)]
pub struct Args {
    address: Address,
}

/// What came of a case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    pub case: String,
    /// What it got wrong.
    pub wrong: Option<String>,
}

type Case = (&'static str, fn(&Address) -> Result<()>);

/// The cases, in the order of the table.
pub const CASES: [Case; 8] = [
    ("bytes unchanged", bytes_unchanged),
    ("client half-closes", client_half_closes),
    ("service half-closes", service_half_closes),
    ("client aborts", client_aborts),
    ("service aborts", service_aborts),
    ("service never reads", service_never_reads),
    ("client never reads", client_never_reads),
    ("client leaves unread bytes", client_leaves_unread_bytes),
];

/// The part: the verdicts as one line of JSON.
pub fn main(args: &Args) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    stream::set_patience(HAPPENS_WITHIN);
    for _ in 0..2 {
        load::ping(&args.address).context("the way to the service does not work")?;
    }
    let verdicts: Vec<Verdict> = CASES
        .iter()
        .map(|(case, check)| {
            let wrong = check(&args.address).err().map(|error| format!("{error:#}"));
            Verdict { case: (*case).to_owned(), wrong }
        })
        .collect();
    println!("{}", serde_json::to_string(&verdicts)?);
    Ok(())
}

fn ask(address: &Address, ask: Ask) -> Result<Stream> {
    let stream = Stream::connect(address)?;
    stream.write_all(&ask.encode())?;
    Ok(stream)
}

/// Reads to the end: a clean one.
fn rest(stream: &Stream) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 64 * 1024];
    let mut all = Vec::new();
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(all),
            read => all.extend_from_slice(&buffer[..read]),
        }
    }
}

/// What the service knows of a token.
fn query(address: &Address, token: u64) -> Result<(u64, End)> {
    let mut answer = [0; 16];
    ask(address, Ask::Query(token))?.read_answer(&mut answer).context("another connection got no answer")?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|place| answer[at + place]));
    Ok((number(0), End::decode(number(8))))
}

/// Waits until the service knows how a connection ended.
fn end_of(address: &Address, token: u64) -> Result<(u64, End)> {
    let deadline = Instant::now() + HAPPENS_WITHIN;
    loop {
        let (bytes, end) = query(address, token)?;
        if end != End::Open || Instant::now() > deadline {
            return Ok((bytes, end));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn same(came: &[u8], what: &str) -> Result<()> {
    let wrong = came.iter().zip(0..).position(|(byte, place)| *byte != wire::pattern(place));
    wrong.map_or(Ok(()), |place| bail!("byte {place} of {what} is another"))
}

/// Eight megabytes of pattern through the echo, in portions of all sizes.
fn bytes_unchanged(address: &Address) -> Result<()> {
    const ALL: usize = 8 << 20;
    let stream = ask(address, Ask::Echo)?;
    let mut sent = vec![0; ALL];
    wire::fill(&mut sent, 0);
    let (mut written, mut came, mut buffer) = (0, Vec::with_capacity(ALL), vec![0; 100_000]);
    let deadline = Instant::now() + stream::PATIENCE;
    while came.len() < ALL {
        ensure!(Instant::now() < deadline, "only {} of {ALL} bytes came back", came.len());
        let portion = (written * 7 % 99_991 + 1).min(ALL - written);
        let mut moved = false;
        // Not more under way than the buffers on it hold, for the echo does not read while it cannot write.
        if portion > 0 && written - came.len() < 256 * 1024 {
            match stream.try_write(&sent[written..written + portion]) {
                Ok(more) => (written, moved) = (written + more, true),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno).context("sending"),
            }
        }
        match stream.try_read(&mut buffer) {
            Ok(0) => bail!("the connection ended after {} bytes", came.len()),
            Ok(read) => {
                came.extend_from_slice(&buffer[..read]);
                moved = true;
            }
            Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(errno).context("receiving"),
        }
        if !moved {
            stream.wait(nix::poll::PollFlags::POLLIN)?;
        }
    }
    same(&came, "the echo")
}

/// The answer comes after the client has said that it sends no more.
fn client_half_closes(address: &Address) -> Result<()> {
    const SENT: u64 = 100_000;
    const ANSWER: u64 = 1 << 20;
    let stream = ask(address, Ask::AnswerAtEnd(ANSWER))?;
    stream.write_all(&vec![0; SENT as usize])?;
    stream.half_close()?;
    let came = rest(&stream).context("the answer after the half-close")?;
    ensure!(came.len() as u64 == ANSWER + 8, "{} of {} bytes of the answer came", came.len(), ANSWER + 8);
    ensure!(came[..8] == SENT.to_le_bytes(), "the service did not get all bytes");
    same(&came[8..], "the answer")
}

/// The client goes on sending after the service has said that it sends no more.
fn service_half_closes(address: &Address) -> Result<()> {
    const SENT: u64 = 1_000_000;
    let token = clock::now();
    let stream = ask(address, Ask::HalfClose(token))?;
    ensure!(rest(&stream).context("the service's end")?.is_empty(), "bytes that were not sent");
    // Half of it later, for a forwarder that closes both ways takes a moment to refuse.
    for _ in 0..2 {
        stream.write_all(&vec![0; SENT as usize / 2]).context("sending after the service's half-close")?;
        query(address, token)?;
    }
    drop(stream);
    let (bytes, end) = end_of(address, token)?;
    ensure!(bytes == SENT, "the service got {bytes} of {SENT} bytes sent after its half-close");
    ensure!(end == End::Eof, "the service saw {end:?} instead of the end");
    Ok(())
}

fn client_aborts(address: &Address) -> Result<()> {
    let token = clock::now();
    let stream = ask(address, Ask::Watch(token))?;
    stream.read_answer(&mut [0])?;
    stream.write_all(b"and then")?;
    // The bytes have arrived before the reset, which would overtake them.
    let deadline = Instant::now() + HAPPENS_WITHIN;
    while query(address, token)?.0 < 8 && Instant::now() < deadline {}
    stream.abort()?;
    match (end_of(address, token)?.1, address) {
        // A unix socket has no reset.
        (End::Reset, _) | (End::Eof, Address::Unix(_)) => Ok(()),
        (End::Eof, _) => bail!("the service saw a clean end"),
        (End::Open, _) => bail!("the service heard nothing of it"),
    }
}

fn service_aborts(address: &Address) -> Result<()> {
    let stream = ask(address, Ask::Abort)?;
    match (rest(&stream), address) {
        (Err(error), _) if error.raw_os_error() == Some(Errno::ECONNRESET as i32) => Ok(()),
        (Ok(_), Address::Unix(_)) => Ok(()),
        (Ok(_), _) => bail!("the client saw a clean end"),
        (Err(error), _) => Err(error).context("the client heard nothing of it"),
    }
}

/// What the client sends piles up within bounds, and others are served.
fn service_never_reads(address: &Address) -> Result<()> {
    let stream = ask(address, Ask::Deaf)?;
    stream.read_answer(&mut [0])?;
    let portion = vec![0; 256 * 1024];
    let (mut taken, mut since) = (0, Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        match stream.try_write(&portion) {
            Ok(written) => {
                taken += written as u64;
                since = Instant::now();
                ensure!(taken <= BOUND, "more than {} MiB were taken that are not read", BOUND >> 20);
            }
            Err(Errno::EAGAIN) => std::thread::sleep(Duration::from_millis(2)),
            Err(errno) => return Err(errno).context("sending"),
        }
    }
    load::ping(address).context("another connection meanwhile")
}

/// What the service sends piles up within bounds, and others are served.
fn client_never_reads(address: &Address) -> Result<()> {
    let token = clock::now();
    let stream = ask(address, Ask::Flood(token))?;
    let (mut sent, mut since, begin) = (0, Instant::now(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        let (now, _) = query(address, token)?;
        if now > sent {
            (sent, since) = (now, Instant::now());
        }
        ensure!(sent <= BOUND, "more than {} MiB were taken that are not read", BOUND >> 20);
        ensure!(begin.elapsed() < 3 * HAPPENS_WITHIN, "what is not read still grows, slowly");
    }
    load::ping(address).context("another connection meanwhile")?;
    drop(stream);
    Ok(())
}

/// A client that closes with bytes unread aborts: the service must not go on sending for ever.
fn client_leaves_unread_bytes(address: &Address) -> Result<()> {
    let token = clock::now();
    let stream = ask(address, Ask::Flood(token))?;
    stream.read_answer(&mut [0])?;
    drop(stream);
    let deadline = Instant::now() + HAPPENS_WITHIN;
    let mut sent = query(address, token)?.0;
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        let now = query(address, token)?.0;
        if now == sent {
            return Ok(());
        }
        sent = now;
    }
    bail!("the service still sends to a client that has left")
}
