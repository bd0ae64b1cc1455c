//! A folder for one test, gone with it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// A fresh folder under the system's temporary one, removed with everything in it when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes the folder. Other users may look into it: a test run by root starts programs as another user.
    pub fn new() -> std::io::Result<Self> {
        // A short name: unix socket paths hold 107 bytes.
        let path = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-XXXXXX"))?;
        let scratch = Self(path);
        std::fs::set_permissions(&scratch.0, std::fs::Permissions::from_mode(0o755))?;
        Ok(scratch)
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path in the folder.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}
