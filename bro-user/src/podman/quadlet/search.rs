//! Where Podman looks for quadlets and their drop-ins, and in which order.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use bro_relay::read_bounded::{self, Link};

use super::QuadletKind;
use crate::exit::Failure;
use crate::paths;
use crate::run_as::RunAsUser;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::unit_file::{MARKER, UnitFile};

/// How many directories bro looks into below one of the quadlets' directories: its owner may link to anything.
const MOST_DIRECTORIES: usize = 10_000;

/// How many names bro looks at in them, and among drop-ins.
const MOST_NAMES: usize = 100_000;

/// The longest quadlet or drop-in that is read.
const LONGEST: u64 = 1 << 20;

/// The directories, the one that wins first.
pub(super) fn directories(
    scope: RuntimeScope,
    owner: Option<&RunAsUser>,
    root: Option<&Path>,
) -> anyhow::Result<Vec<PathBuf>> {
    let of_user = |uid: u32, runtime: PathBuf, config: PathBuf| {
        let users = Path::new("/etc/containers/systemd/users");
        let shared = Path::new("/usr/share/containers/systemd/users");
        vec![
            runtime.join("containers/systemd"),
            config.join("containers/systemd"),
            users.join(uid.to_string()),
            users.to_owned(),
            shared.join(uid.to_string()),
            shared.to_owned(),
        ]
    };
    let plain: Vec<PathBuf> = match (scope, owner) {
        (_, Some(owner)) => of_user(owner.uid, owner.runtime_directory(), owner.home.join(".config")),
        (RuntimeScope::System, None) => {
            ["/run", "/etc", "/usr/share"].map(|top| Path::new(top).join("containers/systemd")).into()
        }
        (RuntimeScope::User, None) => {
            let uid = nix::unistd::geteuid();
            of_user(uid.as_raw(), paths::runtime_directory(), paths::config_home()?)
        }
    };
    Ok(plain.into_iter().map(|path| paths::below(root, &path)).collect())
}

/// Where `bro activate` puts drop-ins for the quadlet: beside those that its owner would write.
///
/// # Errors
/// When there is no home directory.
pub fn drop_in_directory(
    quadlet: &super::Quadlet,
    scope: RuntimeScope,
    owner: Option<&RunAsUser>,
    root: Option<&Path>,
) -> anyhow::Result<PathBuf> {
    let directory = match (scope, owner) {
        // Not into the home directory: root's files are to lie where only root writes.
        (_, Some(owner)) => Path::new("/etc/containers/systemd/users").join(owner.uid.to_string()),
        (RuntimeScope::System, None) => PathBuf::from("/etc/containers/systemd"),
        (RuntimeScope::User, None) => paths::config_home()?.join("containers/systemd"),
    };
    Ok(paths::below(root, &directory).join(format!("{}.d", quadlet.file_name())))
}

/// The quadlet's file: that of the instance itself before its template's.
///
/// # Errors
/// When there is more to look at than a user could have meant.
pub(super) fn file(
    directories: &[PathBuf],
    stem: &str,
    kind: QuadletKind,
) -> anyhow::Result<Option<PathBuf>> {
    let mut names = vec![format!("{stem}.{}", kind.extension())];
    if let Some((prefix, _)) = stem.split_once('@') {
        names.push(format!("{prefix}@.{}", kind.extension()));
    }
    for name in &names {
        for directory in directories {
            if let Some(path) = Walk::new(directory, name).look(directory)? {
                return Ok(Some(path));
            }
        }
    }
    Ok(None)
}

/// The way through one of the directories and all below it, by links too, as Podman goes.
struct Walk<'a> {
    top: &'a Path,
    name: &'a str,
    /// Device and inode: links to what was seen lead nowhere new, and could make a ring.
    seen: HashSet<(u64, u64)>,
    names: usize,
}

impl<'a> Walk<'a> {
    fn new(top: &'a Path, name: &'a str) -> Self {
        Self { top, name, seen: HashSet::new(), names: 0 }
    }

