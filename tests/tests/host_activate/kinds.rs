//! One echo service over every kind of socket that a unit can have.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::Plan;
use bro_tests::host::{Host, Manager};

use crate::activated::activate;

/// A container with the service, which listens besides at these addresses inside.
fn echo(host: &Host, manager: Manager, name: &str, inside: &str) -> Result<()> {
    let file = |what: &str| match manager {
        Manager::System => format!("/srv/{what}.py"),
        Manager::User(user) => format!("/srv/{what}-of-{user}.py"),
    };
    host.write(&file("echo"), include_str!("../../services/echo.py"))?;
    host.write(&file("echo_client"), include_str!("../../services/echo_client.py"))?;
    let container = format!(
        "Rootfs={}:O\nVolume={}:/srv/echo.py:ro\nTmpfs=/tmp\nStopSignal=SIGKILL\nExec=/usr/bin/python3 /srv/echo.py {inside}",
        manager.image(),
        file("echo")
    );
    Plan::new(&container, "", "").write_quadlet(host, manager, name)
}

/// A client of all of these has everything back.
fn expect_whole(host: &Host, manager: Manager, name: &str, addresses: &[String]) -> Result<()> {
    let client = match manager {
        Manager::System => "/srv/echo_client.py".to_owned(),
        Manager::User(user) => format!("/srv/echo_client-of-{user}.py"),
    };
    let mut command = vec!["python3", &client];
    command.extend(addresses.iter().map(String::as_str));
    let said = manager.run(host, &command).with_context(|| {
        let unit = |unit: &str| manager.journal(host, unit).unwrap_or_default();
        unit(&format!("{name}.service")) + &unit(&format!("{name}-activator.service"))
    })?;
    ensure!(said.trim() == format!("whole {}", addresses.len()), "{said}");
    Ok(())
}

/// Where unix sockets of this manager's are.
fn folder(host: &Host, manager: Manager) -> Result<String> {
    Ok(match manager {
        Manager::System => "/run".to_owned(),
        Manager::User(user) => format!("/run/user/{}", host.uid(user)?),
    })
}

/// It takes them all over from systemd, in one activation, in a container without a network.
pub fn direct(host: &Host, manager: Manager) -> Result<()> {
    echo(host, manager, "kinds", "")?;
    let (folder, port) = (folder(host, manager)?, host.free_port()?);
    let words = format!(
        "kinds --direct --external-port 127.0.0.1:{port}/tcp+udp --external-port six=[::1]:{port}/tcp+udp \
         --external-port stream={folder}/kinds-stream --external-port datagrams=dgram:{folder}/kinds-datagrams \
         --external-port messages=seqpacket:{folder}/kinds-messages"
    );
    let activated = activate(host, manager, &words)?;
    ensure!(activated.success(), "{activated:?}");
    let mut addresses = Vec::new();
    for at in [format!("127.0.0.1:{port}"), format!("::1:{port}")] {
        addresses.extend(["tcp", "udp"].map(|kind| format!("{kind}:{at}")));
    }
    addresses.extend(["stream", "datagrams", "messages"].map(|kind| format!("{kind}:{folder}/kinds-{kind}")));
    expect_whole(host, manager, "kinds", &addresses)?;
    let removed = activate(host, manager, "kinds --remove")?;
    ensure!(removed.success(), "{removed:?}");
    manager.systemctl(host, &["stop", "kinds.service"])?;
    Ok(())
}

/// A unix socket for datagrams, which the forwarder relays.
pub fn unix_datagrams(host: &Host, manager: Manager) -> Result<()> {
    echo(host, manager, "letters", "datagrams:/tmp/in.sock")?;
    let at = format!("{}/letters.sock", folder(host, manager)?);
    let words =
        format!("letters --external-port dgram:{at} --internal-port /tmp/in.sock --exit-idle-time 1min");
    let activated = activate(host, manager, &words)?;
    ensure!(activated.success() && activated.stderr.is_empty(), "{activated:?}");
    expect_whole(host, manager, "letters", &[format!("datagrams:{at}")])?;
    manager.run(host, &["bro", "sleep", "--force", "letters"])?;
    let removed = activate(host, manager, "letters --remove")?;
    ensure!(removed.success(), "{removed:?}");
    Ok(())
}
