//! Which runs of a unit a forwarder may stop: the one that it had systemd start, and those that came of that one without a new
//! start of the unit by another process (Restart=, or a restart by an administrator or by `podman auto-update`).

use std::sync::{Mutex, PoisonError};

use super::use_lock;
use crate::systemd::manager::{self, Changes, SystemdManager, UnitState};

/// The owner of the unit's present run, as far as was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Whose {
    /// Another process's, or none's.
    Others,
    /// This process has told systemd to start it. The run before was this one.
    Ordered { before: String },
    /// A forwarder's.
    Ours {
        run: String,
        /// It is being stopped only to be started again.
        restarting: bool,
        /// Its job when it was last looked at.
        job: u32,
    },
}

impl Whose {
    /// The owner after a look at the unit. `noted` is the run that a forwarder has noted, perhaps one before this.
    fn after(self, look: &UnitState, noted: Option<&str>) -> Self {
        let ours =
            || Self::Ours { run: look.invocation.clone(), restarting: look.is_restarting, job: look.job };
        match self {
            Self::Ordered { before } if look.invocation == before => Self::Ordered { before },
            // It may have failed already.
            Self::Ordered { .. } => ours(),
            Self::Ours { run, restarting, .. } if run == look.invocation => {
                Self::Ours { run, restarting: restarting || look.is_restarting, job: look.job }
            }
            // A start by another process resets systemd's count of its own restarts.
            Self::Ours { restarting, .. } if restarting || look.restarts > 0 => ours(),
            Self::Ours { .. } => Self::Others,
            // The run that a forwarder before this one has started.
            Self::Others => match noted {
                Some(noted) if noted == look.invocation || look.restarts > 0 => ours(),
                _ => Self::Others,
            },
        }
    }

    /// The owner once systemd has told that `run` goes on, by the job `job`, where one was ordered and this is another than the one
    /// before: that one is ours, as in [`Whose::after`], and whatever becomes of it is told after this.
    fn begun(&self, run: String, job: u32) -> Option<Self> {
        match self {
            Self::Ordered { before } if !run.is_empty() && *before != run => {
                Some(Self::Ours { run, restarting: false, job })
            }
            Self::Ordered { .. } | Self::Ours { .. } | Self::Others => None,
        }
    }

    fn run(&self) -> Option<&str> {
        match self {
            Self::Ours { run, .. } => Some(run),
            Self::Others | Self::Ordered { .. } => None,
        }
    }
}

/// The runs of one unit.
#[derive(Debug)]
pub struct Runs {
    unit: String,
    whose: Mutex<Whose>,
    /// Held from a look at the unit until account is taken of it: an older look that comes after a newer one would show a run that
    /// seems to be another process's start.
    turn: tokio::sync::Mutex<()>,
}

impl Runs {
    /// Of a unit that nothing is known of.
    #[must_use]
    pub fn of(unit: String) -> Self {
        Self { unit, whose: Mutex::new(Whose::Others), turn: tokio::sync::Mutex::default() }
    }

    /// systemd is about to be told to start the unit, which does not run: the next run is ours.
    pub fn order(&self, now: &UnitState) {
        *self.whose.lock().unwrap_or_else(PoisonError::into_inner) =
            Whose::Ordered { before: now.invocation.clone() };
    }

    /// Has this process told systemd to start the unit, and not seen the run of that?
    #[must_use]
    pub fn is_ordered(&self) -> bool {
        matches!(*self.whose.lock().unwrap_or_else(PoisonError::into_inner), Whose::Ordered { .. })
    }

    /// The run that was ordered has begun, as systemd has told; says whether that was the one that is waited for.
    async fn begins(&self, changes: &Changes) -> bool {
        let (Some(run), Some(job)) = (changes.told_run(), changes.told_job()) else { return false };
        let _turn = self.turn().await;
        let mut whose = self.whose.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(begun) = whose.begun(run, job) else { return false };
        if let Some(run) = begun.run() {
            use_lock::remember(&self.unit, run);
        }
        *whose = begun;
        true
    }

    /// What was ordered has ended, and perhaps never began: no run after this one is ours.
    pub fn withdraw(&self, now: &UnitState) {
        if !self.see(now) {
            *self.whose.lock().unwrap_or_else(PoisonError::into_inner) = Whose::Others;
        }
    }

    /// To be held from a look at the unit until that look is passed on to the methods here.
    pub async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Looks at the unit in its turn, and takes account of it. Says also whether the unit's run is a forwarder's.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn look(&self, bus: &SystemdManager) -> anyhow::Result<(UnitState, bool)> {
        let _turn = self.turn().await;
        let look = bus.look(&self.unit).await?;
        let ours = self.see(&look);
        Ok((look, ours))
    }

    /// Takes account of what the unit is doing. Says whether its run is a forwarder's.
    pub fn see(&self, look: &UnitState) -> bool {
        let mut whose = self.whose.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = use_lock::noted(&self.unit);
        let now = whose.clone().after(look, noted.as_deref());
        match (now.run(), noted) {
            (Some(run), noted) if noted.as_deref() != Some(run) => use_lock::remember(&self.unit, run),
            // A run that another process has started is not to be taken for one that came of ours.
            (None, Some(_)) if look.is_running() && now == Whose::Others => use_lock::forget(&self.unit),
            _ => {}
        }
        *whose = now;
        whose.run().is_some()
    }

