//! Datagrams: how many arrive, with as many on their way as buffers hold and with a sender that does not care; and round trips.

use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::Signal;

use super::Figures;
use crate::bench::awake::Awake;
use crate::bench::cpu::Meter;
use crate::bench::datagram_service::{Word, in_a_row, send_at_once};
use crate::bench::statistics::Percentiles;
use crate::run::process::die_with_parent;

/// What `cargo xtask bench` gives this load generator.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the forwarder listens
    address: SocketAddr,
    /// The bytes of a datagram
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// How long to measure each figure
    #[arg(long, default_value_t = 0.2)]
    seconds: f64,
    /// The process group of the forwarder, to count its own time
    #[arg(long)]
    group: Option<i32>,
    /// Only see whether an answer comes
    #[arg(long)]
    poke: bool,
}

/// An answer that has not come by then has been lost.
const LOST: Duration = Duration::from_millis(20);
/// How many may be on their way so that they fit into a socket's buffer of Linux' usual size, which counts memory and not bytes.
const MOST: usize = 128;
const MOST_BYTES: usize = 96 * 1024;
/// Clients that ask at the same time.
const CLIENTS: usize = 64;
/// Figures beside the rate, of the smallest size alone.
const SMALL: usize = 64;

/// The load generator: its figures as one line of JSON.
pub fn main(args: &Args) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    let client = Client::new(args.address, args.size)?;
    client.poke(Duration::from_secs(10)).context("the way to the service does not work")?;
    let mut figures = Figures::new();
    if !args.poke {
        let how_long = Duration::from_secs_f64(args.seconds);
        for sends in [Sends::Each, Sends::AtOnce] {
            client.windowed(args, sends, how_long, &mut figures)?;
            client.down(args, sends, how_long, &mut figures)?;
        }
        client.flood(how_long, &mut figures)?;
        client.round_trips(how_long, &mut figures)?;
        if args.size == SMALL {
            many_clients(args, how_long, &mut figures)?;
        }
    }
    let name = name_of(args.size);
    let named: Figures =
        figures.into_iter().map(|(figure, value)| (format!("{name}.{figure}"), value)).collect();
    println!("{}", serde_json::to_string(&named)?);
    Ok(())
}

/// What figures of this size begin with.
pub fn name_of(size: usize) -> String {
    format!("datagrams{size}")
}

/// How the sender sends: with a system call for each, or for as many as there are to send. The latter shows what a forwarder takes more of,
/// since a sender of its own pace takes as long as a forwarder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sends {
    Each,
    AtOnce,
}

impl Sends {
    /// What its figures begin with.
    const fn name(self) -> &'static str {
        match self {
            Self::Each => "",
            Self::AtOnce => "at_once.",
        }
    }
}

/// A client with a port of its own.
struct Client {
    socket: UdpSocket,
    size: usize,
    number: u32,
    /// The place of the next datagram in its row of those that are counted.
    next: Cell<u32>,
}

