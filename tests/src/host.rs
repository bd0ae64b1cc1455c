//! A real host in a box: Debian with systemd as PID 1, Podman, PostgreSQL, nginx and redis, in namespaces of its own (pid,
//! mount, net, uts, ipc, cgroup), with the `bro` under test as `/usr/local/bin/bro`. Root and mmdebstrap are all it needs: no
//! virtual machine, no container engine.
//!
//! [`Host::boot`] takes about 80 s the first time (the root is then kept in the target directory), a few seconds after that.
//! Everything goes when the value is dropped, and also when the test process is killed: the *keeper* (`host/init.sh`), which
//! holds the host's disk and its PID 1, notices the end of its standard input.
//!
//! `BRO_HOST_CACHE` moves the built roots elsewhere; `BRO_DEBIAN_MIRROR` names the archive to build from when the machine's
//! own apt has no Debian archive configured.

pub mod cases;
mod inside;
pub mod machine;
mod manager;
mod root;
pub mod site;
mod undo;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

pub use inside::Ran;
pub use manager::Manager;

use crate::tier::Need;

const BOOT_DEADLINE: Duration = Duration::from_secs(60);
const KEEPER_DEADLINE: Duration = Duration::from_secs(20);
/// Below the range that the kernel takes clients' own ports from.
const FIRST_PORT: u16 = 20_000;
const INIT: &str = include_str!("../host/init.sh");

/// What [`Host::boot`] cannot do without, for `require!`.
pub const NEEDS: [Need; 2] = [Need::Root, Need::Program("mmdebstrap", "mmdebstrap")];

/// The ordinary users of the host; both have a user manager from boot on (lingering).
pub const USERS: [&str; 2] = ["test", "other"];

/// A booted host. Dropping it kills it and removes every trace.
#[derive(Debug)]
pub struct Host {
    keeper: Child,
    answers: Mutex<Receiver<String>>,
    ready: Option<Ready>,
    run: PathBuf,
    pid: i32,
    booted_in: Duration,
    /// The last port that `free_port` gave away.
    port: AtomicU16,
    /// Shared lock: no other test removes the root below a running host.
    _root: File,
}

impl Host {
    /// Builds the root if it has to, boots it, and waits until systemd and the users' managers say that they are ready.
    pub fn boot() -> Result<Self> {
        let (root, lock) = root::built()?;
        let run = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-host-XXXXXX"))
            .context("no folder for the host's sockets")?;
        std::fs::write(run.join("init.sh"), INIT)?;

        let mut keeper = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh"])
            .arg(run.join("init.sh"))
            .arg("keeper")
            .args([&root, &run])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A group of its own: Ctrl-C is for the test; the keeper then cleans up after it.
            .process_group(0)
            .spawn()
            .context("cannot start the host's keeper")?;
        let answers = Mutex::new(lines_of(keeper.stdout.take().expect("piped above")));
        let mut host = Self {
            keeper,
            answers,
            ready: None,
            run,
            pid: 0,
            booted_in: Duration::ZERO,
            port: AtomicU16::new(FIRST_PORT),
            _root: lock,
        };
        host.start()?;
        host.install(crate::bro::binary(), "/usr/local/bin/bro")?;
        host.check_binary()?;
        Ok(host)
    }

