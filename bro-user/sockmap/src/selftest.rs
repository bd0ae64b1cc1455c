//! The self-test: a service, a client and a forwarder in miniature, over loopback, with the real programs between them. What
//! it finds broken would cost a user bytes or hang a service, so nothing is assumed from a version number.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::unavailable::chain;
use super::{Event, Kernel, Lane, LaneId, Reason, SenderAddress, SenderRole, netns_cookie};

/// How long all of it may take, on a machine that is just booting.
const LIMIT: Duration = Duration::from_secs(10);
/// The size of the buffers on the way: enough for everything to happen, and quickly filled.
const BUFFER: usize = 128 * 1024;
/// The service's answer to the first request: less than any send buffer's half.
const SMALL: usize = 16 * 1024;

/// How many messages a sender may need to prove that it is a non-blocking one: two, but for acknowledgements that come late.
const MOST_MESSAGES: u64 = 10;
/// How long each but the first is waited for, in milliseconds.
const PROOF: u16 = 50;

type Outcome<T = ()> = Result<T, String>;

/// Runs it and takes back what it changed, whatever came of it. The result within the result: whether clients can be hooked, which
/// the service lane does not need.
pub(super) fn run(kernel: &mut Kernel) -> Outcome<Outcome> {
    let own = bro_proc::cgroup::of_self().map_err(|error| format!("this process's cgroup: {error}"))?;
    let attached_before = kernel.programs.is_attached(&own);
    kernel.attach(&own).map_err(|error| chain(&error))?;
    let listener = listener()?;
    let port = step("the listener's address", listener.local_addr())?.port();
    let netns = step("the namespace's cookie", netns_cookie(listener.as_fd()))?;
    let outcome = step("watching a port", kernel.watch(netns, port, SenderRole::Service))
        .and_then(|()| Test { kernel, listener, netns, deadline: Instant::now() + LIMIT }.run());
    kernel.unwatch(netns, port);
    if !attached_before {
        kernel.detach(&own);
    }
    outcome
}

struct Test<'a> {
    kernel: &'a mut Kernel,
    listener: TcpListener,
    netns: u64,
    deadline: Instant,
}

/// The four sockets of a forwarded connection.
struct Ends {
    client: TcpStream,
    accepted: TcpStream,
    backend: TcpStream,
    service: TcpStream,
}

