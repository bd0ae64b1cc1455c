//! All or nothing: writes and removes files so that either every one of them has changed, or none.
//!
//! New text first goes into files beside the old ones; when all of it is on the disk, each takes its place by rename(2). The old
//! file is kept beside it until the whole change stands, so that going back needs no room on the disk.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::exit::Failure;
use crate::installed::{self, SECTION};
use crate::systemd::unit_file::MARKER;
use crate::units;

/// How long to wait for another `bro activate`: it may wait for a service that finishes its connections.
const LOCK: Duration = Duration::from_secs(180);

/// How a file is to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub path: PathBuf,
    /// Its new text; none to remove it.
    pub text: Option<String>,
}

/// Which program wrote a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Provenance {
    /// There is none.
    Missing,
    /// `bro activate` wrote it; its text.
    Ours(String),
    /// It is not bro's, or no regular file.
    Theirs,
}

/// Looks at the file, and reads it if it is bro's.
pub(super) fn provenance(path: &Path) -> anyhow::Result<Provenance> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Provenance::Missing),
        Err(error) => return Err(failed("look at", path, &error)),
        Ok(metadata) if !metadata.is_file() => return Ok(Provenance::Theirs),
        Ok(_) => {}
    }
    let text = std::fs::read(path).map_err(|error| failed("read", path, &error))?;
    Ok(match String::from_utf8(text) {
        Ok(text) if text.starts_with(MARKER) || units::wrote_profile(&text).is_some() => {
            Provenance::Ours(text)
        }
        _ => Provenance::Theirs,
    })
}

/// Makes every other `bro activate` of this scope wait: flock(2) on the directory itself, so that no file is left behind.
#[derive(Debug)]
pub(super) struct DirectoryLock {
    _directory: Flock<File>,
}

impl DirectoryLock {
    /// Takes the lock of a directory; `missing` is called to make one where there is none.
    pub async fn take(
        directory: &Path,
        mut missing: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let deadline = Instant::now() + LOCK;
        let mut tries = 0;
        loop {
            let file = match File::open(directory) {
                // The directory may vanish again at once; but a link to nowhere is never made a directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 100 => {
                    tries += 1;
                    missing()?;
                    continue;
                }
                file => file.map_err(|error| failed("open", directory, &error))?,
            };
            let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
            let own = file.metadata().map(identity).map_err(|error| failed("look at", directory, &error))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Its last holder may have removed the directory with the last file: then this lock excludes no other process.
                Ok(locked) if std::fs::metadata(directory).is_ok_and(|now| identity(now) == own) => {
                    return Ok(Self { _directory: locked });
                }
                Ok(_removed) => {}
                Err((_, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                    bail!("another bro activate has been at work for {LOCK:?}; try again when it has ended")
                }
                Err((_, error)) => return Err(failed("lock", directory, &error.into())),
            }
        }
    }
}

/// What is missing of a directory and its parents, in the order in which it would be made.
pub(super) fn missing(directory: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> =
        directory.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
    missing.reverse();
    missing
}

/// Directories that were made; removed again where they are empty, unless kept.
#[derive(Debug, Default)]
pub(super) struct Made {
    paths: Vec<PathBuf>,
    kept: bool,
    /// Every user is to see what lies there, whatever the umask.
    for_all: bool,
}

impl Made {
    /// Users and their service managers also read the system's directories. A user's own are that user's, and may be hidden.
    pub fn for_all(for_all: bool) -> Self {
        Self { for_all, paths: Vec::new(), kept: false }
    }

    /// Makes `directory` and what is missing above it.
    pub fn make(&mut self, directory: &Path) -> anyhow::Result<()> {
        for path in missing(directory) {
            match DirBuilder::new().mode(0o755).create(&path) {
                Ok(()) => {
                    if self.for_all {
                        std::fs::set_permissions(&path, Permissions::from_mode(0o755))
                            .map_err(|error| failed("open to all", &path, &error))?;
                    }
                    if !self.paths.contains(&path) {
                        self.paths.push(path);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // The directory above it has been removed since: the caller will ask again.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(failed("make the directory", &path, &error)),
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
                // Another process may have put something into it meanwhile.
                std::fs::remove_dir(path).ok();
            }
        }
    }
}

fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Neither systemd nor Podman reads files with this dot or this ending.
    path.with_file_name(format!(".{name}.bro-{what}"))
}

/// The files of `name` that a killed run was changing: the old ones are still kept beside them. Looks beside `paths`, and in
/// `directory` also beside files that are gone. Files that had not taken their place yet are removed.
pub(super) fn unfinished(
    name: &str,
    directory: &Path,
    paths: impl IntoIterator<Item = PathBuf>,
) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for path in paths {
        std::fs::remove_file(beside(&path, "new")).ok();
        if std::fs::symlink_metadata(beside(&path, "old")).is_ok() && !found.contains(&path) {
            found.push(path);
        }
    }
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let (file, hidden) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let Some(hidden) = hidden.strip_prefix('.') else { continue };
        if hidden.ends_with(".bro-new") {
            std::fs::remove_file(file).ok();
        } else if let Some(path) = hidden.strip_suffix(".bro-old").map(|name| directory.join(name))
            && installed::read_ours(&file).is_some_and(|file| file.value(SECTION, "Name") == Some(name))
            && !found.contains(&path)
        {
            found.push(path);
        }
    }
    found
}

