//! The options of `bro forward` about waking and sleeping.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};

use crate::systemd::calendar::DailySpans;
use crate::systemd::time_span::TimeSpan;
use bro_relay::proxy_protocol::Trusted as Peers;
use bro_relay::rate::Rate;

/// When the service is woken, and when it may sleep.
#[derive(Debug, Args)]
pub struct Idle {
    /// Exit after SPAN without a connection, and stop the unit if bro started it
    #[arg(long, value_name = "SPAN", default_value = "infinity", value_parser = crate::systemd::time_span::limit)]
    pub exit_idle_time: TimeSpan,

    /// How far that grows while the same clients wake the service again and again (no longer than --exit-idle-time: not at all)
    ///
    /// It doubles with each time but the first that one of the clients who have woken it lately does so again before it has slept for
    /// --exit-idle-time. Once it has slept for so long, everything begins anew.
    #[arg(long, value_name = "SPAN", default_value = "1h")]
    pub exit_idle_time_max: TimeSpan,

    /// What --exit-idle-time counts from: the last connection's end, or the last byte
    #[arg(long, value_name = "WHAT", default_value = "connections")]
    pub idle_by: IdleBy,

    /// Whose connections keep nothing awake, such as a monitor's: addresses, networks (10.0.0.0/8), unix, or vsock or vsock:CID (repeatable)
    ///
    /// They are served as all others are while the service is awake, and wake it too (see --wake-ignore). At the idle exit they are
    /// closed.
    #[arg(long, value_name = "CIDR|unix|vsock", value_delimiter = ',')]
    pub idle_ignore: Vec<Peers>,

    /// A connection on which less moves than BYTES within TIME keeps nothing awake: 1K/1min (K, M and G of 1024 bytes)
    ///
    /// For heartbeats: MQTT's pings, a websocket's keep-alives, an open browser tab. The idle time is counted from the last moment
    /// at which so much, both ways together, had moved on one connection within TIME (which is known to an eighth); at the idle exit
    /// what is still connected is closed, as with --idle-by=bytes. A request of fewer bytes keeps nothing awake either.
    #[arg(long, value_name = "BYTES/TIME", value_parser = crate::rate::rate)]
    pub idle_below: Option<Rate>,

    /// What wakes a sleeping service: a connection, its first byte (data), or its first BYTES (data:BYTES)
    ///
    /// With data, a port scan or a health check that sends nothing wakes nothing, and with data:BYTES neither does one that sends less
    /// (1 to 16384; over unix and vsock sockets the first byte wakes). Not for protocols in which the service speaks first (MySQL, SSH, SMTP): their
    /// clients would wait for ever.
    #[arg(long, value_name = "connect|data[:BYTES]", default_value = "connect")]
    pub wake_on: WakeOn,

    /// Whose connections do not wake the service, such as a scanner's: addresses, networks (10.0.0.0/8), unix, or vsock or vsock:CID (repeatable)
    ///
    /// While it sleeps they are reset at once; while it is being started for another client they wait with that one, and while it is
    /// awake they are served.
    #[arg(long, value_name = "CIDR|unix|vsock", value_delimiter = ',')]
    pub wake_ignore: Vec<Peers>,

    /// How often clients may have the service started within any 60 minutes; those who come beyond that while it sleeps are reset
    ///
    /// `bro wake` is not refused, but counts. (1 to 1000; no limit unless one is set.)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(crate::service::wakes::MOST_PER_HOUR)))]
    pub wakes_per_hour: Option<u32>,

    /// Freeze the service when it is idle, instead of stopping it: it keeps its memory, takes no processor time, and goes on with its next
    /// client at once
    ///
    /// The unit's cgroup is frozen, as by `systemctl freeze`; only a unit that bro has started. It is stopped after --freeze-time. What
    /// is connected and does not count is closed as at the idle exit. It takes systemd 246 and cgroups of version 2.
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false", default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub freeze: bool,

