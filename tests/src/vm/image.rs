//! The machine's disk, with the kernel and the initramfs that boot it: built once by mmdebstrap and mke2fs, booted once, and kept in
//! the target directory under a hash of its recipe.

use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use super::{FIRST_BOOT_DEADLINE, Machine, Writes};
use crate::debian::{Root, SUITE, say};
use crate::kept::{Kept, remove};

const PACKAGES: &str = include_str!("../../vm/packages");
const PREPARE: &str = include_str!("../../vm/prepare.sh");
const CUSTOMIZE: &str = include_str!("../../vm/customize.sh");

/// Raise it when a change of the code changes what is built.
const FORMAT: u32 = 1;

/// As a file with holes; a run writes some tens of megabytes.
const SIZE: u64 = 3 << 30;

/// Disk, kernel and initramfs.
#[derive(Debug)]
pub(super) struct Image {
    /// The folder that they are in.
    place: PathBuf,
    /// Shared: nothing removes them while they are used. While they are made there is none.
    _lock: Option<File>,
}

impl Image {
    pub(super) fn disk(&self) -> PathBuf {
        self.place.join("disk")
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.place.join("vmlinuz")
    }

    pub(super) fn initrd(&self) -> PathBuf {
        self.place.join("initrd.img")
    }
}

/// The image. Makes it when there is none for this recipe.
pub(super) fn made() -> Result<Image> {
    let mut hasher = DefaultHasher::new();
    (FORMAT, SUITE, PACKAGES, PREPARE, CUSTOMIZE, SIZE).hash(&mut hasher);
    let (place, lock) = Kept::new("vm", "BRO_VM_CACHE")?.made(hasher.finish(), make)?;
    Ok(Image { place, _lock: Some(lock) })
}

fn make(cache: &Path, fresh: &Path) -> Result<()> {
    let root = cache.join("root");
    remove(&root)?;
    let recipe =
        Root { what: "the test machine", packages: PACKAGES, prepare: PREPARE, customize: CUSTOMIZE };
    recipe.build(cache, &root)?;
    std::fs::create_dir(fresh)?;
    let image = Arc::new(Image { place: fresh.to_owned(), _lock: None });
    for (link, to) in [("vmlinuz", image.kernel()), ("initrd.img", image.initrd())] {
        // Links that Debian keeps to the newest kernel.
        std::fs::copy(root.join(link), to).with_context(|| format!("the root has no {link}"))?;
    }
    File::create(image.disk())?.set_len(SIZE)?;
    let output =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&root, &image.disk()]).output()?;
    ensure!(output.status.success(), "mke2fs: {}", String::from_utf8_lossy(&output.stderr).trim());
    remove(&root)?;
    settle(&image)
}

/// Boots it for the first time: AppArmor's profiles are compiled then, which takes longer in an emulator than all the rest, and Podman
/// makes its databases.
fn settle(image: &Arc<Image>) -> Result<()> {
    let begin = Instant::now();
    let mut machine = Machine::start(image, &[], Writes::Kept, FIRST_BOOT_DEADLINE)?;
    machine.await_up()?;
    for agent in [&machine.root, &machine.user] {
        agent.run(&["podman", "info"])?;
    }
    machine.power_off()?;
    say(&format!("the test machine's first boot took {:.0} s", begin.elapsed().as_secs_f64()));
    Ok(())
}
