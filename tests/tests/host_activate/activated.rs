//! What `bro activate` makes of a quadlet, and that nothing of it is left when it is told to go.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{INNER, PATIENCE, Plan, Site, ask, echo, text};
use bro_tests::host::{Host, Manager, Ran};

/// `bro activate` with these words.
pub fn activate(host: &Host, manager: Manager, words: &str) -> Result<Ran> {
    let args: Vec<&str> = ["bro", "activate"].into_iter().chain(words.split_whitespace()).collect();
    manager.try_run(host, &args)
}

/// Every file, link and folder where a manager's units and quadlets are, with what is in it.
pub fn tree(host: &Host, manager: Manager) -> Result<Vec<String>> {
    let folders = match manager {
        Manager::System => "/etc/systemd/system /etc/containers/systemd".into(),
        Manager::User(user) => format!("/home/{user}/.config"),
    };
    let listed = host.sh(&format!(
        "find {folders} -type d -o -type l -printf '%p -> %l\\n' -o -print; \
         find {folders} -type f -exec sha256sum {{}} +"
    ))?;
    let mut lines: Vec<String> = listed.lines().map(Into::into).collect();
    lines.sort();
    Ok(lines)
}

/// Asleep: neither forwarder nor container runs, and the socket listens.
pub fn expect_asleep(site: &Site<'_>) -> Result<()> {
    site.await_exit()?;
    site.await_container_gone()?;
    let socket = site.front.show(site.host, &site.socket(), "ActiveState")?;
    ensure!(socket == "active", "the socket is {socket}");
    Ok(())
}

pub fn from_quadlet_to_service(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::service(manager, 0.2, "");
    plan.write_quadlet(host, manager, "whole")?;
    manager.systemctl(host, &["daemon-reload"])?;
    let before = tree(host, manager)?;
    let port = host.free_port()?;
    let words =
        format!("whole --external-port 127.0.0.1:{port} --internal-port {INNER} --exit-idle-time 500ms");

    let dry = activate(host, manager, &format!("{words} --dry-run"))?;
    ensure!(dry.success() && dry.stdout.contains("whole-activator.socket"), "{dry:?}");
    ensure!(tree(host, manager)? == before, "--dry-run wrote something");

    let ran = activate(host, manager, &words)?;
    ensure!(ran.success() && ran.stderr.is_empty(), "{ran:?}");
    let activated = tree(host, manager)?;
    // What it promised it has written.
    for path in ran.stdout.lines().filter_map(|line| line.strip_prefix("wrote ")) {
        // But for the note which folders it had to make.
        let written = host.run(&["sed", "/^Made=/d", path])?;
        ensure!(
            dry.stdout.contains(written.trim_end()),
            "--dry-run did not show {path} as it is:\n{written}"
        );
    }
    let site = Site { host, manager, front: manager, name: "whole".into(), port, suffix: "activator" };
    ensure!(manager.show(host, &site.socket(), "UnitFileState")? == "enabled");
    for round in 1..=2 {
        ensure!(site.forwarder_show("ActiveState")? == "inactive", "a forwarder runs without a client");
        site.check_echo().with_context(|| site.journals())?;
        expect_asleep(&site)?;
        let ended = site.ended(round)?;
        let cold = text(&ended[round - 1], "BRO_COLD_START_MS");
        ensure!(!cold.is_empty(), "client {round} is not said to have woken it: {ended:?}");
    }
    ensure!(site.errors()?.is_empty(), "{:?}", site.errors()?);

    let again = activate(host, manager, &words)?;
    ensure!(again.success() && again.stdout.contains("nothing to do"), "{again:?}");
    ensure!(tree(host, manager)? == activated, "doing it again changed something");

    let removed = activate(host, manager, "whole --remove")?;
    ensure!(removed.success(), "{removed:?}");
    ensure!(
        tree(host, manager)? == before,
        "--remove left, or took, something:\n{:#?}",
        tree(host, manager)?
    );
    let known = manager.systemctl(host, &["list-units", "--all", "--plain", "--no-legend", "whole-*"])?;
    ensure!(known.is_empty(), "systemd still knows {known}");
    ensure!(host.connect(port).is_err(), "there is still a listener");
    let again = activate(host, manager, "whole --remove")?;
    ensure!(matches!(again.code, 0 | 4), "{again:?}");
    Ok(())
}

