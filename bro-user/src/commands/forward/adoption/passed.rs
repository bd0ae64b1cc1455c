//! What is passed beside the sockets that clients connect to: the one at the profile's `listenerPath`, and what was in the service manager's store or
//! comes from a predecessor.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::bail;
use bro_adopt::Stored;
use bro_adopt::store::Kind;

use crate::exit::Failure;
use crate::systemd::listen_fds::Passed;
use crate::systemd::notify;

/// The FileDescriptorName= of the socket at `listenerPath`.
pub(in super::super) const SECCOMP: &str = "seccomp";

/// The name under which a predecessor passes its end of the way by which it hands over what it has of containers.
pub(in super::super) const HERITAGE: &str = "adopt-heritage";

/// All of it.
#[derive(Debug)]
pub(in super::super) struct Reserved {
    /// The socket at `listenerPath`.
    pub(super) seccomp: OwnedFd,
    pub(super) before: LeftBehind,
}

/// What there was before this process.
#[derive(Debug)]
pub(super) enum LeftBehind {
    /// What the service manager has kept; nothing where it is the first.
    Stored(Vec<Stored>),
    /// What a predecessor is about to send.
    Heritage(OwnedFd),
}

impl Reserved {
    /// Has a forwarder that was killed left containers behind?
    pub(in super::super) const fn has_left_any(&self) -> bool {
        matches!(&self.before, LeftBehind::Stored(stored) if !stored.is_empty())
    }

    /// All descriptors, which are this process's alone.
    pub(in super::super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let before: Vec<BorrowedFd<'_>> = match &self.before {
            LeftBehind::Stored(stored) => stored.iter().map(|stored| stored.descriptor.as_fd()).collect(),
            LeftBehind::Heritage(way) => vec![way.as_fd()],
        };
        std::iter::once(self.seccomp.as_fd()).chain(before).collect()
    }
}

/// Takes it out of what was passed; the rest is for clients.
pub(in super::super) fn take(
    adopt: bool,
    passed: Vec<Passed>,
) -> anyhow::Result<(Option<Reserved>, Vec<Passed>)> {
    let (mut seccomp, mut heritage, mut stored, mut rest) = (None, None, Vec::new(), Vec::new());
    for one in passed {
        match one.name() {
            SECCOMP => seccomp = Some(one.into_descriptor()?),
            HERITAGE => heritage = Some(one.into_descriptor()?),
            name if Kind::of(name).is_some() => {
                let name = name.to_owned();
                stored.push(Stored { name, descriptor: one.into_descriptor()? });
            }
            _ => rest.push(one),
        }
    }
    match (adopt, seccomp) {
        (true, Some(seccomp)) => {
            let before = heritage.map_or(LeftBehind::Stored(stored), LeftBehind::Heritage);
            Ok((Some(Reserved { seccomp, before }), rest))
        }
        (true, None) => bail!(Failure::Usage(format!(
            "--adopt needs a passed socket with FileDescriptorName={SECCOMP}, at the path that the container's seccomp profile has as listenerPath"
        ))),
        (false, Some(_)) => bail!(Failure::Usage(format!(
            "the passed socket “{SECCOMP}” is for --adopt; give that option, or the socket another FileDescriptorName="
        ))),
        (false, None) => {
            for Stored { name, .. } in stored {
                tracing::warn!(name, "what is left of --adopt is dropped: it is not given any more");
                notify::forget(&name);
            }
            Ok((None, rest))
        }
    }
}
