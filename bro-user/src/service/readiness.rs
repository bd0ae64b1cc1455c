//! `--ready=`: how bro knows that the service may be connected to.

pub mod protocol;

use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fmt, io};

use bro_relay::target::Target;
use nix::libc;
use protocol::{HttpPage, Protocol, ReadinessAnswer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::netns::NetnsRef;
use crate::netns::sock_diag::Table;

/// When the first client may be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// It listens and, where the port is one of a protocol that tells (5432, 3306, 6379), it says in that protocol that it takes
    /// clients; a service that speaks another protocol there is ready.
    Auto,
    /// The kernel's table of listeners shows it.
    Listen,
    /// A connection of bro's own succeeds.
    Connect,
    /// Podman's health check passes.
    Healthy,
    /// It says so in this protocol.
    Says(Protocol),
    /// A command on the host exits with 0.
    Exec(String),
    /// At once, unchecked.
    Unchecked,
}

impl Ready {
    /// What the service has not done yet, while it is not ready.
    #[must_use]
    pub const fn lacking(&self) -> &'static str {
        match self {
            Self::Auto | Self::Listen | Self::Unchecked => "did not listen and say that it takes clients",
            Self::Connect => "took no connection",
            Self::Healthy => "was not healthy (`podman healthcheck run`)",
            Self::Says(Protocol::Http(_)) => {
                "did not answer the GET of --ready=http: with a status below 500"
            }
            Self::Says(Protocol::Postgres) => "did not answer as a PostgreSQL that takes clients",
            Self::Says(Protocol::Mysql) => "did not greet as a MySQL",
            Self::Says(Protocol::Redis) => "did not answer PING as a Redis that has loaded its data",
            Self::Exec(_) => "was not ready by the command of --ready=exec:",
        }
    }

    /// Whether it asks at a port of its own, so that the target need not listen yet.
    #[must_use]
    pub const fn asks_elsewhere(&self) -> bool {
        matches!(self, Self::Says(Protocol::Http(HttpPage { port: Some(_), .. })))
    }

    /// Why this way cannot be used with this target.
    #[must_use]
    pub fn refusal(&self, target: &Target) -> Option<String> {
        let asks = matches!(self, Self::Says(_)) && target.is_unix();
        asks.then(|| {
            format!(
                "--ready={self} asks over TCP, and the target {target} is a unix socket; use --ready=exec:COMMAND or --ready=listen"
            )
        })
    }

    /// What bro asks the service at `port`, and whether an answer in another protocol will do.
    #[must_use]
    pub fn question(&self, port: u16) -> Option<(Protocol, Strictness)> {
        match self {
            Self::Auto => Some((Protocol::at(port)?, Strictness::Lenient)),
            Self::Says(protocol) => Some((protocol.clone(), Strictness::Strict)),
            _ => None,
        }
    }
}

/// What another protocol's answer, or none, means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// Nothing yet.
    Strict,
    /// The service is ready: it only has that port.
    Lenient,
}

/// The text names none of the ways.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "“{0}” is no way to know that a service is ready; use auto, listen, connect, \
     healthy, http:/PATH, postgres, mysql, redis, exec:COMMAND or none"
)]
pub struct InvalidReady(String);

impl FromStr for Ready {
    type Err = InvalidReady;

    fn from_str(text: &str) -> Result<Self, InvalidReady> {
        Ok(match text {
            "auto" => Self::Auto,
            "postgres" => Self::Says(Protocol::Postgres),
            "mysql" => Self::Says(Protocol::Mysql),
            "redis" => Self::Says(Protocol::Redis),
            "listen" => Self::Listen,
            "connect" => Self::Connect,
            "healthy" => Self::Healthy,
            "none" => Self::Unchecked,
            _ => return words(text).ok_or_else(|| InvalidReady(text.to_owned())),
        })
    }
}

/// A way that needs more than its name.
fn words(text: &str) -> Option<Ready> {
    match text.split_once(':')? {
        ("exec", command) if !command.trim().is_empty() => Some(Ready::Exec(command.trim().to_owned())),
        ("http", page) => HttpPage::parse(page).map(|page| Ready::Says(Protocol::Http(page))),
        _ => None,
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Listen => f.write_str("listen"),
            Self::Connect => f.write_str("connect"),
            Self::Healthy => f.write_str("healthy"),
            Self::Says(Protocol::Http(page)) => write!(f, "http:{page}"),
            Self::Says(Protocol::Postgres) => f.write_str("postgres"),
            Self::Says(Protocol::Mysql) => f.write_str("mysql"),
            Self::Says(Protocol::Redis) => f.write_str("redis"),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Unchecked => f.write_str("none"),
        }
    }
}

/// Between two runs of a command.
pub const EXEC_STEP: Duration = Duration::from_millis(200);

/// How long one connection of our own may take.
const TRY: Duration = Duration::from_secs(10);

/// How long one question and its answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// How long a service that may speak any protocol is asked without an answer.
const SILENCE: Duration = Duration::from_secs(1);

