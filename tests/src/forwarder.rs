//! A running `bro forward`: started as systemd would start it, watched, and certainly ended.

use std::ffi::OsString;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_user::commands::status::Report;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::log::{Closing, Log};
use crate::netns::Namespace;
use crate::peers::{Listener, PATIENCE};
use crate::programs::Programs;
use crate::scratch::Scratch;
use crate::{bro, process, sys};

/// How it is to be started.
#[derive(Debug, Default)]
pub struct Setup {
    arguments: Vec<OsString>,
    sockets: Vec<OwnedFd>,
    names: Vec<String>,
    launch: Vec<String>,
    through: Vec<String>,
    environment: Vec<(OsString, OsString)>,
    pass_nothing: bool,
    without_forward: bool,
    tools: Option<PathBuf>,
    readable_copy: bool,
    /// The user that it runs as, whose its runtime directory is to be.
    owner: Option<u32>,
}

impl Setup {
    /// Nothing but `bro forward`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same without `forward`.
    #[must_use]
    pub fn bare() -> Self {
        Self { without_forward: true, ..Self::default() }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// `--netns` for `namespace`.
    #[must_use]
    pub fn netns(self, namespace: &Namespace) -> Self {
        self.arg("--netns").arg(namespace.path())
    }

    /// `--pid` for `namespace`.
    #[must_use]
    pub fn pid(self, namespace: &Namespace) -> Self {
        self.arg("--pid").arg(namespace.pid().to_string())
    }

    /// Passes `listener` as systemd does, under systemd's own name for a nameless one.
    #[must_use]
    pub fn socket(self, listener: &Listener) -> Self {
        self.named(listener, "unknown")
    }

    /// Passes `listener` under `name`.
    #[must_use]
    pub fn named(self, listener: &Listener, name: &str) -> Self {
        let fd = listener.as_fd().try_clone_to_owned().expect("a descriptor can be duplicated");
        self.descriptor(fd, name)
    }

    /// Passes any descriptor as if it were a listening socket.
    #[must_use]
    pub fn descriptor(mut self, fd: OwnedFd, name: &str) -> Self {
        self.sockets.push(fd);
        self.names.push(name.to_owned());
        self
    }

    /// Leaves the descriptors open but says nothing of them (no `LISTEN_` variable).
    #[must_use]
    pub const fn pass_nothing(mut self) -> Self {
        self.pass_nothing = true;
        self
    }

    /// An option of `peer launch`.
    #[must_use]
    pub fn launch(mut self, option: impl Into<String>) -> Self {
        self.launch.push(option.into());
        self
    }

    /// Runs a copy of it as the user `uid` who has the rights to load the kernel relay, as `AmbientCapabilities=` gives them. Needs
    /// root.
    #[must_use]
    pub fn ambient(mut self, uid: u32) -> Self {
        let caps = "+bpf,+net_admin,+perfmon";
        let (user, inheritable, ambient) =
            (format!("--reuid={uid}"), format!("--inh-caps={caps}"), format!("--ambient-caps={caps}"));
        let group = format!("--regid={uid}");
        self.owner = Some(uid);
        self.through = ["setpriv".into(), user, group, "--clear-groups".into(), inheritable, ambient].into();
        self.readable_copy = true;
        self
    }

    /// Runs it, and all that it starts, under a filter that kills what leaves half of an argument undefined.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.through = [bro::helper().display().to_string(), "strict".into()].into();
        self
    }

    /// Runs it by a command, which becomes it.
    #[must_use]
    pub fn through(mut self, words: [&str; 2]) -> Self {
        self.through = words.map(Into::into).into();
        self
    }

    /// Runs it without a capability that its user has otherwise, as `CapabilityBoundingSet=` does. Needs root.
    #[must_use]
    pub fn without(mut self, capability: &str) -> Self {
        let less = format!("-{capability}");
        self.through =
            ["setpriv".into(), format!("--bounding-set={less}"), format!("--inh-caps={less}")].into();
        self
    }

    /// A variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Answers where `bro status` looks for a user's forwarders, if `folder` is the user's runtime directory ([`bro_of`] sees it there).
    #[must_use]
    pub fn found_in(self, folder: &Path) -> Self {
        let own = folder.join("bro/web");
        std::fs::create_dir_all(&own).expect("a folder can be made");
        self.env("RUNTIME_DIRECTORY", own)
    }

    /// Programs that come first on the PATH.
    #[must_use]
    pub fn tools(mut self, folder: PathBuf) -> Self {
        self.tools = Some(folder);
        self
    }

    /// Runs a copy of it, [`Forwarder::program`], which the test may change.
    #[must_use]
    pub const fn copy(mut self) -> Self {
        self.readable_copy = true;
        self
    }

    /// Runs it as the user `uid`, from a copy that this user can read. Needs root.
    #[must_use]
    pub fn user(mut self, uid: u32) -> Self {
        self.readable_copy = true;
        self.owner = Some(uid);
        self.launch(format!("uid={uid}"))
    }

