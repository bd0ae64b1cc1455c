//! One run of qemu: the guest's console for people, its second serial port for what it reports.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::initramfs::Initramfs;
use super::inside;
use super::kernels::Image;
use crate::process;
use crate::scratch::Scratch;

/// From qemu's start to its end. What the guest runs has deadlines of its own, which come first.
const DEADLINE: Duration = Duration::from_secs(300);
/// From qemu's start to the first word of PID 1, which takes 3 s on an idle machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// Emulators have faults of their own (see [`CPU`]). A guest that dies before PID 1 has said a word, and so before anything of
/// ours has run, is booted once more.
const BOOTS: u32 = 3;

/// All that the emulator can do, but for what qemu 7.2 gets wrong now and then, which ended one boot of Linux 6.12 in eight in a
/// double fault: the 16-byte compare-and-swap corrupts the flags (without it the kernel has another way), and a processor may
/// run what another has just patched. So there is one processor.
const CPU: [&str; 4] = ["-cpu", "max,-cx16", "-smp", "1"];

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
        .args(CPU)
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-serial"])
        .arg(format!("file:{}", results.display()))
        .arg("-kernel")
        .arg(&image.path)
        .arg("-initrd")
        .arg(files.write()?)
        .arg("-append")
        // What the kernel does not know itself becomes the environment of PID 1.
        .arg(format!(
            "console=ttyS0 panic=-1 quiet rdinit={} BRO_BIN={} PATH=/usr/sbin",
            inside::INIT,
            inside::BRO
        ))
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
    ensure!(!ended || status.success(), "qemu failed ({status}): {}", complaint.trim());
    Ok(report)
}
