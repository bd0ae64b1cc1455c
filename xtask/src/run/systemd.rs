//! What systemd does for a socket unit: it listens, accepts nothing, and at the first client starts the program with the
//! socket as descriptor 3 and LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES in its environment.

use std::collections::HashMap;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::process::{Guarded, Lines, die_with_parent, part};
use super::runtime::{ListenerPath, SECCOMP};

/// A socket unit.
pub struct Socket {
    listener: TcpListener,
    /// Where clients find it.
    pub address: SocketAddr,
}

impl Socket {
    /// Listens on a loopback port of the kernel's choice.
    pub fn listen() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on 127.0.0.1")?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// To poll for the first client.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Waits for the first client, which stays in the backlog.
    pub fn wait_for_client(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => bail!("no client came for {limit:?}"),
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("poll"),
            }
        }
    }

    /// Starts `bro ARGS` with this socket, and with the one at a profile's `listenerPath`.
    pub fn activate(
        &self,
        bro: &Path,
        args: &[String],
        listener_path: Option<&ListenerPath>,
    ) -> Result<Forwarder> {
        // The sockets travel as stdin and stdout: the part moves them to descriptors 3 and 4 just before it becomes bro.
        let passed = OwnedFd::from(self.listener.try_clone()?);
        let bro = bro.to_str().context("the path of bro is no UTF-8")?;
        let mut command = match listener_path {
            Some(listener_path) => {
                let mut command = part(&["forwarder", "--adopt", "--", bro]);
                command.stdout(Stdio::from(listener_path.passed()?));
                command
            }
            None => part(&["forwarder", "--", bro]),
        };
        let mut child = command
            .args(args)
            .stdin(Stdio::from(passed))
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start bro")?;
        let log = Lines::of(child.stderr.take().context("stderr is a pipe")?);
        Ok(Forwarder { process: Guarded(child), log, seen: Vec::new() })
    }
}

/// A running `bro forward`.
pub struct Forwarder {
    process: Guarded,
    log: Lines,
    seen: Vec<String>,
}

impl Forwarder {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Waits for the line that bro logs when a connection has ended, and gives its fields.
    pub fn next_end(&mut self) -> Result<Fields> {
        let ended = |line: &str| line.contains("reason=") && line.contains("relay=");
        match self.log.until(Duration::from_secs(10), &mut self.seen, ended) {
            Ok(line) => Ok(Fields::of(&line)),
            Err(error) => Err(error.context(format!("bro's log: {}", self.story()))),
        }
    }

    /// What bro has logged since the last call.
    pub fn new_lines(&mut self) -> Vec<String> {
        let lines: Vec<String> = self.log.so_far().collect();
        self.seen.extend(lines.iter().cloned());
        lines
    }

    /// All it has logged, for an error message.
    pub fn story(&mut self) -> String {
        self.new_lines();
        if self.seen.is_empty() { "(nothing logged)".into() } else { self.seen.join("\n  ") }
    }

    /// What it says of why it relays what it was to have adopted.
    pub fn on_what_it_relays(&mut self) -> Option<String> {
        self.new_lines();
        let line = self.seen.iter().find(|line| line.contains("not adopted"))?;
        Some(line.split_once(" WARN ").map_or(line.as_str(), |(_, said)| said.trim()).to_owned())
    }

    /// What it says of the kernel relay: that it has one, or why not and how to mend that.
    pub fn on_the_kernel_relay(&mut self) -> Option<String> {
        let ours = |line: &str| line.contains("kernel relay");
        self.new_lines();
        if !self.seen.iter().any(|line| ours(line)) {
            // It is loaded beside the first connection and may take a little longer than that.
            self.log.until(Duration::from_secs(3), &mut self.seen, ours).ok()?;
        }
        let line = self.seen.iter().find(|line| ours(line))?;
        Some(line.split_once(" INFO ").map_or(line.as_str(), |(_, said)| said.trim()).to_owned())
    }