    /// An orderly reboot: everything is stopped, and what a disk would keep (all but /run, /tmp and /dev) is still there.
    pub fn reboot(&mut self) -> Result<()> {
        self.run(&["systemctl", "reboot", "--no-block"])?;
        let deadline = Instant::now() + BOOT_DEADLINE;
        while nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), None).is_ok() {
            ensure!(Instant::now() < deadline, "the host did not go down in {BOOT_DEADLINE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.power_cut()
    }

    /// Kills the host in mid-flight and boots it again from its disk.
    pub fn power_cut(&mut self) -> Result<()> {
        self.tell("kill")?;
        ensure!(self.answer()? == "down", "the keeper did not stop the host");
        self.start()
    }

    /// PID of the host's systemd, as seen from outside.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What its folder for sockets (in the temporary folder) and its cgroup are called.
    #[must_use]
    pub fn name(&self) -> String {
        self.run.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// How long the last boot took.
    #[must_use]
    pub fn booted_in(&self) -> Duration {
        self.booted_in
    }

    fn start(&mut self) -> Result<()> {
        let begin = Instant::now();
        self.ready = Some(Ready::listen(&self.run.join("notify"))?);
        self.tell("boot")?;
        let answer = self.answer()?;
        let pid = answer.strip_prefix("up ").and_then(|pid| pid.parse().ok());
        self.pid = pid.with_context(|| format!("the host did not start:\n{}", self.console()))?;
        self.await_ready(begin)?;
        for user in USERS {
            let unit = format!("user@{}.service", self.uid(user)?);
            self.run(&["systemctl", "start", &unit])?;
        }
        let failed = self.run(&["systemctl", "--failed", "--no-legend", "--plain"])?;
        ensure!(failed.is_empty(), "units of the host failed at boot: {failed}");
        self.booted_in = begin.elapsed();
        Ok(())
    }

    fn await_ready(&self, begin: Instant) -> Result<()> {
        let ready = self.ready.as_ref().context("the socket for the host's readiness is not open")?;
        while !ready.is_there(Duration::from_millis(200)) {
            let alive = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), None).is_ok();
            if !alive || begin.elapsed() > BOOT_DEADLINE {
                bail!("the host did not boot:\n{}", self.console());
            }
        }
        Ok(())
    }

    fn check_binary(&self) -> Result<()> {
        let ran = self.try_run(&["/usr/local/bin/bro", "--version"])?;
        if ran.stderr.contains("GLIBC_") {
            bail!(
                "the bro binary was linked on a newer system than the test host, Debian {}, has: build it for \
                 x86_64-unknown-linux-musl or on that Debian and name it by BRO_BIN ({})",
                root::SUITE,
                ran.stderr.trim()
            );
        }
        ensure!(ran.success(), "the bro binary does not run on the test host: {}", ran.stderr.trim());
        Ok(())
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        let stdin = self.keeper.stdin.as_mut().context("the keeper's stdin is closed")?;
        writeln!(stdin, "{command}").with_context(|| format!("the keeper has ended:\n{}", self.console()))
    }

    fn answer(&self) -> Result<String> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        match answers.recv_timeout(KEEPER_DEADLINE) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("no answer from the keeper:\n{}", self.console()),
            Err(RecvTimeoutError::Disconnected) => bail!("the keeper has ended:\n{}", self.console()),
        }
    }

    /// What the keeper and the host's systemd printed.
    fn console(&self) -> String {
        std::fs::read_to_string(self.run.join("console")).unwrap_or_default()
    }

    /// The host's folder in cgroupfs, as it is reached from here.
    fn cgroup(&self) -> Result<PathBuf> {
        let path = std::fs::read_link(self.run.join("cgroup")).context("the host has no cgroup")?;
        // By way of the keeper: on a machine without a cgroup2 mount the keeper made one in its own mount namespace.
        Ok(Path::new("/proc").join(self.keeper.id().to_string()).join("root").join(path.strip_prefix("/")?))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let deadline = Instant::now() + KEEPER_DEADLINE;
        while !matches!(self.keeper.try_wait(), Ok(Some(_))) {
            if Instant::now() > deadline {
                self.keeper.kill().ok();
                self.keeper.wait().ok();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // The keeper removes its folder last; this is for one that could not.
        std::fs::remove_dir_all(&self.run).ok();
    }
}

/// Hears `READY=1`, which systemd sends when its first transaction is done (sd_notify, as for a container manager).
#[derive(Debug)]
struct Ready {
    socket: UnixDatagram,
    said: Mutex<Receiver<()>>,
}

impl Ready {
    fn listen(path: &Path) -> Result<Self> {
        std::fs::remove_file(path).ok();
        let socket = UnixDatagram::bind(path)?;
        let (sender, said) = channel();
        let receiving = socket.try_clone()?;
        // Read to the end of the host's life: its systemd goes on sending, and blocks for good once the socket is full.
        std::thread::spawn(move || {
            let mut message = [0; 4096];
            while let Ok(length @ 1..) = receiving.recv(&mut message) {
                if message[..length].split(|&byte| byte == b'\n').any(|line| line == b"READY=1") {
                    sender.send(()).ok();
                }
            }
        });
        Ok(Self { socket, said: Mutex::new(said) })
    }

    fn is_there(&self, limit: Duration) -> bool {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(limit).is_ok()
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        // Ends the thread's recv.
        self.socket.shutdown(std::net::Shutdown::Both).ok();
    }
}

fn lines_of(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}
