//! `--icmp-port-unreachable`: clients are told that their datagram was not received. That takes a raw socket, which the relay process must not have: so
//! it says whom, and this process, which sees none of their bytes, says so to that client alone, if it may be one, and not more often than
//! the kernel would.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::bail;
use bro_adopt::socket::Place;
use bro_relay::listener::{Listener, SocketKind};
use bro_relay::peer::Peer;
use bro_relay::sys;
use bro_relay::unreachable::{self, Undelivered, UnreachableLimit};
use bro_sockmap::{capabilities, netns_cookie};
use caps::Capability;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, SockaddrIn6, sendmsg};

use crate::cli::Forward;
use crate::commands::status::UndeliveredReport;
use crate::exit::Failure;
use crate::systemd::listen_fds::Passed;

/// The names under which a predecessor passes its sockets: the right to make them has been given up.
const NAMES: [&str; 2] = ["icmp-4", "icmp-6"];

/// A socket for ICMP, or for ICMPv6.
#[derive(Debug)]
struct RawSocket {
    ipv6: bool,
    socket: OwnedFd,
}

/// What tells clients.
#[derive(Debug)]
pub(super) struct Teller {
    sockets: Vec<RawSocket>,
    /// The address of each listener that takes datagrams over UDP.
    listeners: Vec<Option<SocketAddr>>,
    limit: UnreachableLimit,
    /// How many messages were sent.
    told: u64,
    /// Why the last one was not.
    failed: Option<nix::errno::Errno>,
}

/// Takes what a predecessor has left out of what it passed; the rest is for clients.
pub(super) fn take(succeeds: bool, passed: Vec<Passed>) -> (Vec<Passed>, Vec<Passed>) {
    passed.into_iter().partition(|one| succeeds && NAMES.contains(&one.name()))
}

impl Teller {
    /// Makes the sockets, but those that were left, and gives up the right to make any.
    ///
    /// # Errors
    /// Where that is not permitted, or would not reach the clients.
    pub(super) fn new(
        options: &Forward,
        listeners: &[(Listener, usize)],
        left: Vec<Passed>,
    ) -> anyhow::Result<Option<Self>> {
        if !options.icmp_port_unreachable {
            return Ok(None);
        }
        let of_udp = |listener: &Listener| listener.kind == SocketKind::Datagram;
        let (mut addresses, mut sockets) = (Vec::with_capacity(listeners.len()), Vec::new());
        // The port that the client wrote to, whatever a service of its socket is told (`bro fence --port`).
        let all: Vec<_> = listeners.iter().map(|(listener, _)| listener.socket.as_fd()).collect();
        for place in bro_adopt::bound::places(&all) {
            addresses.push(match place {
                Some(Place::Udp(address)) => {
                    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
                }
                _ => None,
            });
        }
        let Some((first, _)) = listeners.iter().find(|(listener, _)| of_udp(listener)) else {
            tracing::warn!(
                "--icmp-port-unreachable is for clients over UDP, and no socket of theirs was passed"
            );
            return Ok(None);
        };
        for one in left {
            let ipv6 = one.name() == NAMES[1];
            sockets.push(RawSocket { ipv6, socket: one.into_descriptor()? });
        }
        // A socket of IPv6 has clients of IPv4 too, unless it is told otherwise.
        let wanted = [Some(false), addresses.iter().flatten().any(SocketAddr::is_ipv6).then_some(true)];
        for ipv6 in wanted.into_iter().flatten() {
            if !sockets.iter().any(|known: &RawSocket| known.ipv6 == ipv6) {
                let socket = raw_socket(ipv6)?;
                reaches_clients(&socket, first)?;
                sockets.push(RawSocket { ipv6, socket });
            }
        }
        capabilities::give_up(Capability::CAP_NET_RAW);
        Ok(Some(Self {
            sockets,
            listeners: addresses,
            limit: UnreachableLimit::default(),
            told: 0,
            failed: None,
        }))
    }

