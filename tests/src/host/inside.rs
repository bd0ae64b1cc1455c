//! Doing things inside a host from the test's own process: commands, files, sockets, the journal.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::CloneFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, socket};

use super::Host;

/// No command of a test takes longer; one that does is killed and fails.
const COMMAND_DEADLINE: &str = "120";

/// What came of a command.
#[derive(Debug, Clone)]
pub struct Ran {
    /// The exit code; of a killed command 128 and the signal.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Ran {
    /// Did it exit with 0?
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == 0
    }
}

impl Host {
    /// A command inside the host as root, or as `user` with that user's manager and bus within reach.
    pub fn command(&self, user: Option<&str>, args: &[&str]) -> Result<Command> {
        let mut cgroup = self.cgroup()?;
        let mut inner: Vec<String> = Vec::new();
        if let Some(user) = user {
            let (uid, home) = (self.uid(user)?, format!("/home/{user}"));
            // In the user's own part of the tree, so that Podman finds itself where a login would have put it.
            cgroup.push(format!("user.slice/user-{uid}.slice/user@{uid}.service/init.scope"));
            inner.extend(["setpriv", "--reuid", user, "--regid", user, "--init-groups"].map(Into::into));
            inner.extend(["env", "-C", &home].map(Into::into));
            inner.extend([format!("HOME={home}"), format!("USER={user}"), format!("LOGNAME={user}")]);
            inner.push(format!("XDG_RUNTIME_DIR=/run/user/{uid}"));
            inner.push(format!("DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/{uid}/bus"));
        } else {
            cgroup.push("init.scope");
        }
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", COMMAND_DEADLINE])
            .args(["sh", "-c", "echo $$ >\"$0\"; exec \"$@\""])
            .arg(cgroup.join("cgroup.procs"))
            .args(["nsenter", "--target", &self.pid().to_string(), "--all", "--"])
            // Nothing of the outer environment: cargo's, rustup's and the shell's names mean nothing here.
            .args(["env", "-i", "LANG=C.UTF-8", "HOME=/root"])
            .arg("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .args(inner)
            .args(args)
            .stdin(std::process::Stdio::null());
        Ok(command)
    }

    /// Runs a command as root, whatever its exit code.
    pub fn try_run(&self, args: &[&str]) -> Result<Ran> {
        collect(&mut self.command(None, args)?)
    }

    /// Runs a command as `user`, whatever its exit code.
    pub fn try_run_as(&self, user: &str, args: &[&str]) -> Result<Ran> {
        collect(&mut self.command(Some(user), args)?)
    }

    /// Runs a command as root that has to succeed; its output, without the last newline.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        expect(args, self.try_run(args)?)
    }

    /// Runs a command as `user` that has to succeed; its output, without the last newline.
    pub fn run_as(&self, user: &str, args: &[&str]) -> Result<String> {
        expect(args, self.try_run_as(user, args)?)
    }

