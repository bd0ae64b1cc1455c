//! Other kernels than the machine's own: Debian's, booted in qemu's software emulation with an initramfs that holds the `bro`
//! under test and nothing else but what it needs. No root, no hardware virtualisation, no image of a disk.
//!
//! - `kernels` fetches kernel packages from the archive that the machine's apt uses, and keeps them in the target directory
//! - `initramfs` packs programs and their libraries into a cpio archive
//! - `machine` runs qemu, and reads what the guest reports from its second serial port
//! - `inside` is the guest's PID 1 (`src/bin/emulated.rs`): it runs everything, judges nothing, and reports facts
//!
//! A boot takes 3 to 6 s. `BRO_KERNEL_CACHE` moves the fetched kernels elsewhere; `BRO_DEBIAN_MIRROR` names the archive when
//! the machine's own apt has no Debian archive configured, or one that no longer holds a release.

mod initramfs;
pub mod inside;
mod kernels;
mod machine;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

pub use initramfs::Initramfs;
pub use kernels::{Image, Release};
pub use machine::Report;

use crate::tier::{Need, find_program};
use crate::{bro, emulator};

/// What it cannot do without, for `require!`.
pub const NEEDS: [Need; 8] = [
    Need::Program("qemu-system-x86_64", "qemu-system-x86"),
    Need::Program("apt-get", "apt"),
    Need::Program("dpkg-deb", "dpkg"),
    Need::Program("ldd", "libc-bin"),
    Need::Program("strip", "binutils"),
    Need::Program("xz", "xz-utils"),
    Need::Program("bpftool", "bpftool"),
    Need::Program("ip", "iproute2"),
];

/// The suites that also run inside, on each kernel that has the kernel relay: what the relay takes for granted about the
/// kernel, and its programs at work.
pub const SUITES: [&str; 2] = ["kernel_assumptions", "kernel_relay_programs"];

/// The suite that runs inside on every kernel, for these have what this machine's may lack: vsock's loopback.
pub const VSOCK: &str = "vsock";

/// Everything that runs inside, packed.
pub fn pack() -> Result<Initramfs> {
    ensure!(std::env::consts::ARCH == "x86_64", "only an x86-64 machine is emulated yet");
    let mut files = Initramfs::new()?;
    // As in a target folder: helpers lie one above the tests, where the harness looks for them.
    files.program(bro::binary(), inside::BRO)?;
    files.program(&bro::helper(), "/bro/peer")?;
    files.program(&bro::adopt(), "/bro/adopt")?;
    files.program(&bro::helper().with_file_name("emulated"), inside::INIT)?;
    for (name, suite) in all_suites().zip(built(all_suites())?) {
        files.program(&suite, &format!("{}/{name}", inside::SUITES))?;
    }
    for tool in ["bpftool", "ip"] {
        files.program(&find_program(tool).context(tool)?, &format!("/usr/sbin/{tool}"))?;
    }
    Ok(files)
}

fn all_suites() -> impl Iterator<Item = &'static str> + Clone {
    SUITES.into_iter().chain([VSOCK])
}

/// The test binaries of these suites, built if they are not.
pub fn built(suites: impl Iterator<Item = &'static str> + Clone) -> Result<Vec<PathBuf>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let release = std::env::current_exe()?.components().any(|part| part.as_os_str() == "release");
    let output = Command::new(cargo)
        // The whole workspace: with one package cargo may choose other features, and build everything once more.
        .args(["test", "--quiet", "--workspace", "--no-run", "--message-format=json"])
        .args(release.then_some("--release"))
        .args(suites.clone().flat_map(|suite| ["--test", suite]))
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo could not build the suites:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let messages: Vec<serde_json::Value> = String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let executable = |suite: &str| {
        let mut found = messages.iter().filter(|message| message["target"]["name"] == *suite);
        let path = found.find_map(|message| message["executable"].as_str());
        path.map(PathBuf::from).with_context(|| format!("cargo built no suite {suite}"))
    };
    suites.map(executable).collect()
}

/// Boots `image`, lets everything run inside, and hands out what the guest reported.
pub fn run(image: &Image, files: &Initramfs) -> Result<Report> {
    emulator::machine::run(image, files)
}
