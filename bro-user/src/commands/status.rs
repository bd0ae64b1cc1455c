//! `bro status`: what running forwarders say of themselves ([`crate::control_socket`]).

pub(crate) mod list;

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use bro_relay::stats::Tally;
use serde::{Deserialize, Serialize};

use crate::control_socket::{self, Request};
use crate::exit::{self, Failure};
use crate::fallback::FallbackKind;
use crate::ledger::Own;
use crate::service::failed_wake::FailedWake;
use crate::service::wakes::Rhythm;
use crate::systemd::scope::RuntimeScope;
use crate::systemd::time_span;

/// What a forwarder says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its process.
    pub pid: u32,
    /// bro's version.
    pub version: String,
    /// The unit it starts.
    pub unit: Option<String>,
    /// The manager that starts it; unknown of a forwarder of a version that does not tell.
    #[serde(default)]
    pub manager: Option<RuntimeScope>,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// The same words as in `systemctl status`.
    pub state: String,
    /// Whether the service is awake.
    #[serde(default)]
    pub activity: Activity,
    /// The last wake that failed and was followed by none that succeeded.
    #[serde(default)]
    pub failed_wake: Option<FailedWake>,
    /// How often it is started, where that is limited or lets the idle time grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rhythm: Option<Box<Rhythm>>,
    /// The forwarder's own unit, where it has one.
    #[serde(default)]
    pub service: Option<String>,
    /// The connected clients, the first twenty.
    #[serde(default)]
    pub peers: Vec<String>,
    /// The clients not let in, since there are as many connections as may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    /// The replaced process (`systemctl reload`), while it has connections to finish.
    #[serde(default)]
    pub predecessor: Option<PredecessorReport>,
    /// How bytes are moved, and why not better.
    pub relay: Relay,
    /// Whether clients over UDP are told what was not received, where that is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undelivered: Option<UndeliveredReport>,
    /// Its sockets.
    pub listeners: Vec<ListenerReport>,
    /// All of them together.
    pub total: Tally,
    /// What it has counted itself, without the unit's other forwarders.
    #[serde(default)]
    pub own: Own,
}

impl Report {
    /// Is this the unit that it starts?
    #[must_use]
    pub fn starts(&self, unit: &str, by: RuntimeScope) -> bool {
        self.unit.as_deref() == Some(unit) && self.manager.is_none_or(|manager| manager == by)
    }

    /// Connections and flows now, of all its sockets: those that are forwarded, and those of a service that accepts itself. What predecessors finish is not
    /// among them.
    #[must_use]
    pub fn connections(&self) -> u64 {
        let adopted = |listener: &ListenerReport| match &listener.adoption {
            Some(AdoptionReport::Adopted { connections, .. }) => *connections,
            _ => 0,
        };
        self.total.guests() + self.listeners.iter().map(adopted).sum::<u64>()
    }
}

/// Clients that wait in the kernel's backlog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// How many; over unix sockets at least so many.
    pub clients: u64,
    /// How many connections there may be.
    pub connections: u64,
    /// What lets more clients in, as it is set now.
    pub lets_in: String,
}

impl std::fmt::Display for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { clients, connections, lets_in } = self;
        let (plural, verb) = if *clients == 1 { ("", "waits") } else { ("s", "wait") };
        write!(f, "{clients} client{plural} {verb} until one of {connections} connections ends ({lets_in})")
    }
}

/// A process that was replaced and has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PredecessorReport {
    /// Its process id.
    pub pid: i32,
    /// Its connections, with those that it waits for in turn; unknown of a version that does not tell.
    pub connections: Option<u64>,
}

impl std::fmt::Display for PredecessorReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {}, which it has replaced, ", self.pid)?;
        match self.connections {
            None => f.write_str("still finishes its connections"),
            Some(1) => f.write_str("still has 1 connection"),
            Some(count) => write!(f, "still has {count} connections"),
        }
    }
}

/// Whether a service is awake, since when, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Whether it is awake.
    pub state: ServiceState,
    /// Since when, in seconds since 1970.
    pub since: Option<u64>,
    /// The client that woke it, or `bro wake`.
    pub woken_by: Option<String>,
    /// What a long start is doing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// It is not put to sleep for idleness before that, in seconds since 1970 (`--keep-awake`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_awake_until: Option<u64>,
}

/// How far a service is from being asleep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceState {
    /// It sleeps, as far as its forwarder knows.
    #[default]
    Asleep,
    /// It is being woken.
    Starting,
    /// It is awake.
    Awake,
    /// It is awake, no client is connected, and it says that it is busy.
    Busy,
    /// It is frozen: the next client has it go on.
    Frozen,
    /// Its forwarder lets its last clients finish.
    Stopping,
    /// No socket listens for it.
    Deaf,
    /// Its unit, or its forwarder's, has failed.
    Failed,
}

