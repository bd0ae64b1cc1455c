//! One run of qemu: the guest's console for people, its second serial port for what it reports.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::initramfs::Initramfs;
use super::inside::{self, MODULES};
use super::kernels::Image;
use crate::process;
use crate::scratch::Scratch;

/// From qemu's start to its end. What the guest runs has deadlines of its own, which come first.
const DEADLINE: Duration = Duration::from_secs(500);
/// From qemu's start to the first word of PID 1, which takes 3 s on an idle machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// Emulators have faults of their own (see [`processor`]). A guest that dies before PID 1 has said a word, and so before anything of
/// ours has run, is booted once more.
const BOOTS: u32 = 3;

/// The processor: one, for qemu 7.2 lets a processor run, now and then, what another has just patched.
///
/// qemu's 16-byte compare-and-swap sometimes spoils the flags: one boot of Linux 6.12 in eight ended in a double fault. Kernels
/// up to then have another way where a processor lacks it. Newer ones refuse sockets their BPF storage without it, and seldom
/// use it otherwise.
const fn processor(kernel: (u32, u32)) -> [&'static str; 4] {
    let swaps_16_bytes = kernel.0 > 6 || kernel.1 > 12;
    ["-smp", "1", "-cpu", if swaps_16_bytes { "max" } else { "max,-cx16" }]
}

/// What the kernel is told: to leave out the checks of its clocks, which a busy machine's emulator fails. What the kernel does
/// not know itself becomes the environment of PID 1.
fn command_line(image: &Image) -> String {
    let (init, bro) = (inside::INIT, inside::BRO);
    let modules: Vec<&str> = image.modules.iter().filter_map(|module| module.file_name()?.to_str()).collect();
    format!(
        "console=ttyS0 panic=-1 quiet no_timer_check tsc=reliable rdinit={init} BRO_BIN={bro} PATH=/usr/sbin {MODULES}={}",
        modules.join(",")
    )
}

/// What a guest reported.
#[derive(Debug)]
pub struct Report {
    steps: Vec<Value>,
    /// What it wrote to the console, kernel and programs alike.
    pub console: String,
    /// From qemu's start to its end.
    pub took: Duration,
}

impl Report {
    /// What the guest reported of `step`; where it reported nothing, an error with the end of the console.
    pub fn step(&self, step: &str) -> Result<&Value> {
        let found = self.steps.iter().find(|value| value["step"] == step);
        found.with_context(|| {
            format!("the guest did not come to {step:?}; its console ends:\n{}", self.tail())
        })
    }

    fn tail(&self) -> String {
        let lines: Vec<&str> = self.console.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

/// One at a time: they would only slow each other down, and what runs inside has deadlines.
pub(super) fn run(image: &Image, files: &Initramfs) -> Result<Report> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut boots = 1;
    loop {
        let report = boot(image, files)?;
        if !report.steps.is_empty() || boots == BOOTS {
            return Ok(report);
        }
        println!("{} did not come up; once more. Its console ends:\n{}", image.package, report.tail());
        boots += 1;
    }
}

fn boot(image: &Image, files: &Initramfs) -> Result<Report> {
    let scratch = Scratch::new()?;
    let results = scratch.join("results");
    let begin = Instant::now();
    // qemu dies with the thread that waits for it.
    let mut qemu = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        // Emulated on every machine alike, so that a result does not depend on who may use which hardware.
        .args(["-accel", "tcg", "-m", "1024"])
        .args(processor(image.version()?))
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-serial"])
        .arg(format!("file:{}", results.display()))
        .arg("-kernel")
        .arg(&image.path)
        .arg("-initrd")
        .arg(files.write(&image.modules)?)
        .arg("-append")
        .arg(command_line(image))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run qemu")?;
    let mut stdout = qemu.stdout.take().context("stdout is piped")?;
    let mut stderr = qemu.stderr.take().context("stderr is piped")?;
    let console = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let silent = || std::fs::metadata(&results).map_or(true, |file| file.len() == 0);
    let pid = qemu.id().cast_signed();
    let ended = process::ends(pid, BOOT_DEADLINE).and_then(|ended| {
        let hopeless = ended || silent();
        if hopeless { Ok(ended) } else { process::ends(pid, DEADLINE) }
    });
    if !matches!(ended, Ok(true)) {
        qemu.kill().ok();
    }
    let status = qemu.wait()?;
    let console = console.join().expect("the reader ends with qemu")?;
    let mut complaint = String::new();
    stderr.read_to_string(&mut complaint)?;
    let steps = std::fs::read_to_string(&results)
        .unwrap_or_default()
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("the guest reported {line:?}")))
        .collect::<Result<Vec<Value>>>()?;
    let report = Report { steps, console, took: begin.elapsed() };
    let ended = ended?;
    ensure!(
        ended || report.steps.is_empty(),
        "the guest did not end within {DEADLINE:?}; its console ends:\n{}",
        report.tail()
    );
    // A qemu that is ended by a signal says so, and succeeds.
    let meddled = complaint.contains("terminating on signal") && ended;
    ensure!(!ended || status.success() && !meddled, "qemu failed ({status}): {}", complaint.trim());
    Ok(report)
}
