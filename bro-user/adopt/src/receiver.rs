//! What an OCI runtime sends to a profile's `listenerPath`: the container process state as JSON, and the notification descriptor
//! (OCI runtime specification, "Seccomp: The Container Process State"; crun and runc do).
//!
//! It comes for the container's first process ("creating"), and again for each `podman exec` and health check ("running").
//!
//! It is looked at, and stays to be received: an agent that is killed meanwhile leaves it to a successor, which has the connection from
//! the service manager's store.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use serde::Deserialize;

use crate::sys;

/// The most bytes of a state, which has the container's annotations: fewer than a sender's buffer holds (net.core.wmem_default, 208 KiB), since
/// they stay there.
const MOST_BYTES: usize = 128 * 1024;
/// The most states that arrive at once; what comes beyond waits in the socket's queue.
pub const MOST_ARRIVING: usize = 16;
/// How long one may take. A runtime connects before it has made the container, and sends when that one's first process has its filter.
const ARRIVES_WITHIN: Duration = Duration::from_secs(60);
/// After how long one that has come in part is looked at again: what stays to be received would end each poll(2) at once.
const AGAIN: Duration = Duration::from_millis(10);

/// Whose calls a notification descriptor tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The container's own processes: what they listen at is adopted.
    Container,
    /// A command that was executed in it: what it listens at is its own, as a health check's.
    Executed,
}

/// A container's processes, to be answered.
#[derive(Debug)]
pub struct Notifier {
    /// The notification descriptor.
    pub notify: Arc<OwnedFd>,
    /// Whose.
    pub role: Role,
    /// The signal by which the container's first process is told to stop, where the runtime says it.
    pub stop_signal: Option<i32>,
}

/// Why something that was sent is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Another user's process.
    #[error("user {0} may not send a container's notification descriptor")]
    User(u32),
    /// SO_PEERCRED, recvmsg(2).
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Longer than any state.
    #[error("it is longer than {MOST_BYTES} bytes")]
    TooLong,
    /// Not in time.
    #[error("it did not come to its end in {ARRIVES_WITHIN:?}")]
    TooSlow,
    /// None, or more than one.
    #[error("there came {0} descriptors instead of one")]
    Descriptors(usize),
    /// The descriptor is something else.
    #[error("the descriptor tells of no system calls")]
    NoNotifications,
    /// The JSON.
    #[error("it is no container process state: {0}")]
    State(serde_json::Error),
    /// A status that has no meaning here.
    #[error("the container is “{0}”")]
    Status(String),
}

#[derive(Deserialize)]
struct ProcessState {
    fds: Vec<String>,
    state: OciState,
}

#[derive(Deserialize)]
struct OciState {
    status: String,
    /// Whatever a runtime writes there is no reason to refuse the rest.
    #[serde(default)]
    annotations: serde_json::Value,
}

impl OciState {
    /// By Podman's annotation, which is a number.
    fn stop_signal(&self) -> Option<i32> {
        let said = self.annotations.get("org.opencontainers.image.stopSignal")?.as_str()?;
        said.parse().ok().filter(|signal| (1..=libc::SIGRTMAX()).contains(signal))
    }
}

/// The listening socket at `listenerPath`, and what is arriving there.
#[derive(Debug)]
pub struct Receiver {
    listener: OwnedFd,
    arriving: Vec<Arriving>,
}

#[derive(Debug)]
struct Arriving {
    number: u64,
    connection: OwnedFd,
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    until: Instant,
}

impl Receiver {
    /// On this listening unix socket, which becomes non-blocking.
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn new(listener: OwnedFd) -> nix::Result<Self> {
        crate::options::set_nonblocking(listener.as_fd(), true)?;
        Ok(Self { listener, arriving: Vec::new() })
    }

    const fn has_room(&self) -> bool {
        self.arriving.len() < MOST_ARRIVING
    }

    /// What to poll for reading: the socket while there is room, and what arrives.
    pub fn polled(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let listener = self.has_room().then(|| self.listener.as_fd());
        let arriving = self.arriving.iter().filter(|arriving| arriving.bytes.is_empty());
        listener.into_iter().chain(arriving.map(|arriving| arriving.connection.as_fd()))
    }

    /// The connections by which something is arriving, by their numbers.
    pub fn connections(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>)> {
        self.arriving.iter().map(|arriving| (arriving.number, arriving.connection.as_fd()))
    }

    /// When to look again at the latest.
    #[must_use]
    pub fn until(&self, now: Instant) -> Option<Instant> {
        let begun = |arriving: &Arriving| !arriving.bytes.is_empty();
        let until = |arriving: &Arriving| if begun(arriving) { now + AGAIN } else { arriving.until };
        self.arriving.iter().map(until).min()
    }

