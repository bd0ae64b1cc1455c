//! A directory tree that stands for a host's disk, and `bro activate` at work in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use bro_tests::scratch::Scratch;

/// What stands for the path of the program in expected files.
pub const PROGRAM: &str = "/usr/local/bin/bro";

/// What `bro activate` said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A disk, gone with the value.
#[derive(Debug)]
pub struct Tree {
    scratch: Scratch,
}

impl Tree {
    /// With these files.
    pub fn new(files: &[(&str, &str)]) -> Result<Self> {
        let tree = Self { scratch: Scratch::new()? };
        for (path, text) in files {
            tree.write(path, text)?;
        }
        Ok(tree)
    }

    /// With the one rootful quadlet that most tests need.
    pub fn with_web() -> Result<Self> {
        Self::new(&[(WEB, "[Container]\nImage=docker.io/library/caddy\nNetwork=none\n")])
    }

    pub fn root(&self) -> &Path {
        self.scratch.path()
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.root().join(inside.trim_start_matches('/'))
    }

    pub fn write(&self, inside: &str, text: &str) -> Result<()> {
        let path = self.path(inside);
        std::fs::create_dir_all(path.parent().context("a file lies in a directory")?)?;
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// `bro activate …` in this tree, as a command that was not run yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(bro_tests::bro::binary());
        command.arg("activate").args(arguments).arg("--root").arg(self.root());
        environment(&mut command);
        command
    }

    /// Runs `bro activate … --system` in this tree.
    pub fn run(&self, arguments: &[&str]) -> Result<Said> {
        said(self.command(arguments).arg("--system"))
    }

    /// Everything in it: contents of files, destinations of links, `/` for directories.
    pub fn listing(&self) -> Result<BTreeMap<String, String>> {
        let mut all = BTreeMap::new();
        list(self.root(), self.root(), &mut all)?;
        Ok(all)
    }
}

/// The quadlet of [`Tree::with_web`].
pub const WEB: &str = "etc/containers/systemd/web.container";

/// Nothing of the caller's decides where files are.
pub fn environment(command: &mut Command) {
    command.env("XDG_CONFIG_HOME", "/home/test/.config").env_remove("XDG_RUNTIME_DIR").env("LC_ALL", "C");
}

/// Runs it.
pub fn said(command: &mut Command) -> Result<Said> {
    let output = command.output().context("bro does not run")?;
    Ok(Said {
        code: output.status.code().context("bro was killed")?,
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

/// All files, links and directories below `directory`, by their paths in `root`.
pub fn list(root: &Path, directory: &Path, all: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.strip_prefix(root)?.display().to_string();
        let metadata = std::fs::symlink_metadata(&path)?;
        if metadata.is_symlink() {
            all.insert(name, format!("-> {}", std::fs::read_link(&path)?.display()));
        } else if metadata.is_dir() {
            all.insert(name, "/".into());
            list(root, &path, all)?;
        } else {
            all.insert(name, std::fs::read_to_string(&path)?);
        }
    }
    Ok(())
}
