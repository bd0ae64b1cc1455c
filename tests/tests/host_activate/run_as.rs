//! `bro activate --system --run-as USER`: the system listens, on a port that is root's, and forwards as that user into the user's
//! own rootless container. Nothing of it runs as root.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{ACTIVATOR, INNER, PATIENCE, Plan, Site, ask};
use bro_tests::host::{Host, Manager};

use crate::activated::{activate, commands, expect_asleep, expect_commands_heeded, tree, with_commands};

const TEST: Manager = Manager::User("test");
const OTHER: Manager = Manager::User("other");

/// Below 1024: systemd, which is root, may listen there, and the user may not.
const PORT: u16 = 443;

/// The activated service. Dropping it undoes that.
pub struct Served<'h>(pub Site<'h>);

impl<'h> Served<'h> {
    pub fn new(host: &'h Host, owner: Manager, name: &str, plan: &Plan, options: &str) -> Result<Self> {
        let Manager::User(user) = owner else { anyhow::bail!("an ordinary user is meant") };
        plan.write_quadlet(host, owner, name)?;
        let words = format!(
            "{name} --system --run-as {user} --external-port 0.0.0.0:{PORT} --internal-port {INNER} {options}"
        );
        let ran = activate(host, Manager::System, &words)?;
        ensure!(ran.success(), "{ran:?}");
        Ok(Self(at(host, owner, name)))
    }
}

/// One that is there.
pub fn at<'h>(host: &'h Host, owner: Manager, name: &str) -> Site<'h> {
    Site { host, manager: owner, name: name.into(), port: PORT, front: Manager::System, suffix: ACTIVATOR }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        activate(self.0.host, Manager::System, &format!("{} --remove", self.0.name)).ok();
    }
}

/// What the kernel says of the running forwarder.
fn process_status(site: &Site<'_>) -> Result<String> {
    let pid = site.forwarder_show("MainPID")?;
    Ok(std::fs::read_to_string(site.host.path(&format!("/proc/{pid}/status")))?)
}

fn has(status: &str, key: &str, value: &str) -> Result<()> {
    let line =
        status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).context("no such line")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    ensure!(words.iter().all(|word| *word == value), "{key} is {words:?} instead of {value}");
    Ok(())
}

/// What a system service that may do little has the user's own manager do.
pub fn owners_commands(host: &Host) -> Result<()> {
    with_commands().write_quadlet(host, TEST, "heard")?;
    let (external, internal) = (format!("0.0.0.0:{PORT}"), INNER.to_string());
    let mut words = vec!["bro", "activate", "heard", "--system", "--run-as", "test"];
    words.extend(["--external-port", &external, "--internal-port", &internal]);
    let options = commands("heard");
    words.extend(options.iter().map(String::as_str));
    host.run(&words)?;
    let served = Served(at(host, TEST, "heard"));
    expect_commands_heeded(&served.0)
}

pub fn from_quadlet_to_service(host: &Host) -> Result<()> {
    let plan = Plan::service(TEST, 0.2, "");
    plan.write_quadlet(host, TEST, "low")?;
    let (system, home) = (tree(host, Manager::System)?, tree(host, TEST)?);
    let served = Served::new(host, TEST, "low", &plan, "--exit-idle-time 500ms")?;
    let site = &served.0;
    let activated = tree(host, Manager::System)?;
    ensure!(tree(host, TEST)? == home, "root wrote into the user's home");
    for _ in 0..2 {
        ensure!(site.forwarder_show("ActiveState")? == "inactive", "a forwarder runs without a client");
        site.check_echo().with_context(|| site.journals())?;
        expect_asleep(site).with_context(|| site.journals())?;
    }
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);
    let mut client = site.client()?;
    client.write_all(b"a")?;
    client.read_exact(&mut [0])?;
    let (status, uid) = (process_status(site)?, host.uid("test")?.to_string());
    has(&status, "Uid", &uid)?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        has(&status, set, "0000000000000000")?;
    }
    has(&status, "NoNewPrivs", "1")?;
    // A successor finds all that it needs within the same confines.
    let before = site.forwarder_show("MainPID")?;
    host.run(&["systemctl", "reload", &site.forwarder()])?;
    host.wait_until("the successor", PATIENCE, || Ok(site.forwarder_show("MainPID")? != before))?;
    client.write_all(b"b")?;
    client.read_exact(&mut [0])?;
    site.check_echo().with_context(|| site.journals())?;
    drop(client);
    expect_asleep(site)?;

    let words = format!("low --system --run-as test --external-port 0.0.0.0:{PORT}");
    let again = activate(host, Manager::System, &words)?;
    ensure!(again.success() && again.stdout.contains("nothing to do"), "{again:?}");
    // What is not said stays, whose container it is included.
    let changed = activate(host, Manager::System, "low --exit-idle-time 400ms")?;
    ensure!(changed.success(), "{changed:?}");
    ensure!(tree(host, Manager::System)? != activated, "nothing changed");
    site.check_echo().with_context(|| site.journals())?;
    expect_asleep(site)?;
    drop(served);
    ensure!(
        tree(host, Manager::System)? == system,
        "--remove left, or took, something:\n{:#?}",
        tree(host, Manager::System)?
    );
    ensure!(tree(host, TEST)? == home, "something is left in the user's home");
    ensure!(host.connect(PORT).is_err(), "there is still a listener");
    Ok(())
}

