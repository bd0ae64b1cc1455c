//! What the suites of the kernel relay's programs share: a cgroup for one test, connections, and a forwarder in miniature.
#![allow(dead_code, reason = "each suite uses a part of it")]

pub mod cgroup;
pub mod content;
pub mod forwarder;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_sockmap::{Config, Event, Kernel, Lane, SenderAddress, SenderKind, SenderRole, netns_cookie};
use nix::poll::{PollFd, PollFlags, poll};

use cgroup::Cgroup;
use content::Stream;

/// The time everything gets on a machine that does other things too.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Waits until a socket polls as asked.
pub fn await_poll(fd: BorrowedFd<'_>, flags: PollFlags) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        ensure!(left > 0, "{flags:?} did not come within {LIMIT:?}");
        match poll(&mut [PollFd::new(fd, flags)], u16::try_from(left).unwrap_or(u16::MAX)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A service's listener and the programs that watch it, in a cgroup and thread of their own.
pub struct Bench {
    pub kernel: Kernel,
    pub service: TcpListener,
    pub front: TcpListener,
    pub netns: u64,
    // Last, so that the programs are detached before the cgroup is removed.
    pub cgroup: Cgroup,
}

/// The four sockets of a forwarded connection, all non-blocking.
pub struct Ends {
    pub client: TcpStream,
    pub accepted: TcpStream,
    pub backend: TcpStream,
    pub service: TcpStream,
}

impl Bench {
    pub fn new() -> Result<Self> {
        Self::with(
            "127.0.0.1:0",
            Config { connections: 64, hook_blocking: false, bear_fionread: true, trace: false },
        )
    }

    /// Everything at `address`, with both lanes watched.
    pub fn with(address: &str, config: Config) -> Result<Self> {
        let cgroup = Cgroup::enter()?;
        let mut kernel = Kernel::load(&config)?;
        kernel.attach(cgroup.path())?;
        let service = TcpListener::bind(address)?;
        let front = TcpListener::bind(address)?;
        let netns = netns_cookie(service.as_fd())?;
        kernel.watch(netns, service.local_addr()?.port(), SenderRole::Service)?;
        kernel.watch(netns, front.local_addr()?.port(), SenderRole::Client)?;
        Ok(Self { kernel, service, front, netns, cgroup })
    }

    pub fn port(&self) -> u16 {
        self.service.local_addr().map_or(0, |address| address.port())
    }

    pub fn kind(&self) -> Option<SenderKind> {
        self.kernel.kind(self.netns, self.port())
    }

    /// One forwarded connection; the client connects the way non-blocking clients do.
    pub fn connect(&self) -> Result<Ends> {
        let (client, accepted) = pair(&self.front)?;
        let (backend, service) = pair(&self.service)?;
        Ok(Ends { client, accepted, backend, service })
    }

    pub fn service_lane(&self, ends: &Ends) -> Result<Lane> {
        let sender = sender(self.netns, &ends.backend)?;
        Ok(self.kernel.open_lane(&sender, ends.accepted.as_fd(), 0)?)
    }

    pub fn client_lane(&self, ends: &Ends) -> Result<Lane> {
        let sender = sender(self.netns, &ends.accepted)?;
        Ok(self.kernel.open_lane(&sender, ends.backend.as_fd(), 0)?)
    }

    /// A service's lane whose sender is hooked already, and how many bytes went the long way for that.
    pub fn hooked_lane(&mut self, ends: &Ends) -> Result<(Lane, u64)> {
        let lane = self.service_lane(ends)?;
        let passed = self.prove_by(ends, &lane, Self::pass_down)?;
        Ok((lane, passed))
    }

    /// Has the client send bytes (`y`), which go the long way, until it has proved to be a non-blocking one and is hooked, and
    /// says how many those were. The client's lane must be open.
    pub fn prove(&mut self, ends: &Ends, lane: &Lane) -> Result<u64> {
        self.prove_by(ends, lane, Self::pass)
    }

    fn prove_by(
        &mut self,
        ends: &Ends,
        lane: &Lane,
        pass: impl Fn(&Self, &Ends, &Lane, u64) -> Result<()>,
    ) -> Result<u64> {
        for total in 1..=10 {
            pass(self, ends, lane, total)?;
            if self.proved(Duration::from_millis(100))? {
                return Ok(total);
            }
        }
        anyhow::bail!("it was not hooked: {:?}", self.kernel.totals())
    }

    /// A byte of the client's (`y`) goes the long way; with it so many have.
    pub fn pass(&self, ends: &Ends, lane: &Lane, total: u64) -> Result<()> {
        long_way([&ends.client, &ends.accepted, &ends.backend, &ends.service], lane, total)
    }

    /// The same of the service's.
    pub fn pass_down(&self, ends: &Ends, lane: &Lane, total: u64) -> Result<()> {
        long_way([&ends.service, &ends.backend, &ends.accepted, &ends.client], lane, total)
    }

    /// Whether a sender proves to be a non-blocking one (and so is hooked) within this time.
    pub fn proved(&mut self, within: Duration) -> Result<bool> {
        let deadline = Instant::now() + within;
        loop {
            let proved = hook_who_has_proved(&mut self.kernel, |_| {});
            let left = deadline.saturating_duration_since(Instant::now()).as_millis() as u16;
            if proved || left == 0 {
                return Ok(proved);
            }
            poll(&mut [PollFd::new(self.kernel.events_fd(), PollFlags::POLLIN)], left)?;
        }
    }

    /// Waits for an event.
    pub fn await_event(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        loop {
            let mut found = None;
            self.kernel.drain_events(|event| found = found.or(Some(event).filter(&wanted)));
            if let Some(found) = found {
                return Ok(found);
            }
            await_poll(self.kernel.events_fd(), PollFlags::POLLIN).context("an event")?;
        }
    }
}

/// Hooks senders that have proved to be non-blocking ones; whether there were any. Other events are handed over.
pub fn hook_who_has_proved(kernel: &mut Kernel, mut each: impl FnMut(Event)) -> bool {
    let mut proved = Vec::new();
    kernel.drain_events(|event| match event {
        Event::Proved { socket, flow, .. } => proved.push((flow, socket)),
        event => each(event),
    });
    proved.iter().for_each(|(flow, socket)| kernel.hook(*flow, *socket));
    !proved.is_empty()
}

/// A byte (`y`) from the first socket to the second, and from the third to the fourth.
fn long_way([from, near, far, to]: [&TcpStream; 4], lane: &Lane, total: u64) -> Result<()> {
    use io::{Read as _, Write as _};
    let (mut from, mut near, mut far, mut to) = (from, near, far, to);
    let mut byte = [0];
    from.write_all(b"y")?;
    await_poll(near.as_fd(), PollFlags::POLLIN)?;
    near.read_exact(&mut byte)?;
    far.write_all(&byte)?;
    lane.forwarded(total, far.as_fd())?;
    await_poll(to.as_fd(), PollFlags::POLLIN)?;
    to.read_exact(&mut byte)?;
    ensure!(byte == *b"y", "another byte came: {byte:?}");
    Ok(())
}

/// The sender at the other end of a socket of the forwarder.
pub fn sender(netns: u64, socket: &TcpStream) -> Result<SenderAddress> {
    Ok(SenderAddress { netns, local: socket.peer_addr()?, remote: socket.local_addr()? })
}

/// connect(2) on a socket that is non-blocking before it connects, as an event loop does it.
pub fn connect_nonblocking(to: SocketAddr) -> Result<TcpStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
    let address = SockaddrStorage::from(to);
    match connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address) {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(error) => return Err(error).context("connect"),
    }
    await_poll(socket.as_fd(), PollFlags::POLLOUT)?;
    let stream = TcpStream::from(socket);
    stream.take_error()?.map_or(Ok(stream), |error| Err(error.into()))
}

