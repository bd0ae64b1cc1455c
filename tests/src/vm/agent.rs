//! Doing things in the machine: requests to `tests/vm/agent.py`, and their answers.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::host::Ran;

/// No command takes longer, nor does a client wait longer; the agent itself gives up then.
const SECONDS: u64 = 120;
/// What the agent needs besides to say so.
const GRACE: Duration = Duration::from_secs(30);

/// For each request's number, who waits for its answer; nothing once the machine has ended.
type Waiting = Option<HashMap<u64, Sender<Value>>>;

/// One user's session in the machine. Several threads may ask at once.
#[derive(Debug)]
pub struct Agent {
    port: Mutex<UnixStream>,
    /// For each request under way, who waits for its answer; nothing once the machine has ended.
    waiting: Arc<Mutex<Waiting>>,
    boots: Mutex<Receiver<String>>,
    number: AtomicU64,
    /// It has not answered in time: it is not asked again, so that each of the cases left does not wait as long.
    silent: AtomicBool,
    scope: &'static str,
}

impl Agent {
    /// `scope` is the service manager of its user: `system` or `user`.
    pub(super) fn new(port: UnixStream, scope: &'static str) -> Result<Self> {
        let (boot, boots) = channel();
        let waiting = Arc::new(Mutex::new(Some(HashMap::<u64, Sender<Value>>::new())));
        let (lines, answered) = (BufReader::new(port.try_clone()?), Arc::clone(&waiting));
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                // What a reboot has cut short is no message.
                let Ok(message) = serde_json::from_str::<Value>(&line) else { continue };
                if let Some(id) = message["boot"].as_str() {
                    boot.send(id.to_owned()).ok();
                } else if let Some(id) = message["id"].as_u64() {
                    let mut waiting = answered.lock().unwrap_or_else(PoisonError::into_inner);
                    let sender = waiting.as_mut().and_then(|waiting| waiting.remove(&id));
                    sender.and_then(|sender| sender.send(message).ok());
                }
            }
            // This ends all waits.
            *answered.lock().unwrap_or_else(PoisonError::into_inner) = None;
        });
        Ok(Self {
            port: Mutex::new(port),
            waiting,
            boots: Mutex::new(boots),
            number: AtomicU64::new(0),
            silent: AtomicBool::new(false),
            scope,
        })
    }

    /// Waits for the agent's first words of a boot.
    pub(super) fn await_boot(&self, limit: Duration) -> Result<()> {
        let boots = self.boots.lock().unwrap_or_else(PoisonError::into_inner);
        match boots.recv_timeout(limit) {
            Ok(_) => Ok(()),
            Err(RecvTimeoutError::Timeout) => bail!("the machine did not boot within {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine has ended"),
        }
    }

    fn ask(&self, mut request: Value) -> Result<Value> {
        ensure!(!self.silent.load(Ordering::Relaxed), "the machine does not answer any more");
        let id = self.number.fetch_add(1, Ordering::Relaxed);
        request["id"] = id.into();
        let (sender, answer) = channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut().context("the machine has ended")?.insert(id, sender);
        drop(waiting);
        writeln!(self.port.lock().unwrap_or_else(PoisonError::into_inner), "{request}")
            .context("cannot ask the machine")?;
        let limit = Duration::from_secs(SECONDS) + GRACE;
        let answer = match answer.recv_timeout(limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => bail!("the machine has ended"),
            Err(RecvTimeoutError::Timeout) => {
                self.silent.store(true, Ordering::Relaxed);
                bail!("the machine did not answer within {limit:?}: {request}");
            }
        };
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }

    /// Runs a command, whatever its exit code.
    pub fn try_run(&self, args: &[&str]) -> Result<Ran> {
        let answer = self.ask(json!({ "run": args, "seconds": SECONDS }))?;
        let text = |field: &str| answer[field].as_str().unwrap_or_default().to_owned();
        let code = answer["code"].as_i64().and_then(|code| i32::try_from(code).ok());
        Ok(Ran {
            code: code.context("an answer without an exit code")?,
            stdout: text("stdout"),
            stderr: text("stderr"),
        })
    }

    /// Runs a command that has to succeed; its output, without the last newline.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let ran = self.try_run(args)?;
        ensure!(
            ran.success(),
            "`{}` exited with {} in the machine: {}{}",
            args.join(" "),
            ran.code,
            ran.stdout,
            ran.stderr.trim()
        );
        Ok(ran.stdout.trim_end_matches('\n').into())
    }

    /// Runs a shell script that has to succeed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-euc", script])
    }

    /// systemctl of this user's manager, whatever its exit code.
    pub fn try_systemctl(&self, args: &[&str]) -> Result<Ran> {
        self.try_run(&[&["systemctl", &format!("--{}", self.scope)], args].concat())
    }

    /// systemctl of this user's manager.
    pub fn systemctl(&self, args: &[&str]) -> Result<String> {
        self.run(&[&["systemctl", &format!("--{}", self.scope)], args].concat())
    }

    /// One property of a unit of this user's manager.
    pub fn show(&self, unit: &str, property: &str) -> Result<String> {
        self.systemctl(&["show", "--value", "--property", property, unit])
    }

    /// This user's units that have failed.
    pub fn failed_units(&self) -> Result<String> {
        self.systemctl(&["--failed", "--no-legend", "--plain"])
    }

    /// What a unit of this user's manager has logged in this boot.
    pub fn journal(&self, unit: &str) -> Result<String> {
        let unit =
            if self.scope == "user" { format!("--user-unit={unit}") } else { format!("--unit={unit}") };
        self.run(&["journalctl", "--boot", "--no-pager", "--output=cat", &unit])
    }

    /// Asks again and again, for up to `limit`, until `done` is true.
    pub fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !done()? {
            ensure!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
            // A command takes a good part of a second there.
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// A client of 127.0.0.1:`port`.
    pub fn client(&self, port: u16) -> Result<Client<'_>> {
        let answer = self.ask(json!({ "connect": port }))?;
        let number = answer["client"].as_u64().context("an answer without a client")?;
        Ok(Client { agent: self, number })
    }

    /// A client of 127.0.0.1:`port` that sends this many bytes and ends, and has all of them back.
    pub fn echo(&self, port: u16, bytes: usize) -> Result<()> {
        self.ask(json!({ "echo": port, "bytes": bytes })).map(drop)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Ends the thread that reads.
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        port.shutdown(Shutdown::Both).ok();
    }
}

