//! The forwarder in its own unit, with systemd's filters, and one more that looks at whole words: a wake by D-Bus, the container's
//! namespace, the table of listeners, the relay, a reload and the end when it is idle.

use anyhow::{Context as _, Result, ensure};
use bro_tests::bro;
use bro_tests::host::site::{PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};

use crate::activated::expect_asleep;

pub fn nothing_undefined(host: &Host, manager: Manager) -> Result<()> {
    host.install(&bro::helper(), "/usr/local/bin/peer")?;
    let plan = Plan::service(manager, 0.2, "");
    let site = Site::activated(host, manager, "strict", &plan, &["--exit-idle-time", "3s"])?;
    let unit = manager.systemctl(host, &["cat", &site.forwarder()])?;
    ensure!(unit.contains("\nRestrictAddressFamilies="), "no filter of systemd's: {unit}");
    let (_, line) = unit.split_once("\nExecStart=").context("it starts something")?;
    // It may go on in further lines.
    let line: String = line
        .split_inclusive('\n')
        .scan(true, |goes_on, line| std::mem::replace(goes_on, line.ends_with("\\\n")).then_some(line))
        .collect();
    let text = format!("[Service]\nExecStart=\nExecStart=/usr/local/bin/peer strict {line}\n");
    manager.unit(host, &format!("{}.d/strict.conf", site.forwarder()), &text)?;
    manager.systemctl(host, &["daemon-reload"])?;
    for _ in 0..2 {
        site.check_echo().with_context(|| site.journals())?;
        let held = site.held()?;
        let main = site.forwarder_show("MainPID")?;
        let filters =
            host.run(&["sed", "-n", "s/^Seccomp_filters:\\t//p", &format!("/proc/{main}/status")])?;
        ensure!(filters.parse::<usize>()? > 1, "{filters} filters");
        manager.systemctl(host, &["reload", &site.forwarder()])?;
        let taken_over = || Ok(!["0", &main].contains(&site.forwarder_show("MainPID")?.as_str()));
        host.wait_until("a successor", PATIENCE, taken_over).with_context(|| site.journals())?;
        site.check_echo().context("after a reload").with_context(|| site.journals())?;
        drop(held);
        expect_asleep(&site).with_context(|| site.journals())?;
    }
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    Ok(())
}