    /// Starts it.
    pub fn start(self) -> Result<Forwarder> {
        let scratch = Scratch::new()?;
        let mut program = bro::binary().clone();
        if self.readable_copy {
            program = bro::copy(&program, scratch.path())?;
        }
        std::os::unix::fs::chown(scratch.path(), self.owner, None)?;
        let mut command = Command::new(bro::helper());
        command.arg("launch");
        if !self.pass_nothing && !self.sockets.is_empty() {
            command.arg(format!("listen-fds={}", self.sockets.len()));
            command.arg(format!("listen-names={}", self.names.join(":")));
        }
        // The test's own come last, and so prevail.
        command.args(&self.launch).arg("--").args(&self.through).arg(program);
        if !self.without_forward {
            command.arg("forward");
        }
        command.args(&self.arguments);
        // The tests' unix sockets are in folders that are open to their own user alone; a test about other users says so.
        let said = self.arguments.iter().any(|one| one.as_encoded_bytes().starts_with(b"--unix-identity"));
        if !self.without_forward && !said {
            command.arg("--unix-identity=forwarder");
        }
        // What the machine's own service manager may have given to the tests is not meant for the program.
        for name in
            ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "RUST_LOG"]
        {
            command.env_remove(name);
        }
        for name in ["WATCHDOG_PID", "JOURNAL_STREAM", "INVOCATION_ID", "RUST_BACKTRACE"] {
            command.env_remove(name);
        }
        // cargo's, for tests: the loader would look for each library in a hundred folders.
        command.env_remove("LD_LIBRARY_PATH");
        // Of its own, so that what a killed one leaves there goes with the test.
        command.env("RUNTIME_DIRECTORY", scratch.path());
        command.envs(self.environment);
        if let Some(tools) = self.tools {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let all = std::iter::once(tools).chain(std::env::split_paths(&path).collect::<Vec<_>>());
            command.env("PATH", std::env::join_paths(all)?);
        }
        let borrowed: Vec<BorrowedFd<'_>> = self.sockets.iter().map(OwnedFd::as_fd).collect();
        sys::pass_fds(&mut command, &borrowed)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Forwarder::spawn(command, scratch)
    }
}

/// The running program. Dropping it kills it and everything it has started.
#[derive(Debug)]
pub struct Forwarder {
    child: Child,
    log: Log,
    status: Option<ExitStatus>,
    scratch: Scratch,
}

impl Forwarder {
    /// Starts `command`, which runs `peer launch` with stderr piped.
    pub fn spawn(mut command: Command, scratch: Scratch) -> Result<Self> {
        let mut child = command.spawn().context("starting the program under test")?;
        let log = Log::collect(child.stderr.take().context("stderr is piped")?);
        Ok(Self { child, log, status: None, scratch })
    }

    /// The program's file, for one that runs from a copy.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        self.scratch.join("bro")
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What it says.
    #[must_use]
    pub const fn log(&self) -> &Log {
        &self.log
    }

    /// The closing lines of `count` connections.
    pub fn closings(&self, count: usize) -> Result<Vec<Closing>> {
        self.log.closings(count, PATIENCE)
    }

    /// The closing line of the only connection so far.
    pub fn closing(&self) -> Result<Closing> {
        let mut all = self.closings(1)?;
        ensure!(all.len() == 1, "more than one closing line: {all:?}");
        Ok(all.remove(0))
    }

