//! `--freeze`: an idle container is frozen, goes on for its next client in a moment, and is stopped when there has been none for long.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::{Host, Manager};

use crate::site::{PATIENCE, Plan, Site, text};

fn is(site: &Site<'_>, state: &str) -> Result<()> {
    let what = format!("the unit is {state}");
    site.host
        .wait_until(&what, PATIENCE, || {
            Ok(site.manager.show(site.host, &site.unit(), "FreezerState")? == state)
        })
        .with_context(|| site.journals())
}

fn status(site: &Site<'_>) -> Result<String> {
    site.manager.run(site.host, &["bro", "status", &site.name])
}

/// Frozen, and going on within milliseconds, the same run of the service each time; then stopped.
pub fn goes_on_at_once(host: &Host, manager: Manager) -> Result<()> {
    const ROUNDS: usize = 11;
    let options = "--exit-idle-time=200ms --freeze --freeze-time=3s";
    let site = Site::new(host, manager, "icy", &Plan::service(manager, 0.0, options))?;
    let (run, _) = site.who()?;
    let mut spans = Vec::new();
    for _ in 0..ROUNDS {
        is(&site, "frozen")?;
        let said = status(&site)?;
        ensure!(said.contains("frozen"), "{said}");
        let began = Instant::now();
        let (again, _) = site.who()?;
        spans.push(began.elapsed());
        ensure!(again == run, "another run of the service answers: {}", site.journals());
    }
    // From accepted to connected, of those whom it was frozen for.
    let ended = site.ended(ROUNDS + 1)?;
    let mut held: Vec<u64> =
        ended[1..].iter().filter_map(|record| text(record, "BRO_COLD_START_MS").parse().ok()).collect();
    ensure!(held.len() == ROUNDS, "{} of {ROUNDS} were held: {}", held.len(), site.journal());
    held.sort_unstable();
    spans.sort_unstable();
    note(&format!(
        "{manager:?}: thawed and connected within {} ms (median of {ROUNDS}; {} ms at most), answered within {:.1} ms (median)",
        held[ROUNDS / 2],
        held[ROUNDS - 1],
        spans[ROUNDS / 2].as_secs_f64() * 1e3
    ));
    // The median on a machine that does nothing else; what others do at the same time is no fault.
    ensure!(held[0] < 5, "the shortest took {} ms", held[0]);
    is(&site, "frozen")?;
    site.await_exit()?;
    site.await_container_gone()?;
    site.check_echo()
}

/// By hand, by systemctl, and by a forwarder that comes after one that was killed.
pub fn looked_after(host: &Host, manager: Manager) -> Result<()> {
    let options = "--exit-idle-time=300ms --freeze";
    let site = Site::new(
        host,
        manager,
        "icy2",
        &Plan { service: "Restart=on-failure\nRestartSec=100ms", ..Plan::service(manager, 0.0, options) },
    )?;
    let (run, _) = site.who()?;
    is(&site, "frozen")?;
    let said = manager.run(host, &["bro", "wake", "icy2"])?;
    ensure!(said.contains("awake"), "{said}");
    is(&site, "running")?;
    is(&site, "frozen")?;
    // Killed: its successor finds it so, and has it go on; and if it had not, the next client would.
    let forwarder = site.forwarder_show("MainPID")?;
    host.run(&["kill", "-KILL", &forwarder])?;
    is(&site, "running")?;
    let (again, _) = site.who()?;
    ensure!(again == run, "another run of the service answers");
    is(&site, "frozen")?;
    // Reloaded: the successor has it go on, and freezes it again.
    if manager == Manager::System {
        host.run(&["kill", "-HUP", &site.forwarder_show("MainPID")?])?;
        is(&site, "running")?;
        is(&site, "frozen")?;
        ensure!(site.who()?.0 == run, "another run of the service answers after a reload");
        is(&site, "frozen")?;
    }
    let said = manager.run(host, &["bro", "sleep", "icy2"])?;
    ensure!(said.contains("stopped"), "{said}");
    site.await_container_gone()?;
    // systemd has nothing done to a frozen unit but to thaw it; an administrator who does that by hand is not in the way.
    site.check_echo()?;
    is(&site, "frozen")?;
    if let Err(error) = manager.systemctl(host, &["stop", "icy2.service"]) {
        ensure!(format!("{error:#}").contains("frozen unit"), "{error:#}");
        manager.systemctl(host, &["thaw", "icy2.service"])?;
        site.check_echo().with_context(|| site.journals())?;
        is(&site, "frozen")?;
        manager.systemctl(host, &["thaw", "icy2.service"])?;
        let began = Instant::now();
        manager.systemctl(host, &["stop", "icy2.service"])?;
        ensure!(began.elapsed() < Duration::from_secs(15), "the stop took {:?}", began.elapsed());
    }
    site.await_container_gone()?;
    site.check_echo().with_context(|| site.journals())?;
    // Nothing would have it go on once the forwarder has been stopped.
    is(&site, "frozen")?;
    site.front.systemctl(host, &["stop", &site.socket(), &site.forwarder()])?;
    is(&site, "running")
}

