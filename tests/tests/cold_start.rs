//! Clients that come before the service listens: held in order, connected the moment it listens, forgotten when they leave,
//! reset when it takes too long; and the namespace that is another one the next time.
//!
//! Needs: a network namespace; root for one test. Takes: seconds.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::{Namespace, Pinned};
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Address, Bound, Conn, Family, Here, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::tier::Need;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MOMENT: Duration = Duration::from_millis(300);

#[test]
fn held_clients_are_connected_in_order() -> Result<()> {
    require_namespaces!();
    for family in [Family::Tcp4, Family::Tcp6, Family::Unix] {
        let mut scene = Scene::of(family)?;
        let forwarder = scene.start(&[])?;
        let mut clients = Vec::new();
        for number in 0..8_u8 {
            let client = scene.client()?;
            client.send(&[number])?;
            clients.push(client);
        }
        scene.expect_held(&forwarder, 8)?;
        forwarder.expect_no_spin(MOMENT).context("while clients are held")?;
        let service = scene.serve()?;
        for (number, client) in (0..).zip(&clients) {
            let served = service.accept()?;
            let mut came = [0xff];
            served.recv_exact(&mut came)?;
            ensure!(came[0] == number, "{family:?}: client {} came in place {number}", came[0]);
            served.send(&came)?;
            client.recv_exact(&mut came)?;
        }
        drop(clients);
        let closings = forwarder.closings(8)?;
        let woke: Vec<_> = closings.iter().filter(|closing| closing.cold_start_ms.is_some()).collect();
        ensure!(woke.len() == 1 && woke[0].conn == 1, "one client woke the service: {closings:?}");
        ensure!(woke[0].cold_start_ms >= Some(300), "{woke:?}");
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn what_held_clients_have_sent_arrives_even_if_they_have_half_closed() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    let client = scene.client()?;
    client.pour(Pattern(1), 0, 50_000)?;
    client.close_writing()?;
    scene.expect_held(&forwarder, 1)?;
    // Sending the request and then listening is not leaving.
    forwarder.expect_no_spin(MOMENT).context("with a half-closed client held")?;
    ensure!(client.stays_silent(Duration::ZERO)?, "a half-closed client was ended");
    let service = scene.serve()?.accept()?;
    service.drink(Pattern(1), 0, 50_000)?;
    service.expect_eof()?;
    service.pour(Pattern(2), 0, 50_000)?;
    drop(service);
    client.drink(Pattern(2), 0, 50_000)?;
    client.expect_eof()?;
    ensure!(forwarder.closing()?.reason == "eof", "{:?}", forwarder.closing());
    forwarder.stop().map(drop)
}

/// Fire and forget: a client that sends and closes for good before the service is there has still sent.
#[test]
fn what_a_client_has_sent_before_it_closed_arrives() -> Result<()> {
    require_namespaces!();
    for (front, back) in
        [(Family::Tcp4, Family::Tcp4), (Family::Unix, Family::Unix), (Family::Unix, Family::Tcp4)]
    {
        let mut scene = Scene::between(Namespace::new()?, front, back)?;
        let forwarder = scene.start(&[])?;
        let client = scene.client()?;
        client.pour(Pattern(1), 0, 50_000)?;
        drop(client);
        // Long enough for a forwarder to notice that it has closed.
        std::thread::sleep(MOMENT);
        let service = scene.serve()?.accept().with_context(|| format!("{front:?} to {back:?}"))?;
        service.drink(Pattern(1), 0, 50_000).with_context(|| format!("{front:?} to {back:?}"))?;
        service.expect_eof()?;
        drop(service);
        ensure!(forwarder.closing()?.reason == "eof", "{:?}", forwarder.closing());
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn a_held_client_that_aborts_is_forgotten() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    let (leaves, stays) = (scene.client()?, scene.client()?);
    leaves.send(b"bye")?;
    stays.send(b"stay")?;
    scene.expect_held(&forwarder, 2)?;
    leaves.abort()?;
    let closing = forwarder.closing()?;
    ensure!(closing.reason == "client-left", "{closing:?}");
    scene.expect_held(&forwarder, 1)?;
    let service = scene.serve()?;
    let served = service.accept()?;
    let mut came = [0; 4];
    served.recv_exact(&mut came)?;
    ensure!(&came == b"stay", "the service was given a client that had left");
    ensure!(service.try_accept(MOMENT)?.is_none(), "one client, two connections");
    drop((stays, served));
    forwarder.closings(2)?;
    forwarder.stop().map(drop)
}

/// The service takes its time to listen; from that moment to the first client's connection it is milliseconds.
#[test]
fn the_first_client_is_connected_milliseconds_after_the_service_listens() -> Result<()> {
    require_namespaces!();
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let mut scene = Scene::new()?;
        let forwarder = scene.start(&[])?;
        let client = scene.client()?;
        scene.expect_held(&forwarder, 1)?;
        std::thread::sleep(Duration::from_millis(100));
        let service = scene.serve()?;
        let listening = Instant::now();
        let served = service.accept()?;
        best = best.min(listening.elapsed());
        expect_relayed(&client, &served)?;
        // The table of listeners has answered: the service sees the client's connection and no other.
        ensure!(service.try_accept(Duration::from_millis(50))?.is_none(), "the service was probed");
    }
    // The best of five: what the machine's other work delays is not the forwarder's.
    ensure!(best < Duration::from_millis(20), "at best {best:?}");
    Ok(())
}

#[test]
fn any_address_that_covers_the_target_counts_as_listening() -> Result<()> {
    require_namespaces!();
    for (bound, target) in
        [("0.0.0.0:0", "127.0.0.1"), ("[::]:0", "127.0.0.1"), ("[::]:0", "[::1]"), ("0.0.0.0:0", "localhost")]
    {
        let mut scene = Scene::new()?;
        let bound = Bound::new(&scene.namespace, &Address::Tcp(bound.parse()?))?;
        let port = bound.address().port().context("a TCP address")?;
        let forwarder = scene.setup().arg(format!("{target}:{port}")).start()?;
        let client = scene.client()?;
        client.send(b"ping")?;
        scene.expect_held(&forwarder, 1)?;
        // Another port's listener is not the service.
        let _other = scene.serve()?;
        ensure!(client.stays_silent(Duration::from_millis(100))?, "{target}: ended early");
        let service = bound.listen()?;
        let served =
            service.accept().with_context(|| format!("{target} with a listener on {}", service.address()))?;
        served.recv_exact(&mut [0; 4])?;
        drop((client, served));
        forwarder.closings(1)?;
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn ready_connect_tries_a_connection_of_its_own() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&["--ready=connect"])?;
    let client = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    let service = scene.serve()?;
    let probe = service.accept()?;
    let (bytes, _) = probe.read_to_end()?;
    ensure!(bytes.is_empty(), "the probe has sent {bytes:?}");
    let served = service.accept()?;
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.stop().map(drop)
}

#[test]
fn ready_exec_waits_for_the_command() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let flag = scene.folder().join("flag");
    // The service has listened all along: only the command decides.
    let service = scene.serve()?;
    let ready = format!("--ready=exec:test -e {} && echo noise && echo noise >&2", flag.display());
    let forwarder = scene.start(&[&ready])?;
    let client = scene.client()?;
    ensure!(service.try_accept(MOMENT * 2)?.is_none(), "connected before the command said so");
    std::fs::write(&flag, "")?;
    let begin = Instant::now();
    let served = service.accept()?;
    ensure!(begin.elapsed() < Duration::from_secs(2), "connected {:?} after", begin.elapsed());
    expect_relayed(&client, &served)?;
    let others: Vec<_> = process::members(forwarder.pid())
        .into_iter()
        .filter(|pid| process::name(*pid).is_some_and(|name| name == "sh" || name == "test"))
        .collect();
    ensure!(others.is_empty(), "commands are left: {others:?}");
    drop((client, served));
    let log = forwarder.stop()?;
    ensure!(!log.lines().iter().any(|line| line == "noise"), "the command's output is in the log");
    Ok(())
}

