//! The text form of OpenMetrics, version 1.0: [`FAMILIES`] has every metric's name, meaning and labels. Labels are names that an
//! administrator has given, and words of a fixed list.

use std::fmt::{self, Write as _};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelValue, LabelValueEncoder, MetricEncoder, NoLabelSet, text as form,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use crate::commands::status::list::ListedService;
use crate::commands::status::{AdoptionReport, DatagramsReport, Report, ServiceState};
use crate::fallback::FallbackKind;
use crate::ledger::Counts;
use bro_relay::flows::Amounts;
use bro_relay::stats::{Tally, Times};

/// What the metrics tell of one service.
#[derive(Debug)]
pub(crate) struct Exposed {
    service: String,
    /// It has no unit, and its name need not be unique.
    is_nameless: bool,
    state: ServiceState,
    since: Option<u64>,
    failed_wake: Option<u64>,
    waiting: u64,
    /// For each running forwarder: its version, its relay, and how long it has run.
    forwarders: Vec<(String, String, u64)>,
    /// Connections that predecessors of forwarders finish.
    replaced: u64,
    /// The present state, by socket.
    now: Vec<(String, Tally)>,
    /// How many sockets of a name the service has itself, and how many clients those have.
    adopted: Vec<(String, u64, u64)>,
    /// When the last datagram came to those of a name that are for such, in seconds since 1970.
    last_datagrams: Vec<(String, u64)>,
    counts: Counts,
}

impl Exposed {
    pub fn of(service: &ListedService) -> Self {
        let mut now: Vec<(String, Tally)> = Vec::new();
        for listener in service.forwarders.iter().flat_map(|report| &report.listeners) {
            match now.iter_mut().find(|(name, _)| *name == listener.name) {
                Some((_, tally)) => *tally += &listener.tally,
                None => now.push((listener.name.clone(), listener.tally.clone())),
            }
        }
        let mut adopted: Vec<(String, u64, u64)> = Vec::new();
        let mut last_datagrams: Vec<(String, u64)> = Vec::new();
        for listener in service.forwarders.iter().flat_map(|report| &report.listeners) {
            let Some(AdoptionReport::Adopted { connections, datagrams, .. }) = &listener.adoption else {
                continue;
            };
            // The ports of a range have one name.
            match adopted.iter_mut().find(|(name, ..)| *name == listener.name) {
                Some((_, sockets, clients)) => (*sockets, *clients) = (*sockets + 1, *clients + connections),
                None => adopted.push((listener.name.clone(), 1, *connections)),
            }
            if let Some(DatagramsReport::Last { at }) = datagrams {
                match last_datagrams.iter_mut().find(|(name, _)| *name == listener.name) {
                    Some((_, last)) => *last = (*last).max(*at),
                    None => last_datagrams.push((listener.name.clone(), *at)),
                }
            }
        }
        let told: u64 = service.forwarders.iter().map(Report::connections).sum();
        // The same name as a forwarder of it gives itself, and none with a process' number in it.
        let own = || service.forwarders.iter().find_map(|report| report.service.as_deref());
        let name = service.unit.as_deref().or_else(own).unwrap_or(NAMELESS);
        let forwarders = service
            .forwarders
            .iter()
            .map(|report| (report.version.clone(), report.relay.name.clone(), report.uptime_s));
        Self {
            service: name.strip_suffix(".service").unwrap_or(name).to_owned(),
            is_nameless: service.unit.is_none(),
            state: service.state,
            since: service.since,
            failed_wake: service.failed_wake.as_ref().map(|failed| failed.at),
            waiting: service.waiting.as_ref().map_or(0, |waiting| waiting.clients),
            forwarders: forwarders.collect(),
            replaced: service.connections.saturating_sub(told),
            adopted,
            last_datagrams,
            now,
            counts: service.counts.clone(),
        }
    }
}

/// The name of a forwarder that starts no unit and is no service.
const NAMELESS: &str = "bro";

