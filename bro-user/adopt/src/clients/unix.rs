//! Unix clients, by the kernel's table of sockets: an accepted socket has the name of its listener, and the file.
//!
//! It is in the table of its *client's* network namespace (`unix_stream_connect`), although it is the service's: one container's clients of another's
//! socket, by a path that is mounted in both, are not in this one.

use std::os::fd::BorrowedFd;

use netlink_packet_core::NLM_F_REQUEST;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::nlas::{Nla, UnixDiagName, Vfs};
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse};

use super::{ServedClient, Uncountable};
use crate::family::Family;
use crate::socket;

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

/// Hands over each that is served; the kernel counts no bytes.
pub(super) fn served(
    listeners: &[BorrowedFd<'_>],
    each: &mut dyn FnMut(&ServedClient),
) -> Result<(), Uncountable> {
    let mut names = Vec::new();
    for (index, listener) in listeners.iter().enumerate() {
        let family = socket::look(*listener).map(|seen| seen.family);
        if let Some(Family::Unix | Family::UnixPackets) = family {
            names.extend(UnixName::of(*listener)?.map(|name| (index, name)));
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    let request = UnixRequest {
        state_flags: StateFlags::ESTABLISHED,
        inode: 0,
        show_flags: ShowFlags::NAME | ShowFlags::VFS,
        cookie: [0xff; 8],
    };
    super::dump(&super::table(listeners)?, SockDiagMessage::UnixRequest(request), |answer| {
        let SockDiagMessage::UnixResponse(response) = answer else { return };
        let Some(client) = UnixName::read(&response) else { return };
        for (listener, _) in names.iter().filter(|(_, name)| name.is_of(&client)) {
            let number = response.header.inode.into();
            each(&ServedClient { listener: *listener, number, address: None, bytes: None });
        }
    })
}
