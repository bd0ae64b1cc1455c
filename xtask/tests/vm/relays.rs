//! Services that clients wake, and what carries the clients' bytes.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::vm::Machine;
use serde_json::Value;

use crate::site::Site;

/// How many connections a service has to show what kind of sockets it uses; the first one does.
const CONNECTIONS: usize = 5;

/// Woken by a client, asleep again, woken again; bytes take the kernel's lane.
pub fn kernel(site: &Site<'_>) -> Result<()> {
    site.check_echo()?;
    let mut report = Value::Null;
    for _ in 0..CONNECTIONS {
        // Small requests: where FIONREAD lies, large ones are spliced. Connected while the forwarder is asked: it is awake then.
        let client = site.client()?;
        for round in 0..5 {
            client.expect_echo("ping").with_context(|| format!("message {round}: {}", site.journals()))?;
        }
        report = site.report()?;
        if report["total"]["kernel"].as_u64() > Some(0) {
            break;
        }
    }
    ensure!(report["relay"]["name"] == "sockmap", "{report:#}\n{}", site.journals());
    ensure!(
        report["total"]["kernel"].as_u64() > Some(0),
        "no byte took a lane: {report:#}\n{}",
        site.journals()
    );
    twice(site)
}

/// The same, without the kernel relay.
pub fn splice(site: &Site<'_>) -> Result<()> {
    site.check_echo()?;
    let client = site.client()?;
    client.expect_echo("ping")?;
    let report = site.report()?;
    drop(client);
    ensure!(report["relay"]["name"] == "splice", "{report:#}\n{}", site.journals());
    let total = &report["total"];
    ensure!(total["kernel"] == 0 && total["spliced"].as_u64() >= Some(200_000), "{report:#}");
    twice(site)
}

/// Asleep after that, and awake again for the next client.
fn twice(site: &Site<'_>) -> Result<()> {
    site.await_idle_stop()?;
    site.check_echo().context("woken for the second time")?;
    site.await_idle_stop()
}

/// Each service is told to be well.
pub fn doctor(machine: &Machine) -> Result<()> {
    for site in Site::all(machine) {
        let ran = site.agent.try_run(&["bro", "doctor", site.name])?;
        ensure!(ran.success(), "{}: {}{}", site.name, ran.stdout, ran.stderr);
    }
    Ok(())
}

/// A set of programs for the user, whose service then asks for the kernel relay.
pub fn load(machine: &Machine) -> Result<()> {
    machine.root.run(&["systemctl", "enable", "--now", "bro-loader@1000.service"])?;
    let said = Site::rootless(machine).activate(&["--relay", "sockmap"])?;
    note(&format!("bro activate said: {}", said.replace('\n', " / ")));
    Ok(())
}