    /// Runs a shell script as root that has to succeed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-euc", script])
    }

    /// Where a file of the host is, seen from here. Symbolic links that are absolute lead out of the host: do not follow any.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        Path::new("/proc").join(self.pid().to_string()).join("root").join(inside.trim_start_matches('/'))
    }

    /// Writes a file, and the folders above it; below /home/USER all of it belongs to that user.
    pub fn write(&self, inside: &str, contents: impl AsRef<[u8]>) -> Result<()> {
        let path = self.path(inside);
        self.make_folders(inside)?;
        std::fs::write(&path, contents).with_context(|| format!("cannot write {inside} in the host"))?;
        self.hand_over(inside)
    }

    /// Copies a program from here into the host.
    pub fn install(&self, source: &Path, inside: &str) -> Result<()> {
        self.make_folders(inside)?;
        let path = self.path(inside);
        std::fs::copy(source, &path)
            .with_context(|| format!("cannot copy {} into the host", source.display()))?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        Ok(())
    }

    /// Appends a line to a file of the host.
    pub fn append(&self, inside: &str, line: &str) -> Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).open(self.path(inside))?;
        writeln!(file, "{line}")?;
        Ok(())
    }

    /// The numeric id of one of the host's users.
    pub fn uid(&self, user: &str) -> Result<u32> {
        let passwd = std::fs::read_to_string(self.path("/etc/passwd"))?;
        passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| fields.first() == Some(&user))
            .and_then(|fields| fields.get(2)?.parse().ok())
            .with_context(|| format!("the host has no user {user}"))
    }

    /// Runs `work` on a thread in the host's network namespace: sockets it makes belong there, wherever they are used later.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let network = std::fs::File::open(format!("/proc/{}/ns/net", self.pid()))?;
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                nix::sched::setns(&network, CloneFlags::CLONE_NEWNET)
                    .context("cannot enter the host's network")?;
                work()
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A TCP connection to 127.0.0.1:`port` of the host.
    pub fn connect(&self, port: u16) -> Result<TcpStream> {
        self.connect_to((Ipv4Addr::LOCALHOST, port).into())
    }

    /// A TCP connection to an address of the host. Reads and writes on it give up after 30 s.
    pub fn connect_to(&self, address: SocketAddr) -> Result<TcpStream> {
        self.in_network(|| {
            let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))
                .with_context(|| format!("cannot connect to {address} in the host"))?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            stream.set_write_timeout(Some(Duration::from_secs(30)))?;
            Ok(stream)
        })
    }

    /// The same from one of the host's own addresses.
    pub fn connect_between(&self, from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
        self.in_network(|| {
            let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let made = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            bind(made.as_raw_fd(), &SockaddrStorage::from(from))?;
            nix::sys::socket::connect(made.as_raw_fd(), &SockaddrStorage::from(to))
                .with_context(|| format!("cannot connect from {from} to {to} in the host"))?;
            let stream = TcpStream::from(made);
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            Ok(stream)
        })
    }

    /// A TCP port that is not used in the host, another one each time. Not the kernel's choice: that may fall on one which a
    /// client's own end takes a moment later. The host's network is the test's alone, so counting does.
    pub fn free_port(&self) -> Result<u16> {
        self.in_network(|| {
            loop {
                let port = self.port.fetch_add(1, Ordering::Relaxed);
                if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
                    return Ok(port);
                }
            }
        })
    }

    /// Waits until `done` is true, asking again and again for up to `limit`.
    pub fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let asked = Instant::now();
            if done()? {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
            // Half of the time at most goes into asking, which may take processes of its own.
            std::thread::sleep(asked.elapsed().clamp(Duration::from_millis(25), Duration::from_millis(100)));
        }
    }

    fn make_folders(&self, inside: &str) -> Result<()> {
        let folders: Vec<&Path> = Path::new(inside).ancestors().skip(1).collect();
        for folder in folders.into_iter().rev().filter_map(Path::to_str) {
            if !self.path(folder).is_dir() {
                std::fs::create_dir(self.path(folder))?;
                self.hand_over(folder)?;
            }
        }
        Ok(())
    }

    fn hand_over(&self, inside: &str) -> Result<()> {
        let user = inside.strip_prefix("/home/").and_then(|rest| rest.split('/').next());
        if let Some(user) = user {
            let uid = self.uid(user)?;
            chown(self.path(inside), Some(uid), Some(uid))?;
        }
        Ok(())
    }
}

pub(super) fn collect(command: &mut Command) -> Result<Ran> {
    let output = command.output().context("cannot run a command in the host")?;
    Ok(Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

pub(super) fn expect(args: &[&str], ran: Ran) -> Result<String> {
    ensure!(
        ran.success(),
        "`{}` exited with {} in the host: {}",
        args.join(" "),
        ran.code,
        ran.stderr.trim()
    );
    Ok(ran.stdout.trim_end_matches('\n').into())
}
