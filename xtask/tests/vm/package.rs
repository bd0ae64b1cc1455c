//! What dpkg does with the package.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::vm::{Agent, Machine};

use crate::site::{PATIENCE, Site};

/// Installed on a Debian that has what it depends on, and nothing started by that.
pub fn install(machine: &Machine, package: &str) -> Result<()> {
    let root = &machine.root;
    let apparmor = root.run(&["cat", "/sys/module/apparmor/parameters/enabled"])?;
    ensure!(apparmor == "Y", "AppArmor is not on: {apparmor}");
    note(&format!("{} on Linux {}", root.run(&["podman", "--version"])?, root.run(&["uname", "-r"])?));
    dpkg(root, &["--install", package])?;
    let verified = root.run(&["dpkg", "--verify", "bro"])?;
    ensure!(verified.is_empty(), "dpkg finds files changed: {verified}");
    ensure!(root.run(&["bro", "--version"])?.starts_with("bro "), "bro does not say its version");
    Ok(())
}

/// Nothing that bro is for is missing.
pub fn doctor(agent: &Agent) -> Result<()> {
    let ran = agent.try_run(&["bro", "doctor"])?;
    ensure!(ran.success(), "{}{}", ran.stdout, ran.stderr);
    let relay = ran.stdout.lines().find(|line| line.contains("kernel relay"));
    note(relay.context("nothing is said of the kernel relay")?);
    Ok(())
}

/// A client in mid-stream for each service goes on, and the next ones meet the new program.
pub fn upgrade(machine: &Machine, package: &str) -> Result<()> {
    let mut held = Vec::new();
    for site in Site::all(machine) {
        let client = site.client()?;
        client.expect_echo("before").with_context(|| site.journals())?;
        let (pid, program) = site.program()?;
        ensure!(program == "/usr/bin/bro", "{} runs {program}", site.name);
        held.push((site, client, pid));
    }
    let said = dpkg(&machine.root, &["--install", package])?;
    note(&format!("dpkg said of the running forwarders: {}", said.trim().replace('\n', " / ")));
    for (site, client, before) in held {
        let taken_over =
            || Ok(!["0", &before].contains(&site.agent.show(&site.forwarder(), "MainPID")?.as_str()));
        site.agent.wait_until("a successor", PATIENCE, taken_over).with_context(|| site.journals())?;
        let (_, program) = site.program()?;
        ensure!(program == "/usr/bin/bro", "{} runs {program}", site.name);
        let old = site.agent.run(&["readlink", &format!("/proc/{before}/exe")])?;
        ensure!(old.contains("deleted"), "the old process of {} runs {old}", site.name);
        site.check_echo().context("a client of the successor")?;
        client.expect_echo("after")?;
        client.end()?;
        let rest = client.receive_all().context("the client that was connected all the time")?;
        ensure!(rest.is_empty(), "{rest:?} came after the end");
    }
    let version = machine.root.run(&["dpkg-query", "--show", "--showformat=${Version}", "bro"])?;
    ensure!(version.ends_with("-2"), "version {version} is installed");
    for site in Site::all(machine) {
        site.await_idle_stop()?;
    }
    Ok(())
}

/// What `bro activate` made is taken back, or found; nothing of the package's own stays.
pub fn remove(machine: &Machine) -> Result<()> {
    let [lane, spliced, rootless] = Site::all(machine);
    for site in [&lane, &rootless] {
        site.agent.run(&["bro", "activate", site.name, "--remove"])?;
    }
    let client = spliced.client()?;
    client.expect_echo("still").with_context(|| spliced.journals())?;
    let said = dpkg(&machine.root, &["--remove", "bro"])?;
    ensure!(said.contains("spliced-activator.socket"), "nothing is said of who still listens: {said}");
    client.expect_echo("here").context("the client that is connected while the package is removed")?;
    drop(client);
    machine.root.run(&["systemctl", "stop", &spliced.socket(), &spliced.forwarder(), &spliced.unit()])?;
    dpkg(&machine.root, &["--purge", "bro"])?;
    let named = ["bro", "bro[-_.@]*", "*[-_]bro", "*[-_]bro[-_.]*"]
        .map(|name| format!("-name '{name}'"))
        .join(" -o ");
    let left = machine.root.sh(&format!(
        "find /usr /etc /opt /srv /run /var/lib /var/cache -xdev \\( {named} \\) -not -path '/run/brought*' \
         -not -path '/var/lib/dpkg/*' -not -path '/srv/image*' -not -path '/run/systemd/generator/*' | sort"
    ))?;
    // What `bro activate` wrote for root is root's, like units written by hand; dpkg has said that it is there.
    let roots = ["/etc/containers/systemd/spliced.container.d/50-bro-activator.conf"];
    let left: Vec<&str> = left.lines().filter(|path| !roots.contains(path)).collect();
    ensure!(left.is_empty(), "left: {left:#?}");
    Ok(())
}

/// What dpkg and the package's scripts said.
fn dpkg(root: &Agent, action: &[&str]) -> Result<String> {
    // The machine's own dpkg leaves documentation out.
    let ran = root.try_run(&[&["dpkg", "--path-include=/usr/share/*"], action].concat())?;
    ensure!(ran.success(), "{ran:?}");
    Ok(ran.stdout + &ran.stderr)
}