#[test]
fn ready_none_connects_at_once_and_a_refusal_is_a_reset() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&["--ready=none"])?;
    let begin = Instant::now();
    scene.client()?.expect_abort()?;
    ensure!(begin.elapsed() < Duration::from_secs(2), "reset only after {:?}", begin.elapsed());
    ensure!(forwarder.closing()?.reason == "refused", "{:?}", forwarder.closing());
    ensure!(forwarder.is_running()?, "it has ended");
    let service = scene.serve()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    drop(pair);
    forwarder.closings(2)?;
    forwarder.stop().map(drop)
}

#[test]
fn a_start_that_takes_too_long_resets_and_the_next_client_tries_again() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let mut forwarder = scene.start(&["--start-timeout=700ms"])?;
    let begin = Instant::now();
    let clients = [scene.client()?, scene.client()?, scene.client()?];
    for client in clients {
        client.expect_abort()?;
    }
    let waited = begin.elapsed();
    ensure!((700..3000).contains(&waited.as_millis()), "reset after {waited:?}");
    let closings = forwarder.closings(3)?;
    ensure!(closings.iter().all(|closing| closing.reason == "start-timeout"), "{closings:?}");
    ensure!(closings.iter().all(|closing| closing.to_service + closing.to_client == 0), "{closings:?}");
    let told = forwarder.log().complaints();
    ensure!(told.len() == 1 && told[0].contains(&scene.target()), "want one clear line: {told:#?}");
    ensure!(forwarder.is_running()?, "it has ended");

    let again = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    let service = scene.serve()?.accept()?;
    expect_relayed(&again, &service)?;
    drop((again, service));
    let closings = forwarder.closings(4)?;
    ensure!(closings[3].cold_start_ms.is_some(), "the one that woke it: {closings:?}");
    forwarder.stop().map(drop)
}

