//! The service manager's side of the notification protocol: a datagram socket that collects what the program tells it.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::scratch::Scratch;

/// What `NOTIFY_SOCKET` names.
#[derive(Debug)]
pub struct Notify {
    socket: UnixDatagram,
    name: String,
    seen: Vec<String>,
    _scratch: Option<Scratch>,
}

impl Notify {
    /// A socket with a path, as systemd's own.
    pub fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let path = scratch.join("notify");
        let socket = UnixDatagram::bind(&path)?;
        Ok(Self { socket, name: path.display().to_string(), seen: Vec::new(), _scratch: Some(scratch) })
    }

    /// A socket with an abstract name, as some supervisors give.
    pub fn new_abstract() -> Result<Self> {
        use std::os::linux::net::SocketAddrExt as _;
        // No other test has a folder of this name, so neither has one this address.
        let scratch = Scratch::new()?;
        let name = format!("bro-tests{}", scratch.path().display());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name)?;
        let socket = UnixDatagram::bind_addr(&address)?;
        Ok(Self { socket, name: format!("@{name}"), seen: Vec::new(), _scratch: Some(scratch) })
    }

    /// The value of `NOTIFY_SOCKET`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Every assignment that has come so far.
    #[must_use]
    pub fn seen(&self) -> &[String] {
        &self.seen
    }

    /// The first assignment that `wanted` accepts, which may be still to come.
    pub fn wait(&mut self, within: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait_from(0, within, wanted)
    }

    /// The same, of those that have not been looked at yet.
    pub fn wait_anew(&mut self, within: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait_from(self.seen.len(), within, wanted)
    }

    fn wait_from(
        &mut self,
        mut from: usize,
        within: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(found) = self.seen[from..].iter().find(|line| wanted(line)) {
                return Ok(found.clone());
            }
            from = self.seen.len();
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.socket.recv(&mut buffer) {
                Ok(count) => {
                    let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                    self.seen.extend(text.lines().map(str::to_owned));
                }
                Err(_) if Instant::now() >= deadline => {
                    bail!("the awaited notification never came; those that did: {:?}", self.seen)
                }
                Err(_) => {}
            }
        }
    }
}
