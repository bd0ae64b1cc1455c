//! The client: asks for the page, and measures a download and round trips, every byte compared.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::process::die_with_parent;
use super::service::{SEEN_AS, pattern, read_head};
use super::stream::Stream;

/// One round of measuring: this download, then as many round trips of 64 bytes.
pub const BULK: u64 = 128 << 20;
/// See [`BULK`].
pub const ROUND_TRIPS: usize = 2000;

/// What one round gave.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Of the download.
    pub bytes_per_second: f64,
    /// The median of the round trips.
    pub round_trip: Duration,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.bytes_per_second, self.round_trip.as_nanos())
    }
}

impl FromStr for Figures {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (rate, nanos) = text.split_once(' ').context("two figures")?;
        Ok(Self { bytes_per_second: rate.parse()?, round_trip: Duration::from_nanos(nanos.parse()?) })
    }
}

/// The client process inside the container.
pub fn main(address: &str) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    match measure(address) {
        Ok(figures) => println!("figures {figures}"),
        Err(error) => println!("error the client inside the container: {error:#}"),
    }
    Ok(())
}

/// What came of `GET /`.
pub struct Answer {
    /// The status line.
    pub status: String,
    pub page: String,
    /// The client's own address.
    pub own: String,
    /// What the service takes for it.
    pub seen_as: String,
}

/// `GET /`.
pub fn get_page(address: &str) -> Result<Answer> {
    let (mut stream, head) = request(address, "/")?;
    let mut page = String::new();
    stream.read_to_string(&mut page).context("the page")?;
    let seen_as = head.lines().find_map(|line| line.strip_prefix(SEEN_AS));
    Ok(Answer {
        status: head.lines().next().unwrap_or_default().to_owned(),
        page,
        own: stream.local_address()?.to_string(),
        seen_as: seen_as.context("the service does not tell whom it sees")?.to_owned(),
    })
}

/// One round of figures.
pub fn measure(address: &str) -> Result<Figures> {
    let bytes_per_second = download(address)?;
    Ok(Figures { bytes_per_second, round_trip: round_trip(address)? })
}

fn request(address: &str, path: &str) -> Result<(Stream, String)> {
    let mut stream = Stream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let head = read_head(&mut stream).context("no answer")?;
    Ok((stream, head))
}

fn download(address: &str) -> Result<f64> {
    let expected = pattern();
    let mut buffer = vec![0; expected.len()];
    let begin = Instant::now();
    let (mut stream, _) = request(address, &format!("/bulk?bytes={BULK}"))?;
    let mut place = 0;
    loop {
        // Never across the end of the pattern, so that one comparison tells.
        let offset = (place % expected.len() as u64) as usize;
        let read = stream.read(&mut buffer[offset..]).context("the download broke off")?;
        if read == 0 {
            break;
        }
        let right = buffer[offset..offset + read] == expected[offset..offset + read];
        ensure!(right, "a wrong byte between {place} and {}", place + read as u64);
        place += read as u64;
    }
    let took = begin.elapsed();
    ensure!(place == BULK, "{place} bytes came instead of {BULK}");
    Ok(BULK as f64 / took.as_secs_f64())
}

fn round_trip(address: &str) -> Result<Duration> {
    let (mut stream, _) = request(address, "/echo")?;
    let mut trips = Vec::with_capacity(ROUND_TRIPS);
    for number in 0..ROUND_TRIPS {
        let (sent, mut back) = ([number as u8; 64], [0; 64]);
        let begin = Instant::now();
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        trips.push(begin.elapsed());
        ensure!(sent == back, "round trip {number} brought other bytes back");
    }
    Ok(median(trips, Duration::cmp))
}

/// The one in the middle, of at least one.
pub fn median<T: Copy>(mut values: Vec<T>, order: impl Fn(&T, &T) -> std::cmp::Ordering) -> T {
    values.sort_by(order);
    values[values.len() / 2]
}
