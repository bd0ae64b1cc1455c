//! Users: whose manager is commanded, and whose containers may be entered.

use anyhow::{Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::failures::{forward, one_sentence};
use crate::site::{Plan, Site, text};

/// The port may be below 1024 and the socket the system's, while forwarder and container are an ordinary user's.
pub fn bus_without_environment(host: &Host) -> Result<()> {
    let (user, system) = (Manager::User("test"), Manager::System);
    for (name, scope) in [("plain", ""), ("asked", "--user ")] {
        let mut plan = Plan::service(user, 0.2, &format!("{scope}--exit-idle-time 500ms"));
        plan.service =
            "User=test\nNoNewPrivileges=yes\nUnsetEnvironment=XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS";
        let site = Site::with_front(host, user, system, name, &plan)?;
        for _ in 0..2 {
            site.check_echo().map_err(|error| error.context(site.journal()))?;
            site.await_exit()?;
            site.await_container_gone()?;
        }
    }
    Ok(())
}

pub fn somebody_elses(host: &Host) -> Result<()> {
    let other = Manager::User("other");
    let theirs = Site::new(host, other, "theirs", &Plan::busybox("exec nc -ll -p 7 -e /bin/cat", ""))?;
    theirs.check_echo()?;
    let test = Manager::User("test");
    let pid = other.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", "systemd-theirs"])?;
    // The container is not in this user's Podman: to them it does not exist.
    one_sentence(&forward(host, test, &["--container", "systemd-theirs"])?, 4)?;
    // The process is there for all to see.
    one_sentence(&forward(host, test, &["--pid", &pid])?, 5)?;
    one_sentence(&forward(host, test, &["--pid", "1"])?, 5)?;
    host.sh("ip netns add roots")?;
    let namespace = forward(host, test, &["--netns", "/run/netns/roots"]);
    host.sh("ip netns delete roots")?;
    one_sentence(&namespace?, 5)
}

pub fn systems_manager(host: &Host) -> Result<()> {
    let test = Manager::User("test");
    let site = Site::new(host, test, "system", &Plan::busybox("exec nc -ll -p 7 -e /bin/cat", "--system"))?;
    site.expect_reset()?;
    ensure!(text(&site.ended(1)?[0], "BRO_REASON") == "start-failed", "{}", site.journal());
    ensure!(site.errors()?.len() == 1, "{:#?}", site.errors()?);
    Ok(())
}
