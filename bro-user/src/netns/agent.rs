//! The agent: a single-threaded child that joins another network namespace and makes sockets there.
//!
//! It is a process of its own because setns(2) lets nobody with threads join a user namespace, and an ordinary user must join
//! the user namespace that owns a rootless container's network namespace before it may join the latter. It holds nothing else:
//! it sees no client and no byte, and ends when its forwarder does.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::fstat;

use super::wire::{self, Answer, Request};
use crate::sys;

/// More channels than a forwarder has targets would be a mistake of ours.
const MOST_CHANNELS: usize = 1024;

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
    ends.thread_block()?;
    let stdin = std::io::stdin();
    let mut channels = vec![stdin.as_fd().try_clone_to_owned()?];
    let mut root = None;
    loop {
        let mut polled: Vec<PollFd<'_>> =
            channels.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> =
            polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        let mut added = Vec::new();
        let mut closed = Vec::new();
        for (index, channel) in channels.iter().enumerate().filter(|(index, _)| ready[*index]) {
            match Request::receive(channel.as_fd()) {
                Ok(Some((request, descriptors))) => {
                    let answer = serve(&request, descriptors, &mut root, &mut added);
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
    request: &Request,
    mut descriptors: Vec<OwnedFd>,
    root: &mut Option<OwnedFd>,
    added: &mut Vec<OwnedFd>,
) -> Answer {
    match request {
        Request::Join => {
            let netns = (!descriptors.is_empty()).then(|| descriptors.remove(0)).ok_or(Errno::EINVAL)?;
            *root = descriptors.pop();
            join(netns.as_fd()).map(|()| Vec::new())
        }
        Request::Sockets { domain, kind, protocol, count } => {
            let make = |_| sys::socket(*domain, *kind, *protocol).map_err(|error| errno_of(&error));
            (0..(*count).min(sys::MOST_DESCRIPTORS as u8)).map(make).collect()
        }
        Request::Connect(path) => {
            let root = root.as_ref().ok_or(Errno::ENOENT)?;
            connect(root.as_fd(), path).map(|socket| vec![socket])
        }
        Request::Channel => {
            added.extend(descriptors.pop());
            Ok(Vec::new())
        }
    }
}

/// Joins the namespace, through its owner where that is not ours. For a process without threads.
pub(crate) fn join(netns: BorrowedFd<'_>) -> nix::Result<()> {
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
    let owner = sys::owning_user_namespace(netns).map_err(|error| errno_of(&error))?;
    if !same_namespace(owner.as_fd(), "/proc/self/ns/user") {
        setns(&owner, CloneFlags::CLONE_NEWUSER)?;
    }
    setns(netns, CloneFlags::CLONE_NEWNET)
}

fn same_namespace(ns: BorrowedFd<'_>, path: &str) -> bool {
    let (Ok(one), Ok(other)) = (fstat(ns), nix::sys::stat::stat(path)) else { return false };
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

fn connect(root: BorrowedFd<'_>, path: &std::path::Path) -> nix::Result<OwnedFd> {
    use nix::sys::socket::{UnixAddr, connect};
    let file = sys::open_in_root(root, path).map_err(|error| errno_of(&error))?;
    let socket =
        sys::socket(nix::libc::AF_UNIX, nix::libc::SOCK_STREAM, 0).map_err(|error| errno_of(&error))?;
    // Through the descriptor: no symlink of the container can lead outside, and no path is too long for sun_path.
    let address = UnixAddr::new(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str())?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
