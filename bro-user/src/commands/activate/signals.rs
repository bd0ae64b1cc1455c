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
            if !bro_proc::signals::ignores(&status, number) {
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
