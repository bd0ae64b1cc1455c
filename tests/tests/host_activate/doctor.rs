//! `bro status` and `bro doctor NAME` about activated services: what they say of a well one, and of each thing that can be wrong.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{Plan, Site};
use bro_tests::host::{Host, Manager};
use serde_json::Value;

use crate::activated::activate;

pub fn status_and_doctor(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::service(manager, 0.0, "");
    let site = Site::activated(host, manager, "patient", &plan, &["--exit-idle-time", "1min"])?;
    let status = || -> Result<String> {
        let all = manager.run(host, &["bro", "status"])?;
        let mine = all.lines().find(|line| line.starts_with("patient "));
        Ok(mine.with_context(|| format!("it is not listed: {all}"))?.to_owned())
    };
    let doctor = |words: &[&str]| manager.try_run(host, &[&["bro", "doctor", "patient"], words].concat());
    /// The lines that are not ok, each of which has to say how to mend it.
    fn complaints(said: &str) -> Vec<&str> {
        said.lines().filter(|line| !line.starts_with("ok")).collect()
    }

    ensure!(status()?.contains("asleep"), "{}", status()?);
    let well = doctor(&[])?;
    ensure!(well.success() && complaints(&well.stdout).is_empty(), "{well:?}");
    let client = site.client()?;
    host.wait_until("it is awake", bro_tests::host::site::PATIENCE, || Ok(status()?.contains("awake")))?;
    ensure!(status()?.contains(&client.local_addr()?.to_string()), "who woke it? {}", status()?);
    let well = doctor(&[])?;
    ensure!(well.success() && complaints(&well.stdout).is_empty(), "{well:?}");
    drop(client);
    // What the journal shows to a person says all of it, without asking for fields.
    host.wait_until("the connection's end is logged", bro_tests::host::site::PATIENCE, || {
        Ok(site.journal().contains("connection closed"))
    })?;
    let journal = site.journal();
    for (what, parts) in [
        (
            "waking the service for its first client",
            &["target=127.0.0.1:", "peer=127.0.0.1:", "unit=patient.service"][..],
        ),
        (
            "connection closed",
            &["peer=127.0.0.1:", "relay=", "to_service=", "to_client=", "duration_ms=", "reason="],
        ),
    ] {
        let line = journal.lines().find(|line| line.contains(what)).with_context(|| journal.clone())?;
        ensure!(parts.iter().all(|part| line.contains(part)), "not all of {parts:?}: {line}");
    }
    manager.run(host, &["bro", "sleep", "--force", "patient"])?;
    ensure!(status()?.contains("asleep"), "{}", status()?);

    let ill = |what: &str, part: &str, words: &[&str]| -> Result<()> {
        let said = doctor(words)?;
        let all = complaints(&said.stdout).join("\n");
        ensure!(said.code == 1, "{what}: exit code {}: {said:?}", said.code);
        ensure!(all.contains(part), "{what}: no “{part}” in: {}", said.stdout);
        Ok(())
    };
    manager.systemctl(host, &["stop", &site.socket()])?;
    ill("the socket is stopped", &site.socket(), &[])?;
    manager.systemctl(host, &["start", &site.socket()])?;
    manager.systemctl(host, &["disable", &site.socket()])?;
    ill("the socket is not enabled", "enable", &[])?;
    manager.systemctl(host, &["enable", &site.socket()])?;

    // Names that bro activate takes, and a sleeping service as JSON.
    let named = manager.run(host, &["bro", "status", "--json", "patient.container"])?;
    let named: Vec<Value> = serde_json::from_str(&named)?;
    ensure!(named.len() == 1 && named[0]["state"] == "asleep", "{named:?}");

    a_broken_forwarder(&site, &ill)?;
    a_socket_elsewhere(&site, &ill, &status)?;

    // It listens, but somewhere else.
    let ran = activate(host, manager, "patient --external-port 0.0.0.0:1 --internal-port 99 --dry-run")?;
    ensure!(ran.success(), "{ran:?}");
    let external = format!("patient --external-port 0.0.0.0:{} --internal-port 99", site.port);
    ensure!(activate(host, manager, &external)?.success());
    manager.systemctl(host, &["start", &site.unit()])?;
    host.wait_until("it listens", bro_tests::host::site::PATIENCE, || {
        Ok(doctor(&[])?.stdout.contains("127.0.0.1:7"))
    })?;
    ill("it listens elsewhere", "127.0.0.1:99", &[])?;
    // What is advised mends it, to the letter.
    let advised = doctor(&[])?.stdout;
    let advised = advised.split('`').find(|part| part.contains("--internal-port"));
    let advised: Vec<&str> = advised.context("nothing is advised")?.split(' ').collect();
    ensure!(manager.try_run(host, &advised)?.success(), "{advised:?}");
    manager.systemctl(host, &["start", &site.unit()])?;
    host.wait_until("it listens where it is looked for", bro_tests::host::site::PATIENCE, || {
        Ok(complaints(&doctor(&[])?.stdout).is_empty())
    })
    .with_context(|| format!("{:?}\n{}", doctor(&[]), site.journals()))?;

    // The unit runs, and the forwarder looks for a container that there is not.
    let ran = activate(host, manager, "patient --container absent")?;
    ensure!(ran.success(), "{ran:?}");
    manager.systemctl(host, &["start", &site.unit()])?;
    ill("no such container", "no container absent runs", &[])?;
    ill("no such container", "systemd-patient", &[])?;
    let ran = activate(host, manager, "patient --container systemd-patient")?;
    ensure!(ran.success(), "{ran:?}");
    manager.systemctl(host, &["start", &site.unit()])?;
    manager.run(host, &["podman", "pause", "systemd-patient"])?;
    ill("it is paused", "podman unpause systemd-patient", &[])?;
    manager.run(host, &["podman", "unpause", "systemd-patient"])?;
    manager.systemctl(host, &["stop", &site.unit()])?;

    Plan::new("Image=localhost/nosuch\nPull=never", "", "").write_quadlet(host, manager, "patient")?;
    manager.systemctl(host, &["daemon-reload"])?;
    ill("the image is missing", "localhost/nosuch", &[])?;
    let unknown = manager.try_run(host, &["bro", "doctor", "nosuch"])?;
    ensure!(unknown.code == 4 && unknown.stderr.lines().count() == 1, "{unknown:?}");
    ensure!(activate(host, manager, "patient --remove")?.success());
    Ok(())
}

