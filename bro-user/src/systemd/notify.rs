//! What the service manager hears of a forwarder (sd_notify(3)): ready, status, still alive, stopping, needs more time.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use sd_notify::NotifyState;

/// Another process speaks for the service.
static MUTE: AtomicBool = AtomicBool::new(false);

/// From now on another process speaks for the service, or this one does again.
pub fn mute(mute: bool) {
    MUTE.store(mute, Relaxed);
}

/// Tells the service manager, if there is one; a full socket is not worth failing for.
fn tell(states: &[NotifyState<'_>]) {
    if MUTE.load(Relaxed) {
        return;
    }
    let told = match std::env::var("NOTIFY_SOCKET") {
        Ok(name) if name.starts_with('@') => tell_abstract(&name[1..], states),
        _ => sd_notify::notify(states),
    };
    if let Err(error) = told {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}

/// An abstract socket, which managers of containers use and the library does not know.
fn tell_abstract(name: &str, states: &[NotifyState<'_>]) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt as _;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    let message: String = states.iter().map(|state| format!("{state}\n")).collect();
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    socket.send_to_addr(message.as_bytes(), &address).map(drop)
}

/// How long the service manager may take to have done what was asked before a barrier.
const BARRIER: Duration = Duration::from_secs(5);

/// Has the service manager keep a descriptor beyond this process's end (FDSTORE=1), under this name; `polled`: it is dropped once it polls as hung up.
pub fn store(name: &str, descriptor: BorrowedFd<'_>, polled: bool) {
    let poll = if polled { "" } else { "FDPOLL=0\n" };
    if let Err(error) = send(&format!("FDSTORE=1\nFDNAME={name}\n{poll}"), &[descriptor]) {
        tracing::warn!(%error, name, "the service manager does not keep a descriptor: a crash of this process would lose it");
    }
}

/// Has it kept no longer (FDSTOREREMOVE=1), and waits until that was heard: systemd closes it in a thread of its own then.
pub fn forget(name: &str) {
    let told = send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), &[]);
    if let Err(error) = told.and_then(|()| barrier()) {
        tracing::debug!(%error, name, "the service manager may keep a descriptor still");
    }
}

/// Waits until the service manager has dealt with all that it was told (sd_notify_barrier(3)): it closes the barrier's descriptor then.
fn barrier() -> io::Result<()> {
    use std::io::Read as _;
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    let (ours, theirs) = UnixStream::pair()?;
    send("BARRIER=1\n", &[theirs.as_fd()])?;
    drop(theirs);
    ours.set_read_timeout(Some(BARRIER))?;
    (&ours).read(&mut [0]).map(drop)
}

/// Sends with descriptors, which the library does not know how to send to an abstract socket; nothing where there is no service manager. Unlike
/// [`tell`] it is never mute: the process that has the container's descriptors is the service's main process.
fn send(message: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt as _;
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    match name.to_str().and_then(|name| name.strip_prefix('@')) {
        Some(name) => socket.connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(&name)?,
    }
    bro_relay::sys::send_with_descriptors(socket.as_fd(), message.as_bytes(), descriptors)
}

/// Clients are accepted from now on.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// A successor is being started.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "no clock to tell of the reload with"),
    }
}

/// The successor is the service's main process from now on.
pub fn succeeded_by(pid: u32) {
    tell(&[NotifyState::MainPid(pid), NotifyState::Ready]);
}

/// One line for `systemctl status`.
pub fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// No more clients are accepted; the rest may take `longer`.
pub fn stopping(status: &str, longer: Duration) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
    extend(longer);
}

/// The manager should wait this much longer from now.
pub fn extend(longer: Duration) {
    tell(&[NotifyState::ExtendTimeoutUsec(u32::try_from(longer.as_micros()).unwrap_or(u32::MAX))]);
}

/// The engine is alive.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// How often to say so: half of WatchdogSec=, when there is one for this process.
#[must_use]
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}
