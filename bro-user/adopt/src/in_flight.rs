//! The notification that is being answered, written down before anything is done about it.
//!
//! The kernel delivers a notification once. An agent that is killed between receiving and answering would leave that call, and so the
//! service, waiting for ever. So it is received into memory that outlives the process, and a successor, which has that memory and the
//! notification descriptors from the service manager's store, answers it. All that the agent does about a call can be done again: a
//! listener that is in its place already is known by its SO_COOKIE.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use crate::notification::{Answer, Raw};
use crate::sys::Page;

/// The record: at most one notification, since an agent answers one after the other.
#[derive(Debug)]
pub struct InFlight(Page);

impl InFlight {
    /// A record of nothing.
    ///
    /// # Errors
    /// memfd_create(2)'s.
    pub fn new() -> io::Result<Self> {
        Page::new().map(Self)
    }

    /// A predecessor's.
    ///
    /// # Errors
    /// When the descriptor is none of ours.
    pub fn of(file: OwnedFd) -> io::Result<Self> {
        Page::of(file).map(Self)
    }

    /// What a store has to keep.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.0.file()
    }

    /// Receives one; it is in the record from the moment on in which the kernel takes it for received. `None` when there is none,
    /// because its caller was interrupted.
    ///
    /// # Errors
    /// When the descriptor is no notification descriptor.
    pub fn receive(&self, notify: BorrowedFd<'_>) -> io::Result<Option<Raw>> {
        match self.0.receive(notify) {
            Ok(()) => Ok(Some(self.0.notification())),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What was received and not answered, with what was decided about it.
    #[must_use]
    pub fn pending(&self) -> Option<(Raw, Option<Answer>)> {
        let notification = self.0.notification();
        (notification.id != 0).then(|| (notification, self.0.decided().map(answer)))
    }

    /// Writes down what is about to be answered.
    pub fn decide(&self, decided: Answer) {
        let (error, flags) = decided.words();
        self.0.decide(error, flags);
    }

    /// It is answered.
    pub fn clear(&self) {
        self.0.clear();
    }
}

fn answer((error, flags): (i32, u32)) -> Answer {
    match (error, flags) {
        (0, 0) => Answer::Done,
        (0, _) => Answer::Continue,
        (error, _) => Answer::Failed(Errno::from_raw(error.saturating_neg())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_successor_reads_what_its_predecessor_has_written() {
        let record = InFlight::new().unwrap();
        assert_eq!(record.pending(), None);
        for decided in [Answer::Continue, Answer::Done, Answer::Failed(Errno::ENOTCONN)] {
            let (error, flags) = decided.words();
            assert_eq!(answer((error, flags)), decided);
        }
        let successor = InFlight::of(record.file().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(successor.pending(), None);
    }

    #[test]
    fn another_file_is_no_record() {
        let file = std::fs::File::open("/dev/null").unwrap();
        InFlight::of(file.into()).unwrap_err();
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let short = nix::sys::memfd::memfd_create(c"short", flags).unwrap();
        InFlight::of(short).unwrap_err();
        let unmarked = nix::sys::memfd::memfd_create(c"unmarked", flags).unwrap();
        nix::unistd::ftruncate(unmarked.as_fd(), 4096).unwrap();
        InFlight::of(unmarked).unwrap_err();
    }
}
