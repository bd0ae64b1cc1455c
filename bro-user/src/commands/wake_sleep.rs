//! `bro wake` and `bro sleep`: a service is woken and put to sleep by hand, through its forwarder where one is running.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::{Instant, sleep as pause, timeout_at};

use super::status::Report;
use crate::cli::wake_sleep::{Sleep, Wake, Whom};
use crate::control_socket::{self, Reply, Request};
use crate::exit::{Failure, on_one_line};
use crate::installed;
use crate::run_as::RunAsUser;
use crate::service::use_lock::{self, UnitLock, Use};
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

/// Between two looks for a forwarder that is about to come or to go.
const LOOK: Duration = Duration::from_millis(50);

/// How long a stop may take: systemd kills what takes longer than TimeoutStopSec=, 90 s by default.
const STOP: Duration = Duration::from_secs(100);

/// The named service.
#[derive(Debug)]
struct AskedService {
    /// What the first client starts.
    unit: String,
    /// The forwarder's unit, where it may have one.
    activator: Option<String>,
    scope: RuntimeScope,
    /// The container's owner, where the forwarder is the system's.
    run_as: Option<RunAsUser>,
    /// `bro activate` set it up.
    is_activated: bool,
}

impl AskedService {
    fn of(whom: &Whom) -> anyhow::Result<Self> {
        let scope = RuntimeScope::choose(whom.system, whom.user);
        if let Ok(activated) = installed::find(&whom.name, scope) {
            let activator = activated.service();
            let (scope, run_as) = (activated.scope, activated.run_as);
            return Ok(Self { unit: activated.unit, activator, scope, run_as, is_activated: true });
        }
        // A forwarder with units written by hand.
        let stem = whom.name.strip_suffix(".service").unwrap_or(&whom.name);
        if stem.is_empty() || stem.contains(['/', '\n']) {
            bail!(Failure::Usage(format!("{:?} is no name of a service", whom.name)));
        }
        Ok(Self {
            unit: format!("{stem}.service"),
            activator: Some(format!("{stem}-activator.service")),
            scope,
            run_as: None,
            is_activated: false,
        })
    }

    /// The service manager that the container's unit is under.
    async fn units_bus(&self) -> anyhow::Result<SystemdManager> {
        match &self.run_as {
            Some(owner) => SystemdManager::connect_as(owner).await,
            None => SystemdManager::connect(self.scope).await,
        }
    }

    /// The forwarder is the system's, and an ordinary user may not start it: then the user's own unit is started.
    fn is_beyond_us(&self) -> bool {
        self.run_as.is_some() && !nix::unistd::geteuid().is_root()
    }

    /// The running forwarders that start this unit, and what they say of themselves.
    async fn forwarders(&self) -> Vec<(PathBuf, Report)> {
        let user = self.run_as.as_ref().map_or_else(|| nix::unistd::geteuid().as_raw(), |owner| owner.uid);
        let manager = if self.run_as.is_some() { RuntimeScope::User } else { self.scope };
        let mut found = Vec::new();
        // Another user's answer is not to be trusted.
        for path in control_socket::sockets().into_iter().filter(|path| control_socket::is_of(path, user)) {
            let Ok(report) = control_socket::ask_soon::<Report>(&path, Request::Status).await else {
                continue;
            };
            if report.starts(&self.unit, manager) {
                found.push((path, report));
            }
        }
        found
    }

    /// Is it a unit that a forwarder wakes, and so may be put to sleep? Other units are for systemctl.
    async fn check_is_ours(&self) -> anyhow::Result<()> {
        if self.is_activated {
            return Ok(());
        }
        if let Some(activator) = &self.activator
            && SystemdManager::connect(self.scope).await?.known(activator).await?.load == "loaded"
        {
            return Ok(());
        }
        bail!(Failure::NotFound(format!(
            "{} is not activated, and no forwarder for it runs (see `bro status`); systemctl stops any unit",
            self.unit
        )))
    }

    /// Makes this process the only user of the unit.
    fn alone(&self) -> std::io::Result<UnitLock> {
        // The lock is where the forwarder takes it.
        let _acting = self.run_as.as_ref().map(RunAsUser::act).transpose().map_err(std::io::Error::other)?;
        Use::alone(&self.unit, None)
    }

