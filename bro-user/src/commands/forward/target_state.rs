//! One target, as the control process knows it: whether it is awake, and what has to be remembered of it until it sleeps.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bro_relay::target::Target;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::service::incarnation::ContainerNetns;

/// A target.
#[derive(Debug)]
pub(super) struct TargetState {
    /// Where it listens, as written.
    pub(super) target: Target,
    pub(super) wakefulness: Wakefulness,
    pub(super) refusals: Refusals,
    /// How its service has seen its clients since it was last woken.
    pub(super) seen: Option<String>,
    /// While systemd is asked whether the service runs: the clients to turn away if it does not.
    pub(super) turned: Option<Turned>,
    /// Where it was found, which is watched.
    netns: Weak<ContainerNetns>,
}

/// Whether a target is awake, as far as the control process knows.
#[derive(Debug)]
pub(super) enum Wakefulness {
    Asleep,
    Waking(Waking),
    Awake,
}

/// A target that is being woken.
#[derive(Debug)]
pub(super) struct Waking {
    pub(super) since: Instant,
    /// How long its clients are held. None once that is over: those clients have been reset, and the start goes on.
    pub(super) until: Option<Instant>,
    /// It has been awake, and has refused since.
    pub(super) refused: bool,
    pub(super) task: AbortHandle,
}

/// The clients turned away where the service does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turned {
    /// Clients that wake nothing.
    Ignored,
    /// Every client, for it was started too often.
    All,
}

impl TargetState {
    pub(super) fn asleep(target: Target) -> Self {
        Self {
            target,
            wakefulness: Wakefulness::Asleep,
            refusals: Refusals::default(),
            seen: None,
            turned: None,
            netns: Weak::new(),
        }
    }

    pub(super) const fn is_asleep(&self) -> bool {
        matches!(self.wakefulness, Wakefulness::Asleep)
    }

    pub(super) const fn is_awake(&self) -> bool {
        matches!(self.wakefulness, Wakefulness::Awake)
    }

    /// What is known of its being woken, while it is.
    pub(super) const fn waking(&self) -> Option<&Waking> {
        match &self.wakefulness {
            Wakefulness::Waking(waking) => Some(waking),
            Wakefulness::Asleep | Wakefulness::Awake => None,
        }
    }

    /// It was found in this namespace; says whether that is another one than before, which is not watched yet.
    pub(super) fn found_in(&mut self, netns: &Arc<ContainerNetns>) -> bool {
        let known = std::mem::replace(&mut self.netns, Arc::downgrade(netns));
        !known.ptr_eq(&self.netns)
    }
}

/// A target that refuses right after it was found to listen is asked again after this at the earliest.
const AFTER_REFUSAL: Duration = Duration::from_millis(20);

/// A target that goes on refusing (over a unix socket: no table shows its listener) after this at the latest.
const AFTER_MANY_REFUSALS: Duration = Duration::from_millis(640);

/// How often a target has refused since it was woken.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Refusals(u32);

impl Refusals {
    /// How long to wait before the next try: twice as long each time.
    pub(super) fn pause(&mut self, refused: bool) -> Duration {
        if !refused {
            *self = Self::default();
            return Duration::ZERO;
        }
        let pause = AFTER_REFUSAL.saturating_mul(1 << self.0.min(16));
        self.0 += 1;
        pause.min(AFTER_MANY_REFUSALS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_goes_on_refusing_is_asked_less_often() {
        let mut refusals = Refusals::default();
        assert_eq!(refusals.pause(false), Duration::ZERO);
        let pauses: Vec<_> = (0..7).map(|_| refusals.pause(true).as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 640]);
        assert_eq!(refusals.pause(false), Duration::ZERO);
        assert_eq!(refusals.pause(true), AFTER_REFUSAL);
    }
}
