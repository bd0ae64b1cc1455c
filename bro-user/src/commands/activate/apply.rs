//! Has systemd take up what was written. A step that fails restores files and units.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::difference::Removal;
use super::plan::Paths;
use super::restart;
use super::signals::{Interrupt, Interrupted};
use super::transaction::{Change, Changed};
use super::waits;
use crate::address::External;
use crate::exit::Failure;
use crate::installed::drift::{self, Standing};
use crate::installed::{Installed, InstalledPort, Mode, SocketUnit, Takeover, pause_unit_of};
use crate::port_owner;
use crate::run_as::RunAsUser;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Applied {
    /// Nothing had to change.
    Nothing,
    /// It listens now; the forwarder was not running, or has been stopped.
    Listening,
    /// The running forwarder has its old settings, and clients.
    OldForwarder,
    /// The running forwarder had its old settings, had no client, and was started anew.
    Restarted,
    /// The same; with `--direct` or `--adopt` the container ran, and was stopped: it held the sockets. With `--adopt=off` too: what it asks would have no
    /// answer.
    Stopped,
    /// Written below another root; nothing was started.
    Written,
}

/// What is left of a container after its sockets are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// It does not run, and did not run.
    Asleep,
    /// It runs.
    Awake,
    /// With `--direct` and `--adopt` it held the socket, and was stopped with it.
    Stopped,
}

/// How long a user's service manager may take to start.
const MANAGER: Duration = Duration::from_secs(90);

/// The managers of the forwarder and of the container: the same but with `--run-as`.
#[derive(Debug)]
pub(super) struct Managers {
    front: SystemdManager,
    /// The container's, where it is another; none where it cannot and need not be reached.
    user: Option<SystemdManager>,
    apart: bool,
}

impl std::ops::Deref for Managers {
    type Target = SystemdManager;

    fn deref(&self) -> &SystemdManager {
        &self.front
    }
}

impl Managers {
    /// The manager of the container.
    pub fn container(&self) -> Option<&SystemdManager> {
        if self.apart { self.user.as_ref() } else { Some(&self.front) }
    }

    /// Both reload their units, the container's manager first: the forwarder has to find what it starts.
    async fn reload(&self) -> anyhow::Result<()> {
        if let Some(user) = &self.user {
            user.reload().await?;
        }
        self.front.reload().await
    }
}

/// Reaches the service managers, or says clearly that one cannot be reached.
pub(super) async fn connect(scope: RuntimeScope, owner: Option<&RunAsUser>) -> anyhow::Result<Managers> {
    let front = connect_front(scope).await?;
    let Some(owner) = owner else { return Ok(Managers { front, user: None, apart: false }) };
    let manager = owner.manager();
    let started = tokio::time::timeout(MANAGER, front.start(&manager)).await;
    let result = started.map_err(|_| anyhow::anyhow!("{manager} did not start within {MANAGER:?}"))??;
    anyhow::ensure!(
        result == "done",
        "the service manager of {}, {manager}, cannot be started ({result}); nothing was changed",
        owner.name
    );
    let user = SystemdManager::connect_as(owner).await.context("nothing was changed")?;
    Ok(Managers { front, user: Some(user), apart: true })
}

/// The same for a removal, which does not wait for a user that is gone, or is not there now.
pub(super) async fn connect_for_removal(
    scope: RuntimeScope,
    owner: Option<&RunAsUser>,
) -> anyhow::Result<Managers> {
    let front = connect_front(scope).await?;
    let user = match owner {
        Some(owner) => SystemdManager::connect_as(owner).await.ok(),
        None => None,
    };
    Ok(Managers { front, user, apart: owner.is_some() })
}

async fn connect_front(scope: RuntimeScope) -> anyhow::Result<SystemdManager> {
    let ours = match scope {
        RuntimeScope::System => "the system's service manager",
        RuntimeScope::User => "this user's service manager",
    };
    SystemdManager::connect(scope).await.with_context(|| {
        format!("{ours} cannot be reached, so nothing was changed (see --dry-run, and --root for images)")
    })
}

