//! `bro helper`: becomes another command inside a container's network namespace, with the sockets that systemd passed.
//!
//! No setuid file and no file capability: a container's owner also owns its user namespace, and a process that joins that first may
//! join the network namespace. It is the same process that goes on as the command, so `LISTEN_PID` stays right.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use bro_relay::netns::agent;
use bro_relay::sys;
use nix::errno::Errno;
use nix::libc;

use crate::cli::Helper;
use crate::exit::Failure;
use crate::podman::container;
use crate::systemd::listen_fds::{self, Environment};

/// Runs `bro helper`; returns only when the command cannot be had. Called before any thread is started: setns(2) lets no process
/// with threads join a user namespace.
///
/// # Errors
/// Each with the exit code of [`crate::exit`].
pub fn run(options: &Helper) -> anyhow::Result<std::convert::Infallible> {
    // Before anything is opened: that could take the number of a descriptor that was promised and is missing.
    check(Environment::read().passed_to(std::process::id())?.len())?;
    let pid = match (options.pid, &options.container) {
        (Some(pid), _) => pid,
        (None, Some(name)) => container::running(name).ok_or_else(|| {
            Failure::NotFound(format!(
                "no container “{name}” of this user is running (see `podman ps --all`)"
            ))
        })?,
        (None, None) => unreachable!("clap asks for one of them"),
    };
    enter(pid)?;
    let (program, arguments) =
        options.command.split_first().ok_or_else(|| Failure::Usage("no CMD".into()))?;
    // This process's own descriptors are close-on-exec.
    let error = Command::new(program).args(arguments).exec();
    let sentence = format!("cannot execute {}: {error}", program.to_string_lossy());
    Err(match error.kind() {
        io::ErrorKind::NotFound => Failure::CommandNotFound(sentence),
        // execvp(3) also says so when there is no such file, and only a folder of PATH may not be searched.
        io::ErrorKind::PermissionDenied if !is_somewhere(program) => Failure::CommandNotFound(format!(
            "cannot execute {}: there is no such command",
            program.to_string_lossy()
        )),
        _ => Failure::CommandNotExecutable(sentence),
    }
    .into())
}

/// Whether there is a file that the command could mean.
fn is_somewhere(program: &OsStr) -> bool {
    if program.as_encoded_bytes().contains(&b'/') {
        return true;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Joins the network namespace of the process.
fn enter(pid: i32) -> anyhow::Result<()> {
    let gone = || Failure::NotFound(format!("process {pid} does not exist"));
    // First the process, then its namespace: if the process is still there afterwards, the namespace is its own.
    let process = sys::pidfd_open(pid).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => gone(),
        _ => Failure::NotFound(format!("process {pid} cannot be looked at: {error}")),
    })?;
    let opened = File::open(format!("/proc/{pid}/ns/net"));
    if sys::exited(&process) {
        return Err(gone().into());
    }
    let netns = opened.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Failure::NotPermitted(format!(
            "process {pid} belongs to another user: run bro as that user, or as root"
        )),
        _ => Failure::NotFound(format!("the network namespace of process {pid} cannot be opened: {error}")),
    })?;
    agent::join(netns.as_fd()).map_err(|errno| match errno {
        Errno::EPERM | Errno::EACCES => Failure::NotPermitted(format!(
            "the network namespace of process {pid} belongs to another user: run bro as that user, or as root"
        ))
        .into(),
        errno => anyhow::anyhow!("cannot enter the network namespace of process {pid}: {}", errno.desc()),
    })
}

/// The passed descriptors are there, and survive this exec like the last one: nothing here makes them close-on-exec.
fn check(passed: usize) -> Result<(), Failure> {
    for number in (listen_fds::FIRST..).take(passed) {
        // Forgotten, not dropped: it belongs to the command.
        let _descriptor = std::mem::ManuallyDrop::new(sys::adopt(number).map_err(|error| {
            Failure::NoSocket(format!("LISTEN_FDS promises descriptor {number}, which is not there: {error}"))
        })?);
    }
    Ok(())
}
