//! Waking a target: start its unit, find its namespace, wait until it listens, and say how to connect to it.

pub mod failed_wake;
pub mod freeze;
pub mod incarnation;
mod kernel_defect;
pub mod kernel_watch;
pub mod last_look;
mod listening;
pub mod readiness;
pub mod runs;
pub mod sources;
mod start;
pub mod stop;
pub mod use_lock;
pub mod wakes;
pub mod whereabouts;

use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::bail;
use bro_relay::engine::ReadyTarget;
use bro_relay::netns::identity::{self, Identity};
use bro_relay::netns::wire::{Address, TargetAddresses};
use bro_relay::target::Target;
use incarnation::{ContainerNetns, NetnsSource, gone};
use kernel_watch::Watching;
use readiness::Ready;
use runs::Runs;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::sleep;
use wakes::Wakes;

use crate::exit::Failure;
use crate::netns::agent_process::SpareAgent;
use crate::netns::{AgentEnded, Namespace, NetnsRef};
use crate::systemd::manager::SystemdManager;
use crate::systemd::progress::Progress;
use crate::systemd::scope::RuntimeScope;

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

/// Between two looks for what is about to change.
const LOOK: Duration = Duration::from_millis(10);

/// How long a service that listens already waits for systemd to call its unit started. Podman reports that a moment after the
/// container runs. Now and then the report is lost and systemd ends a healthy container: a client that is connected by then goes
/// down with it, one that waits is served by the next run. A unit that starts only once it is healthy, say, is not waited for.
const SETTLE: Duration = Duration::from_millis(500);

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

    /// Where its targets are.
    #[must_use]
    pub const fn place(&self) -> &NetnsSource {
        &self.place
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
        // A unit's job has started it. Without a unit there is none to wait for.
        let (started, is_started) = tokio::sync::watch::channel(self.unit.is_none());
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
                ready = self.wait_ready(&place, &mut addresses, heard, is_started.clone()) => ready?,
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
        let findable = tokio::sync::Notify::new();
        // A container that dies may be started again by its unit's Restart=; systemd says below when it gives up.
        let prepared = async {
            if self.unit.is_some() {
                findable.notified().await;
            }
            let mut may_fail = true;
            loop {
                match prepare().await {
                    Ok(Some(prepared)) => {
                        let mut is_started = is_started.clone();
                        tokio::select! {
                            // This function has the sender.
                            _ = is_started.wait_for(|started| *started) => return Ok(prepared),
                            () = gone(prepared.incarnation.as_deref()) => {}
                            () = sleep(SETTLE) => return Ok(prepared),
                        }
                    }
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

    async fn bus(&self) -> anyhow::Result<SystemdManager> {
        let mut bus = self.bus.lock().await;
        if let Some(bus) = &*bus {
            return Ok(bus.clone());
        }
        Ok(bus.insert(SystemdManager::connect(self.manager).await?).clone())
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
}