pub fn second_port(host: &Host, manager: Manager) -> Result<()> {
    let script = "nc -ll -p 72 -e /bin/echo second & exec nc -ll -p 7 -e /bin/echo first";
    let site =
        Site::activated(host, manager, "ports", &Plan::busybox(script, ""), &["--exit-idle-time", "1s"])?;
    let first = ask(site.client()?, b"")?;
    ensure!(first == b"first\n", "{first:?}");
    // A second one for a service that runs.
    let second = host.free_port()?;
    let words = format!("ports --service-name more --external-port 127.0.0.1:{second} --internal-port 72");
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success(), "{ran:?}");
    for _ in 0..2 {
        let answer = ask(host.connect(second)?, b"").with_context(|| site.journals())?;
        ensure!(answer == b"second\n", "{answer:?}\n{}", site.journals());
        let answer = ask(site.client()?, b"")?;
        ensure!(answer == b"first\n", "{answer:?}\n{}", site.journals());
        expect_asleep(&site)?;
    }
    let removed = activate(host, manager, "ports --service-name more --remove")?;
    ensure!(removed.success(), "{removed:?}");
    ensure!(host.connect(second).is_err(), "the second port still listens");
    let answer = ask(site.client()?, b"").with_context(|| site.journals())?;
    ensure!(answer == b"first\n", "the first port went along: {answer:?}");
    ensure!(activate(host, manager, "ports --remove")?.success());
    Ok(())
}

pub fn other_networks(host: &Host, manager: Manager) -> Result<()> {
    let (subnet, address) = match manager {
        Manager::System => ("10.89.17.0/24", "10.89.17.9"),
        Manager::User(_) => ("10.89.18.0/24", "10.89.18.9"),
    };
    manager.quadlet(host, "lan.network", &format!("[Network]\nSubnet={subnet}\n"))?;
    let container = format!(
        "Image=docker.io/alpine/socat\nExec=TCP-LISTEN:{INNER},bind={address},reuseaddr,fork EXEC:cat\n\
         StopSignal=SIGKILL\nIP={address}"
    );
    let plan = Plan { network: "Network=lan.network", ..Plan::new(&container, "", "") };
    let options = ["--network", "lan.network", "--exit-idle-time", "500ms"];
    let site = Site::activated(host, manager, "lan", &plan, &options)?;
    for _ in 0..2 {
        site.check_echo().with_context(|| site.journals())?;
        expect_asleep(&site)?;
    }
    let plan = Plan { network: "Network=host", ..Plan::service(manager, 0.2, "") };
    let inner = host.free_port()?.to_string();
    let plan =
        Plan { container: plan.container.replace(&format!(" {INNER} "), &format!(" {inner} ")), ..plan };
    let options = ["--network", "host", "--internal-port", &inner, "--exit-idle-time", "500ms"];
    let site = Site::activated(host, manager, "hosts", &plan, &options)?;
    site.check_echo().with_context(|| site.journals())?;
    expect_asleep(&site)
}

pub fn pods_and_templates(host: &Host, manager: Manager) -> Result<()> {
    manager.quadlet(host, "seeds.pod", "[Pod]\nNetwork=none\n")?;
    let plan = Plan { network: "Pod=seeds.pod", ..Plan::service(manager, 0.0, "") };
    plan.write_quadlet(host, manager, "seed")?;
    let port = host.free_port()?;
    let words =
        format!("seeds.pod --external-port 127.0.0.1:{port} --internal-port {INNER} --exit-idle-time 1s");
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success(), "{ran:?}");
    let answer =
        ask(host.connect(port)?, b"in a pod").with_context(|| logs(host, manager, "seeds-pod-activator"))?;
    ensure!(answer == b"in a pod", "{answer:?}");
    manager.wait_for(host, "seeds-pod.service", "ActiveState", "inactive", PATIENCE)?;
    ensure!(activate(host, manager, "seeds.pod --remove")?.success());

    let plan = Plan::service(manager, 0.0, "");
    plan.write_quadlet(host, manager, "tint@")?;
    let port = host.free_port()?;
    let words =
        format!("tint@blue --external-port 127.0.0.1:{port} --internal-port {INNER} --exit-idle-time 500ms");
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success(), "{ran:?}");
    let answer =
        ask(host.connect(port)?, b"blue").with_context(|| logs(host, manager, "tint@blue-activator"))?;
    ensure!(answer == b"blue", "{answer:?}");
    manager.wait_for(host, "tint@blue.service", "ActiveState", "inactive", PATIENCE)?;
    ensure!(activate(host, manager, "tint@blue --remove")?.success());
    Ok(())
}

