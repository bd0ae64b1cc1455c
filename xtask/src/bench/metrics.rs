//! What is measured, in the order and the words of the report.

/// How a figure is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes a second, as GiB/s.
    Rate,
    /// Seconds, as microseconds.
    Micros,
    /// Seconds, as milliseconds.
    Millis,
    /// Seconds of processor time, as they are.
    Seconds,
    /// A number a second.
    PerSecond,
    /// Bytes, as KiB.
    KiB,
    /// A part of all, in percent.
    Percent,
}

impl Unit {
    /// The figure in this unit.
    pub fn scale(self, value: f64) -> f64 {
        match self {
            Self::Rate => value / f64::from(1 << 30),
            Self::Micros => value * 1e6,
            Self::Millis => value * 1e3,
            Self::Seconds | Self::PerSecond => value,
            Self::KiB => value / 1024.0,
            Self::Percent => value * 100.0,
        }
    }

    /// The unit's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rate => "GiB/s",
            Self::Micros => "µs",
            Self::Millis => "ms",
            Self::Seconds => "CPU s",
            Self::PerSecond => "/s",
            Self::KiB => "KiB",
            Self::Percent => "%",
        }
    }

    /// Digits behind the point.
    pub fn digits(self, scaled: f64) -> usize {
        match self {
            Self::PerSecond => 0,
            _ if scaled.abs() >= 100.0 => 0,
            _ if scaled.abs() >= 10.0 => 1,
            _ => 2,
        }
    }
}

/// One figure.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// In JSON.
    pub key: &'static str,
    pub title: &'static str,
    pub unit: Unit,
    pub higher_is_better: bool,
}

const fn more(key: &'static str, title: &'static str, unit: Unit) -> Metric {
    Metric { key, title, unit, higher_is_better: true }
}

const fn less(key: &'static str, title: &'static str, unit: Unit) -> Metric {
    Metric { key, title, unit, higher_is_better: false }
}

/// A table of the report.
#[derive(Debug)]
pub struct Section {
    pub title: &'static str,
    pub note: &'static str,
    pub metrics: &'static [Metric],
}

