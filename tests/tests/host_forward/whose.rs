//! Whose a running container is to stop: the forwarder's, whatever has happened to it since it was woken, until another process
//! starts it anew; and not the forwarder's to stop while another unit needs it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::site::{INNER, PATIENCE, Plan, Site, echo};

const IDLE: &str = "--exit-idle-time 700ms";

/// The forwarder leaves, and the container with it.
fn expect_asleep(site: &Site<'_>) -> Result<()> {
    site.await_exit()?;
    site.await_container_gone().with_context(|| site.journals())
}

/// The first client is reset since it takes too long; the second finds it running.
pub fn slower_than_the_limit(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::service(manager, 2.5, &format!("--start-timeout 1s {IDLE}"));
    let site = Site::new(host, manager, "slower", &plan)?;
    site.expect_reset()?;
    host.wait_until("a client is served", PATIENCE, || Ok(site.check_echo().is_ok()))?;
    expect_asleep(&site)
}

/// A start that takes longer than clients wait and an idle forwarder stays goes on: of the unit itself, and of the service in it.
/// Those who come meanwhile are told in time, one who comes late enough is served, by the same run.
pub fn longer_than_limit_and_idle_time(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::service(manager, 4.0, "--start-timeout 1s --exit-idle-time 800ms");
    // Until the test ends it, which then counts as no failure.
    plan.container_unit = "[Service]\nExecStartPre=-/bin/sleep 80";
    let site = Site::new(host, manager, "long", &plan)?;
    let began = Instant::now();
    site.expect_reset()?;
    ensure!(began.elapsed() < Duration::from_secs(15), "told after {:?}", began.elapsed());
    host.wait_until("what the start is at", PATIENCE, || {
        Ok(site
            .forwarder_show("StatusText")?
            .contains("long.service runs ExecStartPre= (sleep); no client waiting"))
    })
    .with_context(|| site.journals())?;
    let listed = manager.run(host, &["bro", "status", "long"])?;
    ensure!(listed.contains("starting for ") && listed.contains("ExecStartPre= (sleep)"), "{listed}");
    let run = manager.show(host, "long.service", "InvocationID")?;
    // Long enough for the forwarder to be idle, after each of them.
    let pause = || std::thread::sleep(Duration::from_millis(1200));
    for _ in 0..2 {
        pause();
        site.expect_reset().with_context(|| site.journals())?;
    }
    manager.systemctl(host, &["kill", "--kill-whom=control", "long.service"])?;
    pause();
    // It does not listen yet. Not with pauses once a client was served: the run is to be asked for while it lasts.
    let mut resets = 0;
    host.wait_until("a client is served", PATIENCE, || {
        let served = site.check_echo().is_ok();
        resets += u32::from(!served);
        Ok(served)
    })
    .with_context(|| site.journals())?;
    ensure!(resets > 0, "the service was ready at once");
    ensure!(manager.show(host, "long.service", "InvocationID")? == run, "begun anew: {}", site.journals());
    expect_asleep(&site)
}

/// systemd starts it anew by itself, and the next client comes meanwhile.
pub fn restarted_by_systemd(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::busybox("exec nc -ll -p 7 -e /bin/cat", IDLE);
    plan.container_unit = "[Service]\nRestart=always\nRestartSec=500ms";
    let site = Site::new(host, manager, "upheld", &plan)?;
    site.check_echo()?;
    let first = manager.show(host, "upheld.service", "InvocationID")?;
    manager.run(host, &["podman", "kill", "systemd-upheld"])?;
    site.check_echo().with_context(|| site.journals())?;
    ensure!(manager.show(host, "upheld.service", "InvocationID")? != first, "it was not restarted");
    expect_asleep(&site)
}

