//! Where to find the container that a unit starts: by what the unit's service manager knows, which no container can forge. The cost
//! of a look grows with the unit's processes, not with the host's.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout};

use crate::podman::container::{self, Sighting};
use crate::systemd::manager::{self, Changes, Residence, SystemdManager};

/// Between two looks once the container is about to be, or where nothing tells of a step towards it: this part of the time that the search has
/// taken so far, within these bounds. The container of a unit that starts as one of many comes the later, and is found when the
/// unit is active at the latest.
const PART: u32 = 16;
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(100);

/// Between two looks where a step will be told of.
const TOLD: Duration = Duration::from_millis(500);

/// Between two questions to the service manager: where it tells of steps, and where it does not.
const ASK: Duration = Duration::from_secs(3);
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
    /// None until it has a cgroup.
    made: Option<MadeBelow>,
    /// Whether the last look has shown that the container is about to be.
    is_near: bool,
    since: Instant,
    /// When the service manager was last asked.
    asked: Option<Instant>,
    active_since: Option<Instant>,
}

/// Tells when a cgroup is made below another one: Podman makes one for itself and, once the container can be found in a moment, one for that.
struct MadeBelow {
    inotify: Inotify,
    /// The same descriptor, to be waited for.
    readable: AsyncFd<OwnedFd>,
}

impl MadeBelow {
    fn watch(cgroup: &Path) -> std::io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let _watch = inotify.add_watch(cgroup, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR)?;
        let readable = std::os::fd::AsFd::as_fd(&inotify).try_clone_to_owned()?;
        Ok(Self { readable: crate::sys::watch(readable, Interest::READABLE)?, inotify })
    }

    /// Waits until one is made, or there is nothing to be watched any more; says whether there is.
    async fn next(&mut self) -> bool {
        loop {
            let Ok(mut ready) = self.readable.readable().await else { return false };
            match self.inotify.read_events() {
                Ok(events) => {
                    return !events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_IGNORED));
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(_) => return false,
            }
        }
    }
}

impl Whereabouts {
    /// Of the unit `unit`; `ordered`: this process has told systemd to start it, and has not seen that begin.
    pub async fn of(bus: SystemdManager, unit: &str, ordered: bool) -> Self {
        let changes = bus.changes(unit).await.ok();
        let since = Instant::now();
        // Until then it has neither process nor cgroup, and that it begins is a step that is told of.
        let is_told = |changes: &Changes| !changes.told_state().is_some_and(manager::is_running);
        let asked = (ordered && changes.as_ref().is_some_and(is_told)).then_some(since);
        Self {
            bus,
            unit: unit.to_owned(),
            changes,
            residence: Residence::default(),
            made: None,
            is_near: false,
            since,
            asked,
            active_since: None,
        }
    }

    /// The main process of its container `name`, if that runs.
    pub async fn look(&mut self, name: &str) -> Option<i32> {
        // What is known already may do: a service manager that starts many units has no time for questions.
        let known = self.residence.cgroup.is_some().then(|| self.sight(name)).flatten();
        if known.is_some() {
            return known;
        }
        let pause = if self.changes.is_some() { ASK } else { ASK_UNTOLD };
        let found = if self.asked.is_none_or(|asked| asked.elapsed() >= pause) {
            self.ask().await;
            self.sight(name)
        } else {
            None
        };
        found.or_else(|| self.is_elsewhere().then(|| container::running(name)).flatten())
    }

    fn sight(&mut self, name: &str) -> Option<i32> {
        let sighting = container::sighted_in(&self.residence, name);
        self.is_near = sighting == Sighting::Near;
        match sighting {
            Sighting::Running(pid) => Some(pid),
            Sighting::Near | Sighting::Nothing => None,
        }
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
            if residence.cgroup != self.residence.cgroup {
                self.made = None;
            }
            self.residence = residence;
            // Before the look that follows.
            if let (None, Some(cgroup)) = (&self.made, &self.residence.cgroup) {
                self.made = MadeBelow::watch(cgroup).ok();
            }
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
        // That it has a cgroup is told of by the service manager, and what is made there by the kernel.
        let will_tell = self.changes.is_some() && (self.made.is_some() || self.residence.cgroup.is_none());
        let step = (self.since.elapsed() / PART).clamp(SHORTEST, LONGEST);
        let look = if will_tell && !self.is_near && self.active_since.is_none() { TOLD } else { step };
        let changed = async {
            match &mut self.changes {
                Some(changes) => changes.next_step().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        let made = async {
            match &mut self.made {
                Some(made) => made.next().await,
                None => std::future::pending().await,
            }
        };
        let woken = async {
            tokio::select! {
                told = changed => Woken::Step { told },
                watched = made => Woken::Made { watched },
            }
        };
        match timeout(look, woken).await {
            Ok(Woken::Step { told: true }) => self.take_step(),
            Ok(Woken::Step { told: false }) => self.changes = None,
            Ok(Woken::Made { watched: true }) | Err(_) => {}
            Ok(Woken::Made { watched: false }) => (self.made, self.asked) = (None, None),
        }
    }

    /// The service manager has told of a step.
    fn take_step(&mut self) {
        match self.changes.as_ref().and_then(Changes::told_state) {
            // A unit that waits for its turn has no processes.
            Some(state) if !manager::is_running(state) => self.active_since = None,
            _ => self.asked = None,
        }
    }
}

/// Why another look may show more.
enum Woken {
    /// The service manager tells of a step of the unit, or does not tell any more.
    Step { told: bool },
    /// A cgroup was made below the unit's, or that is not `watched` any more.
    Made { watched: bool },
}
