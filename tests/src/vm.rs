//! A whole machine: Debian with its own kernel, AppArmor, systemd and Podman, booted in qemu's software emulation. Nothing of the
//! outer machine's kernel is in it, and a reboot is one.
//!
//! - `image` makes its disk once and keeps it in the target directory; what a run writes goes into a layer above that, which is gone
//!   with qemu
//! - `agent` does things inside, as root and as the ordinary user `test`: `tests/vm/agent.py` at the other end of a virtio-serial port
//!
//! A boot takes about 30 s and commands 10 to 15 times as long as outside. `BRO_VM_CACHE` moves the disk elsewhere;
//! `BRO_DEBIAN_MIRROR` names the archive to build from when the machine's own apt has no Debian archive configured.

mod agent;
mod image;
pub mod log;

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::poll::PollFlags;

pub use agent::{Agent, Client};

use crate::debian::say;
use crate::peers::wait_for;
use crate::process;
use crate::scratch::Scratch;
use crate::tier::Need;
use image::Image;

/// What [`Machine::boot`] cannot do without, for `require!`.
pub const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Program("mmdebstrap", "mmdebstrap"),
    Need::Program("mke2fs", "e2fsprogs"),
    Need::Program("qemu-system-x86_64", "qemu-system-x86"),
];

/// The ordinary user of the machine, who has a user manager from boot on (lingering).
pub const USER: &str = "test";

/// From the start to the agents' first words. A machine with neighbours takes five times as long as an idle one.
const BOOT_DEADLINE: Duration = Duration::from_secs(480);
/// The same of a disk's first boot, which is done behind other tests.
const FIRST_BOOT_DEADLINE: Duration = Duration::from_secs(1200);
/// For `systemd-run --on-active`: a timer is late by up to a minute unless it says otherwise.
const SOON: &str = "--timer-property=AccuracySec=100ms";
/// Emulators have faults of their own: a machine whose kernel dies before systemd has started the agents is booted once more.
const BOOTS: u32 = 3;

/// A running machine. Dropping it kills it and removes every trace.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    /// Its root.
    pub root: Agent,
    /// Its ordinary user, [`USER`].
    pub user: Agent,
    /// When the last boot began.
    began: Instant,
    booted_in: Duration,
    scratch: Scratch,
    /// Its lock: the disk stays as long as it is used.
    _image: Arc<Image>,
}

/// What becomes of what is written to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writes {
    /// It goes to a layer above that ends with the machine.
    Forgotten,
    /// It stays.
    Kept,
}

impl Machine {
    /// Makes the disk if it has to, boots from it, and waits until systemd and the user's manager are up. The `files` are in
    /// /run/brought.
    pub fn boot(files: &[&Path]) -> Result<Self> {
        ensure!(std::env::consts::ARCH == "x86_64", "only an x86-64 machine is emulated yet");
        let image = Arc::new(image::made()?);
        let mut boots = 1;
        loop {
            match Self::start(&image, files, Writes::Forgotten, BOOT_DEADLINE) {
                Err(error) if boots < BOOTS => {
                    say(&format!("vm: the machine did not come up, once more: {error:#}"))
                }
                started => {
                    let mut machine = started?;
                    machine.await_up()?;
                    return Ok(machine);
                }
            }
            boots += 1;
        }
    }

    /// Makes the disk unless it is there.
    pub fn disk() -> Result<()> {
        image::made().map(drop)
    }

    /// An orderly reboot.
    pub fn reboot(&mut self) -> Result<()> {
        let begin = Instant::now();
        // A second later: the answer to this has to come out first.
        self.root.run(&["systemd-run", "--quiet", "--on-active=1s", SOON, "systemctl", "reboot"])?;
        self.await_agents(begin, BOOT_DEADLINE)?;
        self.await_up()
    }

    /// How long the last boot took.
    #[must_use]
    pub fn booted_in(&self) -> Duration {
        self.booted_in
    }

    /// The end of what the kernel has written to its console.
    #[must_use]
    pub fn console(&self) -> String {
        console(&self.scratch)
    }

    fn start(image: &Arc<Image>, files: &[&Path], writes: Writes, limit: Duration) -> Result<Self> {
        let scratch = Scratch::new()?;
        let brought = bring(files, &scratch)?;
        let ports = ["root", USER];
        let listeners = ports.map(|port| UnixListener::bind(scratch.join(port)));
        let begin = Instant::now();
        let mut qemu = qemu(image, writes, &brought, &scratch, &ports)?;
        // qemu connects before anything else, or complains and ends.
        let accept = |listener: std::io::Result<UnixListener>| {
            let listener = listener?;
            let there = wait_for(listener.as_fd(), PollFlags::POLLIN, Duration::from_secs(20))?;
            ensure!(!there.is_empty(), "qemu does not connect");
            Ok(listener.accept()?.0)
        };
        let [root, user] = listeners.map(accept);
        let (root, user) = match (root, user) {
            (Ok(root), Ok(user)) => (root, user),
            (root, user) => {
                qemu.kill().ok();
                qemu.wait()?;
                let complaint = std::fs::read_to_string(scratch.join("qemu")).unwrap_or_default();
                bail!("cannot run qemu: {:?} {}", root.err().or(user.err()), complaint.trim());
            }
        };
        let mut machine = Self {
            qemu,
            root: Agent::new(root, "system")?,
            user: Agent::new(user, "user")?,
            began: begin,
            booted_in: Duration::ZERO,
            scratch,
            _image: Arc::clone(image),
        };
        machine.await_agents(begin, limit)?;
        Ok(machine)
    }

