//! The network namespace that a user's own bridge networks are in. Podman mounts its file in a mount namespace of its own, which
//! its pause process holds: for all other processes it is an empty file.

use std::path::{Path, PathBuf};

/// Where that file is below the user's runtime directory.
const FILE: &str = "containers/networks/rootless-netns/rootless-netns";

/// The path by which `path` can be opened as a namespace: through Podman's pause process, if it is that file.
#[must_use]
pub fn reachable(path: &Path) -> Option<PathBuf> {
    let runtime = path.to_str()?.strip_suffix(FILE)?;
    let pause = std::fs::read_to_string(format!("{runtime}libpod/tmp/pause.pid")).ok()?;
    let pause: u32 = pause.trim().parse().ok()?;
    Some(format!("/proc/{pause}/root{}", path.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_podmans_own_file_is_looked_for() {
        assert_eq!(reachable(Path::new("/run/netns/demo")), None);
        assert_eq!(reachable(&Path::new("/nonexistent").join(FILE)), None);
    }
}
