//! The agent: a single-threaded child that joins another network namespace, makes sockets there for the control process, and
//! connects for the relay process, to the addresses that the control process has named and to no other. It also runs the kernel
//! relay's program that hooks a sender, which finds only sockets of the namespace that it is run in.
//!
//! It is a process of its own because setns(2) lets no process with threads join a user namespace, and an ordinary user must join
//! the user namespace that owns a rootless container's network namespace before it may join the latter. It holds nothing else: it
//! sees no client and no byte, and ends when its forwarder does.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{SockaddrStorage, UnixAddr, bind, connect, setsockopt, sockopt};
use nix::sys::stat::fstat;

use super::identity::{self, Actor, Identity};
use super::replies;
use super::wire::{self, Address, AgentAnswer, AgentRequest, TargetAddresses};
use crate::source::{Binding, any_port, bind_to};
use crate::sys;

/// More channels than a forwarder has targets would be a mistake of ours.
const MOST_CHANNELS: usize = 1024;

/// The process that asks at a channel, which decides what may be asked.
#[derive(Debug)]
enum Requester {
    /// The control process: to join, for sockets of any kind, and for channels.
    Control,
    /// The relay process: to be connected to these addresses.
    Relay(TargetAddresses),
}

/// Where the agent is.
#[derive(Debug, Default)]
struct AgentPlace {
    /// The root directory of unix paths inside the container.
    root: Option<OwnedFd>,
    /// The folder in /proc of the process that has the ids that count.
    process: Option<OwnedFd>,
    /// The identity with which it is to connect to unix sockets.
    wish: Identity,
    /// The user as which it connects, once that has been asked for.
    actor: Option<Actor>,
    /// Device and inode of the network namespace.
    netns: Option<(u64, u64)>,
    /// The kernel relay's program that hooks a sender; it finds the sender in the namespace of the process that runs it.
    hook: Option<OwnedFd>,
}

/// Serves the channel at descriptor 0 until it is closed.
///
/// # Errors
/// When descriptor 0 is no channel, or poll fails.
pub fn run() -> anyhow::Result<()> {
    // systemd's SIGTERM and a terminal's SIGINT go to the whole group, and a forwarder that finishes its connections still
    // needs sockets for the clients it holds.
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGTERM);
    ends.add(Signal::SIGINT);
    ends.add(Signal::SIGHUP);
    ends.thread_block()?;
    let stdin = std::io::stdin();
    let mut channels = vec![(stdin.as_fd().try_clone_to_owned()?, Requester::Control)];
    let mut place = AgentPlace::default();
    loop {
        let mut polled: Vec<PollFd<'_>> =
            channels.iter().map(|(fd, _)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> =
            polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        let mut added = Vec::new();
        let mut closed = Vec::new();
        for (index, (channel, asker)) in channels.iter().enumerate().filter(|(index, _)| ready[*index]) {
            match AgentRequest::receive(channel.as_fd()) {
                Ok(Some((request, descriptors))) => {
                    let answer = serve(asker, request, descriptors, &mut place, &mut added);
                    wire::answer(channel.as_fd(), &answer).ok();
                }
                Ok(None) | Err(_) if index == 0 => return Ok(()),
                Ok(None) | Err(_) => closed.push(index),
            }
        }
        for index in closed.into_iter().rev() {
            drop(channels.swap_remove(index));
        }
        channels.extend(added);
        channels.truncate(MOST_CHANNELS);
    }
}