/// A .kube: the forwarder wakes and stops the whole of it, and looks for the service in the container that it was told.
pub fn kubernetes(host: &Host, manager: Manager) -> Result<()> {
    let yaml = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: crate\nspec:\n  containers:\n  - name: echo\n    \
                image: localhost/busybox\n    imagePullPolicy: Never\n    \
                command: [/bin/sh, -c, \"sleep 0.2; exec nc -ll -p 7 -e /bin/cat\"]\n  terminationGracePeriodSeconds: 0\n";
    host.write(&manager.quadlet_path("crate.yaml"), yaml)?;
    manager.quadlet(host, "crate.kube", "[Kube]\nYaml=crate.yaml\nNetwork=none\n")?;
    let before = tree(host, manager)?;
    let port = host.free_port()?;
    let words = format!(
        "crate --container crate-echo --external-port 127.0.0.1:{port} --internal-port {INNER} --exit-idle-time 1s"
    );
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success(), "{ran:?}");
    let show = |unit: &str| manager.show(host, unit, "ActiveState");
    let said = || format!("{}\n{}", logs(host, manager, "crate-activator"), logs(host, manager, "crate"));
    for _ in 0..2 {
        ensure!(show("crate.service")? == "inactive" && show("crate-activator.service")? == "inactive");
        // While it has a client it does not go to sleep.
        let client = host.connect(port)?;
        echo(&client, b"in a crate").with_context(said)?;
        ensure!(show("crate.service")? == "active", "{}", said());
        drop(client);
        manager.wait_for(host, "crate-activator.service", "ActiveState", "inactive", PATIENCE)?;
        manager.wait_for(host, "crate.service", "ActiveState", "inactive", PATIENCE)?;
        let left = manager.run(host, &["podman", "pod", "ps", "--quiet", "--filter", "name=crate"])?;
        ensure!(left.is_empty(), "the pod is still there: {left}");
        ensure!(show("crate-activator.socket")? == "active", "the socket went along");
    }
    ensure!(activate(host, manager, "crate --remove")?.success());
    ensure!(tree(host, manager)? == before, "--remove left, or took, something");
    Ok(())
}

fn logs(host: &Host, manager: Manager, unit: &str) -> String {
    manager.journal(host, &format!("{unit}.service")).unwrap_or_default()
}

/// What systemd itself thinks of the units.
pub fn verified(host: &Host, manager: Manager) -> Result<()> {
    let site =
        Site::activated(host, manager, "verified", &Plan::service(manager, 0.0, ""), &["--backlog", "64"])?;
    for unit in [site.socket(), site.forwarder()] {
        let path = manager.show(host, &unit, "FragmentPath")?;
        let scope = if manager == Manager::System { "--system" } else { "--user" };
        let ran = manager.try_run(host, &["systemd-analyze", scope, "--man=no", "verify", &path])?;
        // What it says of the image's other units is none of ours.
        let of_ours: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("verified")).collect();
        ensure!(of_ours.is_empty(), "{of_ours:#?}");
    }
    ensure!(manager.show(host, &site.socket(), "Backlog")? == "64");
    ensure!(activate(host, manager, "verified --remove")?.success());
    Ok(())
}

/// `--ready=healthy` holds the first client until the quadlet's own health check passes.
pub fn healthy(host: &Host, manager: Manager) -> Result<()> {
    let script = "(sleep 1; touch /tmp/ready) & exec nc -ll -p 7 -e /bin/cat";
    let mut plan = Plan::busybox(script, "");
    plan.container.push_str("\nHealthCmd=/bin/test -e /tmp/ready\nHealthInterval=disable");
    let site = Site::activated(
        host,
        manager,
        "health",
        &plan,
        &["--ready", "healthy", "--exit-idle-time", "500ms"],
    )?;
    let began = std::time::Instant::now();
    site.check_echo().with_context(|| site.journals())?;
    ensure!(began.elapsed() >= Duration::from_secs(1), "served {:?} after the start", began.elapsed());
    expect_asleep(&site)?;
    expect_run_outside(&site)
}

/// A service that is ready a second after it has begun to listen, and busy until told otherwise: in the container, where only
/// commands of the owner's see it.
pub fn with_commands() -> Plan {
    Plan::busybox("touch /tmp/busy; (sleep 1; touch /tmp/ready) & exec nc -ll -p 7 -e /bin/cat", "")
}

