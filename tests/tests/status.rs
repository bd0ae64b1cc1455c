//! `bro status --watch` beside a running forwarder: what it prints changes with what happens, and its user can stop it.
//!
//! Needs: a network namespace. Takes: seconds.

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Forwarder;
use bro_tests::log::Log;
use bro_tests::peers::PATIENCE;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::{process, require_namespaces};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running `bro status --watch` of one forwarder. Dropping it kills it.
struct Watching(Child);

impl Watching {
    fn start(forwarder: &Forwarder, options: &[&str]) -> Result<Self> {
        let path = forwarder.status_socket();
        ensure!(process::eventually(PATIENCE, || path.exists()), "the forwarder has no socket");
        // A shell that starts the tests in the background has SIGINT ignored for them, and for all they start.
        let mut command = Command::new("env");
        command.arg("--default-signal=INT").arg(bro_tests::bro::binary());
        command.args(["status", "--watch"]).args(options).arg(path);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Self(command.spawn()?))
    }

    fn stdout(&mut self) -> Result<ChildStdout> {
        self.0.stdout.take().context("stdout is piped")
    }

    /// How it ended, and what it complained about.
    fn end(mut self) -> Result<(ExitStatus, String)> {
        ensure!(process::ends(self.0.id().cast_signed(), PATIENCE)?, "it goes on watching");
        let mut complaints = String::new();
        self.0.stderr.take().context("stderr is piped")?.read_to_string(&mut complaints)?;
        Ok((self.0.wait()?, complaints))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Waits for a line that holds `part`.
fn expect(log: &Log, part: &str) -> Result<()> {
    log.line(PATIENCE, |line| line.contains(part)).map(drop).with_context(|| format!("no “{part}” was shown"))
}

#[test]
fn watching_shows_what_changes_until_it_is_interrupted() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let forwarder = scene.start(&[])?;
    let mut watching = Watching::start(&forwarder, &[])?;
    let shown = Log::collect(watching.stdout()?);
    expect(&shown, "connections 0 open, 0 held, 0 accepted")?;
    let (client, served) = (scene.client()?, service.accept()?);
    expect_relayed(&client, &served)?;
    expect(&shown, "connections 1 open, 0 held, 1 accepted")?;
    drop((client, served));
    expect(&shown, "connections 0 open, 0 held, 1 accepted")?;
    // For a program that reads it, one after the other and nothing else.
    let lines = shown.lines();
    ensure!(!lines.iter().any(|line| line.contains('\x1b')), "escapes for no terminal: {lines:?}");
    ensure!(lines.iter().filter(|line| line.is_empty()).count() >= 2, "not one after the other: {lines:?}");

    kill(Pid::from_raw(watching.0.id().cast_signed()), Signal::SIGINT)?;
    let (status, complaints) = watching.end()?;
    // What a shell calls 130: its parent knows that it was interrupted.
    ensure!(status.signal() == Some(Signal::SIGINT as i32), "{status:?}: {complaints}");
    ensure!(complaints.is_empty(), "{complaints}");
    forwarder.stop().map(drop)
}

#[test]
fn watching_ends_quietly_when_its_reader_has_gone() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    for options in [&[][..], &["--json"]] {
        let mut watching = Watching::start(&forwarder, options)?;
        let mut shown = watching.stdout()?;
        ensure!(shown.read(&mut [0; 4096])? > 0, "nothing was shown");
        drop(shown);
        let (status, complaints) = watching.end()?;
        ensure!(status.code() == Some(0) && complaints.is_empty(), "{status:?}: {complaints}");
    }
    forwarder.stop().map(drop)
}

#[test]
fn each_refresh_in_json_is_a_document_of_its_own() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    let mut watching = Watching::start(&forwarder, &["--json"])?;
    let documents =
        serde_json::Deserializer::from_reader(watching.stdout()?).into_iter::<serde_json::Value>();
    for document in documents.take(2) {
        let document = document?;
        ensure!(document[0]["pid"] == forwarder.pid(), "{document}");
    }
    drop(watching);
    forwarder.stop().map(drop)
}

#[test]
fn watching_a_forwarder_that_leaves_ends_with_its_exit_code() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    let mut watching = Watching::start(&forwarder, &[])?;
    let shown = Log::collect(watching.stdout()?);
    expect(&shown, "connections 0 open")?;
    forwarder.stop()?;
    let (status, complaints) = watching.end()?;
    ensure!(status.code() == Some(4) && complaints.lines().count() == 1, "{status:?}: {complaints}");
    ensure!(complaints.starts_with("bro: no forwarder answers at "), "{complaints}");
    Ok(())
}

