//! What happens to a running forwarder: its container restarts, it is told to stop, the host reboots.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::{Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::site::{PATIENCE, Plan, Site, ask, folder, text};

pub fn container_restarts(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "again", &Plan::service(manager, 0.2, ""))?;
    let (first, _) = site.who()?;
    let forwarder = site.forwarder_show("MainPID")?;
    let mut open = site.client()?;
    open.write_all(b"hello")?;
    open.read_exact(&mut [0; 5])?;

    manager.systemctl(host, &["restart", "again.service"])?;
    // Its other end died with the old container.
    ensure!(!matches!(open.read(&mut [0; 1]), Ok(1)), "bytes from a dead container");
    let (second, _) = site.who()?;
    ensure!(first != second, "the same run of the service answers after the restart");

    // Killed from outside: whatever systemd knows of it, the next client is served by a new one.
    manager.run(host, &["podman", "kill", "systemd-again"])?;
    manager.wait_for(host, "again.service", "MainPID", "0", PATIENCE)?;
    let (third, _) = site.who()?;
    ensure!(third != second, "the same run of the service answers after it was killed");
    ensure!(site.forwarder_show("MainPID")? == forwarder, "the forwarder was restarted: {}", site.journal());
    Ok(())
}

/// A quadlet with Restart=always: its first start dies while a client is held, its second one serves that client.
pub fn container_restarts_itself(host: &Host, manager: Manager) -> Result<()> {
    let data = folder(host, manager, "restarts")?;
    let script =
        "sleep 0.2; test -e /data/second || { touch /data/second; exit 3; }; exec nc -ll -p 7 -e /bin/cat";
    let mut plan = Plan::busybox(script, "");
    plan.container.push_str(&format!("\nVolume={data}:/data\n[Service]\nRestart=always\nRestartSec=300ms"));
    let site = Site::new(host, manager, "restarts", &plan)?;
    site.check_echo()
        .map_err(|error| error.context(manager.journal(host, "restarts.service").unwrap_or_default()))
}

/// Podman kills a container that ignores its stop signal after some seconds. Clients that come meanwhile are served afterwards.
pub fn slow_to_stop(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::busybox("trap '' TERM; nc -ll -p 7 -e /bin/cat; exit", "--exit-idle-time 300ms");
    // Longer than the forwarder's watchdog.
    plan.container = plan.container.replace("StopSignal=SIGKILL", "StopTimeout=5");
    let site = Site::new(host, manager, "slow", &plan)?;
    site.check_echo()?;
    manager.wait_for(host, "slow.service", "ActiveState", "deactivating", PATIENCE)?;
    ensure!(site.forwarder_show("MainPID")? != "0", "the forwarder left its container stopping");
    site.check_echo()
        .map_err(|error| error.context(format!("a client while it stopped\n{}", site.journal())))?;
    site.await_exit()?;
    site.await_container_gone()?;
    ensure!(!site.journal().contains("Watchdog timeout"), "{}", site.journal());
    Ok(())
}

/// A client that leaves while it is held is forgotten, and keeps nothing awake.
pub fn client_leaves(host: &Host, manager: Manager) -> Result<()> {
    let (plan, gate) = Plan::gated(host, manager, "leaves", "--exit-idle-time 300ms")?;
    let site = Site::new(host, manager, "leaves", &plan)?;
    let client = site.client()?;
    host.wait_until("the client is held", PATIENCE, || {
        Ok(site.forwarder_show("StatusText")?.contains("1 client waiting"))
    })?;
    // A mere FIN could be a half-close, and its sender be waiting for the answer; a reset is a good-bye.
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &at_once)?;
    drop(client);
    let ended = site.ended(1)?;
    host.write(&gate, "")?;
    site.await_exit()?;
    site.await_container_gone()?;
    ensure!(text(&ended[0], "BRO_REASON") == "client-left", "{}", ended[0]);
    site.check_echo()
}

/// kill -9: the open connection dies with it, the socket is systemd's, so the next client is served by the next forwarder.
pub fn killed(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "killed", &Plan::service(manager, 0.0, "--exit-idle-time 700ms"))?;
    let mut open = site.held()?;
    let (run, _) = site.who()?;
    let forwarder = site.forwarder_show("MainPID")?;
    host.run(&["kill", "-KILL", &forwarder])?;
    ensure!(!matches!(open.read(&mut [0; 1]), Ok(1)), "bytes from a dead forwarder");
    let held = site.held()?;
    ensure!(site.who()?.0 == run, "the container did not survive its forwarder");
    let successor = site.forwarder_show("MainPID")?;
    ensure!(successor != forwarder && successor != "0", "no forwarder runs");
    // The relay process and the helper in the container's namespace end with their forwarder: three is what one has.
    let tasks = format!("/sys/fs/cgroup{}/cgroup.procs", site.forwarder_show("ControlGroup")?);
    host.wait_until("only the successor's own processes in the unit", PATIENCE, || {
        Ok(host.run(&["cat", &tasks])?.lines().count() <= 3)
    })?;
    drop(held);
    site.await_exit()?;
    // The successor puts to sleep what its predecessor had woken.
    site.await_container_gone()
}