impl ServiceState {
    /// In a word.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Asleep => "asleep",
            Self::Starting => "starting",
            Self::Awake => "awake",
            Self::Busy => "awake and busy",
            Self::Frozen => "frozen",
            Self::Stopping => "stopping",
            Self::Deaf => "not listening",
            Self::Failed => "failed",
        }
    }
}

/// How bytes are moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relay {
    /// The relay in use: copy, splice or sockmap.
    pub name: String,
    /// Why it is not a better one, if so.
    pub reason: Option<String>,
}

/// What comes of `--icmp-port-unreachable`. A forwarder that may not tell clients anything does not start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum UndeliveredReport {
    /// Clients are told.
    Tells {
        /// How many messages were sent since the start.
        told: u64,
        /// Why the kernel did not send the last one.
        failed: Option<String>,
    },
    /// There are no such clients.
    NoSocket,
}

impl std::fmt::Display for UndeliveredReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tells { told, failed } => {
                write!(
                    f,
                    "clients over UDP are told what is not received (--icmp-port-unreachable), {told} times so far"
                )?;
                failed.iter().try_for_each(|why| write!(f, "; the last message could not be sent: {why}"))
            }
            Self::NoSocket => {
                f.write_str("--icmp-port-unreachable tells no client anything: no socket for UDP was passed")
            }
        }
    }
}

/// One of a forwarder's sockets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListenerReport {
    /// Its FileDescriptorName=.
    pub name: String,
    /// Its address.
    pub address: String,
    /// Where its clients are connected to.
    pub target: String,
    /// How the service sees them there, since it was last woken: “by their own addresses”, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<String>,
    /// Who accepts its clients (`--adopt`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adoption: Option<AdoptionReport>,
    /// Its figures, of the clients that were accepted here.
    pub tally: Tally,
}

/// Who accepts a socket's clients, where the service is to do so itself (`--adopt`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum AdoptionReport {
    /// Nothing yet: it waits for the service's first client.
    Waiting,
    /// The service.
    Adopted {
        /// Since when, in seconds since 1970.
        since: u64,
        /// How many clients are connected, or wait to be accepted by it.
        connections: u64,
        /// Of a socket for datagrams: what has come to it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        datagrams: Option<DatagramsReport>,
    },
    /// The forwarder, until the container ends.
    Relayed {
        /// Why, in a word.
        reason: FallbackKind,
        /// Why.
        why: String,
    },
    /// Nothing: the service has closed it, and lives on. Who connects is reset, as without adoption.
    Closed,
    /// Nothing: the socket is broken.
    Broken {
        /// What is wrong, and what to do.
        why: String,
    },
}

/// What has come to a socket for datagrams that the service has, as far as that is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "seen", rename_all = "lowercase")]
pub enum DatagramsReport {
    /// None that the service has received.
    None,
    /// One.
    Last {
        /// When the last one that the service has received came, in seconds since 1970.
        at: u64,
    },
    /// The service has the times itself (SO_TIMESTAMP).
    Unseen,
}

impl std::fmt::Display for DatagramsReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("no datagram yet"),
            Self::Last { at } => {
                let at = SystemTime::UNIX_EPOCH + Duration::from_secs(*at);
                let ago = SystemTime::now().duration_since(at).unwrap_or_default();
                write!(f, "last datagram {} ago", time_span::roughly(ago))
            }
            Self::Unseen => f.write_str("datagrams are not seen (SO_TIMESTAMP)"),
        }
    }
}

impl std::fmt::Display for AdoptionReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Waiting => f.write_str("adopted by the service when that listens"),
            Self::Adopted { since, connections, datagrams } => {
                let since = SystemTime::UNIX_EPOCH + Duration::from_secs(*since);
                let ago = SystemTime::now().duration_since(since).unwrap_or_default();
                let (ago, plural) = (time_span::roughly(ago), if *connections == 1 { "" } else { "s" });
                match datagrams {
                    Some(datagrams) => write!(f, "adopted since {ago}, {datagrams}"),
                    None => write!(f, "adopted since {ago}, {connections} connection{plural} now"),
                }
            }
            Self::Relayed { why, .. } => write!(f, "relayed, not adopted: {why}"),
            Self::Closed => f.write_str("closed by the service: clients are reset until it listens again"),
            Self::Broken { why } => write!(f, "of no use: {why}"),
        }
    }
}

