//! How everything of a run is started: by a part of this task that does what systemd and podman do between fork and exec,
//! which is to enter the container's namespaces, to hand over a listening socket, to become another user.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, User};

use super::memory;
use crate::run::namespace;
use crate::run::process::{PARENT, die_with_parent};
use crate::run::runtime::{self, Runtime, SECCOMP};

/// What the part is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Enter the namespaces of this process
    #[arg(long)]
    inside: Option<i32>,
    /// Stdin is a listening socket: pass it on as descriptor 3, as systemd does and as nginx does to its successor
    #[arg(long)]
    socket: bool,
    /// Stdout is the socket at a seccomp profile's listenerPath: pass it on as descriptor 4
    #[arg(long)]
    adopt: bool,
    /// Have the filter of such a profile, and send its notification descriptor to this socket, as an OCI runtime does
    #[arg(long, value_name = "LISTENER-PATH")]
    notified: Option<String>,
    /// Have that filter, and nothing notified
    #[arg(long, conflicts_with = "notified")]
    filtered: bool,
    /// Become this user
    #[arg(long)]
    user: Option<String>,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// The part itself: it becomes the program.
pub fn main(args: &Args) -> Result<()> {
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]);
    for name in ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "JOURNAL_STREAM"] {
        command.env_remove(name);
    }
    if args.socket {
        // SAFETY: this process is single-threaded and nothing in it owns descriptor 3 so far.
        let socket = unsafe { nix::unistd::dup2_raw(std::io::stdin(), 3) }.context("dup2 to descriptor 3")?;
        // Without close-on-exec, which is the point; from here on the program owns it.
        std::mem::forget(socket);
        nix::unistd::dup2_stdin(File::open("/dev/null")?).context("stdin from /dev/null")?;
        command.env("LISTEN_PID", std::process::id().to_string()).env("LISTEN_FDS", "1");
        command.env("LISTEN_FDNAMES", "bench.socket").env("NGINX", "3;");
    }
    if args.adopt {
        // SAFETY: as above, for descriptor 4.
        let socket =
            unsafe { nix::unistd::dup2_raw(std::io::stdout(), 4) }.context("dup2 to descriptor 4")?;
        std::mem::forget(socket);
        nix::unistd::dup2_stdout(std::io::stderr()).context("stdout to where stderr leads")?;
        command.env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", format!("bench.socket:{SECCOMP}"));
    }
    // On the host, to which the socket belongs.
    let runtime = args.notified.as_deref().map(Runtime::connect).transpose()?;
    if let Some(container) = args.inside {
        enter(container)?;
    }
    if let Some(name) = &args.user {
        let user = User::from_name(name)?.with_context(|| format!("no user {name}"))?;
        nix::unistd::setgroups(&[])?;
        nix::unistd::setgid(user.gid)?;
        nix::unistd::setuid(user.uid)?;
    }
    // Last: a change of credentials makes the kernel forget the request.
    die_with_parent(Signal::SIGTERM)?;
    if let Some(runtime) = runtime {
        runtime.notify()?;
    }
    if args.filtered {
        runtime::only_filter()?;
    }
    Err(command.exec()).with_context(|| format!("cannot run {}", args.command[0]))
}

/// Enters the namespaces of the container, and is the same user there.
fn enter(container: i32) -> Result<()> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let rootless = namespace::enter(container)?;
    if rootless {
        // There one is root, which some programs refuse to be and others try to cease to be: back to who one was.
        unshare(CloneFlags::CLONE_NEWUSER).context("a user namespace in the container's")?;
        std::fs::write("/proc/self/setgroups", "deny").ok();
        std::fs::write("/proc/self/uid_map", format!("{user} 0 1")).context("uid_map")?;
        std::fs::write("/proc/self/gid_map", format!("{group} 0 1")).context("gid_map")?;
    }
    Ok(())
}

/// The seccomp filter that a program is started with.
#[derive(Debug, Clone, Default)]
pub enum Filter {
    #[default]
    None,
    /// One that allows everything: what a container's filter costs.
    Allowing,
    /// As an OCI runtime does it with a profile whose `listenerPath` this is.
    Notifying(String),
}

