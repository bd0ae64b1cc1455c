//! Listeners that are damaged: only a new start of their socket units mends them. systemd starts no socket whose service runs, but a restart of the socket stops
//! the forwarder first, since that is PartOf= the socket, and starts it again afterwards: all of it are jobs of systemd's, which go on when this process has left.
//!
//! It is tried while no client is connected, whom the forwarder's end would cut off. What can be relayed meanwhile is.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bro_adopt::health::Damage;
use bro_relay::stats::Stats;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::fallback::Fallback;
use super::{ListenerHolder, SocketAdoption};
use crate::commands::forward::control::Control;
use crate::commands::forward::lifecycle::Phase;
use crate::systemd::manager::SystemdManager;
use crate::systemd::own_unit;
use crate::systemd::scope::RuntimeScope;

/// Between two looks whether a client is connected.
const STEP: Duration = Duration::from_secs(1);

/// How long a listener at which nothing can be accepted waits for the clients of others to leave.
const OTHERS: Duration = Duration::from_secs(60);

/// A socket unit is left alone for this long after its start, whatever a container does to it: no container can have it started without end.
const REST: Duration = Duration::from_secs(5);

/// Between two tries after a refusal: doubled each time, up to the latter.
const AGAIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// How long systemd may take to say that it has the jobs.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// How far it is.
#[derive(Debug, Default)]
pub(super) struct Mending {
    /// Since when something is to be mended.
    since: Option<Instant>,
    /// When to look next.
    pub(super) next: Option<Instant>,
    /// systemd is being asked.
    pub(super) asking: Option<JoinHandle<anyhow::Result<MendAnswer>>>,
    tries: u32,
    /// Why it was refused last.
    pub(super) refused: Option<String>,
}

/// What systemd has said.
#[derive(Debug)]
pub(in super::super) enum MendAnswer {
    /// It is done: this process is about to be told to stop.
    Ordered,
    /// Not before then.
    TooSoon(Duration),
}

/// Who is connected, of those that the forwarder's end would cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Others {
    None,
    Connected,
}

impl Mending {
    /// Something is damaged.
    fn is_wanted(&mut self, now: Instant) {
        if self.since.is_none() {
            self.since = Some(now);
            self.next = Some(now);
        }
    }

    /// It was asked for, and refused.
    fn is_refused(&mut self, now: Instant) {
        let (first, longest) = AGAIN;
        let wait = first.saturating_mul(1 << self.tries.min(16)).min(longest);
        self.tries += 1;
        self.next = Some(now + wait);
    }

    /// Is it time, at this look? `urgent` is whether nothing can be accepted meanwhile.
    fn may(&mut self, others: Others, urgent: bool, now: Instant) -> bool {
        let waited = self.since.is_some_and(|since| now.saturating_duration_since(since) >= OTHERS);
        let may = others == Others::None || (urgent && waited);
        self.next = (!may).then(|| now + STEP);
        may
    }
}

impl SocketAdoption {
    fn is_damaged(holder: &ListenerHolder) -> bool {
        matches!(
            holder,
            ListenerHolder::Broken(Fallback::Damaged(_)) | ListenerHolder::Relay(Fallback::Damaged(_))
        )
    }

    /// Those whose socket units are to be started anew, by name.
    fn damaged(&self) -> Vec<String> {
        let damaged = self.listeners.iter().filter(|listener| Self::is_damaged(&listener.holder));
        damaged.map(|listener| listener.name.clone()).collect()
    }

    pub(super) fn mend_soon(&mut self) {
        self.mending.is_wanted(Instant::now());
    }
}

