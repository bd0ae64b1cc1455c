//! The Debian package on a real host: installed, used, upgraded while clients are connected, removed and purged.
//!
//! Needs: root, mmdebstrap, dpkg-dev. Takes: 1 min.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::site::{self, PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager, NEEDS};
use bro_tests::scratch::Scratch;

const MANAGERS: [Manager; 2] = [Manager::System, Manager::User("test")];

/// Where a package, its scripts or a forwarder could leave something. Not: what dpkg itself writes.
const LOOKED_AT: &str = "/usr /etc /opt /srv /run/bro /var/lib/systemd /var/lib/bro /var/cache/bro";

#[test]
fn the_debian_package_on_a_real_host() {
    if !bro_tests::tier::met("the_debian_package_on_a_real_host", &NEEDS) {
        return;
    }
    let host = Host::boot().expect("the host boots");
    package(&host).expect("the package does what packages do");
}

fn package(host: &Host) -> Result<()> {
    site::prepare(host)?;
    // The harness's own copy would hide the package's.
    host.run(&["rm", "/usr/local/bin/bro"])?;
    let before = everything(host)?;
    for revision in ["1", "2"] {
        host.install(&made(revision)?.1, &format!("/root/bro-{revision}.deb"))?;
    }

    install(host, "1")?;
    ensure!(host.run(&["dpkg", "--verify", "bro"])?.is_empty(), "dpkg finds files changed");
    ensure!(host.run(&["bro", "--version"])?.starts_with("bro "), "bro does not say its version");
    if bro_tests::bro::is_packaged() {
        // Not one that was built or stripped in another way: what the compiler makes of the same source differs.
        let installed = std::fs::read(host.path("/usr/bin/bro"))?;
        ensure!(
            installed == std::fs::read(bro_tests::bro::binary())?,
            "another binary is installed than every suite runs"
        );
    }
    let analysed = host.try_run(&["systemctl", "--failed", "--no-legend", "--plain"])?;
    ensure!(analysed.stdout.is_empty(), "failed units: {}", analysed.stdout);

    let refused = host.try_run_as("test", &["bro", "after-upgrade"])?;
    ensure!(refused.code == 5 && refused.stderr.starts_with("bro: "), "{refused:?}");
    let own = host.try_run_as("test", &["bro", "after-upgrade", "--user"])?;
    ensure!(own.success() && own.stdout.is_empty(), "{own:?}");

    let mut sites = Vec::new();
    for manager in MANAGERS {
        let options = ["--exit-idle-time", "2s"];
        let site = Site::activated(host, manager, "packed", &Plan::service(manager, 0.0, ""), &options)?;
        site.check_echo().with_context(|| site.journals())?;
        let held = site.held()?;
        ensure!(program(host, &site)? == "/usr/bin/bro", "it runs {}", program(host, &site)?);
        drop(held);
        sites.push(site);
    }
    upgrade(host, &sites)?;

    for site in &sites {
        site.await_exit().with_context(|| site.journals())?;
        site.await_container_gone()?;
        site.check_echo().context("after the upgrade, from asleep")?;
        let held = site.held()?;
        ensure!(program(host, site)? == "/usr/bin/bro", "it runs {}", program(host, site)?);
        drop(held);
    }
    remove(host, sites, &before)
}

/// A client in mid-stream for each service, and others that come and go: none notices anything.
fn upgrade(host: &Host, sites: &[Site<'_>]) -> Result<()> {
    let (mut held, mut mains) = (Vec::new(), Vec::new());
    for site in sites {
        let mut client = site.client()?;
        client.write_all(b"before the upgrade, ")?;
        let mut echoed = [0; 20];
        client.read_exact(&mut echoed).context("nothing came back before the upgrade")?;
        held.push(client);
        mains.push(site.forwarder_show("MainPID")?);
    }
    let over = AtomicBool::new(false);
    let served = std::thread::scope(|scope| -> Result<usize> {
        let others: Vec<_> = sites
            .iter()
            .map(|site| {
                let over = &over;
                scope.spawn(move || -> Result<usize> {
                    let mut served = 0;
                    while !over.load(Ordering::Relaxed) || served < 3 {
                        let answer = site.ask(b"during")?;
                        ensure!(answer == b"during", "{answer:?} came back");
                        served += 1;
                    }
                    Ok(served)
                })
            })
            .collect();
        let installed = install(host, "2");
        over.store(true, Ordering::Relaxed);
        let mut served = 0;
        for other in others {
            served +=
                other.join().expect("a client does not panic").context("a client during the upgrade")?;
        }
        let said = installed?;
        note(&format!("dpkg said of the running forwarders: {}", said.replace('\n', " / ")));
        Ok(served)
    })?;
    note(&format!("{served} clients were served during the upgrade"));
    for (site, main) in sites.iter().zip(&mains) {
        // The program that is there now accepts; the one that was there still has its client.
        let taken_over = || Ok(!["0", main].contains(&site.forwarder_show("MainPID")?.as_str()));
        host.wait_until("a successor", PATIENCE, taken_over).with_context(|| site.journals())?;
        ensure!(program(host, site)? == "/usr/bin/bro", "it runs {}", program(host, site)?);
        let old = host.run(&["readlink", &format!("/proc/{main}/exe")])?;
        ensure!(old.contains("deleted"), "the old process runs {old}");
    }
    for (site, mut client) in sites.iter().zip(held) {
        client.write_all(b"and after")?;
        client.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).context("the client that was connected all the time")?;
        ensure!(answer == b"and after", "{}", String::from_utf8_lossy(&answer));
        ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    }
    let version = host.run(&["dpkg-query", "--show", "--showformat=${Version}", "bro"])?;
    ensure!(version.ends_with("-2"), "version {version} is installed");
    Ok(())
}

