//! What the service manager hears of a forwarder (sd_notify(3)): ready, status, still alive, stopping, needs more time.

use std::time::Duration;

use sd_notify::NotifyState;

/// Tells the service manager; without one there is nobody to tell, and a full socket is not worth failing for.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}

/// Clients are accepted from now on.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
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

/// The engine turns.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// How often to say so: half of WatchdogSec=, when there is one for this process.
#[must_use]
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}