/// `bro status`, `doctor`, `wake` and `sleep`, as root and as the user whose container it is.
pub fn looked_after(host: &Host) -> Result<()> {
    let served = Served::new(host, TEST, "kept", &Plan::service(TEST, 0.0, ""), "--exit-idle-time 1min")?;
    let site = &served.0;
    let state = |manager: Manager| -> Result<String> {
        let all = manager.run(host, &["bro", "status"])?;
        let mine = all.lines().find(|line| line.starts_with("kept "));
        Ok(mine.with_context(|| format!("it is not listed: {all}"))?.to_owned())
    };
    for manager in [Manager::System, TEST] {
        let doctor = || -> Result<()> {
            let said = manager.try_run(host, &["bro", "doctor", "kept"])?;
            let well = said.stdout.lines().all(|line| line.starts_with("ok"));
            ensure!(said.success() && well, "{manager:?}: {said:?}");
            Ok(())
        };
        doctor()?;
        ensure!(state(manager)?.contains("asleep"), "{}", state(manager)?);
        manager.run(host, &["bro", "wake", "kept"])?;
        ensure!(state(manager)?.contains("awake"), "{}", state(manager)?);
        site.check_echo().with_context(|| site.journals())?;
        ensure!(state(manager)?.contains("awake"), "{}", state(manager)?);
        doctor()?;
        manager.run(host, &["bro", "sleep", "kept"])?;
        expect_asleep(site).with_context(|| site.journals())?;
    }
    // A forwarder that comes after the user's own `bro wake` knows that it was bro's.
    TEST.run(host, &["bro", "wake", "kept"])?;
    ensure!(activate(host, Manager::System, "kept --exit-idle-time 500ms")?.success());
    site.check_echo()?;
    expect_asleep(site).with_context(|| site.journals())?;

    // Who does not linger loses all of it by logging out, and is told how to keep it.
    host.run(&["mv", "/var/lib/systemd/linger/test", "/var/lib/systemd/not-lingering"])?;
    let hints = [
        host.try_run(&["bro", "doctor", "kept"]),
        activate(host, Manager::System, "kept --exit-idle-time 400ms"),
    ];
    host.run(&["mv", "/var/lib/systemd/not-lingering", "/var/lib/systemd/linger/test"])?;
    for hint in hints {
        let hint = hint?;
        ensure!(hint.success() && hint.stdout.contains("loginctl enable-linger test"), "{hint:?}");
    }

    host.sh("rm /home/test/.config/containers/systemd/kept.container")?;
    TEST.systemctl(host, &["daemon-reload"])?;
    let ill = host.try_run(&["bro", "doctor", "kept"])?;
    ensure!(ill.code == 1 && ill.stdout.contains("kept.container is gone"), "{ill:?}");
    Ok(())
}

pub fn lines_that_are_not_crossed(host: &Host) -> Result<()> {
    let served = Served::new(host, TEST, "fenced", &Plan::service(TEST, 0.0, ""), "--exit-idle-time 1min")?;
    let site = &served.0;
    let mut client = site.client()?;
    client.write_all(b"a")?;
    client.read_exact(&mut [0])?;
    // Another user commands neither the forwarder nor its units, and does not see the container.
    let ran = OTHER.try_run(host, &["socat", "-", "UNIX-CONNECT:/run/bro/fenced-activator/status.sock"])?;
    ensure!(!ran.success() && ran.stderr.contains("Permission denied"), "{ran:?}");
    for (words, code) in [
        ("sleep fenced", 4),
        ("wake fenced", 4),
        ("doctor fenced", 4),
        ("activate fenced --system --remove", 5),
    ] {
        let args: Vec<&str> = ["bro"].into_iter().chain(words.split(' ')).collect();
        let ran = OTHER.try_run(host, &args)?;
        ensure!(ran.code == code && ran.stderr.lines().count() == 1, "bro {words}: {ran:?}");
    }
    // Nor does that user's --run-as lead anywhere: it is root's to say.
    let ran = activate(host, OTHER, "fenced --run-as test --external-port 8443")?;
    ensure!(ran.code == 2, "{ran:?}");
    // The forwarder itself: no network but the loopback of its own namespace, no file of the user's, no gaining of rights.
    let pid = site.forwarder_show("MainPID")?;
    let inside =
        |command: &str| host.try_run(&["nsenter", "--target", &pid, "--mount", "--net", "sh", "-c", command]);
    let links = inside("ip -o link | wc -l; ls -A /home /root")?;
    ensure!(links.stdout.starts_with("1\n") && !links.stdout.contains("test"), "{links:?}");
    let written = inside("touch /etc/x || touch /usr/x || touch /var/x || touch /run/x")?;
    ensure!(!written.success() && written.stderr.contains("Read-only"), "{written:?}");
    // A link in the user's home leads root to nothing that the user may not read.
    host.write("/root/secret.container", "[Container]\nImage=localhost/secret\n")?;
    host.sh(
        "chmod 700 /root; ln -sf /root/secret.container /home/test/.config/containers/systemd/sly.container",
    )?;
    let before = tree(host, Manager::System)?;
    let ran = activate(host, Manager::System, "sly --run-as test --external-port 444 --dry-run")?;
    host.sh("rm /root/secret.container /home/test/.config/containers/systemd/sly.container")?;
    ensure!(ran.code == 4 && !ran.stdout.contains("secret"), "{ran:?}");
    ensure!(tree(host, Manager::System)? == before, "something was written");
    // A user without such a quadlet, and none at all.
    for (user, code) in [("other", 4), ("nosuch", 4), ("root", 2)] {
        let ran = activate(host, Manager::System, &format!("fence --run-as {user} --external-port 444"))?;
        ensure!(ran.code == code && ran.stderr.lines().count() == 1, "{user}: {ran:?}");
    }
    Ok(())
}

