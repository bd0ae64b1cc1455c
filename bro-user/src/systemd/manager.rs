//! systemd over D-Bus (org.freedesktop.systemd1(5)): start a unit, see how it fares, stop it; calls about unit files are in
//! `unit_files`.

mod transient;
mod unit_files;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use bro_proc::cgroup;
use futures_lite::StreamExt as _;
use tokio::sync::watch;
use zbus::proxy::CacheProperties;
use zbus::{OwnedObjectPath, Variant};

pub use transient::{Ended, Properties};
pub(crate) use unit_files::{LiveAddress, SocketState};

use super::progress::Start;
use super::restart::Restarting;
use super::run_command::CommandOutcome;
use super::scope::RuntimeScope;
use crate::paths;
use crate::run_as::RunAsUser;

/// How long to wait for a job's end before looking whether the job still exists.
const LOOK_FOR_JOB: Duration = Duration::from_secs(2);

/// How long another user's bus may take to accept bro's connection.
const CONNECTING: Duration = Duration::from_secs(25);

/// How long a call over that bus may take: a reload runs Podman's generator for all of the user's quadlets.
const ANSWER: Duration = Duration::from_secs(90);

/// What syslog(3) calls a warning: systemd's own lines about a unit below that level are not kept.
const LOG_WARNING: i32 = 4;

