//! Being told to stop in the middle: by Ctrl-C, by SIGTERM, by SIGHUP when the connection to a host drops. What has begun is then
//! undone, as after any other failure; the default, to end at once, would leave half of it.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use nix::libc;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals, and what they are called.
const SIGNALS: [(i32, &str); 3] =
    [(libc::SIGINT, "Ctrl-C (SIGINT)"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP")];

/// The error of work that was interrupted.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by {0}; nothing was changed")]
pub(super) struct Interrupted(&'static str);

/// Listens for the signals; from then on no signal ends the process by itself.
#[derive(Debug)]
pub(super) struct Interrupt(Vec<(Signal, &'static str)>);

impl Interrupt {
    pub fn watch() -> anyhow::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mut signals = Vec::new();
        for (number, name) in SIGNALS {
            // nohup(1), and a shell's background: the caller wants bro to go on.
            if !is_ignored(&status, number) {
                signals.push((signal(SignalKind::from_raw(number))?, name));
            }
        }
        Ok(Self(signals))
    }

    /// Does the work, unless a signal comes first; then the work is dropped where it stands.
    pub async fn or<T>(&mut self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        // A signal that came before this wait is noted only when the reactor has its turn.
        tokio::task::yield_now().await;
        let mut work = pin!(work);
        poll_fn(|context| {
            for (signal, name) in &mut self.0 {
                if signal.poll_recv(context).is_ready() {
                    return Poll::Ready(Err(Interrupted(name).into()));
                }
            }
            work.as_mut().poll(context)
        })
        .await
    }
}

/// Reads proc_pid_status(5): a mask in hexadecimal, the lowest bit for signal 1.
fn is_ignored(status: &str, number: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (number - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_stays_ignored() {
        let status = "Name:\tbro\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(is_ignored(status, 1) && is_ignored(status, 13));
        assert!(!is_ignored(status, 2) && !is_ignored(status, 15) && !is_ignored("", 1));
    }
}