/// Between two questions: at most so long, and a quarter of what it has taken so far. Each leaves a line in a database's log.
const ASK_STEP: Duration = Duration::from_millis(250);

/// Between two looks at the table although the programs would tell.
const GUARD: Duration = Duration::from_secs(1);

/// Between two looks at the table of listeners: this part of the time that was waited so far, within these bounds. So a service that
/// is up at once is served at once, and the forwarders of thirty that are started in the same moment leave the processors to these.
const PART: u32 = 32;
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_millis(10);
/// The same for a service that takes half a minute.
const PATIENT: Duration = Duration::from_millis(20);

/// The same while the service's unit is not started yet: its clients wait for that first (`SETTLE`), and it is told of.
const UNSTARTED: Duration = Duration::from_millis(100);

fn listen_step(waited: Duration) -> Duration {
    if waited < Duration::from_secs(30) { (waited / PART).clamp(SHORTEST, LONGEST) } else { PATIENT }
}

/// The pauses between looks at a table.
struct TableLooks<'a> {
    /// Whether the service's unit is started.
    started: &'a mut watch::Receiver<bool>,
    /// Since it was known to be, or since the first look.
    since: Instant,
}

impl<'a> TableLooks<'a> {
    fn new(started: &'a mut watch::Receiver<bool>) -> Self {
        Self { started, since: Instant::now() }
    }

    async fn pause(&mut self) {
        if *self.started.borrow() {
            return sleep(listen_step(self.since.elapsed())).await;
        }
        if timeout(UNSTARTED, self.started.wait_for(|started| *started)).await.is_ok() {
            self.since = Instant::now();
        }
    }
}

/// Waits until one of `addresses` has a listener in the table of the namespace at `place`. An address that is not the namespace's
/// own is in no table of it: then the first client's own connection is the test. Where the kernel relay's programs report listeners
/// (`heard`), nothing is polled; a rare look guards against an event that was lost. Until the unit is `started` looks are few. Where this kernel has no such table, connections of bro's own are the
/// test ([`connectable`]).
///
/// # Errors
/// When the table cannot be read.
pub async fn listening(
    place: &NetnsRef,
    addresses: &[SocketAddr],
    mut heard: Option<watch::Receiver<u64>>,
    started: &mut watch::Receiver<bool>,
) -> io::Result<()> {
    for address in addresses {
        if !place.is_local(address.ip()).await? {
            return Ok(());
        }
    }
    let mut looks = TableLooks::new(started);
    let table = match Table::open(place).await {
        Ok(table) => table,
        Err(error) => return without_table(place, addresses, error).await,
    };
    loop {
        let listeners = match table.listeners() {
            Ok(listeners) => listeners,
            Err(error) => return without_table(place, addresses, error).await,
        };
        if addresses.iter().any(|address| listeners.iter().any(|listener| listener.serves(*address))) {
            return Ok(());
        }
        match &mut heard {
            // The sender lives as long as the starter that waits here.
            Some(heard) => drop(timeout(GUARD, heard.changed()).await),
            None => looks.pause().await,
        }
    }
}

async fn without_table(place: &NetnsRef, addresses: &[SocketAddr], error: io::Error) -> io::Result<()> {
    static SAID: AtomicBool = AtomicBool::new(false);
    // CONFIG_INET_DIAG, which may be a module; and with no table at all there is no such protocol.
    if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EPROTONOSUPPORT)) {
        return Err(error);
    }
    if !SAID.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            "this kernel does not say who listens (CONFIG_INET_DIAG): the service is ready when it takes a connection of bro's own (--ready=connect)"
        );
    }
    connectable(place, addresses).await
}

/// Waits until one of `addresses` has a UDP socket in the table of the namespace at `place`, and says which. None is named where one
/// is not the namespace's own, or where this kernel has no such table: then the first datagram is the test.
///
/// # Errors
/// When the namespace cannot be asked.
pub async fn bound(
    place: &NetnsRef,
    addresses: &[SocketAddr],
    started: &mut watch::Receiver<bool>,
) -> io::Result<Option<SocketAddr>> {
    for address in addresses {
        if !place.is_local(address.ip()).await? {
            return Ok(None);
        }
    }
    let mut looks = TableLooks::new(started);
    loop {
        match bound_now(place, addresses).await {
            Ok(Some(found)) => return Ok(Some(found)),
            Ok(None) => {}
            // CONFIG_INET_UDP_DIAG is a module, and may be missing.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                tracing::warn!(
                    "this kernel does not say which UDP sockets there are (CONFIG_INET_UDP_DIAG): a service that runs is taken to be \
                     ready (--ready=exec: can do better)"
                );
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        looks.pause().await;
    }
}

/// The first of `addresses` at which there is a UDP socket now.
///
/// # Errors
/// ENOENT where this kernel has no such table, or when the namespace cannot be asked.
pub async fn bound_now(place: &NetnsRef, addresses: &[SocketAddr]) -> io::Result<Option<SocketAddr>> {
    let sockets = Table::open(place).await?.datagram_sockets()?;
    Ok(addresses.iter().find(|address| sockets.iter().any(|socket| socket.serves(**address))).copied())
}

