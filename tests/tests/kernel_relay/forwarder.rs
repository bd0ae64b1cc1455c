//! A forwarder in miniature: it copies what was passed, grants credit and handles the ends, in one thread with poll(2), as the
//! lanes' contract asks.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bro_sockmap::{Event, Kernel, Lane, LaneCounters};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::content::Numbers;
use super::{LIMIT, hook_who_has_proved};

/// One connection: `accepted` faces the client, `backend` the service.
pub struct Connection {
    accepted: TcpStream,
    backend: TcpStream,
    up: Direction,
    down: Direction,
}

#[derive(Default)]
struct Direction {
    lane: Option<Lane>,
    pending: Vec<u8>,
    total: u64,
    ended: bool,
    done: bool,
}

/// What went where.
#[derive(Debug, Default, Clone, Copy)]
pub struct Moved {
    pub copied: u64,
    pub lanes: LaneCounters,
}

impl Connection {
    pub fn new(
        accepted: TcpStream,
        backend: TcpStream,
        service_lane: Option<Lane>,
        client_lane: Option<Lane>,
    ) -> Self {
        let up = Direction { lane: client_lane, ..Direction::default() };
        let down = Direction { lane: service_lane, ..Direction::default() };
        Self { accepted, backend, up, down }
    }

    fn done(&self) -> bool {
        self.up.done && self.down.done
    }

    fn step(&mut self, moved: &mut Moved) -> Result<()> {
        self.up.step(&self.accepted, &self.backend, moved).context("to the service")?;
        self.down.step(&self.backend, &self.accepted, moved).context("to the client")
    }

    fn interests(&self) -> [(&TcpStream, PollFlags); 2] {
        let flags = |reads: &Direction, writes: &Direction| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, !reads.ended && reads.pending.is_empty());
            flags.set(PollFlags::POLLOUT, !writes.pending.is_empty());
            flags
        };
        [(&self.accepted, flags(&self.up, &self.down)), (&self.backend, flags(&self.down, &self.up))]
    }
}

impl Direction {
    fn step(&mut self, mut from: &TcpStream, mut to: &TcpStream, moved: &mut Moved) -> Result<()> {
        if self.done {
            return Ok(());
        }
        if self.pending.is_empty() && !self.ended {
            let mut buffer = [0; 64 * 1024];
            match from.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => self.pending.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("reading"),
            }
        }
        if !self.pending.is_empty() {
            match to.write(&self.pending) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.total += count as u64;
                    moved.copied += count as u64;
                    if let Some(lane) = &self.lane {
                        lane.forwarded(self.total, to.as_fd())?;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("writing"),
            }
        }
        if self.ended && self.pending.is_empty() {
            to.shutdown(Shutdown::Write).context("passing the end on")?;
            self.done = true;
            if let Some(lane) = self.lane.take() {
                moved.lanes += lane.snapshot();
            }
        }
        Ok(())
    }
}

/// Relays until every connection has ended both ways. With `toggle`, lanes are opened and shut at random while bytes flow.
pub fn relay(kernel: &mut Kernel, mut connections: Vec<Connection>, toggle: Option<u64>) -> Result<Moved> {
    let deadline = Instant::now() + LIMIT * 3;
    let mut moved = Moved::default();
    let mut numbers = toggle.map(Numbers::new);
    loop {
        for connection in &mut connections {
            connection.step(&mut moved)?;
        }
        connections.retain(|connection| !connection.done());
        if connections.is_empty() {
            return Ok(moved);
        }
        ensure!(Instant::now() < deadline, "{} connections are stuck: {moved:?}", connections.len());
        if let Some(numbers) = &mut numbers {
            for direction in connections.iter().flat_map(|both| [&both.up, &both.down]) {
                if let Some(lane) = &direction.lane {
                    lane.enable(numbers.below(3) > 0);
                }
            }
        }
        let mut fds = vec![PollFd::new(kernel.events_fd(), PollFlags::POLLIN)];
        for (socket, flags) in connections.iter().flat_map(Connection::interests) {
            if !flags.is_empty() {
                fds.push(PollFd::new(socket.as_fd(), flags));
            }
        }
        let timeout = if numbers.is_some() { PollTimeout::from(2u8) } else { PollTimeout::from(1000u16) };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        grant(kernel, &connections)?;
    }
}

fn grant(kernel: &mut Kernel, connections: &[Connection]) -> Result<()> {
    let mut low = Vec::new();
    hook_who_has_proved(kernel, |event| {
        if let Event::LowCredit { record, serial } = event {
            low.push((record, serial));
        }
    });
    for connection in connections {
        for (direction, to) in
            [(&connection.up, &connection.backend), (&connection.down, &connection.accepted)]
        {
            let Some(lane) = &direction.lane else { continue };
            if low.contains(&(lane.id().record, lane.id().serial)) {
                lane.grant(to.as_fd())?;
            }
        }
    }
    Ok(())
}