/// A service that stops listening and comes back: clients in between wait as the first one did.
#[test]
fn a_service_that_restarts_finds_its_clients_waiting() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let service = Listener::new(&scene.namespace, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let address = service.address().clone();
    let forwarder = scene.setup().arg(address.to_string()).start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    drop((pair, service));
    let client = scene.client()?;
    client.send(b"ping")?;
    ensure!(client.stays_silent(MOMENT)?, "reset although the service is only restarting");
    let service = Listener::new(&scene.namespace, &address)?;
    let served = service.accept()?;
    served.recv_exact(&mut [0; 4])?;
    drop((client, served));
    forwarder.closings(2)?;
    forwarder.stop().map(drop)
}

/// The file that `--netns` names leads to another namespace after the container's restart.
fn follows_the_file(
    scene: &Scene,
    forwarder: &Forwarder,
    swap: impl FnOnce() -> Result<Namespace>,
) -> Result<()> {
    let target = Address::Tcp(scene.target().parse()?);
    let old = Listener::new(&scene.namespace, &target)?;
    let first = (scene.client()?, old.accept()?);
    expect_relayed(&first.0, &first.1)?;
    let fresh = swap()?;
    let client = scene.client()?;
    client.send(b"ping")?;
    // Neither the old namespace's service, which is still there, nor a reset, though the new one is not up yet.
    ensure!(old.try_accept(MOMENT)?.is_none(), "the dead namespace got the connection");
    ensure!(client.stays_silent(Duration::ZERO)?, "ended instead of held");
    let new = Listener::new(&fresh, &target)?;
    let served = new.accept().context("in the new namespace")?;
    served.recv_exact(&mut [0; 4])?;
    served.send(b"pong")?;
    client.recv_exact(&mut [0; 4])?;
    expect_relayed(&first.0, &first.1).context("a connection from before goes on")?;
    drop((first, client, served));
    forwarder.closings(2).map(drop)
}