/// How to start a program.
#[derive(Debug, Default)]
pub struct Launch<'a> {
    /// In the namespaces of this process.
    pub inside: Option<u32>,
    /// With this listening socket.
    pub socket: Option<OwnedFd>,
    /// With the socket at a seccomp profile's `listenerPath`, too.
    pub adopt: Option<OwnedFd>,
    pub filter: Filter,
    pub user: Option<&'a str>,
}

impl Launch<'_> {
    /// The command; stdin is the socket or nothing. Its stdout is the caller's affair.
    pub fn command(self, program: &Path, args: &[String]) -> Result<Command> {
        // Whatever is started may have as many descriptors as this user is allowed.
        memory::more_descriptors();
        let mut command = Command::new("/proc/self/exe");
        command.args(["bench", "launch"]).env(PARENT, std::process::id().to_string()).process_group(0);
        if let Some(container) = self.inside {
            command.arg(format!("--inside={container}"));
        }
        if let Some(user) = self.user {
            command.arg(format!("--user={user}"));
        }
        if self.adopt.is_some() {
            command.arg("--adopt");
        }
        match self.filter {
            Filter::None => {}
            Filter::Allowing => drop(command.arg("--filtered")),
            Filter::Notifying(listener_path) => drop(command.arg(format!("--notified={listener_path}"))),
        }
        match self.socket {
            Some(socket) => command.arg("--socket").stdin(Stdio::from(socket)),
            None => command.stdin(Stdio::null()),
        };
        command.arg("--").arg(program).args(args);
        Ok(command)
    }

    /// Starts it; what it says goes to `log`.
    pub fn start(self, program: &Path, args: &[String], log: &Path) -> Result<Launched> {
        let file = File::create(log).context("a log file")?;
        let adopt = self.adopt.as_ref().map(OwnedFd::try_clone).transpose()?;
        let mut command = self.command(program, args)?;
        let stdout = adopt.map_or_else(|| file.try_clone().map(Stdio::from), |socket| Ok(socket.into()))?;
        let child = command.stdout(stdout).stderr(file).spawn();
        Ok(Launched(child.with_context(|| format!("cannot start {}", program.display()))?))
    }

    /// Runs it to its end, which must come within the limit; what it wrote to stdout.
    pub fn output(self, program: &Path, args: &[String], limit: Duration) -> Result<String> {
        let mut command = self.command(program, args)?;
        let mut launched = Launched(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
        let written = gather(launched.0.stdout.take());
        let said = gather(launched.0.stderr.take());
        let written = written.recv_timeout(limit);
        let written = written.ok().with_context(|| format!("not done within {limit:?}"))?;
        // Both end with it.
        let said = said.recv_timeout(limit).unwrap_or_default();
        let status = launched.0.wait()?;
        ensure!(status.success(), "{}", last_line(&said).trim_start_matches("xtask: "));
        Ok(written)
    }
}

/// Reads it all in a thread of its own.
fn gather(source: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, all) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        source.map(|mut source| source.read_to_end(&mut bytes));
        sender.send(String::from_utf8_lossy(&bytes).into_owned()).ok();
    });
    all
}

/// The last line that says something.
pub fn last_line(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing")
}

/// This very program.
pub fn this_task() -> &'static Path {
    Path::new("/proc/self/exe")
}

/// A program and whatever it starts: its process group, ended when this goes out of scope.
#[derive(Debug)]
pub struct Launched(pub Child);

impl Launched {
    /// Its process group.
    pub fn group(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap_or(i32::MAX)
    }

    pub fn stdout(&mut self) -> Result<ChildStdout> {
        self.0.stdout.take().context("stdout is a pipe")
    }

    /// Whether it ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }

    fn ends_within(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.has_ended() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let group = Pid::from_raw(self.group());
        if !self.has_ended() {
            killpg(group, Signal::SIGTERM).ok();
            self.ends_within(Duration::from_secs(4));
        }
        // What it has left behind, too. There is no such group when it has left nothing.
        killpg(group, Signal::SIGKILL).ok();
        self.0.wait().ok();
    }
}
