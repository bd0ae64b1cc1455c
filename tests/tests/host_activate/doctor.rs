//! `bro status` and `bro doctor NAME` about activated services: what they say of a well one, and of each thing that can be wrong.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{Plan, Site};
use bro_tests::host::{Host, Manager};

use crate::activated::activate;

pub fn status_and_doctor(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::service(manager, 0.0, "");
    let site = Site::activated(host, manager, "patient", &plan, &["--exit-idle-time", "1min"])?;
    let status = || -> Result<String> {
        let all = manager.run(host, &["bro", "status"])?;
        let mine = all.lines().find(|line| line.starts_with("patient "));
        Ok(mine.with_context(|| format!("it is not listed: {all}"))?.to_owned())
    };
    let doctor = |words: &[&str]| manager.try_run(host, &[&["bro", "doctor", "patient"], words].concat());
    /// The lines that are not ok, each of which has to say how to mend it.
    fn complaints(said: &str) -> Vec<&str> {
        said.lines().filter(|line| !line.starts_with("ok")).collect()
    }

    ensure!(status()?.contains("asleep"), "{}", status()?);
    let well = doctor(&[])?;
    ensure!(well.success() && complaints(&well.stdout).is_empty(), "{well:?}");
    let client = site.client()?;
    host.wait_until("it is awake", bro_tests::host::site::PATIENCE, || Ok(status()?.contains("awake")))?;
    ensure!(status()?.contains(&client.local_addr()?.to_string()), "who woke it? {}", status()?);
    let well = doctor(&[])?;
    ensure!(well.success() && complaints(&well.stdout).is_empty(), "{well:?}");
    drop(client);
    manager.run(host, &["bro", "sleep", "--force", "patient"])?;
    ensure!(status()?.contains("asleep"), "{}", status()?);

    let ill = |what: &str, part: &str, words: &[&str]| -> Result<()> {
        let said = doctor(words)?;
        let all = complaints(&said.stdout).join("\n");
        ensure!(said.code == 1, "{what}: exit code {}: {said:?}", said.code);
        ensure!(all.contains(part), "{what}: no “{part}” in: {}", said.stdout);
        Ok(())
    };
    manager.systemctl(host, &["stop", &site.socket()])?;
    ill("the socket is stopped", &site.socket(), &[])?;
    manager.systemctl(host, &["start", &site.socket()])?;
    manager.systemctl(host, &["disable", &site.socket()])?;
    ill("the socket is not enabled", "enable", &[])?;
    manager.systemctl(host, &["enable", &site.socket()])?;

    // It listens, but somewhere else.
    let ran = activate(host, manager, "patient --external-port 0.0.0.0:1 --internal-port 99 --dry-run")?;
    ensure!(ran.success(), "{ran:?}");
    let external = format!("patient --external-port 0.0.0.0:{} --internal-port 99", site.port);
    ensure!(activate(host, manager, &external)?.success());
    manager.systemctl(host, &["start", &site.unit()])?;
    host.wait_until("it listens", bro_tests::host::site::PATIENCE, || {
        Ok(doctor(&[])?.stdout.contains("127.0.0.1:7"))
    })?;
    ill("it listens elsewhere", "127.0.0.1:99", &[])?;
    manager.systemctl(host, &["stop", &site.unit()])?;

    Plan::new("Image=localhost/nosuch\nPull=never", "", "").write_quadlet(host, manager, "patient")?;
    manager.systemctl(host, &["daemon-reload"])?;
    ill("the image is missing", "localhost/nosuch", &[])?;
    let unknown = manager.try_run(host, &["bro", "doctor", "nosuch"])?;
    ensure!(unknown.code == 4 && unknown.stderr.lines().count() == 1, "{unknown:?}");
    ensure!(activate(host, manager, "patient --remove")?.success());
    Ok(())
}