/// Runs `bro status`.
///
/// # Errors
/// [`Failure::NotFound`] when no forwarder answers at a socket, or there is no service of a name.
pub fn run(options: &crate::cli::Status) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let terminal = std::io::stdout().is_terminal() && !options.json;
    // The first of several begins on an empty screen.
    let mut first = !(terminal && options.watch);
    exit::unless_reader_has_gone(runtime.block_on(async {
        loop {
            let (text, json) = if options.whom.is_empty() {
                let services = list::all(RuntimeScope::choose(options.system, options.user)).await?;
                (list::describe(&services), exit::json(&services)?)
            } else {
                named(options).await?
            };
            let mut out = std::io::stdout().lock();
            if !first {
                // Home, then clear to the end: no flicker. Anything but a terminal gets one after the other.
                out.write_all(if terminal { b"\x1b[H\x1b[J" } else { b"\n" })?;
            }
            if options.json {
                writeln!(out, "{json}")?;
            } else {
                write!(out, "{}", printable(&text))?;
            }
            out.flush()?;
            if !options.watch {
                return Ok(());
            }
            first = false;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }))
}

/// Names, addresses and forwarders' answers come from others: no part of them may control the terminal.
fn printable(text: &str) -> String {
    let lines = text.split_inclusive('\n');
    lines
        .map(|line| {
            exit::on_one_line(line.trim_end_matches('\n')) + if line.ends_with('\n') { "\n" } else { "" }
        })
        .collect()
}

/// What there is under a name, as JSON.
#[derive(Serialize)]
#[serde(untagged)]
enum NamedService {
    /// A forwarder of it.
    Forwarder(Box<Report>),
    /// It has no forwarder now.
    Asleep(Box<list::ListedService>),
}

/// The reports of the forwarders named on the command line, after a line for each service without one: as text, and as JSON, in
/// which such a service looks as it does in the list of all.
async fn named(options: &crate::cli::Status) -> anyhow::Result<(String, String)> {
    let (mut asleep, mut reports) = (String::new(), Vec::new());
    let mut json: Vec<NamedService> = Vec::new();
    for whom in &options.whom {
        if whom.contains('/') {
            let report: anyhow::Result<Report> =
                control_socket::ask_soon(Path::new(whom), Request::Status).await;
            let report = report
                .map_err(|error| Failure::NotFound(format!("no forwarder answers at {whom}: {error}")))?;
            json.push(NamedService::Forwarder(Box::new(report.clone())));
            reports.push(report);
            continue;
        }
        let services = list::all(RuntimeScope::choose(options.system, options.user)).await?;
        let Some(service) = services.into_iter().find(|service| service.is_called(whom)) else {
            anyhow::bail!(Failure::NotFound(format!(
                "no service “{whom}” is activated, and no forwarder for it runs (see `bro status`)"
            )));
        };
        if service.forwarders.is_empty() {
            asleep += &format!("{}\n", list::sentence(&service));
            json.push(NamedService::Asleep(Box::new(service)));
            continue;
        }
        json.extend(service.forwarders.iter().cloned().map(Box::new).map(NamedService::Forwarder));
        reports.extend(service.forwarders);
    }
    Ok((asleep + &describe(&reports), exit::json(&json)?))
}

/// With more sockets than this, of a range of ports, those without a client are only counted.
const MANY: usize = 16;

pub(crate) fn describe(reports: &[Report]) -> String {
    let mut text = String::new();
    for report in reports {
        let unit = report.unit.as_deref().map(|unit| format!(" for {unit}")).unwrap_or_default();
        // Writing to a String cannot fail.
        writeln!(text, "bro {} (process {}){unit}: {}", report.version, report.pid, report.state).ok();
        let woken = report.activity.woken_by.as_deref().map(|by| format!(", woken by {by}"));
        let name = report
            .unit
            .as_ref()
            .or(report.service.as_ref())
            .map_or("", |unit| unit.trim_end_matches(".service"));
        let doing = report.activity.doing.as_deref().map(|doing| format!(": {doing}")).unwrap_or_default();
        writeln!(
            text,
            "  {}{doing}{}",
            list::since(report.activity.state, report.activity.since, name),
            woken.unwrap_or_default()
        )
        .ok();
        if let Some(failed) = &report.failed_wake {
            writeln!(text, "  last wake failed {} ago, of {}: {}", failed.since(), failed.target, failed.why)
                .ok();
        }
        let reason = report.relay.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        writeln!(text, "  relay {}{reason}, up {} s", report.relay.name, report.uptime_s).ok();
        if let Some(undelivered) = &report.undelivered {
            writeln!(text, "  {undelivered}").ok();
        }
        let silent = |listener: &&ListenerReport| {
            report.listeners.len() > MANY && listener.adoption.is_none() && listener.tally == Tally::default()
        };
        for listener in report.listeners.iter().filter(|listener| !silent(listener)) {
            writeln!(text, "  {} {} -> {}", listener.name, listener.address, listener.target).ok();
            if let Some(adoption) = &listener.adoption {
                writeln!(text, "    {adoption}").ok();
            }
            if let Some(seen) = &listener.seen {
                writeln!(text, "    the service sees clients {seen}").ok();
            }
            figures(&mut text, &listener.tally);
        }
        let left_out = report.listeners.iter().filter(silent).count();
        if left_out > 0 {
            writeln!(text, "  and {left_out} sockets that no client has come to").ok();
        }
        if report.listeners.len() > 1 {
            writeln!(text, "  in total").ok();
            figures(&mut text, &report.total);
        }
    }
    text
}

