//! Whose a running unit is: which run of it is a forwarder's (noted here so that it is put to sleep again also by a forwarder that
//! was itself restarted meanwhile; `runs.rs` decides), and who uses it now (so that the last of several forwarders puts it to sleep, and no other).
//! Two small files beside the status sockets: gone with a reboot, as the container is.

use std::fs::File;
use std::io;
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

/// It has been stopped, or somebody else has started it since.
pub fn forget(unit: &str) {
    std::fs::remove_file(file(unit)).ok();
}

/// A forwarder's use of a unit: a lock (flock(2)) shared by all that use it. The kernel takes it back from one that dies.
#[derive(Debug)]
pub struct Use(#[expect(dead_code, reason = "held, never looked at")] Flock<File>);

/// What came of asking for a lock.
#[derive(Debug)]
pub enum Lock {
    /// Here it is.
    Had(Use),
    /// Somebody else's is in the way.
    Taken,
}

impl Use {
    /// Uses the unit, unless somebody is just stopping it.
    ///
    /// # Errors
    /// When there can be no such file.
    pub fn begin(unit: &str) -> io::Result<Lock> {
        Self::lock(&Self::file(unit), FlockArg::LockSharedNonblock)
    }

    /// Makes this use the only one, if it is; then nobody begins to use the unit until this is dropped. `mine` ends in any case.
    ///
    /// # Errors
    /// When there can be no such file.
    pub fn alone(unit: &str, mine: Option<Self>) -> io::Result<Lock> {
        Self::alone_in(&Self::file(unit), mine)
    }

    fn alone_in(path: &Path, mine: Option<Self>) -> io::Result<Lock> {
        // Of two who ask at the same time one gets it: nobody asks for the exclusive lock with the shared one in hand.
        drop(mine);
        Self::lock(path, FlockArg::LockExclusiveNonblock)
    }

    fn file(unit: &str) -> PathBuf {
        crate::control_socket::base_directory().join(format!("use-{unit}"))
    }

    fn lock(path: &Path, how: FlockArg) -> io::Result<Lock> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        // Never removed: a lock on a file that has another name by now protects nothing.
        let file = File::options().create(true).write(true).truncate(false).open(path)?;
        match Flock::lock(file, how) {
            Ok(lock) => Ok(Lock::Had(Self(lock))),
            Err((_, Errno::EWOULDBLOCK)) => Ok(Lock::Taken),
            Err((_, errno)) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(path: &Path) -> Option<Use> {
        match Use::lock(path, FlockArg::LockSharedNonblock).unwrap() {
            Lock::Had(lock) => Some(lock),
            Lock::Taken => None,
        }
    }

    #[test]
    fn the_last_user_is_alone_and_keeps_others_out_meanwhile() {
        let path = std::env::temp_dir().join(format!("bro-use-{}", std::process::id()));
        let (first, second) = (shared(&path), shared(&path));
        assert!(first.is_some() && second.is_some());
        assert!(matches!(Use::alone_in(&path, first).unwrap(), Lock::Taken));
        // The first one's use is over by having asked.
        let Lock::Had(alone) = Use::alone_in(&path, second).unwrap() else { panic!("nobody else is there") };
        assert!(shared(&path).is_none(), "used while it is being stopped");
        drop(alone);
        assert!(shared(&path).is_some());
        std::fs::remove_file(&path).unwrap();
    }
}