/// A connection to a listener: the connecting end and the accepted one.
pub fn pair(to: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let connected = connect_nonblocking(to.local_addr()?)?;
    let (accepted, _) = to.accept()?;
    accepted.set_nonblocking(true)?;
    connected.set_nodelay(true)?;
    accepted.set_nodelay(true)?;
    Ok((connected, accepted))
}

/// Sends all of a stream's next `count` bytes, whatever blocks.
pub fn send(mut to: &TcpStream, stream: &mut Stream, count: usize) -> Result<()> {
    use io::Write as _;
    let block = stream.next(count);
    let mut sent = 0;
    while sent < block.len() {
        match to.write(&block[sent..]) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                await_poll(to.as_fd(), PollFlags::POLLOUT)?;
            }
            Err(error) => return Err(error).context("sending"),
        }
    }
    Ok(())
}

/// Receives and checks a stream's next `count` bytes.
pub fn receive(mut from: &TcpStream, stream: &mut Stream, count: usize) -> Result<()> {
    use io::Read as _;
    let mut block = vec![0; count.min(256 * 1024)];
    let mut left = count;
    while left > 0 {
        let most = left.min(block.len());
        match from.read(&mut block[..most]) {
            Ok(0) => anyhow::bail!("the end came with {left} of {count} bytes missing"),
            Ok(got) => {
                stream.check(&block[..got])?;
                left -= got;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                await_poll(from.as_fd(), PollFlags::POLLIN)?;
            }
            Err(error) => return Err(error).context("receiving"),
        }
    }
    Ok(())
}

/// The stream has ended.
pub fn receive_end(mut from: &TcpStream) -> Result<()> {
    use io::Read as _;
    loop {
        match from.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(got) => anyhow::bail!("{got} bytes instead of the end"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                await_poll(from.as_fd(), PollFlags::POLLIN)?;
            }
            Err(error) => return Err(error).context("waiting for the end"),
        }
    }
}