/// Podman's user units wait for the system's network-online.target, even if no unit will ever ask for that.
pub(super) async fn network_warning(systemd: &SystemdManager, waits: bool) -> Option<String> {
    const WAITS: &str = "podman-user-wait-network-online.service";
    if !waits || !systemd.load_problem(WAITS).await.is_ok_and(|problem| problem.is_none()) {
        return None;
    }
    let system = SystemdManager::connect(RuntimeScope::System).await.ok()?;
    let state = system.active_state("network-online.target").await.ok()?;
    (state != "active").then(|| {
        format!(
            "the container waits up to 90 s for network-online.target ({WAITS}), and nothing on this host asks for that target; \
             sudo systemctl add-wants multi-user.target network-online.target, or write [Quadlet] DefaultDependencies=false \
             into the quadlet"
        )
    })
}

/// A setting that was asked for must not fail only at the first client.
pub(super) async fn check_freezing(systemd: &SystemdManager, wanted: &Installed) -> anyhow::Result<()> {
    let freezes = wanted.forwarder().is_some_and(|forwarder| forwarder.options.freezes());
    if freezes && !systemd.can_freeze(&wanted.unit).await? {
        bail!(Failure::Usage(crate::service::freeze::cannot_freeze(&wanted.unit)));
    }
    Ok(())
}

/// Its socket units.
fn units(installed: &Installed) -> Vec<String> {
    installed.sockets().map(|socket| socket.name.clone()).collect()
}

/// Writes, enables, reloads and starts. `unfinished` are the files of a run that was killed.
pub(super) async fn activate(
    systemd: Option<&Managers>,
    wanted: &Installed,
    installed: Option<&Installed>,
    changes: &[Change],
    unfinished: &[PathBuf],
    places: &Paths,
    interrupt: &mut Interrupt,
) -> anyhow::Result<Applied> {
    let Some(systemd) = systemd else {
        // Links are part of the change where systemd does not make them.
        let changed = Changed::make(changes)?;
        link(wanted, places)?;
        if let Some(agent) = unadopted(wanted, installed) {
            std::fs::remove_file(wants(places).join(&agent.name)).ok();
        }
        changed.keep();
        return Ok(if changes.is_empty() { Applied::Nothing } else { Applied::Written });
    };
    let plan = Plan::of(systemd, wanted, installed, changes, unfinished).await;
    let is_right = plan.restart.is_empty() && !plan.unread && matches!(plan.timer, Timer::Right);
    if changes.is_empty() && unfinished.is_empty() && is_right {
        return Ok(Applied::Nothing);
    }
    let sockets = installed.map(units).unwrap_or_default();
    let before = UnitsBefore::of(systemd, sockets, installed).await;
    let changed = Changed::make(changes)?;
    let taking_up = take_up(systemd, wanted, installed, &plan);
    match interrupt.or(waits::telling(systemd, installed, taking_up)).await {
        Ok(outcome) => {
            changed.keep();
            Ok(outcome)
        }
        Err(error) => {
            let new: Vec<String> =
                units(wanted).into_iter().filter(|unit| !before.enabled.contains(unit)).collect();
            if let Timer::Stop(timer) | Timer::Restart(timer) = &plan.timer {
                systemd.stop(timer).await.ok();
            }
            // A socket that already listens as it was to would go on listening.
            for unit in new.iter().chain(plan.restart.iter().filter(|unit| !new.contains(unit))) {
                systemd.stop(unit).await.ok();
            }
            if !new.is_empty() {
                systemd.disable(&new).await.ok();
            }
            drop(changed);
            before.restore(systemd, &plan.runner).await;
            for unit in &new {
                systemd.reset_failed(unit).await;
            }
            Err(unchanged(error))
        }
    }
}

/// The same error, and what it means.
fn unchanged(error: anyhow::Error) -> anyhow::Error {
    if error.is::<Interrupted>() { error } else { anyhow::anyhow!("{error:#}; nothing was changed") }
}

/// The socket of an adoption that is to be no more.
fn unadopted<'a>(wanted: &Installed, installed: Option<&'a Installed>) -> Option<&'a SocketUnit> {
    let before = installed.and_then(Installed::adoption)?;
    wanted.adoption().is_none().then_some(&before.agent)
}

