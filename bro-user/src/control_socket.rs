//! Talking to a running forwarder, over a unix socket in its runtime directory: one line asks, one JSON document answers.
//!
//! | asked | answered |
//! |---|---|
//! | `status` (or nothing before the end of the stream) | [`crate::commands::status::Report`] |
//! | `wake` | [`Reply`], once the service is ready or has failed |
//! | `sleep`, `sleep force` | [`Reply`], once the unit is stopped or it is clear that it will not be |
//!
//! Only the forwarder's own user and root are answered. A request is bounded in length and time, and so is their number.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::exit;
use crate::paths;
use crate::systemd::scope::RuntimeScope;

/// The socket's name in the runtime directory.
pub(crate) const SOCKET: &str = "status.sock";

/// How long a request or an answer may take to cross the socket.
const CALLER_LIMIT: Duration = Duration::from_secs(5);

/// The longest request.
const LONGEST_REQUEST: u64 = 64;

/// The longest answer that is read: a forwarder of a thousand sockets stays far below.
const LONGEST_ANSWER: u64 = 4 * 1024 * 1024;

/// The longest string of an answer that is taken as it is: a message, an address or a reason stays far below.
const LONGEST_STRING: usize = 4096;

/// So many requests at a time; the next ones wait in the socket's backlog.
const AT_ONCE: usize = 16;

/// What may be asked of a forwarder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// What it does.
    Status,
    /// To start the service now.
    Wake,
    /// To stop it now and exit.
    Sleep {
        /// Although clients are connected, or another forwarder uses it, or no forwarder started it.
        force: bool,
    },
}

impl Request {
    /// Its line.
    #[must_use]
    pub const fn line(self) -> &'static str {
        match self {
            Self::Status => "status\n",
            Self::Wake => "wake\n",
            Self::Sleep { force: false } => "sleep\n",
            Self::Sleep { force: true } => "sleep force\n",
        }
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let known = [Self::Status, Self::Wake, Self::Sleep { force: false }, Self::Sleep { force: true }];
        match line.trim_end() {
            "" => Some(Self::Status),
            line => known.into_iter().find(|known| known.line().trim_end() == line),
        }
    }
}

/// The answer to `wake` and `sleep`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// It is as was asked.
    pub done: bool,
    /// In words.
    pub message: String,
    /// The connected clients that stand in the way.
    #[serde(default)]
    pub clients: Vec<String>,
    /// The forwarder is just leaving: its successor can be asked in a moment.
    #[serde(default)]
    pub leaving: bool,
}

impl Reply {
    /// It is as was asked.
    #[must_use]
    pub fn done(message: impl Into<String>) -> Self {
        Self { done: true, message: message.into(), clients: Vec::new(), leaving: false }
    }

    /// It is not.
    #[must_use]
    pub fn refused(message: impl Into<String>) -> Self {
        Self { done: false, ..Self::done(message) }
    }

    /// It is not, and this forwarder will be gone in a moment.
    #[must_use]
    pub fn leaving() -> Self {
        Self { leaving: true, ..Self::refused("the forwarder is just leaving") }
    }
}

/// A request that came in.
#[derive(Debug)]
pub struct Asked {
    /// What was asked for.
    pub request: Request,
    /// Where to answer.
    pub to: Asker,
}

/// Where to answer.
#[derive(Debug)]
pub struct Asker {
    stream: UnixStream,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Asker {
    /// Answers, in the background.
    pub fn answer(self, answer: impl Serialize + Send + Sync + 'static) {
        drop(tokio::spawn(async move { self.answered(&answer).await }));
    }

    /// Answers, and waits until it is on its way.
    pub async fn answered(self, answer: &(impl Serialize + Sync)) {
        let mut stream = self.stream;
        let Ok(mut json) = serde_json::to_vec(answer) else { return };
        json.push(b'\n');
        let written = tokio::time::timeout(CALLER_LIMIT, stream.write_all(&json)).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::debug!("the process that asked did not wait for the answer");
        }
    }
}

/// The forwarder's end.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    /// The directory to remove with it, where systemd does not.
    own_directory: Option<PathBuf>,
    places: Arc<Semaphore>,
    asked: (UnboundedSender<Asked>, UnboundedReceiver<Asked>),
}

/// Removes what killed forwarders left: sockets without a listener.
fn sweep(base: &Path) {
    for directory in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let is_a_process = directory.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok());
        let path = directory.path().join(SOCKET);
        let refused = std::io::ErrorKind::ConnectionRefused;
        if is_a_process
            && std::os::unix::net::UnixStream::connect(&path).is_err_and(|error| error.kind() == refused)
        {
            std::fs::remove_file(&path).ok();
            std::fs::remove_dir(directory.path()).ok();
        }
    }
}

