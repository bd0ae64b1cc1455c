//! What stands for a `Network=none` container: a process that holds a network namespace of its own with nothing but lo,
//! and starts what it is told to start inside.

use std::fs::File;
use std::io::{BufRead as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;

use super::client::Figures;
use super::process::{Guarded, Lines, die_with_parent, part};

/// Where the service listens inside. The namespace is new, so no port of it can be taken.
pub const SERVICE: &str = "127.0.0.1:80";

/// The same service listens at a port for each comparison too: a socket can be in the care of one kernel relay only, so what
/// is compared must not share a port.
pub fn service_for(comparison: usize) -> String {
    format!("127.0.0.1:{}", 8000 + comparison)
}

const COMPARISONS: usize = 16;

const LIMIT: Duration = Duration::from_secs(30);

/// The container, seen from outside.
pub struct Container {
    process: Guarded,
    commands: ChildStdin,
    answers: Lines,
    /// Whether it has a user namespace too, as a rootless container has.
    pub rootless: bool,
}

impl Container {
    /// Starts the process and waits until its namespace is there, with lo up.
    pub fn create() -> Result<Self> {
        let mut child = part(&["container"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let commands = child.stdin.take().context("stdin is a pipe")?;
        let answers = Lines::of(child.stdout.take().context("stdout is a pipe")?);
        let mut container = Self { process: Guarded(child), commands, answers, rootless: false };
        container.rootless = container.answer("ready")? == "rootless";
        Ok(container)
    }

    /// Its process, the one to name with `--pid`.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Starts the service inside unless it runs, and waits until it says that it listens.
    pub fn start_service(&mut self) -> Result<()> {
        self.tell("start")?;
        self.answer("listening").map(drop)
    }

    /// Stops the service; the namespace stays.
    pub fn stop_service(&mut self) -> Result<()> {
        self.tell("stop")?;
        self.answer("stopped").map(drop)
    }

    /// Measures with a client inside, directly at the service.
    pub fn measure_inside(&mut self, address: &str) -> Result<Figures> {
        self.tell(&format!("client {address}"))?;
        self.answer("figures")?.parse()
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        writeln!(self.commands, "{command}").context("the container process is gone")
    }

    fn answer(&mut self, wanted: &str) -> Result<String> {
        let mut seen = Vec::new();
        let ours = |line: &str| line.starts_with(wanted) || line.starts_with("error ");
        let line = self
            .answers
            .until(LIMIT, &mut seen, ours)
            .with_context(|| format!("the container process was to say `{wanted}`"))?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("error", why) => bail!("{why}"),
            (_, rest) => Ok(rest.to_owned()),
        }
    }
}

/// The container process itself. It ends with its stdin, or with the task.
pub fn main() -> Result<()> {
    if let Err(error) = serve() {
        println!("error {error:#}");
    }
    Ok(())
}

fn serve() -> Result<()> {
    let rootless = enter_new_namespace()?;
    // After unshare(): a change of credentials may forget the request.
    die_with_parent(Signal::SIGKILL)?;
    lo_up().context("cannot bring lo up in the new namespace")?;
    println!("ready {}", if rootless { "rootless" } else { "rootful" });

    let mut service = None;
    for command in std::io::stdin().lock().lines() {
        let command = command?;
        match command.split_once(' ').unwrap_or((&command, "")) {
            ("start", _) if service.is_some() => println!("listening"),
            ("start", _) => {
                let addresses = [SERVICE.to_owned()].into_iter().chain((0..COMPARISONS).map(service_for));
                let started = part(&["service"]).args(addresses).stdin(Stdio::null()).spawn()?;
                service = Some(Guarded(started));
            }
            ("stop", _) => {
                service = None;
                println!("stopped");
            }
            ("client", address) => {
                part(&["client", address]).stdin(Stdio::null()).status()?;
            }
            (other, _) => bail!("no such command: {other}"),
        }
    }
    drop(service);
    Ok(())
}

/// Root makes a network namespace alone; anyone else needs a user namespace that owns it, as rootless podman does.
/// True when it is the latter.
fn enter_new_namespace() -> Result<bool> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if uid.is_root() && unshare(CloneFlags::CLONE_NEWNET).is_ok() {
        return Ok(false);
    }
    match unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET) {
        Ok(()) => {}
        Err(errno) => bail!("{}", refused(errno)),
    }
    let map = |file: &str, text: String| match std::fs::write(format!("/proc/self/{file}"), text) {
        Ok(()) => Ok(()),
        Err(error) => bail!("{}", refused(Errno::from_raw(error.raw_os_error().unwrap_or(0)))),
    };
    map("setgroups", "deny".into())?;
    map("uid_map", format!("0 {uid} 1"))?;
    map("gid_map", format!("0 {gid} 1"))?;
    Ok(true)
}

/// Enters the namespaces of a container, its user namespace first if that is another, in which one is root then; whether it is.
pub fn enter(container: i32) -> Result<bool> {
    let namespace = |kind: &str| File::open(format!("/proc/{container}/ns/{kind}"));
    let own = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user"));
    let rootless = own("self")? != own(&container.to_string())?;
    let network = namespace("net").context("the container's network namespace")?;
    if rootless {
        setns(namespace("user")?, CloneFlags::CLONE_NEWUSER)
            .context("entering the container's user namespace")?;
    }
    setns(network, CloneFlags::CLONE_NEWNET).context("entering the container's network namespace")?;
    Ok(rootless)
}

/// One sentence: what the host refuses, and the line that mends it.
fn refused(errno: Errno) -> String {
    let setting = |name: &str| {
        let file = format!("/proc/sys/{}", name.replace('.', "/"));
        std::fs::read_to_string(file).ok().map(|text| text.trim().to_owned())
    };
    let is = |name: &str, value: &str| setting(name).is_some_and(|now| now == value);
    let mend = if is("kernel.unprivileged_userns_clone", "0") {
        "run `sudo sysctl kernel.unprivileged_userns_clone=1`"
    } else if is("kernel.apparmor_restrict_unprivileged_userns", "1") {
        "run `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    } else if is("user.max_user_namespaces", "0") {
        "run `sudo sysctl user.max_user_namespaces=10000`"
    } else if is("user.max_net_namespaces", "0") {
        "run `sudo sysctl user.max_net_namespaces=10000`"
    } else {
        "run this task as root, or, inside a container, start that container with \
         `--security-opt seccomp=unconfined`"
    };
    format!("this host does not let you make a user and network namespace ({}): {mend}", errno.desc())
}

nix::ioctl_write_ptr_bad!(set_interface_flags, nix::libc::SIOCSIFFLAGS, nix::libc::ifreq);

fn lo_up() -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut name = [0; nix::libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(b"lo") {
        *to = *from as nix::libc::c_char;
    }
    let up = nix::libc::__c_anonymous_ifr_ifru { ifru_flags: nix::libc::IFF_UP as nix::libc::c_short };
    let request = nix::libc::ifreq { ifr_name: name, ifr_ifru: up };
    // SAFETY: the socket is open, and the request lives through the call, which only reads it.
    match unsafe { set_interface_flags(socket.as_raw_fd(), &request) } {
        Ok(_) => Ok(()),
        // Some hosts let anyone make the namespaces and then give no power in them.
        Err(errno @ (Errno::EPERM | Errno::EACCES)) => bail!("{}", refused(errno)),
        Err(errno) => Err(errno.into()),
    }
}
