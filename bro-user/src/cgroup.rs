//! Control groups (cgroups(7), version 2): where the programs that watch a container's sockets are attached.

use std::path::{Path, PathBuf};

/// The cgroup2 hierarchy's mount point.
#[must_use]
pub fn mount_point() -> Option<PathBuf> {
    mount_point_in(&std::fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// proc_pid_mountinfo(5): the fifth field is the mount point; the type follows a lone hyphen.
fn mount_point_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let is_cgroup2 = filesystem.split(' ').next() == Some("cgroup2");
        // Space, tab, newline and backslash are written in octal; cgroup mount points have none of them.
        if is_cgroup2 { mount.split(' ').nth(4).map(PathBuf::from) } else { None }
    })
}

/// The cgroup of a process, below the mount point: the line without controllers (on hybrid hosts there are others).
#[must_use]
pub fn of_process(pid: i32) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    // A process outside this cgroup namespace shows as /../…: then nothing below the mount point is its cgroup.
    (!path.contains("/..")).then(|| PathBuf::from(path))
}

/// The deepest cgroup that holds both this process and `pid`. It exists for as long as this process does, however often the
/// container's own cgroup is removed and made again.
#[must_use]
pub fn shared_with(pid: i32) -> Option<PathBuf> {
    let shared = common(&of_process(std::process::id().try_into().ok()?)?, &of_process(pid)?);
    Some(mount_point()?.join(shared.strip_prefix("/").ok()?))
}

fn common(one: &Path, other: &Path) -> PathBuf {
    one.components().zip(other.components()).take_while(|(one, other)| one == other).map(|(same, _)| same).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mount_among_others() {
        let text = "29 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n30 23 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point_in(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point_in("29 23 0:26 / /x rw - tmpfs tmpfs rw"), None);
    }

    #[test]
    fn finds_what_two_paths_share() {
        let common = |one, other| common(Path::new(one), Path::new(other));
        assert_eq!(common("/system.slice/web-proxy.service", "/system.slice/web.service/libpod-payload-1"), Path::new("/system.slice"));
        assert_eq!(common("/", "/user.slice"), Path::new("/"));
        assert_eq!(common("/a/b", "/a/b"), Path::new("/a/b"));
    }
}
