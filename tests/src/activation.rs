//! The real `systemd-socket-activate`: it listens, and becomes `bro forward` when the first client has connected.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::forwarder::Forwarder;
use crate::peers::{Address, PATIENCE};
use crate::scratch::Scratch;
use crate::{bro, process, sys};

/// The package that the program comes from, for [`crate::tier::Need::Program`].
pub const PACKAGE: (&str, &str) = ("systemd-socket-activate", "systemd");

/// Starts `systemd-socket-activate OPTIONS bro forward ARGUMENTS`; returns once it listens, with the addresses in order.
pub fn start(options: &[&str], arguments: &[String]) -> Result<(Forwarder, Vec<Address>)> {
    let listeners = options.iter().filter(|option| option.starts_with("--listen=")).count();
    let mut command = Command::new(bro::helper());
    command.args(["launch", "--", PACKAGE.0]).args(options).arg(bro::binary()).arg("forward").args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let forwarder = Forwarder::spawn(command, Scratch::new()?)?;

    let listens = |line: &str| line.starts_with("Listening on ");
    let all = process::eventually(PATIENCE, || {
        forwarder.log().lines().iter().filter(|line| listens(line)).count() == listeners
    });
    ensure!(all, "it does not listen; the log:\n{}", forwarder.log().lines().join("\n"));
    // The kernel has picked the ports: ask the very sockets that it will pass on.
    use std::os::fd::AsFd as _;
    let pidfd = sys::pidfd_open(forwarder.pid())?;
    let addresses = (3..)
        .take(listeners)
        .map(|number| Address::of(sys::pidfd_getfd(pidfd.as_fd(), number)?.as_fd()))
        .collect::<Result<_>>()
        .context("asking for the addresses of the listening sockets")?;
    Ok((forwarder, addresses))
}

/// Waits until the first client has turned `systemd-socket-activate` into bro: a service that a unit would start may start.
pub fn wait_until_activated(forwarder: &Forwarder) -> Result<()> {
    let activated =
        process::eventually(PATIENCE, || process::name(forwarder.pid()).as_deref() == Some("bro"));
    ensure!(activated, "no client has activated it within {:?}", Duration::from_secs(PATIENCE.as_secs()));
    Ok(())
}
