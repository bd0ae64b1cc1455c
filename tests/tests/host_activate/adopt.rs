//! `--adopt`: services that know nothing of it accept at systemd's sockets, and are woken and stopped as ever.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::site::{PATIENCE, Plan, Site, folder};
use bro_tests::host::{Host, Manager};

use crate::activated::{activate, expect_asleep, tree};
use crate::run_as::Served;

/// nginx that answers with the address of its client and the number of its own start, on IPv4 only.
pub fn nginx(host: &Host, manager: Manager) -> Result<Plan> {
    manager.import_image(host, "nginx", "docker.io/library/nginx")?;
    let files = folder(host, manager, "seen")?;
    host.write(
        &format!("{files}/default.conf"),
        "server { listen 7; location / { return 200 \"$remote_addr\"; } }\n",
    )?;
    let lines = format!(
        "Image=docker.io/library/nginx\nVolume={files}/default.conf:/etc/nginx/conf.d/default.conf:ro"
    );
    Ok(Plan::new(&lines, "", ""))
}

/// As whom the service sees a client that comes from 127.0.0.5, which no forwarder has.
fn seen(site: &Site<'_>) -> Result<String> {
    let url = format!("http://127.0.0.1:{}/", site.port);
    let curl = ["curl", "--silent", "--fail", "--max-time", "20", "--interface", "127.0.0.5", &url];
    site.host.run(&curl).with_context(|| site.journals())
}

pub fn expect_adopted(site: &Site<'_>) -> Result<()> {
    let seen = seen(site)?;
    ensure!(seen == "127.0.0.5", "it sees {seen}, so it was not adopted:\n{}", site.journals());
    Ok(())
}

/// What `bro doctor` has to complain of.
fn complaints(site: &Site<'_>) -> Result<String> {
    let doctor = site.front.try_run(site.host, &["bro", "doctor", &site.name])?;
    Ok(doctor.stdout.lines().filter(|line| !line.starts_with("ok ")).collect::<Vec<_>>().join("\n"))
}

/// What `bro doctor` says of the fence around the service's sockets: that of the unit, or what stands for one around a user's container.
fn expect_fence(site: &Site<'_>) -> Result<()> {
    let doctor = site.front.try_run(site.host, &["bro", "doctor", &site.name])?.stdout;
    let line = doctor.lines().find(|line| line.contains("fence")).with_context(|| doctor.clone())?;
    let wanted = match site.front {
        Manager::System => line.starts_with("ok ") && line.contains("around the sockets of"),
        // All that it connects to is the service itself.
        Manager::User(_) => line.starts_with("ok ") && line.ends_with("(Landlock): 7"),
    };
    ensure!(wanted, "{doctor}");
    Ok(())
}

/// Adopted, and soon asleep.
const SOON: [&str; 4] = ["--adopt", "--trust-loopback", "--exit-idle-time", "1s"];

/// Adopted, and seeing clients of this host as they are, which tells it from a relayed one.
const SEEING: [&str; 2] = ["--adopt", "--trust-loopback"];

/// From the quadlet to an adopted service and back; nothing is left.
pub fn from_quadlet_to_service(host: &Host, manager: Manager) -> Result<()> {
    let plan = nginx(host, manager)?;
    plan.write_quadlet(host, manager, "adopted")?;
    manager.systemctl(host, &["daemon-reload"])?;
    let before = tree(host, manager)?;
    let site = Site::activated(host, manager, "adopted", &plan, &SOON)?;
    for _ in 0..2 {
        ensure!(site.forwarder_show("ActiveState")? == "inactive", "a forwarder runs without a client");
        expect_adopted(&site)?;
        // Podman has commands in it done, and the service is there for them too.
        let page = ["podman", "exec", "systemd-adopted", "wget", "-q", "-O-", "http://127.0.0.1:7/"];
        let inside = manager.run(host, &page).with_context(|| site.journals())?;
        ensure!(!inside.is_empty(), "it does not answer inside");
        let complaints = complaints(&site)?;
        ensure!(!complaints.contains("BAD"), "{complaints}");
        expect_asleep(&site).with_context(|| site.journals())?;
    }
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    expect_fence(&site)?;
    let again = activate(host, manager, "adopted")?;
    ensure!(again.success() && again.stdout.contains("nothing to do"), "{again:?}");
    expect_adopted(&site)?;
    expect_removed(&site, &before)
}