/// `(ssssssouso)`: a unit as ListUnits describes it: its name, four more (the fourth is its ActiveState), its object, its job's number, kind and object.
type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// Kind, link and destination of each change that enabling or disabling made.
type Links = Vec<(String, String, String)>;

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Systemd {
    fn subscribe(&self) -> zbus::Result<()>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        others: &[(&str, Vec<(&str, Variant<'_>)>)],
    ) -> zbus::Result<OwnedObjectPath>;
    fn unref_unit(&self, name: &str) -> zbus::Result<()>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    /// Since systemd 246, like the next one and the units' properties about that.
    fn freeze_unit(&self, name: &str) -> zbus::Result<()>;
    fn thaw_unit(&self, name: &str) -> zbus::Result<()>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn reload(&self) -> zbus::Result<()>;
    fn enable_unit_files(&self, files: &[&str], runtime: bool, force: bool) -> zbus::Result<(bool, Links)>;
    fn clean_unit(&self, name: &str, mask: &[&str]) -> zbus::Result<()>;
    fn disable_unit_files(&self, files: &[&str], runtime: bool) -> zbus::Result<Links>;
    fn get_unit_file_state(&self, file: &str) -> zbus::Result<String>;
    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<Listed>>;
    fn list_units_by_names(&self, names: &[&str]) -> zbus::Result<Vec<Listed>>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String) -> zbus::Result<()>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Unit", default_service = "org.freedesktop.systemd1")]
trait Unit {
    #[zbus(property(emits_changed_signal = "false"))]
    fn active_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn sub_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn freezer_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn can_freeze(&self) -> zbus::Result<bool>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn load_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn load_error(&self) -> zbus::Result<(String, String)>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn drop_in_paths(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn unit_file_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn source_path(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn need_daemon_reload(&self) -> zbus::Result<bool>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn stop_when_unneeded(&self) -> zbus::Result<bool>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn active_enter_timestamp(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn inactive_exit_timestamp_monotonic(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"), name = "InvocationID")]
    fn invocation_id(&self) -> zbus::Result<Vec<u8>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn required_by(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn bound_by(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn requires(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn wants(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn before(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn job(&self) -> zbus::Result<(u32, OwnedObjectPath)>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Job", default_service = "org.freedesktop.systemd1")]
trait Job {
    #[zbus(property(emits_changed_signal = "false"))]
    fn job_type(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn state(&self) -> zbus::Result<String>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
trait Service {
    #[zbus(property(emits_changed_signal = "false"))]
    fn result(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn exec_main_code(&self) -> zbus::Result<i32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn exec_main_status(&self) -> zbus::Result<i32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn exec_main_start_timestamp_monotonic(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"), name = "NRestarts")]
    fn n_restarts(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"), name = "MainPID")]
    fn main_pid(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"), name = "ControlPID")]
    fn control_pid(&self) -> zbus::Result<u32>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn status_text(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn restart(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"), name = "RestartUSec")]
    fn restart_usec(&self) -> zbus::Result<u64>;
    /// With RestartSteps=, the next one; since systemd 254.
    #[zbus(property(emits_changed_signal = "false"), name = "RestartUSecNext")]
    fn restart_usec_next(&self) -> zbus::Result<u64>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn control_group(&self) -> zbus::Result<String>;
}

/// What a service manager knows of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitInfo {
    /// loaded, not-found, masked, bad-setting, …
    pub load: String,
    /// active, activating, inactive, failed, …
    pub active: String,
    /// enabled, disabled, generated, …
    pub file: String,
    /// The file that a generator made it from.
    pub source: PathBuf,
    /// Its processes do not run until it is thawed.
    pub is_frozen: bool,
    /// Its files have changed since they were read.
    pub needs_reload: bool,
    /// systemd stops it when no other unit needs it (StopWhenUnneeded=).
    pub stops_unneeded: bool,
    /// Since when it is active, in seconds since 1970.
    pub active_since: Option<u64>,
}

/// What a unit is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitState {
    /// ActiveState: active, activating, inactive, failed, …
    pub state: String,
    /// Which run this is, or was (InvocationID); empty when it never ran.
    pub invocation: String,
    /// How often systemd has restarted it by itself since it was last ordered to start.
    pub restarts: u32,
    /// It is being stopped only to be started again.
    pub is_restarting: bool,
    /// The number of its job; 0 while there is none.
    pub job: u32,
}

impl UnitState {
    /// It is on its way up or down, or waits to be restarted.
    #[must_use]
    pub fn is_between(&self) -> bool {
        matches!(self.state.as_str(), "activating" | "deactivating")
    }

    /// It runs, and needs nothing more for that.
    #[must_use]
    pub fn is_active(&self) -> bool {
        is_active(&self.state)
    }

    /// It runs, or is about to.
    #[must_use]
    pub fn is_running(&self) -> bool {
        is_running(&self.state)
    }
}

/// Does a unit in this ActiveState run, or is it about to?
#[must_use]
pub fn is_running(state: &str) -> bool {
    matches!(state, "active" | "activating" | "reloading")
}

/// Does a unit in this ActiveState run already?
#[must_use]
pub fn is_active(state: &str) -> bool {
    matches!(state, "active" | "reloading")
}

/// What the service manager knows about where a unit's processes are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Residence {
    /// Its main process (MainPID); 0 while there is none. For a container that is conmon.
    pub main: u32,
    /// The folder of its cgroup, once it has one.
    pub cgroup: Option<PathBuf>,
}

/// The ends of a unit's jobs, from a moment on.
pub struct EndedJobs(JobRemovedStream);

/// The times at which a unit changes. One subscription to its signals is for all that follow it.
pub struct Changes {
    told: watch::Receiver<UnitStep>,
    /// What the last one said.
    step: UnitStep,
}

/// The units that are followed on a connection, each by a task of its own.
type Followed = Arc<tokio::sync::Mutex<HashMap<String, watch::Sender<UnitStep>>>>;

/// How far a unit is, as its service manager tells at a change, unasked; nothing of what it does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct UnitStep {
    state: Option<String>,
    invocation: Option<Vec<u8>>,
    /// 0 while there is none.
    job: Option<u32>,
}

impl UnitStep {
    fn of(signal: &zbus::fdo::PropertiesChanged) -> Self {
        let Ok(arguments) = signal.args() else { return Self::default() };
        let told = arguments.changed_properties();
        let text = |value: &Variant<'_>| String::try_from(value.try_clone().ok()?).ok();
        let bytes = |value: &Variant<'_>| Vec::<u8>::try_from(value.try_clone().ok()?).ok();
        let job = |value: &Variant<'_>| <(u32, OwnedObjectPath)>::try_from(value.try_clone().ok()?).ok();
        Self {
            state: told.get("ActiveState").and_then(text),
            invocation: told.get("InvocationID").and_then(bytes),
            job: told.get("Job").and_then(job).map(|(id, _)| id),
        }
    }

    /// Is it no step beyond `before`? The end of a job is none: what the job has done is told as well.
    fn is_still(&self, before: &Self) -> bool {
        self.state.is_some()
            && (&self.state, &self.invocation) == (&before.state, &before.invocation)
            && (self.job == before.job || self.job == Some(0))
    }
}

impl Changes {
    fn told_by(teller: &watch::Sender<UnitStep>) -> Self {
        let mut told = teller.subscribe();
        let step = told.borrow_and_update().clone();
        Self { told, step }
    }

    /// Waits for the next one. Those that have been reported with it are taken for one: systemd tells of several steps of a start
    /// at once.
    ///
    /// # Errors
    /// When the bus is closed.
    pub async fn next(&mut self) -> anyhow::Result<()> {
        self.next_told().await.map(drop)
    }

    /// Waits until the unit is in another state, in another run or has another job. Most of the changes of a start are none of
    /// these, and a service manager that is asked for more at each of them, by many forwarders, starts units the later.
    ///
    /// # Errors
    /// When the bus is closed.
    pub async fn next_step(&mut self) -> anyhow::Result<()> {
        loop {
            let step = self.next_told().await?;
            let before = std::mem::replace(&mut self.step, step);
            if !self.step.is_still(&before) {
                return Ok(());
            }
        }
    }

    /// Did the last step tell of this run?
    #[must_use]
    pub fn told_of(&self, run: &str) -> bool {
        self.told_run().is_some_and(|told| told == run)
    }

    /// The run that the last step told of, if it told of one; empty when the unit never ran.
    #[must_use]
    pub fn told_run(&self) -> Option<String> {
        self.step.invocation.as_deref().map(hexadecimal)
    }

    /// The ActiveState that the last step told of, if it told of that.
    #[must_use]
    pub fn told_state(&self) -> Option<&str> {
        self.step.state.as_deref()
    }

    /// The number of the unit's job that the last step told of, if it told of that; 0 while there is none.
    #[must_use]
    pub const fn told_job(&self) -> Option<u32> {
        self.step.job
    }

    async fn next_told(&mut self) -> anyhow::Result<UnitStep> {
        self.told.changed().await.map_err(|_| Closed)?;
        Ok(self.told.borrow_and_update().clone())
    }
}

/// A connection to a service manager.
#[derive(Debug, Clone)]
pub struct SystemdManager {
    systemd: SystemdProxy<'static>,
    /// The objects of units' first names, by whichever name was asked for. A unit that gets another first name while this
    /// connection lives is looked at from time to time, as one that is not told of.
    objects: Arc<tokio::sync::Mutex<HashMap<String, OwnedObjectPath>>>,
    followed: Followed,
}

/// A socket unit, as the service that it starts knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SocketOfService {
    pub name: String,
    /// FileDescriptorName=
    pub descriptor: String,
    /// Since its last start.
    pub listens_for: Duration,
}

impl SystemdManager {
    /// Connects.
    ///
    /// # Errors
    /// When there is no bus, or no systemd on it.
    pub async fn connect(manager: RuntimeScope) -> anyhow::Result<Self> {
        let connection = match manager {
            RuntimeScope::System => {
                zbus::Connection::system().await.context("cannot reach the system bus")?
            }
            RuntimeScope::User => {
                let builder = match user_bus() {
                    Some(path) => {
                        zbus::connection::Builder::address(format!("unix:path={}", path.display()).as_str())
                    }
                    None => zbus::connection::Builder::session(),
                };
                builder.build().await.context(
                    "cannot reach this user's bus (is a user manager running? `loginctl enable-linger` starts one at boot)",
                )?
            }
        };
        let systemd = SystemdProxy::new(&connection).await?;
        systemd.subscribe().await.context("no systemd answers on the bus")?;
        Ok(Self { systemd, objects: Arc::default(), followed: Followed::default() })
    }

    /// Connects to the service manager of `owner`, as that user; a caller other than root can only be that user.
    ///
    /// # Errors
    /// When that manager does not run, or this user may not connect. The other user cannot keep bro waiting for ever: each call has
    /// a limit.
    pub async fn connect_as(owner: &RunAsUser) -> anyhow::Result<Self> {
        if owner.is_me() {
            return Self::connect(RuntimeScope::User).await;
        }
        let address = format!("unix:path={}", owner.runtime_directory().join("bus").display());
        let connection = {
            // A user's bus asks the kernel which user connects, and wants its own.
            let _acting = owner.act()?;
            let connected = reach(&address, CONNECTING).await;
            connected.with_context(|| {
                format!(
                    "cannot reach the bus of {name} (does {manager} run? `sudo loginctl enable-linger {name}` starts it at boot)",
                    name = owner.name,
                    manager = owner.manager()
                )
            })?
        };
        let systemd = SystemdProxy::new(&connection).await?;
        systemd.subscribe().await.context("no systemd answers on the bus")?;
        Ok(Self { systemd, objects: Arc::default(), followed: Followed::default() })
    }

    /// The connection itself, for calls that this type does not make.
    pub fn connection(&self) -> &zbus::Connection {
        self.systemd.inner().connection()
    }

    /// The unit's ActiveState: active, activating, inactive, failed, …
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn active_state(&self, unit: &str) -> anyhow::Result<String> {
        Ok(self.unit(unit).await?.active_state().await?)
    }

    /// What is known of the unit.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn known(&self, unit: &str) -> anyhow::Result<UnitInfo> {
        let unit = self.unit(unit).await?;
        let since = unit.active_enter_timestamp().await?;
        Ok(UnitInfo {
            load: unit.load_state().await?,
            active: unit.active_state().await?,
            file: unit.unit_file_state().await?,
            source: unit.source_path().await?.into(),
            is_frozen: is_frozen(&unit).await,
            needs_reload: unit.need_daemon_reload().await?,
            stops_unneeded: unit.stop_when_unneeded().await?,
            active_since: (since > 0).then_some(since / 1_000_000),
        })
    }

    /// Which run of the unit this is; empty when it never ran.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn invocation(&self, unit: &str) -> anyhow::Result<String> {
        let id = self.unit(unit).await?.invocation_id().await?;
        Ok(hexadecimal(&id))
    }

    /// What the unit is doing.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn look(&self, name: &str) -> anyhow::Result<UnitState> {
        let unit = self.unit(name).await?;
        // Both at once, since a first client waits for the answers. The first before the other: once a restart has stopped the unit,
        // its job is one to start it.
        let names = [name];
        let (listed, invocation) =
            tokio::join!(self.systemd.list_units_by_names(&names), unit.invocation_id());
        let (_, _, _, state, _, _, _, job, kind, _) =
            listed?.into_iter().next().with_context(|| format!("systemd does not list {name}"))?;
        // systemd restarts by itself what is to run, and other units than services have no restarts.
        let restarts = match state.as_str() {
            "inactive" => 0,
            _ => self.service(name).await?.n_restarts().await.unwrap_or(0),
        };
        // A job to restart what does not run is one to start it.
        let runs = !matches!(state.as_str(), "inactive" | "failed");
        Ok(UnitState {
            state,
            invocation: hexadecimal(&invocation?),
            restarts,
            is_restarting: runs && kind.ends_with("restart"),
            job,
        })
    }

    /// Where the unit's processes are; the main one is asked for only `with_main`.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn residence(&self, unit: &str, with_main: bool) -> anyhow::Result<Residence> {
        let service = self.service(unit).await?;
        let main = async { if with_main { service.main_pid().await } else { Ok(0) } };
        let (main, cgroup) = tokio::join!(main, service.control_group());
        // Other units than services have no processes.
        let (main, cgroup) = (main.unwrap_or(0), cgroup.unwrap_or_default());
        let cgroup = cgroup.strip_prefix('/').filter(|below| !below.is_empty());
        let cgroup = cgroup.and_then(|below| Some(cgroup::mount_point().ok()?.join(below)));
        Ok(Residence { main, cgroup })
    }

    /// The folder of a socket unit's own control group; none where it has none, as while it does not listen.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn group_of_socket(&self, unit: &str) -> anyhow::Result<Option<PathBuf>> {
        const KIND: &str = "org.freedesktop.systemd1.Socket";
        let path = self.unit(unit).await?.inner().path().to_owned();
        let socket = zbus::Proxy::new(self.connection(), "org.freedesktop.systemd1", path, KIND).await?;
        let group: String = socket.get_property("ControlGroup").await?;
        let below = group.strip_prefix('/').filter(|below| !below.is_empty());
        Ok(below.and_then(|below| Some(cgroup::mount_point().ok()?.join(below))))
    }

    /// The socket units whose service this is.
    ///
    /// # Errors
    /// When the bus fails.
    pub(crate) async fn sockets_of(&self, service: &str) -> anyhow::Result<Vec<SocketOfService>> {
        const UNIT: &str = "org.freedesktop.systemd1.Unit";
        const SOCKET: &str = "org.freedesktop.systemd1.Socket";
        let proxy = |path, kind| zbus::Proxy::new(self.connection(), "org.freedesktop.systemd1", path, kind);
        let unit = proxy(self.unit(service).await?.inner().path().to_owned(), UNIT).await?;
        let triggers: Vec<String> = unit.get_property("TriggeredBy").await?;
        let now = Duration::from(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?);
        let mut sockets = Vec::new();
        for name in triggers.into_iter().filter(|name| name.ends_with(".socket")) {
            let unit = self.unit(&name).await?;
            let started = Duration::from_micros(unit.inactive_exit_timestamp_monotonic().await?);
            let socket = proxy(unit.inner().path().to_owned(), SOCKET).await?;
            let descriptor = socket.get_property("FileDescriptorName").await?;
            sockets.push(SocketOfService { name, descriptor, listens_for: now.saturating_sub(started) });
        }
        Ok(sockets)
    }

    /// How far the unit's start is.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn how_far(&self, unit: &str) -> anyhow::Result<Start> {
        let (unit, service) = (self.unit(unit).await?, self.service(unit).await?);
        let (state, sub, job) = tokio::join!(unit.active_state(), unit.sub_state(), unit.job());
        // Other units than services have no processes and say nothing.
        let (control, main, status) =
            tokio::join!(service.control_pid(), service.main_pid(), service.status_text());
        let waits = match job? {
            (0, _) => false,
            // It may have ended since.
            (_, job) => self.job(job).await?.state().await.is_ok_and(|state| state == "waiting"),
        };
        let pid = control.ok().filter(|&pid| pid > 0).or_else(|| main.ok().filter(|&pid| pid > 0));
        let comm = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        let process = comm.map(|comm| comm.trim_end().to_owned());
        Ok(Start { state: state?, sub: sub?, waits, status: status.unwrap_or_default(), process })
    }

    /// What the service manager knows of the unit's restarts.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn restarting(&self, unit: &str) -> anyhow::Result<Restarting> {
        let (unit, service) = (self.unit(unit).await?, self.service(unit).await?);
        let (state, sub, job) = tokio::join!(unit.active_state(), unit.sub_state(), unit.job());
        // Other units than services have no restarts.
        let (policy, always, next) =
            tokio::join!(service.restart(), service.restart_usec(), service.restart_usec_next());
        let delay = next.or(always).unwrap_or(0);
        Ok(Restarting {
            state: state?,
            sub: sub?,
            has_job: job?.0 != 0,
            policy: policy.unwrap_or_else(|_| "no".into()),
            delay: Duration::from_micros(delay),
        })
    }

    /// Follows the changes of the unit.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn changes(&self, unit: &str) -> anyhow::Result<Changes> {
        let mut followed = self.followed.lock().await;
        if let Some(teller) = followed.get(unit) {
            return Ok(Changes::told_by(teller));
        }
        let path = self.first_object(unit).await?;
        let properties = zbus::fdo::PropertiesProxy::builder(self.connection());
        let properties = properties.destination("org.freedesktop.systemd1").path(path).build().await?;
        // systemd tells of the unit whenever it tells of the service that it is.
        let of_the_unit = [(0, "org.freedesktop.systemd1.Unit")];
        let signals = properties.receive_properties_changed_with_args(&of_the_unit).await?;
        let teller = watch::Sender::new(UnitStep::default());
        let changes = Changes::told_by(&teller);
        let _first = followed.insert(unit.to_owned(), teller.clone());
        drop(tokio::spawn(follow(unit.to_owned(), signals, teller, self.followed.clone())));
        Ok(changes)
    }

    /// When systemd last began to start the unit, on the kernel's monotonic clock.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn last_try(&self, unit: &str) -> anyhow::Result<Duration> {
        let microseconds = self.unit(unit).await?.inactive_exit_timestamp_monotonic().await?;
        Ok(Duration::from_micros(microseconds))
    }

    /// How the last run of a .service ended: success, exit-code, protocol, …
    ///
    /// # Errors
    /// When the bus fails, or the unit is no service.
    pub async fn result(&self, unit: &str) -> anyhow::Result<String> {
        Ok(self.service(unit).await?.result().await?)
    }

    /// “ (Result=exit-code, its main process exited with status 143)”, as far as systemd knows.
    async fn how_it_ended(&self, unit: &str) -> anyhow::Result<String> {
        let service = self.service(unit).await?;
        let (result, code) = (service.result().await?, service.exec_main_code().await?);
        // What is known of a main process may be of a run before this one.
        let started = Duration::from_micros(service.exec_main_start_timestamp_monotonic().await?);
        let code = if started >= self.last_try(unit).await? { code } else { 0 };
        Ok(ended_how(&result, code, service.exec_main_status().await?))
    }

    /// The object of the unit's first name, from which its signals come; what systemd says of it is kept.
    async fn first_object(&self, unit: &str) -> anyhow::Result<OwnedObjectPath> {
        // Held during the question, since two want to know at once when a unit is started.
        let mut known = self.objects.lock().await;
        if let Some(object) = known.get(unit) {
            return Ok(object.clone());
        }
        let object = self.systemd.load_unit(unit).await?;
        let _other_name = known.insert(unit.to_owned(), object.clone());
        Ok(object)
    }

    async fn unit(&self, unit: &str) -> anyhow::Result<UnitProxy<'static>> {
        let builder = UnitProxy::builder(self.connection()).path(object_of(unit)?);
        Ok(builder.cache_properties(CacheProperties::No).build().await?)
    }

    async fn job(&self, job: OwnedObjectPath) -> anyhow::Result<JobProxy<'static>> {
        let builder = JobProxy::builder(self.connection()).path(job);
        Ok(builder.cache_properties(CacheProperties::No).build().await?)
    }

    /// Starts the unit and waits for the end of the job; what it returns is the job's result (`done` when it worked).
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn start(&self, unit: &str) -> anyhow::Result<String> {
        let jobs = self.ended_jobs(unit).await?;
        self.start_telling(unit, jobs, || ()).await
    }

    /// Has systemd tell of the ends of this unit's jobs: of its alone, or where many are started at once each forwarder would hear of all of them.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn ended_jobs(&self, unit: &str) -> anyhow::Result<EndedJobs> {
        let id = name_of(&self.first_object(unit).await?);
        Ok(EndedJobs(self.systemd.receive_job_removed_with_args(&[(2, &id)]).await?))
    }

    /// As [`SystemdManager::start`], with what tells of the job's end; calls `ordered` once systemd has taken the order.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn start_telling(
        &self,
        unit: &str,
        mut jobs: EndedJobs,
        ordered: impl FnOnce(),
    ) -> anyhow::Result<String> {
        let job = self.systemd.start_unit(unit, "replace").await.map_err(plain)?;
        ordered();
        self.ended(&mut jobs.0, &job, unit).await
    }

    /// Waits for the end of a job. A service manager that executes itself anew just then (`daemon-reexec`, an upgrade) does not
    /// report the end, so the job is looked for now and then.
    async fn ended(
        &self,
        removed: &mut JobRemovedStream,
        job: &OwnedObjectPath,
        unit: &str,
    ) -> anyhow::Result<String> {
        loop {
            let waiting = tokio::time::timeout(LOOK_FOR_JOB, wait(removed, job));
            if let Ok(result) = waiting.await {
                return result;
            }
            let known = self.job(job.clone()).await?;
            match known.job_type().await {
                Err(zbus::Error::FDO(error)) if matches!(*error, zbus::fdo::Error::UnknownObject(_)) => {}
                _ => continue,
            }
            // Its signal may be on its way.
            if let Ok(result) = tokio::time::timeout(LOOK_FOR_JOB, wait(removed, job)).await {
                return result;
            }
            let runs = matches!(self.active_state(unit).await?.as_str(), "active" | "reloading");
            return Ok(if runs { "done" } else { "failed" }.to_owned());
        }
    }

    /// Runs a command as a unit of its own, which is gone when the command has ended, and waits for that end. After `limit` the
    /// command is killed, with everything that it has started.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn run(
        &self,
        words: &[String],
        environment: &[String],
        limit: Duration,
    ) -> anyhow::Result<CommandOutcome> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Relaxed);
        let unit = format!("bro-command-{}-{number}.service", std::process::id());
        let program = words.first().context("a command has a first word")?;
        // Every exit status is an answer, not a failure to be looked into.
        let statuses: Vec<i32> = (1..=255).collect();
        let properties = [
            ("Description", Variant::from(format!("{} for bro", words.join(" ")))),
            ("Type", Variant::from("oneshot")),
            ("ExecStart", Variant::from(vec![(program.clone(), words.to_vec(), false)])),
            ("Environment", Variant::from(environment.to_vec())),
            ("TimeoutStartUSec", Variant::from(limit.as_micros() as u64)),
            ("KillSignal", Variant::from(nix::libc::SIGKILL)),
            ("SuccessExitStatus", Variant::from((statuses, Vec::<i32>::new()))),
            ("StandardOutput", Variant::from("null")),
            ("StandardError", Variant::from("null")),
            // It may be asked five times a second.
            ("LogLevelMax", Variant::from(LOG_WARNING)),
            ("CollectMode", Variant::from("inactive-or-failed")),
            // It is there until its exit status has been read, or this connection ends.
            ("AddRef", Variant::from(true)),
        ];
        let mut removed = self.systemd.receive_job_removed().await?;
        let job = self.systemd.start_transient_unit(&unit, "fail", &properties, &[]).await.map_err(plain)?;
        let mut transient = Transient { systemd: self.systemd.clone(), unit, runs: true };
        wait(&mut removed, &job).await?;
        transient.runs = false;
        self.outcome(&transient.unit).await
    }

    async fn outcome(&self, unit: &str) -> anyhow::Result<CommandOutcome> {
        /// `CLD_EXITED`, as waitid(2) has it.
        const EXITED: i32 = 1;
        let service = self.service(unit).await?;
        let (result, code) = (service.result().await?, service.exec_main_code().await?);
        let status = service.exec_main_status().await?;
        match (result.as_str(), code) {
            ("timeout", _) => Ok(CommandOutcome::TooLong),
            ("success", EXITED) => Ok(CommandOutcome::Exited(status)),
            (_, 2..) => Ok(CommandOutcome::Signalled),
            _ => anyhow::bail!("it did not run ({result})"),
        }
    }

    async fn service(&self, unit: &str) -> anyhow::Result<ServiceProxy<'static>> {
        let builder = ServiceProxy::builder(self.connection()).path(object_of(unit)?);
        Ok(builder.cache_properties(CacheProperties::No).build().await?)
    }

    /// Can the unit be frozen? Its state does not matter for that.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn can_freeze(&self, unit: &str) -> anyhow::Result<bool> {
        // An old systemd has no such property.
        Ok(self.unit(unit).await?.can_freeze().await.unwrap_or(false))
    }

    /// Is the unit frozen, or about to be?
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn is_frozen(&self, unit: &str) -> anyhow::Result<bool> {
        Ok(is_frozen(&self.unit(unit).await?).await)
    }

    /// Freezes the unit's cgroup: none of its processes runs any more until it is thawed.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn freeze(&self, unit: &str) -> anyhow::Result<()> {
        self.systemd.freeze_unit(unit).await.map_err(plain)
    }

    /// Thaws the unit.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn thaw(&self, unit: &str) -> anyhow::Result<()> {
        self.systemd.thaw_unit(unit).await.map_err(plain)
    }

    /// Thaws the unit if it is frozen; says whether it was.
    ///
    /// # Errors
    /// As [`SystemdManager::thaw`].
    pub async fn thaw_if_frozen(&self, unit: &str) -> anyhow::Result<bool> {
        let frozen = self.is_frozen(unit).await?;
        if frozen {
            self.thaw(unit).await?;
        }
        Ok(frozen)
    }

    /// Stops the unit and waits for the end of the job.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn stop(&self, unit: &str) -> anyhow::Result<String> {
        let mut removed = self.systemd.receive_job_removed().await?;
        let job = self.systemd.stop_unit(unit, "replace").await.map_err(plain)?;
        wait(&mut removed, &job).await
    }

    /// Has the unit stopped, and does not wait for that.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub(crate) async fn order_stop(&self, unit: &str) -> anyhow::Result<()> {
        self.systemd.stop_unit(unit, "replace").await.map(drop).map_err(plain)
    }

    /// Has the unit stopped and started again, and what is PartOf= it too, and does not wait for that.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub(crate) async fn order_restart(&self, unit: &str) -> anyhow::Result<()> {
        self.systemd.restart_unit(unit, "replace").await.map(drop).map_err(plain)
    }

    /// Stops the unit, starts it again, and waits for the end of the job.
    ///
    /// # Errors
    /// When systemd refuses, with its own words.
    pub async fn restart(&self, unit: &str) -> anyhow::Result<String> {
        let mut removed = self.systemd.receive_job_removed().await?;
        let job = self.systemd.restart_unit(unit, "replace").await.map_err(plain)?;
        self.ended(&mut removed, &job, unit).await
    }

    /// The running units that would be stopped along with this one, and with those units: each is named once, however it needs it.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn all_that_need(&self, unit: &str) -> anyhow::Result<Vec<String>> {
        /// At most so many units are asked about; no reader needs a longer list.
        const MOST: usize = 200;
        let (mut found, mut at) = (vec![unit.to_owned()], 0);
        while at < found.len() && found.len() < MOST {
            for other in self.running_that_need(&found[at]).await? {
                if !found.contains(&other) {
                    found.push(other);
                }
            }
            at += 1;
        }
        Ok(found.split_off(1))
    }

    /// A running unit that would be stopped along with this one (Requires=, BindsTo=), if there is one.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn needed_by(&self, unit: &str) -> anyhow::Result<Option<String>> {
        Ok(self.running_that_need(unit).await?.into_iter().next())
    }

    /// Leaves out units that this unit has pulled in itself, as a pod does with its containers, and the unit of this process.
    async fn running_that_need(&self, unit: &str) -> anyhow::Result<Vec<String>> {
        let known = self.unit(unit).await?;
        let mut needing = known.required_by().await?;
        needing.extend(known.bound_by().await?);
        let mut own = known.requires().await?;
        own.extend(known.wants().await?);
        own.extend(super::own_unit::own_unit());
        let mut running = Vec::new();
        for other in needing.into_iter().filter(|other| !own.contains(other)) {
            if is_running(&self.active_state(&other).await?) {
                running.push(other);
            }
        }
        Ok(running)
    }

    /// A unit that this one requires, or is bound to, and that has failed.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn failed_requirement(&self, unit: &str) -> anyhow::Result<Option<String>> {
        for other in self.unit(unit).await?.requires().await? {
            if self.active_state(&other).await? == "failed" {
                return Ok(Some(other));
            }
        }
        Ok(None)
    }

    /// Does the start of the unit wait for the end of `other`, which is being stopped? Of two units in an order, systemd stops the
    /// one before it starts the other.
    ///
    /// # Errors
    /// When the bus fails.
    pub async fn starts_after_the_end_of(&self, unit: &str, other: &str) -> anyhow::Result<bool> {
        let unit = self.unit(unit).await?;
        let (id, job) = unit.job().await?;
        if id == 0 || !unit.before().await?.iter().any(|before| before == other) {
            return Ok(false);
        }
        let job = self.job(job).await?;
        Ok(job.job_type().await? == "start" && job.state().await? == "waiting")
    }

    /// Stops the unit, and has systemd forget how often it was started: the start limit is for units that fail, not for one that is
    /// put to sleep and woken many times. The unit has failed when the container's first process did not end as a success (it had
    /// to be killed since it knows no SIGTERM, or exits with 143 as Java does); it has been stopped all the same, and there is no
    /// cause for alarm.
    ///
    /// # Errors
    /// As [`SystemdManager::stop`].
    pub async fn put_to_sleep(&self, unit: &str) -> anyhow::Result<String> {
        // systemd thaws it by itself as well; a version that did not would wait for processes that cannot end.
        self.thaw_if_frozen(unit).await.ok();
        let result = self.stop(unit).await?;
        if result == "done" {
            if self.active_state(unit).await? == "failed" {
                let how = self.how_it_ended(unit).await.unwrap_or_default();
                tracing::info!(unit, "systemd calls the stopped unit failed{how}; that is forgotten");
            }
            // It may be unloaded by now, and the counts forgotten.
            self.systemd.reset_failed_unit(unit).await.ok();
        }
        Ok(result)
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

/// Passes on what systemd tells of a unit, for as long as that is followed and the bus exists.
async fn follow(
    unit: String,
    mut signals: zbus::fdo::PropertiesChangedStream,
    teller: watch::Sender<UnitStep>,
    followed: Followed,
) {
    loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Some(signal) => drop(teller.send_replace(UnitStep::of(&signal))),
                None => break,
            },
            () = teller.closed() => {
                // Another one may have begun to follow it.
                let mut all = followed.lock().await;
                if teller.receiver_count() == 0 {
                    drop(all.remove(&unit));
                    return;
                }
            }
        }
    }
    // Those who follow it are told by the end of the last of these.
    drop(followed.lock().await.remove(&unit));
}