    /// A runtime that has connected, if there is one and room for it.
    pub fn accept(&self) -> Option<Result<OwnedFd, Refused>> {
        if !self.has_room() {
            return None;
        }
        match bro_relay::sys::accept(self.listener.as_fd()) {
            Ok((connection, _)) => Some(trusted(&connection).map(|()| connection)),
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::debug!(%error, "nothing accepted at the seccomp socket");
                }
                None
            }
        }
    }

    /// Looks at this connection from now on, from its beginning; it is a predecessor's or was just accepted.
    ///
    /// # Errors
    /// When it is no connection.
    pub fn take(&mut self, number: u64, connection: OwnedFd) -> io::Result<()> {
        // Each look goes on where the last one ended.
        sys::set_option(connection.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0_i32.to_ne_bytes())?;
        let until = Instant::now() + ARRIVES_WITHIN;
        self.arriving.push(Arriving {
            number,
            connection,
            bytes: Vec::new(),
            descriptors: Vec::new(),
            until,
        });
        Ok(())
    }

    /// Looks at what has come, without waiting; all that is complete, or refused, by its number.
    pub fn turn(&mut self) -> Vec<(u64, Result<Notifier, Refused>)> {
        let mut outcomes = Vec::new();
        let mut waiting = Vec::new();
        for mut arriving in self.arriving.drain(..) {
            match arriving.look() {
                Ok(false) => waiting.push(arriving),
                Ok(true) => outcomes.push((arriving.number, arriving.notifier())),
                Err(refused) => outcomes.push((arriving.number, Err(refused))),
            }
        }
        self.arriving = waiting;
        outcomes
    }
}

/// The runtime is this user's, or root's (unix(7) SO_PEERCRED): the socket's mode keeps others out already.
fn trusted(connection: &OwnedFd) -> Result<(), Refused> {
    let peer = getsockopt(connection, sockopt::PeerCredentials).map_err(io::Error::from)?.uid();
    if peer == 0 || peer == geteuid().as_raw() { Ok(()) } else { Err(Refused::User(peer)) }
}

