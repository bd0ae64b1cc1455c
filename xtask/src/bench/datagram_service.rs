//! The service inside the container that takes datagrams: a thread and a socket for each port, and a system call for each datagram.

use std::collections::HashMap;
use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

use super::contenders::OwnService;
use super::launch::{Launch, Launched, this_task};
use crate::run::process::{Lines, die_with_parent};

/// What `cargo xtask bench` gives it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ports to be bound
    ports: Vec<u16>,
}

/// What a datagram asks for, with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// To come back as it is.
    Echo,
    /// To be counted; each so many-th, by its place in the row, is answered with the count and that place.
    Noted,
    /// How many have been counted of this client.
    Count,
    /// So many of this datagram's length, each with its place in the row of all that were sent to this client.
    Send,
    /// The same with one system call, which the kernel takes apart (udp(7) UDP_SEGMENT), as servers of QUIC do.
    SendAtOnce,
}

impl Word {
    const ALL: [(Self, u8); 5] = [
        (Self::Echo, b'E'),
        (Self::Noted, b'N'),
        (Self::Count, b'C'),
        (Self::Send, b'S'),
        (Self::SendAtOnce, b'A'),
    ];

    /// Writes it, with the number, in front.
    pub fn write(self, number: u32, bytes: &mut [u8]) {
        bytes[0] = Self::ALL.iter().find(|(word, _)| *word == self).map_or(0, |(_, byte)| *byte);
        bytes[1..5].copy_from_slice(&number.to_le_bytes());
    }

    /// Writes the datagram's place in a row of some.
    pub fn write_place(place: u32, bytes: &mut [u8]) {
        bytes[5..9].copy_from_slice(&place.to_le_bytes());
    }

    /// Writes which client sends it: a forwarder with two processes sends a client's datagrams from two addresses.
    pub fn write_client(client: u32, bytes: &mut [u8]) {
        bytes[9..13].copy_from_slice(&client.to_le_bytes());
    }

    fn client(bytes: &[u8]) -> u32 {
        bytes.get(9..).and_then(<[u8]>::first_chunk).map_or(0, |client| u32::from_le_bytes(*client))
    }

    /// That place.
    pub fn place(bytes: &[u8]) -> Option<u32> {
        bytes.get(5..)?.first_chunk().map(|place| u32::from_le_bytes(*place))
    }

    fn read(bytes: &[u8]) -> Option<(Self, u32)> {
        let (first, rest) = bytes.split_first()?;
        let (word, _) = Self::ALL.into_iter().find(|(_, byte)| byte == first)?;
        Some((word, u32::from_le_bytes(*rest.first_chunk()?)))
    }
}

/// Starts it so, and waits until it is bound.
pub fn start(launch: Launch<'_>, ports: &[u16]) -> Result<OwnService> {
    let parts = ["bench".into(), "datagram-service".into()].into_iter();
    let args: Vec<String> = parts.chain(ports.iter().map(u16::to_string)).collect();
    let mut command = launch.command(this_task(), &args)?;
    let mut launched = Launched(command.stdout(Stdio::piped()).spawn().context("starting the service")?);
    let lines = Lines::of(launched.stdout()?);
    lines.until(Duration::from_secs(10), &mut Vec::new(), |line| line == "bound")?;
    Ok((launched, lines))
}

/// The service: `bound` when it is.
pub fn main(args: &Args) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    let bind = |port: &u16| {
        // slirp4netns writes to an address of its interface.
        UdpSocket::bind((Ipv4Addr::UNSPECIFIED, *port)).with_context(|| format!("cannot bind port {port}"))
    };
    let sockets: Vec<UdpSocket> = args.ports.iter().map(bind).collect::<Result<_>>()?;
    println!("bound");
    std::thread::scope(|scope| {
        let threads: Vec<_> = sockets.iter().map(|socket| scope.spawn(|| serve(socket))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a port broke")))
    })
}

/// Of one client.
#[derive(Debug, Default)]
struct Row {
    counted: u64,
    sent: u32,
}

/// So many of these, one after another, with their places in the row.
pub fn in_a_row(datagram: &[u8], count: u32, next: &mut u32) -> Vec<u8> {
    let mut all = datagram.repeat(count as usize);
    for one in all.chunks_exact_mut(datagram.len()) {
        Word::write_place(*next, one);
        *next += 1;
    }
    all
}

/// Sends datagrams of one length with one system call, to where the socket is connected or to `to`.
pub fn send_at_once(
    socket: &UdpSocket,
    all: &[u8],
    length: usize,
    to: Option<SocketAddr>,
) -> nix::Result<usize> {
    let segment = u16::try_from(length).map_err(|_| Errno::EINVAL)?;
    let (parts, along) = ([IoSlice::new(all)], [ControlMessage::UdpGsoSegments(&segment)]);
    let to = to.map(SockaddrStorage::from);
    sendmsg(socket.as_raw_fd(), &parts, &along, MsgFlags::empty(), to.as_ref())
}

fn serve(socket: &UdpSocket) -> Result<()> {
    let mut rows: HashMap<u32, Row> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    loop {
        // A client that is gone may have refused the last one.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let datagram = &mut buffer[..length];
        let Some((word, number)) = Word::read(datagram) else { continue };
        // Where the client's buffer is full it is lost, as on any way.
        let answer = |bytes: &[u8]| drop(socket.send_to(bytes, from));
        if word == Word::Echo {
            answer(datagram);
            continue;
        }
        let row = rows.entry(Word::client(datagram)).or_default();
        match word {
            Word::Echo => {}
            Word::Noted => {
                row.counted += 1;
                let place = Word::place(datagram).unwrap_or(0);
                if number > 0 && (place + 1).is_multiple_of(number) {
                    answer(&[row.counted, place.into()].map(u64::to_le_bytes).concat());
                }
            }
            Word::Count => answer(&row.counted.to_le_bytes()),
            Word::SendAtOnce => {
                let all = in_a_row(datagram, number, &mut row.sent);
                let _sent = send_at_once(socket, &all, length, Some(from));
            }
            Word::Send => {
                for _ in 0..number {
                    Word::write_place(row.sent, datagram);
                    row.sent += 1;
                    answer(datagram);
                }
            }
        }
    }
}
