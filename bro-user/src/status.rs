//! `bro status`: what running forwarders say of themselves, over a unix socket in their runtime directory. The forwarder's side
//! is [`Server`]; one connection is one answer, a JSON document, and nothing is read from whoever asks.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::exit::Failure;
use crate::stats::Tally;

/// The socket's name in the runtime directory.
const SOCKET: &str = "status.sock";

/// How long one answer may take to be written, or to be read.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest answer that is read: a forwarder of a thousand sockets stays far below.
const LONGEST: u64 = 4 * 1024 * 1024;

/// What a forwarder says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its process.
    pub pid: u32,
    /// bro's version.
    pub version: String,
    /// The unit it starts.
    pub unit: Option<String>,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// The same words as in `systemctl status`.
    pub state: String,
    /// How bytes are moved, and why not better.
    pub relay: Relay,
    /// Its sockets.
    pub listeners: Vec<Listener>,
    /// All of them together.
    pub total: Tally,
}

/// How bytes are moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relay {
    /// The relay in use: copy, splice or sockmap.
    pub name: String,
    /// Why it is not a better one, where it is not.
    pub reason: Option<String>,
}

/// One of a forwarder's sockets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Listener {
    /// Its FileDescriptorName=.
    pub name: String,
    /// Its address.
    pub address: String,
    /// Where its clients are connected to.
    pub target: String,
    /// Its figures.
    pub tally: Tally,
}

/// The forwarder's end.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// The directory to remove with it, where systemd does not.
    own_directory: Option<PathBuf>,
}

impl Server {
    /// Listens in RuntimeDirectory=, or below this user's runtime directory.
    ///
    /// # Errors
    /// When there is no such directory to be had; then there is no status, and everything else works.
    pub fn start() -> std::io::Result<Self> {
        let (directory, own_directory) = match std::env::var("RUNTIME_DIRECTORY") {
            // Several are separated by colons (systemd.exec(5)).
            Ok(list) => (PathBuf::from(list.split(':').next().unwrap_or_default()), None),
            Err(_) => {
                let own = base_directory().join(std::process::id().to_string());
                std::fs::create_dir_all(&own)?;
                (own.clone(), Some(own))
            }
        };
        let path = directory.join(SOCKET);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path, own_directory })
    }

    /// Waits for somebody who asks.
    ///
    /// # Errors
    /// accept(2)'s.
    pub async fn asked(&self) -> std::io::Result<UnixStream> {
        Ok(self.listener.accept().await?.0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).ok();
        if let Some(directory) = &self.own_directory {
            std::fs::remove_dir(directory).ok();
        }
    }
}

/// Answers one who asked.
pub async fn answer(mut stream: UnixStream, report: &Report) {
    let Ok(mut json) = serde_json::to_vec(report) else { return };
    json.push(b'\n');
    let written = tokio::time::timeout(PATIENCE, stream.write_all(&json)).await;
    if !matches!(written, Ok(Ok(()))) {
        tracing::debug!("whoever asked for the status did not wait for it");
    }
}

/// Where this user's forwarders have their runtime directories.
pub(crate) fn base_directory() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/run/bro".into();
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    runtime.unwrap_or_else(|| format!("/run/user/{}", nix::unistd::geteuid()).into()).join("bro")
}

/// The status sockets of this user's forwarders.
fn sockets() -> Vec<PathBuf> {
    let base = base_directory();
    let mut found: Vec<PathBuf> = std::fs::read_dir(&base)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join(SOCKET))
        .collect();
    found.push(base.join(SOCKET));
    found.retain(|path| path.exists());
    found.sort();
    found
}

async fn ask(path: &Path) -> anyhow::Result<Report> {
    let exchange = async {
        let stream = UnixStream::connect(path).await?;
        let mut text = String::new();
        let _length = stream.take(LONGEST).read_to_string(&mut text).await?;
        anyhow::Ok(serde_json::from_str(&text)?)
    };
    tokio::time::timeout(PATIENCE, exchange).await?
}

/// Runs `bro status`.
///
/// # Errors
/// When a socket named on the command line does not answer.
pub fn run(options: &crate::cli::Status) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        loop {
            let reports = collect(&options.sockets).await?;
            let mut out = std::io::stdout().lock();
            if options.watch {
                // Home, then clear to the end: no flicker.
                write!(out, "\x1b[H\x1b[J")?;
            }
            if options.json {
                writeln!(out, "{}", serde_json::to_string_pretty(&reports)?)?;
            } else {
                write!(out, "{}", describe(&reports))?;
            }
            out.flush()?;
            if !options.watch {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
}

async fn collect(named: &[PathBuf]) -> anyhow::Result<Vec<Report>> {
    let mut reports = Vec::new();
    for path in named {
        let report = ask(path).await;
        reports.push(report.map_err(|error| {
            Failure::NotFound(format!("no forwarder answers at {}: {error}", path.display()))
        })?);
    }
    if named.is_empty() {
        for path in sockets() {
            // A socket without a forwarder is a left-over of one that was killed.
            if let Ok(report) = ask(&path).await {
                reports.push(report);
            }
        }
    }
    Ok(reports)
}

fn describe(reports: &[Report]) -> String {
    let mut text = String::new();
    if reports.is_empty() {
        return "No forwarder of this user is running.\n".into();
    }
    for report in reports {
        let unit = report.unit.as_deref().map(|unit| format!(" for {unit}")).unwrap_or_default();
        // Writing to a String cannot fail.
        writeln!(text, "bro {} (process {}){unit}: {}", report.version, report.pid, report.state).ok();
        let reason = report.relay.reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        writeln!(text, "  relay {}{reason}, up {} s", report.relay.name, report.uptime_s).ok();
        for listener in &report.listeners {
            writeln!(text, "  {} {} -> {}", listener.name, listener.address, listener.target).ok();
            figures(&mut text, &listener.tally);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn describes_what_it_reads() {
        let tally = Tally { accepted: 3, open: 1, kernel: 7, ..Tally::default() };
        let report = Report {
            pid: 7,
            version: "0".into(),
            unit: Some("web.service".into()),
            uptime_s: 1,
            state: "1 connection now".into(),
            relay: Relay { name: "splice".into(), reason: Some("no CAP_BPF".into()) },
            listeners: vec![Listener {
                name: "http".into(),
                address: "[::]:80".into(),
                target: "127.0.0.1:80".into(),
                tally: tally.clone(),
            }],
            total: tally,
        };
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
        let text = describe(&[report]);
        assert!(text.contains("http [::]:80 -> 127.0.0.1:80") && text.contains("no CAP_BPF"), "{text}");
        assert!(text.contains("bytes 7 kernel"), "{text}");
    }
}
