//! `bro doctor NAME` and `bro status`, on services made by `bro activate` that are then broken in one way each.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::{Host, Manager, Ran};
use serde_json::Value;

use crate::site::{INNER, python};

/// An activated service. Dropping it removes it.
struct Service<'h> {
    host: &'h Host,
    manager: Manager,
    name: String,
    port: u16,
}

impl<'h> Service<'h> {
    fn new(host: &'h Host, manager: Manager, name: &str, container: &str, inner: u16) -> Result<Self> {
        let service = Self { host, manager, name: name.into(), port: host.free_port()? };
        let quadlet = format!("[Container]\nNetwork=none\n{container}\n");
        manager.quadlet(host, &format!("{name}.container"), &quadlet)?;
        manager.systemctl(host, &["daemon-reload"])?;
        let (external, internal) = (format!("127.0.0.1:{}", service.port), inner.to_string());
        let activate =
            service.bro(&["activate", name, "--external-port", &external, "--internal-port", &internal])?;
        ensure!(activate.success(), "{activate:?}");
        Ok(service)
    }

    fn bro(&self, args: &[&str]) -> Result<Ran> {
        self.manager.try_run(self.host, &[&["bro"], args].concat())
    }

    fn unit(&self, kind: &str) -> String {
        format!("{}-activator.{kind}", self.name)
    }

    /// The doctor's findings that are not well.
    fn bad(&self, args: &[&str]) -> Result<Vec<String>> {
        let ran = self.bro(&[&["doctor", &self.name, "--json"], args].concat())?;
        let checks: Vec<Value> = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
        let bad: Vec<String> =
            checks.iter().filter(|check| check["outcome"] == "bad").map(Value::to_string).collect();
        ensure!(ran.success() == bad.is_empty() && (ran.success() || ran.code == 1), "{ran:?}");
        ensure!(bad.iter().all(|check| check.contains("\"fix\"")), "a finding without a fix: {bad:#?}");
        Ok(bad)
    }

    /// Just one thing is wrong, in these words.
    fn expect(&self, args: &[&str], words: &[&str]) -> Result<()> {
        let bad = self.bad(args)?;
        ensure!(bad.len() == 1 && words.iter().all(|word| bad[0].contains(word)), "not {words:?}: {bad:#?}");
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        let ran = self.bro(&["status", "--json"])?;
        let services: Vec<Value> = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
        let ours = services.into_iter().find(|service| service["name"] == self.name.as_str());
        ours.with_context(|| format!("{} is missing", self.name))
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        self.bro(&["activate", &self.name, "--remove"]).ok();
        self.manager.systemctl(self.host, &["stop", &format!("{}.service", self.name)]).ok();
    }
}

pub fn status_of_services(host: &Host, manager: Manager) -> Result<()> {
    let service = Service::new(host, manager, "seen", &python(manager, 0.5), INNER)?;
    let asleep = service.status()?;
    ensure!(asleep["state"] == "asleep" && asleep["unit"] == "seen.service", "{asleep}");
    let mut client = host.connect(service.port)?;
    client.write_all(b"hello")?;
    host.wait_until("status says starting or awake", crate::site::PATIENCE, || {
        Ok(matches!(service.status()?["state"].as_str(), Some("starting" | "awake")))
    })?;
    client.read_exact(&mut [0; 5])?;
    let awake = service.status()?;
    let peer = client.local_addr()?.to_string();
    ensure!(awake["state"] == "awake" && awake["woken_by"] == peer.as_str(), "{awake}");
    ensure!(awake["connections"] == 1 && awake["since"].is_u64(), "{awake}");
    let line = service.bro(&["status"])?.stdout;
    ensure!(line.contains("awake for") && line.contains(&peer) && line.contains("1 connection"), "{line}");
    let detail = service.bro(&["status", "seen"])?.stdout;
    ensure!(detail.contains("relay") && detail.contains("127.0.0.1:7"), "{detail}");
    ensure!(service.bro(&["status", "nosuch"])?.code == 4, "an unknown service");
    drop(client);
    let slept = service.bro(&["sleep", "seen"])?;
    ensure!(slept.success() || slept.stderr.contains("clients"), "{slept:?}");
    host.wait_until("it is put to sleep", crate::site::PATIENCE, || {
        Ok(service.bro(&["sleep", "seen"])?.success() && service.status()?["state"] == "asleep")
    })?;
    manager.systemctl(host, &["stop", &service.unit("socket")])?;
    let deaf = service.status()?;
    ensure!(deaf["state"] == "deaf", "{deaf}");
    Ok(())
}