/// Waits until a connection to one of `addresses` succeeds; it is closed at once.
///
/// # Errors
/// When no socket can be made.
pub async fn connectable(place: &NetnsRef, addresses: &[SocketAddr]) -> io::Result<()> {
    let start = Instant::now();
    loop {
        for address in addresses {
            let domain = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let socket = place.socket(domain, libc::SOCK_STREAM, 0).await?;
            if timeout(TRY, connect(socket, *address)).await.is_ok_and(|connected| connected.is_ok()) {
                return Ok(());
            }
        }
        sleep(listen_step(start.elapsed()).max(Duration::from_millis(5))).await;
    }
}

/// Waits until the service at one of `addresses` says in the protocol that it takes clients. Each question goes over a connection
/// of bro's own, which is then closed.
///
/// # Errors
/// When no socket can be made.
pub async fn answering(
    place: &NetnsRef,
    addresses: &[SocketAddr],
    protocol: &Protocol,
    strictness: Strictness,
) -> io::Result<()> {
    let start = Instant::now();
    // When it first took a connection.
    let mut connected_since = None;
    let mut understood = false;
    loop {
        for address in addresses {
            let mut address = *address;
            if let Protocol::Http(HttpPage { port: Some(port), .. }) = protocol {
                address.set_port(*port);
            }
            let domain = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let socket = place.socket(domain, libc::SOCK_STREAM, 0).await?;
            let Ok(Ok(socket)) = timeout(TRY, connect(socket, address)).await else { continue };
            let since = *connected_since.get_or_insert_with(Instant::now);
            let limit = if strictness == Strictness::Lenient && !understood { SILENCE } else { ANSWER };
            let answer = timeout(limit, ask(socket, protocol)).await.ok().and_then(Result::ok).flatten();
            match answer {
                Some(ReadinessAnswer::Ready) => return Ok(()),
                Some(ReadinessAnswer::NotYet) => understood = true,
                Some(ReadinessAnswer::Foreign) if strictness == Strictness::Lenient => return Ok(()),
                Some(ReadinessAnswer::Foreign) | None => {
                    if strictness == Strictness::Lenient && !understood && since.elapsed() >= SILENCE {
                        return Ok(());
                    }
                }
            }
        }
        sleep((start.elapsed() / 4).clamp(Duration::from_millis(10), ASK_STEP)).await;
    }
}

/// The answer; none where the service ends the connection before it has said enough.
async fn ask(socket: OwnedFd, protocol: &Protocol) -> io::Result<Option<ReadinessAnswer>> {
    let mut stream = tokio::net::TcpStream::from_std(socket.into())?;
    stream.write_all(&protocol.question()).await?;
    let mut answer = Vec::new();
    loop {
        if let Some(understood) = protocol.understand(&answer) {
            return Ok(Some(understood));
        }
        let left = protocol::MOST.saturating_sub(answer.len()) as u64;
        if (&mut stream).take(left).read_buf(&mut answer).await? == 0 {
            return Ok(None);
        }
    }
}

async fn connect(socket: OwnedFd, address: SocketAddr) -> io::Result<OwnedFd> {
    let storage = nix::sys::socket::SockaddrStorage::from(address);
    match nix::sys::socket::connect(socket.as_raw_fd(), &storage) {
        Ok(()) => return Ok(socket),
        Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let socket = crate::sys::watch(socket, tokio::io::Interest::WRITABLE)?;
    let _guard = socket.writable().await?;
    match nix::sys::socket::getsockopt(socket.get_ref(), nix::sys::socket::sockopt::SocketError)? {
        0 => {}
        code => return Err(io::Error::from_raw_os_error(code)),
    }
    Ok(socket.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_way_and_refuses_the_rest() {
        assert_eq!("listen".parse(), Ok(Ready::Listen));
        assert_eq!("none".parse(), Ok(Ready::Unchecked));
        assert_eq!("exec: pg_isready".parse(), Ok(Ready::Exec("pg_isready".into())));
        assert_eq!("exec:".parse::<Ready>(), Err(InvalidReady("exec:".into())));
        assert_eq!("soon".parse::<Ready>(), Err(InvalidReady("soon".into())));
        assert_eq!("http:".parse::<Ready>(), Err(InvalidReady("http:".into())));
    }

    #[test]
    fn is_written_as_it_is_read() {
        for way in [
            "auto",
            "listen",
            "connect",
            "healthy",
            "http://db:81/health",
            "postgres",
            "mysql",
            "redis",
            "none",
        ] {
            assert_eq!(way.parse::<Ready>().unwrap().to_string(), way);
        }
    }

    #[test]
    fn only_a_port_that_tells_is_asked_without_being_told() {
        assert_eq!(Ready::Auto.question(5432), Some((Protocol::Postgres, Strictness::Lenient)));
        assert_eq!(Ready::Auto.question(8080), None);
        assert_eq!(Ready::Listen.question(5432), None);
    }
}
