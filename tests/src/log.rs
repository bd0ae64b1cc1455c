//! What the program under test says on stderr: its lines, and the closing line of each connection taken apart.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The lines a process has written so far.
#[derive(Debug, Clone)]
pub struct Log(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    closed: bool,
}

impl Log {
    /// Collects what comes out of `stream`, in a thread that ends with the last process holding the other end.
    #[must_use]
    pub fn collect(stream: impl Read + Send + 'static) -> Self {
        let log = Self(Arc::default());
        let writer = log.clone();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                writer.state().lines.push(text);
                writer.0.changed.notify_all();
                line.clear();
            }
            writer.state().closed = true;
            writer.0.changed.notify_all();
        });
        log
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no holder of this lock panics")
    }

    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.state().lines.clone()
    }

    fn wait<T>(&self, within: Duration, mut look: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + within;
        let mut state = self.state();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            (state, _) = self.0.changed.wait_timeout(state, left).expect("no holder of this lock panics");
        }
    }

    /// The first line that `wanted` accepts, which may be still to come.
    pub fn line(&self, within: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait(within, |state| state.lines.iter().find(|line| wanted(line)).cloned())
            .with_context(|| format!("the awaited line never came; the log:\n{}", self.lines().join("\n")))
    }

    /// The lines so far that complain: warnings and errors. But for the one that who insists on the kernel relay gets on a kernel that
    /// answers FIONREAD wrongly, which is the kernel's.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let complains = |line: &String| {
            (line.contains(" WARN ") || line.contains(" ERROR ")) && !line.contains("FIONREAD")
        };
        self.lines().into_iter().filter(complains).collect()
    }

    /// The closing lines of `count` connections, once there are so many.
    pub fn closings(&self, count: usize, within: Duration) -> Result<Vec<Closing>> {
        let closings = |state: &State| state.lines.iter().filter_map(|line| Closing::parse(line)).collect();
        let found = self.wait(within, |state| {
            let all: Vec<_> = closings(state);
            (all.len() >= count).then_some(all)
        });
        match found {
            Some(all) => Ok(all),
            None => bail!("{count} closing lines never came; the log:\n{}", self.lines().join("\n")),
        }
    }

    /// Forgets what was said so far: what comes from now on belongs to what a test looks at.
    pub fn forget(&self) {
        self.state().lines.clear();
    }

    /// Whether the last writer has closed the stream: no process of the program is left that could still write.
    #[must_use]
    pub fn ends(&self, within: Duration) -> bool {
        self.wait(within, |state| state.closed.then_some(())).is_some()
    }
}

/// The line that ends one connection's story.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closing {
    /// The connection's number.
    pub conn: u64,
    /// The client.
    pub peer: String,
    /// The service.
    pub target: String,
    /// What moved the bytes.
    pub relay: String,
    /// Bytes from the client to the service.
    pub to_service: u64,
    /// Bytes from the service to the client.
    pub to_client: u64,
    /// How long it lasted.
    pub duration_ms: u64,
    /// Why it ended.
    pub reason: String,
    /// How long the container took to start, for the connection that woke it.
    pub cold_start_ms: Option<u64>,
}

impl Closing {
    /// Takes a line apart, if it is a closing line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let fields: HashMap<&str, &str> =
            line.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        let number = |name: &str| fields.get(name)?.parse().ok();
        let text = |name: &str| fields.get(name).map(|value| value.trim_matches('"').to_owned());
        Some(Self {
            conn: number("conn")?,
            peer: text("peer")?,
            target: text("target")?,
            relay: text("relay")?,
            to_service: number("to_service")?,
            to_client: number("to_client")?,
            duration_ms: number("duration_ms")?,
            reason: text("reason")?,
            cold_start_ms: number("cold_start_ms"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closing_line_is_taken_apart() {
        let line = "conn=3 peer=127.0.0.1:5 target=127.0.0.1:80 relay=splice to_service=12 to_client=9 \
                    duration_ms=7 reason=eof cold_start_ms=140";
        let closing = Closing::parse(line).expect("a closing line");
        assert_eq!((closing.conn, closing.to_service, closing.to_client), (3, 12, 9));
        assert_eq!((closing.reason.as_str(), closing.cold_start_ms), ("eof", Some(140)));
        assert_eq!(Closing::parse("bro: something else happened on conn=3"), None);
    }
}