impl Client {
    fn new(to: SocketAddr, size: usize) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(LOST))?;
        // No other one has it: not of this process, and not of an earlier one.
        let port = u32::from(socket.local_addr()?.port());
        Ok(Self { socket, size, number: (std::process::id() << 16) | port, next: Cell::new(0) })
    }

    /// A datagram of this kind, of the size that is measured.
    fn datagram(&self, word: Word, number: u32) -> Vec<u8> {
        let mut bytes = vec![0x5a; self.size];
        word.write(number, &mut bytes);
        Word::write_client(self.number, &mut bytes);
        bytes
    }

    /// Asks until an answer comes.
    fn ask(&self, word: Word, number: u32, limit: Duration) -> Result<u64> {
        let (bytes, deadline) = (self.datagram(word, number), Instant::now() + limit);
        self.drain()?;
        while Instant::now() < deadline {
            // Of an earlier one: nothing is bound there yet.
            let _sent = self.socket.send(&bytes);
            let mut answer = [0; 65_536];
            if self.socket.recv(&mut answer).is_ok_and(|length| length >= 8) {
                return Ok(u64::from_le_bytes(answer[..8].try_into()?));
            }
        }
        anyhow::bail!("no answer for {limit:?}")
    }

    fn poke(&self, limit: Duration) -> Result<()> {
        self.ask(Word::Count, 0, limit).map(drop)
    }

    /// Takes what has come late.
    fn drain(&self) -> Result<()> {
        self.socket.set_nonblocking(true)?;
        while self.socket.recv(&mut [0; 65_536]).is_ok() {}
        Ok(self.socket.set_nonblocking(false)?)
    }

    fn window(&self) -> usize {
        MOST.min(MOST_BYTES / self.size)
    }

    /// To the service, with a window of datagrams on their way. One that is lost leaves the window with the next ones that arrive, so that
    /// a loss costs what was lost and no wait.
    fn windowed(&self, args: &Args, sends: Sends, how_long: Duration, figures: &mut Figures) -> Result<()> {
        let window = self.window() as u32;
        let portion = window / 4;
        let mut bytes = self.datagram(Word::Noted, portion);
        let before = self.ask(Word::Count, 0, LOST * 50)?;
        // Behind all those of before, so that no answer of theirs is taken for one of these.
        let begin = self.next.get().next_multiple_of(portion);
        let (mut sent, mut gone, mut answer) = (begin, begin, [0; 64]);
        let meter = Meter::start(args.group)?;
        let end = Instant::now() + how_long;
        while Instant::now() < end {
            while sent - gone + portion <= window {
                if sends == Sends::AtOnce {
                    let all = in_a_row(&bytes, portion, &mut sent);
                    send_at_once(&self.socket, &all, self.size, None).context("sending")?;
                    continue;
                }
                for _ in 0..portion {
                    Word::write_place(sent, &mut bytes);
                    self.socket.send(&bytes).context("sending")?;
                    sent += 1;
                }
            }
            gone = match self.socket.recv(&mut answer) {
                Ok(16) => {
                    let place = u32::try_from(u64::from_le_bytes(answer[8..16].try_into()?))?;
                    ensure!(place < sent, "place {place} is answered, of {sent}");
                    gone.max(place + 1)
                }
                // One of before that comes late.
                Ok(_) => gone,
                Err(_) => sent,
            };
        }
        let spent = meter.stop()?;
        self.next.set(sent);
        let arrived = (self.ask(Word::Count, 0, LOST * 50)? - before) as f64;
        ensure!(arrived > 0.0, "nothing arrived");
        let mut figure = |name: &str, value| {
            let _none = figures.insert(format!("{}{name}", sends.name()), value);
        };
        figure("up_per_second", arrived / spent.elapsed);
        figure("up_lost", (1.0 - arrived / f64::from(sent - begin)).max(0.0));
        figure("system_cpu", spent.system / arrived);
        if let Some(own) = spent.group {
            figure("own_cpu", own / arrived);
        }
        Ok(())
    }

    /// To the service, as fast as this process can.
    fn flood(&self, how_long: Duration, figures: &mut Figures) -> Result<()> {
        let bytes = self.datagram(Word::Noted, 0);
        let before = self.ask(Word::Count, 0, LOST * 50)?;
        let (begin, mut sent) = (Instant::now(), 0u64);
        while begin.elapsed() < how_long {
            for _ in 0..16 {
                self.socket.send(&bytes).context("sending")?;
            }
            sent += 16;
        }
        let elapsed = begin.elapsed().as_secs_f64();
        let arrived = (self.ask(Word::Count, 0, LOST * 50)? - before) as f64;
        figures.insert("flood_per_second".into(), arrived / elapsed);
        figures.insert("flood_lost".into(), (1.0 - arrived / sent as f64).max(0.0));
        Ok(())
    }

    /// To the client, which asks for the next ones while the last ones come, with a window as above.
    fn down(&self, args: &Args, sends: Sends, how_long: Duration, figures: &mut Figures) -> Result<()> {
        let window = self.window() as u32;
        let portion = window / 4;
        let word = if sends == Sends::AtOnce { Word::SendAtOnce } else { Word::Send };
        let question = self.datagram(word, portion);
        let mut buffer = vec![0; 65_536];
        // Of the service's row: where it begins for this figure, and up to which one they came or were lost.
        let (mut on_their_way, mut first, mut gone, mut arrived) = (0u32, None, 0u32, 0u64);
        let meter = Meter::start(args.group)?;
        let begin = Instant::now();
        while begin.elapsed() < how_long {
            while on_their_way + portion <= window {
                self.socket.send(&question).context("sending")?;
                on_their_way += portion;
            }
            match self.socket.recv(&mut buffer) {
                Ok(length) if length == self.size => {
                    arrived += 1;
                    let place = Word::place(&buffer[..length]).context("a short one")?;
                    if first.is_none() {
                        (first, gone) = (Some(place), place);
                    }
                    on_their_way = on_their_way.saturating_sub((place + 1).saturating_sub(gone));
                    gone = gone.max(place + 1);
                }
                // A count that comes late.
                Ok(_) => {}
                // The last ones were lost, or a question was.
                Err(_) => on_their_way = 0,
            }
        }
        let spent = meter.stop()?;
        ensure!(arrived > 0, "nothing came");
        let of_row = f64::from(gone - first.unwrap_or(gone)).max(1.0);
        let mut figure = |name: &str, value| {
            let _none = figures.insert(format!("{}{name}", sends.name()), value);
        };
        figure("down_per_second", arrived as f64 / spent.elapsed);
        figure("down_lost", (1.0 - arrived as f64 / of_row).max(0.0));
        if let Some(own) = spent.group {
            figure("down_own_cpu", own / arrived as f64);
        }
        // The last ones are still on their way.
        std::thread::sleep(LOST);
        self.drain()
    }

    fn round_trips(&self, how_long: Duration, figures: &mut Figures) -> Result<()> {
        figures.extend(self.trips(how_long)?.figures("trip"));
        let awake = Awake::keep()?;
        let trips = self.trips(how_long / 2)?;
        drop(awake);
        figures.extend(trips.figures("trip_awake"));
        Ok(())
    }

    fn trips(&self, how_long: Duration) -> Result<Percentiles> {
        let (mut trips, mut answer) = (Vec::with_capacity(1 << 16), vec![0; 65_536]);
        let begin = Instant::now();
        for number in 0u32.. {
            let asked = Instant::now();
            if asked.duration_since(begin) >= how_long && !trips.is_empty() {
                break;
            }
            let question = self.datagram(Word::Echo, number);
            self.socket.send(&question).context("sending")?;
            // One of an earlier question may still come.
            while let Ok(length) = self.socket.recv(&mut answer) {
                if answer[..length] == question {
                    trips.push(asked.elapsed().as_secs_f64());
                    break;
                }
            }
        }
        Ok(Percentiles::of(trips))
    }
}

