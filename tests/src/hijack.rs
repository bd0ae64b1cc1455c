//! What an attacker could do who has taken over a process: system calls made in its name, by ptrace(2).

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// A process in our hands, stopped. Dropping this lets it go on as if nothing had happened.
#[derive(Debug)]
pub struct Hijacked {
    pid: Pid,
    registers: libc::user_regs_struct,
    memory: std::fs::File,
}

impl Hijacked {
    /// Takes over a process that sleeps in a system call.
    pub fn new(pid: i32) -> Result<Self> {
        let memory = std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        let pid = Pid::from_raw(pid);
        ptrace::attach(pid).context("ptrace")?;
        ensure!(matches!(waitpid(pid, None)?, WaitStatus::Stopped(_, Signal::SIGSTOP)), "it did not stop");
        Ok(Self { pid, registers: ptrace::getregs(pid)?, memory })
    }

    /// Makes a system call in its name. Arguments are numbers, or bytes that it gets the address of.
    pub fn call(&mut self, number: libc::c_long, arguments: &[Argument<'_>]) -> Result<nix::Result<u64>> {
        use std::io::{Seek as _, SeekFrom};
        let mut registers = self.registers;
        // Far below what its stack holds (the red zone is 128 bytes).
        let mut scratch = registers.rsp - 32 * 1024;
        let mut values = [0u64; 6];
        for (value, argument) in values.iter_mut().zip(arguments) {
            *value = match argument {
                Argument::Number(number) => *number,
                Argument::Bytes(bytes) => {
                    self.memory.seek(SeekFrom::Start(scratch))?;
                    self.memory.write_all(bytes)?;
                    let at = scratch;
                    scratch += bytes.len().next_multiple_of(64) as u64;
                    at
                }
            };
        }
        // It waits behind a `syscall` instruction, which is executed once more.
        registers.rip -= 2;
        registers.rax = number as u64;
        // Not a system call that the kernel could begin anew.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = values;
        ptrace::setregs(self.pid, registers)?;
        ptrace::step(self.pid, None)?;
        let stopped = waitpid(self.pid, None)?;
        ensure!(
            matches!(stopped, WaitStatus::Stopped(_, Signal::SIGTRAP)),
            "after call {number}: {stopped:?}"
        );
        let result = ptrace::getregs(self.pid)?.rax.cast_signed();
        Ok(match i32::try_from(-result) {
            Ok(errno @ 1..4096) => Err(Errno::from_raw(errno)),
            _ => Ok(result.cast_unsigned()),
        })
    }
}

impl Drop for Hijacked {
    fn drop(&mut self) {
        ptrace::setregs(self.pid, self.registers).ok();
        ptrace::detach(self.pid, None).ok();
    }
}

/// An argument of a system call.
#[derive(Debug, Clone, Copy)]
pub enum Argument<'a> {
    /// As it is.
    Number(u64),
    /// The address of these.
    Bytes(&'a [u8]),
}

impl From<i64> for Argument<'_> {
    fn from(number: i64) -> Self {
        Self::Number(number.cast_unsigned())
    }
}

/// The lines of /proc/PID/status that say what a process may do.
pub fn rights(pid: i32) -> io::Result<Vec<(String, String)>> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let lines = status.lines().filter_map(|line| line.split_once(':'));
    let wanted =
        lines.filter(|(name, _)| name.starts_with("Cap") || *name == "NoNewPrivs" || *name == "Seccomp");
    Ok(wanted.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}