async fn is_frozen(unit: &UnitProxy<'_>) -> bool {
    // An old systemd freezes nothing.
    let frozen = ["freezing", "freezing-by-parent", "frozen", "frozen-by-parent"];
    unit.freezer_state().await.is_ok_and(|state| frozen.contains(&state.as_str()))
}

/// How a unit's run ended, from its Result=, ExecMainCode= and ExecMainStatus=, as far as seen. Where no main process ran (the stop
/// came during ExecStartPre=) there is no code.
fn ended_how(result: &str, code: i32, status: i32) -> String {
    use nix::libc::{CLD_DUMPED, CLD_EXITED, CLD_KILLED};
    let main = match code {
        CLD_EXITED => format!(", its main process exited with status {status}"),
        CLD_KILLED | CLD_DUMPED => format!(
            ", its main process was ended by {}",
            nix::sys::signal::Signal::try_from(status)
                .map_or_else(|_| format!("signal {status}"), |signal| signal.as_str().to_owned())
        ),
        _ => String::new(),
    };
    format!(" (Result={result}{main})")
}

/// The object of a unit, which systemd loads the unit for where it is not loaded. Of a unit with several names it is that of the name
/// given: its properties can be read there, but its signals come from that of the first one.
fn object_of(unit: &str) -> anyhow::Result<OwnedObjectPath> {
    let mut path = "/org/freedesktop/systemd1/unit/".to_owned();
    for (at, byte) in unit.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (at > 0 && byte.is_ascii_digit()) {
            path.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            write!(path, "_{byte:02x}").ok();
        }
    }
    Ok(OwnedObjectPath::try_from(path)?)
}

