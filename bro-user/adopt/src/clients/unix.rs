//! Unix clients, by the kernel's table of sockets: an accepted socket has the name of its listener, and the file.
//!
//! It is in the table of its *client's* network namespace (`unix_stream_connect`), although it is the service's: one container's clients of another's
//! socket, by a path that is mounted in both, are not in this one. They are found at the descriptors of the service's processes.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, BorrowedFd};

use netlink_packet_core::NLM_F_REQUEST;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::nlas::{Nla, UnixDiagName, Vfs};
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse};
use nix::libc;

use super::Uncountable;
use crate::family::Family;
use crate::socket::{self, Place};
use crate::sys;

/// What a listener and the sockets that were accepted at it have in common.
#[derive(Debug)]
pub(super) struct UnixName {
    kind: u8,
    /// A path may lead to another socket by now, but its file stays the socket's.
    file: Option<Vfs>,
    /// Of a socket without a file.
    name: Option<UnixDiagName>,
    /// The length of its accept queue.
    pub(super) queued: u32,
}

impl UnixName {
    /// Of a socket of this namespace; `None` of one that does not listen or has no name.
    pub(super) fn of(listener: BorrowedFd<'_>) -> Result<Option<Self>, Uncountable> {
        let table = super::table(&[listener])?;
        let inode = nix::sys::stat::fstat(listener).map_err(std::io::Error::from)?.st_ino;
        let request = UnixRequest {
            state_flags: StateFlags::LISTEN,
            // The kernel numbers sockets with 32 bits (`get_next_ino`).
            inode: inode as u32,
            show_flags: ShowFlags::NAME | ShowFlags::VFS | ShowFlags::RQLEN,
            cookie: [0xff; 8],
        };
        let mut found = None;
        let request = SockDiagMessage::UnixRequest(request);
        bro_relay::netns::netlink::ask(&table, NLM_F_REQUEST, request, |answer| {
            if let SockDiagMessage::UnixResponse(response) = answer {
                found = Self::read(&response);
            }
        })?;
        Ok(found)
    }

    fn read(response: &UnixResponse) -> Option<Self> {
        let (mut file, mut name, mut queued) = (None, None, 0);
        for nla in &response.nlas {
            match nla {
                Nla::Vfs(its) => file = Some(its.clone()),
                Nla::Name(its) => name = Some(its.clone()),
                Nla::ReceiveQueueLength(length, _) => queued = *length,
                _ => {}
            }
        }
        (file.is_some() || name.is_some()).then_some(Self { kind: response.header.kind, file, name, queued })
    }

    fn is_of(&self, other: &Self) -> bool {
        let same = match (&self.file, &other.file) {
            (None, None) => self.name == other.name,
            (one, other) => one == other,
        };
        same && self.kind == other.kind
    }
}

/// As [`super::served`]; the kernel counts no bytes.
pub(super) fn served(
    listeners: &[BorrowedFd<'_>],
    processes: &[i32],
    each: &mut dyn FnMut(usize, u64) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, Uncountable> {
    let (mut names, mut places) = (Vec::new(), Vec::new());
    for (index, listener) in listeners.iter().enumerate() {
        let family = socket::look(*listener).map(|seen| seen.family);
        if let Some(family @ (Family::Unix | Family::UnixPackets)) = family {
            names.extend(UnixName::of(*listener)?.map(|name| (index, name)));
            places.extend(Place::of(*listener).map(|place| (index, (place, family))));
        }
    }
    if names.is_empty() {
        return Ok(ControlFlow::Continue(()));
    }
    let mut told = HashSet::new();
    let mut tell = |inode: u64, mine: &mut dyn Iterator<Item = usize>| {
        for index in mine {
            if told.insert(inode) && each(index, 0).is_break() {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    };
    let request = UnixRequest {
        state_flags: StateFlags::ESTABLISHED,
        inode: 0,
        show_flags: ShowFlags::NAME | ShowFlags::VFS,
        cookie: [0xff; 8],
    };
    let heard = super::dump(&super::table(listeners)?, SockDiagMessage::UnixRequest(request), |answer| {
        let SockDiagMessage::UnixResponse(response) = answer else { return ControlFlow::Continue(()) };
        let Some(client) = UnixName::read(&response) else { return ControlFlow::Continue(()) };
        let mine = names.iter().filter(|(_, name)| name.is_of(&client)).map(|(index, _)| *index);
        tell(response.header.inode.into(), &mut { mine })
    })?;
    if heard.is_break() {
        return Ok(heard);
    }
    for process in processes {
        for (inode, place) in accepted(*process) {
            let mine = places.iter().filter(|(_, listens)| *listens == place).map(|(index, _)| *index);
            if tell(inode, &mut { mine }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// The connected sockets with a name that a process has, by their inodes.
fn accepted(process: i32) -> Vec<(u64, (Place, Family))> {
    let (Ok(handle), Ok(entries)) =
        (bro_relay::sys::pidfd_open(process), std::fs::read_dir(format!("/proc/{process}/fd")))
    else {
        return Vec::new();
    };
    let look = |entry: std::fs::DirEntry| {
        let link = std::fs::read_link(entry.path()).ok()?;
        let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()?;
        let number = entry.file_name().to_str()?.parse().ok()?;
        // What has this number by now may be another socket, which is then as good as the first.
        let socket = sys::descriptor_of(handle.as_fd(), number).ok()?;
        let family = socket::look(socket.as_fd())?.family;
        let listens = socket::number(socket.as_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN).ok()? != 0;
        (!listens).then_some((inode, (Place::of(socket.as_fd())?, family)))
    };
    entries.flatten().filter_map(look).collect()
}
