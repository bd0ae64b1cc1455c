//! What a user has of it.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{PATIENCE, Plan, Site, echo, text};
use bro_tests::host::{Host, Manager};

use crate::{load, unload};

const TEST: Manager = Manager::User("test");

/// Connections until one takes the kernel's lane: the first ones show of which kind the service is.
pub fn expect_lane(site: &Site<'_>) -> Result<()> {
    for _ in 0..10 {
        if relay_of_the_next(site)? == "sockmap" {
            return Ok(());
        }
    }
    anyhow::bail!("no connection took a lane: {}", site.journal())
}

/// One connection more, and what relayed it.
pub fn relay_of_the_next(site: &Site<'_>) -> Result<String> {
    let relays = || -> Result<Vec<String>> {
        let records = site.front.journal_records(site.host, &site.forwarder())?;
        let ended = records.iter().filter(|record| record.get("BRO_DURATION_MS").is_some());
        Ok(ended.map(|record| text(record, "BRO_RELAY")).collect())
    };
    let before = relays()?.len();
    // Often enough for a lane.
    let client = site.client()?;
    for _ in 0..20 {
        echo(&client, b"ping")?;
    }
    drop(client);
    site.host.wait_until("the end of a connection", PATIENCE, || Ok(relays()?.len() > before))?;
    relays()?.pop().context("a connection")
}

fn expect_no_capabilities(site: &Site<'_>) -> Result<()> {
    let pid = site.forwarder_show("MainPID")?;
    let status = site.host.run(&["cat", &format!("/proc/{pid}/status")])?;
    let held =
        |set: &str| status.lines().any(|line| line.starts_with(set) && !line.ends_with("0000000000000000"));
    ensure!(!held("CapPrm:") && !held("CapEff:") && !held("CapAmb:"), "{status}");
    Ok(())
}

pub fn rootless_service(host: &Host) -> Result<()> {
    load(host, "test")?;
    let site = Site::new(host, TEST, "lane", &Plan::service(TEST, 0.0, "--relay=sockmap"))?;
    expect_lane(&site)?;
    expect_no_capabilities(&site)?;
    ensure!(site.journal().contains("the kernel relay is bro loader's"), "{}", site.journal());
    drop(site);
    unload(host, "test")
}

pub fn system_service_as_user(host: &Host) -> Result<()> {
    load(host, "test")?;
    let mut plan = Plan::service(TEST, 0.0, "--user --relay=sockmap");
    plan.service =
        "User=test\nNoNewPrivileges=yes\nUnsetEnvironment=XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS";
    let site = Site::with_front(host, TEST, Manager::System, "front", &plan)?;
    expect_lane(&site)?;
    expect_no_capabilities(&site)?;
    drop(site);
    unload(host, "test")
}

pub fn by_name(host: &Host) -> Result<()> {
    host.run(&["systemctl", "start", "bro-loader@other.service"])?;
    let other = Manager::User("other");
    let site = Site::new(host, other, "named", &Plan::service(other, 0.0, "--relay=sockmap"))?;
    expect_lane(&site)?;
    // The same user by number is the same set: neither unit may take it from the other.
    let number = format!("bro-loader@{}.service", host.uid("other")?);
    let second = host.try_run(&["systemctl", "start", &number])?;
    ensure!(!second.success(), "{second:?}");
    let why = Manager::System.journal(host, &number)?;
    ensure!(why.contains("is loaded for this user already, given by name"), "{why}");
    let removed = host.try_run(&["bro", "loader", "--remove", &host.uid("other")?.to_string()])?;
    ensure!(removed.code == 1, "{removed:?}");
    host.run(&["systemctl", "reset-failed", &number])?;
    expect_lane(&site)?;
    drop(site);
    host.run(&["systemctl", "stop", "bro-loader@other.service"])?;
    ensure!(!host.path(&format!("/run/bro/bpf/{}", host.uid("other")?)).exists(), "the pins are still there");
    Ok(())
}

pub fn loaded_anew(host: &Host) -> Result<()> {
    let uid = load(host, "test")?;
    let unit = format!("bro-loader@{uid}.service");
    let site = Site::new(host, TEST, "anew", &Plan::service(TEST, 0.0, "--relay=sockmap"))?;
    expect_lane(&site)?;
    let client = site.client()?;
    echo(&client, b"ping")?;
    for verb in ["reload", "restart", "stop"] {
        host.run(&["systemctl", verb, &unit])?;
        echo(&client, b"ping").with_context(|| verb.to_owned())?;
        // The forwarder has what it had.
        let relay = relay_of_the_next(&site)?;
        ensure!(relay == "sockmap", "after {verb} relayed by {relay}: {}", site.journal());
    }
    drop(client);
    host.run(&["systemctl", "start", &unit])?;
    site.front.systemctl(host, &["stop", &site.forwarder()])?;
    expect_lane(&site)?;
    drop(site);
    unload(host, "test")
}

pub fn doctor(host: &Host) -> Result<()> {
    let line = |what: &str| -> Result<String> {
        let said = host.try_run_as("test", &["bro", "doctor"])?.stdout;
        said.lines().find(|line| line.contains(what)).map(str::to_owned).with_context(|| said.clone())
    };
    let uid = host.uid("test")?;
    let absent = line(" loader:")?;
    ensure!(
        absent.starts_with("less") && absent.contains(&format!("systemctl enable --now bro-loader@{uid}")),
        "{absent}"
    );
    load(host, "test")?;
    let there = line(" loader:")?;
    ensure!(there.starts_with("ok") && there.contains("0 of 16 forwarders"), "{there}");
    let relay = line("kernel relay:")?;
    ensure!(relay.contains("loaded and tested"), "{relay}");
    unload(host, "test")
}

pub fn survives_reboot(host: &mut Host) -> Result<()> {
    let uid = load(host, "test")?;
    let port = {
        let site = Site::new(host, TEST, "again", &Plan::service(TEST, 0.0, "--relay=sockmap"))?;
        TEST.systemctl(host, &["enable", &site.socket()])?;
        let port = site.port;
        std::mem::forget(site);
        port
    };
    host.reboot()?;
    host.wait_until("the loader", PATIENCE, || {
        Ok(Manager::System.show(host, &format!("bro-loader@{uid}.service"), "ActiveState")? == "active")
    })?;
    let site = Site { host, manager: TEST, name: "again".into(), port, front: TEST, suffix: "in" };
    expect_lane(&site).with_context(|| site.journals())
}
