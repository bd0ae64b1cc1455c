//! `bro loader` on a real host: the units that the packages install, two ordinary users with rootless containers, a system service
//! that runs as one of them, attempts to cross the line between them, and a reboot. `BRO_CASE=part` runs the cases so named.
//!
//! Needs: root, kernel BTF, mmdebstrap. Takes: 1 min.

mod crossing;
mod fence;
mod users;

use anyhow::{Result, ensure};
use bro_tests::host::cases::{Cases, note};
use bro_tests::host::site::{self, PATIENCE};
use bro_tests::host::{Host, NEEDS};

/// A case of this suite.
type OneCase = (&'static str, fn(&Host) -> Result<()>);

const CASES: &[OneCase] = &[
    ("a user's forwarder without any capability has the kernel relay", users::rootless_service),
    ("a system service that runs as the user has it too", users::system_service_as_user),
    ("by name, for a user who lingers", users::by_name),
    ("replaced, stopped and started under a live connection", users::loaded_anew),
    ("what bro doctor says", users::doctor),
    ("another user gets nowhere", crossing::other_user),
    ("another user's process in the same slice", crossing::in_the_same_slice),
    ("a process inside a container gets nowhere", crossing::inside_a_container),
    ("the loader's unit is a hard one", security),
    ("a fence around a socket unit", fence::of_a_socket_unit),
    ("a fence around a container", fence::of_a_container),
    ("a fence around a user's sockets", fence::of_a_user),
];

#[test]
fn loaders_on_a_real_host() {
    if !bro_tests::tier::met("loaders_on_a_real_host", &NEEDS) {
        return;
    }
    let cases = Cases::default();
    let mut host = Host::boot().expect("the host boots");
    note(&format!("the host booted in {:.1} s", host.booted_in().as_secs_f64()));
    site::prepare(&host).expect("the host can be prepared");
    install(&host).expect("the units can be installed");
    for (name, case) in CASES {
        cases.on(&host, name, || case(&host));
    }
    cases.rebooting(&mut host, "a reboot", users::survives_reboot);
    cases.conclude();
}

/// Puts the packages' units where packages put them.
fn install(host: &Host) -> Result<()> {
    for (name, text) in [
        ("bro-loader@.service", include_str!("../../../packaging/systemd/system/bro-loader@.service")),
        ("bro-fence@.service", include_str!("../../../packaging/systemd/system/bro-fence@.service")),
        ("run-bro-bpf.mount", include_str!("../../../packaging/systemd/system/run-bro-bpf.mount")),
    ] {
        host.write(&format!("/etc/systemd/system/{name}"), text)?;
    }
    host.sh("ln -sf /usr/local/bin/bro /usr/bin/bro; systemctl daemon-reload")?;
    let said = host
        .run(&["systemd-analyze", "verify", "/etc/systemd/system/bro-loader@1000.service"])
        .unwrap_or_default();
    ensure!(!said.contains("Unknown"), "{said}");
    Ok(())
}

/// What systemd thinks of the unit, between 0 and 10.
fn security(host: &Host) -> Result<()> {
    let said = host.run(&["systemd-analyze", "security", "--no-pager", "bro-loader@1000.service"])?;
    let line = said.lines().find(|line| line.contains("Overall exposure level"));
    let score = line.and_then(|line| line.split_whitespace().find_map(|word| word.parse::<f64>().ok()));
    let score = score.ok_or_else(|| anyhow::anyhow!("{said}"))?;
    note(&format!("systemd-analyze security bro-loader@1000.service: {score}"));
    ensure!(score <= 2.0, "{said}");
    Ok(())
}

/// Starts a user's loader.
pub fn load(host: &Host, user: &str) -> Result<u32> {
    let uid = host.uid(user)?;
    host.run(&["systemctl", "enable", "--now", &format!("bro-loader@{uid}.service")])?;
    host.wait_until("the pins", PATIENCE, || Ok(host.path(&format!("/run/bro/bpf/{uid}/link")).exists()))?;
    Ok(uid)
}

/// Stops it.
pub fn unload(host: &Host, user: &str) -> Result<()> {
    let uid = host.uid(user)?;
    host.run(&["systemctl", "disable", "--now", &format!("bro-loader@{uid}.service")])?;
    ensure!(!host.path(&format!("/run/bro/bpf/{uid}")).exists(), "the pins are still there");
    Ok(())
}