/// A removal under an awake service leaves nothing.
fn expect_removed(site: &Site<'_>, before: &[String]) -> Result<()> {
    let (host, manager, name) = (site.host, site.manager, &site.name);
    let removed = activate(host, site.front, &format!("{name} --remove"))?;
    ensure!(removed.success(), "{removed:?}");
    ensure!(
        tree(host, site.front)? == before,
        "--remove left, or took, something:\n{:#?}",
        tree(host, site.front)?
    );
    for front in [site.front, manager] {
        let known = front
            .systemctl(host, &["list-units", "--all", "--plain", "--no-legend", &format!("{name}-*")])?;
        ensure!(known.is_empty(), "systemd still knows {known}");
    }
    ensure!(manager.show(host, &site.unit(), "ActiveState")? == "inactive", "the container runs on");
    ensure!(host.connect(site.port).is_err(), "there is still a listener");
    // The other manager's case runs at the same time.
    let runtime = match site.front {
        Manager::System => "/run/bro",
        Manager::User(_) => "/run/user/*/bro",
    };
    let left = host.sh(&format!("find {runtime} -name '*.sock' -path '*/adopt/*' 2>/dev/null || true"))?;
    ensure!(left.is_empty(), "a socket is left: {left}");
    Ok(())
}

/// Clients that ask without a pause; how often each was answered, and what went wrong.
pub fn under_load(site: &Site<'_>, work: impl FnOnce() -> Result<()>) -> Result<(usize, Vec<String>)> {
    let (over, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let address: SocketAddr = ([127, 0, 0, 1], site.port).into();
    let client = || {
        let mut failures = Vec::new();
        while !over.load(Ordering::Relaxed) {
            let ask = || -> std::io::Result<bool> {
                let mut client = TcpStream::connect(address)?;
                client.set_read_timeout(Some(PATIENCE))?;
                client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                client.read_to_string(&mut answer)?;
                Ok(answer.ends_with("127.0.0.1"))
            };
            match ask() {
                Ok(true) => {
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                other => failures.push(format!("{other:?}")),
            }
        }
        failures
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(|| site.host.in_network(|| Ok(client())))).collect();
        let worked = work();
        over.store(true, Ordering::Relaxed);
        let mut failures = Vec::new();
        for client in clients {
            failures.extend(client.join().expect("a client does not panic")?);
        }
        worked?;
        Ok((answered.load(Ordering::Relaxed), failures))
    })
}