    /// With --freeze: stop the service after it has been frozen for SPAN
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = crate::systemd::time_span::limit)]
    pub freeze_time: TimeSpan,

    /// Never stop the service earlier than SPAN after it was woken
    #[arg(long, value_name = "SPAN", default_value = "0")]
    pub min_uptime: TimeSpan,

    /// Awake without clients at these times: Mon..Fri 09:00..18:00 (the days may be left out), or never (repeatable)
    ///
    /// A running forwarder wakes the service when such a time begins, and does not exit for idleness before it ends. DAYS, and a time
    /// zone after END, are systemd's (systemd.time(7)), which reads them (`systemd-analyze`); several times may also stand in one value,
    /// with semicolons between them. An END that is not after START is on the next day.
    #[arg(long, value_name = "TIMES")]
    pub keep_awake: Vec<DailySpans>,

    /// While this file exists, the service is busy: the idle exit waits
    #[arg(long, value_name = "PATH")]
    pub busy_file: Option<PathBuf>,

    /// While this shell command on the host exits with 0, the service is busy: the idle exit waits
    ///
    /// Asked when the idle time has passed, and again every 10 s (or idle time, if that is shorter) until it says no; each try
    /// is ended after 10 s. A try that takes too long, or that fails (exit status from 125 on, killed), counts as busy
    /// and is warned of: no job is cut off because of a broken question.
    #[arg(long, value_name = "COMMAND", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub busy_exec: Option<String>,
}

impl Idle {
    /// Is the idle time counted from bytes, and may it end with connections on which too few move?
    #[must_use]
    pub fn counts_bytes(&self) -> bool {
        self.idle_by == IdleBy::Bytes || self.idle_below.is_some()
    }
}

/// `--idle-by=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IdleBy {
    /// A service is idle without connections
    Connections,
    /// It is idle also with connections on which nothing moves: at the idle exit they are closed, as by an orderly end
    Bytes,
}

/// `--wake-on=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WakeOn {
    /// A client that connects.
    Connect,
    /// A client that has sent so many bytes, 1 or more.
    Data(u16),
}

/// The most bytes that a client may have to send: they wait in its socket, which has room for as many by default.
const MOST: u16 = 16 * 1024;

/// Why a text is none of what can wake.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWakeOn {
    /// Neither.
    #[error("“{0}” is neither connect nor data nor data:BYTES")]
    Form(String),
    /// Behind the colon.
    #[error("“{0}” is not a number of bytes from 1 to {MOST}, as in data:64")]
    Bytes(String),
}

impl WakeOn {
    /// How many bytes of a client's wake.
    #[must_use]
    pub fn bytes(self) -> u16 {
        match self {
            Self::Connect => 0,
            Self::Data(bytes) => bytes,
        }
    }
}

impl FromStr for WakeOn {
    type Err = InvalidWakeOn;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = match text {
            "connect" => return Ok(Self::Connect),
            "data" => return Ok(Self::Data(1)),
            _ => text.strip_prefix("data:").ok_or_else(|| InvalidWakeOn::Form(text.to_owned()))?,
        };
        // parse() would take a sign.
        let digits = bytes.starts_with(|c: char| c.is_ascii_digit());
        let number = bytes.parse().ok().filter(|number| digits && (1..=MOST).contains(number));
        number.map(Self::Data).ok_or_else(|| InvalidWakeOn::Bytes(bytes.to_owned()))
    }
}

impl fmt::Display for WakeOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("connect"),
            Self::Data(1) => f.write_str("data"),
            Self::Data(bytes) => write!(f, "data:{bytes}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wakes_is_read_as_it_is_written() {
        for text in ["connect", "data", "data:2", "data:16384"] {
            assert_eq!(text.parse::<WakeOn>().unwrap().to_string(), text);
        }
        assert_eq!("data:1".parse(), Ok(WakeOn::Data(1)));
        assert_eq!("bytes".parse::<WakeOn>(), Err(InvalidWakeOn::Form("bytes".into())));
        for bad in ["", "0", "+1", "-1", "16385", "1K", "99999999999"] {
            assert_eq!(format!("data:{bad}").parse::<WakeOn>(), Err(InvalidWakeOn::Bytes(bad.into())));
        }
    }
}