/// The name of the unit whose object that is.
fn name_of(object: &OwnedObjectPath) -> String {
    let escaped = object.as_str().rsplit('/').next().unwrap_or_default();
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()).filter(|_| byte == b'_') {
            Some(code) => {
                bytes.push(code);
                rest = &after[2..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A unit for one command. Dropping it has systemd end the command, if it runs, and forget the unit.
struct Transient {
    systemd: SystemdProxy<'static>,
    unit: String,
    runs: bool,
}

impl Drop for Transient {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (systemd, unit, runs) = (self.systemd.clone(), std::mem::take(&mut self.unit), self.runs);
        // At this process's end systemd does the latter by itself.
        drop(runtime.spawn(async move {
            if runs {
                systemd.stop_unit(&unit, "replace").await.ok();
            }
            systemd.unref_unit(&unit).await.ok();
        }));
    }
}

/// Connects to another user's bus, which may not be worth waiting for.
async fn reach(address: &str, limit: Duration) -> zbus::Result<zbus::Connection> {
    let builder = zbus::connection::Builder::address(address).method_timeout(ANSWER);
    let late = |_| Err(std::io::Error::other(format!("it did not answer within {limit:?}")).into());
    tokio::time::timeout(limit, builder.build()).await.unwrap_or_else(late)
}

async fn wait(removed: &mut JobRemovedStream, job: &OwnedObjectPath) -> anyhow::Result<String> {
    while let Some(signal) = removed.next().await {
        let arguments = signal.args()?;
        if arguments.job() == job {
            return Ok(arguments.result().clone());
        }
    }
    Err(Closed.into())
}

/// The connection to the bus has ended.
#[derive(Debug, thiserror::Error)]
#[error("the bus was closed")]
struct Closed;

/// The D-Bus errors about a peer that has just gone away; it may be back in a moment.
const fn is_gone(error: &zbus::fdo::Error) -> bool {
    use zbus::fdo::Error;
    matches!(
        error,
        Error::NoReply(_) | Error::Disconnected(_) | Error::ServiceUnknown(_) | Error::NameHasNoOwner(_)
    )
}

/// Did the way to the service manager fail, rather than the manager refuse?
#[must_use]
pub fn is_passing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<Closed>()
            || match cause.downcast_ref() {
                Some(zbus::Error::FDO(error)) => is_gone(error),
                Some(zbus::Error::InputOutput(_)) => true,
                _ => false,
            }
    })
}

