//! Where targets are, and where clients come from.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::site::{INNER, PATIENCE, Plan, Site, ask, text};

pub fn in_a_pod(host: &Host, manager: Manager) -> Result<()> {
    manager.quadlet(host, "peas.pod", "[Pod]\nNetwork=none\n")?;
    let mut plan = Plan::service(manager, 0.2, "--exit-idle-time 500ms");
    plan.network = "Pod=peas.pod";
    let site = Site::new(host, manager, "pea", &plan)?;
    for _ in 0..2 {
        site.check_echo()?;
        site.await_exit()?;
        manager.wait_for(host, "pea.service", "ActiveState", "inactive", PATIENCE).with_context(|| {
            format!("{}\n{}", site.journals(), manager.journal(host, "peas-pod.service").unwrap_or_default())
        })?;
    }
    manager.systemctl(host, &["stop", "peas-pod.service"])?;
    Ok(())
}

/// Not only Network=none: the target's 127.0.0.1 is the container's in each of them, published ports or not.
pub fn other_networks(host: &Host, manager: Manager) -> Result<()> {
    let networks: &[&str] = match manager {
        Manager::System => &["Network=podman"],
        // pasta and slirp4netns make a namespace that the container's user namespace owns; with a bridge it is another's.
        Manager::User(_) => &["Network=pasta", "Network=slirp4netns", "Network=podman"],
    };
    for network in networks {
        let plan = Plan { network, ..Plan::service(manager, 0.0, "--exit-idle-time 300ms") };
        let site = Site::new(host, manager, "networked", &plan)?;
        site.check_echo().map_err(|error| error.context(format!("{network}\n{}", site.journal())))?;
        site.await_exit()?;
        site.await_container_gone()?;
    }
    Ok(())
}

pub fn user_namespaces(host: &Host, manager: Manager) -> Result<()> {
    let lines: &[&str] = match manager {
        Manager::System => &["UIDMap=0:300000:65536\nGIDMap=0:300000:65536"],
        Manager::User(_) => &["UserNS=keep-id", "UserNS=nomap", "User=1000"],
    };
    for line in lines {
        let mut plan = Plan::busybox("exec nc -ll -p 7 -e /bin/cat", "--exit-idle-time 300ms");
        plan.container.push_str(&format!(
            "\n{line}\nAddCapability=NET_BIND_SERVICE\nSysctl=net.ipv4.ip_unprivileged_port_start=0"
        ));
        let site = Site::new(host, manager, "mapped", &plan)?;
        site.check_echo().map_err(|error| error.context(format!("{line}\n{}", site.journal())))?;
        site.await_exit()?;
    }
    Ok(())
}

pub fn process_and_namespace(host: &Host, manager: Manager) -> Result<()> {
    let target = Site::new(host, manager, "placed", &Plan::service(manager, 0.0, ""))?;
    target.check_echo()?;
    let pid = manager.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", "systemd-placed"])?;
    for (name, place) in
        [("by-pid", format!("--pid {pid}")), ("by-netns", format!("--netns /proc/{pid}/ns/net"))]
    {
        let forward = format!("{place} --exit-idle-time 300ms 127.0.0.1:{INNER}");
        // Its own container is never started.
        let plan = Plan { forward, ..Plan::busybox("exit 1", "") };
        let site = Site::new(host, manager, name, &plan)?;
        for _ in 0..2 {
            site.check_echo().map_err(|error| error.context(format!("{place}\n{}", site.journal())))?;
            site.await_exit()?;
        }
    }
    ensure!(manager.show(host, "placed.service", "ActiveState")? == "active");
    Ok(())
}

pub fn two_sockets(host: &Host, manager: Manager) -> Result<()> {
    let script = "nc -ll -p 71 -e /bin/echo first & exec nc -ll -p 72 -e /bin/echo second";
    let plan = Plan {
        forward:
            "--unit {name}.service --container systemd-{name} --exit-idle-time 1s --target a=127.0.0.1:71 \
                  --target b=127.0.0.1:72"
                .into(),
        service: "Sockets={name}-in.socket {name}-b.socket",
        ..Plan::busybox(script, "")
    };
    let site = Site::new(host, manager, "two", &plan)?;
    let second = host.free_port()?;
    let socket = |name: &str, port: u16| {
        format!("[Socket]\nListenStream=0.0.0.0:{port}\nFileDescriptorName={name}\nService=two-in.service\n")
    };
    manager.systemctl(host, &["stop", "two-in.socket"])?;
    manager.unit(host, "two-in.socket", &socket("a", site.port))?;
    manager.unit(host, "two-b.socket", &socket("b", second))?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", "two-in.socket", "two-b.socket"])?;
    let answer = ask(host.connect(second)?, b"")?;
    ensure!(answer == b"second\n", "{}", String::from_utf8_lossy(&answer));
    let answer = site.ask(b"")?;
    ensure!(answer == b"first\n", "{}", String::from_utf8_lossy(&answer));
    site.await_exit()?;
    manager.systemctl(host, &["stop", "two-b.socket"])?;
    Ok(())
}

pub fn other_listeners(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "listener", &Plan::service(manager, 0.2, "--exit-idle-time 500ms"))?;
    site.change_socket(&format!("ListenStream=[::1]:{}", site.port))?;
    let answer = ask(host.connect_to((Ipv6Addr::LOCALHOST, site.port).into())?, b"over IPv6")?;
    ensure!(answer == b"over IPv6");
    site.await_exit()?;

    let path = match manager {
        Manager::System => "/run/listener.sock".into(),
        Manager::User(user) => format!("/run/user/{}/listener.sock", host.uid(user)?),
    };
    site.change_socket(&format!("ListenStream={path}"))?;
    let mut client = UnixStream::connect(host.path(&path))?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.write_all(b"over a unix socket")?;
    client.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer)?;
    ensure!(answer == b"over a unix socket");
    site.await_exit()?;
    let ended = site.ended(2)?;
    ensure!(text(&ended[0], "BRO_PEER").starts_with("[::1]:"), "{}", ended[0]);
    ensure!(text(&ended[1], "BRO_PEER").starts_with("unix:uid=0,"), "{}", ended[1]);
    Ok(())
}
