//! Waking a target: start its unit, find its namespace, wait until it listens, and say how to connect to it.

pub mod failed_wake;

mod kernel_defect;
pub mod kernel_watch;
pub mod readiness;
pub mod runs;
pub mod sources;
pub mod use_lock;
pub mod wakes;
pub mod whereabouts;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use crate::last_words;
use anyhow::{Context as _, bail};
use bro_relay::engine::ReadyTarget;
use bro_relay::engine::lanes::ServiceWatch;
use bro_relay::netns::identity::{self, Identity};
use bro_relay::netns::wire::{Address, TargetAddresses};
use bro_relay::target::Target;
use kernel_watch::{WatchedService, Watching};
use nix::libc;
use readiness::Ready;
use runs::Runs;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::sleep;
use wakes::Wakes;
use whereabouts::Whereabouts;

use crate::exit::Failure;
use crate::netns::agent_process::SpareAgent;
use crate::netns::{self, AgentEnded, Namespace, NetnsRef};
use crate::podman::container::{self, Inspected};
use crate::podman::rootless_netns;
use crate::systemd::manager::{self, Changes, SystemdManager};
use crate::systemd::progress::{self, Progress};
use crate::systemd::restart;
use crate::systemd::run_command::{self, CommandOutcome};
use crate::systemd::scope::RuntimeScope;

/// Where targets are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetnsSource {
    /// In the forwarder's own namespace.
    Own,
    /// In a Podman container of this user.
    Container(String),
    /// Where this process is.
    Pid(i32),
    /// In the namespace that this file names.
    Netns(PathBuf),
}

/// A namespace that was entered, for as long as it is the right one.
#[derive(Debug)]
pub struct ContainerNetns {
    namespace: Arc<Namespace>,
    /// The process through which it was found.
    pid: Option<i32>,
    /// Readable when that process has exited.
    process: Option<AsyncFd<OwnedFd>>,
    /// Device and inode of the namespace.
    file: (u64, u64),
    /// The path of its file, if that is not where bro looked for it.
    path: Option<PathBuf>,
}

/// Starts and finds the targets; one for all of a forwarder's targets, since they share the container.
#[derive(Debug)]
pub struct ServiceStarter {
    place: NetnsSource,
    unit: Option<String>,
    /// The unit's runs, and which of them are a forwarder's.
    runs: Arc<Runs>,
    /// The tasks that follow the runs.
    following: Mutex<JoinSet<()>>,
    /// How far the unit's start is, while a client waits for it.
    progress: std::sync::Mutex<Progress>,
    manager: RuntimeScope,
    ready: Ready,
    source: sources::WantedSource,
    /// The user as which unix sockets are connected to.
    identity: Identity,
    bus: Mutex<Option<SystemdManager>>,
    current: std::sync::Mutex<Option<Arc<ContainerNetns>>>,
    /// Held during a search for the namespace: that may take as long as a start.
    searching: Mutex<()>,
    /// The first agent, if it was made in advance.
    spare: SpareAgent,
    /// The agent in the forwarder's own namespace, for targets that are there.
    own: Mutex<Option<Arc<Namespace>>>,
    /// Held for as long as this process uses the unit.
    in_use: std::sync::Mutex<Option<use_lock::Use>>,
    /// The kernel relay's programs, where there may be any that watch the service.
    programs: OnceLock<Arc<Watching>>,
    /// Where starts are counted.
    wakes: OnceLock<Arc<Wakes>>,
    /// Counts up whenever the kernel relay's programs report a listener.
    listening: tokio::sync::watch::Sender<u64>,
}

/// A target that listens.
#[derive(Debug)]
pub struct Awake {
    /// How to connect to it.
    pub ready: ReadyTarget,
    /// The namespace in which it was found.
    pub incarnation: Option<Arc<ContainerNetns>>,
}

/// The result of an attempt to stop the unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// It is stopped.
    Done,
    /// There is no unit that a forwarder could stop.
    NoUnit,
    /// It runs on: no forwarder had started it.
    NotOurs,
    /// It runs on: another forwarder uses it.
    Used,
    /// It runs on: this unit would be stopped along with it.
    Needed(String),
}

/// Between two looks for what is about to change.
const LOOK: Duration = Duration::from_millis(10);

/// Between two looks through all processes for a container that is being started.
const SEARCH: Duration = Duration::from_millis(20);

/// Between two questions to systemd whether the unit has failed: where it tells of changes, and where it does not.
const WATCH: Duration = Duration::from_secs(1);
const WATCH_UNTOLD: Duration = Duration::from_millis(50);

/// How long a service that listens already waits for systemd to call its unit started. Podman reports that a moment after the
/// container runs. Now and then the report is lost and systemd ends a healthy container: a client that is connected by then goes
/// down with it, one that waits is served by the next run. A unit that starts only once it is healthy, say, is not waited for.
const SETTLE: Duration = Duration::from_millis(500);

/// How often a unit that ended without a report that it is ready is started once more, for the same clients.
const READY_LOST: u32 = 3;

/// How long the service manager may leave the order to start the unit unanswered, and the pause before it is asked again.
const SILENT_MANAGER: Duration = Duration::from_secs(10);
const READY_AGAIN: Duration = Duration::from_millis(200);

/// How long bro looks for Podman's words about a failed start.
const CAUSE: Duration = Duration::from_secs(3);

/// How long bro looks for a running conmon before it asks podman.
const ASK_PODMAN: Duration = Duration::from_secs(1);

