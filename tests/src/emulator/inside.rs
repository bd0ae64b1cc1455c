//! PID 1 of the emulated machine: mounts what `bro` expects of a host, runs it, and reports what came of it, one JSON document
//! a line, on the second serial port. The judging is left to the test outside.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::termios::{SetArg, cfmakeraw, tcdrain, tcgetattr, tcsetattr};
use serde_json::{Value, json};

use crate::adopt::{Adoption, Profile};
use crate::forwarder::Forwarder;
use crate::netns::Namespace;
use crate::pattern::Pattern;
use crate::peers::{Conn, End, PATIENCE};
use crate::process;
use crate::scene::{Scene, talk};

/// Where things lie inside: as in a target folder.
pub const BRO: &str = "/bro/bro";
/// The program around this module.
pub const INIT: &str = "/bro/deps/emulated";
/// The folder of the suites.
pub const SUITES: &str = "/bro/deps";

/// What each connection carries, both ways at once.
pub const BYTES: u64 = 4 * 1024 * 1024;
/// Connections of one forwarder, one after another: the first teaches it what kind of sockets the service uses.
pub const CONNECTIONS: usize = 2;

/// The environment's word for the modules of this kernel, in `/`, with commas between them.
pub const MODULES: &str = "MODULES";

/// Where the service listens whose socket is adopted.
const ADOPTED: &str = "127.0.0.1:8080";

/// For a program that ends by itself.
const SHORT: Duration = Duration::from_secs(40);
/// For a whole suite.
const LONG: Duration = Duration::from_secs(200);
/// Those of its tests that repeat something often enough to take minutes here. Once is enough to know a kernel by.
const OFTEN: [&str; 4] = ["both_ways_over_both_lanes", "open_and_shut", "thousands_of", "round_trips"];

/// The word by which PID 1 starts itself once more, to do everything.
pub const EVERYTHING: &str = "everything";

/// What an init does: it has everything done, waits for all that are left to it, and ends the machine. Before Linux 6.11 a filter is in use for
/// as long as a process under it has not been waited for, and so a container whose processes are left to init has not ended.
pub fn main() {
    let ended = Command::new(INIT).arg(EVERYTHING).spawn().map_err(anyhow::Error::from).and_then(|child| {
        let child = nix::unistd::Pid::from_raw(child.id().cast_signed());
        while nix::sys::wait::wait()?.pid() != Some(child) {}
        Ok(())
    });
    if let Err(error) = ended {
        println!("emulated: {error:#}");
    }
    // qemu runs with -no-reboot: this ends it.
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    panic!("the machine does not end: {error}");
}

/// Everything.
pub fn everything() {
    if let Err(error) = set_up().and_then(|mut port| port.everything()) {
        // To the console, which the test outside shows.
        println!("emulated: {error:#}");
    }
}

fn set_up() -> Result<Port> {
    let file_systems = [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
    ];
    for (kind, at) in file_systems {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting {at}"))?;
    }
    crate::sys::loopback_up().context("bringing up lo")?;
    for module in std::env::var(MODULES)?.split(',') {
        let file = File::open(Path::new("/").join(module))?;
        crate::sys::load_module(file.as_fd()).with_context(|| format!("loading {module}"))?;
    }
    Port::open()
}

/// The second serial port.
struct Port(File);

impl Port {
    fn open() -> Result<Self> {
        let port =
            File::options().read(true).write(true).open("/dev/ttyS1").context("the second serial port")?;
        let mut settings = tcgetattr(&port)?;
        cfmakeraw(&mut settings);
        tcsetattr(&port, SetArg::TCSANOW, &settings)?;
        Ok(Self(port))
    }

    /// Reports `facts`, an object, as those of `step`.
    fn report(&mut self, step: &str, facts: Result<Value>) -> Result<()> {
        let mut facts = facts.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        facts["step"] = step.into();
        writeln!(self.0, "{facts}")?;
        Ok(tcdrain(self.0.as_fd())?)
    }

    fn everything(&mut self) -> Result<()> {
        self.report("up", Ok(json!({})))?;
        let doctor = doctor();
        let fit = doctor.as_ref().is_ok_and(|facts| {
            facts["kernel relay"]["finding"].as_str().is_some_and(|said| said.starts_with("loaded"))
        });
        self.report("doctor", doctor)?;
        self.report("auto", relay(&["--relay=auto"]))?;
        self.report("sockmap", relay(&["--relay=sockmap", "--local-clients=on"]))?;
        self.report("adopt", adopt())?;
        self.report(super::VSOCK, suite(super::VSOCK))?;
        // On another kernel every one of their tests would say the same.
        if fit {
            for name in super::SUITES {
                self.report(name, suite(name))?;
            }
        }
        self.report("end", Ok(json!({})))
    }
}

/// `bro doctor`, its checks by name.
fn doctor() -> Result<Value> {
    let checks: Value = serde_json::from_str(&run(Command::new(BRO).args(["doctor", "--json"]), SHORT)?.1)?;
    let checks = checks.as_array().context("a list of checks")?;
    let named = checks.iter().map(|check| {
        let name = check["name"].as_str().context("a check has a name")?;
        Ok((name.to_owned(), check.clone()))
    });
    Ok(Value::Object(named.collect::<Result<_>>()?))
}

/// A suite: whether it passed, and what it printed.
fn suite(name: &str) -> Result<Value> {
    let mut command = Command::new(Path::new(SUITES).join(name));
    command.arg("--test-threads=2").env("BRO_FEW", "1").args(OFTEN.iter().flat_map(|test| ["--skip", test]));
    let skips = Path::new("/tmp/skips");
    std::fs::write(skips, "")?;
    let begin = Instant::now();
    let (passed, output) = run(command.env("BRO_SKIPS", skips), LONG)?;
    let (skips, seconds) = (std::fs::read_to_string(skips)?, begin.elapsed().as_secs());
    Ok(json!({ "passed": passed, "output": output, "skips": skips, "seconds": seconds }))
}

