//! What /proc tells of processes. All of bro's crates look here, so this one knows none of them.

use std::path::PathBuf;

pub mod cgroup;
pub mod signals;

/// All processes, each with its directory in /proc.
pub fn processes() -> impl Iterator<Item = (i32, PathBuf)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_among_all() {
        let own = i32::try_from(std::process::id()).unwrap();
        let found: Vec<PathBuf> = processes().filter(|(pid, _)| *pid == own).map(|(_, path)| path).collect();
        assert_eq!(found, [PathBuf::from(format!("/proc/{own}"))]);
        assert!(processes().all(|(pid, _)| pid > 0), "what is no process has no number");
    }
}