/// What has to be done about units.
#[derive(Debug)]
struct Plan {
    /// Socket units that need a new socket.
    restart: Vec<String>,
    /// systemd has not read all that the files say, or said until now.
    unread: bool,
    /// The unit that the sockets wake.
    runner: String,
    /// The runner's own unit has changed.
    runner_changed: bool,
    timer: Timer,
    /// The socket of an adoption that is to be no more.
    unadopted: Option<String>,
}

/// What has to be done about the timer of `--keep-awake`.
#[derive(Debug)]
enum Timer {
    /// Nothing.
    Right,
    /// There is none any more.
    Stop(String),
    /// It is new, has changed, or does not run.
    Restart(String),
}

impl Timer {
    async fn of(
        systemd: &Managers,
        wanted: &Installed,
        installed: Option<&Installed>,
        changes: &[Change],
        unfinished: &[PathBuf],
    ) -> Self {
        let (Some(timer), Some(file)) = (wanted.timer(), wanted.timer_file()) else { return Self::Right };
        if wanted.kept_awake().is_none() {
            let was_there = installed.is_some_and(|installed| installed.kept_awake().is_some());
            return if was_there || systemd.is_active(&timer).await {
                Self::Stop(timer)
            } else {
                Self::Right
            };
        }
        let changed = changes.iter().any(|change| change.path == file) || unfinished.contains(&file);
        if changed || !systemd.is_active(&timer).await || systemd.needs_reload(&timer).await {
            Self::Restart(timer)
        } else {
            Self::Right
        }
    }
}

impl Plan {
    async fn of(
        systemd: &Managers,
        wanted: &Installed,
        installed: Option<&Installed>,
        changes: &[Change],
        unfinished: &[PathBuf],
    ) -> Self {
        let is_changed = |listener: &InstalledPort| {
            let before = installed.and_then(|installed| {
                installed.listeners.iter().find(|before| before.socket == listener.socket)
            });
            // Only what the kernel's socket is made of: no other change in the file needs a new socket.
            // A fence is put up before it: one that is there stays up to the next start, and so does what services are told.
            before != Some(listener)
                && before.is_none_or(|before| {
                    let told =
                        |listener: &InstalledPort| listener.fence.as_ref().map(|fence| fence.told.clone());
                    let is_other = told(listener).is_some_and(|wanted| told(before) != Some(wanted));
                    !same_socket(before, listener) || is_other
                })
        };
        let (mut restart, mut unread) = (Vec::new(), false);
        for listener in &wanted.listeners {
            match drift::of(systemd, before(listener, installed), unfinished).await {
                _ if is_changed(listener) => restart.push(listener.socket.name.clone()),
                Standing::Deaf => restart.push(listener.socket.name.clone()),
                Standing::Unread => unread = true,
                Standing::TakenUp => {}
            }
        }
        let is_touched = |path: &Path| {
            changes.iter().map(|change| &change.path).chain(unfinished).any(|touched| touched == path)
        };
        if let Some(adoption) = wanted.adoption() {
            let agent = &adoption.agent;
            let is_right = systemd.is_active(&agent.name).await && systemd.is_enabled(&agent.name).await;
            if is_touched(&agent.file) || !is_right {
                restart.push(agent.name.clone());
            } else {
                unread |= systemd.needs_reload(&agent.name).await;
            }
        }
        let mut runner_changed = match wanted.forwarder() {
            Some(forwarder) => is_touched(&forwarder.service_file),
            None => true,
        };

        if let Some(service) = wanted.service()
            && systemd.needs_reload(&service).await
        {
            (unread, runner_changed) = (true, true);
        }
        let timer = Timer::of(systemd, wanted, installed, changes, unfinished).await;
        let unadopted = unadopted(wanted, installed).map(|agent| agent.name.clone());
        Self { restart, unread, runner: wanted.runner(), runner_changed, timer, unadopted }
    }
}

/// What ran before a change.
#[derive(Debug, Default)]
struct UnitsBefore {
    enabled: Vec<String>,
    active: Vec<String>,
}