/// How bro is to ask for that.
pub fn commands(name: &str) -> [String; 6] {
    let test = |file: &str| format!("podman exec systemd-{name} test -e /tmp/{file}");
    let (ready, busy) = (format!("exec:{}", test("ready")), test("busy"));
    ["--ready", &ready, "--busy-exec", &busy, "--exit-idle-time", "300ms"].map(str::to_owned)
}

/// The forwarder is confined, and its commands are run all the same.
pub fn expect_commands_heeded(site: &Site<'_>) -> Result<()> {
    let began = std::time::Instant::now();
    site.check_echo().with_context(|| site.journals())?;
    ensure!(began.elapsed() >= Duration::from_secs(1), "served {:?} after the start", began.elapsed());
    let pid = site.forwarder_show("MainPID")?;
    let status = std::fs::read_to_string(site.host.path(&format!("/proc/{pid}/status")))?;
    ensure!(status.contains("NoNewPrivs:\t1"), "{status}");
    site.host.wait_until("the forwarder says that it is busy", PATIENCE, || {
        Ok(site.forwarder_show("StatusText")?.contains("busy"))
    })?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(site.manager.show(site.host, &site.unit(), "ActiveState")? == "active", "{}", site.journal());
    let container = format!("systemd-{}", site.name);
    site.manager.run(site.host, &["podman", "exec", &container, "rm", "/tmp/busy"])?;
    expect_asleep(site).with_context(|| site.journals())?;
    expect_run_outside(site)
}

/// Nothing is left of the commands that the manager has run for the forwarder, and it did not refuse to.
fn expect_run_outside(site: &Site<'_>) -> Result<()> {
    let units = ["systemctl", "--user", "list-units", "--all", "--plain", "--no-legend", "bro-command-*"];
    let units: Vec<&str> =
        units.into_iter().filter(|word| *word != "--user" || site.manager != Manager::System).collect();
    site.host.wait_until("the end of what was run", PATIENCE, || {
        Ok(site.manager.run(site.host, &units)?.is_empty())
    })?;
    ensure!(!site.journal().contains("does not run"), "{}", site.journal());
    Ok(())
}

pub fn owners_commands(host: &Host, manager: Manager) -> Result<()> {
    let options = commands("asked");
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let site = Site::activated(host, manager, "asked", &with_commands(), &options)?;
    expect_commands_heeded(&site)
}

/// A forwarder that is confined has its container frozen, and doctor and status say what it is.
/// A time of day in UTC, so long after now. (systemd takes the zone.)
fn time_of_day(from_now: u64) -> Result<(String, SystemTime)> {
    let at = SystemTime::now() + Duration::from_secs(from_now);
    let second = at.duration_since(SystemTime::UNIX_EPOCH)?.as_secs() % 86_400;
    Ok((format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60), at))
}