    /// Is there such a unit?
    async fn check(&self, bus: &SystemdManager, unit: &str) -> anyhow::Result<()> {
        let known = bus.known(unit).await?;
        if known.load == "not-found" {
            bail!(Failure::NotFound(format!(
                "systemd knows no {unit} (see `bro status` for what is activated)"
            )));
        }
        Ok(())
    }
}

/// Wakes an activated service, for a user that looks at it.
///
/// # Errors
/// When it does not come up in time.
pub async fn wake_up(whom: &Whom, limit: Duration) -> anyhow::Result<String> {
    let (service, deadline) = (AskedService::of(whom)?, Instant::now() + limit);
    match timeout_at(deadline, wake_within(&service, deadline)).await {
        Ok(woken) => woken,
        Err(_) => bail!("{} is not ready after {limit:?}", service.unit),
    }
}

/// Runs `bro wake`.
///
/// # Errors
/// When the service does not come up in time.
pub fn wake(options: &Wake) -> anyhow::Result<()> {
    let service = AskedService::of(&options.whom)?;
    let limit = options.timeout.or_forever();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let message = runtime.block_on(async {
        let deadline = Instant::now() + limit;
        match timeout_at(deadline, wake_within(&service, deadline)).await {
            Ok(woken) => woken,
            Err(_) => bail!("{} is not ready after {}", service.unit, options.timeout),
        }
    })?;
    writeln!(std::io::stdout(), "{}", on_one_line(&format!("{}: {message}", service.unit)))?;
    Ok(())
}

async fn wake_within(service: &AskedService, deadline: Instant) -> anyhow::Result<String> {
    let mut started = false;
    loop {
        let forwarders = service.forwarders().await;
        if let Some((path, _)) = forwarders.first() {
            let patience = deadline.saturating_duration_since(Instant::now());
            match control_socket::ask::<Reply>(path, Request::Wake, patience).await {
                Ok(outcome) if outcome.done => return Ok(outcome.message),
                Ok(outcome) if !outcome.leaving => bail!("{}: {}", service.unit, outcome.message),
                // The forwarder is gone, or will be in a moment.
                Ok(_) | Err(_) => started = false,
            }
        } else if !started {
            let bus = if service.is_beyond_us() {
                service.units_bus().await?
            } else {
                SystemdManager::connect(service.scope).await?
            };
            let activator = service.activator.as_ref().filter(|_| !service.is_beyond_us());
            let Some(activator) = activator else {
                // The container takes its sockets over itself, or the forwarder comes with the first client.
                service.check(&bus, &service.unit).await?;
                let result = bus
                    .start(&service.unit)
                    .await
                    .with_context(|| format!("cannot start {}", service.unit))?;
                anyhow::ensure!(result == "done", "starting {} ended with “{result}”", service.unit);
                if service.is_beyond_us()
                    && let Ok(invocation) = bus.invocation(&service.unit).await
                {
                    // As if its forwarder had: that will put it to sleep again.
                    use_lock::remember(&service.unit, &invocation);
                }
                return Ok("awake".to_owned());
            };
            service.check(&bus, activator).await?;
            let result = bus.start(activator).await.with_context(|| format!("cannot start {activator}"))?;
            anyhow::ensure!(
                matches!(result.as_str(), "done" | "canceled"),
                "starting {activator} ended with “{result}”; see `{} {activator}`",
                service.scope.journal()
            );
            started = true;
        }
        pause(LOOK).await;
    }
}

/// Runs `bro sleep`.
///
/// # Errors
/// When clients are connected, or the unit cannot be stopped.
pub fn sleep(options: &Sleep) -> anyhow::Result<()> {
    let service = AskedService::of(&options.whom)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let message = runtime.block_on(put_away(&options.whom, options.force))?;
    writeln!(std::io::stdout(), "{}", on_one_line(&format!("{}: {message}", service.unit)))?;
    Ok(())
}