    /// How the bytes so far were moved, in percent, as `bro status` has it; nothing where that has no directory.
    pub fn shares(&self) -> Option<String> {
        let base = match std::env::var_os("XDG_RUNTIME_DIR") {
            _ if nix::unistd::geteuid().is_root() => "/run".into(),
            Some(runtime) => PathBuf::from(runtime),
            None => format!("/run/user/{}", nix::unistd::geteuid()).into(),
        };
        let mut status = UnixStream::connect(base.join(format!("bro/{}/status.sock", self.pid()))).ok()?;
        status.set_read_timeout(Some(Duration::from_secs(3))).ok()?;
        status.shutdown(std::net::Shutdown::Write).ok()?;
        let mut report = String::new();
        let _length = status.read_to_string(&mut report).ok()?;
        let report: serde_json::Value = serde_json::from_str(&report).ok()?;
        let bytes =
            ["kernel", "spliced", "copied"].map(|way| (way, report["total"][way].as_u64().unwrap_or(0)));
        let all: u64 = bytes.iter().map(|(_, bytes)| bytes).sum();
        let shares = bytes.iter().filter(|(_, bytes)| *bytes > 0);
        let shares = shares.map(|(way, bytes)| format!("{:.1} % {way}", *bytes as f64 * 100.0 / all as f64));
        Some(shares.collect::<Vec<_>>().join(", "))
    }

    /// Ends it, and makes sure that it ended well.
    pub fn end(mut self) -> Result<()> {
        let status = self.terminate()?;
        ensure!(status.success(), "bro ended with {status} on SIGTERM; its log: {}", self.story());
        Ok(())
    }

    fn terminate(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.process.0.try_wait()? {
            return Ok(status);
        }
        kill(Pid::from_raw(self.pid().try_into()?), Signal::SIGTERM).context("SIGTERM to bro")?;
        // Its log ends when it does.
        self.log.until(Duration::from_secs(10), &mut self.seen, |_| false).ok();
        ensure!(self.log.has_ended(), "bro did not end on SIGTERM; its log: {}", self.story());
        Ok(self.process.0.wait()?)
    }

    /// Whether it has exited by itself.
    pub fn has_exited(&mut self) -> Result<bool> {
        Ok(self.process.0.try_wait()?.is_some())
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // What does not end so is killed, when `process` is dropped.
        self.terminate().ok();
    }
}

/// The `name=value` fields of a log line.
#[derive(Debug)]
pub struct Fields(HashMap<String, String>);

impl Fields {
    fn of(line: &str) -> Self {
        let fields = line.split_whitespace().filter_map(|word| word.split_once('='));
        Self(fields.map(|(name, value)| (name.into(), value.trim_matches('"').into())).collect())
    }

    /// The value of a field, `?` when the line has none.
    pub fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("?", String::as_str)
    }
}

/// What happens between fork and exec of an activated program. LISTEN_PID must be the program's own, which is known
/// only here; exec keeps it.
pub fn become_forwarder(adopt: bool, command: &[String]) -> Result<()> {
    // Not SIGKILL: bro has a runtime directory to remove. It ends soon, for the service and the client go as well.
    die_with_parent(Signal::SIGTERM)?;
    let (program, args) = command.split_first().context("a program to become")?;
    // SAFETY: nothing in this process owns descriptor 3: it is single-threaded and has opened nothing so far.
    let socket = unsafe { nix::unistd::dup2_raw(std::io::stdin(), 3) }.context("dup2 to descriptor 3")?;
    // Without close-on-exec, which is the point; from here on the program owns it.
    std::mem::forget(socket);
    nix::unistd::dup2_stdin(std::fs::File::open("/dev/null")?).context("stdin from /dev/null")?;
    if adopt {
        // SAFETY: as above, for descriptor 4.
        let socket =
            unsafe { nix::unistd::dup2_raw(std::io::stdout(), 4) }.context("dup2 to descriptor 4")?;
        std::mem::forget(socket);
        nix::unistd::dup2_stdout(std::io::stderr()).context("stdout to where stderr leads")?;
    }
    let names = if adopt { format!("demo.socket:{SECCOMP}") } else { "demo.socket".into() };
    let failed = Command::new(program)
        .args(args)
        .env("LISTEN_PID", std::process::id().to_string())
        .env("LISTEN_FDS", if adopt { "2" } else { "1" })
        .env("LISTEN_FDNAMES", names)
        // What an outer service manager said is not meant for it.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_PID")
        .env_remove("WATCHDOG_USEC")
        .env_remove("JOURNAL_STREAM")
        .exec();
    Err(failed).with_context(|| format!("cannot run {program}"))
}

#[cfg(test)]
mod tests {
    use super::Fields;

    #[test]
    fn fields_are_read_from_a_log_line() {
        let fields = Fields::of("INFO connection ended conn=1 relay=splice reason=\"eof\" to_client=12");
        assert_eq!(fields.get("relay"), "splice");
        assert_eq!(fields.get("reason"), "eof");
        assert_eq!(fields.get("cold_start_ms"), "?");
    }
}
