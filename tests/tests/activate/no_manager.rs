//! What `bro status` and `bro doctor` say of a service where neither systemd nor Podman can be asked.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::tree::{Said, Tree, environment, said};

/// A user's service, and no service manager of that user.
struct Alone(Tree);

impl Alone {
    fn new(quadlet: &str) -> Result<Self> {
        let tree = Tree::new(&[("home/test/.config/containers/systemd/lone.container", quadlet)])?;
        let mut activate = tree.command(&["lone", "--user", "--external-port", "127.0.0.1:8080"]);
        let ran = said(&mut activate)?;
        ensure!(ran.code == 0, "{ran:?}");
        Ok(Self(tree))
    }

    fn bro(&self, arguments: &[&str]) -> Result<Said> {
        let mut command = Command::new(bro_tests::bro::binary());
        environment(command.args(arguments));
        command
            .env("XDG_CONFIG_HOME", self.0.path("home/test/.config"))
            .env("XDG_RUNTIME_DIR", self.0.path("run/none"))
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent/bus")
            .env("PATH", "/nonexistent");
        said(&mut command)
    }

    /// What doctor says of one thing.
    fn check(&self, name: &str) -> Result<(String, String)> {
        let ran = self.bro(&["doctor", "lone", "--user", "--json"])?;
        let checks: Vec<Value> = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
        let found =
            checks.iter().find(|check| check["name"] == name).with_context(|| format!("{checks:#?}"))?;
        Ok((found["outcome"].as_str().unwrap_or_default().to_owned(), found.to_string()))
    }
}

#[test]
fn who_does_not_run_does_not_listen() -> Result<()> {
    let alone = Alone::new("[Container]\nImage=localhost/lone\n")?;
    for name in ["lone", "lone.container", "lone.service", "lone-activator.socket"] {
        let ran = alone.bro(&["status", "--user", name])?;
        ensure!(ran.code == 0 && ran.stdout.starts_with("lone: not listening"), "{name}: {ran:?}");
    }
    let ran = alone.bro(&["status", "--user", "--json", "lone"])?;
    let services: Vec<Value> = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
    ensure!(
        services.len() == 1 && services[0]["state"] == "deaf" && services[0]["name"] == "lone",
        "{services:?}"
    );
    ensure!(alone.bro(&["status", "--user", "nosuch"])?.code == 4, "an unknown service");
    Ok(())
}

#[test]
fn without_podman_an_image_is_unknown() -> Result<()> {
    let alone = Alone::new("[Container]\nImage=localhost/lone\n")?;
    let (outcome, said) = alone.check("image")?;
    ensure!(
        outcome == "bad" && said.contains("podman is not there") && !said.contains("is not here"),
        "{said}"
    );
    let (outcome, said) = alone.check("service manager")?;
    ensure!(outcome == "bad", "{said}");
    Ok(())
}