/// A scene whose target's port is known but free in every namespace.
fn scene_with_free_port() -> Result<Scene> {
    let mut scene = Scene::new()?;
    drop(scene.serve()?);
    Ok(scene)
}

#[test]
fn a_namespace_made_anew_at_the_same_path_gets_the_next_connection() -> Result<()> {
    require_namespaces!();
    let scene = scene_with_free_port()?;
    let path = scene.folder().join("ns");
    std::os::unix::fs::symlink(scene.namespace.path(), &path)?;
    let setup = Setup::new().socket(&scene.front).arg("--netns").arg(&path).arg(scene.target());
    let forwarder = setup.start()?;
    follows_the_file(&scene, &forwarder, || {
        let fresh = Namespace::new()?;
        let next = scene.folder().join("next");
        std::os::unix::fs::symlink(fresh.path(), &next)?;
        std::fs::rename(&next, &path)?;
        Ok(fresh)
    })?;
    forwarder.stop().map(drop)
}

#[test]
fn a_namespace_pinned_anew_at_the_same_path_gets_the_next_connection() -> Result<()> {
    if !bro_tests::tier::met("a_namespace_pinned_anew", &[Need::Root]) {
        return Ok(());
    }
    let scene = scene_with_free_port()?;
    let path = scene.folder().join("ns");
    let pinned = Pinned::new(&scene.namespace, path.clone())?;
    let setup = Setup::new().socket(&scene.front).arg("--netns").arg(&path).arg(scene.target());
    let forwarder = setup.start()?;
    let mut next = None;
    follows_the_file(&scene, &forwarder, || {
        drop(pinned);
        let fresh = Namespace::new()?;
        next = Some(Pinned::new(&fresh, path.clone())?);
        Ok(fresh)
    })?;
    forwarder.stop()?;
    drop(next);
    Ok(())
}

#[test]
fn a_path_that_is_gone_resets_the_client_and_works_again_when_it_is_back() -> Result<()> {
    require_namespaces!();
    let scene = scene_with_free_port()?;
    let path = scene.folder().join("ns");
    std::os::unix::fs::symlink(scene.namespace.path(), &path)?;
    let setup = Setup::new().socket(&scene.front).arg("--netns").arg(&path).arg("--start-timeout=1s");
    let mut forwarder = setup.arg(scene.target()).start()?;
    let service = Listener::new(&scene.namespace, &Address::Tcp(scene.target().parse()?))?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    drop(pair);
    std::fs::remove_file(&path)?;
    scene.client()?.expect_abort().context("a client while the namespace is gone")?;
    let closings = forwarder.closings(2)?;
    ensure!(closings[1].reason.starts_with("start-"), "{closings:?}");
    ensure!(forwarder.is_running()?, "it has ended");
    std::os::unix::fs::symlink(scene.namespace.path(), &path)?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    drop(pair);
    forwarder.stop().map(drop)
}

/// The process named by `--pid` dies while its service is being waited for.
#[test]
fn a_container_that_dies_during_its_start_resets_its_clients() -> Result<()> {
    require_namespaces!();
    let Scene { namespace, front, .. } = Scene::new()?;
    let setup = Setup::new().pid(&namespace).socket(&front).arg("--start-timeout=20s").arg("127.0.0.1:80");
    let mut forwarder = setup.start()?;
    let client = Conn::new(&Here, front.address())?;
    client.send(b"ping")?;
    ensure!(client.stays_silent(MOMENT)?, "not held");
    let begin = Instant::now();
    namespace.destroy();
    client.expect_abort()?;
    ensure!(begin.elapsed() < Duration::from_secs(5), "noticed after {:?}", begin.elapsed());
    let closing = forwarder.closing()?;
    ensure!(closing.reason == "start-failed", "{closing:?}");
    // With a process gone for good nothing can be forwarded any more, so the forwarder ends as well.
    forwarder.expect_exit(4)
}

