//! What a successor gets of containers (`systemctl reload`): each descriptor in a message with its name, and one without a descriptor at the end. It is sent
//! when the predecessor answers and accepts no more, so that there is one agent at a time. All of it stays in the service manager's store
//! meanwhile; a successor that gets only a part ends, and is restarted with that.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bro_adopt::Stored;
use bro_relay::sys;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::TimeVal;

/// The message after the last.
const END: &str = "end";

/// Longer than any name.
const LONGEST: usize = 128;

/// How long a predecessor may take from the takeover until it accepts no more.
const PATIENCE: Duration = Duration::from_secs(10);

/// The two ends: the predecessor's and the successor's.
pub(super) fn way() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// Sends all of it.
///
/// # Errors
/// When the successor is gone.
pub(super) fn send(way: &OwnedFd, stored: &[Stored]) -> io::Result<()> {
    // A successor that does not read may not hold this process up.
    setsockopt(way, sockopt::SendTimeout, &TimeVal::new(1, 0))?;
    for Stored { name, descriptor } in stored {
        sys::send_with_descriptors(way.as_fd(), name.as_bytes(), &[descriptor.as_fd()])?;
    }
    sys::send_with_descriptors(way.as_fd(), END.as_bytes(), &[])
}

/// Receives all of it. Waits.
///
/// # Errors
/// When the predecessor ends before it has sent all.
pub(super) fn receive(way: &OwnedFd) -> anyhow::Result<Vec<Stored>> {
    setsockopt(way, sockopt::ReceiveTimeout, &TimeVal::new(i64::try_from(PATIENCE.as_secs())?, 0))?;
    let mut stored = Vec::new();
    loop {
        let mut name = [0; LONGEST];
        let received = sys::receive_with_descriptors(way.as_fd(), &mut name);
        let (length, mut descriptors) =
            received.context("what the predecessor has of containers did not come")?;
        let name = String::from_utf8_lossy(name.get(..length).unwrap_or_default()).into_owned();
        match (name.as_str(), descriptors.pop()) {
            (END, None) => return Ok(stored),
            ("", _) => bail!("the predecessor ended before it had handed over what it has of containers"),
            (_, Some(descriptor)) => stored.push(Stored { name, descriptor }),
            (_, None) => bail!("the predecessor sent a name without a descriptor"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives_and_half_of_it_does_not() {
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let (ours, theirs) = way().unwrap();
        let stored = ["adopt-record", "adopt-container-1"]
            .map(|name| Stored { name: name.into(), descriptor: file() });
        send(&ours, &stored).unwrap();
        let names: Vec<_> = receive(&theirs).unwrap().into_iter().map(|stored| stored.name).collect();
        assert_eq!(names, ["adopt-record", "adopt-container-1"]);
        sys::send_with_descriptors(ours.as_fd(), b"adopt-record", &[file().as_fd()]).unwrap();
        drop(ours);
        receive(&theirs).unwrap_err();
    }
}