/// Gives no two the same name, since readers refuse the whole text then. What is activated twice is one unit with one ledger, and
/// the first has its forwarders; forwarders without a unit are numbered.
fn distinct(all: Vec<Exposed>) -> Vec<Exposed> {
    let mut kept: Vec<Exposed> = Vec::with_capacity(all.len());
    for mut exposed in all {
        let is_taken = |name: &str| kept.iter().any(|other| other.service == name);
        if is_taken(&exposed.service) {
            if !exposed.is_nameless {
                continue;
            }
            let mut numbered = (2_usize..).map(|number| format!("{}-{number}", exposed.service));
            exposed.service = numbered.find(|name| !is_taken(name)).unwrap_or_default();
        }
        kept.push(exposed);
    }
    kept
}

/// A label's value: the library writes it as it is.
#[derive(Debug)]
struct Value<'a>(&'a str);

impl EncodeLabelValue for Value<'_> {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => encoder.write_str("\\\\")?,
                '"' => encoder.write_str("\\\"")?,
                '\n' => encoder.write_str("\\n")?,
                c => encoder.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Takes a sample: labels beside the service's, and a number.
type Take<'a> = &'a mut dyn FnMut(&[(&'static str, &str)], u64) -> fmt::Result;

/// Samples that share a name.
struct MetricFamily {
    /// Without its unit and the suffix of its kind (`_total`).
    name: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    help: &'static str,
    samples: fn(&Exposed, Take<'_>) -> fmt::Result,
}

const STATES: [ServiceState; 8] = [
    ServiceState::Asleep,
    ServiceState::Starting,
    ServiceState::Awake,
    ServiceState::Busy,
    ServiceState::Frozen,
    ServiceState::Stopping,
    ServiceState::Deaf,
    ServiceState::Failed,
];

/// The label's word for a state.
const fn word(state: ServiceState) -> &'static str {
    match state {
        ServiceState::Asleep => "asleep",
        ServiceState::Starting => "starting",
        ServiceState::Awake => "awake",
        ServiceState::Busy => "busy",
        ServiceState::Frozen => "frozen",
        ServiceState::Stopping => "stopping",
        ServiceState::Deaf => "deaf",
        ServiceState::Failed => "failed",
    }
}

/// One number of each socket now.
fn now(exposed: &Exposed, take: Take<'_>, number: fn(&Tally) -> u64) -> fmt::Result {
    exposed.now.iter().try_for_each(|(name, tally)| take(&[("listener", name)], number(tally)))
}

/// One number of each socket since the host was booted.
fn counted(exposed: &Exposed, take: Take<'_>, number: fn(&Tally) -> u64) -> fmt::Result {
    let listeners = &exposed.counts.listeners;
    listeners.iter().try_for_each(|(name, tally)| take(&[("listener", name)], number(tally)))
}

/// One number of each way that datagrams go.
fn ways(exposed: &Exposed, take: Take<'_>, number: fn(&Amounts) -> u64) -> fmt::Result {
    exposed.counts.listeners.iter().try_for_each(|(name, tally)| {
        let ways = [("to_service", tally.datagrams.to_service), ("to_client", tally.datagrams.to_clients)];
        ways.into_iter().try_for_each(|(direction, amounts)| {
            take(&[("listener", name), ("direction", direction)], number(&amounts))
        })
    })
}

/// All but the histogram, and the forwarders' versions.
const FAMILIES: [MetricFamily; 32] = [
    MetricFamily {
        name: "bro_service_state",
        unit: None,
        kind: MetricType::Gauge,
        help: "1 for the state that the service is in, 0 for the others",
        samples: |exposed, take| {
            STATES
                .iter()
                .try_for_each(|state| take(&[("state", word(*state))], u64::from(*state == exposed.state)))
        },
    },
    MetricFamily {
        name: "bro_service_since_timestamp",
        unit: Some(Unit::Seconds),
        kind: MetricType::Gauge,
        help: "Since when it is in that state, in seconds since 1970, where that is known",
        samples: |exposed, take| exposed.since.map_or(Ok(()), |since| take(&[], since)),
    },
    MetricFamily {
        name: "bro_forwarders",
        unit: None,
        kind: MetricType::Gauge,
        help: "Forwarders that run for it; none while it is asleep",
        samples: |exposed, take| take(&[], exposed.forwarders.len() as u64),
    },
    MetricFamily {
        name: "bro_forwarder_uptime",
        unit: Some(Unit::Seconds),
        kind: MetricType::Gauge,
        help: "How long the forwarder has run; of several, the oldest",
        samples: |exposed, take| {
            let longest = exposed.forwarders.iter().map(|(_, _, uptime)| *uptime).max();
            longest.map_or(Ok(()), |longest| take(&[], longest))
        },
    },
    MetricFamily {
        name: "bro_connections",
        unit: None,
        kind: MetricType::Gauge,
        help: "Connections now, held ones and those of a service that accepts them itself included",
        samples: |exposed, take| {
            exposed.now.iter().try_for_each(|(name, tally)| {
                let adopted =
                    exposed.adopted.iter().filter(|(its, ..)| its == name).map(|(_, _, clients)| clients);
                take(&[("listener", name)], tally.open + adopted.sum::<u64>())
            })
        },
    },
    MetricFamily {
        name: "bro_replaced_connections",
        unit: None,
        kind: MetricType::Gauge,
        help: "Connections that processes finish which a reload has replaced",
        samples: |exposed, take| take(&[], exposed.replaced),
    },
    MetricFamily {
        name: "bro_held_clients",
        unit: None,
        kind: MetricType::Gauge,
        help: "Clients that wait for the service now",
        samples: |exposed, take| now(exposed, take, |tally| tally.held),
    },
    MetricFamily {
        name: "bro_silent_clients",
        unit: None,
        kind: MetricType::Gauge,
        help: "Clients of a sleeping service that have not said anything yet (--wake-on=data)",
        samples: |exposed, take| now(exposed, take, |tally| tally.silent),
    },
    MetricFamily {
        name: "bro_waiting_clients",
        unit: None,
        kind: MetricType::Gauge,
        help: "Clients in the backlog, since there are as many connections as may be",
        samples: |exposed, take| take(&[], exposed.waiting),
    },
    MetricFamily {
        name: "bro_connections_accepted",
        unit: None,
        kind: MetricType::Counter,
        help: "Connections accepted",
        samples: |exposed, take| counted(exposed, take, |tally| tally.accepted),
    },
    MetricFamily {
        name: "bro_connections_closed",
        unit: None,
        kind: MetricType::Counter,
        help: "Connections that have ended, by the reason that their log lines give",
        samples: |exposed, take| {
            exposed.counts.listeners.iter().try_for_each(|(name, tally)| {
                tally
                    .ended
                    .each()
                    .try_for_each(|(reason, count)| take(&[("listener", name), ("reason", reason)], count))
            })
        },
    },
    MetricFamily {
        name: "bro_relayed",
        unit: Some(Unit::Bytes),
        kind: MetricType::Counter,
        help: "Bytes relayed, by what moved them and where they went",
        samples: |exposed, take| {
            exposed.counts.listeners.iter().try_for_each(|(name, tally)| {
                let ways = [("to_service", tally.to_service), ("to_client", tally.to_clients())];
                ways.into_iter().try_for_each(|(direction, moved)| {
                    let by = [("sockmap", moved.kernel), ("splice", moved.spliced), ("copy", moved.copied)];
                    by.into_iter().try_for_each(|(relay, bytes)| {
                        take(&[("listener", name), ("relay", relay), ("direction", direction)], bytes)
                    })
                })
            })
        },
    },
    MetricFamily {
        name: "bro_lane_messages_passed",
        unit: None,
        kind: MetricType::Counter,
        help: "Messages that a hooked sender gave to ordinary TCP, because its lane was shut at that moment",
        samples: |exposed, take| counted(exposed, take, |tally| tally.passes),
    },
    MetricFamily {
        name: "bro_lane_credit_grants",
        unit: None,
        kind: MetricType::Counter,
        help: "Times a lane was granted credit",
        samples: |exposed, take| counted(exposed, take, |tally| tally.grants),
    },
    MetricFamily {
        name: "bro_flows",
        unit: None,
        kind: MetricType::Gauge,
        help: "Clients' flows of datagrams now, held ones included",
        samples: |exposed, take| now(exposed, take, |tally| tally.datagrams.open),
    },
    MetricFamily {
        name: "bro_flows_opened",
        unit: None,
        kind: MetricType::Counter,
        help: "Flows of datagrams that have begun",
        samples: |exposed, take| counted(exposed, take, |tally| tally.datagrams.flows),
    },
    MetricFamily {
        name: "bro_flows_evicted",
        unit: None,
        kind: MetricType::Counter,
        help: "Flows that made room for another one (--flows-max, --connections-per-source)",
        samples: |exposed, take| counted(exposed, take, |tally| tally.datagrams.evicted),
    },
    MetricFamily {
        name: "bro_datagrams",
        unit: None,
        kind: MetricType::Counter,
        help: "Datagrams passed on, by where they went",
        samples: |exposed, take| ways(exposed, take, |amounts| amounts.datagrams),
    },
    MetricFamily {
        name: "bro_datagram",
        unit: Some(Unit::Bytes),
        kind: MetricType::Counter,
        help: "Bytes in datagrams that were passed on, by where they went",
        samples: |exposed, take| ways(exposed, take, |amounts| amounts.bytes),
    },
    MetricFamily {
        name: "bro_datagrams_dropped",
        unit: None,
        kind: MetricType::Counter,
        help: "Datagrams that could not be passed on, by why",
        samples: |exposed, take| {
            exposed.counts.listeners.iter().try_for_each(|(name, tally)| {
                let mut each = tally.datagrams.dropped.each();
                each.try_for_each(|(reason, count)| take(&[("listener", name), ("reason", reason)], count))
            })
        },
    },
    MetricFamily {
        name: "bro_cold_starts",
        unit: None,
        kind: MetricType::Counter,
        help: "Clients that found the service asleep and woke it",
        samples: |exposed, take| counted(exposed, take, |tally| tally.cold_starts),
    },
    MetricFamily {
        name: "bro_wakes",
        unit: None,
        kind: MetricType::Counter,
        help: "Times the service was woken, by a client, by hand (bro wake) or by the clock (--keep-awake)",
        samples: |exposed, take| {
            take(&[("cause", "client")], exposed.counts.woken_by_clients)?;
            take(&[("cause", "hand")], exposed.counts.woken_by_hand)?;
            take(&[("cause", "clock")], exposed.counts.woken_by_clock)
        },
    },
    MetricFamily {
        name: "bro_wake_failures",
        unit: None,
        kind: MetricType::Counter,
        help: "Wakes that failed, or took longer than clients are held (--start-timeout)",
        samples: |exposed, take| {
            take(&[("reason", "start-failed")], exposed.counts.start_failures)?;
            take(&[("reason", "start-timeout")], exposed.counts.start_timeouts)
        },
    },
    MetricFamily {
        name: "bro_last_wake_failure_timestamp",
        unit: Some(Unit::Seconds),
        kind: MetricType::Gauge,
        help: "When the last wake failed, in seconds since 1970, until one succeeds",
        samples: |exposed, take| exposed.failed_wake.map_or(Ok(()), |at| take(&[], at)),
    },
    MetricFamily {
        name: "bro_stops",
        unit: None,
        kind: MetricType::Counter,
        help: "Times the service was stopped, for want of clients or by hand (bro sleep)",
        samples: |exposed, take| {
            take(&[("cause", "idle")], exposed.counts.idle_stops)?;
            take(&[("cause", "hand")], exposed.counts.told_stops)
        },
    },
    MetricFamily {
        name: "bro_reloads",
        unit: None,
        kind: MetricType::Counter,
        help: "Reloads, by what came of them",
        samples: |exposed, take| {
            take(&[("result", "done")], exposed.counts.reloads)?;
            take(&[("result", "failed")], exposed.counts.failed_reloads)
        },
    },
    MetricFamily {
        name: "bro_adopted_listeners",
        unit: None,
        kind: MetricType::Gauge,
        help: "Sockets at which the service accepts its clients itself now (--adopt)",
        samples: |exposed, take| take(&[], exposed.adopted.iter().map(|(_, sockets, _)| sockets).sum()),
    },
    MetricFamily {
        name: "bro_adopted_connections",
        unit: None,
        kind: MetricType::Gauge,
        help: "Clients of such a socket at the last look, those that wait to be accepted included",
        samples: |exposed, take| {
            exposed.adopted.iter().try_for_each(|(name, _, clients)| take(&[("listener", name)], *clients))
        },
    },
    MetricFamily {
        name: "bro_adopted_last_datagram_timestamp",
        unit: Some(Unit::Seconds),
        kind: MetricType::Gauge,
        help: "When the last datagram came that the service has received by such a socket itself, in seconds since 1970",
        samples: |exposed, take| {
            exposed.last_datagrams.iter().try_for_each(|(name, at)| take(&[("listener", name)], *at))
        },
    },
    MetricFamily {
        name: "bro_adoptions",
        unit: None,
        kind: MetricType::Counter,
        help: "Times a service got a socket of its forwarder's",
        samples: |exposed, take| take(&[], exposed.counts.adoptions),
    },
    MetricFamily {
        name: "bro_adoption_fallbacks",
        unit: None,
        kind: MetricType::Counter,
        help: "Times a socket that was to be adopted was relayed, by the reason",
        samples: |exposed, take| {
            // What is never adopted has not fallen back.
            let mut all = FallbackKind::ALL.iter().filter(|(kind, _)| *kind != FallbackKind::Kind);
            all.try_for_each(|(kind, word)| {
                let count = exposed.counts.fallbacks.get(kind).copied();
                take(&[("reason", word)], count.unwrap_or(0))
            })
        },
    },
    MetricFamily {
        name: "bro_limits_reached",
        unit: None,
        kind: MetricType::Counter,
        help: "Times a limit was reached: of connections, of one source's connections (these are reset), of the kernel's descriptors \
               or memory",
        samples: |exposed, take| {
            exposed.counts.listeners.iter().try_for_each(|(name, tally)| {
                let source = tally.ended.each().find(|(reason, _)| *reason == "source-limit");
                let limits = [
                    ("connections-max", tally.full),
                    ("connections-per-source", source.map_or(0, |(_, count)| count)),
                    ("descriptors", tally.exhausted),
                ];
                limits
                    .into_iter()
                    .try_for_each(|(limit, count)| take(&[("listener", name), ("limit", limit)], count))
            })
        },
    },
];

/// Every service's samples.
#[derive(Debug)]
struct Snapshot(Vec<Exposed>);

impl Snapshot {
    fn family(&self, encoder: &mut DescriptorEncoder<'_>, family: &MetricFamily) -> fmt::Result {
        let mut metric =
            encoder.encode_descriptor(family.name, family.help, family.unit.as_ref(), family.kind)?;
        for exposed in &self.0 {
            (family.samples)(exposed, &mut |labels, number| {
                let labels = labelled(&exposed.service, labels);
                let mut sample = metric.encode_family(&labels)?;
                match family.kind {
                    MetricType::Counter => count(&mut sample, number),
                    _ => sample.encode_gauge(&number),
                }
            })?;
        }
        Ok(())
    }

    fn forwarders(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "1, for a running forwarder of that version which moves bytes that way";
        // No metric of the kind “info”: readers of Prometheus' older form, such as node_exporter's textfile collector, refuse it.
        let mut metric = encoder.encode_descriptor("bro_forwarder_info", help, None, MetricType::Gauge)?;
        for exposed in &self.0 {
            let mut seen = Vec::new();
            for (version, relay, _) in &exposed.forwarders {
                let labels = [("version", version.as_str()), ("relay", relay)];
                if !seen.contains(&labels) {
                    metric.encode_family(&labelled(&exposed.service, &labels))?.encode_gauge(&1_u64)?;
                    seen.push(labels);
                }
            }
        }
        Ok(())
    }

    fn cold_starts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "From a client's accept to its connection with the service, of clients that woke it";
        let (name, unit) = ("bro_cold_start_duration", Unit::Seconds);
        let mut metric = encoder.encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?;
        for exposed in &self.0 {
            for (name, tally) in &exposed.counts.listeners {
                let labels = labelled(&exposed.service, &[("listener", name)]);
                histogram(&mut metric.encode_family(&labels)?, &tally.cold_start_times)?;
            }
        }
        Ok(())
    }
}

fn labelled<'a>(service: &'a str, labels: &[(&'static str, &'a str)]) -> Vec<(&'static str, Value<'a>)> {
    let others = labels.iter().map(|(name, value)| (*name, Value(value)));
    std::iter::once(("service", Value(service))).chain(others).collect()
}

fn count(sample: &mut MetricEncoder<'_>, number: u64) -> fmt::Result {
    sample.encode_counter(&number, None::<&Exemplar<NoLabelSet, u64>>)
}

fn histogram(sample: &mut MetricEncoder<'_>, times: &Times) -> fmt::Result {
    let seconds = |ms: u64| ms as f64 / 1000.0;
    // The library writes the highest number as +Inf.
    let bound = |ms: Option<u64>| ms.map_or(f64::MAX, seconds);
    let buckets: Vec<(f64, u64)> = times.buckets().map(|(ms, count)| (bound(ms), count)).collect();
    sample.encode_histogram::<NoLabelSet>(seconds(times.sum_ms), times.count(), &buckets, None)
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for family in &FAMILIES {
            self.family(&mut encoder, family)?;
        }
        self.forwarders(&mut encoder)?;
        self.cold_starts(&mut encoder)
    }
}