/// One service is taken back first, the other one is left to be found.
fn remove(host: &Host, mut sites: Vec<Site<'_>>, before: &BTreeSet<String>) -> Result<()> {
    let users = sites.pop().context("two services")?;
    let systems = sites.pop().context("two services")?;
    users.manager.run(host, &["bro", "activate", "packed", "--remove"])?;
    let mut client = systems.client()?;
    client.write_all(b"still")?;
    let mut echoed = [0; 5];
    client.read_exact(&mut echoed)?;
    let removed = host.try_run(&["dpkg", "--remove", "bro"])?;
    ensure!(removed.success(), "{removed:?}");
    ensure!(
        removed.stderr.contains("packed-activator.socket"),
        "nothing is said of who still listens: {removed:?}"
    );
    client.write_all(b" here")?;
    client.read_exact(&mut echoed).context("the client that is connected while the package is removed")?;
    drop(client);
    host.run(&["systemctl", "stop", &systems.socket(), &systems.forwarder()])?;
    host.run(&["dpkg", "--purge", "bro"])?;
    ensure!(!host.try_run(&["dpkg", "--status", "bro"])?.success(), "dpkg still knows it");

    // What the administrator made, by way of `bro activate` or by hand, is not the package's to take.
    let made = ["/etc/systemd/system/", "/etc/containers/systemd/"];
    let left: Vec<String> = everything(host)?
        .into_iter()
        .filter(|path| !before.contains(path) && !made.iter().any(|made| path.starts_with(made)))
        .collect();
    ensure!(left.is_empty(), "left: {left:#?}");
    let kept = host.run(&["cat", "/etc/systemd/system/packed-activator.socket"])?;
    ensure!(kept.contains("ListenStream="), "the administrator's unit was taken: {kept}");
    Ok(())
}

/// What dpkg and the package's scripts said.
fn install(host: &Host, revision: &str) -> Result<String> {
    let package = format!("/root/bro-{revision}.deb");
    // The host's own dpkg leaves documentation out.
    let ran = host.try_run(&["dpkg", "--path-include=/usr/share/*", "--install", &package])?;
    ensure!(ran.success(), "{ran:?}");
    Ok(ran.stdout + &ran.stderr)
}

/// Which file the forwarder runs.
fn program(host: &Host, site: &Site<'_>) -> Result<String> {
    let mut pid = String::new();
    host.wait_until("a forwarder", PATIENCE, || {
        pid = site.forwarder_show("MainPID")?;
        Ok(pid != "0")
    })?;
    host.run(&["readlink", &format!("/proc/{pid}/exe")])
}

fn everything(host: &Host) -> Result<BTreeSet<String>> {
    // What Python compiles for itself comes and goes.
    let listed = host.sh(&format!(
        "find {LOOKED_AT} -xdev -not -name '*.pyc' -not -name __pycache__ 2>/dev/null || true"
    ))?;
    Ok(listed.lines().map(str::to_owned).collect())
}

/// The package, in a folder that goes with the first value.
fn made(revision: &str) -> Result<(Scratch, PathBuf)> {
    let scratch = Scratch::new()?;
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["dist", "deb", "--revision", revision, "--out"])
        .arg(scratch.path())
        .arg("--binary")
        .arg(bro_tests::bro::binary())
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout)?;
    let package = Path::new(said.trim().lines().last().context("dist said nothing")?).to_owned();
    Ok((scratch, package))
}