impl Arriving {
    /// Whether all is there: crun closes after it, or the JSON is whole.
    fn look(&mut self) -> Result<bool, Refused> {
        // More than any state: a look that ended within what came with a descriptor would have a duplicate of that one again.
        let mut part = vec![0; MOST_BYTES + 1];
        loop {
            match bro_relay::sys::peek_with_descriptors(self.connection.as_fd(), &mut part) {
                Ok((0, _)) => return Ok(true),
                Ok((length, descriptors)) => {
                    self.bytes.extend_from_slice(part.get(..length).unwrap_or_default());
                    self.descriptors.extend(descriptors);
                    if self.bytes.len() > MOST_BYTES {
                        return Err(Refused::TooLong);
                    }
                    if self.descriptors.len() > 1 {
                        return Err(Refused::Descriptors(self.descriptors.len()));
                    }
                }
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let is_whole = state(&self.bytes).is_ok();
                    let late = !is_whole && Instant::now() >= self.until;
                    return if late { Err(Refused::TooSlow) } else { Ok(is_whole) };
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn notifier(mut self) -> Result<Notifier, Refused> {
        let state = state(&self.bytes).map_err(Refused::State)?;
        let count = self.descriptors.len();
        let notify = self.descriptors.pop().filter(|_| count == 1 && state.fds == ["seccompFd"]);
        let notify = notify.ok_or(Refused::Descriptors(count))?;
        let role = match state.state.status.as_str() {
            "creating" | "created" => Role::Container,
            "running" => Role::Executed,
            other => return Err(Refused::Status(other.chars().take(40).collect())),
        };
        if !tells_of_calls(&notify) {
            return Err(Refused::NoNotifications);
        }
        Ok(Notifier { notify: Arc::new(notify), role, stop_signal: state.state.stop_signal() })
    }
}

fn state(bytes: &[u8]) -> Result<ProcessState, serde_json::Error> {
    // Some runtimes end it like a string of C.
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    serde_json::from_slice(bytes.get(..end).unwrap_or_default())
}

/// Is it a notification descriptor? Its name is in proc_pid_fd(5) (`init_listener`).
#[must_use]
pub fn tells_of_calls(descriptor: &OwnedFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
        .is_ok_and(|link| link.as_os_str() == "anon_inode:seccomp notify")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    const STATE: &str = r#"{"ociVersion":"1.0","fds":["seccompFd"],"pid":1,"metadata":"m","state":{"id":"i","status":"creating"}}"#;

    struct Path(std::path::PathBuf);

    impl Drop for Path {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn stage() -> (Receiver, UnixStream, Path) {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-adopt-XXXXXX")).unwrap();
        let listener = UnixListener::bind(folder.join("s")).unwrap();
        let runtime = UnixStream::connect(folder.join("s")).unwrap();
        (Receiver::new(listener.into()).unwrap(), runtime, Path(folder))
    }

    /// Takes who has connected, and looks.
    fn turn(receiver: &mut Receiver) -> Vec<Result<Notifier, Refused>> {
        while let Some(connection) = receiver.accept() {
            receiver.take(7, connection.unwrap()).unwrap();
        }
        receiver
            .turn()
            .into_iter()
            .map(|(number, outcome)| (number == 7).then_some(outcome).unwrap())
            .collect()
    }

    fn refused(runtime: impl FnOnce(&mut UnixStream)) -> String {
        let (mut receiver, mut stream, _path) = stage();
        runtime(&mut stream);
        drop(stream);
        let mut outcomes = turn(&mut receiver);
        assert_eq!(outcomes.len(), 1);
        outcomes.remove(0).unwrap_err().to_string()
    }

    fn send(stream: &UnixStream, text: &str, count: usize) {
        // Not the stream itself, which would hold its own end open.
        let file = std::fs::File::open("/dev/null").unwrap();
        let sent: Vec<_> = (0..count).map(|_| file.as_fd()).collect();
        bro_relay::sys::send_with_descriptors(stream.as_fd(), text.as_bytes(), &sent).unwrap();
    }

    #[test]
    fn what_is_no_state_with_one_notification_descriptor_is_refused() {
        let cases: [(&str, usize, &str); 6] = [
            (STATE, 0, "there came 0 descriptors instead of one"),
            (STATE, 2, "there came 2 descriptors instead of one"),
            (STATE, 1, "the descriptor tells of no system calls"),
            ("{", 1, "it is no container process state: EOF while parsing an object at line 1 column 1"),
            (r#"{"fds":[],"state":{"status":"creating"}}"#, 1, "there came 1 descriptors instead of one"),
            (r#"{"fds":["seccompFd"],"state":{"status":"stopped"}}"#, 1, "the container is “stopped”"),
        ];
        for (text, count, expected) in cases {
            assert_eq!(refused(|stream| send(stream, text, count)), expected);
        }
    }

    #[test]
    fn the_stop_signal_is_podmans_annotation() {
        let of = |annotations: &str| {
            let text = format!(r#"{{"fds":[],"state":{{"status":"creating"{annotations}}}}}"#);
            state(text.as_bytes()).unwrap().state.stop_signal()
        };
        let said =
            |value: &str| of(&format!(r#","annotations":{{"org.opencontainers.image.stopSignal":{value}}}"#));
        assert_eq!(said(r#""3""#), Some(3));
        for other in [r#""0""#, r#""65""#, r#""SIGTERM""#, "15", "null"] {
            assert_eq!(said(other), None, "{other}");
        }
        for none in ["", r#","annotations":null"#, r#","annotations":[1]"#, r#","annotations":{"a":"b"}"#] {
            assert_eq!(of(none), None, "{none}");
        }
    }

    #[test]
    fn a_state_without_an_end_is_refused() {
        let (mut receiver, mut stream, _path) = stage();
        stream.set_nonblocking(true).unwrap();
        let mut outcomes = Vec::new();
        while outcomes.is_empty() {
            let _full = stream.write(&[b' '; 8192]);
            outcomes = turn(&mut receiver);
        }
        assert_eq!(outcomes.remove(0).unwrap_err().to_string(), "it is longer than 131072 bytes");
        assert_eq!(receiver.polled().count(), 1);
    }

    #[test]
    fn a_state_comes_in_parts_and_may_end_with_a_zero() {
        assert!(state(format!("{STATE}\0").as_bytes()).is_ok());
        let (mut receiver, stream, _path) = stage();
        let (one, other) = STATE.split_at(20);
        send(&stream, one, 1);
        assert!(turn(&mut receiver).is_empty());
        // Neither part is polled for: it is there still.
        assert_eq!(receiver.polled().count(), 1);
        let now = Instant::now();
        assert_eq!(receiver.until(now), Some(now + AGAIN));
        send(&stream, other, 0);
        // Whole, though the connection is open still.
        assert_eq!(
            turn(&mut receiver).remove(0).unwrap_err().to_string(),
            "the descriptor tells of no system calls"
        );
    }

    #[test]
    fn a_successor_sees_what_its_predecessor_has_looked_at() {
        let (receiver, stream, _path) = stage();
        let connection = receiver.accept().unwrap().unwrap();
        // Of a size that comes in several parts, of which the first has the descriptor.
        let long = STATE.replace("\"i\"", &format!("\"{}\"", "i".repeat(120_000)));
        send(&stream, &long, 1);
        drop(stream);
        for _ in 0..3 {
            let (mut agent, _stream, _path) = stage();
            agent.take(9, connection.try_clone().unwrap()).unwrap();
            let (number, outcome) = agent.turn().remove(0);
            // What a state with a descriptor of another kind is refused for.
            assert_eq!(
                (number, outcome.unwrap_err().to_string()),
                (9, "the descriptor tells of no system calls".into())
            );
        }
    }
}