/// The process of `forwarder` that makes its sockets in the target's namespace.
fn agent(forwarder: &Forwarder) -> Result<i32> {
    let is_agent = |pid: &i32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == b"netns-agent"))
    };
    process::children(forwarder.pid()).into_iter().find(is_agent).context("it has no agent")
}

fn kill_agent(forwarder: &Forwarder) -> Result<()> {
    Ok(kill(Pid::from_raw(agent(forwarder)?), Signal::SIGKILL)?)
}

/// As the kernel does it when memory is short.
#[test]
fn a_killed_agent_is_started_anew_for_the_next_client() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let forwarder = scene.start(&[])?;
    // While a client is held: the agent is asked for nothing before the service listens.
    let held = scene.client()?;
    scene.expect_held(&forwarder, 1)?;
    std::thread::sleep(MOMENT);
    kill_agent(&forwarder)?;
    let service = scene.serve()?;
    let held = (held, service.accept().context("for a client that was held")?);
    expect_relayed(&held.0, &held.1)?;
    // Before the next client, and so shortly before it that the forwarder has not heard of it.
    for moment in [MOMENT, Duration::ZERO] {
        kill_agent(&forwarder)?;
        std::thread::sleep(moment);
        let next = (scene.client()?, service.accept().with_context(|| format!("{moment:?} later"))?);
        expect_relayed(&next.0, &next.1)?;
    }
    expect_relayed(&held.0, &held.1).context("a connection from before")?;
    ensure!(!forwarder.log().lines().iter().any(|line| line.contains("ERROR")), "it complains");
    drop(held);
    forwarder.closings(3)?;
    forwarder.stop().map(drop)
}

#[test]
fn a_killed_agent_of_the_own_namespace_is_started_anew_too() -> Result<()> {
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, service) = (Listener::new(&Here, &loopback)?, Listener::new(&Here, &loopback)?);
    let forwarder = Setup::new().socket(&front).arg(service.address().to_string()).start()?;
    let mut killed = 0;
    for _ in 0..6 {
        let pair = (Conn::new(&Here, front.address())?, service.accept()?);
        expect_relayed(&pair.0, &pair.1)?;
        // It may have made sockets for more clients than one, who need no agent then.
        if agent(&forwarder).is_ok() {
            kill_agent(&forwarder)?;
            killed += 1;
        }
    }
    ensure!(killed > 1, "no other one was started");
    forwarder.stop().map(drop)
}

#[test]
fn an_agent_that_cannot_be_started_again_is_named_as_the_reason() -> Result<()> {
    require_namespaces!();
    let mut scene = Scene::new()?;
    let service = scene.serve()?;
    let mut forwarder = scene.setup().copy().arg(scene.target()).start()?;
    let pair = (scene.client()?, service.accept()?);
    expect_relayed(&pair.0, &pair.1)?;
    // It is executed through /proc/self/exe, which leads to the file's own permissions.
    let permit = |mode| std::fs::set_permissions(forwarder.program(), Permissions::from_mode(mode));
    permit(0)?;
    kill_agent(&forwarder)?;
    scene.client()?.expect_abort()?;
    let told = forwarder.log().line(PATIENCE, |line| line.contains("cannot start the service"))?;
    ensure!(told.contains("sockets in the target's network namespace"), "{told}");
    permit(0o755)?;
    let next = (scene.client()?, service.accept()?);
    expect_relayed(&next.0, &next.1)?;
    expect_relayed(&pair.0, &pair.1).context("a connection from before")?;
    ensure!(forwarder.is_running()?, "it has ended");
    drop((pair, next));
    forwarder.stop().map(drop)
}

/// A process that says on its command line that it is a container's conmon, with a child that could be the container's process. The
/// words before it are how it is run.
struct FalseConmon {
    process: std::process::Child,
    child: i32,
}