/// A socket at `path`, in place of what was there, for this user alone.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl ControlServer {
    /// Listens in RuntimeDirectory=, or below this user's runtime directory.
    ///
    /// # Errors
    /// When no such directory can be had; then no request can come in, and everything else works.
    pub fn start() -> anyhow::Result<Self> {
        let (directory, own_directory) = match std::env::var("RUNTIME_DIRECTORY") {
            // Several are separated by colons (systemd.exec(5)).
            Ok(list) => (PathBuf::from(list.split(':').next().unwrap_or_default()), None),
            Err(_) => {
                sweep(&base_directory());
                let own = base_directory().join(std::process::id().to_string());
                std::fs::create_dir_all(&own).with_context(|| format!("cannot make {}", own.display()))?;
                (own.clone(), Some(own))
            }
        };
        let path = directory.join(SOCKET);
        let listener = bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let places = Arc::new(Semaphore::new(AT_ONCE));
        Ok(Self { listener, path, own_directory, places, asked: unbounded_channel() })
    }

    /// The same. Without a socket the forwarder does its work as ever, and a warning tells the administrator what is missing.
    #[must_use]
    pub fn start_or_warn() -> Option<Self> {
        let lost = |error: &anyhow::Error| {
            tracing::warn!(
                "{error:#}: bro status cannot see this forwarder, nor can bro wake and bro sleep reach it"
            );
        };
        Self::start().inspect_err(lost).ok()
    }

    /// Leaves the socket's name alone from now on: in the unit's own directory it is a successor's.
    pub fn is_succeeded(&mut self) {
        if self.own_directory.is_none() {
            self.path = PathBuf::new();
        }
    }

    /// Waits for a request. Nothing is lost when this is cancelled.
    ///
    /// # Errors
    /// accept(2)'s.
    pub async fn asked(&mut self) -> std::io::Result<Asked> {
        loop {
            let (listener, places) = (&self.listener, self.places.clone());
            let next = async move {
                let place = places.acquire_owned().await.map_err(std::io::Error::other)?;
                Ok::<_, std::io::Error>((listener.accept().await?.0, place))
            };
            tokio::select! {
                Some(asked) = self.asked.1.recv() => return Ok(asked),
                next = next => {
                    let (stream, place) = next?;
                    drop(tokio::spawn(hear(stream, place, self.asked.0.clone())));
                }
            }
        }
    }
}

/// Reads a request, within the time and length there is for one.
async fn hear(stream: UnixStream, place: tokio::sync::OwnedSemaphorePermit, to: UnboundedSender<Asked>) {
    let me = nix::unistd::geteuid().as_raw();
    if !stream.peer_cred().is_ok_and(|who| who.uid() == me || who.uid() == 0) {
        return tracing::warn!("a request of another user is not answered");
    }
    let mut stream = stream;
    let mut line = String::new();
    let mut reader = BufReader::new((&mut stream).take(LONGEST_REQUEST));
    let reading = tokio::time::timeout(CALLER_LIMIT, reader.read_line(&mut line));
    if !matches!(reading.await, Ok(Ok(_))) {
        return tracing::debug!("the process that asked did not say what");
    }
    let asker = Asker { stream, _place: place };
    match Request::parse(&line) {
        // The forwarder may have ended meanwhile.
        Some(request) => drop(to.send(Asked { request, to: asker })),
        None => asker.answer(Reply::refused("this forwarder does not understand the request")),
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).ok();
        if let Some(directory) = &self.own_directory {
            std::fs::remove_dir(directory).ok();
        }
    }
}

/// Where the system's forwarders have their runtime directories.
pub(crate) const SYSTEM: &str = "/run/bro";

/// Where this user's forwarders have their runtime directories.
pub(crate) fn base_directory() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return SYSTEM.into();
    }
    paths::runtime_directory().join("bro")
}

/// The socket of the forwarder that is the service `service`, in the directory that its unit names (`RuntimeDirectory=bro/%N`).
pub(crate) fn socket_of(service: &str, scope: RuntimeScope) -> PathBuf {
    let base = match scope {
        RuntimeScope::System => PathBuf::from(SYSTEM),
        RuntimeScope::User => base_directory(),
    };
    base.join(service.strip_suffix(".service").unwrap_or(service)).join(SOCKET)
}

/// Was the socket made by this user's forwarder?
pub(crate) fn is_of(socket: &Path, user: u32) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::symlink_metadata(socket).is_ok_and(|metadata| metadata.uid() == user)
}

