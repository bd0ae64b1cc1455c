//! Every service there is a forwarder for, running or not: what `bro activate` has set up, and what forwarders set up by hand
//! report.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{Activity, Report, ServiceState, Waiting};
use crate::control_socket::{self, Request};
use crate::installed::{self, Installed, drift};
use crate::ledger::{self, Counts, Own};
use crate::service::failed_wake::{self, FailedWake};
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::time_span::roughly;

/// One service.
#[derive(Debug, Serialize)]
pub(crate) struct ListedService {
    /// The quadlet's name, or that of the unit.
    pub name: String,
    /// The unit that the first client starts; none where a forwarder starts none.
    pub unit: Option<String>,
    /// Where clients connect.
    pub addresses: Vec<String>,
    /// How it is.
    pub state: ServiceState,
    /// Since when, in seconds since 1970.
    pub since: Option<u64>,
    /// Why: the client that woke it, or `bro wake`.
    pub woken_by: Option<String>,
    /// What a long start is doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// It is not put to sleep for idleness before that, in seconds since 1970 (`--keep-awake`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept_awake_until: Option<u64>,
    /// Connections now, with those that predecessors of its forwarders finish.
    pub connections: u64,
    /// The clients not let in, since there are as many connections as may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    /// The last wake that failed and was followed by none that succeeded.
    pub failed_wake: Option<FailedWake>,
    /// The reports of its forwarders.
    pub forwarders: Vec<Report>,
    /// What all forwarders of its unit have counted since the host was booted.
    #[serde(skip)]
    pub counts: Counts,
    /// The service manager's answer; none where it was not asked.
    #[serde(skip)]
    systemds: Option<ServiceState>,
    /// Further names that it goes by, as `bro activate` and `bro sleep` take them.
    #[serde(skip)]
    pub also: Vec<String>,
}

impl ListedService {
    pub(super) fn is_called(&self, name: &str) -> bool {
        let services = self.forwarders.iter().filter_map(|report| report.service.as_deref());
        self.name == name
            || self.also.iter().any(|also| also == name)
            || self
                .unit
                .as_deref()
                .into_iter()
                .chain(services)
                .any(|unit| unit == name || unit.strip_suffix(".service") == Some(name))
    }

    fn new(name: String, unit: Option<String>, addresses: Vec<String>) -> Self {
        let state = ServiceState::Asleep;
        Self {
            name,
            unit,
            addresses,
            state,
            since: None,
            woken_by: None,
            doing: None,
            kept_awake_until: None,
            connections: 0,
            waiting: None,
            failed_wake: None,
            forwarders: Vec::new(),
            counts: Counts::default(),
            systemds: None,
            also: Vec::new(),
        }
    }

    fn of(installed: &Installed) -> Self {
        let addresses = installed.listeners.iter().map(|listener| listener.external.to_string()).collect();
        let quadlet = installed.quadlet.file_name().map(|file| file.to_string_lossy().into_owned());
        let sockets = installed.sockets().map(|socket| socket.name.clone());
        Self {
            failed_wake: failed_wake::noted(installed),
            also: quadlet.into_iter().chain(installed.service()).chain(sockets).collect(),
            ..Self::new(installed.name.clone(), Some(installed.unit.clone()), addresses)
        }
    }

    /// What its forwarders know goes before what systemd knows, as far as both can be true. Wherever a forwarder is shown, its
    /// state is the service's.
    fn hear(&mut self, mut report: Report) {
        if believes(report.activity.state, self.systemds) {
            self.state = report.activity.state;
            self.since = report.activity.since.or(self.since);
            self.woken_by.clone_from(&report.activity.woken_by);
            self.doing.clone_from(&report.activity.doing);
        } else {
            let kept_awake_until = report.activity.kept_awake_until;
            report.activity =
                Activity { state: self.state, since: self.since, kept_awake_until, ..Activity::default() };
        }
        self.kept_awake_until = report.activity.kept_awake_until.max(self.kept_awake_until);
        if let Some(failed) = &report.failed_wake
            && self.failed_wake.as_ref().is_none_or(|noted| noted.at <= failed.at)
        {
            self.failed_wake = Some(failed.clone());
        }
        self.waiting = report.waiting.clone().or(self.waiting.take());
        self.forwarders.push(report);
        let answers = |pid: i32| self.forwarders.iter().any(|report| report.pid.cast_signed() == pid);
        let connections = |report: &Report| {
            // A predecessor with its own socket has answered itself.
            let before = report.predecessor.as_ref().filter(|predecessor| !answers(predecessor.pid));
            report.connections() + before.and_then(|predecessor| predecessor.connections).unwrap_or(0)
        };
        self.connections = self.forwarders.iter().map(connections).sum();
    }
}