/// Where it is to listen for who asks is missing, a file, not writable, full, or too long a path: it serves, and says what is lost.
#[test]
fn a_runtime_directory_that_is_of_no_use_is_warned_of() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let file = scene.folder().join("file");
    std::fs::write(&file, "")?;
    let long = scene.folder().join("x".repeat(120));
    std::fs::create_dir(&long)?;
    let missing = scene.folder().join("missing");
    for (folder, why) in [
        (missing, "No such file or directory (os error 2)"),
        (file, "Not a directory (os error 20)"),
        ("/proc".into(), "(os error "),
        (long, "path must be shorter"),
    ] {
        let setup = scene.setup().env("RUNTIME_DIRECTORY", &folder).arg(scene.target());
        let forwarder = setup.start()?;
        let pair = (scene.client()?, service.accept().with_context(|| folder.display().to_string())?);
        expect_relayed(&pair.0, &pair.1)?;
        drop(pair);
        forwarder.closings(1)?;
        let told = forwarder.log().complaints();
        let path = folder.join("status.sock").display().to_string();
        ensure!(told.len() == 1, "not one line: {told:#?}");
        for part in [" WARN ", &path, why, "bro status cannot see this forwarder"] {
            ensure!(told[0].contains(part), "“{part}” is missing: {told:?}");
        }
        forwarder.stop()?;
    }
    Ok(())
}

/// A process that listens at a socket in the directory of forwarders answers everything that is asked with what it likes. Gone with the value.
struct Impostor {
    base: std::path::PathBuf,
    folder: bro_tests::scratch::Scratch,
    name: String,
}

impl Impostor {
    /// It claims to start NAME.service, and says this of it.
    fn start(said: &'static str) -> Result<Self> {
        use std::io::{BufRead as _, BufReader, Write as _};
        let folder = bro_tests::scratch::Scratch::new()?;
        let name = format!("impostor-{}-{}", std::process::id(), said.len());
        let roots = nix::unistd::geteuid().is_root();
        let base = if roots { "/run/bro".into() } else { folder.join("bro") };
        let base = base.join(&name);
        std::fs::create_dir_all(&base)?;
        let listener = std::os::unix::net::UnixListener::bind(base.join("status.sock"))?;
        let unit = format!("{name}.service");
        drop(std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).ok();
                let answer = match line.trim() {
                    "status" => serde_json::json!({
                        "pid": 7, "version": said, "unit": unit, "uptime_s": 1, "state": said, "listeners": [],
                        "activity": { "state": "awake", "since": 1, "woken_by": said },
                        "relay": { "name": "splice", "reason": said },
                        "total": {
                            "accepted": 0, "open": 0, "held": 0, "cold_starts": 0, "kernel": 0, "spliced": 0, "copied": 0,
                            "passes": 0, "grants": 0,
                        },
                    }),
                    _ => serde_json::json!({ "done": true, "message": said }),
                };
                stream.write_all(answer.to_string().as_bytes()).ok();
            }
        }));
        Ok(Self { base, folder, name })
    }

    fn bro(&self, words: &[&str]) -> Result<std::process::Output> {
        let mut command = Command::new(bro_tests::bro::binary());
        command.args(words).env("XDG_RUNTIME_DIR", self.folder.path());
        Ok(command.output()?)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.base).ok();
    }
}

/// Another user's forwarder answers root: nothing of that makes root's terminal do things, or looks like a line about another service.
#[test]
fn what_a_forwarder_says_is_shown_and_does_nothing() -> Result<()> {
    const SAID: &str = "stopped\nroot-db  awake\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}\u{7f}end";
    let impostor = Impostor::start(SAID)?;
    let name = impostor.name.as_str();
    for words in [
        &["wake", name][..],
        &["sleep", name],
        &["status"],
        &["status", name],
        &["status", name, "--json"],
        &["status", "--json"],
    ] {
        let ran = impostor.bro(words)?;
        let (shown, complaint) = (String::from_utf8(ran.stdout)?, String::from_utf8(ran.stderr)?);
        ensure!(ran.status.success() && complaint.is_empty(), "{words:?}: {shown}{complaint}");
        ensure!(shown.contains("end"), "{words:?} does not say it: {shown}");
        let acts = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        ensure!(!shown.contains(acts), "{words:?}: {shown:?}");
        ensure!(!shown.lines().any(|line| line.starts_with("root-db")), "{words:?}: {shown:?}");
    }
    Ok(())
}