/// Expects a complaint: about what, a part of it, and further options.
type Ill<'a> = dyn Fn(&str, &str, &[&str]) -> Result<()> + 'a;

/// One that does not get up, and one that does not answer.
fn a_broken_forwarder(site: &Site<'_>, ill: &Ill<'_>) -> Result<()> {
    let (host, manager, forwarder) = (site.host, site.manager, site.forwarder());
    let drop_in = format!("{forwarder}.d/moved.conf");
    manager.unit(host, &drop_in, "[Service]\nExecStart=\nExecStart=/nonexistent/bro forward\n")?;
    manager.systemctl(host, &["daemon-reload"])?;
    let waiting = site.client()?;
    host.wait_until("it is tried again", bro_tests::host::site::PATIENCE, || {
        Ok(site.forwarder_show("NRestarts")?.parse::<u32>().is_ok_and(|times| times > 0))
    })?;
    ill("the forwarder cannot start", "does not get up", &[])?;
    // Of the host as well, where a unit that was written by hand has no name to ask after.
    let said = manager.try_run(host, &["bro", "doctor"])?.stdout;
    let line = said.lines().find(|line| line.contains("forwarders: ")).unwrap_or_default();
    ensure!(
        line.starts_with("BAD")
            && line.contains(&forwarder)
            && line.contains("/nonexistent/bro cannot be executed"),
        "{said}"
    );
    let all = manager.run(host, &["bro", "status"])?;
    ensure!(all.lines().any(|line| line.starts_with("patient ") && line.contains("failed")), "{all}");
    drop(waiting);
    let folder = match manager {
        Manager::System => "/etc/systemd/system".to_owned(),
        Manager::User(user) => format!("/home/{user}/.config/systemd/user"),
    };
    host.run(&["rm", "-r", &format!("{folder}/{forwarder}.d")])?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["stop", &forwarder])?;
    manager.systemctl(host, &["start", &site.socket()])?;

    // Served: one that is stopped while it wakes remembers that the wake has failed.
    let client = site.held()?;
    manager.systemctl(host, &["kill", "--signal", "STOP", "--kill-whom", "main", &forwarder])?;
    let said = ill("the forwarder hangs", "does not answer", &[]);
    manager.systemctl(host, &["kill", "--signal", "CONT", "--kill-whom", "main", &forwarder])?;
    said?;
    drop(client);
    manager.systemctl(host, &["stop", &forwarder])?;
    manager.systemctl(host, &["stop", &site.unit()])?;
    Ok(())
}