/// Whether `command` ended well, and its standard output (the other one is the console).
fn run(command: &mut Command, within: Duration) -> Result<(bool, String)> {
    // A file, not a pipe: the reader of a pipe waits to its end, which is later than the command's.
    let path = Path::new("/tmp/output");
    let mut child = command.stdin(Stdio::null()).stdout(File::create(path)?).spawn()?;
    let ended = process::ends(child.id().cast_signed(), within)?;
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    let output = String::from_utf8_lossy(&std::fs::read(path)?).into_owned();
    ensure!(ended, "{command:?} did not end within {within:?}; it printed:\n{output}");
    Ok((status.success(), output))
}

/// A forwarder between a client here and a service in a network namespace of its own: what it says of its relay, what its
/// connections were relayed by, and its status.
fn relay(options: &[&str]) -> Result<Value> {
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    // It listens already.
    let mut forwarder = scene.start(&[&["--ready=none"], options].concat())?;
    let verdicts =
        ["kernel relay loaded and tested", "without the kernel relay", "--relay=sockmap cannot be had"];
    let verdict =
        forwarder.log().line(PATIENCE, |line| verdicts.iter().any(|verdict| line.contains(verdict)))?;
    if verdict.contains(verdicts[2]) {
        let status = forwarder.wait(PATIENCE)?.context("it goes on without the relay")?;
        return Ok(json!({ "verdict": verdict, "exit": status.code() }));
    }
    for seed in 0..CONNECTIONS as u64 {
        let client = scene.client()?;
        let service = service.accept()?;
        exchange(&client, &service, seed).with_context(|| format!("connection {}", seed + 1))?;
    }
    let closings = forwarder.closings(CONNECTIONS)?;
    let status = status(&forwarder)?;
    let connections: Vec<Value> = closings
        .iter()
        .map(|closing| {
            json!({ "relay": closing.relay, "reason": closing.reason, "to_service": closing.to_service,
                "to_client": closing.to_client })
        })
        .collect();
    forwarder.stop()?;
    Ok(
        json!({ "verdict": verdict, "connections": connections, "relay": status["relay"], "total": status["total"] }),
    )
}

/// A service that has the forwarder's own socket: whom it saw, and what the forwarder says of that. It is started first.
fn adopt() -> Result<Value> {
    let host = TcpListener::bind("127.0.0.1:0")?;
    let adoption = Adoption::new(vec![(host.try_clone()?.into(), ADOPTED.into())])?;
    let namespace = Namespace::new()?;
    let forwarder = adoption.forwarder(&namespace)?.start()?;
    forwarder.log().line(PATIENCE, |line| line.contains("listening"))?;
    let service = adoption.service_in(&namespace, Profile::Notifies, &["epoll", ADOPTED])?;
    service.says("ready")?;
    let mut seen = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut client = TcpStream::connect(host.local_addr()?)?;
        client.set_read_timeout(Some(PATIENCE))?;
        let mut told = String::new();
        if let Err(error) = client.read_to_string(&mut told) {
            told = error.to_string();
        }
        seen.push(json!({ "own": client.local_addr()?.to_string(), "told": told }));
    }
    // The forwarder hears of it after the service does.
    let decided = |listener: &Value| listener["adoption"]["state"] != "waiting";
    let mut report = Value::Null;
    process::eventually(PATIENCE, || {
        report = status(&forwarder).unwrap_or_default();
        decided(&report["listeners"][0])
    });
    let log = forwarder.log().lines();
    let facts = json!({ "seen": seen, "adoption": report["listeners"][0]["adoption"], "accepted": report["total"]["accepted"],
        "said": log });
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(service.pid()), nix::sys::signal::Signal::SIGKILL)?;
    service.wait()?;
    forwarder.stop()?;
    Ok(facts)
}

fn status(forwarder: &Forwarder) -> Result<Value> {
    let (well, output) =
        run(Command::new(BRO).args(["status", "--json"]).arg(forwarder.status_socket()), SHORT)?;
    ensure!(well, "bro status failed");
    let reports: Value = serde_json::from_str(&output)?;
    let ours = reports.as_array().and_then(|all| all.iter().find(|one| one["pid"] == forwarder.pid()));
    ours.cloned().with_context(|| format!("bro status does not know the forwarder: {output}"))
}

/// So often the two ask and answer before they stream: connections that do have their lanes.
pub const TALKS: u64 = 10;

/// Questions and answers, then [`BYTES`] both ways at once, then an end each way; every byte compared.
fn exchange(client: &Conn, service: &Conn, seed: u64) -> Result<()> {
    (0..TALKS).try_for_each(|_| talk(client, service))?;
    let (up, down) = (Pattern(2 * seed), Pattern(2 * seed + 1));
    let send = |conn: &Conn, pattern| -> Result<()> {
        conn.pour(pattern, 0, BYTES)?;
        Ok(conn.close_writing()?)
    };
    let receive = |conn: &Conn, pattern| -> Result<()> {
        let ended = conn.drink_to_end(pattern, 0)?;
        ensure!(ended == (BYTES, End::Eof), "it ended with {ended:?} instead of {BYTES} bytes and an end");
        Ok(())
    };
    std::thread::scope(|scope| {
        let all = [
            scope.spawn(|| send(client, up).context("the client sends")),
            scope.spawn(|| send(service, down).context("the service sends")),
            scope.spawn(|| receive(service, up).context("the service receives")),
            scope.spawn(|| receive(client, down).context("the client receives")),
        ];
        all.into_iter().try_for_each(|one| one.join().expect("no end panics"))
    })
}
