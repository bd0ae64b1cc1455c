//! Where processes are in the cgroup v2 tree.

use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The folder at which cgroup v2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified beside version 1.
///
/// # Errors
/// When it is not mounted.
pub fn mount_point() -> io::Result<PathBuf> {
    // Once, and no further than to it: the kernel makes the table as it is read, and each container that runs has mounts in it. In
    // a service with a /sys of its own (PrivateNetwork=) all of them come first.
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found.clone());
    }
    let mounts = BufReader::new(std::fs::File::open("/proc/self/mounts")?);
    let found = mounts.lines().map_while(Result::ok).find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| path.replace("\\040", " ").into())
    });
    let found: PathBuf =
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "cgroup v2 is not mounted"))?;
    Ok(FOUND.get_or_init(|| found).clone())
}

/// A process's cgroup as /proc shows it, `/system.slice/web.service`; `process` is its directory there. The root is that of this
/// process's cgroup namespace.
#[must_use]
pub fn shown(process: &Path) -> Option<String> {
    line(&table(process).ok()?).map(str::to_owned)
}

fn table(process: &Path) -> io::Result<String> {
    std::fs::read_to_string(process.join("cgroup"))
}

/// The line about version 2.
fn line(table: &str) -> Option<&str> {
    table.lines().find_map(|line| line.strip_prefix("0::"))
}

/// The folder of a process's cgroup.
///
/// # Errors
/// When the process is gone, or the cgroup is outside what this process's cgroup namespace shows.
pub fn of_process(pid: u32) -> io::Result<PathBuf> {
    parse(&table(Path::new(&format!("/proc/{pid}")))?, &mount_point()?)
}

/// The folder of this process's own cgroup.
///
/// # Errors
/// As [`of_process`].
pub fn of_self() -> io::Result<PathBuf> {
    parse(&table(Path::new("/proc/self"))?, &mount_point()?)
}

/// The folder of a user's slice, which holds all that the user runs but for what system services run in that user's name.
///
/// # Errors
/// When cgroup v2 is not mounted.
pub fn of_user(uid: u32) -> io::Result<PathBuf> {
    Ok(mount_point()?.join(format!("user.slice/user-{uid}.slice")))
}

/// The deepest cgroup that holds both this process and `pid`. It exists for as long as this process does, however often a
/// container's own cgroup is removed and made again, so what is attached there stays attached.
///
/// # Errors
/// As [`of_process`].
pub fn shared_with(pid: u32) -> io::Result<PathBuf> {
    Ok(common(&of_self()?, &of_process(pid)?))
}

fn common(one: &Path, other: &Path) -> PathBuf {
    one.components()
        .zip(other.components())
        .take_while(|(one, other)| one == other)
        .map(|(same, _)| same)
        .collect()
}

/// The cgroup v2 that a `/proc/PID/cgroup` names, below the mount point of that file system.
///
/// # Errors
/// When it names none.
pub fn parse(table: &str, mount: &Path) -> io::Result<PathBuf> {
    let path = line(table).and_then(|path| path.strip_prefix('/')).map(Path::new);
    let below = |path: &Path| path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    match path {
        Some(path) if below(path) => Ok(mount.join(path)),
        _ => Err(io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 of it is visible here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_two_cgroups_share() {
        let common = |one, other| common(Path::new(one), Path::new(other));
        let (proxy, container) =
            ("/c/system.slice/web-proxy.service", "/c/system.slice/web.service/libpod-payload-1");
        assert_eq!(common(proxy, container), Path::new("/c/system.slice"));
        assert_eq!(common("/c", "/c/user.slice"), Path::new("/c"));
    }

    #[test]
    fn the_line_of_version_2_counts() {
        let mount = Path::new("/sys/fs/cgroup");
        let path = |table| parse(table, mount).ok();
        assert_eq!(
            path("4:cpu:/x\n0::/a.slice/b.service\n"),
            Some("/sys/fs/cgroup/a.slice/b.service".into())
        );
        assert_eq!(path("0::/\n"), Some("/sys/fs/cgroup/".into()));
        for outside in ["0::/../../other\n", "0::/a/../../other\n", "0:://usr\n"] {
            assert_eq!(path(outside), None, "{outside}");
        }
        assert_eq!(path("4:cpu:/x\n"), None);
    }
}
