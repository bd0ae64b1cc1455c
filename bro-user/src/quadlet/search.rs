//! Where Podman looks for quadlets and their drop-ins, and in which order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::Kind;
use crate::activate::bus::Manager;
use crate::activated::{self, MARKER};
use crate::exit::Failure;
use crate::owner::Owner;
use crate::unit_file::UnitFile;

/// How deep subdirectories are looked into; symbolic links could make a ring.
const DEEPEST: usize = 8;

/// The directories, the one that wins first.
pub(super) fn directories(
    scope: Manager,
    owner: Option<&Owner>,
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
        (Manager::System, None) => {
            ["/run", "/etc", "/usr/share"].map(|top| Path::new(top).join("containers/systemd")).into()
        }
        (Manager::User, None) => {
            let uid = nix::unistd::geteuid();
            let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
            let runtime = runtime.unwrap_or_else(|| format!("/run/user/{uid}").into());
            of_user(uid.as_raw(), runtime, activated::config_home()?)
        }
    };
    Ok(plain.into_iter().map(|path| below(root, &path)).collect())
}

/// `path`, below `root` where there is one.
pub(crate) fn below(root: Option<&Path>, path: &Path) -> PathBuf {
    match root {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    }
}

/// Where `bro activate` puts drop-ins for the quadlet: beside those that its owner would write.
///
/// # Errors
/// When there is no home directory.
pub fn drop_in_directory(
    quadlet: &super::Quadlet,
    scope: Manager,
    owner: Option<&Owner>,
    root: Option<&Path>,
) -> anyhow::Result<PathBuf> {
    let directory = match (scope, owner) {
        // Not into the home directory: what root writes is to lie where only root writes.
        (_, Some(owner)) => Path::new("/etc/containers/systemd/users").join(owner.uid.to_string()),
        (Manager::System, None) => PathBuf::from("/etc/containers/systemd"),
        (Manager::User, None) => activated::config_home()?.join("containers/systemd"),
    };
    Ok(below(root, &directory).join(format!("{}.d", quadlet.file_name())))
}

/// The quadlet's file: that of the instance itself before its template's.
pub(super) fn file(directories: &[PathBuf], stem: &str, kind: Kind) -> Option<PathBuf> {
    let mut names = vec![format!("{stem}.{}", kind.extension())];
    if let Some((prefix, _)) = stem.split_once('@') {
        names.push(format!("{prefix}@.{}", kind.extension()));
    }
    names.iter().find_map(|name| directories.iter().find_map(|directory| look(directory, directory, name, 0)))
}

fn look(top: &Path, directory: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let path = directory.join(name);
    if path.is_file() {
        return Some(path);
    }
    if depth == DEEPEST {
        return None;
    }
    let mut inside: Vec<PathBuf> =
        std::fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path()).collect();
    inside.sort();
    inside
        .into_iter()
        .filter(|path| path.is_dir() && path.extension().is_none_or(|end| end != "d"))
        // What lies in users/ is not the system's, and in users/UID that user's alone; both have entries of their own.
        .filter(|path| depth > 0 || !is_users(top, path))
        .find_map(|path| look(top, &path, name, depth + 1))
}

fn is_users(top: &Path, path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if top.ends_with("containers/systemd") {
        name == "users"
    } else {
        top.ends_with("containers/systemd/users") && name.bytes().all(|byte| byte.is_ascii_digit())
    }
}

/// Reads the quadlet and its drop-ins, those of `bro activate` left out: what it wrote is not the user's wish.
pub(super) fn read(directories: &[PathBuf], stem: &str, kind: Kind, path: &Path) -> anyhow::Result<UnitFile> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, &error))?;
    let mut file = UnitFile::parse(&text);
    // By file name; of two with the same name, the first directory's counts.
    let mut drop_ins: BTreeMap<std::ffi::OsString, PathBuf> = BTreeMap::new();
    let parent = path.parent().map(Path::to_owned);
    for directory in directories.iter().cloned().chain(parent) {
        for folder in drop_in_names(stem, kind) {
            let Ok(entries) = std::fs::read_dir(directory.join(folder)) else { continue };
            for entry in entries.flatten() {
                let is_conf = Path::new(&entry.file_name()).extension().is_some_and(|end| end == "conf");
                if is_conf && entry.path().is_file() {
                    drop_ins.entry(entry.file_name()).or_insert_with(|| entry.path());
                }
            }
        }
    }
    for path in drop_ins.values() {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {:?}", path.display()))?;
        if !text.starts_with(MARKER) {
            file.read(&text);
        }
    }
    Ok(file)
}

/// `web-api.container.d`, `web-.container.d`, `container.d`, and a template's for its instances.
fn drop_in_names(stem: &str, kind: Kind) -> Vec<String> {
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
            super::super::find(name, Manager::System, None, Some(&self.0))
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