/// The tables.
pub const SECTIONS: &[Section] = &[
    Section {
        title: "Bulk",
        note: "One connection. Both ways is the sum of the two.",
        metrics: &[
            more("download.bytes_per_second", "service to client", Unit::Rate),
            more("upload.bytes_per_second", "client to service", Unit::Rate),
            more("duplex.bytes_per_second", "both ways", Unit::Rate),
        ],
    },
    Section {
        title: "Bulk by the size of writes",
        note: "One connection; each write is tried first, and waited for only when it does not fit.",
        metrics: &[
            more("writes4k.down_bytes_per_second", "to client, 4 KiB", Unit::Rate),
            more("writes64k.down_bytes_per_second", "64 KiB", Unit::Rate),
            more("writes256k.down_bytes_per_second", "256 KiB", Unit::Rate),
            more("writes1m.down_bytes_per_second", "1 MiB", Unit::Rate),
            more("writes4k.up_bytes_per_second", "to service, 4 KiB", Unit::Rate),
            more("writes64k.up_bytes_per_second", "64 KiB", Unit::Rate),
            more("writes256k.up_bytes_per_second", "256 KiB", Unit::Rate),
            more("writes1m.up_bytes_per_second", "1 MiB", Unit::Rate),
        ],
    },
    Section {
        title: "CPU per GiB",
        note: "Processor seconds of the whole system (client, service, kernel threads and interrupts included), and of the \
            forwarder's own processes.",
        metrics: &[
            less("download.system_cpu_per_gib", "to client, system", Unit::Seconds),
            less("download.own_cpu_per_gib", "to client, own", Unit::Seconds),
            less("upload.system_cpu_per_gib", "to service, system", Unit::Seconds),
            less("upload.own_cpu_per_gib", "to service, own", Unit::Seconds),
            less("duplex.system_cpu_per_gib", "both, system", Unit::Seconds),
        ],
    },
    Section {
        title: "Round trips",
        note: "One connection, a request and an answer of the same size, one at a time. Awake: while the processors are kept from \
            sleeping, so that it takes no time to wake them; on a virtual machine that is most of a small round trip.",
        metrics: &[
            less("requests64_awake.p50", "64 B p50, awake", Unit::Micros),
            less("requests64_awake.p99", "64 B p99, awake", Unit::Micros),
            less("requests64.p50", "64 B p50", Unit::Micros),
            less("requests64.p99", "64 B p99", Unit::Micros),
            less("requests64.p999", "64 B p99.9", Unit::Micros),
            less("requests1k.p50", "1 KiB p50", Unit::Micros),
            less("requests1k.p99", "1 KiB p99", Unit::Micros),
            less("requests1k.p999", "1 KiB p99.9", Unit::Micros),
            less("requests16k.p50", "16 KiB p50", Unit::Micros),
            less("requests16k.p99", "16 KiB p99", Unit::Micros),
            less("requests16k.p999", "16 KiB p99.9", Unit::Micros),
        ],
    },
    Section {
        title: "CPU per request",
        note: "Processor time of the whole system for one request and its answer.",
        metrics: &[
            less("requests64.system_cpu_per_request", "64 B", Unit::Micros),
            less("requests16k.system_cpu_per_request", "16 KiB", Unit::Micros),
            less("flows.system_cpu_per_request", "1 KiB, 64 flows", Unit::Micros),
            less("connections.system_cpu", "new connection", Unit::Micros),
        ],
    },
    Section {
        title: "Many connections",
        note: "New connections: connect, a byte each way, close, one after the other. Flows: 64 connections with requests of \
            1 KiB, one event loop on each side.",
        metrics: &[
            more("connections.per_second", "new connections", Unit::PerSecond),
            more("flows.per_second", "64 flows", Unit::PerSecond),
            less("flows.p50", "flows p50", Unit::Micros),
            less("flows.p99", "flows p99", Unit::Micros),
        ],
    },
    Section {
        title: "Beside slow readers",
        note: "Round trips of 64 B, alone and beside four connections whose service sends without end and whose client takes \
            64 KiB every 10 ms.",
        metrics: &[
            less("slow.alone.p50", "alone p50", Unit::Micros),
            less("slow.beside.p50", "beside p50", Unit::Micros),
            less("slow.alone.p99", "alone p99", Unit::Micros),
            less("slow.beside.p99", "beside p99", Unit::Micros),
        ],
    },
    Section {
        title: "Memory per idle connection",
        note: "After a byte each way. The process's own memory (PSS) is that of a fresh process; the kernel's (slabs, stacks, \
            page tables) is the whole system's, so it contains the client's and the service's sockets, which the direct \
            connection shows alone.",
        metrics: &[
            less("idle1000.process_bytes", "1,000: process", Unit::KiB),
            less("idle1000.kernel_bytes", "1,000: kernel", Unit::KiB),
            less("idle9000.process_bytes", "9,000: process", Unit::KiB),
            less("idle9000.kernel_bytes", "9,000: kernel", Unit::KiB),
        ],
    },
    Section {
        title: "Datagrams",
        note: "UDP, one client, with as many datagrams on their way as a socket's buffer of the usual size holds, counted where they arrive; and 64 \
            clients that each ask when they are answered, also with processors that are kept awake. HAProxy, systemd-socket-proxyd and lanes are for \
            streams.",
        metrics: &[
            more("datagrams64.up_per_second", "to service, 64 B", Unit::PerSecond),
            more("datagrams1200.up_per_second", "to service, 1,200 B", Unit::PerSecond),
            more("datagrams8192.up_per_second", "to service, 8 KiB", Unit::PerSecond),
            more("datagrams64.down_per_second", "to client, 64 B", Unit::PerSecond),
            more("datagrams1200.down_per_second", "to client, 1,200 B", Unit::PerSecond),
            more("datagrams8192.down_per_second", "to client, 8 KiB", Unit::PerSecond),
            more("datagrams64.clients_awake_per_second", "64 clients, 64 B, awake", Unit::PerSecond),
            more("datagrams64.clients_per_second", "64 clients, 64 B", Unit::PerSecond),
            less("datagrams64.up_lost", "lost to service, 64 B", Unit::Percent),
            less("datagrams64.down_lost", "lost to client, 64 B", Unit::Percent),
        ],
    },
    Section {
        title: "Datagrams, senders that send many at once",
        note: "The same with one system call for a quarter of those that are on their way (UDP_SEGMENT), as programs for QUIC send: with one for \
            each, the sender takes as long as a forwarder and sets the pace.",
        metrics: &[
            more("datagrams64.at_once.up_per_second", "to service, 64 B", Unit::PerSecond),
            more("datagrams1200.at_once.up_per_second", "to service, 1,200 B", Unit::PerSecond),
            more("datagrams8192.at_once.up_per_second", "to service, 8 KiB", Unit::PerSecond),
            more("datagrams64.at_once.down_per_second", "to client, 64 B", Unit::PerSecond),
            more("datagrams1200.at_once.down_per_second", "to client, 1,200 B", Unit::PerSecond),
            more("datagrams8192.at_once.down_per_second", "to client, 8 KiB", Unit::PerSecond),
            less("datagrams64.at_once.own_cpu", "own CPU to service, 64 B", Unit::Micros),
            less("datagrams64.at_once.down_own_cpu", "to client, 64 B", Unit::Micros),
            less("datagrams1200.at_once.own_cpu", "to service, 1,200 B", Unit::Micros),
            less("datagrams1200.at_once.down_own_cpu", "to client, 1,200 B", Unit::Micros),
        ],
    },
    Section {
        title: "A flood of datagrams",
        note: "UDP, a sender that waits for nothing: how many arrive, and which part of those that were sent is lost.",
        metrics: &[
            more("datagrams64.flood_per_second", "64 B", Unit::PerSecond),
            less("datagrams64.flood_lost", "64 B lost", Unit::Percent),
            more("datagrams1200.flood_per_second", "1,200 B", Unit::PerSecond),
            less("datagrams1200.flood_lost", "1,200 B lost", Unit::Percent),
            more("datagrams8192.flood_per_second", "8 KiB", Unit::PerSecond),
            less("datagrams8192.flood_lost", "8 KiB lost", Unit::Percent),
        ],
    },
    Section {
        title: "Round trips of datagrams",
        note: "UDP, one client, a datagram and its echo at a time; awake as above.",
        metrics: &[
            less("datagrams64.trip_awake.p50", "64 B p50, awake", Unit::Micros),
            less("datagrams64.trip.p50", "64 B p50", Unit::Micros),
            less("datagrams64.trip.p99", "64 B p99", Unit::Micros),
            less("datagrams1200.trip_awake.p50", "1,200 B p50, awake", Unit::Micros),
            less("datagrams1200.trip.p50", "1,200 B p50", Unit::Micros),
            less("datagrams1200.trip.p99", "1,200 B p99", Unit::Micros),
            less("datagrams8192.trip_awake.p50", "8 KiB p50, awake", Unit::Micros),
            less("datagrams8192.trip.p50", "8 KiB p50", Unit::Micros),
            less("datagrams8192.trip.p99", "8 KiB p99", Unit::Micros),
        ],
    },
    Section {
        title: "CPU per datagram",
        note: "Processor time of the forwarder's own processes, and of the whole system with client and service, for a datagram; of 64 clients, for one and its answer.",
        metrics: &[
            less("datagrams64.own_cpu", "to service, 64 B, own", Unit::Micros),
            less("datagrams64.system_cpu", "system", Unit::Micros),
            less("datagrams64.down_own_cpu", "to client, 64 B, own", Unit::Micros),
            less("datagrams1200.own_cpu", "to service, 1,200 B, own", Unit::Micros),
            less("datagrams1200.system_cpu", "system", Unit::Micros),
            less("datagrams1200.down_own_cpu", "to client, 1,200 B, own", Unit::Micros),
            less("datagrams8192.own_cpu", "to service, 8 KiB, own", Unit::Micros),
            less("datagrams8192.system_cpu", "system", Unit::Micros),
            less("datagrams8192.down_own_cpu", "to client, 8 KiB, own", Unit::Micros),
            less(
                "datagrams64.clients_awake_own_cpu",
                "64 clients, question and answer, own, awake",
                Unit::Micros,
            ),
            less("datagrams64.clients_own_cpu", "64 clients, question and answer, own", Unit::Micros),
            less("datagrams64.clients_system_cpu", "system", Unit::Micros),
        ],
    },
    Section {
        title: "Databases",
        note: "pgbench with 8 clients: select only, like TPC-B, and select only with a connection for each transaction. \
            redis-benchmark GET with 16 clients, without and with -P 16.",
        metrics: &[
            more("pgbench.per_second", "pgbench -S", Unit::PerSecond),
            less("pgbench.mean", "pgbench -S mean", Unit::Micros),
            more("pgbench-tpcb.per_second", "pgbench, TPC-B", Unit::PerSecond),
            more("pgbench-connect.per_second", "pgbench -S -C", Unit::PerSecond),
            more("redis.per_second", "redis", Unit::PerSecond),
            less("redis.p99", "redis p99", Unit::Micros),
            more("redis-pipelined.per_second", "redis -P 16", Unit::PerSecond),
        ],
    },
    Section {
        title: "Web servers",
        note: "nginx. wrk with 16 connections that are kept, and with a connection for each request; h2load with 16 connections of 10 \
            streams, HTTP/2 without TLS.",
        metrics: &[
            more("wrk.per_second", "wrk", Unit::PerSecond),
            less("wrk.p99", "wrk p99", Unit::Micros),
            less("wrk.system_cpu_per_request", "wrk system CPU", Unit::Micros),
            more("wrk-close.per_second", "wrk, Connection: close", Unit::PerSecond),
            more("h2load.per_second", "h2load", Unit::PerSecond),
        ],
    },
    Section {
        title: "Network tools",
        note: "iperf3, one stream, in writes of 128 KiB and 1 MiB; sockperf ping-pong over TCP, 64 bytes, half of a round trip as it \
            says. Both use blocking sockets.",
        metrics: &[
            more("iperf3-128k.up", "iperf3 to service, 128 KiB", Unit::Rate),
            more("iperf3-128k.down", "iperf3 to client, 128 KiB", Unit::Rate),
            more("iperf3-1m.up", "iperf3 to service, 1 MiB", Unit::Rate),
            more("iperf3-1m.down", "iperf3 to client, 1 MiB", Unit::Rate),
            less("sockperf.mean", "sockperf", Unit::Micros),
        ],
    },
    Section {
        title: "Cold start",
        note: "First byte after the client's connect(). systemd: until its stand-in has seen the client. Container: until the \
            service listens; it takes 50 ms to start up. Readiness: until the service has the connection. Relay: until the \
            client has its byte. The forwarder's own is all that comes after the service listens. systemd-socket-proxyd is \
            started when the service listens (After=), for it does not hold clients; the others start beside it. bro with lanes is \
            started with --relay=auto, which is the default; with --relay=sockmap it takes a client only when the kernel relay is \
            loaded and tested, some 50 ms after its start, which no container of Podman's is as quick as.",
        metrics: &[
            less("cold.systemd", "systemd", Unit::Millis),
            less("cold.container", "container", Unit::Millis),
            less("cold.readiness", "readiness", Unit::Millis),
            less("cold.relay", "relay", Unit::Millis),
            less("cold.own", "forwarder's own", Unit::Millis),
            less("cold.total", "in all", Unit::Millis),
        ],
    },
];

/// Every figure of the tables.
pub fn all() -> impl Iterator<Item = &'static Metric> {
    SECTIONS.iter().flat_map(|section| section.metrics)
}

/// The figure of this name.
pub fn by_key(key: &str) -> Option<&'static Metric> {
    all().find(|metric| metric.key == key)
}