/// Is a service as its forwarder says, and not as the service manager says, if that was asked?
const fn believes(forwarder: ServiceState, systemd: Option<ServiceState>) -> bool {
    match (forwarder, systemd) {
        // That this forwarder has not woken it is not to hide that it has failed, or that another process has started it.
        (ServiceState::Asleep, _) => false,
        // Without a run of its unit it is not awake, whatever was true a moment ago.
        (
            ServiceState::Awake | ServiceState::Busy,
            Some(
                ServiceState::Asleep
                | ServiceState::Starting
                | ServiceState::Stopping
                | ServiceState::Failed
                | ServiceState::Frozen,
            ),
        ) => false,
        // Nor is it frozen unless its unit is.
        (ServiceState::Frozen, Some(systemd)) => matches!(systemd, ServiceState::Frozen),
        _ => true,
    }
}

/// All of them, by name.
///
/// # Errors
/// When the unit directory cannot be read.
pub(crate) async fn all(scope: RuntimeScope) -> anyhow::Result<Vec<ListedService>> {
    let activated = installed::all(scope)?;
    let sockets = control_socket::sockets();
    let (mut buses, mut reports) = tokio::join!(
        async { if activated.is_empty() { Buses::default() } else { Buses::connect(scope).await } },
        ask_all(sockets)
    );
    let mut services = Vec::new();
    for installed in activated {
        let mut service = ListedService::of(&installed);
        match buses.of(&installed).await {
            // Without systemd's word it is asleep, as far as bro knows.
            Some((front, container)) => drop(look(&mut service, &installed, front, container).await),
            // A manager that does not run does not listen.
            None => service.state = ServiceState::Deaf,
        }
        let (its, others) =
            reports.into_iter().partition(|report| report.starts(&installed.unit, installed.unit_scope()));
        let its: Vec<Report> = its;
        reports = others;
        its.into_iter().for_each(|report| service.hear(report));
        service.counts = ledger::total_of(&installed, &own(&service));
        services.push(service);
    }
    for report in reports {
        let unit = report.unit.clone();
        let by = unit.clone().or_else(|| report.service.clone());
        let name = by.map_or_else(|| format!("process {}", report.pid), |unit| unit.replace(".service", ""));
        let at =
            services.iter().position(|service| unit.is_some() && service.unit == unit).unwrap_or_else(|| {
                services.push(ListedService::new(name, unit, Vec::new()));
                services.len() - 1
            });
        let addresses = report.listeners.iter().map(|listener| listener.address.clone());
        services[at].addresses.extend(addresses);
        services[at].hear(report);
        let service = &services[at];
        services[at].counts = ledger::total(service.unit.as_deref(), &own(service));
    }
    services.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(services)
}

/// The service of one forwarder, as the forwarder sees it.
pub(crate) fn alone(report: Report) -> ListedService {
    let unit = report.unit.clone();
    let by = unit.clone().or_else(|| report.service.clone());
    let mut service =
        ListedService::new(by.unwrap_or_else(|| "bro".into()).replace(".service", ""), unit, Vec::new());
    service.hear(report);
    service.counts = ledger::total(service.unit.as_deref(), &own(&service));
    service
}

/// What its running forwarders have counted themselves.
fn own(service: &ListedService) -> Vec<&Own> {
    service.forwarders.iter().map(|report| &report.own).collect()
}

/// A socket without a forwarder was left by one that was killed.
async fn ask_all(sockets: Vec<PathBuf>) -> Vec<Report> {
    let mut reports = Vec::new();
    for path in sockets {
        reports.extend(control_socket::ask_soon(&path, Request::Status).await.ok());
    }
    reports
}

/// The service managers that are asked, as far as they run.
#[derive(Default)]
struct Buses {
    own: Option<SystemdManager>,
    system: Option<SystemdManager>,
    /// Of users with containers that the system's forwarders serve.
    users: Vec<(u32, Option<SystemdManager>)>,
}