/// A flow of datagrams keeps the service as it is for its own time, and the next datagram has it go on.
pub fn goes_on_for_a_datagram(host: &Host, manager: Manager) -> Result<()> {
    let options = "--exit-idle-time=300ms --flow-timeout=500ms --freeze";
    let site = Site::new(host, manager, "icy3", &Plan::service(manager, 0.0, options))?;
    let port = site.port;
    site.change_socket(&format!("ListenStream=0.0.0.0:{port}\nListenDatagram=0.0.0.0:{port}"))?;
    let (run, _) = site.who()?;
    // From one port, so that it is one client's flow that ends and comes again.
    let ask = "import socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(20)\n\
               s.bind(('127.0.0.1', 7777))\ns.sendto(b'who', ('127.0.0.1', int(sys.argv[1])))\nprint(s.recv(99).decode())";
    for _ in 0..2 {
        is(&site, "frozen")?;
        let said = host.run(&["python3", "-c", ask, &port.to_string()]).with_context(|| site.journals())?;
        ensure!(said.split_whitespace().next() == Some(run.as_str()), "{said}: {}", site.journals());
    }
    is(&site, "frozen")?;
    site.check_echo()
}

/// What was started by hand or by another unit is not frozen either.
pub fn others_are_not(host: &Host, manager: Manager) -> Result<()> {
    let site =
        Site::new(host, manager, "warm", &Plan::service(manager, 0.0, "--exit-idle-time=300ms --freeze"))?;
    manager.systemctl(host, &["start", "warm.service"])?;
    site.check_echo()?;
    site.await_exit()?;
    let (state, frost) = (
        manager.show(host, "warm.service", "ActiveState")?,
        manager.show(host, "warm.service", "FreezerState")?,
    );
    ensure!((&*state, &*frost) == ("active", "running"), "{state}, {frost}");
    Ok(())
}

/// The host goes down as fast as ever, and what was frozen is woken after the boot.
pub fn the_host_goes_down(host: &mut Host) -> Result<()> {
    const MANAGERS: [Manager; 2] = [Manager::System, Manager::User("test")];
    let mut ports = Vec::new();
    for manager in MANAGERS {
        let site = Site::new(
            host,
            manager,
            "icy3",
            &Plan::service(manager, 0.0, "--exit-idle-time=300ms --freeze"),
        )?;
        manager.systemctl(host, &["enable", &site.socket()])?;
        site.check_echo()?;
        is(&site, "frozen")?;
        ports.push(site.port);
        // A site that is dropped stops its socket.
        std::mem::forget(site);
    }
    let began = Instant::now();
    host.reboot()?;
    let took = began.elapsed();
    note(&format!("a reboot with two frozen services took {:.1} s", took.as_secs_f64()));
    ensure!(took < Duration::from_secs(60), "the reboot took {took:?}");
    for (manager, port) in MANAGERS.into_iter().zip(ports) {
        let site = Site { host, manager, name: "icy3".into(), port, front: manager, suffix: "in" };
        site.check_echo().with_context(|| site.journals())?;
    }
    Ok(())
}
