//! What is said of a service is so: why it could not be woken, what is in the way of its ports, with which settings it runs, what goes
//! down with it, and that nothing is left of it.

use std::net::TcpListener;

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{INNER, PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};
use serde_json::Value;

use crate::activated::{activate, expect_asleep};

/// The checks of `bro doctor NAME` that go by this name.
fn found(host: &Host, manager: Manager, name: &str, check: &str) -> Result<Vec<Value>> {
    let ran = manager.try_run(host, &["bro", "doctor", name, "--json"])?;
    let all: Vec<Value> = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
    Ok(all.into_iter().filter(|found| found["name"] == check).collect())
}

/// One that is bad, and says `part`.
fn bad(host: &Host, manager: Manager, name: &str, check: &str, part: &str) -> Result<String> {
    let all = found(host, manager, name, check)?;
    let one = all.iter().find(|one| one["outcome"] == "bad" && one["finding"].to_string().contains(part));
    let one = one.with_context(|| format!("no {check} that is bad and says “{part}”: {all:?}"))?;
    Ok(one["fix"].as_str().unwrap_or_default().to_owned())
}

/// Podman's own sentence stands in the forwarder's log, in status and in doctor; and what caused it is found before a client does.
pub fn podmans_own_words(host: &Host, manager: Manager) -> Result<()> {
    // This host's journal is volatile, so that it has no files of users' own: as if they were members of systemd-journal.
    host.sh("chmod -R o+rX /run/log/journal")?;
    // An image that is not there, and that may not be pulled.
    Plan::new("Image=localhost/nosuch\nPull=never", "", "").write_quadlet(host, manager, "imageless")?;
    let port = host.free_port()?;
    let words = format!("imageless --external-port 127.0.0.1:{port} --internal-port {INNER}");
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success(), "{ran:?}");
    let warning = ran.stderr.lines().find(|line| line.contains("localhost/nosuch is not here"));
    ensure!(warning.is_some_and(|line| line.starts_with("bro: warning: ")), "{}", ran.stderr);
    let site = Site {
        host,
        manager,
        name: "imageless".into(),
        port,
        front: manager,
        suffix: bro_tests::host::site::ACTIVATOR,
    };
    told(&site, &["Error:", "localhost/nosuch"])?;
    drop(site);

    // A port that another program has.
    let taken = host.free_port()?;
    let holder = host.in_network(|| Ok(TcpListener::bind(("127.0.0.1", taken))?))?;
    let mut plan = Plan::busybox("exec nc -ll -p 7 -e /bin/cat", "");
    plan.network = "";
    plan.container.push_str(&format!("\nPublishPort=127.0.0.1:{taken}:{INNER}"));
    let site = Site::activated(host, manager, "unpublished", &plan, &[])?;
    told(&site, &["Error:", &taken.to_string()])?;
    drop((site, holder));

    // The same where it is systemd that has it, for bro.
    let port = host.free_port()?;
    plan.container = plan.container.replace(&taken.to_string(), &port.to_string());
    plan.write_quadlet(host, manager, "clashing")?;
    let words = format!("clashing --external-port 127.0.0.1:{port} --internal-port {INNER}");
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success() && ran.stderr.contains("PublishPort="), "{ran:?}");
    bad(
        host,
        manager,
        "clashing",
        "ports",
        &format!("PublishPort=127.0.0.1:{port}:{INNER} in clashing.container"),
    )?;
    ensure!(activate(host, manager, "clashing --remove")?.success());
    Ok(())
}

/// A client is reset, and each place says why.
fn told(site: &Site<'_>, parts: &[&str]) -> Result<()> {
    let (host, manager, name) = (site.host, site.manager, site.name.as_str());
    site.expect_reset().with_context(|| site.journals())?;
    let says = |text: &str| parts.iter().all(|part| text.contains(part));
    let mut status = String::new();
    host.wait_until("the wake is noted as failed", PATIENCE, || {
        status = manager.run(host, &["bro", "status", name])?;
        Ok(status.contains("last wake failed"))
    })?;
    let line = status.lines().find(|line| line.contains("last wake failed")).unwrap_or_default();
    ensure!(says(line), "status does not say {parts:?}: {status}\n{}", site.journals());
    // It has failed, and is never called asleep.
    for words in [&[][..], &[name]] {
        let all = manager.run(host, &[&["bro", "status"], words].concat())?;
        ensure!(!all.lines().any(|line| line.contains(name) && line.contains("asleep")), "{all}");
    }
    let json: Value = serde_json::from_str(&manager.run(host, &["bro", "status", name, "--json"])?)?;
    let state = if json[0]["state"].is_string() && json[0]["pid"].is_null() {
        &json[0]["state"]
    } else {
        &json[0]["activity"]["state"]
    };
    ensure!(state == "failed", "{json}");
    let errors = site.errors()?;
    ensure!(errors.iter().any(|line| says(line)), "the log does not say {parts:?}: {errors:#?}");
    bad(host, manager, name, "unit", parts[1])?;
    bad(host, manager, name, "last wake", parts[1])?;
    Ok(())
}