fn figures(text: &mut String, tally: &Tally) {
    writeln!(
        text,
        "    connections {} open, {} held, {} accepted; {} cold starts",
        tally.open, tally.held, tally.accepted, tally.cold_starts
    )
    .ok();
    writeln!(
        text,
        "    bytes {} kernel, {} spliced, {} copied; {} messages passed, {} credit grants",
        tally.kernel, tally.spliced, tally.copied, tally.passes, tally.grants
    )
    .ok();
    let datagrams = &tally.datagrams;
    if datagrams.is_empty() {
        return;
    }
    writeln!(
        text,
        "    flows {} open, {} held, {} in all, {} made room for others",
        datagrams.open, datagrams.held, datagrams.flows, datagrams.evicted
    )
    .ok();
    let dropped: String = datagrams
        .dropped
        .each()
        .filter(|(_, count)| *count > 0)
        .map(|(why, count)| format!(", {count} dropped ({why})"))
        .collect();
    writeln!(
        text,
        "    datagrams {} to the service, {} to clients{dropped}",
        datagrams.to_service.datagrams, datagrams.to_clients.datagrams
    )
    .ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_what_it_reads() {
        let mut tally = Tally { accepted: 3, open: 1, kernel: 7, ..Tally::default() };
        tally.datagrams.dropped.add(bro_relay::flows::Dropped::Queue, 2);
        let report = Report {
            pid: 7,
            version: "0".into(),
            unit: Some("web.service".into()),
            manager: Some(RuntimeScope::User),
            uptime_s: 1,
            state: "1 connection now".into(),
            activity: Activity::default(),
            failed_wake: Some(FailedWake { at: 1, target: "127.0.0.1:80".into(), why: "no image".into() }),
            rhythm: None,
            service: None,
            peers: Vec::new(),
            waiting: Some(Waiting { clients: 2, connections: 256, lets_in: "--connections-max=256".into() }),
            predecessor: None,
            relay: Relay { name: "splice".into(), reason: Some("no CAP_BPF".into()) },
            undelivered: Some(UndeliveredReport::Tells { told: 2, failed: Some("no route".into()) }),
            listeners: vec![ListenerReport {
                name: "http".into(),
                address: "[::]:80".into(),
                target: "127.0.0.1:80".into(),
                seen: None,
                adoption: Some(AdoptionReport::Relayed {
                    reason: FallbackKind::Family,
                    why: "no fit".into(),
                }),
                tally: tally.clone(),
            }],
            total: tally,
            own: Own::default(),
        };
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
        assert!(
            report.starts("web.service", RuntimeScope::User)
                && !report.starts("web.service", RuntimeScope::System)
        );
        let mut adopted = report.clone();
        adopted.listeners[0].adoption =
            Some(AdoptionReport::Adopted { since: 0, connections: 14, datagrams: None });
        assert_eq!(adopted.connections(), report.total.guests() + 14);
        assert_eq!(list::alone(adopted).connections, report.total.guests() + 14);
        let text = describe(&[report]);
        assert!(text.contains("http [::]:80 -> 127.0.0.1:80") && text.contains("no CAP_BPF"), "{text}");
        assert!(text.contains("bytes 7 kernel"), "{text}");
        let told =
            "(--icmp-port-unreachable), 2 times so far; the last message could not be sent: no route\n";
        assert!(text.contains(told), "{text}");
        assert!(text.contains("\n    relayed, not adopted: no fit\n"), "{text}");
        assert!(text.contains("datagrams 0 to the service, 0 to clients, 2 dropped (queue)"), "{text}");
        assert!(
            text.contains("d ago, of 127.0.0.1:80: no image")
                || text.contains("h ago, of 127.0.0.1:80: no image"),
            "{text}"
        );
        // Of a range only those ports are shown at which there was a client.
        let Ok(mut report) = serde_json::from_str::<Report>(&json) else { panic!("it is one") };
        let mut silent =
            ListenerReport { adoption: None, tally: Tally::default(), ..report.listeners[0].clone() };
        for number in 0..20 {
            silent.address = format!("[::]:{}", 9000 + number);
            report.listeners.push(silent.clone());
        }
        let text = describe(&[report]);
        assert!(text.contains("http [::]:80") && !text.contains("[::]:90"), "{text}");
        assert!(text.contains("and 20 sockets that no client has come to"), "{text}");
    }
}
