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

/// The profile that [`denied`] confines a forwarder by.
pub const PROFILE: &str = "bro-tests-forwarder";

/// AppArmor forbids a forwarder what a wake takes: `bro doctor NAME` tries it, and says that it is a security module and which label.
pub fn denied(machine: &Machine) -> Result<()> {
    let (root, site) = (&machine.root, Site::lane(machine));
    let drop_in = format!("/etc/systemd/system/{}.d/50-tests.conf", site.forwarder());
    root.sh(&format!(
        "echo 'profile {PROFILE} flags=(attach_disconnected) {{ file, capability, network, deny network netlink, unix, deny ptrace, \
         signal, mount, umount, dbus, }}' | apparmor_parser --replace
         mkdir -p $(dirname {drop_in}); printf '[Service]\nAppArmorProfile={PROFILE}\n' >{drop_in}; systemctl daemon-reload"
    ))?;
    let ill = root.try_run(&["bro", "doctor", site.name])?;
    root.sh(&format!("rm -r $(dirname {drop_in}); systemctl daemon-reload"))?;
    note(ill.stdout.lines().find(|line| line.contains("confinement")).context("no word of the confinement")?);
    ensure!(!ill.success() && ill.stdout.contains(&format!("takes it for “{PROFILE}")), "{ill:?}");
    ensure!(root.try_run(&["bro", "doctor", site.name])?.success(), "doctor complains on");
    Ok(())
}

/// A set of programs for the user, whose service then asks for the kernel relay.
pub fn load(machine: &Machine) -> Result<()> {
    machine.root.run(&["systemctl", "enable", "--now", "bro-loader@1000.service"])?;
    let said = Site::rootless(machine).activate(&["--relay", "sockmap"])?;
    note(&format!("bro activate said: {}", said.replace('\n', " / ")));
    Ok(())
}
