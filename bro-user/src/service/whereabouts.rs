//! Where to find the container that a unit starts: by what the unit's service manager knows, which no container can forge. The cost
//! of a look grows with the unit's processes, not with the host's.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::podman::container;
use crate::systemd::manager::{Changes, Residence, SystemdManager};

/// Between two looks, where the service manager does not tell of a change.
const LOOK: Duration = Duration::from_millis(20);

/// Between two questions to the service manager.
const ASK: Duration = Duration::from_millis(200);

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
    /// When the service manager was last asked.
    asked: Option<Instant>,
    active_since: Option<Instant>,
}

impl Whereabouts {
    /// Of the unit `unit`.
    pub async fn of(bus: SystemdManager, unit: &str) -> Self {
        let changes = bus.changes(unit).await.ok();
        let residence = Residence::default();
        Self { bus, unit: unit.to_owned(), changes, residence, asked: None, active_since: None }
    }

    /// The main process of its container `name`, if that runs.
    pub async fn look(&mut self, name: &str) -> Option<i32> {
        if self.asked.is_none_or(|asked| asked.elapsed() >= ASK) {
            self.ask().await;
        }
        let found = container::running_in(&self.residence, name);
        found.or_else(|| self.is_elsewhere().then(|| container::running(name)).flatten())
    }

    async fn ask(&mut self) {
        if let Ok((residence, state)) = self.bus.residence(&self.unit).await {
            // Until the unit has a cgroup there is nothing to look at, and it may get one at any moment.
            self.asked = residence.cgroup.is_some().then(Instant::now);
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
                Some(changes) => changes.next().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        match timeout(LOOK, changed).await {
            Ok(true) => self.asked = None,
            Ok(false) => self.changes = None,
            Err(_) => {}
        }
    }
}