    fn await_agents(&mut self, began: Instant, limit: Duration) -> Result<()> {
        self.began = began;
        for agent in [&self.root, &self.user] {
            agent.await_boot(limit).with_context(|| self.console())?;
        }
        Ok(())
    }

    /// Waits until both managers have done what a boot makes them do, and nothing of it has failed.
    fn await_up(&mut self) -> Result<()> {
        for agent in [&self.root, &self.user] {
            let state = agent.try_systemctl(&["is-system-running", "--wait"])?;
            let failed = agent.failed_units()?;
            ensure!(state.success() && failed.is_empty(), "{}: {failed}", state.stdout.trim());
        }
        self.booted_in = self.began.elapsed();
        Ok(())
    }

    /// Has everything written to the disk and ends the machine.
    fn power_off(mut self) -> Result<()> {
        self.root.run(&["systemd-run", "--quiet", "--on-active=1s", SOON, "systemctl", "poweroff"])?;
        let ended = process::ends(self.qemu.id().cast_signed(), BOOT_DEADLINE)?;
        ensure!(ended, "the machine does not end:\n{}", self.console());
        let status = self.qemu.wait()?;
        ensure!(status.success(), "qemu failed ({status})");
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.qemu.kill().ok();
        self.qemu.wait().ok();
    }
}

fn console(scratch: &Scratch) -> String {
    let console = std::fs::read(scratch.join("console")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console).into_owned();
    let lines: Vec<&str> = console.lines().collect();
    format!("the machine's console ends:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
}

/// The files as a tar archive, which the machine finds on its second disk.
fn bring(files: &[&Path], scratch: &Scratch) -> Result<PathBuf> {
    let (folder, archive) = (scratch.join("brought"), scratch.join("brought.tar"));
    std::fs::create_dir(&folder)?;
    std::fs::File::create(folder.join("agent.py"))?.write_all(include_bytes!("../vm/agent.py"))?;
    std::fs::File::create(folder.join("service.py"))?.write_all(include_bytes!("../host/service.py"))?;
    for file in files {
        std::fs::copy(file, folder.join(file.file_name().context("a file has a name")?))
            .with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let status =
        Command::new("tar").arg("-C").arg(&folder).arg("-cf").args([&archive, Path::new(".")]).status()?;
    ensure!(status.success(), "tar failed ({status})");
    Ok(archive)
}

fn qemu(image: &Image, writes: Writes, brought: &Path, scratch: &Scratch, ports: &[&str]) -> Result<Child> {
    let snapshot = if writes == Writes::Forgotten { "on" } else { "off" };
    let drive = |path: &Path, rest: &str| format!("file={},format=raw,if=virtio,{rest}", path.display());
    // qemu dies with the thread that waits for it.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        // Emulated on every machine alike, so that a result does not depend on who may use which hardware. And
        // without the 16-byte compare-and-swap: see the emulator of kernels.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-smp", "2", "-m", "3072"])
        .args(["-nodefaults", "-display", "none", "-nic", "none"])
        .arg("-serial")
        .arg(format!("file:{}", scratch.join("console").display()))
        .arg("-kernel")
        .arg(image.kernel())
        .arg("-initrd")
        .arg(image.initrd())
        .arg("-append")
        // Without the checks of its clocks, which a busy machine's emulator fails, and without what guards against real processors:
        // each change of page tables empties the cache that an emulator lives by.
        .arg(
            "console=ttyS0 root=/dev/vda rw quiet panic=-1 no_timer_check tsc=reliable mitigations=off \
             systemd.show_status=0",
        )
        .arg("-drive")
        .arg(drive(&image.disk(), &format!("cache=unsafe,snapshot={snapshot}")))
        .arg("-drive")
        .arg(drive(brought, "readonly=on"))
        .args(["-device", "virtio-serial-pci"]);
    for port in ports {
        command
            .arg("-chardev")
            .arg(format!("socket,id={port},path={}", scratch.join(port).display()))
            .arg("-device")
            .arg(format!("virtserialport,chardev={port},name={port}"));
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(scratch.join("qemu"))?)
        // The layer above the disk; not on a tmpfs.
        .env("TMPDIR", "/var/tmp")
        .spawn()
        .context("cannot run qemu")
}