/// Waits until the unit may have changed.
async fn next_look(changes: &mut Option<Changes>) {
    match changes {
        Some(told) => {
            if let Ok(Err(_)) = tokio::time::timeout(WATCH, told.next_step()).await {
                *changes = None;
            }
        }
        None => sleep(WATCH_UNTOLD).await,
    }
}

impl ServiceStarter {
    /// A starter that has done nothing yet.
    #[must_use]
    pub fn new(
        place: NetnsSource,
        unit: Option<String>,
        manager: RuntimeScope,
        ready: Ready,
        source: sources::WantedSource,
        identity: Identity,
    ) -> Self {
        Self {
            place,
            runs: Arc::new(Runs::of(unit.clone().unwrap_or_default())),
            unit,
            following: Mutex::default(),
            progress: std::sync::Mutex::default(),
            manager,
            ready,
            source,
            identity,
            bus: Mutex::default(),
            current: std::sync::Mutex::default(),
            searching: Mutex::default(),
            spare: SpareAgent::default(),
            own: Mutex::default(),
            in_use: std::sync::Mutex::default(),
            programs: OnceLock::new(),
            wakes: OnceLock::new(),
            listening: tokio::sync::watch::Sender::new(0),
        }
    }

    /// Has its first agent be this one.
    #[must_use]
    pub fn with_agent(self, spare: SpareAgent) -> Self {
        Self { spare, ..self }
    }

    /// Has the kernel relay's programs watch every service that is woken from now on.
    pub fn watch_through(&self, programs: Arc<Watching>) {
        // Set once, by the caller that starts the engine.
        self.programs.set(programs).ok();
    }

    /// Counts starts in `wakes` from now on.
    pub fn count_starts(&self, wakes: Arc<Wakes>) {
        // Set once, by the caller that starts the engine.
        self.wakes.set(wakes).ok();
    }

    /// To be called when the kernel relay's programs report a listener.
    pub fn heard(&self) {
        self.listening.send_modify(|count| *count += 1);
    }

    /// The error about an agent that does not connect to unix sockets.
    fn refused_identity(&self, error: std::io::Error) -> anyhow::Error {
        match identity::refusal(bro_relay::sys::errno_of(&error), self.identity) {
            Some(sentence) if error.raw_os_error().is_some() => Failure::NotPermitted(sentence).into(),
            _ => error.into(),
        }
    }

    /// Checks what can be checked before the first client: that a place which no unit is going to start can be entered, and that
    /// unix sockets of this process's own namespaces can be connected to as the right user.
    ///
    /// # Errors
    /// [`Failure::NotFound`] or [`Failure::NotPermitted`].
    pub async fn check(&self, targets: &[Target]) -> anyhow::Result<()> {
        let unix = targets.iter().any(|target| target.is_unix());
        if unix
            && self.place == NetnsSource::Own
            && self.identity != Identity::Forwarder
            && !identity::may_become_another()
        {
            let sentence = identity::refusal(identity::NOT_PERMITTED, self.identity).unwrap_or_default();
            return Err(Failure::NotPermitted(sentence).into());
        }
        if self.unit.is_some() || self.place == NetnsSource::Own {
            return Ok(());
        }
        // A container that another unit is starting may take a moment to show.
        const GRACE: Duration = Duration::from_secs(3);
        match tokio::time::timeout(GRACE, self.incarnation()).await {
            Ok(result) => result.map(drop),
            Err(_) => match &self.place {
                NetnsSource::Container(name) => Err(Failure::NotFound(format!(
                    "no container “{name}” of this user is running (see `podman ps --all`); give --unit so that bro starts it"
                ))
                .into()),
                place => anyhow::bail!("entering {place:?} takes too long"),
            },
        }
    }

