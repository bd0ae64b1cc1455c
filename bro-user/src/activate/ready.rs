//! `--ready=`: how bro knows that the service may be connected to.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::str::FromStr;
use std::time::Duration;

use nix::libc;
use tokio::time::{Instant, sleep, timeout};

use crate::netns::Where;
use crate::netns::diag::Table;

/// When the first client may be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// The kernel's table of listeners shows it.
    Listen,
    /// A connection of bro's own succeeds.
    Connect,
    /// Podman's health check passes.
    Healthy,
    /// A command on the host exits with 0.
    Exec(String),
    /// At once.
    Unchecked,
}

impl Ready {
    /// What the service has not done yet, while it is not ready.
    #[must_use]
    pub const fn lacking(&self) -> &'static str {
        match self {
            Self::Listen | Self::Unchecked => "did not listen",
            Self::Connect => "took no connection",
            Self::Healthy => "was not healthy (`podman healthcheck run`)",
            Self::Exec(_) => "was not ready by the command of --ready=exec:",
        }
    }
}

/// Not one of the ways.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "“{0}” is no way to know that a service is ready; use listen, connect, healthy, exec:COMMAND or none"
)]
pub struct Invalid(String);

impl FromStr for Ready {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        Ok(match text {
            "listen" => Self::Listen,
            "connect" => Self::Connect,
            "healthy" => Self::Healthy,
            "none" => Self::Unchecked,
            _ => match text.strip_prefix("exec:").map(str::trim) {
                Some(command) if !command.is_empty() => Self::Exec(command.to_owned()),
                _ => return Err(Invalid(text.to_owned())),
            },
        })
    }
}

/// Between two runs of a command.
pub const EXEC_STEP: Duration = Duration::from_millis(200);

/// How long one connection of our own may take.
const TRY: Duration = Duration::from_secs(10);

/// Between two looks at the table although the programs would tell.
const GUARD: Duration = Duration::from_secs(1);

/// Between two looks at the table of listeners: soon at first, when services usually come up, then with more patience.
fn listen_step(waited: Duration) -> Duration {
    match waited.as_millis() {
        0..5_000 => Duration::from_millis(1),
        5_000..30_000 => Duration::from_millis(5),
        _ => Duration::from_millis(20),
    }
}

/// Waits until one of `addresses` has a listener in the table of the namespace at `place`. An address that is not the
/// namespace's own is in no table of it: then the first client's own connection is the test. Where the kernel relay's programs
/// tell when somebody listens (`heard`), nothing is polled; a rare look guards against an event that was lost.
///
/// # Errors
/// When the table cannot be read.
pub async fn listening(
    place: &Where,
    addresses: &[SocketAddr],
    mut heard: Option<tokio::sync::watch::Receiver<u64>>,
) -> io::Result<()> {
    for address in addresses {
        if !place.is_local(address.ip()).await? {
            return Ok(());
        }
    }
    let table = Table::open(place).await?;
    let start = Instant::now();
    loop {
        let listeners = table.listeners()?;
        if addresses.iter().any(|address| listeners.iter().any(|listener| listener.serves(*address))) {
            return Ok(());
        }
        match &mut heard {
            // The sender lives as long as the activator that waits here.
            Some(heard) => drop(timeout(GUARD, heard.changed()).await),
            None => sleep(listen_step(start.elapsed())).await,
        }
    }
}

/// Waits until a connection to one of `addresses` succeeds; it is closed at once.
///
/// # Errors
/// When no socket can be made.
pub async fn connectable(place: &Where, addresses: &[SocketAddr]) -> io::Result<()> {
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

async fn connect(socket: OwnedFd, address: SocketAddr) -> io::Result<()> {
    let storage = nix::sys::socket::SockaddrStorage::from(address);
    match nix::sys::socket::connect(socket.as_raw_fd(), &storage) {
        Ok(()) => return Ok(()),
        Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let socket = crate::sys::watch(socket, tokio::io::Interest::WRITABLE)?;
    let _guard = socket.writable().await?;
    match nix::sys::socket::getsockopt(socket.get_ref(), nix::sys::socket::sockopt::SocketError)? {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_way_and_refuses_the_rest() {
        assert_eq!("listen".parse(), Ok(Ready::Listen));
        assert_eq!("none".parse(), Ok(Ready::Unchecked));
        assert_eq!("exec: pg_isready".parse(), Ok(Ready::Exec("pg_isready".into())));
        assert_eq!("exec:".parse::<Ready>(), Err(Invalid("exec:".into())));
        assert_eq!("soon".parse::<Ready>(), Err(Invalid("soon".into())));
    }
}
