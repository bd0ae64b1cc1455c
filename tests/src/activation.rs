//! The real `systemd-socket-activate`: it listens, and becomes `bro forward` when the first client has connected.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::forwarder::Forwarder;
use crate::log::Log;
use crate::peers::{Address, Bound, Here, PATIENCE};
use crate::scratch::Scratch;
use crate::{bro, process};

/// The package that the program comes from, for [`crate::tier::Need::Program`].
pub const PACKAGE: (&str, &str) = ("systemd-socket-activate", "systemd");

/// Starts `systemd-socket-activate --listen=... OPTIONS bro forward ARGUMENTS`; returns once it listens on all `addresses`,
/// with the ports that the kernel has chosen for those that have port 0.
pub fn start(
    addresses: &[Address],
    options: &[&str],
    arguments: &[String],
) -> Result<(Forwarder, Vec<Address>)> {
    // It takes no port 0. A socket that is bound but does not listen keeps the port for it: both have SO_REUSEADDR.
    let (mut taken, mut kept) = (Vec::new(), Vec::new());
    for address in addresses {
        if address.port() == Some(0) {
            let bound = Bound::new(&Here, address)?;
            taken.push(bound.address().clone());
            kept.push(bound);
        } else {
            taken.push(address.clone());
        }
    }
    let mut command = Command::new(bro::helper());
    command.args(["launch", "--", PACKAGE.0]).args(options);
    command.args(taken.iter().map(|address| format!("--listen={address}")));
    command.arg(bro::binary()).arg("forward").args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut forwarder = Forwarder::spawn(command, Scratch::new()?)?;

    let listening = |log: &Log| log.lines().iter().filter(|line| line.starts_with("Listening on ")).count();
    let settled = process::eventually(PATIENCE, || {
        listening(forwarder.log()) == taken.len() || !forwarder.is_running().unwrap_or(false)
    });
    ensure!(
        settled && listening(forwarder.log()) == taken.len(),
        "it does not listen; the log:\n{}",
        forwarder.log().lines().join("\n")
    );
    Ok((forwarder, taken))
}

/// Waits until the first client has turned `systemd-socket-activate` into bro: a service that a unit would start may start.
pub fn wait_until_activated(forwarder: &Forwarder) -> Result<()> {
    let activated =
        process::eventually(PATIENCE, || process::name(forwarder.pid()).as_deref() == Some("bro"));
    ensure!(activated, "no client has activated it within {PATIENCE:?}");
    Ok(())
}
