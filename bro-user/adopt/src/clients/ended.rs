//! TCP clients that have gone: the kernel tells of each TCP socket that it destroys in a network namespace (sock_diag(7), `sock_diag_broadcast_destroy`,
//! Linux 4.2, which `ss -E` shows), also to a process without any right.
//!
//! A client that connected and left between two looks is in no table any more, and has left this message. A program in the kernel (socket(7),
//! SO_ATTACH_FILTER) lets those of the listeners' places through alone, so that a host with many other connections neither wakes this process nor
//! fills the buffer.
//!
//! It comes when the service's socket is gone: what the service has closed and the client does not acknowledge comes late, and only then. A connection that
//! the service resets (SO_LINGER of 0) has no peer any more and the address that its listener is bound to (`tcp_disconnect`), like a listener that ends:
//! those are counted too, for a service is better kept awake, and an adopted listener does not end while this process has it.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, NetlinkAddr, bind, recv, setsockopt, sockopt};

use super::tcp::{self, LocalEnd};
use super::{ClientEnd, Uncountable};
use crate::bound;
use crate::socket::Place;
use crate::sys;

/// SKNLGRP_INET_TCP_DESTROY and SKNLGRP_INET6_TCP_DESTROY (linux/sock_diag.h: 1 and 3), as bits.
const DESTROYED: u32 = 1 | 1 << 2;
/// What the kernel may keep of messages that were not read: some hundred. More are lost, which it says.
const BUFFER: usize = 128 * 1024;
/// How many messages are read at once: more than the buffer holds.
const MOST: usize = 4096;

/// Where a `struct inet_diag_msg` has what, in a message with its header (`struct nlmsghdr`) of 16 bytes.
const FAMILY_AT: u32 = 16;
const PORT_AT: u32 = 20;
const ADDRESS_AT: u32 = 24;

/// A client that has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndedClient {
    /// The connection's cookie.
    pub number: u64,
    /// Where it came from; not any more where the service has reset it.
    pub end: ClientEnd,
    /// How many bytes there were in all, as [`super::ServedClient::bytes`], with one more for each side's end.
    pub bytes: Option<u64>,
}

/// Hears of TCP clients that have gone.
#[derive(Debug)]
pub struct EndedClients {
    messages: OwnedFd,
}

impl EndedClients {
    /// Those of these listeners, from now on; `None` without a TCP listener among them. Any process of their network namespace may call it.
    ///
    /// # Errors
    /// [`Uncountable`]: also with more listeners than a filter has room for, which are some hundreds.
    pub fn of(listeners: &[BorrowedFd<'_>]) -> Result<Option<Self>, Uncountable> {
        let tcp = |listener: &BorrowedFd<'_>| match bound::place(*listener) {
            Some(Place::Tcp(address)) => Some(address),
            _ => None,
        };
        let places: Vec<SocketAddr> = listeners.iter().filter_map(tcp).collect();
        if places.is_empty() {
            return Ok(None);
        }
        let messages = super::table(listeners)?;
        setsockopt(&messages, sockopt::RcvBuf, &BUFFER).map_err(std::io::Error::from)?;
        // The filter comes first: what was queued before it would stay.
        sys::attach_filter(messages.as_fd(), &mut filter(&places))?;
        bind(messages.as_raw_fd(), &NetlinkAddr::new(0, DESTROYED)).map_err(std::io::Error::from)?;
        Ok(Some(Self { messages }))
    }

    /// Has a client of these listeners gone since the last call that `counts`? They are to be some of those that it was made for. Does not wait; the
    /// kernel tells some moments after the client has gone. `counts` is asked about clients of other listeners with such an address too, and not about
    /// those that the kernel had no room to tell of: they count.
    ///
    /// # Errors
    /// [`Uncountable`].
    pub fn any(
        &self,
        listeners: &[BorrowedFd<'_>],
        counts: &mut dyn FnMut(&EndedClient) -> bool,
    ) -> Result<bool, Uncountable> {
        let (mut gone, mut lost) = (Vec::new(), false);
        let mut buffer = [0; 4096];
        for _ in 0..MOST {
            match recv(self.messages.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    let _one = bro_relay::netns::netlink::messages(&buffer[..length], &mut |message| {
                        let SockDiagMessage::InetResponse(response) = message else { return };
                        let (number, end) = tcp::who(&response);
                        if !counts(&EndedClient { number, end, bytes: tcp::bytes(&response) }) {
                            return;
                        }
                        let (family, port) = (response.header.family, response.header.socket_id.source_port);
                        let ended = (family, port, LocalEnd::of(&response));
                        if !gone.contains(&ended) {
                            gone.push(ended);
                        }
                    })?;
                }
                // More clients than the buffer holds.
                Err(Errno::ENOBUFS) => lost = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(std::io::Error::from(errno).into()),
            }
        }
        Ok(lost || tcp::is_client(listeners, &gone)?)
    }
}

/// Lets pass what has the family and port of one of these places, and its address unless that is any address.
fn filter(places: &[SocketAddr]) -> Vec<libc::sock_filter> {
    let mut places = places.to_vec();
    places.sort_unstable();
    places.dedup();
    let instruction =
        |code: u32, k: u32, otherwise: u8| libc::sock_filter { code: code as u16, jt: 0, jf: otherwise, k };
    let mut program = Vec::new();
    for place in places {
        let family = if place.is_ipv4() { AF_INET } else { AF_INET6 };
        let mut wanted = vec![
            (libc::BPF_B, FAMILY_AT, u32::from(family)),
            (libc::BPF_H, PORT_AT, u32::from(place.port())),
        ];
        if !place.ip().is_unspecified() {
            let words: Vec<u32> = match place.ip() {
                IpAddr::V4(v4) => vec![v4.to_bits()],
                IpAddr::V6(v6) => (0..4).map(|word| (v6.to_bits() >> (96 - 32 * word)) as u32).collect(),
            };
            wanted.extend((ADDRESS_AT..).step_by(4).zip(words).map(|(at, word)| (libc::BPF_W, at, word)));
        }
        // Two instructions each, and one that lets pass: where one differs, the rest of this place's is jumped over.
        let mut left = wanted.len() as u8 * 2;
        for (size, at, value) in wanted {
            left -= 2;
            program.push(instruction(libc::BPF_LD | libc::BPF_ABS | size, at, 0));
            program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, left + 1));
        }
        program.push(instruction(libc::BPF_RET | libc::BPF_K, u32::MAX, 0));
    }
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0));
    program
}