impl Control<'_> {
    /// It is time to look whether what is damaged can be mended.
    pub(super) fn mend(&mut self) {
        let (others, serving) = (self.others(), self.life.phase == Phase::Serving);
        let Some(adoption) = &mut self.adoption else { return };
        let names = adoption.damaged();
        let urgent = adoption.listeners.iter().any(|listener| {
            matches!(
                listener.holder,
                ListenerHolder::Broken(Fallback::Damaged(Damage::NotListening | Damage::ShutDown))
            )
        });
        if names.is_empty() {
            adoption.mending = Mending::default();
        } else if !serving {
            // A forwarder that leaves asks for it on the way out, and one that drains is being stopped.
            adoption.mending.next = Some(Instant::now() + STEP);
        } else if adoption.mending.may(others, urgent, Instant::now()) {
            adoption.mending.asking = Some(tokio::spawn(ask(names, Itself::Serves)));
        }
    }

    fn others(&self) -> Others {
        let adopted = self.adoption.as_ref().is_some_and(SocketAdoption::is_adopted);
        if adopted || Stats::get(&self.plane.stats().open) > 0 { Others::Connected } else { Others::None }
    }

    /// What systemd has said to that.
    pub(super) fn mending_asked(&mut self, asked: anyhow::Result<MendAnswer>) {
        let Some(adoption) = &mut self.adoption else { return };
        let (now, mending) = (Instant::now(), &mut adoption.mending);
        mending.asking = None;
        match asked {
            // Where that does not come to pass it is tried again.
            Ok(MendAnswer::Ordered) => {
                tracing::info!("the damaged socket is started anew, and with it this forwarder");
                mending.is_refused(now);
            }
            Ok(MendAnswer::TooSoon(wait)) => mending.next = Some(now + wait),
            Err(error) => {
                let said = format!("{error:#}");
                if mending.refused.as_ref() != Some(&said) {
                    tracing::error!("the damaged socket cannot be started anew from here: {said}");
                }
                mending.refused = Some(said);
                mending.is_refused(now);
            }
        }
    }

    /// This process is about to leave by itself: what it found damaged is started anew after that.
    pub(in super::super) async fn mend_on_the_way_out(&self) {
        let names = self.adoption.as_ref().map(SocketAdoption::damaged).unwrap_or_default();
        if names.is_empty() || self.reload.is_replaced() {
            return;
        }
        match ask(names, Itself::Leaves).await {
            Ok(_) => tracing::info!("the damaged socket is started anew"),
            Err(error) => tracing::error!("the damaged socket cannot be started anew from here: {error:#}"),
        }
    }
}

/// What this process is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Itself {
    Serves,
    Leaves,
}

/// Has systemd start the socket units of these descriptors anew.
async fn ask(names: Vec<String>, forwarder: Itself) -> anyhow::Result<MendAnswer> {
    timeout(ANSWERS_WITHIN, order(names, forwarder)).await.context("systemd does not answer")?
}

async fn order(names: Vec<String>, forwarder: Itself) -> anyhow::Result<MendAnswer> {
    let group = bro_proc::cgroup::shown(Path::new("/proc/self")).unwrap_or_default();
    let unit = own_unit::own_unit().context("this process is no service of systemd's")?;
    // Of a user's manager is what lies below that.
    let scope = if group.contains("/user@") { RuntimeScope::User } else { RuntimeScope::System };
    let systemd = SystemdManager::connect(scope).await?;
    let mut sockets = Vec::new();
    for socket in systemd.sockets_of(&unit).await? {
        if names.contains(&socket.descriptor) {
            // One that is left broken would fail, and stay so.
            let rest = REST.checked_sub(socket.listens_for).filter(|_| forwarder == Itself::Serves);
            if let Some(wait) = rest {
                return Ok(MendAnswer::TooSoon(wait + Duration::from_millis(1)));
            }
            sockets.push(socket.name);
        }
    }
    ensure!(!sockets.is_empty(), "no socket unit of {unit} has the name {}", names.join(", "));
    if forwarder == Itself::Leaves {
        // A stop that goes on, which the jobs of the sockets then wait for: a service that is leaving by itself has none, and a socket that is started
        // meanwhile fails.
        systemd.order_stop(&unit).await?;
    }
    for socket in sockets {
        systemd.order_restart(&socket).await.with_context(|| {
            format!("root has to do that, `systemctl restart {socket}`, where the forwarder runs as a user")
        })?;
    }
    Ok(MendAnswer::Ordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_others_hold_it_back_for_a_while() {
        let (mut mending, start) = (Mending::default(), Instant::now());
        mending.is_wanted(start);
        mending.is_wanted(start + OTHERS);
        assert_eq!(mending.next, Some(start));
        assert!(!mending.may(Others::Connected, true, start));
        assert_eq!(mending.next, Some(start + STEP));
        assert!(mending.may(Others::None, false, start + STEP));
        assert!(!mending.may(Others::Connected, false, start + OTHERS));
        assert!(mending.may(Others::Connected, true, start + OTHERS));
        assert_eq!(mending.next, None);
    }

    #[test]
    fn it_is_tried_less_and_less_often() {
        let (mut mending, now) = (Mending::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..40 {
            mending.is_refused(now);
            waits.push(mending.next.unwrap() - now);
        }
        assert_eq!(waits[..3], [AGAIN.0, 2 * AGAIN.0, 4 * AGAIN.0]);
        assert_eq!(waits.last(), Some(&AGAIN.1));
    }
}