pub fn kept_awake(host: &Host, manager: Manager) -> Result<()> {
    let state = |unit: &str| manager.show(host, unit, "ActiveState");
    let woken = |site: &Site<'_>| {
        let waiting = manager.wait_for(host, &site.unit(), "ActiveState", "active", PATIENCE);
        waiting.with_context(|| site.journals())
    };
    let plan = Plan::service(manager, 0.0, "");
    plan.write_quadlet(host, manager, "office")?;
    manager.systemctl(host, &["daemon-reload"])?;
    let before = tree(host, manager)?;
    // A day without an end: in the midst of it from the first moment on.
    let options = ["--exit-idle-time", "500ms", "--keep-awake", "0:00..24:00"];
    let site = Site::activated(host, manager, "office", &plan, &options)?;
    woken(&site)?;
    host.wait_until("bro status says so", PATIENCE, || {
        let status = manager.run(host, &["bro", "status"])?;
        let line = status.lines().find(|line| line.starts_with("office")).unwrap_or_default();
        Ok(line.contains("awake") && line.contains("kept awake for another") && line.contains("--keep-awake"))
    })
    .with_context(|| site.journals())?;
    let json = manager.run(host, &["bro", "status", "office", "--json"])?;
    ensure!(json.contains("\"kept_awake_until\": "), "{json}");
    let doctor = manager.try_run(host, &["bro", "doctor", "office"])?;
    ensure!(doctor.success() && doctor.stdout.contains("office-activator.timer starts"), "{doctor:?}");
    site.check_echo().with_context(|| site.journals())?;
    // Put to sleep by hand it sleeps, until a client comes.
    let said = manager.run(host, &["bro", "sleep", "office"])?;
    ensure!(said.contains("stopped"), "{said}");
    expect_asleep(&site)?;
    ensure!(state("office-activator.timer")? == "active", "its timer does not wait");
    site.check_echo().with_context(|| site.journals())?;
    // Four times the idle time.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(state("office.service")? == "active", "it has gone to sleep: {}", site.journals());
    // A time that begins soon, and ends.
    let (start, _) = time_of_day(5)?;
    let (end, ends) = time_of_day(20)?;
    let times = format!("{start}..{end} UTC");
    let told = manager.try_run(host, &["bro", "activate", "office", "--keep-awake", &times])?;
    ensure!(told.success(), "{told:?}");
    host.wait_until("it is kept awake", PATIENCE, || Ok(site.journal().contains(&end)))?;
    woken(&site)?;
    site.await_exit().with_context(|| site.journals())?;
    let early = ends.duration_since(SystemTime::now()).unwrap_or_default();
    ensure!(
        early <= Duration::from_secs(1),
        "it left {early:?} before the time was over: {}",
        site.journals()
    );
    site.await_container_gone()?;
    // Not any more: then there is no timer either.
    let told = activate(host, manager, "office --keep-awake never")?;
    ensure!(told.success() && told.stdout.contains("removed"), "{told:?}");
    ensure!(state("office-activator.timer")? == "inactive", "its timer is still there");
    site.check_echo()?;
    expect_asleep(&site)?;
    let bad =
        manager.try_run(host, &["bro", "activate", "office", "--keep-awake", "Mon..Fry 09:00..18:00"])?;
    ensure!(bad.code == 2 && bad.stderr.lines().count() == 1, "{bad:?}");
    ensure!(activate(host, manager, "office --keep-awake 0:00..24:00")?.success());
    woken(&site)?;
    ensure!(activate(host, manager, "office --remove")?.success());
    ensure!(tree(host, manager)? == before, "--remove left, or took, something");
    let known = manager.systemctl(host, &["list-units", "--all", "--plain", "--no-legend", "office-*"])?;
    ensure!(known.is_empty(), "systemd still knows {known}");
    manager.systemctl(host, &["stop", "office.service"]).map(drop)
}

pub fn frozen(host: &Host, manager: Manager) -> Result<()> {
    let options = ["--exit-idle-time", "500ms", "--freeze", "--wakes-per-hour", "5", "--idle-below", "1K/1s"];
    let site = Site::activated(host, manager, "frosty", &Plan::service(manager, 0.0, ""), &options)?;
    let (run, _) = site.who().with_context(|| site.journals())?;
    for round in 0..3 {
        host.wait_until("it is frozen", PATIENCE, || {
            Ok(manager.show(host, "frosty.service", "FreezerState")? == "frozen")
        })
        .with_context(|| format!("round {round}: {}", site.journals()))?;
        let status = manager.run(host, &["bro", "status"])?;
        ensure!(
            status.lines().any(|line| line.starts_with("frosty") && line.contains("frozen for")),
            "{status}"
        );
        let json = manager.run(host, &["bro", "status", "frosty", "--json"])?;
        ensure!(json.contains("\"frozen\""), "{json}");
        let doctor = manager.try_run(host, &["bro", "doctor", "frosty"])?;
        ensure!(doctor.success() && doctor.stdout.contains("is frozen"), "{doctor:?}");
        ensure!(site.who()?.0 == run, "another run of the service answers: {}", site.journals());
    }
    let said = manager.run(host, &["bro", "sleep", "frosty"])?;
    ensure!(said.contains("stopped"), "{said}");
    expect_asleep(&site)?;
    // Removed while it is frozen: it goes on, and nothing is noted of it any more.
    site.check_echo()?;
    host.wait_until("it is frozen", PATIENCE, || {
        Ok(manager.show(host, "frosty.service", "FreezerState")? == "frozen")
    })?;
    ensure!(activate(host, manager, "frosty --remove")?.success());
    ensure!(manager.show(host, "frosty.service", "FreezerState")? == "running", "left frozen");
    let below = match manager {
        Manager::System => "/run/bro".to_owned(),
        Manager::User(user) => format!("/run/user/{}/bro", host.uid(user)?),
    };
    ensure!(!host.path(&format!("{below}/wakes-frosty.service")).exists(), "a note is left below {below}");
    Ok(())
}
