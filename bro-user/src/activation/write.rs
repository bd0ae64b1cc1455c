//! All or nothing: writes and removes files so that either every one of them has changed, or none.
//!
//! New text goes into files beside the old ones first; only when all of it is on the disk does each take its place, by rename(2).
//! What was there is kept beside it until the whole change stands, so that going back needs no room on the disk.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::activated::MARKER;
use crate::exit::Failure;

/// How long to wait for another `bro activate`: it may wait for a service that finishes its connections.
const LOCK: Duration = Duration::from_secs(180);

/// What is to become of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub path: PathBuf,
    /// Its new text; none to remove it.
    pub text: Option<String>,
}

/// Whose file a path is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is none.
    Nobody,
    /// `bro activate` wrote it; its text.
    Ours(String),
    /// Somebody else's, or no regular file.
    Theirs,
}

/// Looks whose file it is.
pub(super) fn owner(path: &Path) -> anyhow::Result<Owner> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Owner::Nobody),
        Err(error) => return Err(failed("look at", path, &error)),
        Ok(metadata) if !metadata.is_file() => return Ok(Owner::Theirs),
        Ok(_) => {}
    }
    let text = std::fs::read(path).map_err(|error| failed("read", path, &error))?;
    Ok(match String::from_utf8(text) {
        Ok(text) if text.starts_with(MARKER) => Owner::Ours(text),
        _ => Owner::Theirs,
    })
}

/// Keeps every other `bro activate` of this scope waiting: flock(2) on the directory itself, so that no file is left behind.
#[derive(Debug)]
pub(super) struct Lock {
    _directory: Flock<File>,
}

impl Lock {
    /// Takes the lock of an existing directory.
    pub fn take(directory: &Path) -> anyhow::Result<Self> {
        let deadline = Instant::now() + LOCK;
        let mut file = File::open(directory).map_err(|error| failed("open", directory, &error))?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(directory) => return Ok(Self { _directory: directory }),
                Err((back, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    file = back;
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                    bail!("another bro activate has been at work for {LOCK:?}; try again when it has ended")
                }
                Err((_, error)) => return Err(failed("lock", directory, &error.into())),
            }
        }
    }
}

/// Directories that were made; removed again, as far as they are empty, unless kept.
#[derive(Debug, Default)]
pub(super) struct Made {
    paths: Vec<PathBuf>,
    kept: bool,
}

impl Made {
    /// Makes `directory` and what is missing above it.
    pub fn make(&mut self, directory: &Path) -> anyhow::Result<()> {
        let mut missing: Vec<&Path> = directory.ancestors().take_while(|path| !path.exists()).collect();
        missing.reverse();
        for path in missing {
            match DirBuilder::new().mode(0o755).create(path) {
                Ok(()) => self.paths.push(path.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed("make the directory", path, &error)),
            }
        }
        Ok(())
    }

    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if !self.kept {
            for path in self.paths.iter().rev() {
                // Somebody may have put something into it meanwhile.
                std::fs::remove_dir(path).ok();
            }
        }
    }
}

fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Neither systemd nor Podman reads files that begin with a dot or end so.
    path.with_file_name(format!(".{name}.bro-{what}"))
}

/// Changes that have taken place, and can still be taken back.
#[derive(Debug)]
#[must_use = "dropping it takes the changes back"]
pub(super) struct Changed {
    /// Each path, and whether there was a file before.
    done: Vec<(PathBuf, bool)>,
    kept: bool,
}

impl Changed {
    /// Makes all the changes, or none. Directories must be there.
    pub fn make(changes: &[Change]) -> anyhow::Result<Self> {
        let mut prepared = Prepared::default();
        for Change { path, text } in changes {
            // Left by one that was killed; nobody else is at work, that is what the lock is for.
            std::fs::remove_file(beside(path, "old")).ok();
            if let Some(text) = text {
                let new = beside(path, "new");
                prepared.0.push(new.clone());
                write_new(&new, text).map_err(|error| failed("write", path, &error))?;
            }
        }
        let mut changed = Self { done: Vec::new(), kept: false };
        for change in changes {
            changed.one(change).map_err(|error| failed("replace", &change.path, &error))?;
        }
        for directory in changes.iter().filter_map(|change| change.path.parent()) {
            // Where the names are to be after a power failure. Not every file system can say.
            File::open(directory).and_then(|directory| directory.sync_all()).ok();
        }
        Ok(changed)
    }

    fn one(&mut self, Change { path, text }: &Change) -> io::Result<()> {
        let old = beside(path, "old");
        let there = match std::fs::hard_link(path, &old) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        self.done.push((path.clone(), there));
        match text {
            Some(_) => std::fs::rename(beside(path, "new"), path),
            None if there => std::fs::remove_file(path),
            None => Ok(()),
        }
    }