/// A drop-in of the administrator's has the socket listen somewhere else.
fn a_socket_elsewhere(site: &Site<'_>, ill: &Ill<'_>, status: &dyn Fn() -> Result<String>) -> Result<()> {
    let (host, manager, socket) = (site.host, site.manager, site.socket());
    let folder = match manager {
        Manager::System => "/etc/systemd/system".to_owned(),
        Manager::User(user) => format!("/home/{user}/.config/systemd/user"),
    };
    let text = host.run(&["cat", &format!("{folder}/{socket}")])?;
    let elsewhere = host.free_port()?;
    let listen: Vec<String> = text
        .lines()
        .map(|line| match line.starts_with("ListenStream=") {
            true => format!("ListenStream=127.0.0.1:{elsewhere}"),
            false => line.to_owned(),
        })
        .collect();
    manager.unit(host, &socket, &(listen.join("\n") + "\n"))?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["restart", &socket])?;
    ill("the socket listens elsewhere", &format!("listens at 127.0.0.1:{elsewhere}, and not at"), &[])?;
    ensure!(status()?.contains(&elsewhere.to_string()), "{}", status()?);
    manager.unit(host, &socket, &text)?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["restart", &socket])?;
    Ok(())
}

pub fn confined_forwarder(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::service(manager, 0.0, "");
    let site = Site::activated(host, manager, "confined", &plan, &["--exit-idle-time", "1min"])?;
    confinement_is_told(&site)
}