/// A later run has finished them.
pub(super) fn finished(paths: &[PathBuf]) {
    for path in paths {
        std::fs::remove_file(beside(path, "old")).ok();
    }
}

/// Changes that have taken place, and can still be undone.
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
        let mut prepared = MadeReady::default();
        for Change { path, text } in changes {
            // Left by a bro that was killed; no other is at work, since this one holds the lock.
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
            // The names have to survive a power failure. Not every file system can say.
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

    /// The changes stand.
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
struct MadeReady(Vec<PathBuf>);

impl Drop for MadeReady {
    fn drop(&mut self) {
        for path in &self.0 {
            // Gone already if it took its place.
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
    // Whatever the umask: a user's `bro status` reads the system's files, and the generator of a user's manager reads drop-ins.
    file.set_permissions(Permissions::from_mode(0o644))?;
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
        // A directory where a file has to go: link(2) refuses it, after “a” was replaced.
        std::fs::create_dir(folder.0.join("z")).unwrap();
        let changes = [folder.change("a", Some("new a")), folder.change("z", Some("new z"))];
        Changed::make(&changes).unwrap_err();
        assert_eq!(folder.listing(), named(&[("a", "old a"), ("z", "")]));
    }

    #[tokio::test]
    async fn a_lock_of_a_directory_that_was_removed_is_none() {
        let folder = Folder::new();
        let units = folder.0.join("units");
        std::fs::create_dir(&units).unwrap();
        let first = DirectoryLock::take(&units, || unreachable!()).await.unwrap();
        let waiting =
            async { DirectoryLock::take(&units, || Ok(std::fs::create_dir(&units)?)).await.unwrap() };
        let removing = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            std::fs::remove_dir(&units).unwrap();
            drop(first);
        };
        let (second, ()) = tokio::join!(waiting, removing);
        // It is the lock of the present directory.
        let own = second._directory.metadata().unwrap().ino();
        assert_eq!(std::fs::metadata(&units).unwrap().ino(), own);
        let removed = folder.0.join("never");
        let error = DirectoryLock::take(&removed, || bail!("it is gone")).await.unwrap_err();
        assert_eq!(error.to_string(), "it is gone");
    }

    #[test]
    fn what_a_killed_run_was_at_is_found() {
        let folder = Folder::new();
        let write = |name: &str, text: &str| std::fs::write(folder.0.join(name), text).unwrap();
        let ours = format!("{MARKER} for x\n[X-Bro]\nName=web\n");
        write("web.socket", "new");
        write(".web.socket.bro-old", &ours);
        write(".web-gone.socket.bro-old", &ours);
        write(".other.socket.bro-old", &ours.replace("web", "other"));
        write(".web.socket.bro-new", "half");
        let mut found = unfinished("web", &folder.0, [folder.0.join("web.socket"), folder.0.join("fine")]);
        found.sort();
        assert_eq!(found, [folder.0.join("web-gone.socket"), folder.0.join("web.socket")]);
        finished(&found);
        let left: Vec<String> = folder.listing().into_iter().map(|(name, _)| name).collect();
        assert_eq!(left, [".other.socket.bro-old", "web.socket"]);
    }

    #[test]
    fn tells_its_own_files_from_others() {
        let folder = Folder::new();
        let ours = format!("{MARKER} for x\n");
        std::fs::write(folder.0.join("ours"), &ours).unwrap();
        std::fs::write(folder.0.join("theirs"), "[Socket]\n").unwrap();
        std::os::unix::fs::symlink("ours", folder.0.join("link")).unwrap();
        assert_eq!(provenance(&folder.0.join("ours")).unwrap(), Provenance::Ours(ours));
        assert_eq!(provenance(&folder.0.join("theirs")).unwrap(), Provenance::Theirs);
        assert_eq!(provenance(&folder.0.join("link")).unwrap(), Provenance::Theirs);
        assert_eq!(provenance(&folder.0.join("none")).unwrap(), Provenance::Missing);
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
