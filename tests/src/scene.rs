//! The usual scene: a namespace that stands for a container, a service in it that need not listen yet, and a listening socket
//! for clients.

use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::{Result, ensure};
use nix::sys::socket::{getsockopt, sockopt};

use crate::forwarder::{Forwarder, Setup};
use crate::netns::Namespace;
use crate::peers::{Address, Bound, Conn, Family, Here, Listener, PATIENCE};
use crate::process;
use crate::scratch::Scratch;

/// The scene. The service's port is taken from the start, so that it is known before the service listens.
#[derive(Debug)]
pub struct Scene {
    /// The namespace of the service.
    pub namespace: Namespace,
    /// What clients connect to.
    pub front: Listener,
    service: Option<Bound>,
    target: Address,
    scratch: Scratch,
}

impl Scene {
    /// A scene over TCP.
    pub fn new() -> Result<Self> {
        Self::of(Family::Tcp4)
    }

    /// A scene over a certain kind of socket, on both sides.
    pub fn of(family: Family) -> Result<Self> {
        Self::between(Namespace::new()?, family, family)
    }

    /// A scene in which the two sides differ.
    pub fn between(namespace: Namespace, front: Family, back: Family) -> Result<Self> {
        let scratch = Scratch::new()?;
        let at =
            |family: Family, name| family.loopback().unwrap_or_else(|| Address::Unix(scratch.join(name)));
        let front = Listener::new(&Here, &at(front, "front"))?;
        let service = Bound::new(&namespace, &at(back, "service"))?;
        let target = service.address().clone();
        Ok(Self { namespace, front, service: Some(service), target, scratch })
    }

    /// A folder for the test's files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.scratch.path()
    }

    /// Where the service listens, or will.
    #[must_use]
    pub fn target(&self) -> String {
        self.target.to_string()
    }

    /// A forwarder that has the listening socket and knows the namespace, but no target yet.
    #[must_use]
    pub fn setup(&self) -> Setup {
        Setup::new().netns(&self.namespace).socket(&self.front)
    }

    /// The usual forwarder, with more options.
    pub fn start(&self, options: &[&str]) -> Result<Forwarder> {
        self.setup().args(options.iter().copied()).arg(self.target()).start()
    }

    /// Lets the service listen. Once.
    pub fn serve(&mut self) -> Result<Listener> {
        self.service.take().expect("the service listens only once").listen()
    }

    /// Waits until `forwarder` holds exactly `count` clients' connections.
    pub fn expect_held(&self, forwarder: &Forwarder, count: usize) -> Result<()> {
        let held = || self.held(forwarder).unwrap_or(usize::MAX);
        ensure!(process::eventually(PATIENCE, || held() == count), "{} clients held, not {count}", held());
        Ok(())
    }

    /// How many clients' connections `forwarder` has accepted and not yet closed.
    pub fn held(&self, forwarder: &Forwarder) -> Result<usize> {
        let sockets = process::sockets(forwarder.relay())?;
        let ours = sockets.iter().filter(|socket| {
            let listens = getsockopt(*socket, sockopt::AcceptConn).unwrap_or(false);
            !listens && Address::of(socket.as_fd()).is_ok_and(|address| address == *self.front.address())
        });
        Ok(ours.count())
    }

    /// A client that has connected to the listening socket, though it may not be accepted yet.
    pub fn client(&self) -> Result<Conn> {
        Conn::new(&Here, self.front.address())
    }
}

/// Asks and is answered in turn, often enough for a connection to have its lanes.
pub fn talk(client: &Conn, service: &Conn) -> Result<()> {
    (0..TALK).try_for_each(|_| expect_relayed(client, service))
}

/// Asks and is answered until `so` (some socket is hooked, say) is so.
pub fn talk_until(client: &Conn, service: &Conn, so: impl Fn() -> bool) -> Result<()> {
    let deadline = std::time::Instant::now() + crate::peers::PATIENCE;
    while !so() {
        ensure!(std::time::Instant::now() < deadline, "they talk and talk, and nothing comes of it");
        expect_relayed(client, service)?;
    }
    Ok(())
}

/// How many questions and answers [`talk`] is.
pub const TALK: usize = 20;

/// Sends a few bytes each way: the connection is relayed.
pub fn expect_relayed(client: &Conn, service: &Conn) -> Result<()> {
    client.send(b"ping")?;
    let mut bytes = [0; 4];
    service.recv_exact(&mut bytes)?;
    ensure!(&bytes == b"ping", "{bytes:?} came");
    service.send(b"pong")?;
    client.recv_exact(&mut bytes)?;
    ensure!(&bytes == b"pong", "{bytes:?} came");
    Ok(())
}
