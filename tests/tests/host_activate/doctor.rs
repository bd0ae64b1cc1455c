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
    manager.systemctl(host, &["stop", &site.unit()])?;

    Plan::new("Image=localhost/nosuch\nPull=never", "", "").write_quadlet(host, manager, "patient")?;
    manager.systemctl(host, &["daemon-reload"])?;
    ill("the image is missing", "localhost/nosuch", &[])?;
    let unknown = manager.try_run(host, &["bro", "doctor", "nosuch"])?;
    ensure!(unknown.code == 4 && unknown.stderr.lines().count() == 1, "{unknown:?}");
    ensure!(activate(host, manager, "patient --remove")?.success());
    Ok(())
}

/// What neither this kernel nor this Debian has is shown to it: files that say that AppArmor and SELinux are at work.
pub fn security_modules(host: &Host) -> Result<()> {
    // In a mount namespace of its own: these folders are nobody else's.
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