impl UnitsBefore {
    async fn of(systemd: &Managers, sockets: Vec<String>, installed: Option<&Installed>) -> Self {
        let mut before = Self::default();
        for unit in sockets {
            if systemd.is_enabled(&unit).await {
                before.enabled.push(unit.clone());
            }
            if systemd.is_active(&unit).await {
                before.active.push(unit);
            }
        }
        let kept_awake = installed.filter(|installed| installed.kept_awake().is_some());
        if let Some(timer) = kept_awake.and_then(Installed::timer)
            && systemd.is_active(&timer).await
        {
            before.active.push(timer);
        }
        before
    }

    async fn restore(&self, systemd: &Managers, runner: &str) {
        if !self.enabled.is_empty() {
            systemd.enable(&self.enabled).await.ok();
        }
        systemd.reload().await.ok();
        // systemd refuses to start a socket while its service is ending.
        if systemd.is_stopping(runner).await {
            systemd.stop(runner).await.ok();
        }
        for unit in &self.active {
            systemd.start(unit).await.ok();
        }
    }
}

async fn take_up(
    systemd: &Managers,
    wanted: &Installed,
    installed: Option<&Installed>,
    plan: &Plan,
) -> anyhow::Result<Applied> {
    let Plan { restart, runner, timer, .. } = plan;
    let running = systemd.is_active(runner).await;
    let (mut listening, mut stopped, mut held) = (false, false, false);
    for unit in restart {
        listening |= systemd.is_active(unit).await;
    }
    // The sockets may listen without being known, after a first run that was killed.
    if !restart.is_empty() && (installed.is_some() || listening) {
        held = stop_holder(systemd, installed, restart).await?;
        // systemd refuses to start a socket while its service runs, and the service keeps the sockets it was started with.
        if running || systemd.is_stopping(runner).await {
            stop(systemd, runner).await?;
            stopped = running;
        }
        for unit in restart {
            stop(systemd, unit).await?;
        }
    }
    if let Timer::Stop(timer) = timer {
        stop(systemd, timer).await?;
    }
    if let Some(agent) = &plan.unadopted {
        let container = systemd.container().context("the container's service manager is gone")?;
        // While the forwarder is there to answer it.
        let ran = container.is_active(&wanted.unit).await;
        stop(systemd, agent).await?;
        stop(container, &wanted.unit).await?;
        stop(systemd, runner).await?;
        systemd.forget_descriptors(runner).await;
        systemd.disable(std::slice::from_ref(agent)).await?;
        stopped |= ran;
    }
    systemd.enable(&units(wanted)).await?;
    systemd.reload().await?;
    let container = systemd.container().context("the container's service manager is gone")?;
    if let Some(problem) = container.load_problem(&wanted.unit).await? {
        let generator = match wanted.unit_scope() {
            RuntimeScope::System => "/usr/lib/systemd/system-generators/podman-system-generator --dryrun",
            RuntimeScope::User => "/usr/lib/systemd/user-generators/podman-user-generator --user --dryrun",
        };
        bail!(
            "Podman's quadlet generator makes no {} of {} ({problem}); ask it why: {generator}",
            wanted.unit,
            wanted.quadlet.display()
        );
    }
    if let Some(agent) = wanted.adoption().map(|adoption| &adoption.agent.name)
        && restart.contains(agent)
    {
        // Before the others, whose clients start the forwarder: systemd starts no socket of a service that runs.
        systemd.reset_failed(agent).await;
        let result = systemd.start(agent).await?;
        anyhow::ensure!(result == "done", "starting {agent} ended with “{result}”");
    }
    for listener in wanted.listeners.iter().filter(|listener| restart.contains(&listener.socket.name)) {
        systemd.reset_failed(&listener.socket.name).await;
        let result = systemd.start(&listener.socket.name).await?;
        if result != "done" {
            bail!("{}", cannot_listen(systemd, listener, wanted.scope).await);
        }
    }
    let applied = if running && restart.is_empty() && plan.runner_changed && plan.unadopted.is_none() {
        let is_forwarder = wanted.service().is_some();
        if is_forwarder && restart::unless_in_use(systemd, runner, wanted.scope).await? {
            Applied::Restarted
        } else {
            Applied::OldForwarder
        }
    } else if held || (stopped && (plan.unadopted.is_some() || matches!(wanted.mode, Mode::Direct(_)))) {
        Applied::Stopped
    } else {
        Applied::Listening
    };
    // After the forwarder's restart: it starts the forwarder.
    if let Timer::Restart(timer) = timer {
        let result = systemd.restart(timer).await?;
        anyhow::ensure!(result == "done", "starting {timer} ended with “{result}”");
    }
    Ok(applied)
}