impl Test<'_> {
    fn run(mut self) -> Outcome<Outcome> {
        let (backend, service) = self.pair(&self.listener)?;
        let front = listener()?;
        let (client, accepted) = self.pair(&front)?;
        for (socket, option) in [(&accepted, true), (&service, true), (&client, false), (&backend, false)] {
            step("a buffer's size", buffer_size(socket, option))?;
        }
        let mut ends = Ends { client, accepted, backend, service };
        if self.kernel.hooked_now() > 0 {
            return Err("a socket was hooked that was not to be".into());
        }
        let lane = self.lane(&ends)?;
        let greeted = self.prove(&mut ends, &lane, SenderRole::Service)?;
        self.fionread(&mut ends)?;
        self.half_close(&mut ends, &lane)?;
        let sent = self.fill(&mut ends, &lane)?;
        self.drain(&mut ends, &lane, sent, greeted)?;
        let unhooked = self.kernel.totals().unhooked;
        if unhooked == 0 {
            return Err("the service's socket was not let go when it closed".into());
        }
        Ok(self.local_client())
    }

    /// A client on this host proves to be a non-blocking one, is hooked by `bro_hook`, and has its lane.
    fn local_client(&mut self) -> Outcome {
        let front = listener()?;
        let port = step("the listener's address", front.local_addr())?.port();
        step("watching a port", self.kernel.watch(self.netns, port, SenderRole::Client))?;
        let outcome = self.hook_client(&front);
        self.kernel.unwatch(self.netns, port);
        outcome.map_err(|error| format!("no client can be hooked: {error}"))
    }

    fn hook_client(&mut self, front: &TcpListener) -> Outcome {
        let (client, accepted) = self.pair(front)?;
        let (backend, service) = self.pair(&listener()?)?;
        let mut ends = Ends { client, accepted, backend, service };
        let sender = SenderAddress {
            netns: self.netns,
            local: step("the client's address", ends.accepted.peer_addr())?,
            remote: step("the accepted socket's address", ends.accepted.local_addr())?,
        };
        let lane = self.kernel.open_lane(&sender, ends.backend.as_fd(), 0);
        let lane = lane.map_err(|error| chain(&error))?;
        self.prove(&mut ends, &lane, SenderRole::Client)?;
        let request = content(0, SMALL);
        step("the request", ends.client.write_all(&request))?;
        if lane.bytes() != SMALL as u64 {
            return Err(format!("{} of {SMALL} bytes took the lane: {:?}", lane.bytes(), lane.snapshot()));
        }
        self.expect(&mut ends.service, &request, "the request")
    }

    /// Has a sender prove to be a non-blocking one, by bytes that go the long way, and hooks it. Returns how many bytes those were.
    fn prove(&mut self, ends: &mut Ends, lane: &Lane, role: SenderRole) -> Outcome<u64> {
        let before = self.kernel.totals();
        for sent in 1..=MOST_MESSAGES {
            self.pass(ends, lane, sent, role)?;
            // Not before the second message.
            let patience = if sent < 2 { 0 } else { PROOF };
            let mut events = [PollFd::new(self.kernel.events_fd(), PollFlags::POLLIN)];
            step("an event", poll(&mut events, patience))?;
            let mut proved = None;
            self.kernel.drain_events(|event| {
                if let Event::Proved { record, serial, socket, flow } = event
                    && (LaneId { record, serial }) == lane.id()
                {
                    proved = Some((flow, socket));
                }
            });
            let Some((flow, socket)) = proved else { continue };
            self.kernel.hook(flow, socket);
            if self.kernel.totals().hooked == before.hooked {
                return Err(format!(
                    "the program for it refused or cannot be run: {:?}",
                    self.kernel.totals()
                ));
            }
            return Ok(sent);
        }
        Err(format!("it did not prove to be a non-blocking one: {:?}", self.kernel.totals()))
    }

    /// One byte of a sender's goes the long way; with it so many have.
    fn pass(&self, ends: &mut Ends, lane: &Lane, total: u64, role: SenderRole) -> Outcome {
        let Ends { client, accepted, backend, service } = ends;
        let (sender, near, far, receiver, what) = match role {
            SenderRole::Client => (client, accepted, backend, service, "a client's message"),
            SenderRole::Service => (service, backend, accepted, client, "a service's message"),
        };
        step(what, sender.write_all(b"y"))?;
        self.expect(near, b"y", what)?;
        step(what, far.write_all(b"y"))?;
        step("a grant", lane.forwarded(total, far.as_fd()))?;
        self.expect(receiver, b"y", what)
    }

    /// Exactly these bytes come.
    fn expect(&self, from: &mut TcpStream, wanted: &[u8], what: &str) -> Outcome {
        let (mut got, mut filled) = (vec![0; wanted.len()], 0);
        while filled < wanted.len() {
            self.wait(from, PollFlags::POLLIN, what)?;
            match from.read(&mut got[filled..]) {
                Ok(0) => return Err(format!("{what}: the end instead")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.in_time(what)?,
                Err(error) => return Err(format!("{what}: {error}")),
            }
        }
        if got == wanted { Ok(()) } else { Err(format!("{what} was changed on its way")) }
    }

    fn lane(&self, ends: &Ends) -> Outcome<Lane> {
        let address = |name: &str, address: std::io::Result<SocketAddr>| step(name, address);
        let sender = SenderAddress {
            netns: self.netns,
            local: address("the service's address", ends.backend.peer_addr())?,
            remote: address("the backend's address", ends.backend.local_addr())?,
        };
        self.kernel.open_lane(&sender, ends.accepted.as_fd(), 0).map_err(|error| chain(&error))
    }

    /// Whether the service can still ask how much waits. If not, this relay is only for users that insist on it.
    fn fionread(&mut self, ends: &mut Ends) -> Outcome {
        step("a request", ends.backend.write_all(b"x"))?;
        self.wait(&ends.service, PollFlags::POLLIN, "a request")?;
        self.kernel.maps.share.fionread_lies =
            step("FIONREAD", super::sys::fionread(ends.service.as_fd()))? != 1;
        step("a request", ends.service.read_exact(&mut [0]))
    }

    /// The client has sent all it will ever send; the answer still takes the lane, and the forwarder's socket sees none of it.
    fn half_close(&self, ends: &mut Ends, lane: &Lane) -> Outcome {
        step("the half-close", ends.client.shutdown(Shutdown::Write))?;
        self.wait(&ends.accepted, PollFlags::POLLIN, "the client's half-close")?;
        expect_end("the accepted socket", &mut ends.accepted)?;
        step("the half-close", ends.backend.shutdown(Shutdown::Write))?;
        self.wait(&ends.service, PollFlags::POLLIN, "the half-close at the service")?;
        expect_end("the service's socket", &mut ends.service)?;

        let answer = content(0, SMALL);
        step("the answer", ends.service.write_all(&answer))?;
        if lane.bytes() != SMALL as u64 {
            return Err(format!("{} of {SMALL} bytes took the lane: {:?}", lane.bytes(), lane.snapshot()));
        }
        self.expect(&mut ends.client, &answer, "the answer")?;
        match ends.backend.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            other => Err(format!("the forwarder's socket got something too: {other:?}")),
        }
    }

    /// Nothing reads: the service sends until its own TCP is full, and then its socket must not claim to be writable.
    fn fill(&self, ends: &mut Ends, lane: &Lane) -> Outcome<usize> {
        // More than the largest buffers on the way, by far.
        const MOST: usize = 1 << 28;
        let mut sent = SMALL;
        while sent < MOST {
            let block = content(sent, 64 * 1024);
            match ends.service.write(&block) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(format!("sending without a reader: {error}")),
            }
            self.in_time("filling the buffers")?;
        }
        let mut writable = [PollFd::new(ends.service.as_fd(), PollFlags::POLLOUT)];
        step("poll", poll(&mut writable, 0u8))?;
        if writable[0].any() == Some(true) {
            return Err("a full target made the service's send fail while it polls writable".into());
        }
        if lane.snapshot().passed(Reason::Credit) == 0 {
            return Err(format!("the lane has no bound: {:?}", lane.snapshot()));
        }
        Ok(sent)
    }

    /// Relays what was passed, as the forwarder does, and checks every byte and the end at the client.
    fn drain(&self, ends: &mut Ends, lane: &Lane, sent: usize, greeted: u64) -> Outcome {
        step("the end", ends.service.shutdown(Shutdown::Write))?;
        let mut buffer = vec![0; 256 * 1024];
        let (mut pending, mut total, mut ended) = (Vec::new(), greeted, false);
        let mut received = SMALL;
        loop {
            if pending.is_empty() && !ended {
                match ends.backend.read(&mut buffer) {
                    Ok(0) => {
                        ended = true;
                        step("the end", ends.accepted.shutdown(Shutdown::Write))?;
                    }
                    Ok(count) => pending.extend_from_slice(&buffer[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(format!("reading what was passed: {error}")),
                }
            }
            if !pending.is_empty() {
                match ends.accepted.write(&pending) {
                    Ok(count) => {
                        pending.drain(..count);
                        total += count as u64;
                        step("a grant", lane.forwarded(total, ends.accepted.as_fd()))?;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(format!("relaying what was passed: {error}")),
                }
            }
            match ends.client.read(&mut buffer) {
                Ok(0) if received == sent => return Ok(()),
                Ok(0) => return Err(format!("{received} of {sent} bytes arrived, then the end")),
                Ok(count) if buffer[..count] == content(received, count) => received += count,
                Ok(_) => return Err(format!("wrong bytes after {received}")),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let first = if pending.is_empty() && !ended { &ends.backend } else { &ends.client };
                    self.wait(first, PollFlags::POLLIN, "the passed bytes")?;
                }
                Err(error) => return Err(format!("the client: {error}")),
            }
            self.in_time("the passed bytes")?;
        }
    }

    /// A connection to a listener: the connecting end and the accepted one, both non-blocking.
    fn pair(&self, to: &TcpListener) -> Outcome<(TcpStream, TcpStream)> {
        let address = step("the listener's address", to.local_addr())?;
        let connected = step("connect", TcpStream::connect_timeout(&address, LIMIT))?;
        wait(PollFd::new(to.as_fd(), PollFlags::POLLIN), self.deadline, "a connection")?;
        let (accepted, _) = step("accept", to.accept())?;
        for socket in [&connected, &accepted] {
            step("O_NONBLOCK", socket.set_nonblocking(true))?;
        }
        Ok((connected, accepted))
    }

    fn wait(&self, on: &TcpStream, until: PollFlags, what: &str) -> Outcome {
        wait(PollFd::new(on.as_fd(), until), self.deadline, what)
    }

    fn in_time(&self, what: &str) -> Outcome {
        if Instant::now() < self.deadline { Ok(()) } else { Err(format!("{what}: not within {LIMIT:?}")) }
    }
}

fn wait(on: PollFd<'_>, deadline: Instant, what: &str) -> Outcome {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis();
    match poll(&mut [on], u16::try_from(left).unwrap_or(u16::MAX)) {
        Ok(0) => Err(format!("{what}: not within {LIMIT:?}")),
        // A signal or readiness; the caller looks for itself.
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(format!("{what}: {error}")),
    }
}

fn step<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Outcome<T> {
    result.map_err(|error| format!("{what}: {error}"))
}

fn listener() -> Outcome<TcpListener> {
    let listener = step("a listener", TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    step("O_NONBLOCK", listener.set_nonblocking(true))?;
    Ok(listener)
}

fn buffer_size(of: &TcpStream, sending: bool) -> nix::Result<()> {
    if sending { setsockopt(of, sockopt::SndBuf, &BUFFER) } else { setsockopt(of, sockopt::RcvBuf, &BUFFER) }
}

fn expect_end(what: &str, socket: &mut TcpStream) -> Outcome {
    match socket.read(&mut [0]) {
        Ok(0) => Ok(()),
        other => Err(format!("{what} did not see the end: {other:?}")),
    }
}

/// Content that shows what is lost, repeated or reordered.
fn content(from: usize, count: usize) -> Vec<u8> {
    (from..from + count).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}