/// What forbids the forwarder to wake is named while it sleeps, a wake that fails is remembered, and what is advised mends both.
pub fn confinement_is_told(site: &Site<'_>) -> Result<()> {
    let (host, front, name) = (site.host, site.front, site.name.as_str());
    let check = |named: &str| -> Result<Option<Value>> {
        let ran = front.try_run(host, &["bro", "doctor", name, "--json"])?;
        let checks: Vec<Value> = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
        Ok(checks.into_iter().find(|check| check["name"] == named))
    };
    let confinement = || check("confinement")?.context("the confinement is not looked at");
    let status = |words: &[&str]| front.run(host, &[&["bro", "status"], words].concat());
    let fine = || -> Result<()> {
        let found = confinement()?;
        let finding = found["finding"].as_str().unwrap_or_default();
        ensure!(found["outcome"] == "ok" && finding.contains("can do all that it takes"), "{found}");
        Ok(())
    };
    let folder = match front {
        Manager::System => "/etc/systemd/system".to_owned(),
        Manager::User(user) => format!("/home/{user}/.config/systemd/user"),
    };
    let drop_ins = format!("{}.d", site.forwarder());
    let drop_in = |file: &str, line: &str| -> Result<()> {
        front.unit(host, &format!("{drop_ins}/{file}.conf"), &format!("[Service]\n{line}\n"))?;
        front.systemctl(host, &["daemon-reload"])?;
        Ok(())
    };
    let sleep = || -> Result<()> {
        front.systemctl(host, &["stop", &site.forwarder()])?;
        site.manager.systemctl(host, &["stop", &site.unit()])?;
        Ok(())
    };
    fine()?;
    for (line, directive, cause) in [
        (
            "RestrictAddressFamilies=\nRestrictAddressFamilies=AF_UNIX AF_INET",
            "RestrictAddressFamilies=AF_NETLINK",
            "Address family not supported",
        ),
        ("SystemCallFilter=~setns", "SystemCallFilter=setns", "may not enter"),
    ] {
        drop_in("10-narrow", line)?;
        let (directive, forbidden) = (directive, directive.split_once('=').context("it is KEY=VALUE")?);
        let names_it = |found: &Value| {
            let finding = found["finding"].as_str().unwrap_or_default();
            let fix = found["fix"].as_str().unwrap_or_default();
            let (key, value) = forbidden;
            found["outcome"] == "bad"
                && finding.contains(&format!("its {key}= forbids {value}"))
                && fix.contains(&format!("edit {}`", site.forwarder()))
                && fix.ends_with(directive)
        };
        let found = confinement()?;
        ensure!(names_it(&found), "asleep, {line}: {found}");

        site.expect_reset().with_context(|| site.journals())?;
        // Told by the forwarder, and when that has gone.
        host.wait_until("it is noted", bro_tests::host::site::PATIENCE, || {
            Ok(status(&[name])?.contains("last wake failed"))
        })?;
        let detail = status(&[name])?;
        ensure!(detail.contains(cause), "no “{cause}” in {detail}");
        let found = confinement()?;
        ensure!(names_it(&found), "with the container running, {line}: {found}");
        // The container has been started; its forwarder, which could not wake it, does not hide that, wherever it is asked.
        let listed: Vec<Value> = serde_json::from_str(&status(&["--json"])?)?;
        let listed = listed.iter().find(|service| service["name"] == name).context("it is not listed")?;
        let alone: Value = serde_json::from_str(&status(&[name, "--json"])?)?;
        ensure!(alone[0]["pid"].is_u64(), "no forwarder runs: {alone}");
        ensure!(listed["state"] == "awake" && alone[0]["activity"]["state"] == "awake", "{listed} {alone}");
        ensure!(status(&[name])?.contains("\n  awake for "), "{}", status(&[name])?);
        sleep()?;
        for words in [&[][..], &[name]] {
            let said = status(words)?;
            let mine = said.lines().find(|line| line.starts_with(name)).context("it is not listed")?;
            ensure!(mine.contains("last wake failed") && mine.contains(cause), "{words:?}: {said}");
        }
        let json: Value = serde_json::from_str(&status(&[name, "--json"])?)?;
        ensure!(json[0]["failed_wake"]["why"].as_str().is_some_and(|why| why.contains(cause)), "{json}");
        let last = check("last wake")?.context("doctor does not know of the last wake")?;
        ensure!(last["outcome"] == "bad" && last.to_string().contains(cause), "{last}");

        // What is advised, to the letter.
        drop_in("50-mended", directive)?;
        fine().with_context(|| format!("mended: {directive}"))?;
        site.check_echo().with_context(|| site.journals())?;
        ensure!(!status(&[name])?.contains("last wake failed"), "{}", status(&[name])?);
        ensure!(check("last wake")?.is_none(), "{:?}", check("last wake")?);
        sleep()?;
        ensure!(!status(&[])?.contains("last wake failed"), "{}", status(&[])?);
        host.run(&["rm", "-r", &format!("{folder}/{drop_ins}")])?;
        front.systemctl(host, &["daemon-reload"])?;
    }
    fine()?;
    // Who is no more has no last wake.
    drop_in("10-narrow", "SystemCallFilter=~setns")?;
    site.expect_reset().with_context(|| site.journals())?;
    let runtime = match site.manager {
        Manager::System => "/run/bro".to_owned(),
        Manager::User(user) => format!("/run/user/{}/bro", host.uid(user)?),
    };
    let noted = format!("{runtime}/failed-{}", site.unit());
    host.wait_until("it is noted", bro_tests::host::site::PATIENCE, || {
        Ok(host.try_run(&["test", "-f", &noted])?.success())
    })?;
    sleep()?;
    host.run(&["rm", "-r", &format!("{folder}/{drop_ins}")])?;
    front.systemctl(host, &["daemon-reload"])?;
    ensure!(activate(host, front, &format!("{name} --remove"))?.success());
    ensure!(!host.try_run(&["test", "-e", &noted])?.success(), "{noted} is left");
    let left = front.systemctl(host, &["list-units", "--all", "--no-legend", "bro-doctor-*"])?;
    ensure!(left.trim().is_empty(), "units are left: {left}");
    let left = host.try_run(&["pgrep", "--full", "[t]ry-wake"])?;
    ensure!(!left.success(), "processes are left: {left:?}");
    Ok(())
}

/// Where the unit is not installed, nothing advises to enable it.
pub fn loader_without_its_unit(host: &Host) -> Result<()> {
    const UNIT: &str = "/etc/systemd/system/bro-loader@.service";
    let test = Manager::User("test");
    let said = || -> Result<String> {
        let ran = test.try_run(host, &["bro", "doctor"])?;
        let line = ran.stdout.lines().find(|line| line.contains("is not loaded for this user"));
        Ok(line.with_context(|| format!("{ran:?}"))?.to_owned())
    };
    let uid = host.uid("test")?;
    let without = said()?;
    ensure!(
        without.contains(&format!("`sudo bro loader {uid}`")) && !without.contains("enable --now"),
        "{without}"
    );
    host.write(UNIT, "[Service]\nExecStart=/bin/true\n")?;
    let with = said();
    host.run(&["rm", UNIT])?;
    let with = with?;
    ensure!(with.contains(&format!("`sudo systemctl enable --now bro-loader@{uid}`")), "{with}");
    Ok(())
}