/// The sockets of this user's forwarders.
#[must_use]
pub fn sockets() -> Vec<PathBuf> {
    let below = |base: &Path| {
        let entries = std::fs::read_dir(base).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().join(SOCKET)).chain([base.join(SOCKET)]).collect::<Vec<_>>()
    };
    let base = base_directory();
    let mut found = below(&base);
    let me = nix::unistd::geteuid();
    if me.is_root() {
        // Root has a service manager of its own as well.
        found.extend(below(&paths::runtime_directory_of(0).join("bro")));
    } else {
        // A user's forwarder may be a service of the system.
        found.extend(below(Path::new(SYSTEM)).into_iter().filter(|path| is_of(path, me.as_raw())));
    }
    found.retain(|path| path.exists());
    found.sort();
    found
}

/// Asks the forwarder at `path`, which may take `patience` for its answer.
///
/// # Errors
/// When no forwarder answers there.
pub async fn ask<Answer: DeserializeOwned>(
    path: &Path,
    request: Request,
    patience: Duration,
) -> anyhow::Result<Answer> {
    let exchange = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(request.line().as_bytes()).await?;
        let mut text = String::new();
        let _length = stream.take(LONGEST_ANSWER).read_to_string(&mut text).await?;
        anyhow::ensure!(!text.is_empty(), "it closed the connection without an answer");
        let mut said = serde_json::from_str(&text)?;
        tame(&mut said);
        anyhow::Ok(serde_json::from_value(said)?)
    };
    match tokio::time::timeout(patience, exchange).await {
        Ok(answer) => answer,
        Err(_) => anyhow::bail!("no answer within {patience:?}"),
    }
}

/// Any process may listen at a socket, and root reads its answer: each string becomes one line that a terminal shows without acting
/// on it, with a limit on its length.
fn tame(said: &mut serde_json::Value) {
    use serde_json::Value;
    match said {
        Value::String(text) => {
            if let Some((end, _)) = text.char_indices().nth(LONGEST_STRING) {
                text.truncate(end);
                text.push('…');
            }
            *text = exit::on_one_line(text);
        }
        Value::Array(values) => values.iter_mut().for_each(tame),
        Value::Object(values) => values.values_mut().for_each(tame),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The same, with the time for an answer that only has to be written.
///
/// # Errors
/// When no forwarder answers there.
pub async fn ask_soon<Answer: DeserializeOwned>(path: &Path, request: Request) -> anyhow::Result<Answer> {
    ask(path, request, CALLER_LIMIT).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_request_and_no_other() {
        for request in
            [Request::Status, Request::Wake, Request::Sleep { force: false }, Request::Sleep { force: true }]
        {
            assert_eq!(Request::parse(request.line()), Some(request));
        }
        assert_eq!(Request::parse(""), Some(Request::Status));
        for line in ["sleep  force", "wake up", "SLEEP", "status\nwake", "sleep forced"] {
            assert_eq!(Request::parse(line), None, "{line}");
        }
    }

    #[test]
    fn the_socket_is_where_the_unit_has_it() {
        assert_eq!(
            socket_of("web-activator.service", RuntimeScope::System),
            PathBuf::from("/run/bro/web-activator/status.sock")
        );
    }

    #[test]
    fn an_answer_is_a_line_each_and_not_longer_than_could_be_meant() {
        let long = "ä".repeat(LONGEST_STRING + 1);
        let mut said = serde_json::json!({ "a": ["x\ny\u{1b}[2J", 7], "b": long });
        tame(&mut said);
        assert_eq!(said["a"], serde_json::json!(["x\\ny\\u{1b}[2J", 7]));
        assert_eq!(said["b"].as_str().unwrap().chars().count(), LONGEST_STRING + 1);
        assert!(said["b"].as_str().unwrap().ends_with("ä…"));
    }

    #[test]
    fn sweeps_only_what_has_no_listener() {
        let base = std::env::temp_dir().join(format!("bro-sweep-{}", std::process::id()));
        let bind = |name: &str| {
            std::fs::create_dir_all(base.join(name)).unwrap();
            std::os::unix::net::UnixListener::bind(base.join(name).join(SOCKET)).unwrap()
        };
        let _alive = bind("1");
        drop((bind("2"), bind("web")));
        sweep(&base);
        let left = |name: &str| base.join(name).join(SOCKET).exists();
        assert!(left("1") && left("web") && !base.join("2").exists());
        std::fs::remove_dir_all(base).unwrap();
    }
}
