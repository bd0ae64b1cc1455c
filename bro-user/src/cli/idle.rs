//! The options of `bro forward` about waking and sleeping.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::systemd::time_span::TimeSpan;

/// When the service is woken, and when it may sleep.
#[derive(Debug, Args)]
pub struct Idle {
    /// Exit after SPAN without a connection, and stop the unit if bro started it
    #[arg(long, value_name = "SPAN", default_value = "infinity", value_parser = crate::systemd::time_span::limit)]
    pub exit_idle_time: TimeSpan,

    /// What --exit-idle-time counts from: the last connection's end, or the last byte
    #[arg(long, value_name = "WHAT", default_value = "connections")]
    pub idle_by: IdleBy,

    /// What wakes a sleeping service: a connection, or a connection's first byte
    #[arg(long, value_name = "WHAT", default_value = "connect")]
    pub wake_on: WakeOn,

    /// Never stop the service earlier than SPAN after it was woken
    #[arg(long, value_name = "SPAN", default_value = "0")]
    pub min_uptime: TimeSpan,

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

/// `--idle-by=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IdleBy {
    /// A service is idle without connections
    Connections,
    /// It is idle also with connections on which nothing moves: at the idle exit they are closed, as by an orderly end
    Bytes,
}

/// `--wake-on=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WakeOn {
    /// A client that connects
    Connect,
    /// A client that sends a byte: a port scan or a health check that sends nothing wakes nothing. Not for protocols in which the
    /// service speaks first (MySQL, SSH, SMTP): their clients would wait for ever
    Data,
}
