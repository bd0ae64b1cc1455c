//! Reading a small file that may be another user's: only a regular file is read, no more of it than can be meant, and without
//! waiting (opening a named pipe would wait for its other end).

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::libc;

/// What to do with a symbolic link in the last place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Read what it leads to.
    Follow,
    /// It is no regular file.
    Refuse,
}

/// The text of the file, of `most` bytes at most.
///
/// # Errors
/// When it is longer, no regular file, no UTF-8, or cannot be opened.
pub fn read(path: &Path, most: u64, link: Link) -> io::Result<String> {
    let link = if link == Link::Refuse { libc::O_NOFOLLOW } else { 0 };
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | link;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() || is_made_up(&file)? {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut text = String::new();
    let length = file.take(most + 1).read_to_string(&mut text)?;
    if length as u64 > most {
        return Err(io::Error::other(format!("it has more than {most} bytes")));
    }
    Ok(text)
}

/// The content of /proc and /sys is what the kernel says at that moment, and not what a program has written down: the number that
/// was last given to a process, say.
fn is_made_up(file: &std::fs::File) -> io::Result<bool> {
    use nix::sys::statfs::{PROC_SUPER_MAGIC, SYSFS_MAGIC, fstatfs};
    let kind = fstatfs(file)?.filesystem_type();
    Ok([PROC_SUPER_MAGIC, SYSFS_MAGIC].contains(&kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_small_regular_files_and_nothing_else() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-bounded-XXXXXX")).unwrap();
        let (file, link, pipe) = (folder.join("file"), folder.join("link"), folder.join("pipe"));
        std::fs::write(&file, "12345").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let what = |path: &Path, most, link| read(path, most, link).map_err(|error| error.to_string());
        assert_eq!(what(&file, 5, Link::Refuse), Ok("12345".into()));
        assert_eq!(what(&file, 4, Link::Refuse), Err("it has more than 4 bytes".into()));
        assert_eq!(what(&link, 5, Link::Follow), Ok("12345".into()));
        what(&link, 5, Link::Refuse).unwrap_err();
        // No process ever writes into the pipe, so a read of it would not end.
        assert_eq!(what(&pipe, 5, Link::Follow), Err("it is no regular file".into()));
        let last = Path::new("/proc/sys/kernel/ns_last_pid");
        assert_eq!(what(last, 32, Link::Follow), Err("it is no regular file".into()));
        assert_eq!(what(Path::new("/dev/zero"), 5, Link::Follow), Err("it is no regular file".into()));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
