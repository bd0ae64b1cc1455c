//! Whether this kernel can have the kernel relay (it cannot where it answers FIONREAD wrongly), noted until the next boot: to find
//! that out takes the verifier and a test, which are more processor time than all the rest of a wake. One forwarder finds it out;
//! those that are started meanwhile wait for its note, since thirty that are woken at once would take thirty times as much.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bro_relay::read_bounded::{self, Link};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::control_socket;

/// The longest note that is read.
const LONGEST: u64 = 1024;

/// How long another forwarder's look is waited for: longer than the self-test may take. Meanwhile clients are served by splice.
const PATIENCE: Duration = Duration::from_secs(15);

/// The pauses between two looks for the note, each twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(320);

/// What is known of this kernel.
#[derive(Debug)]
pub enum Knowledge {
    /// It answers FIONREAD with 0 for hooked sockets.
    Lies,
    /// It answers rightly.
    Right,
    /// Nothing yet, and this process is the one to find out.
    Looking(Looker),
    /// Nothing, and it cannot be noted, or the process that was to find out takes too long.
    Unknown,
}

/// The right to find it out, alone; given back when it is dropped, or with the process.
#[derive(Debug)]
pub struct Looker {
    note: PathBuf,
    _alone: Flock<File>,
}

impl Looker {
    /// Notes what was found. A note that cannot be written costs later forwarders time.
    pub fn found(self, lies: bool) {
        tracing::info!(
            "tried whether this kernel can have the kernel relay, for all forwarders until the next boot"
        );
        let write = || std::fs::write(&self.note, text(lies).ok_or(io::ErrorKind::Unsupported)?);
        if let Err(error) = write() {
            tracing::debug!(%error, "the next forwarder tests the kernel relay again");
        }
    }
}

/// The note. It says which kernel it is about, and which bro has tried it: the folder is gone with a reboot, but an image may have
/// brought one along.
fn text(lies: bool) -> Option<String> {
    let name = nix::sys::utsname::uname().ok()?;
    let (release, version) = (name.release().to_string_lossy(), name.version().to_string_lossy());
    let how = if lies { "wrongly" } else { "rightly" };
    Some(format!("{release} {version} answers {how}, as seen by bro {}", env!("CARGO_PKG_VERSION")))
}

fn noted(note: &Path) -> Option<bool> {
    let noted = read_bounded::read(note, LONGEST, Link::Refuse).ok()?;
    [true, false].into_iter().find(|lies| text(*lies).as_ref() == Some(&noted))
}

/// What is known of this kernel. A process that `may_look` waits while another one finds out, and not for ever.
#[must_use]
pub fn knowledge(may_look: bool) -> Knowledge {
    of_note(&control_socket::base_directory().join("fionread"), may_look, PATIENCE)
}

fn of_note(note: &Path, may_look: bool, patience: Duration) -> Knowledge {
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        match noted(note) {
            Some(true) => return Knowledge::Lies,
            Some(false) => return Knowledge::Right,
            None if !may_look => return Knowledge::Unknown,
            None => {}
        }
        match alone(note) {
            // It may have been noted between the two.
            Ok(Some(lock)) if noted(note).is_none() => {
                return Knowledge::Looking(Looker { note: note.into(), _alone: lock });
            }
            Ok(Some(_)) => {}
            Ok(None) if began.elapsed() >= patience => return Knowledge::Unknown,
            Ok(None) => {
                std::thread::sleep(pause);
                pause = LONGEST_PAUSE.min(2 * pause);
            }
            Err(error) => {
                tracing::debug!(%error, "no note can be made of whether this kernel can have the kernel relay");
                return Knowledge::Unknown;
            }
        }
    }
}

/// The lock beside the note; none while another process has it.
fn alone(note: &Path) -> io::Result<Option<Flock<File>>> {
    if let Some(folder) = note.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Whatever other users can open, they can lock.
    let path = note.with_extension("lock");
    let file = File::options().create(true).write(true).truncate(false).mode(0o600).open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            Self(nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-note-XXXXXX")).unwrap())
        }

        fn note(&self) -> PathBuf {
            // The folder is made as well.
            self.0.join("bro/fionread")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    fn looker(note: &Path) -> Looker {
        match of_note(note, true, PATIENCE) {
            Knowledge::Looking(looker) => looker,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn of_many_at_once_one_looks_and_all_know() {
        for lies in [true, false] {
            let folder = Folder::new();
            let (looks, start) = (AtomicUsize::new(0), Barrier::new(16));
            let one = || {
                start.wait();
                match of_note(&folder.note(), true, PATIENCE) {
                    Knowledge::Looking(looker) => {
                        looks.fetch_add(1, Relaxed);
                        // Long enough for the others to have asked.
                        std::thread::sleep(FIRST_PAUSE);
                        looker.found(lies);
                        lies
                    }
                    Knowledge::Lies => true,
                    Knowledge::Right => false,
                    Knowledge::Unknown => panic!("it is not known"),
                }
            };
            std::thread::scope(|scope| {
                let all: Vec<_> = (0..16).map(|_| scope.spawn(one)).collect();
                assert!(all.into_iter().all(|one| one.join().unwrap() == lies));
            });
            assert_eq!(looks.into_inner(), 1);
        }
    }

    #[test]
    fn one_that_ends_without_a_note_is_followed_by_another() {
        let folder = Folder::new();
        drop(looker(&folder.note()));
        looker(&folder.note()).found(true);
        assert!(matches!(of_note(&folder.note(), true, PATIENCE), Knowledge::Lies));
    }

    #[test]
    fn one_that_does_not_end_is_not_waited_for_for_ever() {
        let folder = Folder::new();
        let _looking = looker(&folder.note());
        let waited = of_note(&folder.note(), true, 2 * FIRST_PAUSE);
        assert!(matches!(waited, Knowledge::Unknown), "{waited:?}");
        // One that could not look has nothing to wait for.
        assert!(matches!(of_note(&folder.note(), false, PATIENCE), Knowledge::Unknown));
    }

    #[test]
    fn another_kernels_note_is_none() {
        let folder = Folder::new();
        looker(&folder.note()).found(true);
        std::fs::write(folder.note(), "5.6.0 answers rightly, as seen by bro 0.0.0").unwrap();
        drop(looker(&folder.note()));
    }

    #[test]
    fn where_nothing_can_be_noted_each_looks_at_once() {
        let folder = Folder::new();
        std::fs::write(folder.0.join("bro"), "a file").unwrap();
        assert!(matches!(of_note(&folder.note(), true, PATIENCE), Knowledge::Unknown));
    }
}
