//! One container behind one forwarder, as `bro activate` sets it up.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bro_tests::vm::{Agent, Client, Machine};
use serde_json::Value;

/// What is waited for takes seconds on an idle machine; processors are slow here, and may have neighbours.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The name of a quadlet, whose it is, and where its clients go.
pub struct Site<'m> {
    pub agent: &'m Agent,
    pub name: &'static str,
    pub port: u16,
}

impl<'m> Site<'m> {
    /// Root's, through the kernel relay.
    pub fn lane(machine: &'m Machine) -> Self {
        Self { agent: &machine.root, name: "lane", port: 8001 }
    }

    /// Root's, through splice.
    pub fn spliced(machine: &'m Machine) -> Self {
        Self { agent: &machine.root, name: "spliced", port: 8002 }
    }

    /// The user's, through what there is.
    pub fn rootless(machine: &'m Machine) -> Self {
        Self { agent: &machine.user, name: "home", port: 8003 }
    }

    pub fn all(machine: &'m Machine) -> [Self; 3] {
        [Self::lane(machine), Self::spliced(machine), Self::rootless(machine)]
    }

    /// Writes the quadlets and activates them.
    pub fn activate_all(machine: &Machine) -> Result<()> {
        let root = "/etc/containers/systemd";
        let user = "/home/test/.config/containers/systemd";
        for (site, folder, image, relay) in [
            (Site::lane(machine), root, "/srv/image", "sockmap"),
            (Site::spliced(machine), root, "/srv/image", "splice"),
            (Site::rootless(machine), user, "/srv/images/test", "auto"),
        ] {
            let quadlet = format!(
                "[Container]\\nNetwork=none\\nRootfs={image}:O\\n\
                 Volume=/run/brought/service.py:/srv/service.py:ro\\nExec=python3 /srv/service.py 7\\n"
            );
            let name = site.name;
            site.agent.sh(&format!("mkdir -p {folder}; printf '{quadlet}' >{folder}/{name}.container"))?;
            site.activate(&["--relay", relay]).with_context(|| name.to_owned())?;
        }
        Ok(())
    }

    /// `bro activate`, once more or with other options.
    pub fn activate(&self, options: &[&str]) -> Result<String> {
        let external = format!("127.0.0.1:{}", self.port);
        let activate = ["bro", "activate", self.name, "--external-port", &external, "--internal-port", "7"];
        self.agent.run(&[&activate[..], &["--exit-idle-time", "2s"], options].concat())
    }

    pub fn unit(&self) -> String {
        format!("{}.service", self.name)
    }

    pub fn forwarder(&self) -> String {
        format!("{}-activator.service", self.name)
    }

    pub fn socket(&self) -> String {
        format!("{}-activator.socket", self.name)
    }

    pub fn client(&self) -> Result<Client<'m>> {
        self.agent.client(self.port)
    }

    /// A client that wakes the service, or finds it awake, and has every byte back.
    pub fn check_echo(&self) -> Result<()> {
        self.agent.echo(self.port, 100_000).with_context(|| self.journals())
    }

    /// What the running forwarder says of itself.
    pub fn report(&self) -> Result<Value> {
        let said = self.agent.run(&["bro", "status", "--json", self.name])?;
        let reports: Value = serde_json::from_str(&said)?;
        let report = reports.get(0).filter(|report| report["relay"]["name"].is_string());
        report.cloned().with_context(|| format!("no forwarder runs: {said}"))
    }

    /// Forwarder and container have stopped by themselves, and well.
    pub fn await_idle_stop(&self) -> Result<()> {
        for unit in [self.forwarder(), self.unit()] {
            let stopped = || Ok(self.agent.show(&unit, "ActiveState")? == "inactive");
            self.agent
                .wait_until(&format!("the end of {unit}"), PATIENCE, stopped)
                .with_context(|| self.journals())?;
            let result = self.agent.show(&unit, "Result")?;
            ensure!(result == "success", "{unit} ended as {result}: {}", self.journals());
        }
        let exists = ["podman", "container", "exists", &format!("systemd-{}", self.name)].map(str::to_owned);
        let exists: Vec<&str> = exists.iter().map(String::as_str).collect();
        if self.agent.try_run(&exists)?.success() {
            bail!("the container is still there");
        }
        Ok(())
    }

    /// The process of the forwarder, and the program that it runs.
    pub fn program(&self) -> Result<(String, String)> {
        let pid = self.agent.show(&self.forwarder(), "MainPID")?;
        // Users may not see that of their own processes once these have had capabilities; but a user's forwarder has none.
        let program = self.agent.run(&["readlink", &format!("/proc/{pid}/exe")])?;
        Ok((pid, program))
    }

    /// The end of what forwarder and container have logged.
    pub fn journals(&self) -> String {
        let tail = |unit: &str| {
            let journal = self.agent.journal(unit).unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<&str> = journal.lines().collect();
            lines[lines.len().saturating_sub(30)..].join("\n")
        };
        format!("-- forwarder\n{}\n-- container\n{}", tail(&self.forwarder()), tail(&self.unit()))
    }
}