fn serve(
    asker: &Requester,
    request: AgentRequest,
    mut descriptors: Vec<OwnedFd>,
    place: &mut AgentPlace,
    added: &mut Vec<(OwnedFd, Requester)>,
) -> AgentAnswer {
    match (asker, request) {
        (Requester::Control, AgentRequest::Join(wish)) => {
            let mut descriptors = descriptors.into_iter();
            let netns = descriptors.next().ok_or(Errno::EINVAL)?;
            let stat = fstat(&netns)?;
            let (process, root) = (descriptors.next(), descriptors.next());
            let netns_is = Some((stat.st_dev, stat.st_ino));
            *place = AgentPlace { root, process, wish, actor: None, netns: netns_is, hook: None };
            join(netns.as_fd()).map(|()| Vec::new())
        }
        (Requester::Control, AgentRequest::Sockets { domain, kind, protocol, count }) => {
            let make = |_| sys::socket(domain, kind, protocol).map_err(|error| sys::errno_of(&error));
            (0..count.min(sys::MOST_DESCRIPTORS as u8)).map(make).collect()
        }
        (Requester::Control, AgentRequest::KeepReplies(target)) => {
            replies::keep(&target)?;
            // Only a socket that was made shows whether such sockets can be had.
            let made = match target {
                Address::Udp(target) => datagram(domain_of(target), Binding::Any),
                _ => stream(domain_of(target.tcp().ok_or(Errno::EINVAL)?), Binding::Any),
            };
            made.map(|_| Vec::new())
        }
        (Requester::Control, AgentRequest::Channel(target)) => {
            if target.addresses.iter().any(|address| address.inet().is_none()) {
                place.choose_actor()?;
            }
            added.extend(descriptors.pop().map(|channel| (channel, Requester::Relay(target))));
            Ok(Vec::new())
        }
        (Requester::Relay(target), AgentRequest::Dial(number, source)) => {
            let address = target.addresses.get(usize::from(number)).ok_or(Errno::EADDRNOTAVAIL)?;
            let file = target.file.as_ref();
            if file.is_some_and(|file| !place.is_named_by(file)) {
                return Err(wire::STALE);
            }
            place.dial(address, target.binding, source).map(|socket| vec![socket])
        }
        (Requester::Relay(target), AgentRequest::Supply(number, count)) => {
            let address = target.addresses.get(usize::from(number)).and_then(Address::tcp);
            // Where the namespace may have to be another one, each connection asks.
            let address = address.filter(|_| target.file.is_none()).ok_or(Errno::EPERM)?;
            let count = count.min(sys::MOST_DESCRIPTORS as u8);
            (0..count).map(|_| stream(domain_of(address), target.binding)).collect()
        }
        (Requester::Control, AgentRequest::Program) => {
            place.hook = descriptors.pop();
            Ok(Vec::new())
        }
        (Requester::Relay(_), AgentRequest::Hook(request)) => {
            let program = place.hook.as_ref().ok_or(Errno::ENOENT)?;
            bro_sockmap::hook(program.as_fd(), &request).map_err(|error| sys::errno_of(&error))?;
            Ok(Vec::new())
        }
        // A process that asks this is no longer the program that it was.
        (Requester::Control, AgentRequest::Dial(..) | AgentRequest::Supply(..) | AgentRequest::Hook(_))
        | (Requester::Relay(_), _) => Err(Errno::EPERM),
    }
}

/// Joins the namespace, through its owner where that is not ours. For a process without threads.
pub fn join(netns: BorrowedFd<'_>) -> nix::Result<()> {
    if same_namespace(netns, "/proc/self/ns/net") {
        return Ok(());
    }
    // Root in the first user namespace may enter any network namespace directly.
    match setns(netns, CloneFlags::CLONE_NEWNET) {
        Err(Errno::EPERM) => {}
        result => return result,
    }
    // For pods, `Network=container:` and podman's rootless network namespace the owner is not the container's own user
    // namespace, so the network namespace itself is asked.
    let owner = sys::owning_user_namespace(netns).map_err(|error| sys::errno_of(&error))?;
    if !same_namespace(owner.as_fd(), "/proc/self/ns/user") {
        setns(&owner, CloneFlags::CLONE_NEWUSER)?;
    }
    setns(netns, CloneFlags::CLONE_NEWNET)
}