    /// What it says of itself, as `bro status` asks for it. (Not for one that runs as another user.)
    pub fn report(&self) -> Result<Report> {
        let path = self.status_socket();
        let mut stream = std::os::unix::net::UnixStream::connect(&path)
            .with_context(|| format!("nothing answers at {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        std::io::Write::write_all(&mut stream, b"status\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Where it answers for its status.
    #[must_use]
    pub fn status_socket(&self) -> PathBuf {
        self.scratch.join("status.sock")
    }

    /// Waits until the kernel relay is loaded, and says where its programs and maps are.
    pub fn kernel_relay(&self) -> Result<Programs> {
        self.log.line(PATIENCE, |line| line.contains("kernel relay loaded"))?;
        Programs::of(self.pid())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), signal)?)
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> Result<bool> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status.is_none())
    }

    /// Its exit status, if it ends within `within`.
    pub fn wait(&mut self, within: Duration) -> Result<Option<ExitStatus>> {
        if self.status.is_none() && process::ends(self.pid(), within)? {
            self.status = Some(self.child.wait()?);
        }
        Ok(self.status)
    }

    /// Expects it to end by itself with `code`, leaving no process behind.
    pub fn expect_exit(&mut self, code: i32) -> Result<()> {
        self.expect_exit_within(code, PATIENCE)
    }

    /// The same, within `within`.
    pub fn expect_exit_within(&mut self, code: i32, within: Duration) -> Result<()> {
        let status = self.wait(within)?.context("it should have ended by now")?;
        ensure!(
            status.code() == Some(code),
            "it ended with {:?} (signal {:?}), not {code}; the log:\n{}",
            status.code(),
            status.signal(),
            self.log.lines().join("\n")
        );
        self.expect_nothing_left()
    }

    /// Expects that none of the processes it started is still there.
    pub fn expect_nothing_left(&self) -> Result<()> {
        let gone = process::eventually(Duration::from_secs(2), || process::members(self.pid()).is_empty());
        let named = |pid: i32| (pid, process::name(pid));
        let left: Vec<_> = process::members(self.pid()).into_iter().map(named).collect();
        ensure!(gone, "processes are left behind: {left:?}");
        ensure!(self.log.ends(Duration::from_secs(2)), "a process of it still holds its stderr");
        Ok(())
    }

    /// SIGTERM, and an exit with 0.
    pub fn stop(mut self) -> Result<Log> {
        self.signal(Signal::SIGTERM)?;
        self.expect_exit(0)?;
        self.expect_no_panic()?;
        Ok(self.log.clone())
    }

    /// Expects that no thread of it has panicked.
    pub fn expect_no_panic(&self) -> Result<()> {
        let lines = self.log.lines();
        let panicked = lines.iter().find(|line| line.contains("panicked at"));
        ensure!(panicked.is_none(), "it panicked: {panicked:?}");
        Ok(())
    }

    /// The process of it that holds the connections.
    #[must_use]
    pub fn relay(&self) -> i32 {
        process::relay(self.pid())
    }

    /// Both of its processes.
    fn both(&self) -> [i32; 2] {
        [self.pid(), self.relay()]
    }

    /// What each of its processes has of its own, in KiB: the control process first.
    pub fn private_kib(&self) -> Result<Vec<u64>> {
        let pids = std::iter::once(self.pid()).chain(process::children(self.pid()));
        pids.map(process::private_kib).collect()
    }

    /// Memory of both of its processes in KiB.
    pub fn memory_kib(&self) -> Result<u64> {
        self.both().into_iter().map(process::memory_kib).sum()
    }

    /// How many descriptors both hold.
    pub fn descriptors(&self) -> Result<usize> {
        self.both().into_iter().map(|pid| Ok(process::descriptors(pid)?.len())).sum()
    }

    /// How many it holds without its own pipes, and how many pipes these are.
    pub fn descriptors_and_pipes(&self) -> Result<(usize, usize)> {
        let (mut others, mut pipes) = (0, 0);
        for pid in self.both() {
            let held = process::descriptors(pid)?;
            let own = process::own_pipes(&held);
            others += held.len() - 2 * own;
            pipes += own;
        }
        Ok((others, pipes))
    }

    /// Expects that in a `span` in which nothing happens it uses next to no processor time. A spin goes on and on; what only takes
    /// its time, like loading the kernel relay, is over at one of the next looks.
    pub fn expect_no_spin(&self, span: Duration) -> Result<()> {
        let used = || self.both().into_iter().map(process::cpu_time).sum::<Result<Duration>>();
        let mut spent = Duration::ZERO;
        for _ in 0..6 {
            let before = used()?;
            std::thread::sleep(span);
            spent = used()? - before;
            if spent <= span / 5 {
                return Ok(());
            }
        }
        anyhow::bail!("it used {spent:?} of processor time in {span:?} without work")
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // Its own session: see `peer launch`.
        let members = process::members(self.pid());
        for pid in members {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        self.child.kill().ok();
        self.child.wait().ok();
        // Seen only when the test fails.
        let lines = self.log.lines();
        println!(
            "the log of the program under test:\n{}",
            lines[lines.len().saturating_sub(60)..].join("\n")
        );
    }
}

/// `bro` with these words, of a user whose runtime directory is `folder`, and for whom nothing is activated. On a terminal of its own,
/// if it has one.
#[must_use]
pub fn bro_of(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new("setsid");
    if words.first() == Some(&"top") {
        command.arg("--ctty");
    }
    if nix::unistd::geteuid().is_root() {
        // Root's are looked for below /run.
        let script = "mkdir -p /run/bro && mount --bind \"$0\" /run/bro && exec \"$@\"";
        command.args(["unshare", "--mount", "sh", "-c", script]).arg(folder.join("bro"));
    }
    command.arg(bro::binary()).args(words);
    command.env("XDG_RUNTIME_DIR", folder).env("XDG_CONFIG_HOME", folder);
    command
}

/// The file `name` in `folder`, as a shell script with `body`.
pub fn script(folder: &Path, name: &str, body: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let (path, text) = (folder.join(name), folder.join(format!("{name}.text")));
    std::fs::write(&text, format!("#!/bin/sh\n{body}\n"))?;
    std::fs::set_permissions(&text, std::fs::Permissions::from_mode(0o755))?;
    bro::copy_executable(&text, &path)?;
    std::fs::remove_file(&text)?;
    Ok(path)
}
