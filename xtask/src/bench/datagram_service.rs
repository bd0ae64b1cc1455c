//! The service inside the container that takes datagrams: a thread and a socket for each port, and a system call for each datagram.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use crate::run::process::die_with_parent;

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
    /// To be counted; each so many-th is answered with the count.
    Noted,
    /// How many have been counted of this client.
    Count,
    /// So many of this datagram's length.
    Send,
}

impl Word {
    const ALL: [(Self, u8); 4] =
        [(Self::Echo, b'E'), (Self::Noted, b'N'), (Self::Count, b'C'), (Self::Send, b'S')];

    /// Writes it, with the number, in front.
    pub fn write(self, number: u32, bytes: &mut [u8]) {
        bytes[0] = Self::ALL.iter().find(|(word, _)| *word == self).map_or(0, |(_, byte)| *byte);
        bytes[1..5].copy_from_slice(&number.to_le_bytes());
    }

    fn read(bytes: &[u8]) -> Option<(Self, u32)> {
        let (first, rest) = bytes.split_first()?;
        let (word, _) = Self::ALL.into_iter().find(|(_, byte)| byte == first)?;
        Some((word, u32::from_le_bytes(*rest.first_chunk()?)))
    }
}

/// The service: `bound` when it is.
pub fn main(args: &Args) -> Result<()> {
    die_with_parent(Signal::SIGKILL)?;
    let bind = |port: &u16| {
        UdpSocket::bind((Ipv4Addr::LOCALHOST, *port)).with_context(|| format!("cannot bind port {port}"))
    };
    let sockets: Vec<UdpSocket> = args.ports.iter().map(bind).collect::<Result<_>>()?;
    println!("bound");
    std::thread::scope(|scope| {
        let threads: Vec<_> = sockets.iter().map(|socket| scope.spawn(|| serve(socket))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a port broke")))
    })
}

fn serve(socket: &UdpSocket) -> Result<()> {
    let mut counts: HashMap<SocketAddr, u64> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    loop {
        // A client that is gone may have refused the last one.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let Some((word, number)) = Word::read(&buffer[..length]) else { continue };
        // Where the client's buffer is full it is lost, as on any way.
        let answer = |bytes: &[u8]| drop(socket.send_to(bytes, from));
        match word {
            Word::Echo => answer(&buffer[..length]),
            Word::Noted => {
                let count = counts.entry(from).or_default();
                *count += 1;
                if number > 0 && count.is_multiple_of(number.into()) {
                    answer(&count.to_le_bytes());
                }
            }
            Word::Count => answer(&counts.get(&from).copied().unwrap_or(0).to_le_bytes()),
            Word::Send => (0..number).for_each(|_| answer(&buffer[..length])),
        }
    }
}
