//! `--keep`: the socket unit stays, and the next client wakes what has fallen asleep.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::namespace::{Container, SERVICE};
use super::systemd::{Forwarder, Socket};

/// How long bro stays without a connection.
pub const IDLE: Duration = Duration::from_secs(10);

/// Ctrl-C and SIGTERM, as something to poll.
pub struct Interrupts(SignalFd);

impl Interrupts {
    /// Must be called before there is a second thread, which would still take the signal.
    pub fn catch() -> Result<Self> {
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        signals.thread_block().context("cannot block SIGINT")?;
        Ok(Self(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("signalfd")?))
    }
}

/// Wakes bro and the service whenever a client comes while they are asleep, until interrupted.
pub fn stay_up(
    bro: &Path,
    container: &mut Container,
    socket: &Socket,
    forwarder: Forwarder,
    interrupts: &Interrupts,
) -> Result<()> {
    let address = socket.address;
    println!("Up until Ctrl-C. Open http://{address}/ in a browser, or run");
    println!("  curl http://{address}/");
    println!("  curl -o /dev/null 'http://{address}/bulk?bytes=1073741824'");
    println!(
        "{IDLE:?} after the last connection bro exits and the service is stopped; the next client wakes both."
    );
    println!();

    let mut awake = Some(forwarder);
    loop {
        let mut polled = vec![PollFd::new(interrupts.0.as_fd(), PollFlags::POLLIN)];
        if awake.is_none() {
            polled.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        }
        // While bro runs, a look at its log four times a second.
        let timeout = if awake.is_some() { PollTimeout::from(250u8) } else { PollTimeout::NONE };
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let came = |fd: usize| polled.get(fd).is_some_and(|fd| fd.any() == Some(true));
        if came(0) {
            println!("Stopped; nothing is left behind.");
            return Ok(());
        }
        if came(1) {
            let options = [format!("--exit-idle-time={}s", IDLE.as_secs())];
            let line = super::forward_line(container, &options, SERVICE);
            println!("  a client came: bro and the service are started");
            awake = Some(socket.activate(bro, &line, None)?);
            container.start_service()?;
        }
        if let Some(forwarder) = &mut awake {
            for line in forwarder.new_lines() {
                println!("  {line}");
            }
            if forwarder.has_exited()? {
                container.stop_service()?;
                println!("  idle: bro has exited, the service is stopped");
                awake = None;
            }
        }
    }
}