/// Stops a container that has one of these sockets by adoption, while the forwarder is there to answer it: nothing else could listen there. Whether
/// there was one.
async fn stop_holder(
    systemd: &Managers,
    installed: Option<&Installed>,
    restart: &[String],
) -> anyhow::Result<bool> {
    let Some(installed) = installed.filter(|installed| {
        installed.adoption().is_some()
            && installed.listeners.iter().any(|listener| restart.contains(&listener.socket.name))
    }) else {
        return Ok(false);
    };
    let container = systemd.container().context("the container's service manager is gone")?;
    let runs = container.is_active(&installed.unit).await;
    if runs {
        stop(container, &installed.unit).await?;
    }
    Ok(runs)
}

/// The listener as it was, if there was one: systemd may have taken that up.
fn before<'a>(listener: &'a InstalledPort, installed: Option<&'a Installed>) -> &'a InstalledPort {
    let before = installed
        .and_then(|installed| installed.listeners.iter().find(|before| before.socket == listener.socket));
    before.unwrap_or(listener)
}

fn same_socket(before: &InstalledPort, now: &InstalledPort) -> bool {
    (&before.external, before.backlog, &before.device, &before.service)
        == (&now.external, now.backlog, &now.device, &now.service)
}

async fn stop(systemd: &SystemdManager, unit: &str) -> anyhow::Result<()> {
    let result = systemd.stop(unit).await.with_context(|| format!("cannot stop {unit}"))?;
    anyhow::ensure!(result == "done", "stopping {unit} ended with “{result}”");
    Ok(())
}

async fn cannot_listen(systemd: &Managers, listener: &InstalledPort, scope: RuntimeScope) -> String {
    let (unit, external) = (&listener.socket.name, &listener.external);
    let user = if scope == RuntimeScope::User { " --user" } else { "" };
    if let Some(port_owner::AddressTrouble::Taken(holder)) = port_owner::look(external) {
        return taken(external, &holder, Some(systemd)).await;
    }
    format!("systemd cannot listen at {external}; see `journalctl{user} --unit {unit}`")
}

/// The sentence about an address that is taken.
pub(super) async fn taken(
    external: &External,
    holder: &port_owner::AddressHolder,
    systemd: Option<&Managers>,
) -> String {
    let unit = match systemd {
        Some(systemd) => systemd.socket_at(holder.kind, &holder.address).await,
        None => None,
    };
    format!("{external} is taken {}", holder.who(unit.as_deref()))
}

/// Stops, disables, removes and reloads. Says what became of the container.
pub(super) async fn remove(
    systemd: Option<&Managers>,
    removal: &Removal,
    places: &Paths,
    interrupt: &mut Interrupt,
) -> anyhow::Result<Left> {
    let Removal { installed, sockets, changes, rest } = removal;
    let rest = rest.as_ref();
    let Some(systemd) = systemd else {
        // Where the notes of what was made are gone too, an empty directory counts as made.
        let main = match installed.forwarder() {
            Some(forwarder) => Some(&forwarder.service_file),
            None => {
                let mut ports = installed.listeners.iter();
                let first = ports.find(|listener| listener.service == installed.name);
                first.map(|listener| &listener.socket.file)
            }
        };
        let made = installed.made.contains(&places.units) || !main.is_some_and(|file| file.exists());
        let changed = Changed::make(changes)?;
        for socket in sockets {
            std::fs::remove_file(wants(places).join(&socket.name)).ok();
        }
        // Otherwise it is noted as made itself, or it is not bro's.
        if rest.is_none() && made {
            std::fs::remove_dir(wants(places)).ok();
        }
        changed.keep();
        return Ok(Left::Asleep);
    };
    let mut all = units(installed);
    all.extend(
        sockets
            .iter()
            .map(|socket| socket.name.clone())
            .filter(|name| !all.contains(name))
            .collect::<Vec<_>>(),
    );
    let before = UnitsBefore::of(systemd, all, Some(installed)).await;
    let ran = match (&installed.mode, systemd.container()) {
        (Mode::Direct(_) | Mode::Adopt(_), Some(container)) => container.is_active(&installed.unit).await,
        (Mode::Forward(_), _) | (_, None) => false,
    };
    let taking_down = take_down(systemd, removal, places);
    let changed = match interrupt.or(waits::telling(systemd, Some(installed), taking_down)).await {
        Ok(changed) => changed,
        Err(error) => {
            before.restore(systemd, &installed.runner()).await;
            return Err(unchanged(error));
        }
    };
    changed.keep();
    systemd.reload().await?;
    // Stopping the forwarder has stopped nothing else: the remaining sockets go on listening.
    for listener in rest.map(|rest| rest.listeners.as_slice()).unwrap_or_default() {
        systemd.start(&listener.socket.name).await?;
    }
    Ok(match systemd.container() {
        Some(container) if ran && !container.is_active(&installed.unit).await => Left::Stopped,
        Some(container) if rest.is_none() && container.is_active(&installed.unit).await => Left::Awake,
        _ => Left::Asleep,
    })
}

