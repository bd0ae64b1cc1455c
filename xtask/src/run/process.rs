//! The processes of `cargo xtask run`: each is this same binary in another part, and none outlives the task.

use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

/// Names the process that a part must not outlive.
pub const PARENT: &str = "BRO_XTASK_PARENT";

/// A command that runs this binary as `xtask part ARGS`. In a process group of its own, so that Ctrl-C reaches the task
/// alone, which then ends its parts in order.
pub fn part(args: &[&str]) -> Command {
    // Not current_exe(): this name still works when cargo has replaced the file.
    let mut command = Command::new("/proc/self/exe");
    command.arg("part").args(args).env(PARENT, std::process::id().to_string()).process_group(0);
    command
}

/// Asks the kernel to send this process a signal when the thread that started it ends, however that happens.
pub fn die_with_parent(by: Signal) -> Result<()> {
    nix::sys::prctl::set_pdeathsig(by).context("prctl(PR_SET_PDEATHSIG)")?;
    // The parent may have died before the request was made; then the signal would never be sent.
    let parent = std::env::var(PARENT).context("a part is started by `cargo xtask run`, not by hand")?;
    ensure!(parent == nix::unistd::getppid().to_string(), "the task that started this part is gone");
    Ok(())
}

/// A child that is killed and waited for when it goes out of scope.
pub struct Guarded(pub Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        // Both fail only when the child has ended and been waited for already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// What a child writes, line by line, each waited for until a deadline.
#[derive(Debug)]
pub struct Lines(Receiver<String>);

impl Lines {
    /// Reads `source` in a thread of its own until it ends.
    pub fn of(source: impl Read + Send + 'static) -> Self {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(source).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self(lines)
    }

    /// The next line for which `wanted` is true; the ones before it are kept in `seen`.
    pub fn until(
        &self,
        limit: Duration,
        seen: &mut Vec<String>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            match self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    seen.push(line.clone());
                    if wanted(&line) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("nothing came for {limit:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("it ended"),
            }
        }
    }

    /// Whether the source has ended and every line of it was taken.
    pub fn has_ended(&self) -> bool {
        self.0.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// Every line that is there by now.
    pub fn so_far(&self) -> impl Iterator<Item = String> {
        self.0.try_iter()
    }
}
