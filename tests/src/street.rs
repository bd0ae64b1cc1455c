//! Where clients come from that are not on this host: a network namespace with the listening socket and as many addresses as there are
//! clients, and namespaces of single clients that are joined to it by cables.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{self, SockaddrStorage, sockopt};

use crate::netns::Namespace;
use crate::peers::{Address, Conn, Listener, Place as _};

/// The namespace with the listening socket.
#[derive(Debug)]
pub struct Street {
    /// The namespace.
    pub namespace: Namespace,
}

impl Street {
    /// A street where each of these addresses is a host's.
    pub fn new(addresses: &[&str]) -> Result<Self> {
        let street = Self { namespace: Namespace::new()? };
        for address in addresses {
            let ip: IpAddr = address.parse()?;
            let words = if ip.is_ipv4() { vec![] } else { vec!["nodad"] };
            let prefix = format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 });
            inside(
                &street.namespace,
                &[&["ip", "address", "add", &prefix, "dev", "lo"][..], &words].concat(),
            )?;
        }
        Ok(street)
    }

    /// A listening socket for clients.
    pub fn front(&self, at: &str) -> Result<Listener> {
        Listener::new(&self.namespace, &Address::Tcp(at.parse()?))
    }

    /// A client with this address.
    pub fn client(&self, front: &Listener, ip: &str) -> Result<Conn> {
        Conn::bound_to(&self.namespace, front.address(), Some(ip.parse()?))
    }

    /// A client's socket with this address and port, which leaves nothing behind when it ends.
    pub fn socket(&self, from: &Address) -> Result<OwnedFd> {
        let socket = self.namespace.socket(from.family())?;
        socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        let no_linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        socket::setsockopt(&socket, sockopt::Linger, &no_linger)?;
        let Address::Tcp(address) = from else { anyhow::bail!("{from} is no TCP address") };
        socket::bind(socket.as_fd().as_raw_fd(), &SockaddrStorage::from(*address))?;
        Ok(socket)
    }

    /// A namespace that is joined to the street by a cable: it has 10.66.`number`.2, and the street 10.66.`number`.1. Needs root.
    pub fn neighbour(&self, number: u8) -> Result<Namespace> {
        let there = Namespace::new()?;
        let pid = there.pid().to_string();
        let (near, far) = (format!("n{number}"), format!("10.66.{number}.2/24"));
        let own = format!("10.66.{number}.1/24");
        inside(
            &self.namespace,
            &["ip", "link", "add", &near, "type", "veth", "peer", "name", "eth0", "netns", &pid],
        )?;
        inside(&self.namespace, &["ip", "address", "add", &own, "dev", &near])?;
        inside(&self.namespace, &["ip", "link", "set", &near, "up"])?;
        inside(&there, &["ip", "address", "add", &far, "dev", "eth0"])?;
        inside(&there, &["ip", "link", "set", "eth0", "up"])?;
        Ok(there)
    }
}

/// A command in a namespace.
#[must_use]
pub fn command(namespace: &Namespace, words: &[&str]) -> Command {
    let enter = namespace.enter();
    let mut command = Command::new(&enter[0]);
    command.args(&enter[1..]).args(words).stdin(std::process::Stdio::null());
    command
}

/// Runs a command in a namespace, and returns what it prints.
pub fn inside(namespace: &Namespace, words: &[&str]) -> Result<String> {
    let output = command(namespace, words).output().with_context(|| words.join(" "))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {} {said}", words.join(" "), output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
