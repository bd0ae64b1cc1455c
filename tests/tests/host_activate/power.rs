//! The host goes down while clients are connected: orderly, and by losing its power.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{Plan, Site, ask};
use bro_tests::host::{Host, Manager};

use crate::activated::{activate, expect_asleep};
use crate::run_as::{self, Served};

const MANAGERS: [Manager; 2] = [Manager::System, Manager::User("test")];
const NAME: &str = "boot";

/// An enabled socket listens again after either, and the first client wakes its container, which did not start by itself.
pub fn reboot_and_power_cut(host: &mut Host) -> Result<()> {
    let mut sites = Vec::new();
    for manager in MANAGERS {
        let site = Site::activated(
            host,
            manager,
            NAME,
            &Plan::service(manager, 0.0, ""),
            &["--exit-idle-time", "1s"],
        )?;
        brief_drain(&site)?;
        sites.push((manager, site.port, site.suffix));
        // A site that is dropped stops its socket.
        std::mem::forget(site);
    }
    for crash in [false, true] {
        let mut open = Vec::new();
        for (manager, port, suffix) in &sites {
            let site = at(host, *manager, *port, suffix);
            let mut client = site.client()?;
            client.write_all(b"in mid-stream")?;
            client.read_exact(&mut [0; 13]).with_context(|| site.journals())?;
            open.push(client);
            std::mem::forget(site);
        }
        if crash {
            host.power_cut()?
        } else {
            host.reboot()?
        }
        for mut client in open {
            // The network that they were in has gone as well.
            ensure!(!matches!(client.read(&mut [0; 1]), Ok(1)), "bytes from a host that is down");
        }
        for (manager, port, suffix) in &sites {
            let site = at(host, *manager, *port, suffix);
            let state = manager.show(host, &site.unit(), "ActiveState")?;
            ensure!(state == "inactive", "the container is {state} after the boot, without a client");
            site.check_echo().with_context(|| format!("crash: {crash}\n{}", site.journals()))?;
            site.await_exit()?;
            site.await_container_gone()?;
            std::mem::forget(site);
        }
    }
    Ok(())
}

fn at<'h>(host: &'h Host, manager: Manager, port: u16, suffix: &'static str) -> Site<'h> {
    Site { host, manager, front: manager, name: NAME.into(), port, suffix }
}

/// The reboot is to be one in mid-stream, not one that waits for a client which does not leave.
fn brief_drain(site: &Site<'_>) -> Result<()> {
    let service = site.manager.systemctl(site.host, &["cat", &site.forwarder()])?;
    let (_, command) = service.split_once("ExecStart=").context("a service without a command")?;
    let lines = command.lines().take_while(|line| line.ends_with('\\')).count();
    let command: Vec<&str> = command.lines().take(lines + 1).collect();
    let command = command.join("\n").replace(" forward ", " forward --drain-timeout=1s ");
    let drop_in = format!("[Service]\nExecStart=\nExecStart={command}\n");
    site.manager.unit(site.host, &format!("{}.d/brief.conf", site.forwarder()), &drop_in)?;
    site.manager.systemctl(site.host, &["daemon-reload"])?;
    Ok(())
}

/// The user lingers, and has not logged in: the system listens on that user's behalf, and a service that may make no socket
/// finds the user namespace that it could not make itself.
pub fn no_user_has_logged_in(host: &mut Host) -> Result<()> {
    const TEST: Manager = Manager::User("test");
    let served = Served::new(host, TEST, "dawn", &Plan::service(TEST, 0.0, ""), "--exit-idle-time 500ms")?;
    std::mem::forget(served);
    let mut ports = Vec::new();
    for manager in MANAGERS {
        let plan = Plan::new(
            "Image=docker.io/alpine/socat\nExec=ACCEPT-FD:3,fork EXEC:cat\nStopSignal=SIGKILL",
            "",
            "",
        );
        plan.write_quadlet(host, manager, "bare")?;
        let port = host.free_port()?;
        let words = format!("bare --direct --restrict-network --external-port 127.0.0.1:{port}");
        let ran = activate(host, manager, &words)?;
        ensure!(ran.success(), "{ran:?}");
        ports.push((manager, port));
    }
    host.reboot()?;
    let uid = host.uid("test")?;
    let paused = host.path(&format!("/run/user/{uid}/libpod/tmp/pause.pid"));
    ensure!(!paused.exists(), "Podman has been at work already: {}", paused.display());
    for (manager, port) in ports.into_iter().rev() {
        let answer = ask(host.connect(port)?, b"first of the day");
        let answer = answer.with_context(|| manager.journal(host, "bare.service").unwrap_or_default())?;
        ensure!(answer == b"first of the day", "{manager:?}: {answer:?}");
        ensure!(activate(host, manager, "bare --remove")?.success());
        manager.systemctl(host, &["stop", "bare.service"])?;
    }
    let served = Served(run_as::at(host, TEST, "dawn"));
    for _ in 0..2 {
        served.0.check_echo().with_context(|| served.0.journals())?;
        expect_asleep(&served.0).with_context(|| served.0.journals())?;
    }
    Ok(())
}
