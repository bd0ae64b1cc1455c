//! Processors that do not sleep. Waking one takes as long as a small request and more, on virtual machines most of all, where it
//! is the hypervisor's doing; and who is woken how often on which processor is the scheduler's choice. With the processors kept
//! awake a round trip shows what the forwarder adds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Keeps them awake until it is dropped.
#[derive(Debug)]
pub struct Awake {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Awake {
    /// One thread for each processor, which gives way to every other one that wants to run (sched(7), SCHED_IDLE).
    pub fn keep() -> Result<Self> {
        let all = sched_getaffinity(Pid::from_raw(0))?;
        let over = Arc::new(AtomicBool::new(false));
        let mut awake = Self { over, threads: Vec::new() };
        for processor in (0..CpuSet::count()).filter(|processor| all.is_set(*processor).unwrap_or(false)) {
            let over = awake.over.clone();
            let spin = move || {
                let mut own = CpuSet::new();
                let placed = own.set(processor).and_then(|()| sched_setaffinity(Pid::from_raw(0), &own));
                if placed.is_ok() && give_way().is_ok() {
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                }
            };
            awake.threads.push(std::thread::Builder::new().spawn(spin).context("a thread")?);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
    }
}

/// The calling thread runs only where no other one wants to.
fn give_way() -> nix::Result<()> {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter is valid for reading.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameter) }).map(drop)
}
