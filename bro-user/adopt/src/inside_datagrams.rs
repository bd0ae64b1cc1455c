//! Datagrams of clients inside a container, which come to the socket that the service made itself: relayed to the host's one, which the service has.
//! Each client is a socket of its own there, so that its answers are known.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrStorage, recv, recvfrom, send, sendto};

use crate::inside::{ClientPlace, connect_to};
use crate::original::Original;

/// The most clients; the one that was heard longest ago makes room.
const MOST: usize = 64;

/// The most datagrams of a socket in one turn.
const TURN: usize = 16;

/// Longer than any.
const LONGEST: usize = 64 * 1024;

/// A client.
#[derive(Debug)]
struct InsideFlow {
    /// The original that it writes to, by its SO_COOKIE.
    original: u64,
    client: SockaddrStorage,
    /// Connected to the host's socket.
    host: OwnedFd,
    used: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub struct InsideFlows {
    flows: Vec<InsideFlow>,
    clock: u64,
}

impl InsideFlows {
    /// What to poll, by its place.
    pub fn polled(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        self.flows.iter().map(|flow| flow.host.as_fd()).enumerate()
    }

    /// Those of originals that are not kept any more end.
    pub fn keep(&mut self, originals: &[Original]) {
        self.flows.retain(|flow| originals.iter().any(|original| original.seen.cookie == flow.original));
    }

    /// Datagrams may wait at this original, for this socket of the host's.
    pub fn take(&mut self, original: &Original, host: BorrowedFd<'_>) {
        let mut bytes = vec![0; LONGEST];
        for _ in 0..TURN {
            let (length, client) = match recvfrom::<SockaddrStorage>(original.socket.as_raw_fd(), &mut bytes)
            {
                Ok((length, Some(client))) => (length, client),
                Ok((_, None)) | Err(Errno::EINTR) => continue,
                Err(_) => return,
            };
            let Some(flow) = self.flow(original.seen.cookie, client, host) else { continue };
            let datagram = bytes.get(..length).unwrap_or_default();
            if let Err(errno) = send(flow.host.as_raw_fd(), datagram, MsgFlags::MSG_DONTWAIT) {
                tracing::debug!(
                    error = errno.desc(),
                    "a datagram of a client inside the container is dropped"
                );
            }
        }
    }

    fn flow(
        &mut self,
        original: u64,
        client: SockaddrStorage,
        host: BorrowedFd<'_>,
    ) -> Option<&mut InsideFlow> {
        self.clock += 1;
        let used = self.clock;
        let known = self.flows.iter().position(|flow| flow.original == original && flow.client == client);
        let at = if let Some(known) = known {
            known
        } else {
            let socket = connect_to(host, ClientPlace::of_address(Some(&client)))
                .inspect_err(|error| tracing::debug!(%error, "a client inside the container is not relayed"));
            let new = InsideFlow { original, client, host: socket.ok()?, used };
            if self.flows.len() == MOST {
                let oldest = self.flows.iter().enumerate().min_by_key(|(_, flow)| flow.used);
                let oldest = oldest.map_or(0, |(at, _)| at);
                drop(self.flows.swap_remove(oldest));
            }
            self.flows.push(new);
            self.flows.len() - 1
        };
        let flow = self.flows.get_mut(at)?;
        flow.used = used;
        Some(flow)
    }

    /// The service may have answered the client at this place.
    pub fn answer(&mut self, at: usize, originals: &[Original]) {
        let Some(flow) = self.flows.get(at) else { return };
        let original = originals.iter().find(|original| original.seen.cookie == flow.original);
        let Some(original) = original else { return };
        let mut bytes = vec![0; LONGEST];
        for _ in 0..TURN {
            match recv(flow.host.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    let datagram = bytes.get(..length).unwrap_or_default();
                    let (from, flags) = (original.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
                    if let Err(errno) = sendto(from, datagram, &flow.client, flags) {
                        tracing::debug!(
                            error = errno.desc(),
                            "an answer to a client inside the container is dropped"
                        );
                    }
                }
                // Of one that was sent before.
                Err(Errno::EINTR | Errno::ECONNREFUSED) => {}
                Err(_) => return,
            }
        }
    }
}