/// A connected client in the machine; dropping it closes it.
#[derive(Debug)]
pub struct Client<'a> {
    agent: &'a Agent,
    number: u64,
}

impl Client<'_> {
    /// Sends `text`.
    pub fn send(&self, text: &str) -> Result<()> {
        self.agent.ask(json!({ "send": self.number, "text": text, "end": false })).map(drop)
    }

    /// Half-closes.
    pub fn end(&self) -> Result<()> {
        self.agent.ask(json!({ "send": self.number, "text": "", "end": true })).map(drop)
    }

    /// What comes, up to so many bytes.
    pub fn receive(&self, bytes: usize) -> Result<String> {
        self.text(json!({ "receive": self.number, "bytes": bytes }))
    }

    /// What comes, to the end.
    pub fn receive_all(&self) -> Result<String> {
        self.text(json!({ "receive": self.number }))
    }

    /// Sends `text` and has it back from a service that echoes.
    pub fn expect_echo(&self, text: &str) -> Result<()> {
        self.send(text)?;
        let back = self.receive(text.len())?;
        ensure!(back == text, "{text:?} was sent, {back:?} came back");
        Ok(())
    }

    fn text(&self, request: Value) -> Result<String> {
        let answer = self.agent.ask(request)?;
        Ok(answer["text"].as_str().context("an answer without a text")?.to_owned())
    }
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        self.agent.ask(json!({ "close": self.number })).ok();
    }
}
