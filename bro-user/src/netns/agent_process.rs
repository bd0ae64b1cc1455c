//! The process of an agent: one that this process has forked in advance, while it had a single thread, or one that was executed.
//!
//! A fork costs a fraction of what it takes to execute the program once more and to link it, and a client waits for it; but only a
//! process with one thread can fork, so there is one for each forwarder. The agents after the first are executed.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stdin, dup2_stdout};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An agent that is in no other namespace yet, if there is one: it waits at its channel until it is told where to go.
#[derive(Debug, Default)]
pub struct SpareAgent(Mutex<Option<WaitingAgent>>);

#[derive(Debug)]
struct WaitingAgent {
    process: ForkedAgent,
    channel: OwnedFd,
}

impl SpareAgent {
    /// Forks it. It has this process's rights as an executed one would have them later, and none of its descriptors. None where that
    /// cannot be done: then agents are executed.
    ///
    /// To be called while this process has a single thread, and after the relay process was forked, which may not have the channel.
    #[must_use]
    pub fn fork() -> Self {
        let forked = Self::try_fork().inspect_err(|error| tracing::debug!(%error, "no agent in advance"));
        Self(Mutex::new(forked.ok()))
    }

    fn try_fork() -> anyhow::Result<WaitingAgent> {
        let (ours, theirs) = super::pair()?;
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
        if let Some(pid) = bro_relay::sys::fork()? {
            let process = ForkedAgent::new(pid)?;
            return Ok(WaitingAgent { process, channel: ours });
        }
        // Descriptors that the log has are not this process's any more: their numbers are going to be others'.
        let _no_log = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::default());
        let served = serve(theirs, &null);
        bro_relay::sys::exit_now(i32::from(served.is_err()))
    }

    /// The agent, once.
    fn take(&self) -> Option<WaitingAgent> {
        let waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        waiting.filter(|waiting| !bro_relay::sys::exited(&waiting.process.pidfd))
    }
}

/// What the child does.
fn serve(channel: OwnedFd, null: &std::fs::File) -> anyhow::Result<()> {
    dup2_stdin(&channel)?;
    dup2_stdout(null)?;
    // The values that own them are never dropped: this process ends by `exit_now`.
    std::mem::forget(channel);
    bro_relay::sys::close_all_in_child(3)?;
    prctl::set_name(c"bro-agent")?;
    if !nix::unistd::geteuid().is_root() {
        // What an executed program gets by root's right alone it does not get either.
        bro_sockmap::capabilities::drop_the_kernel_relays(false);
    }
    bro_relay::netns::agent::run()
}

/// A child that was forked, and is this value's to end and to wait for.
#[derive(Debug)]
pub struct ForkedAgent {
    pid: Pid,
    pidfd: OwnedFd,
    /// How it ended, once that is known.
    status: Option<ExitStatus>,
}

impl ForkedAgent {
    fn new(pid: i32) -> io::Result<Self> {
        let pidfd = bro_relay::sys::pidfd_open(pid)?;
        Ok(Self { pid: Pid::from_raw(pid), pidfd, status: None })
    }

    fn look(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::from_raw(code << 8)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::from_raw(signal as i32)),
                _ => None,
            };
        }
        self.status
    }

    async fn wait(&mut self) -> io::Result<ExitStatus> {
        let watched = crate::sys::watch(self.pidfd.try_clone()?, Interest::READABLE)?;
        loop {
            let mut readable = watched.readable().await?;
            if let Some(status) = self.look() {
                return Ok(status);
            }
            readable.clear_ready();
        }
    }
}

impl Drop for ForkedAgent {
    fn drop(&mut self) {
        if self.look().is_some() {
            return;
        }
        // It is this process's child and was not waited for, so the number is its own.
        kill(self.pid, Signal::SIGKILL).ok();
        // What is still to be waited for when this process ends is waited for by its own parent.
        let (Ok(runtime), Ok(pidfd)) = (tokio::runtime::Handle::try_current(), self.pidfd.try_clone()) else {
            return;
        };
        let pid = self.pid;
        drop(runtime.spawn(async move {
            if let Ok(watched) = crate::sys::watch(pidfd, Interest::READABLE) {
                drop(watched.readable().await);
            }
            waitpid(pid, Some(WaitPidFlag::WNOHANG)).ok();
        }));
    }
}

/// An agent's process. It ends with this value, at the latest.
#[derive(Debug)]
pub enum AgentProcess {
    /// It was executed.
    Executed(tokio::process::Child),
    /// It was forked.
    Forked(ForkedAgent),
}

impl AgentProcess {
    /// Takes the spare one, or executes one; with the channel to it.
    ///
    /// # Errors
    /// When no process can be made.
    pub fn start(spare: &SpareAgent) -> anyhow::Result<(Self, AsyncFd<OwnedFd>)> {
        let (process, channel) = match spare.take() {
            Some(WaitingAgent { process, channel }) => (Self::Forked(process), channel),
            None => Self::execute()?,
        };
        Ok((process, crate::sys::watch(channel, Interest::READABLE | Interest::WRITABLE)?))
    }

    fn execute() -> anyhow::Result<(Self, OwnedFd)> {
        let (ours, theirs) = super::pair()?;
        let agent = tokio::process::Command::new("/proc/self/exe")
            .arg("netns-agent")
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the process that makes sockets in the target's network namespace")?;
        Ok((Self::Executed(agent), ours))
    }

    /// Has it ended?
    pub fn has_ended(&mut self) -> bool {
        match self {
            Self::Executed(child) => matches!(child.try_wait(), Ok(Some(_))),
            Self::Forked(forked) => forked.look().is_some(),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        match self {
            Self::Executed(child) => child.wait().await,
            Self::Forked(forked) => forked.wait().await,
        }
    }
}
