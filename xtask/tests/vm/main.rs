//! The Debian package on a whole Debian: its own kernel with AppArmor, its own systemd and Podman, in an emulated machine. Installed
//! with dpkg, used by root and by an ordinary user, rebooted, upgraded under connected clients, removed. One machine serves all cases,
//! which come in this order; `BRO_CASE=part` runs those so named and what they stand on.
//!
//! Needs: root, mmdebstrap, e2fsprogs, qemu. Takes: 7 min.

mod package;
mod relays;
mod site;
mod vsock;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::{Cases, note};
use bro_tests::scratch::Scratch;
use bro_tests::vm::{Machine, NEEDS, log};

use site::Site;

/// Made by a tier of its own, while other tiers run: its recipe waits for an archive, and its first boot for nothing.
#[test]
fn the_disk_is_there() {
    if bro_tests::tier::met("the_disk_is_there", &NEEDS) {
        Machine::disk().expect("the disk is made");
    }
}

#[test]
fn the_debian_package_on_a_whole_debian() {
    if !bro_tests::tier::met("the_debian_package_on_a_whole_debian", &NEEDS) {
        return;
    }
    let scratch = Scratch::new().expect("a folder for the packages");
    let packages = std::thread::scope(|scope| {
        let making = ["1", "2"].map(|revision| {
            let folder = scratch.join(revision);
            scope.spawn(move || made(revision, &folder))
        });
        making.map(|one| one.join().expect("no panic").expect("the package is made"))
    });
    let besides = vsock::files(&scratch).expect("the suite is built");
    let mut files: Vec<&Path> = packages.iter().map(PathBuf::as_path).collect();
    files.extend(besides.iter().map(PathBuf::as_path));
    let mut machine = Machine::boot(&files).expect("the machine boots");
    note(&format!("the machine booted in {:.0} s", machine.booted_in().as_secs_f64()));
    let names = packages.map(|path| {
        let name = path.file_name().expect("a package has a name");
        format!("/run/brought/{}", name.to_string_lossy())
    });
    let cases = Cases::default();
    everything(&cases, &mut machine, &names);
    cases.conclude();
}

fn everything(cases: &Cases, machine: &mut Machine, packages: &[String; 2]) {
    if !cases.needed("the package installs", || package::install(machine, &packages[0])) {
        return;
    }
    let shared = &*machine;
    cases.at_once(&[
        ("bro doctor, as root", &|| package::doctor(&shared.root)),
        ("bro doctor, as a user", &|| package::doctor(&shared.user)),
    ]);
    if !cases.needed("three services are activated", || Site::activate_all(machine)) {
        return;
    }
    let shared = &*machine;
    cases.at_once(&[
        ("rootful, through the kernel relay", &|| told(shared, relays::kernel(&Site::lane(shared)))),
        ("rootful, through splice", &|| told(shared, relays::splice(&Site::spliced(shared)))),
        ("rootless, without bro loader", &|| told(shared, relays::splice(&Site::rootless(shared)))),
    ]);
    cases.case("vsock: what any relay does, and who clients are", || vsock::suite(machine));
    cases.case("vsock: clients of systemd's sockets", || told(machine, vsock::activated(machine)));
    cases.case("bro doctor NAME", || relays::doctor(machine));
    if !cases.needed("bro loader is started", || relays::load(machine)) {
        return;
    }
    cases.case("rootless, through bro loader's kernel relay", || relays::kernel(&Site::rootless(machine)));
    cases.case("the log of the first boot", || log_of(machine));
    if !cases.needed("a reboot", || reboot(machine)) {
        return;
    }
    let shared = &*machine;
    cases.at_once(&[
        ("rootful, after the reboot", &|| told(shared, relays::kernel(&Site::lane(shared)))),
        ("rootless, after the reboot", &|| told(shared, relays::kernel(&Site::rootless(shared)))),
    ]);
    cases.case("an upgrade under connected clients", || package::upgrade(machine, &packages[1]));
    cases.case("bro doctor NAME, of a forwarder that AppArmor confines too much", || relays::denied(machine));
    cases.case("removal and purge", || package::remove(machine));
    cases.case("the log of the second boot", || log_of(machine));
    cases.case("a denial of AppArmor's would be in the log", || denial(machine));
}

fn reboot(machine: &mut Machine) -> Result<()> {
    machine.reboot()?;
    note(&format!("the machine rebooted in {:.0} s", machine.booted_in().as_secs_f64()));
    for site in Site::all(machine) {
        let state = site.agent.show(&site.socket(), "ActiveState")?;
        ensure!(state == "active", "{} is {state} after the reboot", site.socket());
    }
    Ok(())
}

/// Nothing failed, the kernel has no complaint, AppArmor has denied nothing, no filter of system calls has killed anything.
fn log_of(machine: &Machine) -> Result<()> {
    for agent in [&machine.root, &machine.user] {
        let failed = agent.failed_units()?;
        ensure!(failed.is_empty(), "failed units: {failed}");
    }
    let log = kernel_log(machine)?;
    ensure!(log.contains("apparmor=\"STATUS\""), "AppArmor says nothing at all: {log}");
    let mut complaints = log::complaints(&log);
    complaints.retain(|line| !line.contains(relays::PROFILE));
    ensure!(complaints.is_empty(), "the log has complaints:\n{}", complaints.join("\n"));
    // Bits of what has happened to it: 128 is an oops, 512 a warning. A lockup (16384) is the emulator's slowness.
    let tainted: u32 = machine.root.run(&["cat", "/proc/sys/kernel/tainted"])?.parse()?;
    ensure!(tainted & !16384 == 0, "the kernel is tainted: {tainted}");
    Ok(())
}

/// With what the kernel has said last: it alone knows why it has refused a mount.
fn told(machine: &Machine, result: Result<()>) -> Result<()> {
    result.with_context(|| {
        let log = kernel_log(machine).unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = log.lines().filter(|line| !line.contains("apparmor=\"STATUS\"")).collect();
        format!("-- kernel\n{}", lines[lines.len().saturating_sub(15)..].join("\n"))
    })
}

fn kernel_log(machine: &Machine) -> Result<String> {
    machine.root.run(&["journalctl", "--boot", "--no-pager", "_TRANSPORT=kernel", "+", "_TRANSPORT=audit"])
}

/// What [`log_of`] looks for does come, and it finds it.
fn denial(machine: &Machine) -> Result<()> {
    machine
        .root
        .sh("echo 'profile bro-tests { /usr/** mr, /etc/ld.so.cache r, }' | apparmor_parser --replace
         ! aa-exec --profile=bro-tests -- cat /etc/hostname 2>/dev/null")?;
    let log = kernel_log(machine)?;
    let mut denied = log::complaints(&log).into_iter().filter(|line| line.contains("bro-tests"));
    ensure!(denied.any(|line| line.contains("/etc/hostname")), "no denial is found in\n{log}");
    Ok(())
}

/// The package of the binary under test.
fn made(revision: &str, folder: &Path) -> Result<PathBuf> {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["dist", "deb", "--revision", revision, "--out"])
        .arg(folder)
        .arg("--binary")
        .arg(bro_tests::bro::binary())
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout)?;
    Ok(said.trim().lines().last().context("dist said nothing")?.into())
}
