//! Where to find the container that a unit starts: by what the unit's service manager knows, which no container can forge. The cost
//! of a look grows with the unit's processes, not with the host's.
//!
//! Units of one manager mostly have their cgroups side by side, so bro looks beside its own first: a manager that starts many
//! units at once leaves a question unanswered for longer than the container takes to start.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bro_proc::cgroup;
use tokio::time::{Instant, timeout};

use crate::podman::container;
use crate::systemd::manager::{self, Changes, Residence, SystemdManager};
use crate::systemd::scope::RuntimeScope;

/// Between two looks, where the service manager does not tell of a step of the unit: this part of the time that the search has
/// taken so far, within these bounds. The container of a unit that starts as one of many comes the later, and is found when the
/// unit is active at the latest.
const PART: u32 = 16;
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(100);

/// Between two questions to the service manager: where it tells of steps, and where it does not.
const ASK: Duration = Duration::from_secs(1);
const ASK_UNTOLD: Duration = Duration::from_millis(200);

/// The same where the unit's cgroup is beside this process's, and the manager tells of steps: only in case that one was lost.
const ASK_BESIDE: Duration = Duration::from_secs(5);

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
    /// Where the unit's cgroup is, or is going to be, if it is beside this process's.
    beside: Option<PathBuf>,
    since: Instant,
    /// When the service manager was last asked.
    asked: Option<Instant>,
    active_since: Option<Instant>,
}

impl Whereabouts {
    /// Of the unit `unit`.
    pub async fn of(bus: SystemdManager, unit: &str, scope: RuntimeScope) -> Self {
        let changes = bus.changes(unit).await.ok();
        let (residence, since) = (Residence::default(), Instant::now());
        let beside = beside_own(unit, scope);
        // Until it has begun to start, there is nothing to ask for.
        let asked = (changes.is_some() && beside.is_some()).then_some(since);
        Self { bus, unit: unit.to_owned(), changes, residence, beside, since, asked, active_since: None }
    }

    /// The main process of its container `name`, if that runs.
    pub async fn look(&mut self, name: &str) -> Option<i32> {
        let beside = self.beside.as_deref().filter(|folder| folder.is_dir());
        if let Some(folder) = beside {
            let residence = Residence { main: 0, cgroup: Some(folder.to_owned()) };
            if let Some(found) = container::running_in(&residence, name) {
                return Some(found);
            }
        }
        let pause = match (&self.changes, beside) {
            (None, _) => ASK_UNTOLD,
            (Some(_), Some(_)) => ASK_BESIDE,
            (Some(_), None) => ASK,
        };
        if self.asked.is_none_or(|asked| asked.elapsed() >= pause) {
            self.ask().await;
        }
        let found = container::running_in(&self.residence, name);
        found.or_else(|| self.is_elsewhere().then(|| container::running(name)).flatten())
    }

    async fn ask(&mut self) {
        if let Ok((residence, state)) = self.bus.residence(&self.unit).await {
            // Until the unit has a cgroup there is nothing to look at. It gets one when it begins to start, which is a step that is
            // told of; it may have to wait for that, as one of many.
            let at_any_moment = residence.cgroup.is_none() && self.changes.is_none();
            self.asked = (!at_any_moment).then(Instant::now);
            self.residence = residence;
            self.note(&state);
        }
    }

    fn note(&mut self, state: &str) {
        self.active_since =
            if state == "active" { self.active_since.or_else(|| Some(Instant::now())) } else { None };
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
            Ok(true) => self.told(),
            Ok(false) => self.changes = None,
            Err(_) => {}
        }
    }

    /// Takes account of a step that was told of.
    fn told(&mut self) {
        let state = self.changes.as_ref().and_then(Changes::told_state).map(str::to_owned);
        match (state, &self.beside) {
            (Some(state), Some(folder)) => {
                // It has a cgroup by now, if only elsewhere.
                if manager::is_running(&state) && !folder.is_dir() {
                    self.asked = None;
                }
                self.note(&state);
            }
            _ => self.asked = None,
        }
    }
}

/// The cgroup of a unit of the same manager as the unit that this process belongs to, if they are in the same slice. No container
/// makes cgroups there.
fn beside_own(unit: &str, scope: RuntimeScope) -> Option<PathBuf> {
    let own = cgroup::shown(Path::new("/proc/self"))?;
    let above = beside(&own, scope, nix::unistd::geteuid().as_raw())?;
    Some(manager::cgroups()?.join(above).join(unit))
}

/// The slice of a unit whose cgroup is `own`, below the root of all cgroups, if `scope` is the manager of that unit.
fn beside(own: &str, scope: RuntimeScope, user: u32) -> Option<&str> {
    let (above, unit) = own.strip_prefix('/')?.rsplit_once('/')?;
    let of_the_user = above.split('/').any(|part| part == format!("user@{user}.service"));
    let is_of_this = match scope {
        RuntimeScope::System => !above.split('/').any(|part| part.starts_with("user@")),
        RuntimeScope::User => of_the_user,
    };
    (is_of_this && unit.ends_with(".service")).then_some(above)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_unit_of_the_same_manager_is_beside() {
        use RuntimeScope::{System, User};
        let app = "user.slice/user-7.slice/user@7.service/app.slice";
        let in_app = format!("/{app}/web-activator.service");
        assert_eq!(beside(&in_app, User, 7), Some(app));
        assert_eq!((beside(&in_app, User, 8), beside(&in_app, System, 7)), (None, None));
        assert_eq!(beside("/system.slice/web-activator.service", System, 0), Some("system.slice"));
        // A system service with User= wakes that user's container.
        assert_eq!(beside("/system.slice/web-activator.service", User, 7), None);
        // By hand, from a session or where there is no systemd.
        assert_eq!(beside("/user.slice/user-0.slice/session-1.scope", System, 0), None);
        assert_eq!((beside("/", System, 0), beside("", System, 0)), (None, None));
    }
}