pub fn confined(host: &Host) -> Result<()> {
    let plan = Plan::service(TEST, 0.0, "");
    let served = Served::new(host, TEST, "tight", &plan, "--exit-idle-time 1min")?;
    crate::doctor::confinement_is_told(&served.0)
}

/// What root's `bro doctor NAME` has the user's Podman do is the user's process, which the user may trace: a stub in Podman's place says
/// what of root's is within its reach.
pub fn podman_has_nothing_of_roots(host: &Host) -> Result<()> {
    let plan = Plan::new("Image=localhost/busybox\nNetwork=none", "", INNER);
    let _served = Served::new(host, TEST, "watched", &plan, "")?;
    let folder = "/srv/stub-podman";
    host.run(&["install", "--directory", "--owner=test", "--group=test", folder])?;
    let stub = format!(
        "#!/bin/sh\n[ $(id -u) = 0 ] && exit 1\n\
         {{ tr '\\0' '\\n' </proc/$$/environ; cut -d' ' -f6,7 /proc/$$/stat; echo pid $$; ls /proc/$$/fd; }} >>{folder}/seen\n"
    );
    host.write(&format!("{folder}/podman"), &stub)?;
    // Within a shell's terminal, environment and redirections, and where no other process sees the stub.
    let script = format!(
        "chmod 755 {folder}/podman; mount --bind {folder}/podman $(command -v podman); exec 9</etc/shadow; export SECRET=hunter2\n\
         exec python3 -c 'import os, pty; os.set_inheritable(9, True); pty.spawn([\"bro\", \"doctor\", \"watched\", \"--system\"])'"
    );
    let ran = host.try_run(&["unshare", "--mount", "sh", "-euc", &script])?;
    let seen = host.run(&["cat", &format!("{folder}/seen")]).with_context(|| format!("{ran:?}"))?;
    host.run(&["rm", "-r", folder])?;
    ensure!(seen.contains("HOME=/home/test") && !seen.contains("SECRET"), "root's environment: {seen}");
    let lines: Vec<&str> = seen.lines().collect();
    let at = lines.iter().position(|line| line.starts_with("pid ")).context("it says no pid")?;
    let pid = &lines[at]["pid ".len()..];
    ensure!(lines[at - 1] == format!("{pid} 0"), "its session is not its own, or has a terminal: {seen}");
    ensure!(!lines[at + 1..].contains(&"9"), "root's descriptors: {seen}");
    Ok(())
}

/// The first client brings the user's service manager up; who logs out for the last time takes all of it down, and the next
/// client begins anew.
pub fn not_logged_in(host: &Host) -> Result<()> {
    let uid = host.uid("other")?;
    let manager = format!("user@{uid}.service");
    let served = Served::new(host, OTHER, "away", &Plan::service(OTHER, 0.0, ""), "--exit-idle-time 1min")?;
    let site = &served.0;
    for _ in 0..2 {
        host.run(&["systemctl", "stop", &manager, &format!("user-runtime-dir@{uid}.service")])?;
        site.front.wait_for(host, &site.forwarder(), "ActiveState", "inactive", PATIENCE)?;
        let answer = ask(site.client()?, b"hello, service?").with_context(|| site.journal())?;
        ensure!(answer == b"hello, service?", "{answer:?}\n{}", site.journals());
        ensure!(Manager::System.show(host, &manager, "ActiveState")? == "active");
    }
    drop(served);
    host.run(&["systemctl", "start", &manager])?;
    Ok(())
}