/// A forwarder that is ordered after its container, and is told to stop while it wakes it: each would wait for the other. The client
/// is served, or told.
pub fn stopped_while_it_wakes(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::service(manager, 0.3, "--exit-idle-time 5s");
    plan.unit = "After={name}.service\nStartLimitIntervalSec=0";
    let site = Site::new(host, manager, "hasty", &plan)?;
    for pause in [0, 10, 20, 30, 40, 60, 80, 120] {
        let client = site.client()?;
        let (answer, took) = std::thread::scope(|scope| {
            let asking = scope.spawn(move || ask(client, b"hasty"));
            std::thread::sleep(Duration::from_millis(pause));
            let began = std::time::Instant::now();
            let stopped = manager.systemctl(host, &["stop", &site.socket(), &site.forwarder()]);
            let took = began.elapsed();
            stopped.map(|_| (asking.join().expect("it does not panic"), took))
        })?;
        // With --drain-timeout it would be half a minute.
        ensure!(took < Duration::from_secs(15), "after {pause} ms: {took:?}\n{}", site.journals());
        ensure!(answer.is_err() || answer? == b"hasty", "after {pause} ms: a wrong answer");
        manager.systemctl(host, &["start", &site.socket()])?;
    }
    site.check_echo()
}

/// The service manager executes itself anew (an upgrade of systemd does that) while clients are held.
pub fn manager_executes_itself_anew(host: &Host) -> Result<()> {
    for manager in [Manager::System, Manager::User("test")] {
        let site =
            Site::new(host, manager, "reexec", &Plan::service(manager, 1.5, "--exit-idle-time 500ms"))?;
        for pause in [50, 300, 900] {
            let client = site.client()?;
            std::thread::sleep(Duration::from_millis(pause));
            manager.systemctl(host, &["daemon-reexec"])?;
            let answer = ask(client, b"anew").map_err(|error| {
                error.context(format!("{manager:?}, after {pause} ms: {}", site.journals()))
            })?;
            ensure!(answer == b"anew", "{answer:?}");
            site.await_exit()?;
            site.await_container_gone()?;
        }
    }
    Ok(())
}

pub fn drains(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "drain", &Plan::service(manager, 0.0, "--drain-timeout 20s"))?;
    let mut client = site.client()?;
    client.write_all(b"hello")?;
    let mut answer = [0; 5];
    client.read_exact(&mut answer)?;
    manager.systemctl(host, &["stop", "--no-block", "drain-in.service"])?;
    manager.wait_for(host, "drain-in.service", "ActiveState", "deactivating", PATIENCE)?;
    let status = site.forwarder_show("StatusText")?;
    client.write_all(b"still")?;
    client.read_exact(&mut answer)?;
    ensure!(&answer == b"still", "the drained connection echoed {answer:?}");
    ensure!(
        site.forwarder_show("ActiveState")? == "deactivating",
        "it did not wait for its client ({status})"
    );
    drop(client);
    site.await_exit()?;
    ensure!(text(&site.ended(1)?[0], "BRO_REASON") != "drain-timeout", "{}", site.journal());
    // The socket still listens: a new client starts a new forwarder.
    site.check_echo()
}

pub fn status(host: &Host, manager: Manager) -> Result<()> {
    let (plan, gate) = Plan::gated(host, manager, "status", "")?;
    let site = Site::new(host, manager, "status", &plan)?;
    let says = |part: &str| {
        let what = format!("“{part}” in the forwarder's status");
        host.wait_until(&what, PATIENCE, || Ok(site.forwarder_show("StatusText")?.contains(part)))
    };
    let mut client = site.client()?;
    says("1 client waiting")?;
    ensure!(site.forwarder_show("ActiveState")? == "active", "no READY=1 although it holds a client");
    host.write(&gate, "")?;
    client.write_all(b"hello")?;
    client.read_exact(&mut [0; 5])?;
    says("1 connection now")?;
    // The watchdog's three seconds pass twice; each site has WatchdogSec=.
    let pid = site.forwarder_show("MainPID")?;
    std::thread::sleep(Duration::from_secs(7));
    client.write_all(b"hello")?;
    client.read_exact(&mut [0; 5])?;
    ensure!(site.forwarder_show("MainPID")? == pid, "the watchdog killed it: {}", site.journal());
    Ok(())
}

pub fn survives_reboot(host: &mut Host) -> Result<()> {
    let managers = [Manager::System, Manager::User("test")];
    let mut ports = Vec::new();
    for manager in managers {
        let site = Site::new(host, manager, "boot", &Plan::service(manager, 0.0, "--exit-idle-time 1s"))?;
        manager.systemctl(host, &["enable", "boot-in.socket"])?;
        site.check_echo()?;
        ports.push(site.port);
    }
    host.reboot()?;
    for (manager, port) in managers.into_iter().zip(ports) {
        let site = Site { host, manager, front: manager, name: "boot".into(), port, suffix: "in" };
        site.check_echo()?;
        site.await_exit()?;
        site.await_container_gone()?;
        manager.systemctl(host, &["disable", "boot-in.socket"])?;
    }
    Ok(())
}