    /// Wakes one target. Cancelled by dropping it.
    ///
    /// # Errors
    /// When it cannot be started, or its namespace cannot be entered.
    pub async fn wake(&self, index: usize, target: &Target) -> anyhow::Result<Awake> {
        let prepare = async || {
            let (place, incarnation) = match self.place {
                NetnsSource::Own => (NetnsRef::Own, None),
                _ => {
                    let incarnation = self.incarnation().await?;
                    (NetnsRef::Entered(incarnation.namespace.clone()), Some(incarnation))
                }
            };
            let mut addresses = self.resolve(target).await?;
            let heard = self.watch(index, &place, incarnation.as_deref(), &addresses).await;
            tokio::select! {
                ready = self.wait_ready(&place, &mut addresses, heard) => ready?,
                () = gone(incarnation.as_deref()) => return Ok(None),
            }
            let file = match (&self.place, &incarnation) {
                (NetnsSource::Netns(path), Some(incarnation)) => {
                    Some(incarnation.path.as_ref().unwrap_or(path).clone())
                }
                _ => None,
            };
            let namespace = match &place {
                NetnsRef::Own => self.own_agent().await?,
                NetnsRef::Entered(namespace) => namespace.clone(),
            };
            let guarded = file.is_some();
            let sources = self.source.decide(&place, &namespace, &mut addresses).await?;
            let inet = addresses.iter().map(Address::inet).collect();
            let binding = sources.binding();
            let channel = namespace.channel(TargetAddresses { addresses, file, binding }).await;
            let channel = channel.map_err(|error| self.refused_identity(error))?;
            let ready = ReadyTarget { addresses: inet, guarded, sources, channel };
            anyhow::Ok(Some(Awake { ready, incarnation }))
        };
        let (findable, started) = (tokio::sync::Notify::new(), tokio::sync::Notify::new());
        // A container that dies may be started again by its unit's Restart=; systemd says below when it gives up.
        let prepared = async {
            if self.unit.is_some() {
                findable.notified().await;
            }
            let mut may_fail = true;
            loop {
                match prepare().await {
                    Ok(Some(prepared)) if self.unit.is_none() => return Ok(prepared),
                    Ok(Some(prepared)) => tokio::select! {
                        () = started.notified() => return Ok(prepared),
                        () = gone(prepared.incarnation.as_deref()) => {}
                        () = sleep(SETTLE) => return Ok(prepared),
                    },
                    Ok(None) if self.unit.is_some() => {}
                    Ok(None) => {
                        bail!(Failure::NotFound("the container's process exited before it listened".into()))
                    }
                    // The service is unharmed. Each wake gets one new agent: a process that kills every agent has to be noticed.
                    Err(error) if may_fail && AgentEnded::is_behind(&error) => {
                        tracing::warn!("{error:#}; starting another one");
                        may_fail = false;
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        // The unit is watched meanwhile: one that fails will never listen.
        let Some(unit) = &self.unit else { return prepared.await };
        tokio::select! {
            biased;
            prepared = prepared => prepared,
            failed = self.start(unit, &findable, &started) => match failed {
                Ok(never) => match never {},
                Err(error) => Err(error),
            },
            never = self.follow_progress(unit) => match never {},
        }
    }

    /// How far the unit's start is, or was at the end of the last wait for it.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_progress(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Keeps [`ServiceStarter::progress`] up to date with what the unit does.
    async fn follow_progress(&self, unit: &str) -> std::convert::Infallible {
        loop {
            sleep(progress::STEP).await;
            // A service manager that executes itself anew says nothing for a moment.
            let Ok(bus) = self.bus().await else { continue };
            if let Ok(start) = bus.how_far(unit).await {
                let doing = crate::exit::on_one_line(&format!("{unit} {}", start.words()));
                self.note_progress(|progress| progress.doing = doing);
            }
        }
    }

    /// Is the service manager starting the unit just now, for this forwarder or another caller?
    pub async fn is_starting(&self) -> bool {
        let Some(unit) = &self.unit else { return false };
        let Ok(bus) = self.bus().await else { return false };
        bus.how_far(unit).await.is_ok_and(|start| start.is_under_way())
    }

    /// Does the unit run? Without a unit bro cannot know.
    pub async fn is_up(&self) -> bool {
        let Some(unit) = &self.unit else { return false };
        let Ok(bus) = self.bus().await else { return false };
        bus.active_state(unit).await.is_ok_and(|state| manager::is_active(&state))
    }

    /// Starts the unit, then watches it for as long as the caller waits for it. Returns only to say that the start failed. A
    /// service manager that does not answer for a moment, since it executes itself anew, is asked again.
    async fn start(
        &self,
        unit: &str,
        findable: &tokio::sync::Notify,
        started: &tokio::sync::Notify,
    ) -> anyhow::Result<std::convert::Infallible> {
        let mut silent_since = None;
        loop {
            let Err(error) = self.try_start(unit, findable, started, &mut silent_since).await;
            // A bus that never existed will not appear; but one on which a question was left open is there.
            let since = match silent_since {
                Some(since) => since,
                None if manager::was_left_open(&error)
                    || (manager::is_passing(&error) && self.bus.lock().await.is_some()) =>
                {
                    tokio::time::Instant::now()
                }
                None => return Err(error),
            };
            silent_since = Some(since);
            if !manager::is_passing(&error) || since.elapsed() > SILENT_MANAGER {
                return Err(error);
            }
            tracing::warn!("the service manager does not answer; asking again: {error:#}");
            *self.bus.lock().await = None;
            sleep(READY_AGAIN).await;
        }
    }

    async fn try_start(
        &self,
        unit: &str,
        findable: &tokio::sync::Notify,
        started: &tokio::sync::Notify,
        silent_since: &mut Option<tokio::time::Instant>,
    ) -> anyhow::Result<std::convert::Infallible> {
        self.note_progress(|progress| *progress = Progress::default());
        // Before the look at the unit: from here on no other forwarder stops it.
        self.begin_use(unit).await;
        let bus = self.bus().await?;
        self.follow_runs(&bus, unit).await?;
        let before = loop {
            let mut turn = self.runs.turn().await;
            let look = bus.look(unit).await?;
            // After that look, and about the same state: the unit's process may end between two looks.
            if look.is_between() {
                drop(turn);
                let awaited = restart::awaited(&bus, unit).await?;
                turn = self.runs.turn().await;
                // The state of a restart that waits and of one that is under way is the same word.
                if awaited != look.state || bus.look(unit).await? != look {
                    continue;
                }
            }
            if look.is_running() {
                self.runs.see(&look);
            } else {
                self.runs.order(&look);
            }
            drop(turn);
            if !look.is_active() {
                break look;
            }
            // Perhaps no other process will thaw it: the forwarder that froze it may have been killed.
            if bus.thaw_if_frozen(unit).await? {
                tracing::info!(unit, "thawed the unit, which was frozen");
            }
            // There is nothing to order. An order would start the unit against its start limit where its process has just ended and
            // systemd is about to restart it.
            self.note_progress(|progress| progress.started = Some(tokio::time::Instant::now()));
            findable.notify_one();
            started.notify_one();
            let mut changes = bus.changes(unit).await.ok();
            while manager::is_active(&bus.active_state(unit).await?) {
                *silent_since = None;
                next_look(&mut changes).await;
            }
            // Perhaps no task has taken notice of that yet.
            futures_lite::future::poll_once(started.notified()).await;
        };
        // A container that is left of a unit that is being stopped is not to be found: it would soon be gone, with its clients. Nor
        // does the search begin before systemd has the order: finding the container ends this. Where no process tells that it is
        // there (in the own namespace, or in one that may be older than the unit), systemd has to say so: a connection that is
        // tried before there is a way to the target may take another way, and wait there.
        let process = matches!(self.place, NetnsSource::Container(_) | NetnsSource::Pid(_));
        // Another target's client, or another process, may have ordered it.
        if let Some(wakes) = self.wakes.get().filter(|_| !before.is_running()) {
            wakes.started();
        }
        let early = before.state != "deactivating" && process;
        let ordered = || {
            if early {
                findable.notify_one()
            }
        };
        let asked = Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?);
        let cannot = || format!("cannot start {unit}");
        let mut result = bus.start_telling(unit, ordered).await.with_context(cannot)?;
        // Its Result= still describes the run before.
        if result == "failed" && bus.last_try(unit).await.is_ok_and(|last| last < asked) {
            let _turn = self.runs.turn().await;
            self.runs.withdraw(&bus.look(unit).await?);
            bail!(
                "systemd did not even try to start {unit}, which was started too often (StartLimitBurst= in \
                 StartLimitIntervalSec=); a client after that time wakes it again"
            );
        }
        // Rootless Podman's READY=1 is lost now and then: its sender may be gone before systemd looks up the sender's unit. Then
        // systemd ends a healthy container.
        let mut again = READY_LOST;
        while result == "failed"
            && again > 0
            && bus.result(unit).await.is_ok_and(|result| result == "protocol")
        {
            again -= 1;
            tracing::warn!(
                unit,
                "the unit ended without having said that it is ready (Result=protocol); it is started once more"
            );
            let _state = restart::awaited(&bus, unit).await?;
            let turn = self.runs.turn().await;
            let now = bus.look(unit).await?;
            if !now.is_running() {
                self.runs.order(&now);
            }
            drop(turn);
            result = bus.start(unit).await.with_context(cannot)?;
        }
        if result != "done" {
            // A run that another process starts later is not ours either.
            let turn = self.runs.turn().await;
            self.runs.withdraw(&bus.look(unit).await?);
            drop(turn);
            let cause = self.cause(&bus, unit, result == "dependency").await;
            let journal = self.manager.journal();
            bail!("starting {unit} ended with “{result}”{cause}; see `{journal} {unit}`");
        }
        self.note_progress(|progress| progress.started = Some(tokio::time::Instant::now()));
        findable.notify_one();
        started.notify_one();
        let mut changes = bus.changes(unit).await.ok();
        loop {
            let state = bus.active_state(unit).await?;
            *silent_since = None;
            if matches!(state.as_str(), "failed" | "inactive") {
                let (cause, journal) = (self.cause(&bus, unit, false).await, self.manager.journal());
                bail!("{unit} is {state} again before it was ready{cause}; see `{journal} {unit}`");
            }
            next_look(&mut changes).await;
        }
    }

    /// Why a start has failed, in Podman's words where there are any: of the unit itself, or of a unit that it requires and that
    /// did not start. The held clients wait for this, for a moment.
    async fn cause(&self, bus: &SystemdManager, unit: &str, by_another: bool) -> String {
        let looking = async {
            let other = if by_another { bus.failed_requirement(unit).await.ok().flatten() } else { None };
            let failed = other.as_deref().unwrap_or(unit);
            let of = match self.manager {
                RuntimeScope::System => last_words::Of::System,
                RuntimeScope::User => last_words::Of::User(nix::unistd::geteuid().as_raw()),
            };
            let words = last_words::cause(failed, of).await;
            match (other, words) {
                (Some(other), Some(words)) => format!(": {other} has failed, saying “{words}”"),
                (Some(other), None) => format!(": {other} has failed"),
                (None, Some(words)) => format!(", saying “{words}”"),
                (None, None) => String::new(),
            }
        };
        tokio::time::timeout(CAUSE, looking).await.unwrap_or_default()
    }

    async fn bus(&self) -> anyhow::Result<SystemdManager> {
        let mut bus = self.bus.lock().await;
        if let Some(bus) = &*bus {
            return Ok(bus.clone());
        }
        Ok(bus.insert(SystemdManager::connect(self.manager).await?).clone())
    }

    /// The agent in the forwarder's own namespace.
    async fn own_agent(&self) -> anyhow::Result<Arc<Namespace>> {
        let mut own = self.own.lock().await;
        if let Some(own) = own.as_ref().filter(|own| !own.has_ended()) {
            return Ok(own.clone());
        }
        let here = std::fs::File::open("/proc/self/ns/net")?;
        let process = netns::folder_of(std::process::id())?;
        let entered = Namespace::enter(here.into(), process, None, self.identity, &self.spare).await?;
        Ok(own.insert(Arc::new(entered)).clone())
    }

    /// Drops the bus, the namespace and the agents, after a failure that one of them may have caused.
    pub async fn forget(&self) {
        *self.bus.lock().await = None;
        *self.own.lock().await = None;
        *self.current() = None;
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<Arc<ContainerNetns>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_use(&self) -> std::sync::MutexGuard<'_, Option<use_lock::Use>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses the unit from now on. Waits while another forwarder is stopping it.
    async fn begin_use(&self, unit: &str) {
        loop {
            match use_lock::Use::begin(unit) {
                Ok(use_lock::UnitLock::Had(begun)) => {
                    let _mine = self.in_use().get_or_insert(begun);
                    return;
                }
                Ok(use_lock::UnitLock::Taken) => sleep(LOOK).await,
                Err(error) => {
                    return tracing::debug!(%error, "other forwarders do not see that {unit} is used");
                }
            }
        }
    }

    /// Ends the use of the unit, since the unit has ended by itself.
    pub fn end_use(&self) {
        drop(self.in_use().take());
    }

    /// Follows the unit's runs from now on. A look that comes after this misses no step.
    async fn follow_runs(&self, bus: &SystemdManager, unit: &str) -> anyhow::Result<()> {
        let mut following = self.following.lock().await;
        while following.try_join_next().is_some() {}
        if following.is_empty() {
            let (runs, bus, changes) = (self.runs.clone(), bus.clone(), bus.changes(unit).await?);
            following.spawn(async move {
                let Err(error) = runs.follow(&bus, changes).await;
                tracing::debug!(%error, "the unit's runs are not followed any more");
            });
        }
        Ok(())
    }

    /// Notes which run of the unit is a forwarder's, for a forwarder that takes over from this one.
    pub async fn note_run(&self) {
        if self.unit.is_none() {
            return;
        }
        let Ok(bus) = self.bus().await else { return };
        // A bus that fails tells nothing.
        self.runs.look(&bus).await.ok();
    }

    /// Stops the unit if a forwarder started it (this one, or one before it) and no other forwarder uses it; with `by_force`, in
    /// any case.
    ///
    /// # Errors
    /// When systemd refuses.
    pub async fn stop_what_it_started(&self, by_force: bool) -> anyhow::Result<Stopped> {
        let Some(unit) = &self.unit else { return Ok(Stopped::NoUnit) };
        let mine = self.in_use().take();
        // Held until the unit is stopped: another forwarder that wants to use it waits that long.
        let _alone = match use_lock::Use::alone(unit, mine) {
            Ok(use_lock::UnitLock::Had(alone)) => Some(alone),
            Ok(use_lock::UnitLock::Taken) if !by_force => return Ok(Stopped::Used),
            Ok(use_lock::UnitLock::Taken) => None,
            Err(error) => {
                tracing::debug!(%error, "cannot see whether other forwarders use {unit}");
                None
            }
        };
        let bus = self.bus().await?;
        let (look, ours) = self.runs.look(&bus).await?;
        if matches!(look.state.as_str(), "inactive" | "failed") {
            return Ok(Stopped::Done);
        }
        if !by_force && !ours {
            return Ok(Stopped::NotOurs);
        }
        if let Some(other) = bus.needed_by(unit).await?.filter(|_| !by_force) {
            return Ok(Stopped::Needed(other));
        }
        let result = bus.put_to_sleep(unit).await?;
        self.runs.forget();
        tracing::info!(unit, result, "stopped the unit");
        Ok(Stopped::Done)
    }

    /// Why [`ServiceStarter::stop_what_it_started`] would leave the unit running, where that shows before; for a service that must not be left behind.
    pub async fn why_it_goes_on(&self) -> Option<String> {
        let Some(unit) = &self.unit else {
            return Some("its container has the sockets, and there is no --unit to stop".into());
        };
        let look = async { self.runs.look(&self.bus().await?).await };
        match look.await {
            Ok((look, ours)) if ours || matches!(look.state.as_str(), "inactive" | "failed") => None,
            Ok(_) => Some(format!("its container has the sockets, and it was not bro that started {unit}")),
            Err(error) => {
                Some(format!("its container has the sockets, and {unit} cannot be looked at: {error:#}"))
            }
        }
    }

    /// Is `--freeze` available?
    ///
    /// # Errors
    /// [`Failure::Usage`] if not.
    pub async fn check_freezing(&self) -> anyhow::Result<()> {
        let Some(unit) = &self.unit else {
            bail!(Failure::Usage("--freeze needs --unit, which it freezes".into()));
        };
        if !self.bus().await?.can_freeze(unit).await? {
            bail!(Failure::Usage(cannot_freeze(unit)));
        }
        Ok(())
    }

    /// Freezes the unit if a forwarder started it and no other forwarder uses it; says whether it is frozen.
    ///
    /// # Errors
    /// When systemd refuses.
    pub async fn freeze(&self) -> anyhow::Result<bool> {
        let Some(unit) = &self.unit else { return Ok(false) };
        let mine = self.in_use().take();
        let frozen = async {
            // No other forwarder begins to use it until it is frozen; one that does so afterwards thaws it.
            let _alone = match use_lock::Use::alone(unit, mine) {
                Ok(use_lock::UnitLock::Had(alone)) => Some(alone),
                Ok(use_lock::UnitLock::Taken) => return Ok(false),
                Err(_) => None,
            };
            let bus = self.bus().await?;
            let (look, ours) = self.runs.look(&bus).await?;
            if !look.is_active() || !ours {
                return Ok(false);
            }
            bus.freeze(unit).await?;
            anyhow::Ok(true)
        };
        let frozen = frozen.await;
        self.begin_use(unit).await;
        frozen
    }

    /// Thaws the unit.
    ///
    /// # Errors
    /// When systemd refuses.
    pub async fn thaw(&self) -> anyhow::Result<()> {
        let Some(unit) = &self.unit else { return Ok(()) };
        self.bus().await?.thaw(unit).await
    }

    /// Thaws a unit that was frozen by a forwarder before this one, which was killed.
    pub async fn thaw_what_was_left(&self) {
        let Some(unit) = &self.unit else { return };
        let Ok(bus) = self.bus().await else { return };
        match bus.thaw_if_frozen(unit).await {
            Ok(true) => {
                tracing::info!(unit, "thawed the unit, which a forwarder before this one had left frozen")
            }
            Ok(false) => {}
            Err(error) => tracing::warn!("cannot thaw {unit}: {error:#}"),
        }
    }

    /// Is this process, which is being stopped, in the way of the unit's start?
    pub async fn is_in_the_way(&self) -> bool {
        let (Some(unit), Some(own)) = (&self.unit, crate::systemd::own_unit::own_unit()) else {
            return false;
        };
        let Ok(bus) = self.bus().await else { return false };
        bus.starts_after_the_end_of(unit, &own).await.unwrap_or(false)
    }

    /// Another unit that runs and needs this one, if there is one.
    pub async fn needed_by(&self) -> Option<String> {
        let unit = self.unit.as_ref()?;
        self.bus().await.ok()?.needed_by(unit).await.ok()?
    }

    /// The entered namespace: the current one if it is still the right one, else a newly found one, however long the search takes.
    async fn incarnation(&self) -> anyhow::Result<Arc<ContainerNetns>> {
        let _searching = self.searching.lock().await;
        let known = self.current().take().filter(|incarnation| incarnation.is_current(&self.place));
        if let Some(incarnation) = known {
            *self.current() = Some(incarnation.clone());
            return Ok(incarnation);
        }
        let fresh = Arc::new(match &self.place {
            NetnsSource::Own => unreachable!("the own namespace is not entered"),
            NetnsSource::Pid(pid) => ContainerNetns::of_process(*pid, self.identity, &self.spare).await?,
            NetnsSource::Netns(path) => self.enter_file(path).await?,
            NetnsSource::Container(name) => self.enter_container(name).await?,
        });
        *self.current() = Some(fresh.clone());
        Ok(fresh)
    }

    async fn enter_file(&self, path: &Path) -> anyhow::Result<ContainerNetns> {
        loop {
            match std::fs::File::open(path) {
                Ok(file) if !bro_relay::sys::is_network_namespace(file.as_fd()) => {
                    if let Some(found) = self.enter_rootless(path).await? {
                        return Ok(found);
                    }
                    sleep(LOOK).await;
                }
                Ok(file) => return ContainerNetns::of_file(file.into(), self.identity, &self.spare).await,
                // A unit may be about to make it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.unit.is_some() => {
                    sleep(LOOK).await
                }
                Err(error) => {
                    return Err(opening(&format!("the namespace {}", path.display()), &error).into());
                }
            }
        }
    }

    /// The namespace of a user's own networks. `None` where it is not there yet and a unit may be about to make it.
    async fn enter_rootless(&self, path: &Path) -> anyhow::Result<Option<ContainerNetns>> {
        let none = || Failure::NotFound(format!("{} is not a network namespace", path.display()));
        let reachable = rootless_netns::reachable(path).ok_or_else(none)?;
        match std::fs::File::open(&reachable) {
            Ok(file) if bro_relay::sys::is_network_namespace(file.as_fd()) => {
                let mut found = ContainerNetns::of_file(file.into(), self.identity, &self.spare).await?;
                found.path = Some(reachable);
                Ok(Some(found))
            }
            Ok(_) if self.unit.is_some() => Ok(None),
            Ok(_) => Err(none().into()),
            Err(error) => Err(opening(&format!("the namespace {}", path.display()), &error).into()),
        }
    }

    async fn enter_container(&self, name: &str) -> anyhow::Result<ContainerNetns> {
        let start = tokio::time::Instant::now();
        let mut asked = start;
        let mut whereabouts = match &self.unit {
            Some(unit) => Some(Whereabouts::of(self.bus().await?, unit).await),
            None => None,
        };
        loop {
            let mut pid = match &mut whereabouts {
                Some(whereabouts) => whereabouts.look(name).await,
                None => container::running(name),
            };
            // Without a unit perhaps nothing is about to start it, so podman is asked at once; with one, only if conmon is hidden.
            let nothing_else_tells = match &whereabouts {
                Some(whereabouts) => whereabouts.is_elsewhere() && asked.elapsed() > ASK_PODMAN,
                None => asked == start || asked.elapsed() > ASK_PODMAN,
            };
            if pid.is_none() && nothing_else_tells {
                match container::inspect(name).await {
                    Ok(Inspected::Running(found)) => pid = Some(found),
                    Ok(_) => {}
                    // In a service with few rights podman can do nothing. If a unit is started, conmon will show up.
                    Err(error) if self.unit.is_some() => tracing::debug!(%error, "podman was asked in vain"),
                    Err(error) => return Err(error),
                }
                asked = tokio::time::Instant::now();
            }
            if let Some(pid) = pid {
                match ContainerNetns::of_process(pid, self.identity, &self.spare).await {
                    // The container was just leaving; the next one will come.
                    Err(error) if matches!(error.downcast_ref(), Some(Failure::NotFound(_))) => {}
                    result => return result,
                }
            }
            match &mut whereabouts {
                Some(whereabouts) => whereabouts.wait().await,
                None => sleep(SEARCH).await,
            }
        }
    }

    async fn resolve(&self, target: &Target) -> anyhow::Result<Vec<Address>> {
        Ok(match target {
            Target::Tcp { host, port } => {
                let found = tokio::net::lookup_host((host.as_str(), *port));
                let found = found.await.with_context(|| format!("cannot look up the target {target}"))?;
                found.take(TargetAddresses::MOST).map(|found| Address::Tcp(reached(found))).collect()
            }
            Target::Udp { host, port } => {
                let found = tokio::net::lookup_host((host.as_str(), *port));
                let found = found.await.with_context(|| format!("cannot look up the target {target}"))?;
                found.take(TargetAddresses::MOST).map(|found| Address::Udp(reached(found))).collect()
            }
            Target::Unix(_) | Target::Abstract(_) => self.unix(target).into_iter().collect(),
            Target::Datagrams(at) => {
                self.unix(at).map(|at| Address::Datagrams(Box::new(at))).into_iter().collect()
            }
        })
    }

    /// Where a unix target is.
    fn unix(&self, target: &Target) -> Option<Address> {
        match target {
            Target::Abstract(name) => Some(Address::Abstract(name.as_bytes().to_vec())),
            Target::Unix(path) => Some(match self.place {
                NetnsSource::Container(_) | NetnsSource::Pid(_) => Address::Inside(path.clone()),
                NetnsSource::Own | NetnsSource::Netns(_) => Address::Unix(path.clone()),
            }),
            Target::Tcp { .. } | Target::Udp { .. } | Target::Datagrams(_) => None,
        }
    }

    /// Has the kernel relay's programs watch the service, where there are any and it is on this host: they then report its first
    /// listening socket, and the sockets that it accepts can take lanes. The returned value changes when something listens.
    async fn watch(
        &self,
        target: usize,
        place: &NetnsRef,
        incarnation: Option<&ContainerNetns>,
        addresses: &[Address],
    ) -> Option<tokio::sync::watch::Receiver<u64>> {
        let programs = self.programs.get()?;
        let mut ports = Vec::new();
        for address in addresses.iter().filter_map(Address::tcp) {
            if place.is_local(address.ip()).await.unwrap_or(false) && !ports.contains(&address.port()) {
                ports.push(address.port());
            }
        }
        if ports.is_empty() {
            return None;
        }
        let socket = place.socket(libc::AF_INET, libc::SOCK_STREAM, 0).await.ok()?;
        let netns = bro_sockmap::netns_cookie(socket.as_fd()).ok()?;
        let cgroup = match incarnation.and_then(|incarnation| incarnation.pid) {
            Some(pid) => bro_proc::cgroup::shared_with(pid.unsigned_abs()),
            None => bro_proc::cgroup::mount_point(),
        };
        let cgroup =
            cgroup.inspect_err(|error| tracing::debug!(%error, "no cgroup to watch the service in")).ok()?;
        let namespace = match place {
            NetnsRef::Own => self.own_agent().await.ok()?,
            NetnsRef::Entered(namespace) => namespace.clone(),
        };
        // Before the programs watch, so that nothing they say is missed.
        let heard = self.listening.subscribe();
        let service = WatchedService { watch: ServiceWatch { target, netns, ports }, cgroup, namespace };
        programs.watch(service).await.then_some(heard)
    }

    async fn wait_ready(
        &self,
        place: &NetnsRef,
        addresses: &mut Vec<Address>,
        heard: Option<tokio::sync::watch::Receiver<u64>>,
    ) -> anyhow::Result<()> {
        let tcp: Vec<SocketAddr> = addresses.iter().filter_map(Address::tcp).collect();
        let udp: Vec<SocketAddr> = addresses.iter().filter_map(Address::udp).collect();
        match &self.ready {
            Ready::Unchecked => {}
            // No service says over UDP that it is ready, so that the socket is what can be seen.
            Ready::Auto | Ready::Listen | Ready::Connect | Ready::Says(_) if !udp.is_empty() => {
                let _which = readiness::bound(place, &udp).await?;
            }
            Ready::Auto | Ready::Listen | Ready::Says(_) if !tcp.is_empty() => {
                if !self.ready.asks_elsewhere() {
                    readiness::listening(place, &tcp, heard).await?;
                }
                if let Some((protocol, strictness)) = self.ready.question(tcp[0].port()) {
                    readiness::answering(place, &tcp, &protocol, strictness).await?;
                }
            }
            Ready::Connect if !tcp.is_empty() => readiness::connectable(place, &tcp).await?,
            // A unix socket without a listener refuses without the service noticing: the client's own connection is the test, and
            // is tried until it succeeds.
            Ready::Auto | Ready::Listen | Ready::Connect | Ready::Says(_) => {}
            Ready::Healthy => {
                let NetnsSource::Container(name) = &self.place else {
                    anyhow::bail!(Failure::Usage(
                        "--ready=healthy needs --container, whose health check it is".into()
                    ));
                };
                self.succeeding(&["podman", "healthcheck", "run", name].map(str::to_owned)).await;
            }
            Ready::Exec(line) => self.succeeding(&run_command::shell(line)).await,
        }
        // A datagram is not refused before it is sent, so there is no second address to try.
        if addresses.len() > 1
            && !udp.is_empty()
            && let Ok(Some(bound)) = readiness::bound_now(place, &udp).await
        {
            *addresses = vec![Address::Udp(bound)];
        }
        Ok(())
    }

    /// Waits until a command exits with 0.
    async fn succeeding(&self, words: &[String]) {
        loop {
            match self.run(words).await {
                Ok(CommandOutcome::Exited(0)) => return,
                Ok(outcome) => tracing::debug!(?outcome, "not ready yet"),
                Err(error) => tracing::warn!(%error, "cannot run the readiness command"),
            }
            sleep(readiness::EXEC_STEP).await;
        }
    }

    /// Runs one of the owner's commands to its end, which comes within ten seconds: with this process's rights or, where those are
    /// a confined service's, by the service manager with the owner's rights.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn run(&self, words: &[String]) -> std::io::Result<CommandOutcome> {
        if run_command::is_confined() {
            let outcome = async { run_command::by_manager(&self.bus().await?, words).await };
            match outcome.await {
                Ok(outcome) => return Ok(outcome),
                Err(error) => run_command::refused(words, &error),
            }
        }
        run_command::here(words).await
    }
}

/// The message about a unit that cannot be frozen.
pub(crate) fn cannot_freeze(unit: &str) -> String {
    format!(
        "--freeze: systemd cannot freeze {unit} here (it takes systemd 246 or newer, and cgroups of version 2); leave it out, and \
         the service is stopped when it is idle"
    )
}

/// Waits until the process that an incarnation was found through has exited; for ever where there is none.
async fn gone(incarnation: Option<&ContainerNetns>) {
    match incarnation {
        Some(incarnation) => incarnation.gone().await,
        None => std::future::pending().await,
    }
}

/// The address that a connection to `target` reaches: loopback for the unspecified address, which means this host.
fn reached(target: SocketAddr) -> SocketAddr {
    let ip = match target.ip().to_canonical() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        // With its scope.
        IpAddr::V6(_) => return target,
        ip => ip,
    };
    SocketAddr::new(ip, target.port())
}

/// The error about a namespace that cannot be opened.
fn opening(what: &str, error: &std::io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => Failure::NotFound(format!("{what} does not exist")),
        Some(libc::EACCES | libc::EPERM) => {
            Failure::NotPermitted(format!("{what} belongs to another user: run bro as that user, or as root"))
        }
        _ => Failure::NotFound(format!("{what} cannot be opened: {error}")),
    }
}

