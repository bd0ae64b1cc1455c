//! What clients and administrators see when something is wrong with the container.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bro_tests::host::{Host, Manager, Ran};

use crate::site::{Plan, Site, folder, text};

pub fn dies_during_start(host: &Host, manager: Manager) -> Result<()> {
    let flags = folder(host, manager, "flags")?;
    let script = "sleep 0.3; test -e /flags/well || exit 3; exec nc -ll -p 7 -e /bin/cat";
    let mut plan = Plan::busybox(script, "");
    plan.container.push_str(&format!("\nVolume={flags}:/flags"));
    let site = Site::new(host, manager, "dies", &plan)?;
    for attempt in 1..=2 {
        let began = Instant::now();
        site.expect_reset()?;
        // Not only at the end of --start-timeout (90 s).
        ensure!(began.elapsed() < Duration::from_secs(20), "reset after {:?}", began.elapsed());
        let ended = site.ended(attempt)?;
        ensure!(text(&ended[attempt - 1], "BRO_REASON") == "start-failed", "{}", site.journal());
        let errors = site.await_errors(attempt)?;
        ensure!(
            errors[attempt - 1].contains("dies.service"),
            "it does not name the unit: {}",
            errors[attempt - 1]
        );
    }
    // The same forwarder serves once the container is well.
    let forwarder = site.forwarder_show("MainPID")?;
    host.write(&format!("{flags}/well"), "")?;
    site.check_echo()?;
    ensure!(
        site.forwarder_show("MainPID")? == forwarder,
        "the forwarder did not survive: {}",
        site.journal()
    );
    Ok(())
}

pub fn never_listens(host: &Host, manager: Manager) -> Result<()> {
    let site =
        Site::new(host, manager, "never", &Plan::busybox("exec sleep 1000", "--start-timeout 1500ms"))?;
    for attempt in 1..=2 {
        let began = Instant::now();
        site.expect_reset()?;
        let waited = began.elapsed();
        ensure!(
            // Not only at the end of the usual start timeout (90 s).
            (Duration::from_millis(1500)..Duration::from_secs(20)).contains(&waited),
            "reset after {waited:?}"
        );
        ensure!(
            text(&site.ended(attempt)?[attempt - 1], "BRO_REASON") == "start-timeout",
            "{}",
            site.journal()
        );
        site.await_errors(attempt)?;
    }
    Ok(())
}

pub fn cannot_start(host: &Host, manager: Manager) -> Result<()> {
    // Never pulled, so systemd's job itself fails.
    let plan = Plan::new("Image=localhost/nosuch\nPull=never", "", "127.0.0.1:7");
    let site = Site::new(host, manager, "noimage", &plan)?;
    site.expect_reset()?;
    ensure!(text(&site.ended(1)?[0], "BRO_REASON") == "start-failed", "{}", site.journal());
    let errors = site.await_errors(1)?;
    ensure!(errors[0].contains("noimage.service"), "{errors:#?}");
    Ok(())
}

pub fn unknown_unit(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::busybox("exit 0", "");
    plan.forward = plan.forward.replace("--unit {name}.service", "--unit nosuch.service");
    let site = Site::new(host, manager, "nounit", &plan)?;
    site.expect_reset()?;
    let errors = site.await_errors(1)?;
    ensure!(errors[0].contains("nosuch.service"), "{errors:#?}");
    ensure!(errors[0].contains("not found"), "systemd's reason is missing: {}", errors[0]);
    Ok(())
}

pub fn unknown_places(host: &Host, manager: Manager) -> Result<()> {
    for place in [["--container", "nosuch"], ["--pid", "4194000"], ["--netns", "/run/netns/nosuch"]] {
        let ran = forward(host, manager, &place)?;
        one_sentence(&ran, 4).map_err(|error| error.context(place.join(" ")))?;
    }
    Ok(())
}

/// `bro forward` by hand, which has to end by itself.
pub fn forward(host: &Host, manager: Manager, place: &[&str]) -> Result<Ran> {
    let start = ["timeout", "20", "bro", "forward", "--listen", "127.0.0.1:0"];
    let args: Vec<&str> = start.iter().chain(place).chain(&["127.0.0.1:80"]).copied().collect();
    manager.try_run(host, &args)
}

/// It ended with `code` and one sentence that begins with `bro: `.
pub fn one_sentence(ran: &Ran, code: i32) -> Result<()> {
    ensure!(ran.code == code, "exit code {} instead of {code}: {}", ran.code, ran.stderr);
    let lines: Vec<&str> = ran.stderr.lines().collect();
    ensure!(lines.len() == 1 && lines[0].starts_with("bro: "), "not one sentence: {}", ran.stderr);
    Ok(())
}
