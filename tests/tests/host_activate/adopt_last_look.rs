//! The last moment of a service that accepts its clients itself: whom it accepts then is cut off by its end, so it is to accept none.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::site::{INNER, PATIENCE, Plan, Site, ask};
use bro_tests::host::{Host, Manager};

use crate::activated::activate;

const SLOW: &str = "/srv/slow.py";

/// A client that comes while the unit is being stopped, to a service that takes longer for its answer than Podman for the stop signal.
pub fn last_moment(host: &Host, manager: Manager) -> Result<()> {
    // A machine that is busy may look too late.
    const ROUNDS: usize = 8;
    const ENOUGH: usize = 2;
    host.write(SLOW, include_str!("../../host/slow.py"))?;
    let container = format!(
        "Rootfs={}:O\nVolume={SLOW}:{SLOW}:ro\nExec=/usr/bin/python3 {SLOW} {INNER} 0.3\n[Service]\nRestart=always",
        manager.image()
    );
    let options = ["--adopt", "--trust-loopback", "--exit-idle-time", "1s"];
    let site = Site::activated(host, manager, "adopted", &Plan::new(&container, "", ""), &options)?;
    let answered = |when: &str| {
        let answer = ask(site.client()?, b"").with_context(|| site.journals())?;
        ensure!(answer == b"answer", "{when}: {:?}\n{}", String::from_utf8_lossy(&answer), site.journals());
        Ok(())
    };
    let (mut seen, mut rounds) = (0, 0);
    while seen < ENOUGH && rounds < ROUNDS {
        rounds += 1;
        answered("while it runs")?;
        let mut state = String::new();
        host.wait_until("its end", PATIENCE, || {
            state = manager.show(host, &site.unit(), "ActiveState")?;
            Ok(state != "active")
        })?;
        seen += usize::from(state == "deactivating");
        answered("at its end")?;
    }
    note(&format!("{manager:?}: {seen} of {rounds} clients came while the unit was being stopped"));
    ensure!(seen > 0, "no client came while the unit was being stopped");
    // A forwarder that was killed during such a look has left it frozen.
    ensure!(activate(host, manager, "adopted --exit-idle-time 1min")?.success());
    answered("before it is frozen")?;
    manager.systemctl(host, &["freeze", &site.unit()])?;
    host.run(&["kill", "-KILL", &site.forwarder_show("MainPID")?])?;
    answered("frozen, by a forwarder that was killed")?;
    // Its own end is none that systemd would start it anew for, or call failed.
    let journal = manager.journal(host, &site.unit())?;
    ensure!(!journal.contains("Scheduled restart") && !journal.contains("Failed with result"), "{journal}");
    ensure!(activate(host, manager, "adopted --remove")?.success());
    Ok(())
}
