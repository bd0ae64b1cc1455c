//! The same sleeping service, woken by its first client through `bro forward --adopt`: this task plays the OCI runtime too, and the service
//! has systemd's socket from then on.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::namespace::{Container, enter};
use super::process::{Guarded, Lines, die_with_parent, part};
use super::runtime::{ListenerPath, Runtime};
use super::systemd::{Forwarder, Socket};

/// Its row in the table.
pub const LABEL: &str = "bro, adopted";
/// Where the service listens inside: at no port of the one that is relayed to.
const SERVICE: &str = "127.0.0.1:81";
const LISTENS_WITHIN: Duration = Duration::from_secs(10);

/// A service that accepts at systemd's socket. It ends before its forwarder.
pub struct Adopted {
    _service: Guarded,
    _forwarder: Forwarder,
    socket: Socket,
    _listener_path: ListenerPath,
}

impl Adopted {
    /// Where clients find it.
    pub fn address(&self) -> SocketAddr {
        self.socket.address
    }
}

/// Wakes it by a first client, and says how that went; nothing where it cannot be had.
pub fn tell(bro: &Path, container: &Container) -> Option<Adopted> {
    match wake(bro, container) {
        Ok((adopted, said)) => {
            println!("adoption    {said}");
            Some(adopted)
        }
        Err(error) => {
            println!("adoption    not to be had here: {error:#}");
            None
        }
    }
}

fn wake(bro: &Path, container: &Container) -> Result<(Adopted, String)> {
    let socket = Socket::listen()?;
    let listener_path = ListenerPath::listen(socket.address.port())?;
    let line = super::forward_line(container, &["--adopt".into()], SERVICE);
    let activate = || socket.activate(bro, &line, Some(&listener_path));
    let (mut woken, service) = super::wake(&socket, activate, || start_service(container, &listener_path))?;
    let answer = &woken.answer;
    if answer.seen_as != answer.own {
        let why = woken.forwarder.on_what_it_relays();
        bail!(
            "{}",
            why.unwrap_or_else(|| format!("the service saw its client {} as {}", answer.own, answer.seen_as))
        );
    }
    let said = format!(
        "{:.1} ms for the first client of the same service with bro forward --adopt: it has systemd's socket now, accepts\n            \
         its clients itself, and saw this one as {}, which is the client's own address",
        woken.answered.as_secs_f64() * 1e3,
        answer.seen_as,
    );
    let adopted =
        Adopted { _service: service, _forwarder: woken.forwarder, socket, _listener_path: listener_path };
    Ok((adopted, said))
}

/// Starts a service of its own in the container, and waits until it says that it listens.
fn start_service(container: &Container, listener_path: &ListenerPath) -> Result<Guarded> {
    let args = ["runtime", &container.pid().to_string(), &listener_path.name, SERVICE];
    let mut child = part(&args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("stdout is a pipe")?;
    let (service, lines, mut seen) = (Guarded(child), Lines::of(output), Vec::new());
    let ours = |line: &str| line == "listening" || line.starts_with("error ");
    let line = lines.until(LISTENS_WITHIN, &mut seen, ours).context("the service was to listen")?;
    ensure!(line == "listening", "{}", line.trim_start_matches("error "));
    Ok(service)
}

/// The runtime, which becomes the service.
pub fn main(container: i32, listener_path: &str, address: &str) -> Result<()> {
    let error = match prepare(container, listener_path) {
        Ok(()) => Command::new("/proc/self/exe").args(["part", "service", address]).exec().into(),
        Err(error) => error,
    };
    println!("error {error:#}");
    Ok(())
}

fn prepare(container: i32, listener_path: &str) -> Result<()> {
    let runtime = Runtime::connect(listener_path)?;
    enter(container)?;
    // Last: a change of credentials makes the kernel forget the request.
    die_with_parent(Signal::SIGKILL)?;
    runtime.notify()
}