/// It ends again and again, and systemd restarts it, as often as its start limit allows and no more often: bro uses up nothing of that,
/// and clients who come meanwhile are served.
pub fn restarted_as_often_as_may_be(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::busybox("timeout 3 nc -ll -p 7 -e /bin/cat; exit 0", "--exit-idle-time 5s");
    plan.container_unit =
        "StartLimitIntervalSec=20\nStartLimitBurst=6\n[Service]\nRestart=always\nRestartSec=500ms";
    let site = Site::new(host, manager, "again", &plan)?;
    site.check_echo()?;
    let began = Instant::now();
    let restarts = || -> Result<u32> { Ok(manager.show(host, "again.service", "NRestarts")?.parse()?) };
    // On a machine that is slow to start containers it takes longer to end twice.
    while began.elapsed() < Duration::from_secs(16) || restarts()? < 2 && began.elapsed() < PATIENCE {
        // One that is connected in the moment of an end is cut off by the service; it is not kept from the next run.
        drop(site.check_echo());
        std::thread::sleep(Duration::from_millis(100));
    }
    let restarts = restarts()?;
    ensure!((2..=5).contains(&restarts), "systemd has restarted it {restarts} times: {}", site.journals());
    ensure!(site.errors()?.is_empty(), "{}", site.journals());
    site.check_echo().or_else(|_| site.check_echo()).with_context(|| site.journals())
}

/// An administrator restarts it, or `podman auto-update` does.
pub fn restarted_by_hand(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "renewed", &Plan::service(manager, 0.2, IDLE))?;
    let client = site.client()?;
    echo(&client, b"hello")?;
    manager.systemctl(host, &["restart", "renewed.service"])?;
    drop(client);
    site.check_echo().with_context(|| site.journals())?;
    expect_asleep(&site)
}

/// An administrator stops it, and starts it for reasons of their own.
pub fn started_anew_by_hand(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "anew", &Plan::service(manager, 0.0, IDLE))?;
    site.check_echo()?;
    manager.systemctl(host, &["stop", "anew.service"])?;
    manager.systemctl(host, &["start", "anew.service"])?;
    site.await_exit()?;
    ensure!(manager.show(host, "anew.service", "ActiveState")? == "active", "stopped: {}", site.journals());
    Ok(())
}

/// The forwarder that woke it is killed before the service listens.
pub fn killed_while_it_starts(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "orphan", &Plan::service(manager, 1.5, IDLE))?;
    let client = site.client()?;
    manager.wait_for(host, "orphan.service", "ActiveState", "active", PATIENCE)?;
    let killed = site.forwarder_show("MainPID")?;
    host.run(&["kill", "-KILL", &killed])?;
    // A process that is told to die may accept one client more.
    host.wait_until("the forwarder's end", PATIENCE, || Ok(site.forwarder_show("MainPID")? != killed))?;
    drop(client);
    site.check_echo().with_context(|| site.journals())?;
    expect_asleep(&site)
}

/// Two targets, and the second one's first client comes while the first one's is being waited for.
pub fn two_targets_at_once(host: &Host, manager: Manager) -> Result<()> {
    let options = format!("{IDLE} --target two=127.0.0.1:{INNER} --allow-missing-sockets");
    let site = Site::new(host, manager, "double", &Plan::service(manager, 1.0, &options))?;
    let second = host.free_port()?;
    site.change_socket(&format!("ListenStream=0.0.0.0:{}\nFileDescriptorName=one", site.port))?;
    let socket = format!(
        "[Socket]\nListenStream=0.0.0.0:{second}\nFileDescriptorName=two\nService={}\n",
        site.forwarder()
    );
    manager.unit(host, "double-two.socket", &socket)?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", "double-two.socket"])?;
    let first = site.client()?;
    manager.wait_for(host, "double.service", "ActiveState", "active", PATIENCE)?;
    let other = host.connect(second)?;
    echo(&first, b"hello")?;
    echo(&other, b"hello")?;
    drop((first, other));
    let asleep = expect_asleep(&site);
    manager.systemctl(host, &["stop", "double-two.socket"])?;
    asleep
}

/// Another unit requires it: it would be stopped along with it.
pub fn needed_by_another(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "needed", &Plan::service(manager, 0.0, IDLE))?;
    let other =
        "[Unit]\nRequires=needed.service\nAfter=needed.service\n[Service]\nExecStart=sleep infinity\n";
    manager.unit(host, "needing.service", other)?;
    manager.systemctl(host, &["daemon-reload"])?;
    let held = site.held()?;
    manager.systemctl(host, &["start", "needing.service"])?;
    drop(held);
    host.wait_until("the forwarder says who needs it", PATIENCE, || {
        Ok(site.forwarder_show("StatusText")?.contains("needing.service needs it"))
    })
    .with_context(|| site.journals())?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(
        manager.show(host, "needing.service", "ActiveState")? == "active",
        "taken down: {}",
        site.journals()
    );
    manager.systemctl(host, &["stop", "needing.service"])?;
    expect_asleep(&site)
}