impl Buses {
    async fn connect(scope: RuntimeScope) -> Self {
        let own = SystemdManager::connect(scope).await.ok();
        let system = own.clone().filter(|_| scope == RuntimeScope::System);
        Self { own, system, users: Vec::new() }
    }

    /// The forwarder's manager, and the container's; that one may be started by the first client only.
    async fn of(&mut self, installed: &Installed) -> Option<(SystemdManager, Option<SystemdManager>)> {
        let Some(owner) = &installed.run_as else {
            return self.own.clone().map(|own| (own.clone(), Some(own)));
        };
        let front = match &self.system {
            Some(system) => system.clone(),
            None => self.system.insert(SystemdManager::connect(RuntimeScope::System).await.ok()?).clone(),
        };
        if let Some((_, user)) = self.users.iter().find(|(uid, _)| *uid == owner.uid) {
            return Some((front, user.clone()));
        }
        let user = SystemdManager::connect_as(owner).await.ok();
        self.users.push((owner.uid, user.clone()));
        Some((front, user))
    }
}

/// What systemd knows of a service.
async fn look(
    service: &mut ListedService,
    installed: &Installed,
    systemd: SystemdManager,
    container: Option<SystemdManager>,
) -> anyhow::Result<()> {
    let unit = match container {
        Some(container) => Some(container.known(&installed.unit).await?),
        None => None,
    };
    let mut deaf = false;
    let mut addresses = Vec::new();
    for listener in &installed.listeners {
        deaf |= systemd.active_state(&listener.socket.name).await? != "active";
        match systemd.live(&listener.socket.name).await {
            // The file was changed, or there is a drop-in: systemd's word counts.
            Ok(live) if !live.listen.is_empty() && !drift::listens_there(listener, &live) => {
                addresses.extend(live.listen.iter().map(ToString::to_string));
            }
            _ => addresses.push(listener.external.to_string()),
        }
    }
    service.addresses = addresses;
    let (mut failed, mut restarting) = (false, false);
    if let Some(forwarder) = installed.service() {
        failed = systemd.active_state(&forwarder).await? == "failed";
        restarting = systemd.restart_loop(&forwarder).await?.is_some();
    }
    let is_frozen = unit.as_ref().is_some_and(|unit| unit.is_frozen);
    service.state = match unit.as_ref().map_or("inactive", |unit| unit.active.as_str()) {
        _ if deaf => ServiceState::Deaf,
        // However the container is: a new client waits for a forwarder that does not get up.
        _ if restarting => ServiceState::Failed,
        "inactive" if failed => ServiceState::Failed,
        active => of_unit(active, is_frozen),
    };
    // A service that does not listen, or has a forwarder that does not get up, may be awake all the same for its present clients.
    service.systemds = unit.as_ref().map(|unit| of_unit(&unit.active, unit.is_frozen));
    service.since = unit.and_then(|unit| unit.active_since).filter(|_| service.state == ServiceState::Awake);
    Ok(())
}

/// From a unit's ActiveState and FreezerState.
fn of_unit(active: &str, is_frozen: bool) -> ServiceState {
    match active {
        "active" | "reloading" if is_frozen => ServiceState::Frozen,
        "active" | "reloading" => ServiceState::Awake,
        "activating" => ServiceState::Starting,
        "deactivating" => ServiceState::Stopping,
        "failed" => ServiceState::Failed,
        _ => ServiceState::Asleep,
    }
}

pub(super) fn describe(services: &[ListedService]) -> String {
    if services.is_empty() {
        return "Nothing is activated, and no forwarder of this user is running.\n".into();
    }
    let mut text = String::new();
    let width = services.iter().map(|service| service.name.chars().count()).max().unwrap_or(0);
    for service in services {
        let padding = width - service.name.chars().count();
        // Writing to a String cannot fail.
        writeln!(text, "{}{:padding$}  {}", service.name, "", about(service)).ok();
    }
    text
}

/// One service in a sentence.
pub(crate) fn sentence(service: &ListedService) -> String {
    format!("{}: {}", service.name, about(service))
}

