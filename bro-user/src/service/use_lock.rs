//! The owner of a running unit: which run of it is a forwarder's (noted here so that a forwarder that was itself restarted
//! meanwhile still puts it to sleep; `runs.rs` decides), and which forwarders use it now (so that the last of them puts it to
//! sleep, and no other). Two small files beside the status sockets: gone with a reboot, as the container is, or with the service's
//! activation.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

fn file(unit: &str) -> PathBuf {
    crate::control_socket::base_directory().join(format!("started-{unit}"))
}

/// Notes that this run of the unit (its InvocationID, systemd.exec(5)) was started by a forwarder.
pub fn remember(unit: &str, invocation: &str) {
    let path = file(unit);
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&path, invocation));
    if let Err(error) = written {
        tracing::debug!(%error, "a forwarder that takes over from this one will not stop {unit}");
    }
}

/// The run of the unit that a forwarder has noted last.
#[must_use]
pub fn noted(unit: &str) -> Option<String> {
    std::fs::read_to_string(file(unit)).ok().filter(|noted| !noted.is_empty())
}

/// The unit has been stopped, or another process has started it since.
pub fn forget(unit: &str) {
    std::fs::remove_file(file(unit)).ok();
}

/// Removes both files of a unit from their directory, unless another forwarder uses the unit. Its present run then has no owner.
pub(crate) fn clear(directory: &Path, unit: &str) {
    let lock = directory.join(format!("use-{unit}"));
    // A request for the lock would make the file.
    let alone = lock.exists().then(|| Use::alone_in(&lock, None));
    if let Some(Ok(UnitLock::Taken)) = alone {
        return;
    }
    std::fs::remove_file(directory.join(format!("started-{unit}"))).ok();
    std::fs::remove_file(&lock).ok();
}

/// A forwarder's use of a unit: a lock (flock(2)) that all its users share. The kernel takes it back from a process that dies.
#[derive(Debug)]
pub struct Use(#[expect(dead_code, reason = "held, never looked at")] Flock<File>);

/// The result of a request for a lock.
#[derive(Debug)]
pub enum UnitLock {
    /// The lock.
    Had(Use),
    /// Another forwarder's lock is in the way.
    Taken,
}

impl Use {
    /// Uses the unit, unless another forwarder is just stopping it.
    ///
    /// # Errors
    /// When there can be no such file.
    pub fn begin(unit: &str) -> io::Result<UnitLock> {
        Self::lock(&Self::file(unit), FlockArg::LockSharedNonblock)
    }

    /// Makes this use the only one, if it is; no other forwarder then begins to use the unit until this is dropped. Ends `mine`.
    ///
    /// # Errors
    /// When there can be no such file.
    pub fn alone(unit: &str, mine: Option<Self>) -> io::Result<UnitLock> {
        Self::alone_in(&Self::file(unit), mine)
    }

    fn alone_in(path: &Path, mine: Option<Self>) -> io::Result<UnitLock> {
        // Of two that ask at the same time one gets it: neither asks for the exclusive lock with the shared one in hand.
        drop(mine);
        Self::lock(path, FlockArg::LockExclusiveNonblock)
    }

    fn file(unit: &str) -> PathBuf {
        crate::control_socket::base_directory().join(format!("use-{unit}"))
    }

    fn lock(path: &Path, how: FlockArg) -> io::Result<UnitLock> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        loop {
            let file = File::options().create(true).write(true).truncate(false).open(path)?;
            let lock = match Flock::lock(file, how) {
                Ok(lock) => lock,
                Err((_, Errno::EWOULDBLOCK)) => return Ok(UnitLock::Taken),
                Err((_, errno)) => return Err(errno.into()),
            };
            // A lock on a file that was removed meanwhile protects nothing.
            let (locked, named) = (lock.metadata()?, std::fs::metadata(path));
            if named.is_ok_and(|named| (named.dev(), named.ino()) == (locked.dev(), locked.ino())) {
                return Ok(UnitLock::Had(Self(lock)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(path: &Path) -> Option<Use> {
        match Use::lock(path, FlockArg::LockSharedNonblock).unwrap() {
            UnitLock::Had(lock) => Some(lock),
            UnitLock::Taken => None,
        }
    }

    #[test]
    fn the_last_user_is_alone_and_keeps_others_out_meanwhile() {
        let path = std::env::temp_dir().join(format!("bro-use-{}", std::process::id()));
        let (first, second) = (shared(&path), shared(&path));
        assert!(first.is_some() && second.is_some());
        assert!(matches!(Use::alone_in(&path, first).unwrap(), UnitLock::Taken));
        // The first one's use is over by having asked.
        let UnitLock::Had(alone) = Use::alone_in(&path, second).unwrap() else { panic!("no other is there") };
        assert!(shared(&path).is_none(), "used while it is being stopped");
        drop(alone);
        assert!(shared(&path).is_some());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn nothing_is_left_of_a_unit_that_is_not_used() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-clear-XXXXXX")).unwrap();
        let files = || std::fs::read_dir(&folder).unwrap().count();
        clear(&folder, "web.service");
        assert_eq!(files(), 0, "asking has made a file");
        let held = shared(&folder.join("use-web.service"));
        std::fs::write(folder.join("started-web.service"), "1").unwrap();
        clear(&folder, "web.service");
        assert_eq!(files(), 2, "it is in use");
        drop(held);
        std::fs::write(folder.join("started-other.service"), "1").unwrap();
        clear(&folder, "web.service");
        assert_eq!(files(), 1, "another's stays");
        std::fs::remove_dir_all(folder).unwrap();
    }

    /// A process that opened the file before it was removed has no lock that another would not get.
    #[test]
    fn a_lock_is_one_of_the_file_that_is_there() {
        let path = std::env::temp_dir().join(format!("bro-use-again-{}", std::process::id()));
        let first = shared(&path);
        std::fs::remove_file(&path).unwrap();
        let second = shared(&path);
        assert!(first.is_some() && second.is_some());
        drop(first);
        assert!(matches!(Use::alone_in(&path, None).unwrap(), UnitLock::Taken), "the second's is not seen");
        std::fs::remove_file(&path).unwrap();
    }
}