    /// It has been stopped.
    pub fn forget(&self) {
        *self.whose.lock().unwrap_or_else(PoisonError::into_inner) = Whose::Others;
        use_lock::forget(&self.unit);
    }

    /// Looks at each step of the unit that `changes` tells of from now on, for as long as the bus exists.
    ///
    /// # Errors
    /// When the bus is gone.
    pub async fn follow(
        &self,
        bus: &SystemdManager,
        mut changes: Changes,
    ) -> anyhow::Result<std::convert::Infallible> {
        loop {
            changes.next_step().await?;
            // A first client waits, and systemd has much to do.
            if self.is_news(&changes) && !self.begins(&changes).await {
                self.look(bus).await?;
            }
        }
    }

    /// May what systemd has told change whose the run is? That the run goes on which was known before does not; of any other run,
    /// what was told may be old by now, so that takes a look.
    fn is_news(&self, changes: &Changes) -> bool {
        match &*self.whose.lock().unwrap_or_else(PoisonError::into_inner) {
            Whose::Ordered { before } => !changes.told_of(before),
            Whose::Ours { run, job, .. } => {
                // The job that was looked at becomes one to restart the unit when such an order comes, and stops it then.
                let goes_on = || {
                    changes.told_job() == Some(*job) && changes.told_state().is_some_and(manager::is_running)
                };
                !changes.told_of(run) || !(changes.told_job() == Some(0) || goes_on())
            }
            Whose::Others => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(state: &str, invocation: &str) -> UnitState {
        UnitState {
            state: state.into(),
            invocation: invocation.into(),
            restarts: 0,
            is_restarting: false,
            job: 0,
        }
    }

    fn ordered(before: &str) -> Whose {
        Whose::Ordered { before: before.into() }
    }

    /// The owner of the run after these looks.
    fn after(begin: Whose, looks: &[UnitState]) -> Whose {
        looks.iter().fold(begin, |whose, look| whose.after(look, None))
    }

    #[test]
    fn the_run_that_was_ordered_is_ours_whenever_it_begins() {
        let begin = || ordered("a");
        assert_eq!(after(begin(), &[look("inactive", "a")]), ordered("a"));
        let begun = after(begin(), &[look("inactive", "a"), look("activating", "b")]);
        assert_eq!(begun.run(), Some("b"));
        assert_eq!(after(begun, &[look("active", "b"), look("deactivating", "b")]).run(), Some("b"));
        // A unit that never ran.
        assert_eq!(after(ordered(""), &[look("inactive", "")]), ordered(""));
    }

    #[test]
    fn the_run_that_was_ordered_is_known_from_what_is_told() {
        assert_eq!(ordered("a").begun("b".into(), 7).unwrap().run(), Some("b"));
        // The one before it, or none yet.
        assert_eq!(ordered("a").begun("a".into(), 7), None);
        assert_eq!(ordered("").begun(String::new(), 7), None);
        // None was ordered: that takes a look.
        assert_eq!(Whose::Others.begun("b".into(), 7), None);
        assert_eq!(after(ordered(""), &[look("active", "a")]).begun("b".into(), 7), None);
    }

    #[test]
    fn the_process_that_starts_it_anew_has_it() {
        let ours = || after(ordered(""), &[look("active", "a")]);
        assert_eq!(after(ours(), &[look("inactive", "a"), look("active", "b")]), Whose::Others);
        assert_eq!(after(ours(), &[look("active", "b")]), Whose::Others);
        assert_eq!(after(Whose::Others, &[look("active", "b")]), Whose::Others);
    }

    #[test]
    fn a_restart_changes_nothing() {
        let ours = || after(ordered(""), &[look("active", "a")]);
        let restarting = UnitState { is_restarting: true, ..look("deactivating", "a") };
        // By then the job is one to start it.
        let looks = [restarting, look("inactive", "a"), look("activating", "b"), look("active", "b")];
        assert_eq!(after(ours(), &looks).run(), Some("b"));
        // One restart is no leave for all that comes later.
        assert_eq!(after(after(ours(), &looks), &[look("active", "c")]), Whose::Others);
        let by_systemd = UnitState { restarts: 1, ..look("active", "b") };
        assert_eq!(after(ours(), &[look("activating", "a"), by_systemd.clone()]).run(), Some("b"));
        assert_eq!(after(Whose::Others, &[by_systemd]), Whose::Others);
    }

    #[test]
    fn an_older_look_after_a_newer_one_would_lose_the_run() {
        // Which is why there is `turn`: nothing in a look says how old it is.
        let newer =
            after(ordered(""), &[look("active", "a"), UnitState { restarts: 1, ..look("activating", "b") }]);
        assert_eq!(newer.run(), Some("b"));
        assert_eq!(newer.after(&look("activating", "a"), None), Whose::Others);
    }

    #[test]
    fn a_forwarder_takes_on_what_one_before_it_has_noted() {
        let by_systemd = UnitState { restarts: 2, ..look("active", "c") };
        assert_eq!(Whose::Others.after(&look("active", "a"), Some("a")).run(), Some("a"));
        assert_eq!(Whose::Others.after(&by_systemd, Some("a")).run(), Some("c"));
        assert_eq!(Whose::Others.after(&look("active", "b"), Some("a")), Whose::Others);
    }
}