fn about(service: &ListedService) -> String {
    let mut text = since(service.state, service.since, &service.name);
    if let Some(doing) = &service.doing {
        write!(text, ": {doing}").ok();
    }
    if let Some(by) = &service.woken_by {
        write!(text, ", woken by {by}").ok();
    }
    if let Some(left) = service.kept_awake_until.and_then(left) {
        write!(text, ", kept awake for another {}", roughly(left)).ok();
    }
    if service.connections > 0 {
        write!(
            text,
            ", {} connection{}",
            service.connections,
            if service.connections == 1 { "" } else { "s" }
        )
        .ok();
    }
    if let Some(waiting) = &service.waiting {
        write!(text, "; {waiting}").ok();
    }
    let rhythms = service.forwarders.iter().filter_map(|report| report.rhythm.as_ref()?.remark());
    for remark in rhythms {
        write!(text, "; {remark}").ok();
    }
    if !service.addresses.is_empty() {
        write!(text, "; at {}", service.addresses.join(", ")).ok();
    }
    if let Some(failed) = &service.failed_wake {
        write!(text, "; last wake failed {} ago: {}", failed.since(), failed.why).ok();
    }
    text
}

/// “awake for 3 min”, of the service of that name.
pub(super) fn since(state: ServiceState, since: Option<u64>, name: &str) -> String {
    let word = match state {
        ServiceState::Deaf | ServiceState::Failed => format!("{} (see `bro doctor {name}`)", state.word()),
        state => state.word().to_owned(),
    };
    age(since).map_or_else(|| word.clone(), |span| format!("{word} for {}", roughly(span)))
}

/// How long it is until a time, in seconds since 1970.
fn left(until: u64) -> Option<Duration> {
    let until = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(until))?;
    until.duration_since(SystemTime::now()).ok()
}

/// How long ago a time was, in seconds since 1970.
pub(crate) fn age(since: Option<u64>) -> Option<Duration> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    since.map(|since| Duration::from_secs(now.saturating_sub(since)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A service that sleeps.
    pub(crate) fn service(name: &str) -> ListedService {
        ListedService::new(name.into(), Some(format!("{name}.service")), Vec::new())
    }

    #[test]
    fn spans_are_said_roughly() {
        for (seconds, said) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1min"),
            (3_700, "1h 1min"),
            (86_400 * 3 + 5, "3d"),
            (90_000, "1d 1h"),
        ] {
            assert_eq!(roughly(Duration::from_secs(seconds)), said);
        }
    }

    #[test]
    fn what_is_advised_names_the_service() {
        assert_eq!(since(ServiceState::Failed, None, "web"), "failed (see `bro doctor web`)");
        assert_eq!(since(ServiceState::Deaf, None, "web@blue"), "not listening (see `bro doctor web@blue`)");
    }

    #[test]
    fn a_forwarder_is_believed_as_far_as_its_unit_can_be_so() {
        use ServiceState::{Asleep, Awake, Busy, Deaf, Failed, Frozen, Starting, Stopping};
        for (forwarder, systemd, believed) in [
            (Asleep, Some(Awake), false),
            (Asleep, Some(Failed), false),
            (Asleep, None, false),
            (Awake, Some(Awake), true),
            (Awake, None, true),
            (Busy, Some(Awake), true),
            // Awake for a minute, with 14 connections, and its unit's start waits for the network.
            (Awake, Some(Asleep), false),
            (Awake, Some(Starting), false),
            (Busy, Some(Failed), false),
            (Starting, Some(Asleep), true),
            (Starting, Some(Awake), true),
            (Stopping, Some(Awake), true),
            (Frozen, Some(Frozen), true),
            (Frozen, Some(Awake), false),
            (Awake, Some(Frozen), false),
        ] {
            assert_eq!(believes(forwarder, systemd), believed, "{forwarder:?} {systemd:?}");
        }
        assert_eq!((of_unit("maintenance", true), of_unit("reloading", false)), (Asleep, Awake));
        assert_ne!(of_unit("failed", true), Deaf);
    }

    #[test]
    fn a_service_is_a_line() {
        let mut web = ListedService::new("web".into(), Some("web.service".into()), vec!["8080".into()]);
        let other = ListedService::new("other-one".into(), None, Vec::new());
        (web.state, web.woken_by, web.connections) = (ServiceState::Awake, Some("10.0.0.1:5".into()), 2);
        web.also = vec!["web.container".into()];
        assert!(web.is_called("web.container"));
        assert!(web.is_called("web") && web.is_called("web.service") && !web.is_called("we"));
        let text = describe(&[web, other]);
        assert_eq!(
            text,
            "web        awake, woken by 10.0.0.1:5, 2 connections; at 8080\nother-one  asleep\n"
        );
    }
}
