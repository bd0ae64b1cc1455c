//! `bro helper`: systemd passes the sockets, the owner of the container needs no rights, others are refused.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{INNER, PATIENCE, Plan};
use bro_tests::host::{Host, Manager};

const ECHO: &str = "exec nc -ll -p 7 -e /bin/cat";

fn start(host: &Host, manager: Manager, name: &str) -> Result<()> {
    Plan::busybox(ECHO, "").write_quadlet(host, manager, name)?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", &format!("{name}.service")])?;
    Ok(())
}

fn pid(host: &Host, manager: Manager, name: &str) -> Result<String> {
    manager.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", &format!("systemd-{name}")])
}

/// systemd's own proxy takes the passed socket over and connects inside a container without a network.
pub fn by_its_owner(host: &Host, manager: Manager) -> Result<()> {
    start(host, manager, "entered")?;
    let pid = pid(host, manager, "entered")?;
    for place in [format!("--pid {pid}"), "--container systemd-entered".into()] {
        let port = host.free_port()?;
        let service = format!(
            "[Service]\nNoNewPrivileges=yes\nExecStart=/usr/local/bin/bro helper {place} -- \
             /usr/lib/systemd/systemd-socket-proxyd --exit-idle-time=1s 127.0.0.1:{INNER}\n"
        );
        manager.unit(host, "proxied.service", &service)?;
        manager.unit(host, "proxied.socket", &format!("[Socket]\nListenStream=127.0.0.1:{port}\n"))?;
        manager.systemctl(host, &["daemon-reload"])?;
        manager.systemctl(host, &["start", "proxied.socket"])?;
        for _ in 0..2 {
            let mut answer = [0; 5];
            let mut client = host.connect(port)?;
            // It knows nothing of half-closed connections.
            client.write_all(b"hello")?;
            let read = client.read_exact(&mut answer);
            read.with_context(|| manager.journal(host, "proxied.service").unwrap_or_default())?;
            ensure!(&answer == b"hello", "{place}: {answer:?}");
            drop(client);
            manager.wait_for(host, "proxied.service", "ActiveState", "inactive", PATIENCE)?;
        }
        manager.systemctl(host, &["stop", "proxied.socket", "proxied.service"])?;
    }
    // Without systemd it is as good as nsenter.
    let links = manager.run(host, &["bro", "helper", "--pid", &pid, "--", "ip", "-o", "link"])?;
    ensure!(links.lines().count() == 1 && links.contains(": lo:"), "{links}");
    manager.systemctl(host, &["stop", "entered.service"])?;
    Ok(())
}

pub fn by_others(host: &Host) -> Result<()> {
    let (test, other) = (Manager::User("test"), Manager::User("other"));
    start(host, other, "neighbour")?;
    let theirs = pid(host, other, "neighbour")?;
    for (whose, pid) in [("another user's", theirs.as_str()), ("root's", "1")] {
        let ran = test.try_run(host, &["bro", "helper", "--pid", pid, "--", "true"])?;
        ensure!(ran.code == 5 && ran.stderr.lines().count() == 1, "{whose}: {ran:?}");
        ensure!(ran.stderr.contains("belongs to another user"), "{whose}: {ran:?}");
    }
    // To this user's Podman there is no such container.
    let ran = test.try_run(host, &["bro", "helper", "--container", "systemd-neighbour", "--", "true"])?;
    ensure!(ran.code == 4 && ran.stderr.lines().count() == 1, "{ran:?}");
    // Nothing about the program lets it: no setuid bit, no capability.
    let mode = host.run(&["stat", "--format", "%a", "/usr/local/bin/bro"])?;
    ensure!(mode == "755", "{mode}");
    // Root may enter everybody's.
    host.run(&["bro", "helper", "--pid", &theirs, "--", "true"])?;
    other.systemctl(host, &["stop", "neighbour.service"])?;
    Ok(())
}