/// Was there a peer on the bus that did not get to answer? A manager that executes itself anew leaves the bus with open questions.
#[must_use]
pub fn was_left_open(error: &anyhow::Error) -> bool {
    use zbus::fdo::Error::{Disconnected, NoReply};
    let left = |cause: &(dyn std::error::Error + 'static)| matches!(cause.downcast_ref(), Some(zbus::Error::FDO(error)) if matches!(**error, NoReply(_) | Disconnected(_)));
    error.chain().any(left)
}

/// systemd's own sentence, without the D-Bus name around it.
fn plain(error: zbus::Error) -> anyhow::Error {
    match error {
        zbus::Error::MethodError(_, Some(sentence), _) => anyhow::anyhow!(sentence),
        zbus::Error::FDO(error) if !is_gone(&error) => {
            use zbus::DBusError as _;
            error
                .description()
                .map_or_else(|| anyhow::anyhow!("{error}"), |sentence| anyhow::anyhow!("{sentence}"))
        }
        error => error.into(),
    }
}

/// Where the user's bus listens when no environment says so: a system service with User= has none.
fn user_bus() -> Option<PathBuf> {
    if std::env::var_os("DBUS_SESSION_BUS_ADDRESS").is_some() {
        return None;
    }
    let path = paths::runtime_directory().join("bus");
    std::fs::metadata(&path).is_ok_and(|metadata| metadata.file_type().is_socket()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_said_of_an_end_than_was_seen() {
        use nix::libc::{CLD_EXITED, CLD_KILLED, SIGKILL};
        assert_eq!(
            ended_how("exit-code", CLD_EXITED, 143),
            " (Result=exit-code, its main process exited with status 143)"
        );
        assert_eq!(
            ended_how("timeout", CLD_KILLED, SIGKILL),
            " (Result=timeout, its main process was ended by SIGKILL)"
        );
        // ExecStartPre= got the signal.
        assert_eq!(ended_how("signal", 0, 0), " (Result=signal)");
    }

    #[test]
    fn a_step_is_another_state_run_or_job() {
        let told = |state: &str, invocation: u8, job| UnitStep {
            state: Some(state.into()),
            invocation: Some(vec![invocation; 16]),
            job: Some(job),
        };
        let starting = told("activating", 2, 45);
        assert!(told("activating", 2, 45).is_still(&starting), "its main process is another one");
        assert!(told("activating", 2, 0).is_still(&starting), "its job has ended");
        for other in [told("active", 2, 45), told("activating", 3, 45), told("activating", 2, 46)] {
            assert!(!other.is_still(&starting), "{other:?}");
        }
        assert!(!starting.is_still(&UnitStep::default()), "the first that is told of");
        // A service manager that says nothing of the state: each change may be a step.
        assert!(!UnitStep::default().is_still(&UnitStep::default()));
    }

    #[test]
    fn a_unit_has_an_object() {
        for (unit, object) in
            [("web.service", "web_2eservice"), ("0-a@b.socket", "_30_2da_40b_2esocket"), ("ü", "_c3_bc")]
        {
            let path = object_of(unit).unwrap();
            assert_eq!(path.as_str(), format!("/org/freedesktop/systemd1/unit/{object}"));
            assert_eq!(name_of(&path), unit);
        }
    }

    #[tokio::test]
    async fn a_bus_that_says_nothing_is_not_waited_for() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-bus-XXXXXX")).unwrap();
        let path = folder.join("bus");
        let _listening = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let address = format!("unix:path={}", path.display());
        let error = reach(&address, Duration::from_millis(100)).await.unwrap_err();
        assert!(error.to_string().contains("did not answer"), "{error}");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