    /// The sockets, which are this process's alone.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|raw| raw.socket.as_fd())
    }

    /// What a successor gets.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn for_successor(&self) -> std::io::Result<Vec<(&'static str, OwnedFd)>> {
        self.sockets.iter().map(|raw| Ok((NAMES[usize::from(raw.ipv6)], raw.socket.try_clone()?))).collect()
    }

    /// What came of it.
    pub(super) fn report(&self) -> UndeliveredReport {
        UndeliveredReport::Tells { told: self.told, failed: self.failed.map(|errno| errno.desc().to_owned()) }
    }

    /// The relay process says that a client's datagram was not received.
    pub(super) fn tell(&mut self, about: &Undelivered) {
        if let Err(error) = self.try_to_tell(about) {
            tracing::debug!(client = %about.client, %error, "it is not told that its datagram was not received");
        }
    }

    fn try_to_tell(&mut self, about: &Undelivered) -> anyhow::Result<()> {
        let Some(Some(address)) = self.listeners.get(about.listener) else { bail!("no such listener") };
        let local = about.local.to_canonical();
        if !address.ip().is_unspecified() && address.ip() != local {
            bail!("not an address of that listener");
        }
        let local = SocketAddr::new(local, address.port());
        let Some(message) = unreachable::message(about.client, local) else { bail!("it is not one client") };
        let client = SocketAddr::new(about.client.ip().to_canonical(), 0);
        if !self.limit.allows(Peer::Tcp(client).source(), Instant::now()) {
            bail!("too many are told already");
        }
        let raw = self.sockets.iter().find(|raw| raw.ipv6 == local.is_ipv6());
        let Some(RawSocket { socket, .. }) = raw else { bail!("no socket of that family") };
        let sent = send(socket, about, local.ip(), &message);
        self.failed = sent.err();
        sent?;
        self.told += 1;
        tracing::debug!(client = %about.client, "told that its datagram was not received");
        Ok(())
    }
}

fn raw_socket(ipv6: bool) -> anyhow::Result<OwnedFd> {
    let (family, protocol) =
        if ipv6 { (libc::AF_INET6, libc::IPPROTO_ICMPV6) } else { (libc::AF_INET, libc::IPPROTO_ICMP) };
    match sys::socket(family, libc::SOCK_RAW, protocol) {
        Ok(socket) => {
            sys::receive_nothing(socket.as_fd())?;
            Ok(socket)
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
            bail!(Failure::NotPermitted(
                "--icmp-port-unreachable takes CAP_NET_RAW over the network that clients come by, which this forwarder does not have; a service of the \
                 system may have it (AmbientCapabilities=CAP_NET_RAW), a user's own may not"
                    .into()
            ))
        }
        Err(error) => Err(anyhow::Error::from(error).context("--icmp-port-unreachable: a raw socket")),
    }
}

/// A socket of another network than the clients' would reach none of them, or others.
fn reaches_clients(socket: &OwnedFd, listener: &Listener) -> Result<(), Failure> {
    match (netns_cookie(socket.as_fd()), netns_cookie(listener.socket.as_fd())) {
        (Ok(own), Ok(clients)) if own != clients => Err(Failure::NotPermitted(format!(
            "--icmp-port-unreachable: the clients of the socket “{}” come by another network than this forwarder's own, so it cannot tell them \
             anything; run it without PrivateNetwork=",
            listener.name
        ))),
        // A kernel that does not say.
        _ => Ok(()),
    }
}

/// Sends a message to a client, from the address that the client has written to. The kernel refuses one that is not this host's.
fn send(socket: &OwnedFd, about: &Undelivered, from: IpAddr, message: &[u8]) -> nix::Result<()> {
    let parts = [std::io::IoSlice::new(message)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = match (from, about.client.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let address = libc::in_addr { s_addr: u32::from(from).to_be() };
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: address,
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
            sendmsg(socket.as_raw_fd(), &parts, &[ControlMessage::Ipv4PacketInfo(&info)], flags, Some(&to))
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: from.octets() },
                ipi6_ifindex: about.interface,
            };
            let scope = match about.client {
                SocketAddr::V6(client) => client.scope_id(),
                SocketAddr::V4(_) => 0,
            };
            let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, scope));
            sendmsg(socket.as_raw_fd(), &parts, &[ControlMessage::Ipv6PacketInfo(&info)], flags, Some(&to))
        }
        _ => Err(nix::errno::Errno::EAFNOSUPPORT),
    };
    sent.map(drop)
}
