//! What happens to a running forwarder: its container restarts, it is told to stop, the host reboots.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::{Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::site::{PATIENCE, Plan, Site, text};

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
    let site = Site::new(host, manager, "status", &Plan::service(manager, 1.0, ""))?;
    let says = |part: &str| {
        let what = format!("“{part}” in the forwarder's status");
        host.wait_until(&what, PATIENCE, || Ok(site.forwarder_show("StatusText")?.contains(part)))
    };
    let mut client = site.client()?;
    says("1 client waiting")?;
    ensure!(site.forwarder_show("ActiveState")? == "active", "no READY=1 although it holds a client");
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
        let site = Site { host, manager, front: manager, name: "boot".into(), port };
        site.check_echo()?;
        site.await_exit()?;
        site.await_container_gone()?;
        manager.systemctl(host, &["disable", "boot-in.socket"])?;
    }
    Ok(())
}