/// Addresses of no interface, ports that an ordinary user may not have, and a readiness that never comes.
pub fn in_the_way(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::busybox("exec nc -ll -p 7 -e /bin/cat", "");
    let site = Site::activated(host, manager, "hindered", &plan, &["--ready", "healthy"])?;
    let fix = bad(host, manager, "hindered", "ready", "no HealthCmd= in hindered.container")?;
    ensure!(fix.contains("bro activate hindered --ready auto"), "{fix}");
    ensure!(activate(host, manager, "hindered --ready auto")?.success());
    ensure!(found(host, manager, "hindered", "ready")?.is_empty());

    // Of TEST-NET-3 (RFC 5737).
    let ran = activate(host, manager, &format!("hindered --external-port 203.0.113.7:{}", site.port))?;
    ensure!(
        ran.success() && ran.stderr.contains("no network interface has the address 203.0.113.7"),
        "{ran:?}"
    );
    let fix = bad(host, manager, "hindered", "ports", "203.0.113.7")?;
    let advised =
        fix.split('`').find(|part| part.contains("--external-port")).context("nothing is advised")?;
    let words: Vec<&str> = advised.split(' ').filter(|word| *word != "sudo").collect();
    ensure!(manager.try_run(host, &words)?.success(), "{words:?}");
    ensure!(found(host, manager, "hindered", "ports")?.is_empty());
    site.check_echo().with_context(|| site.journals())?;

    if let Manager::User(user) = manager {
        let ran = activate(host, manager, "hindered --external-port 81")?;
        let advised = format!(
            "sudo bro activate hindered --system --run-as {user} --external-port 81 --internal-port 127.0.0.1:{INNER}"
        );
        ensure!(ran.code == 5 && ran.stderr.contains(&advised), "{ran:?}");
    }
    let ran = activate(host, manager, "hindered --external-port 8080:80")?;
    ensure!(ran.code == 2 && ran.stderr.contains("--external-port 8080 --internal-port 80"), "{ran:?}");
    Ok(())
}

/// Changed settings are taken up where that disturbs no client, and else it is said that they are not, by doctor too.
pub fn settings_taken_up(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "settled", &Plan::service(manager, 0.0, ""), &[])?;
    let forwarder = || site.forwarder_show("MainPID");
    let client = site.client()?;
    host.wait_until("it is served", PATIENCE, || {
        Ok(manager.run(host, &["bro", "status", "settled"])?.contains("connections 1 open"))
    })?;
    let first = forwarder()?;
    let ran = activate(host, manager, "settled --start-timeout 80s")?;
    ensure!(ran.success() && ran.stdout.contains("with the settings from before"), "{ran:?}");
    ensure!(forwarder()? == first, "it was restarted under its client");
    let older = || -> Result<bool> {
        let all = found(host, manager, "settled", "forwarder")?;
        Ok(all
            .iter()
            .any(|one| one["outcome"] == "less" && one["finding"].to_string().contains("before its unit")))
    };
    ensure!(older()?, "{:?}", found(host, manager, "settled", "forwarder")?);
    drop(client);
    host.wait_until("the client is gone", PATIENCE, || {
        Ok(manager.run(host, &["bro", "status", "settled"])?.contains("connections 0 open"))
    })?;
    let ran = activate(host, manager, "settled --start-timeout 70s --exit-idle-time 1s")?;
    ensure!(ran.success() && ran.stdout.contains("had no client, and was restarted"), "{ran:?}");
    ensure!(forwarder()? != first && !older()?, "{:?}", found(host, manager, "settled", "forwarder")?);
    site.check_echo().with_context(|| site.journals())?;
    // Whose run it is has not been forgotten.
    expect_asleep(&site)
}

/// Who puts a service to sleep by force is told what else stops, before; and a service that is removed leaves nothing below /run.
pub fn taken_down(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "ground", &Plan::service(manager, 0.0, ""), &[])?;
    for (unit, needs) in [("house.service", "ground.service"), ("roof.service", "house.service")] {
        let text =
            format!("[Unit]\nRequires={needs}\nAfter={needs}\n[Service]\nExecStart=/bin/sleep infinity\n");
        manager.unit(host, unit, &text)?;
    }
    manager.systemctl(host, &["daemon-reload"])?;
    site.check_echo()?;
    manager.systemctl(host, &["start", "roof.service"])?;
    let refused = manager.try_run(host, &["bro", "sleep", "ground"])?;
    ensure!(refused.code == 1 && refused.stderr.contains("house.service needs it"), "{refused:?}");
    let forced = manager.try_run(host, &["bro", "sleep", "--force", "ground"])?;
    let said = "bro: house.service, roof.service, which need ground.service, are stopped along with it";
    ensure!(forced.success() && forced.stderr.contains(said), "{forced:?}");
    for unit in ["house.service", "roof.service"] {
        let state = manager.show(host, unit, "ActiveState")?;
        ensure!(matches!(state.as_str(), "inactive" | "failed"), "{unit} is {state}");
        manager.systemctl(host, &["reset-failed", unit]).ok();
    }
    site.check_echo().with_context(|| site.journals())?;

    let runtime = match manager {
        Manager::System => "/run/bro".to_owned(),
        Manager::User(user) => format!("/run/user/{}/bro", host.uid(user)?),
    };
    let left = || host.run(&["find", &runtime, "-name", "*ground*"]);
    ensure!(left()?.contains("use-ground.service"), "there is nothing that could be left: {}", left()?);
    ensure!(activate(host, manager, "ground --remove")?.success());
    ensure!(left()?.is_empty(), "{}", left()?);
    Ok(())
}
