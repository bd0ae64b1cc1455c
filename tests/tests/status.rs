//! `bro status --watch` beside a running forwarder: what it prints changes with what happens, and whoever watches can stop.

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
        // Whoever starts the tests in the background of a shell has SIGINT ignored for them, and for all they start.
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
    // What a shell calls 130: whoever waits for it knows that it was interrupted.
    ensure!(status.signal() == Some(Signal::SIGINT as i32), "{status:?}: {complaints}");
    ensure!(complaints.is_empty(), "{complaints}");
    forwarder.stop().map(drop)
}

#[test]
fn watching_ends_quietly_when_nobody_reads_any_more() -> Result<()> {
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
