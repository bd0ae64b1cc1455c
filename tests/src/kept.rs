//! What takes long to make and is kept in the target directory, under a hash of the recipe that it was made by.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// Longer than anything takes to make: a test that waits for this lock waits for another test binary that makes it.
const LOCK_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// A folder for things of one kind: `target/KIND`, or where an environment variable says.
#[derive(Debug)]
pub(crate) struct Kept(PathBuf);

impl Kept {
    /// The folder for `kind`, which the environment variable `moved` moves elsewhere.
    pub(crate) fn new(kind: &str, moved: &str) -> Result<Self> {
        let folder = match std::env::var_os(moved) {
            Some(elsewhere) => elsewhere.into(),
            // From the test binary's own place: target/PROFILE/deps/TEST.
            None => {
                let test = std::env::current_exe()?;
                let target = test.ancestors().nth(3);
                target.context("this test does not run from a target directory")?.join(kind)
            }
        };
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self(folder))
    }

    /// What was made by the recipe with this hash, and a shared lock to hold while it is used. When there is none yet, `make` makes it
    /// at the path that it is given, and what other recipes have made goes.
    pub(crate) fn made(
        &self,
        recipe: u64,
        make: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<(PathBuf, File)> {
        let recipe = format!("{recipe:016x}");
        let place = self.0.join(&recipe);
        // One makes it, the others wait here and find it made.
        let making = lock_file(&self.0, "build")?;
        lock(&making, File::try_lock)?;
        if !place.is_dir() {
            self.remove_others(&recipe);
            let fresh = self.0.join("fresh");
            remove(&fresh)?;
            make(&self.0, &fresh)?;
            // The rename is what makes it whole: what was cut short never carries the recipe's name.
            std::fs::rename(&fresh, &place)?;
        }
        let in_use = lock_file(&self.0, &recipe)?;
        lock(&in_use, File::try_lock_shared)?;
        Ok((place, in_use))
    }

    /// What older recipes have made goes, except what is still in use.
    fn remove_others(&self, recipe: &str) {
        for entry in std::fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_one = name.len() == recipe.len() && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            if is_one && name != recipe && lock_file(&self.0, &name).is_ok_and(|lock| lock.try_lock().is_ok())
            {
                remove(&entry.path()).ok();
            }
        }
    }
}

/// A file in `folder` to be locked.
pub(crate) fn lock_file(folder: &Path, name: &str) -> Result<File> {
    let path = folder.join(format!("{name}.lock"));
    File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Takes a lock, and waits until it is free.
pub(crate) fn lock(file: &File, take: fn(&File) -> Result<(), TryLockError>) -> Result<()> {
    let deadline = Instant::now() + LOCK_DEADLINE;
    loop {
        match take(file) {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {
                ensure!(Instant::now() < deadline, "another test has been making this for too long");
                std::thread::sleep(Duration::from_millis(200));
            }
            Err(TryLockError::Error(error)) => return Err(error).context("cannot lock what is kept"),
        }
    }
}

/// Removes a folder with all that is in it, never following a mount that lies there.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    let status = Command::new("rm").args(["-rf", "--one-file-system"]).arg(folder).status()?;
    ensure!(status.success(), "cannot remove {}", folder.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    fn make(_: &Path, fresh: &Path) -> Result<()> {
        Ok(std::fs::create_dir(fresh)?)
    }

    fn make_half(cache: &Path, fresh: &Path) -> Result<()> {
        make(cache, fresh)?;
        anyhow::bail!("cut short")
    }

    fn make_again(_: &Path, _: &Path) -> Result<()> {
        anyhow::bail!("made twice")
    }

    #[test]
    fn a_recipe_is_made_once_and_what_nothing_uses_goes_with_the_next_one() {
        let scratch = Scratch::new().unwrap();
        let kept = Kept(scratch.path().to_owned());
        assert!(kept.made(1, make_half).is_err());
        let (first, lock) = kept.made(1, make).unwrap();
        drop(kept.made(1, make_again).unwrap());
        let (second, _) = kept.made(2, make).unwrap();
        assert!(first.is_dir() && second.is_dir(), "the first is in use");
        drop(lock);
        let (third, _lock) = kept.made(3, make).unwrap();
        assert!(!first.exists() && !second.exists() && third.is_dir());
    }
}