impl FalseConmon {
    fn start(folder: &std::path::Path, words: &[&str], name: &str, padding: usize) -> Result<Self> {
        let (conmon, pidfile) = (folder.join("conmon"), folder.join(format!("{name}.pid")));
        if !conmon.exists() {
            std::os::unix::fs::symlink("/bin/sh", &conmon)?;
        }
        let script = format!("sleep 1000 & wait # {}", "x".repeat(padding));
        let mut words: Vec<&std::ffi::OsStr> = words.iter().map(|word| std::ffi::OsStr::new(*word)).collect();
        words.extend([conmon.as_os_str(), "-c".as_ref(), script.as_ref(), "-n".as_ref(), name.as_ref()]);
        words.extend(["-p".as_ref(), pidfile.as_os_str()]);
        let process = std::process::Command::new(words[0]).args(&words[1..]).spawn()?;
        let mut this = Self { process, child: 0 };
        let find = || {
            let below = process::children(this.process.id().cast_signed());
            let mut all = below.clone();
            all.extend(below.iter().flat_map(|pid| process::children(*pid)));
            all.into_iter().find(|pid| process::name(*pid).as_deref() == Some("sleep"))
        };
        ensure!(process::eventually(PATIENCE, || find().is_some()), "it has no child");
        this.child = find().context("it had one")?;
        std::fs::write(pidfile, this.child.to_string())?;
        Ok(this)
    }
}

impl Drop for FalseConmon {
    fn drop(&mut self) {
        if self.child > 0 {
            kill(Pid::from_raw(self.child), Signal::SIGKILL).ok();
        }
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Root of a container is the container's owner outside, and calls its processes as it likes. But they are in a process namespace of
/// their own.
#[test]
fn a_conmon_inside_a_container_is_none() -> Result<()> {
    require_namespaces!();
    use bro_user::podman::container::{running, running_in};
    use bro_user::systemd::manager::Residence;
    let scene = Scene::new()?;
    let own = format!("bro-test-own-{}", std::process::id());
    let outside = FalseConmon::start(scene.folder(), &[], &own, 0)?;
    ensure!(running(&own) == Some(outside.child), "{:?}, not {}", running(&own), outside.child);
    let name = format!("bro-test-inside-{}", std::process::id());
    let words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"];
    let inside = FalseConmon::start(scene.folder(), &words, &name, 0)?;
    ensure!(running(&name).is_none(), "process {} is taken for a container's", inside.child);

    // Where its unit's processes are known, no other counts; and of those the main one is conmon.
    let elsewhere = Residence { main: std::process::id(), cgroup: None };
    ensure!(running_in(&elsewhere, &own).is_none(), "found outside its unit");
    let main = Residence { main: outside.process.id(), cgroup: None };
    ensure!(running_in(&main, &own) == Some(outside.child), "not found as its unit's main process");
    // As a cgroup lists it.
    let cgroup = scene.folder().join("unit/supervisor");
    std::fs::create_dir_all(&cgroup)?;
    std::fs::write(cgroup.join("cgroup.procs"), format!("{}\n", outside.process.id()))?;
    let residence = Residence { main: 0, cgroup: cgroup.parent().map(Into::into) };
    ensure!(running_in(&residence, &own) == Some(outside.child), "not found in its unit's cgroup");
    Ok(())
}

/// A command line may have megabytes: no more than its start is read, where Podman puts what is looked for.
#[test]
fn a_long_command_line_is_not_read_to_its_end() -> Result<()> {
    require_namespaces!();
    let scene = Scene::new()?;
    let name = format!("bro-test-long-{}", std::process::id());
    let near = FalseConmon::start(scene.folder(), &[], &name, 1000)?;
    ensure!(bro_user::podman::container::running(&name) == Some(near.child), "not found");
    let name = format!("bro-test-longer-{}", std::process::id());
    let far = FalseConmon::start(scene.folder(), &[], &name, 100_000)?;
    ensure!(bro_user::podman::container::running(&name).is_none(), "found {} behind it all", far.child);
    Ok(())
}
