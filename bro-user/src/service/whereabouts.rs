//! Where to find the container that a unit starts: by what the unit's service manager knows, which no container can forge. The cost
//! of a look grows with the unit's processes, not with the host's.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::podman::container;
use crate::systemd::manager::{Changes, Residence, SystemdManager};

/// Between two looks, where the service manager does not tell of a step of the unit: this part of the time that the search has
/// taken so far, within these bounds. The container of a unit that starts as one of many comes the later, and is found when the
/// unit is active at the latest.
const PART: u32 = 16;
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(100);

/// Between two questions to the service manager: where it tells of steps, and where it does not.
const ASK: Duration = Duration::from_secs(1);
const ASK_UNTOLD: Duration = Duration::from_millis(200);

/// How long a unit is active without a conmon before its container is looked for elsewhere: one that was started with cgroups of
/// its own, by a unit that does not stay for it, say.
const ELSEWHERE: Duration = Duration::from_millis(200);

/// A unit, during the search for its container.
pub struct Whereabouts {
    bus: SystemdManager,
    unit: String,
    /// None where the bus does not tell.
    changes: Option<Changes>,
    residence: Residence,
    since: Instant,
    /// When the service manager was last asked.
    asked: Option<Instant>,
    active_since: Option<Instant>,
}

impl Whereabouts {
    /// Of the unit `unit`; `ordered`: this process has told systemd to start it, and has not seen that begin.
    pub async fn of(bus: SystemdManager, unit: &str, ordered: bool) -> Self {
        let changes = bus.changes(unit).await.ok();
        let (residence, since) = (Residence::default(), Instant::now());
        // Until then it has neither process nor cgroup, and that it begins is a step that is told of.
        let is_told =
            |changes: &Changes| !changes.told_state().is_some_and(crate::systemd::manager::is_running);
        let asked = (ordered && changes.as_ref().is_some_and(is_told)).then_some(since);
        Self { bus, unit: unit.to_owned(), changes, residence, since, asked, active_since: None }
    }

    /// The main process of its container `name`, if that runs.
    pub async fn look(&mut self, name: &str) -> Option<i32> {
        let pause = if self.changes.is_some() { ASK } else { ASK_UNTOLD };
        if self.asked.is_none_or(|asked| asked.elapsed() >= pause) {
            self.ask().await;
        }
        let found = container::running_in(&self.residence, name);
        found.or_else(|| self.is_elsewhere().then(|| container::running(name)).flatten())
    }

    async fn ask(&mut self) {
        // Before the question, which may be answered for a later moment: of what happens after a step another one tells.
        let told = self.changes.as_ref().and_then(Changes::told_state).map(str::to_owned);
        // As long as it is activating, the main process is mostly what starts the container, whose conmon is in the cgroup.
        let with_main = told.as_deref() != Some("activating") || self.since.elapsed() >= ASK;
        let asked = async {
            let (residence, state) = tokio::join!(self.bus.residence(&self.unit, with_main), async {
                match told {
                    Some(told) => Ok(told),
                    None => self.bus.active_state(&self.unit).await,
                }
            });
            anyhow::Ok((residence?, state?))
        };
        if let Ok((residence, state)) = asked.await {
            // Until the unit has a cgroup there is nothing to look at. It gets one when it begins to start, which is a step that is
            // told of; it may have to wait for that, as one of many.
            let at_any_moment = residence.cgroup.is_none() && self.changes.is_none();
            self.asked = (!at_any_moment).then(Instant::now);
            self.residence = residence;
            self.active_since =
                if state == "active" { self.active_since.or_else(|| Some(Instant::now())) } else { None };
        }
    }

    /// Has the unit been started, although its container is no child of its processes?
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        self.active_since.is_some_and(|since| since.elapsed() >= ELSEWHERE)
    }

    /// Waits until another look may show more.
    pub async fn wait(&mut self) {
        let changed = async {
            match &mut self.changes {
                Some(changes) => changes.next_step().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        let look = (self.since.elapsed() / PART).clamp(SHORTEST, LONGEST);
        match timeout(look, changed).await {
            Ok(true) => self.asked = None,
            Ok(false) => self.changes = None,
            Err(_) => {}
        }
    }
}
