//! Datagrams, several with one system call (recvmmsg(2), sendmmsg(2)), with what comes and goes along. nix has both, but forgets to
//! say anew how much room there is for an address, and reads addresses that sendmmsg(2) never writes.

use std::ops::Range;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr::null_mut;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use crate::flows::Piece;

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

    /// Receives as many as there are and fit, up to `most`, and says how many. Those from before are gone. Descriptors that come along are closed.
    ///
    /// # Errors
    /// recvmmsg(2)'s; EAGAIN where there is none.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, most: usize) -> nix::Result<usize> {
        self.lengths.clear();
        self.receive_more(socket, most).map(|received| received.len())
    }

    /// For how many more there is room.
    #[must_use]
    pub fn room(&self) -> usize {
        self.names.len() - self.lengths.len()
    }

    /// Those that were received are gone.
    pub fn clear(&mut self) {
        self.lengths.clear();
    }

    /// The same as [`Messages::receive`], beside those from before. Returns their numbers.
    ///
    /// # Errors
    /// recvmmsg(2)'s; EAGAIN where there is none.
    pub fn receive_more(&mut self, socket: BorrowedFd<'_>, most: usize) -> nix::Result<Range<usize>> {
        let first = self.lengths.len();
        let parts = self.bytes.chunks_exact_mut(ROOM).skip(first).take(most);
        let mut parts: Vec<libc::iovec> =
            parts.map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: ROOM }).collect();
        let names = self.names.iter_mut().skip(first);
        let places = parts.iter_mut().zip(names).zip(self.controls.iter_mut().skip(first));
        let mut headers: Vec<libc::mmsghdr> = places
            .map(|((part, name), control)| {
                let parts = std::slice::from_mut(part);
                header(parts, (&raw mut *name).cast(), size_of::<libc::sockaddr_storage>(), &mut control.0)
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
        drop(headers);
        for ([.., length], control) in self.lengths.iter().zip(&self.controls).skip(first) {
            for number in crate::ancillary::descriptors(control.0.get(..*length).unwrap_or_default()) {
                // SAFETY: the kernel has just made this descriptor for the message, and only this code knows of it.
                drop(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        Ok(first..first + received)
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

    /// A datagram's bytes; none for a piece that is none of what was received.
    #[must_use]
    pub fn bytes_of(&self, piece: &Piece) -> &[u8] {
        let length = self.lengths.get(piece.message).map_or(0, |[bytes, ..]| (*bytes).min(ROOM));
        let start = piece.message * ROOM;
        let of_message = self.bytes.get(start..start + length).unwrap_or_default();
        of_message.get(piece.start..piece.start + piece.length).unwrap_or_default()
    }

    /// Sends datagrams of those that were received on, each as one of its own, to `to` with `control`. Says how many were sent, in order.
    ///
    /// # Errors
    /// sendmmsg(2)'s for the first; EINVAL for a piece that is none of what was received.
    pub fn send_apart(
        &mut self,
        pieces: &[Piece],
        socket: BorrowedFd<'_>,
        to: &dyn SockaddrLike,
        control: &[u8],
    ) -> nix::Result<usize> {
        let mut parts = self.parts(pieces)?;
        let mut groups: Vec<&mut [libc::iovec]> = parts.chunks_exact_mut(1).collect();
        send_groups(&mut groups, socket, to, control)
    }

    /// Sends datagrams of those that were received on as one, to `to` with `control`, which says how long each is.
    ///
    /// # Errors
    /// sendmmsg(2)'s, where none was sent; EINVAL for a piece that is none of what was received.
    pub fn send_together(
        &mut self,
        pieces: &[Piece],
        socket: BorrowedFd<'_>,
        to: &dyn SockaddrLike,
        control: &[u8],
    ) -> nix::Result<()> {
        let mut parts = self.parts(pieces)?;
        send_groups(&mut [&mut parts], socket, to, control).map(drop)
    }

    /// Sends datagrams of those that were received on as one, to where the socket, which is in non-blocking mode, is connected.
    ///
    /// # Errors
    /// writev(2)'s, where none was sent; EINVAL for a piece that is none of what was received.
    pub fn write_together(&mut self, pieces: &[Piece], socket: BorrowedFd<'_>) -> nix::Result<()> {
        let parts = self.parts(pieces)?;
        let count = parts.len() as libc::c_int;
        // SAFETY: each part is within a buffer that lives until the call is over, and the kernel only reads.
        let result = unsafe { libc::writev(socket.as_raw_fd(), parts.as_ptr(), count) };
        Errno::result(result).map(drop)
    }

    /// Where pieces are.
    fn parts(&mut self, pieces: &[Piece]) -> nix::Result<Vec<libc::iovec>> {
        let part = |piece: &Piece| {
            let length = self.lengths.get(piece.message).map_or(0, |[bytes, ..]| (*bytes).min(ROOM));
            let start = piece.message * ROOM;
            let of_message = self.bytes.get_mut(start..start + length).ok_or(Errno::EINVAL)?;
            let bytes = of_message.get_mut(piece.start..piece.start + piece.length).ok_or(Errno::EINVAL)?;
            Ok(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() })
        };
        pieces.iter().map(part).collect()
    }
}

/// A message for each group of parts, which have to be where bytes are.
fn send_groups(
    groups: &mut [&mut [libc::iovec]],
    socket: BorrowedFd<'_>,
    to: &dyn SockaddrLike,
    control: &[u8],
) -> nix::Result<usize> {
    let mut shared = ControlBuffer([0; CONTROL]);
    let Some(room) = shared.0.get_mut(..control.len()) else { return Err(Errno::EINVAL) };
    room.copy_from_slice(control);
    let (name, length) = (to.as_ptr().cast_mut().cast(), to.len() as usize);
    let one = |parts: &mut &mut [libc::iovec]| header(parts, name, length, &mut shared.0[..control.len()]);
    let mut headers: Vec<libc::mmsghdr> = groups.iter_mut().map(one).collect();
    let count = headers.len() as libc::c_uint;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: each header points to parts of its own, and all to one name and one control buffer, which the kernel only reads; all of
    // them live until the call is over, and their lengths are as said.
    let result = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, flags as _) };
    Ok(usize::try_from(Errno::result(result)?).unwrap_or_default())
}

fn header(
    parts: &mut [libc::iovec],
    name: *mut libc::c_void,
    name_length: usize,
    control: &mut [u8],
) -> libc::mmsghdr {
    // SAFETY: it consists of integers and pointers, for which zeros will do.
    let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
    let inner = &mut header.msg_hdr;
    (inner.msg_name, inner.msg_namelen) = (name, name_length as libc::socklen_t);
    (inner.msg_iov, inner.msg_iovlen) = (parts.as_mut_ptr(), parts.len() as _);
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
        assert_eq!(messages.receive(other.as_fd(), 8), Err(Errno::EAGAIN));
        for length in lengths {
            let _sent = one.send_to(&vec![7; length], other.local_addr().unwrap()).unwrap();
        }
        let mut received = 0;
        while received < lengths.len() {
            let count = messages.receive(other.as_fd(), 8).unwrap();
            for number in 0..count {
                let message = messages.get(number).unwrap();
                assert_eq!(message.bytes.len(), lengths[received + number]);
                let from = message.from.and_then(|from| crate::sockaddr::tcp(&from));
                assert_eq!(from, Some(one.local_addr().unwrap()));
            }
            assert!(messages.get(count).is_none());
            // To itself, through another socket.
            let pieces: Vec<Piece> =
                (0..count).flat_map(|number| Piece::of(number, lengths[received + number], 0)).collect();
            assert_eq!(messages.send_apart(&pieces, one.as_fd(), &there, &[]), Ok(count));
            received += count;
        }
        let mut buffer = vec![0; ROOM];
        for length in lengths {
            assert_eq!(other.recv(&mut buffer).unwrap(), length);
        }
    }

    #[test]
    fn what_comes_from_several_sockets_lies_side_by_side() {
        let [one, other, third] = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let mut messages = Messages::new(3);
        for (socket, marks) in [(&other, &[1u8, 2][..]), (&third, &[3, 4])] {
            for mark in marks {
                let _sent = one.send_to(&[*mark; 10], socket.local_addr().unwrap()).unwrap();
            }
        }
        assert_eq!(messages.receive_more(other.as_fd(), 8), Ok(0..2));
        assert_eq!(messages.receive_more(other.as_fd(), 8), Err(Errno::EAGAIN));
        assert_eq!((messages.room(), messages.receive_more(third.as_fd(), 8)), (1, Ok(2..3)));
        for (number, mark) in [1u8, 2, 3].into_iter().enumerate() {
            let message = messages.get(number).unwrap();
            assert_eq!(message.bytes, [mark; 10]);
            assert_eq!(messages.bytes_of(&Piece { message: number, start: 3, length: 2 }), [mark; 2]);
        }
        messages.clear();
        assert_eq!((messages.room(), messages.receive(third.as_fd(), 8)), (3, Ok(1)));
        assert_eq!(messages.get(0).unwrap().bytes, [4; 10]);
    }

    #[test]
    fn what_the_kernel_takes_apart_is_as_it_was() {
        use crate::ancillary::Ancillary;
        use crate::flows::FlowClient;
        let [one, other, third] = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let mut messages = Messages::new(8);
        let lengths = [1200, 1200, 1200, 7];
        for length in lengths {
            let _sent = one.send_to(&vec![length as u8; length], other.local_addr().unwrap()).unwrap();
        }
        let pieces: Vec<Piece> = (0..4).flat_map(|number| Piece::of(number, lengths[number], 0)).collect();
        assert_eq!(messages.receive(other.as_fd(), 8), Ok(4));
        // Once with each message's own size, once with the socket's.
        let there = SockaddrStorage::from(third.local_addr().unwrap());
        let control = Ancillary { segment: 1200, ..Ancillary::default() }
            .write(&FlowClient::Inet(third.local_addr().unwrap()));
        messages.send_together(&pieces, one.as_fd(), &there, &control).unwrap();
        one.connect(third.local_addr().unwrap()).unwrap();
        one.set_nonblocking(true).unwrap();
        nix::sys::socket::setsockopt(&one.as_fd(), nix::sys::socket::sockopt::UdpGsoSegment, &1200).unwrap();
        messages.write_together(&pieces, one.as_fd()).unwrap();
        let mut buffer = vec![0; ROOM];
        for length in [lengths, lengths].concat() {
            assert_eq!(third.recv(&mut buffer).unwrap(), length);
            assert_eq!(buffer[..length], vec![length as u8; length]);
        }
        let none = Piece { message: 4, start: 0, length: 1 };
        assert_eq!(messages.write_together(&[none], one.as_fd()), Err(Errno::EINVAL));
    }

    #[test]
    fn descriptors_that_come_along_are_closed() {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        let (one, other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let (closed, kept) = std::io::pipe().unwrap();
        let number = [kept.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&number)];
        let part = [std::io::IoSlice::new(b"with one")];
        let _sent = sendmsg::<()>(one.as_raw_fd(), &part, &rights, MsgFlags::empty(), None).unwrap();
        let mut messages = Messages::new(2);
        assert_eq!(messages.receive(other.as_fd(), 2), Ok(1));
        let control = messages.get(0).unwrap().control;
        assert!(crate::ancillary::Ancillary::read(control).descriptors);
        // Nothing else holds the pipe's other end.
        drop(kept);
        assert_eq!(std::io::Read::read(&mut &closed, &mut [0]).unwrap(), 0);
    }
}
