//! What `bro activate` will not do, and what it warns of: each in one sentence, with the right exit code, and nothing written.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{INNER, Plan};
use bro_tests::host::{Host, Manager, Ran};

use crate::activated::{activate, tree};

/// One sentence, this exit code, and the files as they were.
fn refused(host: &Host, manager: Manager, words: &str, code: i32, part: &str) -> Result<Ran> {
    let before = tree(host, manager)?;
    let ran = activate(host, manager, words)?;
    ensure!(ran.code == code, "`bro activate {words}` exited with {} instead of {code}: {ran:?}", ran.code);
    let lines: Vec<&str> = ran.stderr.lines().filter(|line| !line.starts_with("bro: warning: ")).collect();
    ensure!(lines.len() == 1 && lines[0].starts_with("bro: "), "`{words}`: not one sentence: {}", ran.stderr);
    ensure!(lines[0].contains(part), "`{words}`: no “{part}” in: {}", lines[0]);
    ensure!(tree(host, manager)? == before, "`bro activate {words}` changed files");
    Ok(ran)
}

pub fn bad_input(host: &Host, manager: Manager) -> Result<()> {
    Plan::service(manager, 0.0, "").write_quadlet(host, manager, "plain")?;
    for (words, code, part) in [
        ("nosuch --external-port 8080", 4, "nosuch"),
        ("plain", 2, "--external-port"),
        ("plain --external-port 0", 2, "port"),
        ("plain --external-port 70000", 2, "port"),
        ("plain --external-port somewhere:80", 2, "somewhere"),
        ("plain --external-port 8080 --internal-port x", 2, "x"),
        ("plain --external-port 8080 --exit-idle-time soon", 2, "soon"),
        ("plain --external-port 8080 --ready perhaps", 2, "perhaps"),
        ("plain --external-port 8080 --relay pigeon", 2, "pigeon"),
        ("plain --external-port 8080 --backlog 0", 2, "backlog"),
        ("plain --external-port 8080 --bind-to-device nosuch0", 2, "nosuch0"),
        ("plain --external-port /etc/hostname --internal-port 80", 1, "there is a file at /etc/hostname"),
        ("plain --external-port 8080 --network nosuch", 2, "nosuch"),
        ("plain --external-port 8080 --service-name a/b", 2, "a/b"),
        ("plain --external-port 8080 --direct --internal-port 80", 2, "--direct"),
        ("plain --external-port 8080 --remove", 2, "--remove"),
        ("../plain --external-port 8080", 2, "../plain"),
    ] {
        refused(host, manager, words, code, part)?;
    }
    if manager != Manager::System {
        refused(host, manager, "plain --external-port 8080 --system", 4, "plain")
            .or_else(|_| refused(host, manager, "plain --external-port 8080 --system", 5, ""))?;
    }
    Ok(())
}

/// Files that others wrote stay as they are, and it is said whose port it is.
pub fn others_property(host: &Host, manager: Manager) -> Result<()> {
    Plan::service(manager, 0.0, "").write_quadlet(host, manager, "mine")?;
    let port = host.free_port()?;
    let words = format!("mine --external-port 127.0.0.1:{port} --internal-port {INNER}");
    let folder = match manager {
        Manager::System => "/etc/systemd/system".into(),
        Manager::User(user) => format!("/home/{user}/.config/systemd/user"),
    };
    for unit in ["mine-activator.socket", "mine-activator.service"] {
        manager.unit(host, unit, "[Unit]\nDescription=An administrator wrote this\n")?;
        refused(host, manager, &words, 1, unit)?;
        host.run(&["rm", &format!("{folder}/{unit}")])?;
    }
    // Neither does --remove take what it did not make.
    manager.unit(host, "mine-activator.socket", "[Socket]\nListenStream=1\n")?;
    let before = tree(host, manager)?;
    activate(host, manager, "mine --remove")?;
    ensure!(tree(host, manager)? == before, "--remove took a file that is not bro's");
    host.run(&["rm", &format!("{folder}/mine-activator.socket")])?;

    // A program of this host has the port.
    let listen = format!("TCP-LISTEN:{port},bind=127.0.0.1,fork");
    manager.run(host, &run_unit(manager, "squatter", &["socat", &listen, "EXEC:cat"]))?;
    host.wait_until("the port is taken", std::time::Duration::from_secs(10), || {
        Ok(host.connect(port).is_ok())
    })?;
    let ran = refused(host, manager, &words, 1, &port.to_string())?;
    ensure!(
        ran.stderr.contains("socat") || ran.stderr.contains("squatter"),
        "no process is named: {}",
        ran.stderr
    );
    manager.systemctl(host, &["stop", "squatter.service"])?;

    // Another activated service has it.
    Plan::service(manager, 0.0, "").write_quadlet(host, manager, "first")?;
    let ran = activate(host, manager, &words.replace("mine", "first"))?;
    ensure!(ran.success(), "{ran:?}");
    refused(host, manager, &words, 1, "first")?;
    ensure!(activate(host, manager, "first --remove")?.success());
    Ok(())
}

fn run_unit<'a>(manager: Manager, name: &'a str, command: &[&'a str]) -> Vec<&'a str> {
    let scope = if manager == Manager::System { "--system" } else { "--user" };
    [&["systemd-run", scope, "--quiet", "--unit", name], command].concat()
}

/// A port that Podman publishes itself, and a start at boot, defeat what an activated service is for.
pub fn warnings(host: &Host, manager: Manager) -> Result<()> {
    let port = host.free_port()?;
    let quadlet = format!(
        "[Container]\nImage=localhost/busybox\nPublishPort=127.0.0.1:{port}:{INNER}\n[Install]\nWantedBy=default.target\n"
    );
    manager.quadlet(host, "warned.container", &quadlet)?;
    let words = format!("warned --external-port 127.0.0.1:{port} --internal-port {INNER} --dry-run");
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success(), "{ran:?}");
    for part in ["PublishPort", "WantedBy"] {
        let warning = ran.stderr.lines().find(|line| line.contains(part));
        let warning = warning.with_context(|| format!("no warning of {part}=: {}", ran.stderr))?;
        ensure!(warning.starts_with("bro: warning: "), "{warning}");
    }
    // It would fail at the next boot.
    manager.quadlet(host, "warned.container", "[Container]\nImage=localhost/busybox\n")
}