/// The whole text, with the end that tells a reader that nothing was cut off.
pub(super) fn text(exposed: Vec<Exposed>) -> anyhow::Result<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshot(distinct(exposed))));
    let mut text = String::new();
    form::encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use crate::commands::status::Waiting;
    use bro_relay::connection::End;

    /// A service of which everything is known.
    fn exposed(name: &str) -> Exposed {
        let mut tally = Tally { accepted: 3, open: 1, spliced: 10, ..Tally::default() };
        tally.to_service.spliced = 4;
        tally.ended.add(End::Eof);
        tally.cold_start_times.add(Duration::from_millis(300));
        let mut service = crate::commands::status::list::tests::service(name);
        service.state = ServiceState::Awake;
        service.since = Some(7);
        service.waiting = Some(Waiting { clients: 2, connections: 1, lets_in: String::new() });
        Exposed {
            forwarders: vec![("0.1".into(), "splice".into(), 9)],
            now: vec![("http".into(), tally.clone())],
            counts: Counts { idle_stops: 5, ..Counts::default() }.with([("http", &tally)]),
            failed_wake: Some(8),
            adopted: vec![("http".into(), 2, 14)],
            last_datagrams: vec![("dns".into(), 1_700_000_000)],
            ..Exposed::of(&service)
        }
    }

    /// The names of all samples.
    fn names(text: &str) -> BTreeSet<String> {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples.map(|line| line.split(['{', ' ']).next().unwrap().to_owned()).collect()
    }

    #[test]
    fn is_the_form_that_readers_of_openmetrics_take() {
        let text = text(vec![exposed("web"), exposed("db")]).unwrap();
        for line in [
            "# TYPE bro_relayed_bytes counter",
            "# UNIT bro_relayed_bytes bytes",
            r#"bro_relayed_bytes_total{service="web",listener="http",relay="splice",direction="to_service"} 4"#,
            r#"bro_relayed_bytes_total{service="web",listener="http",relay="splice",direction="to_client"} 6"#,
            r#"bro_connections_closed_total{service="db",listener="http",reason="eof"} 1"#,
            r#"bro_service_state{service="db",state="awake"} 1"#,
            r#"bro_service_state{service="db",state="asleep"} 0"#,
            r#"bro_stops_total{service="web",cause="idle"} 5"#,
            r#"bro_cold_start_duration_seconds_bucket{le="0.25",service="web",listener="http"} 0"#,
            r#"bro_cold_start_duration_seconds_bucket{le="0.5",service="web",listener="http"} 1"#,
            r#"bro_cold_start_duration_seconds_bucket{le="+Inf",service="web",listener="http"} 1"#,
            r#"bro_cold_start_duration_seconds_sum{service="web",listener="http"} 0.3"#,
            r#"bro_forwarder_info{service="web",version="0.1",relay="splice"} 1"#,
            r#"bro_waiting_clients{service="web"} 2"#,
            r#"bro_adopted_listeners{service="web"} 2"#,
            r#"bro_adopted_connections{service="web",listener="http"} 14"#,
            r#"bro_connections{service="web",listener="http"} 15"#,
            r#"bro_adopted_last_datagram_timestamp_seconds{service="web",listener="dns"} 1700000000"#,
            r#"bro_adoption_fallbacks_total{service="web",reason="family"} 0"#,
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("\n# EOF\n"), "{text}");
        // A family's samples stand together, below its description.
        let kinds: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let distinct: BTreeSet<&str> = kinds.iter().map(|kind| kind.split(' ').next().unwrap()).collect();
        assert_eq!(kinds.len(), distinct.len());
        assert!(
            kinds
                .iter()
                .all(|kind| ["counter", "gauge", "histogram"].contains(&kind.split(' ').nth(1).unwrap()))
        );
    }

    #[test]
    fn a_name_that_is_meant_to_break_out_does_not() {
        let text = text(vec![exposed("a\"} 1\nbro_x\\")]).unwrap();
        assert!(text.contains(r#"{service="a\"} 1\nbro_x\\"}"#), "{text}");
        assert!(names(&text).iter().all(|name| name.starts_with("bro_") && name != "bro_x"));
    }

    #[test]
    fn no_sample_is_there_twice() {
        let nameless = || Exposed { is_nameless: true, ..exposed("bro") };
        let text = text(vec![exposed("web"), nameless(), exposed("web"), nameless(), nameless()]).unwrap();
        let keys: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').unwrap().0)
            .collect();
        assert_eq!(keys.len(), keys.iter().collect::<BTreeSet<_>>().len(), "{text}");
        for name in ["web", "bro", "bro-2", "bro-3"] {
            assert!(keys.contains(&format!("bro_forwarders{{service=\"{name}\"}}").as_str()), "{text}");
        }
    }

    #[test]
    fn without_a_service_there_is_an_end_all_the_same() {
        let text = text(Vec::new()).unwrap();
        assert!(names(&text).is_empty() && text.ends_with("# EOF\n"));
    }

    /// The metrics of the documentation's table.
    #[test]
    fn every_metric_is_documented_and_none_else() {
        let exported = names(&text(vec![exposed("web")]).unwrap());
        let reference = include_str!("../../../docs/reference.md");
        let (_, chapter) = reference.split_once("\n## Metrics\n").unwrap();
        let chapter = chapter.split("\n## ").next().unwrap();
        let rows = chapter.lines().filter_map(|line| line.strip_prefix("| `bro_"));
        let told: BTreeSet<String> =
            rows.map(|row| format!("bro_{}", row.split('`').next().unwrap())).collect();
        // A histogram is three.
        let parts = ["_bucket", "_count", "_sum"];
        let whole =
            |name: &String| parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name).to_owned();
        assert_eq!(told, exported.iter().map(whole).collect());
    }

    /// Every name and label that the dashboard asks for is there.
    #[test]
    fn the_dashboard_asks_for_what_there_is() {
        let text = text(vec![exposed("web")]).unwrap();
        let exported = names(&text);
        let dashboard: serde_json::Value =
            serde_json::from_str(include_str!("../../../docs/grafana-dashboard.json")).unwrap();
        let mut asked = Vec::new();
        let mut queries = dashboard["templating"]["list"].as_array().unwrap().clone();
        let panels = dashboard["panels"].as_array().unwrap();
        queries.extend(panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap().clone()));
        for query in &queries {
            asked.extend(query["expr"].as_str().or(query["query"]["query"].as_str()).map(str::to_owned));
        }
        let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
        assert_eq!(ids.len(), panels.len(), "two panels have the same id");
        assert!(asked.len() > panels.len(), "{asked:?}");
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        for query in &asked {
            let words: Vec<&str> = query.split(|c| !word(c)).collect();
            let metrics: Vec<&&str> = words.iter().filter(|word| word.starts_with("bro_")).collect();
            assert!(!metrics.is_empty(), "{query} asks for nothing of bro's");
            for metric in metrics {
                assert!(exported.contains(*metric), "{query}: there is no {metric}");
                let sample = text.lines().find(|line| line.starts_with(&format!("{metric}{{"))).unwrap();
                let labels =
                    query.split(" by (").skip(1).flat_map(|by| by.split(')').next().unwrap().split(", "));
                for label in labels {
                    assert!(sample.contains(&format!("{label}=\"")), "{query}: {metric} has no {label}");
                }
            }
        }
    }
}