fn same_namespace(ns: BorrowedFd<'_>, path: &str) -> bool {
    let (Ok(one), Ok(other)) = (fstat(ns), nix::sys::stat::stat(path)) else { return false };
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

impl AgentPlace {
    fn is_named_by(&self, file: &Path) -> bool {
        nix::sys::stat::stat(file).is_ok_and(|stat| Some((stat.st_dev, stat.st_ino)) == self.netns)
    }

    /// The user as which it connects to unix sockets: decided when the first are named, since the process may be gone later.
    fn choose_actor(&mut self) -> nix::Result<()> {
        if self.actor.is_none() {
            let process = self.process.as_ref().ok_or(Errno::EINVAL)?;
            let root = self.root.as_ref().map(|root| root.as_fd());
            self.actor = Some(Actor::decide(self.wish, process.as_fd(), root)?);
        }
        Ok(())
    }

    /// A socket that is connected to `address`, or about to be.
    fn dial(&self, address: &Address, binding: Binding, source: Option<SocketAddr>) -> nix::Result<OwnedFd> {
        match address {
            Address::Tcp(address) => {
                let socket = stream(domain_of(*address), binding)?;
                match dial_inet(&socket, *address, source) {
                    // The kernel still holds the last connection from this port to there.
                    Err(Errno::EADDRNOTAVAIL) if source.is_some_and(|source| source.port() != 0) => {
                        let (socket, source) = (stream(domain_of(*address), binding)?, source.map(any_port));
                        dial_inet(&socket, *address, source).map(|()| socket)
                    }
                    dialled => dialled.map(|()| socket),
                }
            }
            Address::Udp(address) => {
                let socket = datagram(domain_of(*address), binding)?;
                dial_inet(&socket, *address, source).map(|()| socket)
            }
            Address::Datagrams(at) => self.dial_at(at, dial_datagrams),
            Address::Unix(_) | Address::Abstract(_) | Address::Inside(_) => self.dial_at(address, dial_unix),
        }
    }

    /// A socket that `dial` connects to the unix socket at `address`.
    fn dial_at(
        &self,
        address: &Address,
        dial: fn(&UnixAddr) -> nix::Result<OwnedFd>,
    ) -> nix::Result<OwnedFd> {
        match address {
            Address::Unix(path) => self.dial_unix(|| dial(&UnixAddr::new(path)?)),
            Address::Abstract(name) => self.dial_unix(|| dial(&UnixAddr::new_abstract(name)?)),
            Address::Tcp(_) | Address::Udp(_) | Address::Datagrams(_) => Err(Errno::EINVAL),
            Address::Inside(path) => self.dial_unix(|| {
                let root = self.root.as_ref().ok_or(Errno::ENOENT)?;
                let file = sys::open_in_root(root.as_fd(), path).map_err(|error| sys::errno_of(&error))?;
                // Through the descriptor: no symlink of the container can lead outside, and no path is too long for sun_path.
                dial(&UnixAddr::new(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str())?)
            }),
        }
    }

    /// As the user that is to connect there, and that has to be let in.
    fn dial_unix(&self, dial: impl FnOnce() -> nix::Result<OwnedFd>) -> nix::Result<OwnedFd> {
        let actor = self.actor.ok_or(identity::NOT_PERMITTED)?;
        let socket = actor.act(dial)?;
        // The id was thought to be unused, and is the service's own.
        if self.wish == Identity::Unused && actor.is_the_listener(&socket) {
            return Err(Errno::EACCES);
        }
        Ok(socket)
    }
}

const fn domain_of(address: SocketAddr) -> i32 {
    if address.is_ipv4() { nix::libc::AF_INET } else { nix::libc::AF_INET6 }
}

/// A stream socket that may be bound as `binding` says.
fn stream(domain: i32, binding: Binding) -> nix::Result<OwnedFd> {
    let socket = sys::socket(domain, nix::libc::SOCK_STREAM, 0).map_err(|error| sys::errno_of(&error))?;
    if binding != Binding::Unbound {
        // Without a port: the kernel chooses one by both ends, when it connects.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    }
    if binding == Binding::Any {
        setsockopt(&socket, sockopt::IpTransparent, &true)?;
        // A client may have one port at several of a forwarder's sockets, or the one it had a moment ago.
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    }
    Ok(socket)
}

fn dial_inet(socket: &OwnedFd, address: SocketAddr, source: Option<SocketAddr>) -> nix::Result<()> {
    if let Some(source) = source {
        bind_to(socket.as_fd(), source)?;
    }
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// A datagram socket that may be bound as `binding` says. Two never have one address and port: the kernel would give what is
/// answered there to either (so no SO_REUSEADDR).
fn datagram(domain: i32, binding: Binding) -> nix::Result<OwnedFd> {
    let socket = sys::socket(domain, nix::libc::SOCK_DGRAM, 0).map_err(|error| sys::errno_of(&error))?;
    if binding == Binding::Any {
        setsockopt(&socket, sockopt::IpTransparent, &true)?;
    }
    // What comes with an answer; without it the answer is passed on all the same.
    if domain == nix::libc::AF_INET6 {
        setsockopt(&socket, sockopt::Ipv6RecvTClass, &true).ok();
    } else {
        setsockopt(&socket, sockopt::IpRecvTos, &true).ok();
    }
    // Datagrams that the service sends as one may come as one (Linux 5.0).
    setsockopt(&socket, sockopt::UdpGroSegment, &true).ok();
    Ok(socket)
}

/// A connection to whichever kind of socket listens there: a path has one, and an abstract name may have one of each, of which streams come
/// first.
fn dial_unix(address: &UnixAddr) -> nix::Result<OwnedFd> {
    match dial_unix_of(nix::libc::SOCK_STREAM, address) {
        // Of an abstract name the kernel looks only for sockets of the same kind.
        Err(stream @ (Errno::EPROTOTYPE | Errno::ECONNREFUSED)) => {
            dial_unix_of(nix::libc::SOCK_SEQPACKET, address).map_err(|_| stream)
        }
        dialled => dialled,
    }
}

/// A socket for datagrams with a name of its own, which the kernel chooses (unix(7), autobind), so that the service can answer; it hears
/// that one socket alone.
fn dial_datagrams(address: &UnixAddr) -> nix::Result<OwnedFd> {
    let socket = sys::socket(nix::libc::AF_UNIX, nix::libc::SOCK_DGRAM, 0);
    let socket = socket.map_err(|error| sys::errno_of(&error))?;
    sys::refuse_descriptors(socket.as_fd()).ok();
    bind(socket.as_raw_fd(), &UnixAddr::new_unnamed())?;
    connect(socket.as_raw_fd(), address)?;
    Ok(socket)
}

fn dial_unix_of(kind: i32, address: &UnixAddr) -> nix::Result<OwnedFd> {
    let socket = sys::socket(nix::libc::AF_UNIX, kind, 0).map_err(|error| sys::errno_of(&error))?;
    // Before the service can send any. Where the kernel cannot refuse them, the relay looks.
    sys::refuse_descriptors(socket.as_fd()).ok();
    connect(socket.as_raw_fd(), address)?;
    Ok(socket)
}