/// Puts an activated service to sleep, for a user that looks at it.
///
/// # Errors
/// As [`sleep`].
pub async fn put_away(whom: &Whom, force: bool) -> anyhow::Result<String> {
    let service = AskedService::of(whom)?;
    match tokio::time::timeout(STOP, put_to_sleep(&service, force)).await {
        Ok(message) => message,
        Err(_) => bail!("{} has not stopped after {STOP:?}", service.unit),
    }
}

/// Says which other units stop along with it, before they do.
async fn announce(service: &AskedService) {
    // Without an answer to that it is stopped all the same: it was asked for by force.
    let Ok(bus) = service.units_bus().await else { return };
    let Ok(needing) = bus.all_that_need(&service.unit).await else { return };
    let needing: Vec<String> =
        needing.into_iter().filter(|unit| Some(unit) != service.activator.as_ref()).collect();
    if !needing.is_empty() {
        let text = on_one_line(&with_it(&service.unit, &needing));
        writeln!(std::io::stderr(), "bro: {text}").ok();
    }
}

fn with_it(unit: &str, needing: &[String]) -> String {
    match needing {
        [one] => format!("{one}, which needs {unit}, is stopped along with it"),
        several => format!("{}, which need {unit}, are stopped along with it", several.join(", ")),
    }
}

async fn put_to_sleep(service: &AskedService, force: bool) -> anyhow::Result<String> {
    if force {
        announce(service).await;
    }
    loop {
        let forwarders = service.forwarders().await;
        if forwarders.is_empty() {
            break;
        }
        // Before the first of several forwarders is asked: all of them sleep, or none.
        let clients: Vec<&str> =
            forwarders.iter().flat_map(|(_, report)| &report.peers).map(String::as_str).collect();
        if !force {
            refuse_for(service, &clients)?;
        }
        let mut last = None;
        for (path, _) in &forwarders {
            match control_socket::ask::<Reply>(path, Request::Sleep { force }, STOP).await {
                Ok(outcome) => {
                    let clients: Vec<&str> = outcome.clients.iter().map(String::as_str).collect();
                    refuse_for(service, &clients)?;
                    last = Some(outcome);
                }
                Err(error) => tracing::debug!(%error, "a forwarder has gone meanwhile"),
            }
        }
        match last {
            Some(outcome) if outcome.done => return Ok(outcome.message),
            Some(outcome) if !outcome.leaving => bail!("{}: {}", service.unit, outcome.message),
            // It is gone in a moment, or a client has connected and it stays.
            _ => pause(LOOK).await,
        }
    }
    // No forwarder, or none any more: this process has to stop the unit.
    let bus = service.units_bus().await?;
    service.check(&bus, &service.unit).await?;
    service.check_is_ours().await?;
    let _alone = loop {
        match service.alone() {
            Ok(UnitLock::Taken) if !force => pause(LOOK).await,
            Ok(UnitLock::Had(alone)) => break Some(alone),
            Ok(UnitLock::Taken) | Err(_) => break None,
        }
    };
    if matches!(bus.active_state(&service.unit).await?.as_str(), "inactive" | "failed") {
        return Ok("asleep already".to_owned());
    }
    if let Some(other) = bus.needed_by(&service.unit).await?.filter(|_| !force) {
        bail!("{other} needs {}, and would be stopped along with it (--force stops both)", service.unit);
    }
    let result = bus.put_to_sleep(&service.unit).await;
    let result = result.with_context(|| format!("cannot stop {}", service.unit))?;
    anyhow::ensure!(result == "done", "stopping {} ended with “{result}”", service.unit);
    Ok("stopped".to_owned())
}

fn refuse_for(service: &AskedService, clients: &[&str]) -> anyhow::Result<()> {
    if clients.is_empty() {
        return Ok(());
    }
    bail!("{} has clients: {} (--force resets them)", service.unit, clients.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_who_goes_down_with_it() {
        let units = ["a.service", "b.service"].map(str::to_owned);
        assert_eq!(
            with_it("db.service", &units[..1]),
            "a.service, which needs db.service, is stopped along with it"
        );
        assert!(
            with_it("db.service", &units).starts_with("a.service, b.service, which need db.service, are")
        );
    }
}