/// nginx lets its clients finish, and those that come meanwhile wait at systemd's socket.
pub fn restarted_under_load(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &SEEING)?;
    expect_adopted(&site)?;
    let (answered, failures) = under_load(&site, || {
        for _ in 0..3 {
            manager.systemctl(host, &["restart", "adopted.service"])?;
            expect_adopted(&site)?;
        }
        Ok(())
    })?;
    ensure!(
        answered > 100 && failures.is_empty(),
        "{answered} answered, and {failures:?}\n{}",
        site.journals()
    );
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// No client notices, and what the container asks meanwhile is answered by the next one.
pub fn forwarder_killed(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &SEEING)?;
    expect_adopted(&site)?;
    let first = site.forwarder_show("MainPID")?;
    let (answered, failures) = under_load(&site, || {
        host.run(&["kill", "-KILL", &first])?;
        host.wait_until("the next forwarder", PATIENCE, || {
            Ok(site.forwarder_show("ActiveState")? == "active" && site.forwarder_show("MainPID")? != first)
        })
    })?;
    ensure!(
        answered > 10 && failures.is_empty(),
        "{answered} answered, and {failures:?}\n{}",
        site.journals()
    );
    // It reloads: its new workers ask for what the dead one was asked for, and the next one answers.
    manager.run(host, &["podman", "exec", "systemd-adopted", "nginx", "-s", "reload"])?;
    expect_adopted(&site)?;
    manager.run(host, &["bro", "sleep", "adopted"])?;
    site.await_container_gone()?;
    expect_adopted(&site)?;
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// The container's runtime finds the agent, and starts it.
pub fn started_by_hand(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &SEEING)?;
    manager.systemctl(host, &["start", "adopted.service"])?;
    expect_adopted(&site)?;
    ensure!(site.forwarder_show("ActiveState")? == "active", "the forwarder was not started");
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// Without `--adopt` again: the leftover files go, and clients are forwarded.
pub fn off_again(host: &Host, manager: Manager) -> Result<()> {
    let plan = nginx(host, manager)?;
    let site = Site::activated(host, manager, "adopted", &plan, &[])?;
    let forwarded = tree(host, manager)?;
    let plain = seen(&site)?;
    ensure!(plain != "127.0.0.5", "{plain} without a kernel relay that shows it");
    // A running container has the profile from its next start on.
    let ran = activate(host, manager, "adopted --adopt --trust-loopback")?;
    let agent = || manager.journal(host, "adopted-activator-seccomp.socket").unwrap_or_default();
    ensure!(ran.success(), "{ran:?}\n{}\n{}", agent(), site.journals());
    manager.systemctl(host, &["restart", "adopted.service"])?;
    expect_adopted(&site)?;
    let ran = activate(host, manager, "adopted --adopt=off")?;
    ensure!(ran.success() && ran.stdout.contains("adopted.service was stopped"), "{ran:?}");
    ensure!(tree(host, manager)? == forwarded, "something is left:\n{:#?}", tree(host, manager)?);
    ensure!(seen(&site)? == plain, "it is still adopted");
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// A new socket while the container has the old one: with a fence where there was none, and with another backlog.
pub fn another_socket(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &SEEING)?;
    if manager == Manager::System {
        host.sh("sed -i '/^ExecStartPre=/d' /etc/systemd/system/adopted-activator.socket")?;
        host.sh("systemctl daemon-reload; systemctl restart adopted-activator.socket")?;
        expect_adopted(&site)?;
        let doctor = host.try_run(&["bro", "doctor", "adopted"])?.stdout;
        ensure!(doctor.contains("adopted-activator.socket has none"), "{doctor}");
        let ran = activate(host, manager, "adopted")?;
        ensure!(ran.success() && ran.stdout.contains("it held the socket"), "{ran:?}\n{}", site.journals());
    }
    expect_adopted(&site)?;
    expect_fence(&site)?;
    let ran = activate(host, manager, "adopted --backlog 77")?;
    ensure!(ran.success() && ran.stdout.contains("it held the socket"), "{ran:?}\n{}", site.journals());
    expect_adopted(&site)?;
    expect_fence(&site)?;
    if manager == Manager::System {
        // As on a host that is a container without the right to load programs: it listens all the same.
        let without =
            ["setpriv", "--bounding-set", "-bpf,-sys_admin", "bro", "activate", "adopted", "--backlog"];
        let ran = host.try_run(&[&without[..], &["78"]].concat())?;
        ensure!(ran.success() && ran.stderr.contains("there is no fence around the sockets"), "{ran:?}");
        expect_adopted(&site)?;
        let doctor = host.try_run(&["bro", "doctor", "adopted"])?.stdout;
        ensure!(doctor.contains("adopted-activator.socket has none"), "{doctor}");
    }
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// A service that has been taken over: it leads a client's socket elsewhere, and says to the next one what came of that and of connections of its own.
const LEADS: &str = r#"
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
listener, led = socket.create_server(("0.0.0.0", 7)), ""
def tries(what):
    try: what()
    except OSError as error: return errno.errorcode.get(error.errno, str(error))
    return "done"
def to(port): socket.socket().connect(("127.0.0.1", port))
def dissolve(client):
    if libc.connect(client.fileno(), bytes(16), 16): raise OSError(ctypes.get_errno(), "")
while True:
    client, _ = listener.accept()
    word = client.recv(64).decode().split()
    if not word: continue
    port = int(word[1])
    if word[0] == "lead":
        led = tries(lambda: dissolve(client)) + " " + tries(lambda: client.connect(("127.0.0.1", port)))
        continue
    own, other = tries(lambda: to(7)), tries(lambda: to(9))
    path = tries(lambda: socket.socket(socket.AF_UNIX).connect("/nothing"))
    fast = tries(lambda: socket.socket().sendto(b"x", 0x20000000, ("127.0.0.1", port)))
    client.sendall(f"own {own}, other {other}, path {path}, fast {fast}, led {led}".encode())
    client.close()
"#;

/// By a fence, by Landlock and by the profile, and what no one of them hinders.
pub fn connects(host: &Host, manager: Manager) -> Result<()> {
    let program = format!("{}/leads.py", folder(host, manager, "seen")?);
    host.write(&program, LEADS)?;
    let lines = format!(
        "Rootfs={}:O\nStopSignal=SIGKILL\nVolume={program}:{program}:ro\nExec=/usr/bin/python3 {program}",
        manager.image()
    );
    let site = Site::activated(host, manager, "adopted", &Plan::new(&lines, "", ""), &["--adopt"])?;
    let tell = |word: &str| -> Result<String> {
        let (mut said, mut client) = (String::new(), site.client()?);
        client.set_read_timeout(Some(PATIENCE))?;
        client.write_all(format!("{word} {}", site.port).as_bytes())?;
        if word == "ask" {
            client.read_to_string(&mut said).with_context(|| site.journals())?;
        } else {
            // It is another one's now, and so ends nothing here: the next client says what came of it.
            std::mem::forget(client);
        }
        Ok(said)
    };
    let without = "own done, other ECONNREFUSED, path ENOENT, fast ENOTSUP, led done";
    let ports = "own done, other EACCES, path ENOENT, fast ENOTSUP, led done EACCES";
    let never = "own EPERM, other EPERM, path EPERM, fast ENOTSUP, led EPERM EPERM";
    let (default, any, doctor) = match manager {
        Manager::System => (format!("{without} EPERM"), format!("{without} EPERM"), "around the sockets of"),
        Manager::User(_) => {
            (ports.to_owned(), format!("{without} done"), "these ports alone, by its runtime (Landlock): 7")
        }
    };
    for (option, expected) in [
        ("", &*default),
        ("7", ports),
        ("none", &ports.replace("own done", "own EACCES")),
        ("any", &any),
        ("never", never),
    ] {
        if !option.is_empty() {
            let ran = activate(host, manager, &format!("adopted --adopt-connect {option}"))?;
            ensure!(ran.success(), "{ran:?}");
            // Its own connections may still be there.
            manager.run(host, &["bro", "sleep", "--force", "adopted"])?;
            site.await_container_gone()?;
        }
        tell("lead")?;
        let said = tell("ask")?;
        ensure!(said == expected, "“{option}”: {said}, and not {expected}\n{}", site.journals());
        if option.is_empty() {
            let said = site.front.try_run(host, &["bro", "doctor", "adopted"])?.stdout;
            ensure!(said.contains(doctor), "{said}");
        }
    }
    let status = manager.run(host, &["bro", "status", "adopted"])?;
    ensure!(status.contains("adopted since"), "{status}");
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// A service that listens at no port but the one that it has bound, as Node's cluster module and dnsmasq do, and tells its client what it sees.
const PARTICULAR: &str = r#"
import socket
listener = socket.create_server(("0.0.0.0", 7))
if listener.getsockname()[1] != 7: raise SystemExit("EADDRINUSE")
while True:
    client, peer = listener.accept()
    client.sendall(f"{peer[0]} {client.getpeername()[0]} {client.getsockname()[1]}".encode())
    client.close()
"#;

/// What a service of the system's is told of addresses without a word, and what it sees with `--trust-loopback`.
pub fn told(host: &Host) -> Result<()> {
    let manager = Manager::System;
    let program = format!("{}/particular.py", folder(host, manager, "seen")?);
    host.write(&program, PARTICULAR)?;
    let lines = format!(
        "Rootfs={}:O\nStopSignal=SIGKILL\nVolume={program}:{program}:ro\nExec=/usr/bin/python3 {program}",
        manager.image()
    );
    let site = Site::activated(host, manager, "adopted", &Plan::new(&lines, "", ""), &["--adopt"])?;
    let asks = || -> Result<String> {
        let mut said = String::new();
        let mut client = site.client()?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.read_to_string(&mut said).with_context(|| site.journals())?;
        Ok(said)
    };
    let said = asks()?;
    ensure!(said == "169.254.1.2 169.254.1.2 7", "{said}\n{}", site.journals());
    let status = host.run(&["bro", "status", "adopted"])?;
    ensure!(status.contains("adopted since"), "{status}");
    let doctor = host.try_run(&["bro", "doctor", "adopted"])?.stdout;
    ensure!(doctor.contains("clients of this host are seen by 169.254.1.2"), "{doctor}");
    ensure!(doctor.contains("is seen as 7"), "{doctor}");
    // What it is told is a matter of the socket's start, which it is given.
    let ran = activate(host, manager, "adopted --trust-loopback")?;
    ensure!(ran.success() && ran.stdout.contains("it held the socket"), "{ran:?}");
    let said = asks()?;
    ensure!(said == "127.0.0.1 127.0.0.1 7", "{said}\n{}", site.journals());
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// What a container does to a listener that it has: it is taken from the forwarder here, whose descriptor is of the same socket.
const BREAKS: &str = r#"
import ctypes, os, socket, sys
namespace = lambda of: of.getsockopt(socket.SOL_SOCKET, 71, 8)
here = namespace(socket.socket())
libc, pid = ctypes.CDLL(None), int(sys.argv[1])
of = os.pidfd_open(pid)
for number in os.listdir(f"/proc/{pid}/fd"):
    mine = libc.syscall(438, of, int(number), 0)
    try: found = socket.socket(fileno=mine)
    except OSError: continue
    if found.family == socket.AF_INET and namespace(found) == here and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        found.shutdown(socket.SHUT_RDWR)
        print("broken", flush=True)
"#;

/// Its listener is as a container has left it.
fn breaks(site: &Site<'_>) -> Result<()> {
    let forwarder = site.forwarder_show("MainPID")?;
    let said = site.host.run(&["python3", "-c", BREAKS, &forwarder])?;
    ensure!(said == "broken" && site.host.connect(site.port).is_err(), "it still listens: {said}");
    Ok(())
}

/// Its socket unit is started anew: by a forwarder that stays, and by one that leaves.
pub fn damaged(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &SEEING)?;
    let breaks = || breaks(&site);
    let listens_again = || {
        host.wait_until("the socket to listen again", PATIENCE, || Ok(host.connect(site.port).is_ok()))
            .with_context(|| site.journals())
    };
    expect_adopted(&site)?;
    breaks()?;
    manager.systemctl(host, &["restart", "adopted.service"])?;
    listens_again()?;
    // The service may have started meanwhile, and listen already.
    seen(&site)?;
    manager.run(host, &["bro", "sleep", "adopted"])?;
    expect_adopted(&site)?;
    breaks()?;
    manager.run(host, &["bro", "sleep", "adopted"])?;
    listens_again()?;
    expect_adopted(&site)?;
    let journal = site.journal();
    // That it was asked for it does not say where it is stopped for it at once.
    ensure!(
        journal.matches("it does not listen any more; its socket unit is started anew").count() == 2,
        "{journal}"
    );
    let complaints = complaints(&site)?;
    ensure!(!complaints.contains("BAD"), "{complaints}");
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// A forwarder that runs as a user may not start the system's socket anew: what root has to type for that it says, and that mends it.
pub fn damaged_for_a_user(host: &Host) -> Result<()> {
    let owner = Manager::User("test");
    let served = Served::new(host, owner, "adopted", &nginx(host, owner)?, "--adopt --trust-loopback")?;
    let site = &served.0;
    expect_adopted(site)?;
    breaks(site)?;
    owner.systemctl(host, &["restart", "adopted.service"])?;
    let wanted = "root has to do that, `systemctl restart adopted-activator.socket`";
    host.wait_until("the forwarder to be refused", PATIENCE, || Ok(site.journal().contains(wanted)))
        .with_context(|| site.journals())?;
    let complaints = complaints(site)?;
    ensure!(complaints.contains(wanted), "{complaints}");
    host.sh("systemctl restart adopted-activator.socket")?;
    // The service was started in the meantime, and listens inside.
    owner.run(host, &["bro", "sleep", "adopted"])?;
    expect_adopted(site)
}

/// A port more for the same place in the container, while the service has the first one: its clients are relayed there.
pub fn second_port(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &SEEING)?;
    expect_adopted(&site)?;
    let port = host.free_port()?;
    // Its name comes before the first one's.
    let more = format!("adopted --service-name a --external-port 0.0.0.0:{port} --internal-port 7");
    let ran = activate(host, manager, &more)?;
    ensure!(ran.success(), "{ran:?}");
    let url = format!("http://127.0.0.1:{port}/");
    for _ in 0..2 {
        let page = host.run(&["curl", "--silent", "--fail", "--max-time", "20", &url]);
        page.with_context(|| site.journals())?;
        expect_adopted(&site)?;
        manager.systemctl(host, &["reload-or-restart", "adopted-activator.service"])?;
    }
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// The profile is as old as its source was.
pub fn older_profile(host: &Host, manager: Manager) -> Result<()> {
    let plan = nginx(host, manager)?;
    let files = folder(host, manager, "seen")?;
    let source = format!("{files}/seccomp.json");
    host.run(&["cp", "/usr/share/containers/seccomp.json", &source])?;
    let own = Plan { container: format!("{}\nSeccompProfile={source}", plan.container), ..plan };
    let site = Site::activated(host, manager, "adopted", &own, &SEEING)?;
    expect_adopted(&site)?;
    host.sh(&format!("sed -i 's/\"accept4\",/\"accept4\", \"brk\",/' {source}"))?;
    let said = complaints(&site)?;
    ensure!(said.contains("seccomp profile") && said.contains(&source), "{said}");
    let ran = activate(host, manager, "adopted")?;
    ensure!(ran.success() && ran.stdout.contains("adopted-activator-seccomp.json"), "{ran:?}");
    let said = complaints(&site)?;
    ensure!(!said.contains("seccomp profile"), "{said}");
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// Asks over this connection, which stays.
fn ask(mut client: &TcpStream) -> Result<()> {
    client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"127.0.0.1") {
        let mut part = [0; 512];
        let length = client.read(&mut part)?;
        ensure!(length > 0, "the end after {:?}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&part[..length]);
    }
    Ok(())
}

/// A client that says nothing does not keep it from being frozen; the next one has it go on at once, and so does the silent one's next request.
pub fn frozen_without_bytes(host: &Host, manager: Manager) -> Result<()> {
    const ROUNDS: usize = 3;
    let options =
        ["--adopt", "--trust-loopback", "--exit-idle-time", "300ms", "--idle-by", "bytes", "--freeze"];
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &options)?;
    let address: SocketAddr = ([127, 0, 0, 1], site.port).into();
    let client = || -> Result<TcpStream> {
        host.in_network(|| {
            let client = TcpStream::connect(address)?;
            client.set_read_timeout(Some(PATIENCE))?;
            Ok(client)
        })
    };
    let is_frozen = || {
        let frozen = host.wait_until("it is frozen", PATIENCE, || {
            Ok(manager.show(host, "adopted.service", "FreezerState")? == "frozen")
        });
        frozen.with_context(|| site.journals())
    };
    let run = || manager.show(host, "adopted.service", "InvocationID");
    let silent = client()?;
    ask(&silent).with_context(|| site.journals())?;
    let first = run()?;
    let mut spans = Vec::new();
    for _ in 0..ROUNDS {
        is_frozen()?;
        let began = Instant::now();
        ask(&client()?).with_context(|| site.journals())?;
        spans.push(began.elapsed());
    }
    spans.sort_unstable();
    note(&format!(
        "{manager:?}: an adopted service thawed and answered within {:?} (median)",
        spans[ROUNDS / 2]
    ));
    // The shortest: what others do on the machine at the same time is no fault. A look would take up to a second.
    ensure!(spans[0] < Duration::from_millis(50), "{spans:?}");
    is_frozen()?;
    ask(&silent).with_context(|| site.journals())?;
    is_frozen()?;
    expect_adopted(&site)?;
    ensure!(run()? == first, "it was started again:\n{}", site.journals());
    is_frozen()?;
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}

/// Of a cold start under a forwarder that runs: until systemd has begun to start the service, which is systemd's own work too, and from the service's
/// listening to its answer.
fn expect_little_of_bros_own(site: &Site<'_>) -> Result<()> {
    const TRIES: usize = 3;
    let mut tries = Vec::new();
    for _ in 0..TRIES {
        site.manager.systemctl(site.host, &["stop", &site.unit()])?;
        let began = monotonic()?;
        let (_run, listening) = site.who().with_context(|| site.journals())?;
        let answered = monotonic()?;
        let started = site.manager.show(site.host, &site.unit(), "InactiveExitTimestampMonotonic")?;
        let started = Duration::from_micros(started.parse()?);
        let own = started.saturating_sub(began) + answered.saturating_sub(Duration::from_nanos(listening));
        let all = answered.saturating_sub(began);
        tries.push((own, all));
        // What others do at the same time is no fault of its.
        if own * 10 <= all {
            note(&format!("{:?}: of a cold start of {all:?} bro and systemd had {own:?}", site.manager));
            return Ok(());
        }
    }
    anyhow::bail!("bro's own part, of all: {tries:?}")
}

fn monotonic() -> Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?.into())
}

/// Services with sockets of other kinds.
pub fn other_services(host: &Host, manager: Manager) -> Result<()> {
    manager.import_image(host, "redis", "docker.io/library/redis")?;
    let plan = Plan::new("Image=docker.io/library/redis", "", "");
    plan.write_quadlet(host, manager, "cache")?;
    let careless =
        activate(host, manager, "cache --adopt --external-port 127.0.0.1:6380 --internal-port 6379")?;
    match manager {
        // It is told of no client of its own host.
        Manager::System => {
            let said = host.run(&["redis-cli", "-p", "6380", "client", "list"])?;
            ensure!(careless.success() && said.contains("addr=169.254.1.2:"), "{careless:?} {said}");
            ensure!(activate(host, manager, "cache --remove")?.success());
        }
        Manager::User(_) => {
            ensure!(careless.code == 2 && careless.stderr.contains("--trust-loopback"), "{careless:?}");
        }
    }
    let options = ["--adopt", "--trust-loopback", "--internal-port", "6379", "--exit-idle-time", "1s"];
    let site = Site::activated(host, manager, "cache", &plan, &options)?;
    let port = site.port.to_string();
    for _ in 0..2 {
        let clients =
            host.run(&["redis-cli", "-p", &port, "client", "list"]).with_context(|| site.journals())?;
        ensure!(clients.contains("addr=127.0.0.1:"), "{clients}\n{}", site.journals());
        let report =
            host.run(&["redis-benchmark", "-p", &port, "-q", "-n", "5000", "-P", "8", "-t", "set,get"])?;
        ensure!(!report.contains("Error"), "{report}");
        expect_asleep(&site).with_context(|| site.journals())?;
    }
    ensure!(activate(host, manager, "cache --remove")?.success());

    // asyncio, over TCP; then a second port at a unix socket.
    let plan = Plan::service(manager, 0.2, "");
    let site = Site::activated(host, manager, "echo", &plan, &["--adopt", "--exit-idle-time", "1s"])?;
    site.check_echo().with_context(|| site.journals())?;
    expect_little_of_bros_own(&site)?;
    for _ in 0..2 {
        expect_asleep(&site).with_context(|| site.journals())?;
        site.check_echo().with_context(|| site.journals())?;
    }
    ensure!(site.ended(0).is_ok(), "a client was forwarded: {}", site.journals());
    ensure!(activate(host, manager, "echo --remove")?.success());
    Ok(())
}

/// The system listens for a user's container, and its forwarder, which may nearly nothing, has its sockets adopted there.
pub fn for_a_user(host: &Host) -> Result<()> {
    let owner = Manager::User("test");
    let plan = nginx(host, owner)?;
    let before = tree(host, Manager::System)?;
    let served = Served::new(host, owner, "adopted", &plan, "--adopt --trust-loopback --exit-idle-time 1s")?;
    for _ in 0..2 {
        expect_adopted(&served.0)?;
        let page = ["podman", "exec", "systemd-adopted", "wget", "-q", "-O-", "http://127.0.0.1:7/"];
        ensure!(!owner.run(host, &page)?.is_empty(), "it does not answer inside");
        let complaints = complaints(&served.0)?;
        ensure!(!complaints.contains("BAD"), "{complaints}");
        expect_asleep(&served.0).with_context(|| served.0.journals())?;
    }
    expect_fence(&served.0)?;
    expect_removed(&served.0, &before)
}

/// The forwarder is restarted, reloaded and told to put it to sleep while it is awake.
pub fn looked_after(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "adopted", &nginx(host, manager)?, &SEEING)?;
    expect_adopted(&site)?;
    let began = Instant::now();
    manager.systemctl(host, &["restart", "adopted-activator.service"])?;
    expect_adopted(&site)?;
    ensure!(
        began.elapsed() < Duration::from_secs(20),
        "a restart of the forwarder took {:?}",
        began.elapsed()
    );
    manager.systemctl(host, &["reload", "adopted-activator.service"])?;
    expect_adopted(&site)?;
    manager.run(host, &["podman", "exec", "systemd-adopted", "echo"])?;
    manager.run(host, &["bro", "sleep", "adopted"])?;
    site.await_container_gone().with_context(|| site.journals())?;
    let status = manager.run(host, &["bro", "status", "adopted"])?;
    ensure!(status.contains("adopted"), "{status}");
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}