    /// They stand.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        for (path, there) in self.done.iter().rev() {
            let old = beside(path, "old");
            if self.kept {
                std::fs::remove_file(&old).ok();
            } else if *there {
                std::fs::rename(&old, path).ok();
                // rename(2) of two names of one file does nothing and leaves both.
                std::fs::remove_file(&old).ok();
            } else {
                std::fs::remove_file(path).ok();
            }
        }
    }
}

/// Files that wait to take their places.
#[derive(Debug, Default)]
struct Prepared(Vec<PathBuf>);

impl Drop for Prepared {
    fn drop(&mut self) {
        for path in &self.0 {
            // Gone already where it took its place.
            std::fs::remove_file(path).ok();
        }
    }
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    std::fs::remove_file(path).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn failed(verb: &str, path: &Path, error: &io::Error) -> anyhow::Error {
    let text = format!("cannot {verb} {}: {error}; nothing was changed", path.display());
    match error.kind() {
        io::ErrorKind::PermissionDenied => Failure::NotPermitted(text).into(),
        _ => anyhow::anyhow!(text),
    }
}

/// Removes directories that `bro activate` made, as far as they are empty now.
pub(super) fn remove_directories(paths: &[PathBuf]) -> anyhow::Result<()> {
    let mut paths: Vec<&PathBuf> = paths.iter().collect();
    paths.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for path in paths {
        match std::fs::remove_dir(path) {
            Err(error)
                if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) =>
            {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            Self(nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-write-XXXXXX")).unwrap())
        }

        fn change(&self, name: &str, text: Option<&str>) -> Change {
            Change { path: self.0.join(name), text: text.map(str::to_owned) }
        }

        /// Names and contents.
        fn listing(&self) -> Vec<(String, String)> {
            let entries = std::fs::read_dir(&self.0).unwrap().map(Result::unwrap);
            let mut all: Vec<_> = entries
                .map(|entry| {
                    let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                    (entry.file_name().into_string().unwrap(), text)
                })
                .collect();
            all.sort();
            all
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    fn named(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn keeps_or_takes_back() {
        let folder = Folder::new();
        std::fs::write(folder.0.join("a"), "old a").unwrap();
        std::fs::write(folder.0.join("b"), "old b").unwrap();
        let changes =
            [folder.change("a", Some("new a")), folder.change("b", None), folder.change("c", Some("new c"))];
        drop(Changed::make(&changes).unwrap());
        assert_eq!(folder.listing(), named(&[("a", "old a"), ("b", "old b")]));
        Changed::make(&changes).unwrap().keep();
        assert_eq!(folder.listing(), named(&[("a", "new a"), ("c", "new c")]));
    }

    #[test]
    fn a_change_that_fails_in_the_middle_leaves_everything_as_it_was() {
        let folder = Folder::new();
        std::fs::write(folder.0.join("a"), "old a").unwrap();
        // A directory where a file has to go: link(2) refuses it, after “a” has been replaced.
        std::fs::create_dir(folder.0.join("z")).unwrap();
        let changes = [folder.change("a", Some("new a")), folder.change("z", Some("new z"))];
        Changed::make(&changes).unwrap_err();
        assert_eq!(folder.listing(), named(&[("a", "old a"), ("z", "")]));
    }

    #[test]
    fn tells_its_own_files_from_others() {
        let folder = Folder::new();
        let ours = format!("{MARKER} for x\n");
        std::fs::write(folder.0.join("ours"), &ours).unwrap();
        std::fs::write(folder.0.join("theirs"), "[Socket]\n").unwrap();
        std::os::unix::fs::symlink("ours", folder.0.join("link")).unwrap();
        assert_eq!(owner(&folder.0.join("ours")).unwrap(), Owner::Ours(ours));
        assert_eq!(owner(&folder.0.join("theirs")).unwrap(), Owner::Theirs);
        assert_eq!(owner(&folder.0.join("link")).unwrap(), Owner::Theirs);
        assert_eq!(owner(&folder.0.join("none")).unwrap(), Owner::Nobody);
    }

    #[test]
    fn directories_go_unless_they_are_kept() {
        let folder = Folder::new();
        let deep = folder.0.join("x/y");
        let mut made = Made::default();
        made.make(&deep).unwrap();
        assert_eq!(made.paths(), [folder.0.join("x"), deep.clone()]);
        drop(made);
        assert!(!folder.0.join("x").exists());
        let mut made = Made::default();
        made.make(&deep).unwrap();
        made.keep();
        remove_directories(made.paths()).unwrap();
        assert!(!folder.0.join("x").exists());
    }
}
