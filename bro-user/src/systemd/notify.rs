//! What the service manager hears of a forwarder (sd_notify(3)): ready, status, still alive, stopping, needs more time.

use std::time::Duration;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

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