async fn take_down(systemd: &Managers, removal: &Removal, places: &Paths) -> anyhow::Result<Changed> {
    let Removal { installed, sockets, changes, rest } = removal;
    let (there, gone): (Vec<&SocketUnit>, Vec<&SocketUnit>) =
        sockets.iter().partition(|socket| socket.file.exists());
    // A socket would start the forwarder again at once; so the sockets go first.
    for socket in &there {
        stop(systemd, &socket.name).await?;
    }
    for socket in &gone {
        // systemd listens on, though no file shows it.
        if systemd.is_active(&socket.name).await {
            stop(systemd, &socket.name).await?;
        }
    }
    let whole = rest.is_none();
    if whole
        && installed.adoption().is_some()
        && let Some(container) = systemd.container()
        && container.is_active(&installed.unit).await
    {
        // Its clients are its own, and after the forwarder's end no call of it would be answered.
        stop(container, &installed.unit).await?;
    }
    if let Some(service) = installed.service() {
        if systemd.is_active(&service).await {
            stop(systemd, &service).await?;
        }
        if whole && installed.adoption().is_some() {
            systemd.forget_descriptors(&service).await;
        }
    }
    let enabled: Vec<String> = there.iter().map(|socket| socket.name.clone()).collect();
    if !enabled.is_empty() {
        systemd.disable(&enabled).await?;
    }
    for socket in &gone {
        // systemd disables no unit that has lost its file.
        let link = wants(places).join(&socket.name);
        if link.is_symlink() {
            std::fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
        }
    }
    let is_removed = |file: &Path| changes.iter().any(|change| change.path == file && change.text.is_none());
    if let Mode::Direct(Takeover { pause_unit: Some(file), .. }) = &installed.mode
        && is_removed(file)
    {
        stop(systemd, &pause_unit_of(&installed.name)).await?;
    }
    if let (Some(timer), Some(file)) = (installed.timer(), installed.timer_file())
        && is_removed(&file)
    {
        stop(systemd, &timer).await?;
    }
    Changed::make(changes)
}

/// Where the links that enable sockets are.
pub(super) fn wants(places: &Paths) -> PathBuf {
    places.units.join("sockets.target.wants")
}

/// What enabling does, where no systemd does it.
fn link(wanted: &Installed, places: &Paths) -> anyhow::Result<()> {
    let directory = wants(places);
    if !directory.is_dir() {
        let cannot = || format!("cannot make {}", directory.display());
        std::fs::create_dir(&directory).with_context(cannot)?;
        if places.scope == RuntimeScope::System {
            // Whatever the umask.
            std::fs::set_permissions(&directory, Permissions::from_mode(0o755)).with_context(cannot)?;
        }
    }
    for unit in units(wanted) {
        let link = directory.join(&unit);
        if let Err(error) = std::os::unix::fs::symlink(format!("../{unit}"), &link)
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(error).with_context(|| format!("cannot make the link {}", link.display()));
        }
    }
    Ok(())
}
