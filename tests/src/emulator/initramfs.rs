//! A root file system for the guest: a cpio archive ("newc", see the kernel's early-userspace documentation) of programs and
//! the libraries that they load.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::scratch::Scratch;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const TERMINAL: u32 = 0o020_600;

/// The archive while it is being filled; gone with the value.
#[derive(Debug)]
pub struct Initramfs {
    bytes: Vec<u8>,
    names: BTreeSet<PathBuf>,
    inode: u32,
    scratch: Scratch,
}

impl Initramfs {
    /// Nothing but the folders that the guest mounts things at, and the console that the kernel opens for PID 1.
    pub fn new() -> Result<Self> {
        let mut new = Self { bytes: Vec::new(), names: BTreeSet::new(), inode: 0, scratch: Scratch::new()? };
        for folder in ["/dev", "/proc", "/sys", "/run", "/tmp"] {
            new.folder(Path::new(folder));
        }
        new.entry("dev/console", TERMINAL, &[], (5, 1));
        Ok(new)
    }

    /// Adds a program as `name`, without its symbols, and the libraries it asks for at the places where they are here.
    pub fn program(&mut self, program: &Path, name: &str) -> Result<()> {
        let stripped = self.scratch.join("stripped");
        let status = Command::new("strip").arg("-o").args([&stripped, program]).status()?;
        ensure!(status.success(), "cannot strip {}", program.display());
        self.file(&stripped, Path::new(name))?;
        let listed = Command::new("ldd").arg(program).output()?;
        ensure!(listed.status.success(), "ldd cannot read {}", program.display());
        // `NAME => PATH (ADDRESS)`, and without the arrow for the loader; what has no path comes from the kernel.
        let listed = String::from_utf8(listed.stdout)?;
        let library =
            |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
        for path in listed.lines().filter_map(library) {
            self.file(&path, &path)?;
        }
        Ok(())
    }

    /// The whole archive with these files besides, each at `/` and its own name, in a file that lives as long as this value.
    pub fn write(&self, besides: &[PathBuf]) -> Result<PathBuf> {
        let path = self.scratch.join("initramfs");
        let mut rest = Self {
            bytes: Vec::new(),
            names: self.names.clone(),
            inode: self.inode,
            scratch: Scratch::new()?,
        };
        for file in besides {
            rest.file(file, &Path::new("/").join(file.file_name().context("a file has a name")?))?;
        }
        rest.entry("TRAILER!!!", 0, &[], (0, 0));
        let mut file = std::fs::File::create(&path)?;
        file.write_all(&self.bytes)?;
        file.write_all(&rest.bytes)?;
        Ok(path)
    }

    fn file(&mut self, from: &Path, name: &Path) -> Result<()> {
        let parents: Vec<&Path> = name.ancestors().skip(1).collect();
        parents.into_iter().rev().for_each(|parent| self.folder(parent));
        if self.names.insert(name.to_owned()) {
            let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            self.entry(relative(name), PROGRAM, &content, (0, 0));
        }
        Ok(())
    }

    fn folder(&mut self, name: &Path) {
        if !relative(name).is_empty() && self.names.insert(name.to_owned()) {
            self.entry(relative(name), FOLDER, &[], (0, 0));
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("no program has 4 GiB");
        let length = u32::try_from(name.len() + 1).expect("a path is short");
        // Inode, mode, owner, group, links, time, size, the device it lies on, the device it is, the name's length, no sum.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, length, 0]
            .map(|n| format!("{n:08x}"));
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend_from_slice(fields.concat().as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn relative(name: &Path) -> &str {
    name.to_str().expect("paths of programs are text").trim_start_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_each_name_once_and_every_entry_is_aligned() {
        let mut files = Initramfs::new().unwrap();
        files.file(Path::new("/proc/self/stat"), Path::new("/a/b/c")).unwrap();
        files.file(Path::new("/proc/self/stat"), Path::new("/a/b/c")).unwrap();
        let text = String::from_utf8_lossy(&files.bytes);
        assert_eq!(text.matches("a/b/c\0").count(), 1);
        assert_eq!(text.matches("\0a/b\0").count() + text.matches("a/b\0").count(), 1);
        assert_eq!(files.bytes.len() % 4, 0);
        let whole = std::fs::read(files.write(&[]).unwrap()).unwrap();
        assert!(whole.len() > files.bytes.len());
    }
}
