//! Clients that come through a trusted balancer in front (`--accept-proxy`): its header, which says who the client is, is read
//! before anything else is done for the client. Until then it wakes nothing and counts for no source.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

use crate::connection::End;
use crate::proxy_protocol::{Incoming, Introduction, LONGEST};
use crate::relay::{Broken, Side, copy};

/// How long a trusted peer may take to send its header. One lost packet is no reason to give up.
pub(super) const WITHIN: Duration = Duration::from_secs(5);

/// Takes what is there of the header and no byte of what follows it: looks first, and then reads as much as belongs to it.
pub(super) fn read(client: BorrowedFd<'_>, incoming: &mut Incoming) -> Result<Option<Introduction>, End> {
    let (mut seen, mut taken) = ([0; LONGEST], [0; LONGEST]);
    while let Some(waiting) = receive(client, &mut seen, MsgFlags::MSG_PEEK)? {
        let belonging = incoming.belonging(&seen[..waiting]).map_err(End::BadHeader)?;
        let Some(count) = receive(client, &mut taken[..belonging], MsgFlags::empty())? else { break };
        if let Some(said) = incoming.take(&taken[..count]).map_err(End::BadHeader)? {
            return Ok(Some(said));
        }
    }
    Ok(None)
}

/// One look or read; `None` when nothing waits.
fn receive(client: BorrowedFd<'_>, room: &mut [u8], how: MsgFlags) -> Result<Option<usize>, End> {
    match copy::read_guarded(client, room, how) {
        Err(Errno::EAGAIN) => Ok(None),
        Err(errno) => Err(Broken { side: Side::Client, errno }.into()),
        Ok(0) => Err(End::ClientLeft),
        Ok(count) => Ok(Some(count)),
    }
}
