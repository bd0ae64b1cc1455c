//! A cgroup for the thread of one test: sockets that the thread makes belong to it, and no other's do.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use bro_proc::cgroup;

/// A threaded cgroup below this process's own, with the calling thread (and what it spawns) in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    parent: PathBuf,
}

impl Cgroup {
    pub fn enter() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let parent = cgroup::of_self()?;
        let name = format!("bro-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let made = Self { path, parent };
        std::fs::write(made.path.join("cgroup.type"), "threaded").context("a threaded cgroup")?;
        made.enter_too().context("entering the cgroup")?;
        Ok(made)
    }

    /// Puts the calling thread into it as well.
    pub fn enter_too(&self) -> Result<()> {
        Ok(std::fs::write(self.path.join("cgroup.threads"), "0")?)
    }

    /// Another cgroup beside it, empty, for the caller to remove.
    pub fn sibling(&self) -> Result<PathBuf> {
        let mut name = self.path.clone().into_os_string();
        name.push("-sibling");
        std::fs::create_dir(&name)?;
        Ok(name.into())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let tasks = std::fs::read_to_string(self.path.join("cgroup.threads")).unwrap_or_default();
        for thread in tasks.lines() {
            std::fs::write(self.parent.join("cgroup.threads"), thread).ok();
        }
        std::fs::remove_dir(&self.path).ok();
    }
}
