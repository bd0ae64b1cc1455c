//! Datagrams, several with one system call (recvmmsg(2), sendmmsg(2)), with what comes and goes along. nix has both, but forgets to
//! say anew how much room there is for an address, and reads addresses that sendmmsg(2) never writes.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::null_mut;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};

/// The longest datagram, and one byte by which a longer one would show.
const ROOM: usize = 64 * 1024;

/// Room for what comes along with one: an address and a traffic class take 72 bytes.
const CONTROL: usize = 128;

/// ControlBuffer messages begin where a size_t may.
#[derive(Clone, Copy)]
#[repr(align(8))]
struct ControlBuffer([u8; CONTROL]);

/// Room for some datagrams.
pub struct Messages {
    bytes: Box<[u8]>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<ControlBuffer>,
    /// Of each that was received: the lengths of its bytes, its name and its control messages.
    lengths: Vec<[usize; 3]>,
}

impl std::fmt::Debug for Messages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Messages").field("lengths", &self.lengths).finish_non_exhaustive()
    }
}

/// One that was received.
#[derive(Debug, Clone, Copy)]
pub struct ReceivedDatagram<'a> {
    /// All of its bytes.
    pub bytes: &'a [u8],
    /// Its sender.
    pub from: Option<SockaddrStorage>,
    /// What came along, as cmsg(3) has it.
    pub control: &'a [u8],
}

impl Messages {
    /// Room for `count`: 64 KiB each, of which the kernel gives a page when the first byte is written there.
    #[must_use]
    pub fn new(count: usize) -> Self {
        // SAFETY: it consists of integers, for which zeros will do.
        let name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        Self {
            bytes: vec![0; count * ROOM].into_boxed_slice(),
            names: vec![name; count],
            controls: vec![ControlBuffer([0; CONTROL]); count],
            lengths: Vec::with_capacity(count),
        }
    }

    /// Receives as many as there are and fit, and says how many. Those from before are gone.
    ///
    /// # Errors
    /// recvmmsg(2)'s; EAGAIN where there is none.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> nix::Result<usize> {
        self.lengths.clear();
        let parts = self.bytes.chunks_exact_mut(ROOM);
        let mut parts: Vec<libc::iovec> =
            parts.map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: ROOM }).collect();
        let places = parts.iter_mut().zip(&mut self.names).zip(&mut self.controls);
        let mut headers: Vec<libc::mmsghdr> = places
            .map(|((part, name), control)| {
                header(part, (&raw mut *name).cast(), size_of::<libc::sockaddr_storage>(), &mut control.0)
            })
            .collect();
        let count = headers.len() as libc::c_uint;
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: each header points to a part, a name and a control buffer of its own, which live and are not otherwise used until
        // the call is over, and says how long they are.
        let result = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, flags as _, null_mut())
        };
        let received = usize::try_from(Errno::result(result)?).unwrap_or_default();
        self.lengths.extend(headers.iter().take(received).map(|header| {
            let inner = &header.msg_hdr;
            [header.msg_len as usize, inner.msg_namelen as usize, inner.msg_controllen]
        }));
        Ok(received)
    }

    /// The one with this number, of those that were received last.
    #[must_use]
    pub fn get(&self, number: usize) -> Option<ReceivedDatagram<'_>> {
        let [bytes, name, control] = *self.lengths.get(number)?;
        let start = number * ROOM;
        let length = libc::socklen_t::try_from(name).ok().filter(|length| *length > 0);
        let place: *const libc::sockaddr_storage = &raw const self.names[number];
        // SAFETY: the kernel has written `length` bytes of an address there, which fit, and the rest is integers too.
        let from = length.and_then(|length| unsafe { SockaddrStorage::from_raw(place.cast(), Some(length)) });
        let bytes = self.bytes.get(start..start + bytes.min(ROOM))?;
        Some(ReceivedDatagram { bytes, from, control: self.controls[number].0.get(..control)? })
    }

    /// Sends those with the numbers `which` on: to `to`, with `control` (or, without both, to where the socket is connected). Says how
    /// many were sent, in order.
    ///
    /// # Errors
    /// sendmmsg(2)'s for the first.
    pub fn send_on(
        &mut self,
        which: std::ops::Range<usize>,
        socket: BorrowedFd<'_>,
        to: &SockaddrStorage,
        control: &[u8],
    ) -> nix::Result<usize> {
        let mut shared = ControlBuffer([0; CONTROL]);
        let Some(room) = shared.0.get_mut(..control.len()) else { return Err(Errno::EINVAL) };
        room.copy_from_slice(control);
        let first = which.start;
        let lengths = self.lengths.get(which).ok_or(Errno::EINVAL)?.iter();
        let bytes = self.bytes.chunks_exact_mut(ROOM).skip(first);
        let mut parts: Vec<libc::iovec> = bytes
            .zip(lengths)
            .map(|(part, length)| libc::iovec {
                iov_base: part.as_mut_ptr().cast(),
                iov_len: length[0].min(ROOM),
            })
            .collect();
        let (name, length) = (to.as_ptr().cast_mut().cast(), to.len() as usize);
        let mut headers: Vec<libc::mmsghdr> =
            parts.iter_mut().map(|part| header(part, name, length, &mut shared.0[..control.len()])).collect();
        let count = headers.len() as libc::c_uint;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: each header points to a part of its own, and all to one name and one control buffer, which the kernel only reads;
        // all of them live until the call is over, and their lengths are as said.
        let result = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, flags as _) };
        Ok(usize::try_from(Errno::result(result)?).unwrap_or_default())
    }
}

fn header(
    part: &mut libc::iovec,
    name: *mut libc::c_void,
    name_length: usize,
    control: &mut [u8],
) -> libc::mmsghdr {
    // SAFETY: it consists of integers and pointers, for which zeros will do.
    let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
    let inner = &mut header.msg_hdr;
    (inner.msg_name, inner.msg_namelen) = (name, name_length as libc::socklen_t);
    (inner.msg_iov, inner.msg_iovlen) = (part, 1);
    if !control.is_empty() {
        (inner.msg_control, inner.msg_controllen) = (control.as_mut_ptr().cast(), control.len() as _);
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd as _;

    #[test]
    fn datagrams_come_and_go_whole() {
        let [one, other] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let there = SockaddrStorage::from(other.local_addr().unwrap());
        let lengths = [0, 1, 1200, 65_507];
        let mut messages = Messages::new(8);
        assert_eq!(messages.receive(other.as_fd()), Err(Errno::EAGAIN));
        for length in lengths {
            let _sent = one.send_to(&vec![7; length], other.local_addr().unwrap()).unwrap();
        }
        let mut received = 0;
        while received < lengths.len() {
            let count = messages.receive(other.as_fd()).unwrap();
            for number in 0..count {
                let message = messages.get(number).unwrap();
                assert_eq!(message.bytes.len(), lengths[received + number]);
                let from = message.from.and_then(|from| crate::sockaddr::tcp(&from));
                assert_eq!(from, Some(one.local_addr().unwrap()));
            }
            assert!(messages.get(count).is_none());
            // To itself, through another socket.
            assert_eq!(messages.send_on(0..count, one.as_fd(), &there, &[]), Ok(count));
            received += count;
        }
        let mut buffer = vec![0; ROOM];
        for length in lengths {
            assert_eq!(other.recv(&mut buffer).unwrap(), length);
        }
    }
}
