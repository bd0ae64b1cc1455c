//! What a forwarder says of itself: to systemd, to `bro status`, to a reader of metrics, and to the forwarders after it.

use std::time::SystemTime;

use bro_relay::stats::{Stats, Tally};

use super::adoption::SocketAdoption;
use super::control::Control;
use super::lifecycle::Phase;
use crate::commands::status;
use crate::control_socket::Asker;
use crate::metrics;
use crate::systemd::own_unit;
use crate::systemd::scope::RuntimeScope;

impl Control<'_> {
    /// In one line.
    pub(super) fn status(&self) -> String {
        let (life, stats) = (&self.life, self.plane.stats());
        let (open, held) = (Stats::get(&stats.open), Stats::get(&stats.held));
        let (served, flows) = (Stats::get(&stats.accepted), Stats::get(&stats.flows));
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        let and_flows = if flows > 0 { format!(" and {flows} flow{}", plural(flows)) } else { String::new() };
        let said = match life.phase {
            Phase::Draining(_) => format!("Draining: {open} connection{}{and_flows} left", plural(open)),
            _ if life.freezing.is_frozen() => "Frozen: the next client has the service go on".into(),
            _ if life.who_is_busy().is_some() => {
                format!("Idle, but busy: {}", life.who_is_busy().unwrap_or_default())
            }
            _ if held > 0 || life.being_woken().is_some() => {
                let waiting = if held == 0 { "no".into() } else { held.to_string() };
                format!(
                    "Starting the service{}{waiting} client{} waiting",
                    life.how_far(),
                    plural(held.max(1))
                )
            }
            _ if life.has_sockets => self.adoption.as_ref().map(SocketAdoption::said).unwrap_or_default(),
            _ => format!("{open} connection{}{and_flows} now, {served} since the start", plural(open)),
        };
        let said = match self.limit.waiting().filter(|_| life.phase == Phase::Serving) {
            Some(waiting) => format!("{said}; {waiting}"),
            None => said,
        };
        let said = match life.keep_awake.until().filter(|_| life.phase == Phase::Serving) {
            Some(until) => format!("{said}; kept awake until {}", until.said),
            None => said,
        };
        let said = match life.history.remark() {
            Some(remark) => format!("{said}; {remark}"),
            None => said,
        };
        match self.reload.predecessor() {
            Some(predecessor) => format!("{said}; {predecessor}"),
            None => said,
        }
    }

    /// Answers a caller that asked for the status, in the background.
    pub(super) fn report(&self, asker: Asker) {
        let report = self.reporting();
        let answering = async move {
            if let Some(report) = report.await {
                asker.answer(report);
            }
        };
        drop(tokio::spawn(answering));
    }

    /// Answers a caller that wants metrics, in the background.
    pub(super) fn tell_metrics(&self, to: metrics::Question) {
        let report = self.reporting();
        let answering = async move {
            // A caller that does not wait for it any more has closed the connection.
            match report.await.map(metrics::of_forwarder) {
                Some(Ok(text)) => drop(to.send(text)),
                Some(Err(error)) => tracing::error!("metrics cannot be written: {error:#}"),
                None => {}
            }
        };
        drop(tokio::spawn(answering));
    }

    /// The report, once the engine has given its figures.
    fn reporting(&self) -> impl Future<Output = Option<status::Report>> + use<> {
        let mut report = status::Report {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            unit: self.options.unit.clone(),
            manager: Some(RuntimeScope::choose(self.options.system, self.options.user)),
            uptime_s: self.started.elapsed().as_secs(),
            state: self.status(),
            activity: self.activity(),
            failed_wake: self.life.failures.last().cloned(),
            rhythm: self.life.history.rhythm().map(Box::new),
            service: own_unit::own_unit(),
            peers: Vec::new(),
            waiting: self.limit.waiting().cloned(),
            predecessor: self.reload.predecessor().cloned(),
            relay: self.plane.describe(),
            undelivered: self.plane.undelivered_report(),
            listeners: Vec::new(),
            total: Tally::default(),
            own: self.ledger.own(self.life.counts.clone()),
        };
        let described = |(index, (listener, target)): (usize, &(bro_relay::listener::Listener, usize))| {
            let state = &self.life.targets[*target];
            let adoption = self.adoption.as_ref().and_then(|adoption| adoption.report(index));
            // It is told of those that are relayed.
            let is_adopted = matches!(adoption, Some(status::AdoptionReport::Adopted { .. }));
            status::ListenerReport {
                name: listener.name.clone(),
                address: listener.address.clone(),
                target: state.target.to_string(),
                seen: state.seen.clone().filter(|_| !is_adopted),
                adoption,
                tally: Tally::default(),
            }
        };
        let listeners: Vec<_> = self.reload.listeners().iter().enumerate().map(described).collect();
        let figures = self.plane.engine().report();
        async move {
            let figures = figures.await.ok()?;
            report.peers = figures.peers;
            let names = listeners.iter().map(|listener| listener.name.as_str());
            report.own.counts = report.own.counts.with(names.zip(&figures.tallies));
            for (listener, tally) in listeners.into_iter().zip(figures.tallies) {
                report.total += &tally;
                report.listeners.push(status::ListenerReport { tally, ..listener });
            }
            Some(report)
        }
    }

    /// Whether the service is awake, since when, and why.
    fn activity(&self) -> status::Activity {
        let life = &self.life;
        let state = match life.phase {
            Phase::Draining(_) => status::ServiceState::Stopping,
            _ if life.freezing.is_frozen() => status::ServiceState::Frozen,
            _ if life.awake_since.is_some() && life.who_is_busy().is_some() => status::ServiceState::Busy,
            _ if life.awake_since.is_some() => status::ServiceState::Awake,
            _ if life.being_woken().is_some() => status::ServiceState::Starting,
            Phase::Serving | Phase::Leaving => status::ServiceState::Asleep,
        };
        let is_starting = state == status::ServiceState::Starting;
        let woken =
            life.being_woken().filter(|_| is_starting).map(|since| SystemTime::now() - since.elapsed());
        let woken = woken.or(life.freezing.since());
        let since = woken.or_else(|| life.awake_since.map(|(_, since)| since));
        let woken_by = life.woken_by.clone().filter(|_| state != status::ServiceState::Asleep);
        let doing = Some(life.activator.progress().doing).filter(|doing| is_starting && !doing.is_empty());
        let seconds =
            |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).map(|span| span.as_secs()).ok();
        let until = life.keep_awake.until().filter(|_| life.phase == Phase::Serving);
        status::Activity {
            state,
            since: since.and_then(seconds),
            woken_by,
            doing,
            kept_awake_until: until.and_then(|until| seconds(until.at)),
        }
    }

    /// Keeps what was counted so far for later forwarders.
    pub(super) async fn keep_counts(&mut self) {
        if !self.ledger.keeps() {
            return;
        }
        // A relay process that has ended by itself reports no more.
        let figures = tokio::time::timeout(super::control::STEP, self.plane.engine().report());
        let Ok(Ok(figures)) = figures.await else { return };
        let names = self.reload.listeners().iter().map(|(listener, _)| listener.name.as_str());
        self.ledger.keep(self.life.counts.with(names.zip(&figures.tallies)));
    }
}