/// What neither this kernel nor this Debian has is shown to it: files that say that AppArmor and SELinux are at work.
pub fn security_modules(host: &Host) -> Result<()> {
    // In a mount namespace of its own: no other process sees these folders.
    let shown = |script: &str, check: &str| -> Result<(String, String)> {
        let script = format!(
            "release=$(uname -r); mount -t tmpfs shown /proc/sys/kernel; echo $release >/proc/sys/kernel/osrelease\n{script}"
        );
        let ran = host.try_run(&["unshare", "--mount", "sh", "-euc", &script])?;
        let checks: Vec<Value> = serde_json::from_str(&ran.stdout).with_context(|| format!("{ran:?}"))?;
        let found = checks.iter().find(|found| found["name"] == check).context("no such check")?;
        Ok((found["outcome"].as_str().unwrap_or_default().into(), found.to_string()))
    };
    let user = "HOME=/home/test setpriv --reuid test --regid test --init-groups /usr/local/bin/bro doctor --json || :";
    let limit = "echo 1 >/proc/sys/kernel/apparmor_restrict_unprivileged_userns; mkdir -p /etc/apparmor.d; \
                 mount -t tmpfs shown /etc/apparmor.d\n";

    let (outcome, said) = shown(user, "namespaces")?;
    ensure!(outcome == "ok" && !said.contains("AppArmor"), "{said}");
    let (outcome, said) = shown(&format!("{limit}{user}"), "namespaces")?;
    ensure!(outcome == "less" && said.contains("apparmor_restrict_unprivileged_userns=0"), "{said}");
    let (outcome, said) = shown(&format!("{limit}touch /etc/apparmor.d/crun\n{user}"), "namespaces")?;
    ensure!(outcome == "ok" && said.contains("/etc/apparmor.d/crun"), "{said}");

    let enforcing = "mount -t tmpfs shown /sys/fs; mkdir /sys/fs/selinux; echo 1 >/sys/fs/selinux/enforce\n";
    let labelled = |label: &str| {
        format!(
            "{enforcing}mkdir /run/labelled; mount -t tmpfs shown /run/labelled; cp /usr/local/bin/bro /run/labelled/bro\n\
             python3 -c 'import os; os.setxattr(\"/run/labelled/bro\", \"security.selinux\", b\"u:object_r:{label}:s0\\0\")'\n\
             /run/labelled/bro doctor --json || :\numount /run/labelled; rmdir /run/labelled"
        )
    };
    let (outcome, said) = shown("bro doctor --json || :", "selinux")?;
    ensure!(outcome == "ok" && said.contains("not enforcing"), "{said}");
    let (outcome, said) = shown(&labelled("admin_home_t"), "selinux")?;
    ensure!(outcome == "less" && said.contains("admin_home_t") && said.contains("restorecon"), "{said}");
    let (outcome, said) = shown(&labelled("bin_t"), "selinux")?;
    ensure!(outcome == "ok" && said.contains("bin_t"), "{said}");

    // What a container shares.
    let quadlet = |options: &str| {
        let text =
            format!("[Container]\nImage=localhost/busybox\nNetwork=none\nVolume=/srv:/data:{options}\n");
        Manager::System.quadlet(host, "sharing.container", &text)
    };
    quadlet("ro")?;
    let port = host.free_port()?;
    ensure!(activate(host, Manager::System, &format!("sharing --external-port 127.0.0.1:{port}"))?.success());
    let shared = |label: &str| {
        let script = format!(
            "{enforcing}mount -t tmpfs shown /srv\n\
             python3 -c 'import os; os.setxattr(\"/srv\", \"security.selinux\", b\"u:object_r:{label}:s0\\0\")'\n\
             bro doctor sharing --json || :"
        );
        shown(&script, "selinux")
    };
    let (outcome, said) = shared("var_t")?;
    ensure!(
        outcome == "less" && said.contains("/srv, which Volume=/srv:/data:ro shares") && said.contains(":z"),
        "{said}"
    );
    let (outcome, said) = shared("container_file_t")?;
    ensure!(outcome == "ok", "{said}");
    quadlet("ro,z")?;
    let (outcome, said) = shared("var_t")?;
    ensure!(outcome == "ok", "{said}");
    ensure!(activate(host, Manager::System, "sharing --remove")?.success());
    Ok(())
}
