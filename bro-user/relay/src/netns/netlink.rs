//! Questions to the kernel over netlink(7), and its answers.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use netlink_packet_core::{
    NLM_F_MULTIPART, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

/// The kernel answers at once; this bounds a surprise.
const ANSWER_LIMIT_MS: u16 = 1000;

/// Sends a message, and hands over each answer: of a dump until its end, else the one that was asked for.
///
/// # Errors
/// What the kernel says, or InvalidData where it answers nonsense.
pub fn ask<T>(socket: &OwnedFd, flags: u16, message: T, mut each: impl FnMut(T)) -> io::Result<()>
where
    T: NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<T>>,
{
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut packet = NetlinkMessage::new(header, message.into());
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    let _sent = send(socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(ANSWER_LIMIT_MS))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if !messages(&buffer[..length], &mut each)? {
            return Ok(());
        }
    }
}

/// Hands over each answer of a datagram; is there to be a further datagram?
pub fn messages<T: NetlinkDeserializable>(mut rest: &[u8], each: &mut impl FnMut(T)) -> io::Result<bool> {
    let mut more = true;
    while !rest.is_empty() {
        let message = NetlinkMessage::<T>::deserialize(rest)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        more = message.header.flags & NLM_F_MULTIPART != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(answer) => each(answer),
            NetlinkPayload::Done(_) => return Ok(false),
            // An error of number 0 is the acknowledgement that NLM_F_ACK asks for.
            NetlinkPayload::Error(error) if error.raw_code() == 0 => return Ok(false),
            NetlinkPayload::Error(error) => {
                return Err(io::Error::from_raw_os_error(error.raw_code().wrapping_neg()));
            }
            _ => {}
        }
        // Messages are padded to four bytes, and one of length 0 would loop for ever.
        let step = (message.header.length as usize).next_multiple_of(4).max(4);
        rest = rest.get(step..).unwrap_or_default();
    }
    Ok(more)
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_sock_diag::SockDiagMessage;
    use nix::libc;

    #[test]
    fn an_error_is_an_error_whatever_its_number() {
        let error = |code: i32| -> Vec<u8> {
            let header = [20, 2, 0, 0].into_iter().flat_map(u32::to_ne_bytes);
            header.chain(code.to_ne_bytes()).collect()
        };
        let read = |code| messages::<SockDiagMessage>(&error(code), &mut |_| ());
        assert_eq!(read(-libc::ENOENT).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert_eq!(read(i32::MIN).unwrap_err().raw_os_error(), Some(i32::MIN));
        assert!(!read(0).unwrap(), "an acknowledgement");
    }
}
