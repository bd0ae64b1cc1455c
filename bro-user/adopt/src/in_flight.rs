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
use serde::{Deserialize, Serialize};

use crate::notification::{Answer, Raw};
use crate::options::Before;
use crate::sys::Page;

/// A listener that is as a service wants it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Its SO_COOKIE.
    pub cookie: u64,
    /// A service has it, and not only its options are set.
    pub held: bool,
    /// O_NONBLOCK, as the service has it: systemd clears it when it passes the socket to a successor.
    pub nonblocking: bool,
    /// As it was.
    pub before: Before,
}

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

    /// Writes down what has to be put back on listeners, and whether a service has them.
    pub fn note(&mut self, notes: &[Note]) {
        // Of types that all have a form in JSON.
        let text = serde_json::to_vec(notes).unwrap_or_default();
        if !self.0.note(&text) {
            tracing::warn!(
                "there is no room to note the listeners' options: after a crash they stay as the service has set them"
            );
        }
    }

    /// What a predecessor has noted.
    #[must_use]
    pub fn notes(&self) -> Vec<Note> {
        serde_json::from_slice(&self.0.noted()).unwrap_or_default()
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
        let mut record = InFlight::new().unwrap();
        assert_eq!(record.pending(), None);
        for decided in [Answer::Continue, Answer::Done, Answer::Failed(Errno::ENOTCONN)] {
            let (error, flags) = decided.words();
            assert_eq!(answer((error, flags)), decided);
        }
        let successor = InFlight::of(record.file().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(successor.pending(), None);
        assert_eq!(successor.notes(), []);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let before = Before::of(listener.as_fd(), crate::family::Family::V4).unwrap();
        let notes = |count| -> Vec<Note> {
            let note = |cookie| Note { cookie, held: cookie > 1, nonblocking: true, before: before.clone() };
            (0..count).map(note).collect()
        };
        for count in [3, 1, 0, 2] {
            record.note(&notes(count));
            assert_eq!(successor.notes(), notes(count));
        }
        // What there is no room for leaves what was there.
        record.note(&notes(1000));
        assert_eq!(successor.notes(), notes(2));
    }

    #[test]
    fn another_file_is_no_record() {
        let file = std::fs::File::open("/dev/null").unwrap();
        InFlight::of(file.into()).unwrap_err();
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let short = nix::sys::memfd::memfd_create(c"short", flags).unwrap();
        InFlight::of(short).unwrap_err();
        let unmarked = nix::sys::memfd::memfd_create(c"unmarked", flags).unwrap();
        nix::unistd::ftruncate(unmarked.as_fd(), 256 * 1024).unwrap();
        InFlight::of(unmarked).unwrap_err();
    }
}