impl ContainerNetns {
    /// A namespace that a file names. There, unix paths and ids are this process's own.
    async fn of_file(netns: OwnedFd, identity: Identity, spare: &SpareAgent) -> anyhow::Result<Self> {
        let stat = nix::sys::stat::fstat(&netns)?;
        let own = netns::folder_of(std::process::id())?;
        let namespace = Arc::new(Namespace::enter(netns, own, None, identity, spare).await?);
        Ok(Self { namespace, pid: None, process: None, file: (stat.st_dev, stat.st_ino), path: None })
    }

    async fn of_process(pid: i32, identity: Identity, spare: &SpareAgent) -> anyhow::Result<Self> {
        let what = format!("process {pid}");
        let open = |path: String, flags: i32| {
            use std::os::unix::fs::OpenOptionsExt as _;
            std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map(OwnedFd::from)
        };
        // First the process, then what belongs to it: if it is still there afterwards, both are its own.
        let process = bro_relay::sys::pidfd_open(pid).map_err(|error| opening(&what, &error))?;
        let netns = open(format!("/proc/{pid}/ns/net"), 0).map_err(|error| {
            // The kernel says this of a process that has just been reaped (`proc_ns_get_link`), as of another user's.
            let dying = bro_relay::sys::exited(&process);
            opening(&what, &if dying { std::io::Error::from_raw_os_error(libc::ESRCH) } else { error })
        })?;
        let folder = netns::folder_of(pid.unsigned_abs()).map_err(|error| opening(&what, &error))?;
        let root = open(format!("/proc/{pid}/root"), libc::O_PATH | libc::O_DIRECTORY).ok();
        if bro_relay::sys::exited(&process) {
            return Err(Failure::NotFound(format!("{what} has exited")).into());
        }
        let stat = nix::sys::stat::fstat(&netns)?;
        let namespace = Arc::new(Namespace::enter(netns, folder, root, identity, spare).await?);
        let process = Some(crate::sys::watch(process, tokio::io::Interest::READABLE)?);
        Ok(Self { namespace, pid: Some(pid), process, file: (stat.st_dev, stat.st_ino), path: None })
    }

    /// Is this still the namespace that a client should be connected in?
    fn is_current(&self, place: &NetnsSource) -> bool {
        if self.namespace.has_ended() {
            return false;
        }
        match place {
            NetnsSource::Netns(path) => {
                let path = self.path.as_ref().unwrap_or(path);
                nix::sys::stat::stat(path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.file)
            }
            _ => self.process.as_ref().is_none_or(|process| !bro_relay::sys::exited(process.get_ref())),
        }
    }

    /// Waits until its process has exited. (A namespace's file does not tell when it is replaced; the engine looks at it.)
    pub async fn gone(&self) {
        match &self.process {
            // An error would mean that the pidfd is no pidfd.
            Some(process) => {
                process.readable().await.map(|mut guard| guard.retain_ready()).unwrap_or_default()
            }
            None => std::future::pending().await,
        }
    }
}

impl ServiceStarter {
    /// Where its targets are.
    #[must_use]
    pub const fn place(&self) -> &NetnsSource {
        &self.place
    }
}
