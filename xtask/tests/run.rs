//! `cargo xtask run` itself: it shows the main job, with a relay and by adoption, ends by itself and leaves nothing behind, even when it is killed.
//!
//! Needs: user namespaces; root and kernel BTF for one test. Takes: seconds.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use bro_tests::require;
use bro_tests::tier::Need;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(60);

fn task(args: &[&str]) -> Command {
    let mut task = Command::new(env!("CARGO_BIN_EXE_xtask"));
    task.arg("run").args(args).env("BRO_BIN", bro_tests::bro::binary()).stdin(Stdio::null());
    task
}

/// What the whole task says.
fn said() -> String {
    let output = task(&[]).output().expect("the task runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complaint}");
    said
}

/// The line of the table for this relay, which has figures.
fn row<'a>(said: &'a str, label: &str) -> &'a str {
    let row = said.lines().find(|line| line.starts_with(label) && line.contains("GiB/s"));
    row.unwrap_or_else(|| panic!("no figures for `{label}` in:\n{said}"))
}

#[test]
fn shows_a_cold_start_and_every_relay_and_ends() {
    require!(Need::UserNamespaces);
    let said = said();
    for wanted in ["cold start", "200 OK", "relay       splice"] {
        assert!(said.contains(wanted), "no `{wanted}` in:\n{said}");
    }
    expect_adoption(&said);
    for label in ["direct, both inside", "bro, splice", "bro, copy"] {
        assert!(!row(&said, label).contains("kernel"), "{said}");
    }
}

/// A service with systemd's own socket: its cold start, whom it saw, and its figures.
fn expect_adoption(said: &str) {
    let line = said.lines().position(|line| line.starts_with("adoption    "));
    let line = line.unwrap_or_else(|| panic!("no word of adoption in:\n{said}"));
    let told: Vec<&str> = said.lines().skip(line).take(2).collect();
    assert!(told[0].contains(" ms for the first client"), "{said}");
    assert!(told[1].contains("127.0.0.1:") && told[1].ends_with("the client's own address"), "{said}");
    assert!(row(said, "bro, adopted").contains("none by bro"), "{said}");
}

#[test]
fn shows_the_kernel_relay_at_work() {
    require!(Need::Bpf);
    let said = said();
    for label in ["bro, sockmap  ", "bro, sockmap both ways"] {
        assert!(row(&said, label).contains("% kernel"), "no byte took the kernel lane:\n{said}");
    }
}

#[test]
fn keep_answers_a_second_client_and_ends_on_an_interrupt() {
    require!(Need::UserNamespaces);
    let mut kept = Kept::start();
    kept.get_the_page();
    kept.signal(Signal::SIGINT);
    assert!(kept.child.wait().expect("a status").success());
    kept.assert_nothing_is_left();
}

#[test]
fn kill_leaves_nothing_behind() {
    require!(Need::UserNamespaces);
    let mut kept = Kept::start();
    kept.get_the_page();
    kept.signal(Signal::SIGKILL);
    kept.child.wait().expect("a status");
    kept.assert_nothing_is_left();
}

/// A `cargo xtask run --keep` that is up.
struct Kept {
    child: Child,
    address: String,
    /// Every process below it, after a client was served.
    family: Vec<i32>,
    /// The runtime directories of those that are bro.
    runtime: Vec<PathBuf>,
}

impl Kept {
    fn start() -> Self {
        let mut child = task(&["--keep"]).stdout(Stdio::piped()).spawn().expect("the task runs");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).for_each(|line| {
                sender.send(line).ok();
            });
        });
        let deadline = Instant::now() + LIMIT;
        let address = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = lines.recv_timeout(left).expect("the task comes up");
            if let Some(rest) = line.strip_prefix("Up until Ctrl-C. Open http://") {
                break rest.split('/').next().expect("an address").to_owned();
            }
        };
        Self { child, address, family: Vec::new(), runtime: Vec::new() }
    }

    /// Wakes whatever slept: afterwards container, service and bro run.
    fn get_the_page(&mut self) {
        let mut stream = TcpStream::connect(&self.address).expect("the socket is open");
        stream.set_read_timeout(Some(LIMIT)).expect("a limit");
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.contains("It woke up."), "{answer}");
        descendants(self.child.id() as i32, &mut self.family);
        let is_bro = |pid: &&i32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "bro")
        };
        let directory = |pid: &i32| Path::new("/run/bro").join(pid.to_string());
        self.runtime = self.family.iter().filter(is_bro).map(directory).collect();
        assert!(!self.runtime.is_empty(), "bro runs: {:?}", self.family);
        assert!(self.family.len() >= 3, "container, service and bro run: {:?}", self.family);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("the task is there");
    }

    fn assert_nothing_is_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let alive = |pid: &&i32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // A zombie is gone: what holds it is the process that reaps here.
            !stat.is_empty() && !stat.contains(") Z ") && !stat.contains(") X ")
        };
        while self.family.iter().any(|pid| alive(&pid)) {
            let left: Vec<_> = self.family.iter().filter(alive).collect();
            assert!(Instant::now() < deadline, "left behind: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(TcpStream::connect(&self.address).is_err(), "the socket is still open");
        for directory in &self.runtime {
            assert!(!directory.exists(), "{} is still there", directory.display());
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn descendants(pid: i32, found: &mut Vec<i32>) {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
        found.push(child);
        descendants(child, found);
    }
}