/// Clients that each ask when they are answered.
fn many_clients(args: &Args, how_long: Duration, figures: &mut Figures) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let clients: Vec<Client> =
        (0..CLIENTS).map(|_| Client::new(args.address, args.size)).collect::<Result<_>>()?;
    for (number, client) in clients.iter().enumerate() {
        client.poke(LOST * 50)?;
        client.drain()?;
        client.socket.set_nonblocking(true)?;
        epoll.add(&client.socket, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
    }
    clients_ask(&epoll, &clients, args, how_long, "clients", figures)?;
    let _awake = Awake::keep()?;
    clients_ask(&epoll, &clients, args, how_long, "clients_awake", figures)
}

fn clients_ask(
    epoll: &Epoll,
    clients: &[Client],
    args: &Args,
    how_long: Duration,
    name: &str,
    figures: &mut Figures,
) -> Result<()> {
    let question = clients[0].datagram(Word::Echo, 0);
    let ask_all = || clients.iter().try_for_each(|client| client.socket.send(&question).map(drop));
    // What has come since does not count.
    for client in clients {
        while client.socket.recv(&mut [0; 64]).is_ok() {}
    }
    ask_all()?;
    let mut events = [EpollEvent::empty(); CLIENTS];
    let meter = Meter::start(args.group)?;
    let (begin, mut answered, mut buffer) = (Instant::now(), 0u64, vec![0; 65_536]);
    while begin.elapsed() < how_long {
        let ready = epoll.wait(&mut events, EpollTimeout::try_from(LOST)?)?;
        if ready == 0 {
            ask_all()?;
        }
        for event in &events[..ready] {
            let client = &clients[usize::try_from(event.data())?];
            while client.socket.recv(&mut buffer).is_ok() {
                answered += 1;
                client.socket.send(&question).context("sending")?;
            }
        }
    }
    let spent = meter.stop()?;
    ensure!(answered > 0, "no answer came");
    figures.insert(format!("{name}_per_second"), answered as f64 / spent.elapsed);
    figures.insert(format!("{name}_system_cpu"), spent.system / answered as f64);
    if let Some(own) = spent.group {
        figures.insert(format!("{name}_own_cpu"), own / answered as f64);
    }
    Ok(())
}