pub fn doctor_of_a_service(host: &Host, manager: Manager) -> Result<()> {
    let service = Service::new(host, manager, "ill", &python(manager, 0.1), INNER)?;
    ensure!(service.bad(&[])?.is_empty(), "healthy: {:#?}", service.bad(&[])?);
    ensure!(service.bad(&["--wake"])?.is_empty(), "healthy: {:#?}", service.bad(&["--wake"])?);
    ensure!(service.bro(&["doctor", "nosuch"])?.code == 4, "an unknown service");

    let socket = service.unit("socket");
    manager.systemctl(host, &["disable", &socket])?;
    service.expect(&[], &["not after the next boot", &format!("enable {socket}")])?;
    manager.systemctl(host, &["enable", &socket])?;

    manager.systemctl(host, &["stop", &socket, &service.unit("service")])?;
    service.expect(&[], &["nothing listens at"])?;
    let taken = host.in_network(|| Ok(std::net::TcpListener::bind(("127.0.0.1", service.port))?))?;
    service.expect(&[], &["is taken by"])?;
    drop(taken);
    // Another unit of the same service manager has the port.
    let squat = format!("[Socket]\nListenStream=127.0.0.1:{}\n", service.port);
    manager.unit(host, "squat.socket", &squat)?;
    manager.unit(host, "squat.service", "[Service]\nExecStart=/bin/true\n")?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", "squat.socket"])?;
    let named = service.expect(&[], &["is taken by squat.socket"]);
    manager.systemctl(host, &["stop", "squat.socket"])?;
    named?;
    manager.systemctl(host, &["start", &socket])?;
    ensure!(service.bad(&[])?.is_empty(), "mended: {:#?}", service.bad(&[])?);

    if let Manager::User(user) = manager {
        let file = host.path(&format!("/var/lib/systemd/linger/{user}"));
        std::fs::remove_file(&file)?;
        let found = service.expect(&[], &["linger", "enable-linger"]);
        std::fs::write(&file, "")?;
        found?;
    }

    // The container listens at another port than the one that clients are connected to.
    let other = Service::new(host, manager, "elsewhere", &python(manager, 0.0), INNER + 1)?;
    manager.systemctl(host, &["start", "elsewhere.service"])?;
    host.wait_until("the doctor sees where it listens", crate::site::PATIENCE, || {
        Ok(other.bad(&[])?.iter().any(|bad| bad.contains("it listens at 127.0.0.1:7")))
    })?;

    let pulled = Service::new(host, manager, "unpulled", "Image=localhost/nosuch\nPull=never", INNER)?;
    pulled.expect(&[], &["localhost/nosuch is not here", "podman pull"])?;
    let failed = pulled.bad(&["--wake"])?;
    ensure!(failed.iter().any(|bad| bad.contains("unpulled.service")), "{failed:#?}");

    // What is to bring the image is not there, so Podman's generator makes no unit.
    let path = manager.quadlet_path("ill.container");
    let quadlet = host.run(&["cat", &path])?;
    manager.quadlet(host, "ill.container", "[Container]\nNetwork=none\nImage=gone.image\n")?;
    manager.systemctl(host, &["daemon-reload"])?;
    let bad = service.bad(&[])?;
    ensure!(bad.iter().any(|bad| bad.contains("systemd knows no gone-image.service")), "{bad:#?}");
    manager.quadlet(host, "ill.container", &quadlet)?;
    manager.systemctl(host, &["daemon-reload"])?;

    // The quadlet is renamed away.
    std::fs::remove_file(host.path(&path))?;
    ensure!(
        service.bad(&[])?.iter().any(|bad| bad.contains("removed or renamed")),
        "{:#?}",
        service.bad(&[])?
    );
    manager.systemctl(host, &["stop", "ill.service"])?;
    manager.systemctl(host, &["daemon-reload"])?;
    let bad = service.bad(&[])?;
    ensure!(bad.iter().any(|bad| bad.contains("generator did not make it")), "{bad:#?}");
    Ok(())
}