    fn look(&mut self, directory: &Path) -> anyhow::Result<Option<PathBuf>> {
        let Ok(metadata) = std::fs::metadata(directory) else { return Ok(None) };
        if !self.seen.insert((metadata.dev(), metadata.ino())) {
            return Ok(None);
        }
        let path = directory.join(self.name);
        if path.is_file() {
            return Ok(Some(path));
        }
        let Ok(entries) = std::fs::read_dir(directory) else { return Ok(None) };
        let mut inside = Vec::new();
        for entry in entries.flatten() {
            self.names += 1;
            ensure!(
                self.seen.len() <= MOST_DIRECTORIES && self.names <= MOST_NAMES,
                "there is too much below {} to look for {} in all of it (more than {MOST_DIRECTORIES} directories, or \
                 {MOST_NAMES} names); keep only quadlets there",
                self.top.display(),
                self.name
            );
            let path = entry.path();
            // Files in users/ are not the system's, and those in users/UID are that user's alone; both have entries of their own.
            let is_users = directory == self.top && is_users(self.top, &path);
            if path.extension().is_none_or(|end| end != "d") && !is_users && path.is_dir() {
                inside.push(path);
            }
        }
        inside.sort();
        for path in inside {
            if let Some(found) = self.look(&path)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

fn is_users(top: &Path, path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if top.ends_with("containers/systemd") {
        name == "users"
    } else {
        top.ends_with("containers/systemd/users") && name.bytes().all(|byte| byte.is_ascii_digit())
    }
}

/// Reads the quadlet and its drop-ins, without those of `bro activate`: what it wrote is not the user's wish.
pub(super) fn read(
    directories: &[PathBuf],
    stem: &str,
    kind: QuadletKind,
    path: &Path,
) -> anyhow::Result<UnitFile> {
    let text = read_bounded::read(path, LONGEST, Link::Follow).map_err(|error| unreadable(path, &error))?;
    let mut file = UnitFile::parse(&text);
    // By file name; of two with the same name, the one in the first directory counts.
    let mut drop_ins: BTreeMap<std::ffi::OsString, PathBuf> = BTreeMap::new();
    let parent = path.parent().map(Path::to_owned);
    let mut names = 0;
    for directory in directories.iter().cloned().chain(parent) {
        for folder in drop_in_names(stem, kind) {
            let Ok(entries) = std::fs::read_dir(directory.join(folder)) else { continue };
            for entry in entries.flatten() {
                let is_conf = Path::new(&entry.file_name()).extension().is_some_and(|end| end == "conf");
                names += 1;
                ensure!(
                    names <= MOST_NAMES,
                    "there are more than {MOST_NAMES} drop-ins for {}",
                    path.display()
                );
                if is_conf && entry.path().is_file() {
                    drop_ins.entry(entry.file_name()).or_insert_with(|| entry.path());
                }
            }
        }
    }
    for path in drop_ins.values() {
        let text = read_bounded::read(path, LONGEST, Link::Follow)
            .with_context(|| format!("cannot read {:?}", path.display()))?;
        if !text.starts_with(MARKER) {
            file.read(&text);
        }
    }
    Ok(file)
}

/// `web-api.container.d`, `web-.container.d`, `container.d`, and a template's for its instances.
fn drop_in_names(stem: &str, kind: QuadletKind) -> Vec<String> {
    let end = kind.extension();
    let mut names = vec![format!("{stem}.{end}.d")];
    let mut prefix = stem;
    if let Some((template, _)) = stem.split_once('@') {
        names.push(format!("{template}@.{end}.d"));
        prefix = template;
    }
    while let Some(at) = prefix.trim_end_matches('-').rfind('-') {
        prefix = &prefix[..=at];
        names.push(format!("{prefix}.{end}.d"));
    }
    names.push(format!("{end}.d"));
    names
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    let text = format!("cannot read {}: {error}", path.display());
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => Failure::NotPermitted(text),
        _ => Failure::NotFound(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(PathBuf);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Self {
            let tree = Self(nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-quadlets-XXXXXX")).unwrap());
            for (path, text) in files {
                let path = tree.0.join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            tree
        }

        fn find(&self, name: &str) -> anyhow::Result<super::super::Quadlet> {
            super::super::find(name, RuntimeScope::System, None, Some(&self.0))
        }

        fn found(&self, name: &str) -> String {
            let path = self.find(name).unwrap().path;
            path.strip_prefix(&self.0).unwrap().display().to_string()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    #[test]
    fn the_first_directory_wins_and_subdirectories_count() {
        let tree = Tree::new(&[
            ("usr/share/containers/systemd/web.container", "[Container]\nImage=usr\n"),
            ("usr/share/containers/systemd/other.container", "[Container]\nImage=usr\n"),
            ("etc/containers/systemd/deep/er/web.container", "[Container]\nImage=etc\n"),
            ("etc/containers/systemd/users/7/user.container", "[Container]\nImage=user\n"),
        ]);
        assert_eq!(tree.found("web"), "etc/containers/systemd/deep/er/web.container");
        assert_eq!(tree.found("other.container"), "usr/share/containers/systemd/other.container");
        let error = tree.find("user").unwrap_err();
        assert!(error.to_string().contains("there is no user.container"), "{error}");
    }

    #[test]
    fn drop_ins_of_every_directory_are_read_in_order_but_not_our_own() {
        let tree = Tree::new(&[
            ("usr/share/containers/systemd/my-web.container", "[Container]\nImage=a\nPublishPort=1:1\n"),
            ("etc/containers/systemd/my-web.container.d/20-b.conf", "[Container]\nImage=b\n"),
            ("etc/containers/systemd/container.d/10-all.conf", "[Container]\nImage=all\nNetwork=none\n"),
            ("etc/containers/systemd/my-.container.d/15-my.conf", "[Container]\nPublishPort=2:2\n"),
            ("run/containers/systemd/my-web.container.d/20-b.conf", "[Container]\nImage=run\n"),
            (
                "etc/containers/systemd/my-web.container.d/50-bro-activator.conf",
                "# Written by bro activate\n[Container]\nImage=bro\n",
            ),
        ]);
        let web = tree.find("my-web").unwrap();
        assert_eq!(web.value("Image"), Some("run"));
        assert_eq!(web.value("Network"), Some("none"));
        assert_eq!(web.values("PublishPort"), ["1:1", "2:2"]);
    }

    #[test]
    fn templates_and_their_instances() {
        let tree = Tree::new(&[
            ("etc/containers/systemd/web@.container", "[Container]\nImage=a\n"),
            ("etc/containers/systemd/web@own.container", "[Container]\nImage=b\n"),
        ]);
        assert_eq!(tree.found("web@blue"), "etc/containers/systemd/web@.container");
        assert_eq!(tree.found("web@own"), "etc/containers/systemd/web@own.container");
        assert!(tree.find("web@blue").unwrap().is_shared() && !tree.find("web@own").unwrap().is_shared());
        assert!(tree.find("web").unwrap_err().to_string().contains("is a template"));
    }

    /// Each directory is looked into once, so that links to links do not multiply.
    #[test]
    fn links_in_a_ring_take_no_time() {
        let tree = Tree::new(&[("etc/containers/systemd/deep/er/web.container", "[Container]\n")]);
        let quadlets = tree.0.join("etc/containers/systemd");
        for number in 0..30 {
            std::os::unix::fs::symlink(".", quadlets.join(format!("{number}"))).unwrap();
            std::os::unix::fs::symlink("../..", quadlets.join(format!("deep/er/{number}"))).unwrap();
        }
        let begun = std::time::Instant::now();
        assert_eq!(tree.found("web"), "etc/containers/systemd/deep/er/web.container");
        assert!(tree.find("nope").unwrap_err().to_string().contains("there is no nope.container"));
        assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?}", begun.elapsed());
    }

    #[test]
    fn more_than_can_be_meant_is_not_looked_at() {
        let tree = Tree::new(&[("etc/containers/systemd/z/web.container", "[Container]\n")]);
        for number in 0..=MOST_DIRECTORIES {
            std::fs::create_dir(tree.0.join(format!("etc/containers/systemd/{number}"))).unwrap();
        }
        // In their order, z is beyond the limit.
        let error = tree.find("web").unwrap_err().to_string();
        assert!(error.contains("too much below"), "{error}");
        let tree = Tree::new(&[("etc/containers/systemd/web.container", "")]);
        std::fs::File::create(tree.0.join("etc/containers/systemd/web.container"))
            .unwrap()
            .set_len(LONGEST + 1)
            .unwrap();
        let error = tree.find("web").unwrap_err().to_string();
        assert!(error.contains("it has more than"), "{error}");
    }

    #[test]
    fn two_of_a_name_and_files_that_are_no_quadlets() {
        let tree = Tree::new(&[
            ("etc/containers/systemd/app.container", "[Container]\n"),
            ("etc/containers/systemd/app.pod", "[Pod]\n"),
            ("etc/containers/systemd/empty.container", "[Unit]\n"),
        ]);
        assert!(tree.find("app").unwrap_err().to_string().contains("app.container and app.pod"));
        assert_eq!(tree.find("app.pod").unwrap().unit, "app-pod.service");
        assert!(tree.find("empty").unwrap_err().to_string().contains("no section [Container]"));
    }
}
