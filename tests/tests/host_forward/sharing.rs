//! Who stops a container, and who must not: two forwarders of one unit, jobs inside, `bro wake` and `bro sleep`, start limits.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::site::{INNER, PATIENCE, Plan, Site, ask, echo};

/// A second forwarder of a site's unit, with a socket of its own.
struct Second<'h> {
    site: &'h Site<'h>,
    port: u16,
}

impl<'h> Second<'h> {
    fn new(site: &'h Site<'h>, options: &str) -> Result<Self> {
        let (host, manager, name) = (site.host, site.manager, &site.name);
        let second = Self { site, port: host.free_port()? };
        let service = format!(
            "[Service]\nType=notify\nWatchdogSec=3s\nExecStart=/usr/local/bin/bro forward --unit {name}.service \
             --container systemd-{name} {options} 127.0.0.1:{INNER}\n"
        );
        manager.unit(host, &second.unit("service"), &service)?;
        manager.unit(
            host,
            &second.unit("socket"),
            &format!("[Socket]\nListenStream=0.0.0.0:{}\n", second.port),
        )?;
        manager.systemctl(host, &["daemon-reload"])?;
        manager.systemctl(host, &["start", &second.unit("socket")])?;
        Ok(second)
    }

    fn unit(&self, kind: &str) -> String {
        format!("{}-too.{kind}", self.site.name)
    }

    fn client(&self) -> Result<TcpStream> {
        self.site.host.connect(self.port)
    }
}

impl Drop for Second<'_> {
    fn drop(&mut self) {
        let (socket, service) = (self.unit("socket"), self.unit("service"));
        self.site.manager.systemctl(self.site.host, &["stop", &socket, &service]).ok();
    }
}

/// The last of two forwarders to be idle puts the container to sleep, whichever of them woke it.
pub fn two_forwarders(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "shared", &Plan::service(manager, 0.0, "--exit-idle-time 300ms"))?;
    let second = Second::new(&site, "--exit-idle-time 300ms")?;
    for first_one_stays in [false, true] {
        // The first wakes.
        let by_first = site.client()?;
        echo(&by_first, b"hello")?;
        let by_second = second.client()?;
        echo(&by_second, b"hello")?;
        let run = manager.show(host, "shared.service", "InvocationID")?;
        let (leaves, stays, left) = if first_one_stays {
            (by_second, by_first, second.unit("service"))
        } else {
            (by_first, by_second, site.forwarder())
        };
        drop(leaves);
        manager.wait_for(host, &left, "ActiveState", "inactive", PATIENCE)?;
        echo(&stays, b"hello")?;
        ensure!(manager.show(host, "shared.service", "InvocationID")? == run, "the container was restarted");
        drop(stays);
        site.await_container_gone()?;
    }
    // One that is killed is not in the way of the next.
    let by_second = second.client()?;
    echo(&by_second, b"hello")?;
    site.check_echo()?;
    let killed = manager.show(host, &second.unit("service"), "MainPID")?;
    // Before it can be started again by its socket: no client connects to it.
    host.run(&["kill", "-KILL", &killed])?;
    drop(by_second);
    site.await_exit()?;
    site.await_container_gone()
}

/// The first forwarder is just stopping the container when a client comes to the second.
pub fn woken_while_another_stops_it(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::busybox("trap '' TERM; nc -ll -p 7 -e /bin/cat; exit", "--exit-idle-time 300ms");
    plan.container = plan.container.replace("StopSignal=SIGKILL", "StopTimeout=3");
    let site = Site::new(host, manager, "between", &plan)?;
    let second = Second::new(&site, "--exit-idle-time 300ms")?;
    site.check_echo()?;
    let first_run = manager.show(host, "between.service", "InvocationID")?;
    manager.wait_for(host, "between.service", "ActiveState", "deactivating", PATIENCE)?;
    let client = second.client()?;
    echo(&client, b"hello")
        .map_err(|error| error.context(manager.journal(host, &second.unit("service")).unwrap_or_default()))?;
    ensure!(
        manager.show(host, "between.service", "InvocationID")? != first_run,
        "served by a dying container"
    );
    std::thread::sleep(Duration::from_millis(500));
    echo(&client, b"hello")?;
    drop(client);
    site.await_container_gone()
}

/// A job in the container says that it is busy by a file there.
pub fn busy_inside(host: &Host, manager: Manager) -> Result<()> {
    let options = "--exit-idle-time 300ms --busy-exec 'podman exec systemd-{name} test -e /tmp/busy'";
    let plan = Plan::busybox("touch /tmp/busy; exec nc -ll -p 7 -e /bin/cat", options);
    let site = Site::new(host, manager, "busyin", &plan)?;
    site.check_echo()?;
    host.wait_until("the forwarder says that it is busy", PATIENCE, || {
        Ok(site.forwarder_show("StatusText")?.contains("busy"))
    })?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(manager.show(host, "busyin.service", "ActiveState")? == "active", "{}", site.journal());
    manager.run(host, &["podman", "exec", "systemd-busyin", "rm", "/tmp/busy"])?;
    site.await_exit()?;
    site.await_container_gone()
}

/// `bro wake` and `bro sleep`.
pub fn by_hand(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "hand", &Plan::service(manager, 0.3, "--exit-idle-time 60s"))?;
    let bro = |args: &[&str]| manager.try_run(host, &[&["bro"], args].concat());
    // The name that it has with `bro activate`.
    let service = format!(
        "[Service]\nType=notify\nSockets={}\nExecStart=/usr/local/bin/bro forward --unit hand.service \
         --container systemd-hand --exit-idle-time 60s 127.0.0.1:{INNER}\n",
        site.socket()
    );
    manager.unit(host, "hand-activator.service", &service)?;
    manager.systemctl(host, &["daemon-reload"])?;
    let woken = bro(&["wake", "hand"])?;
    ensure!(woken.success(), "{woken:?}: {}", manager.journal(host, "hand-activator.service")?);
    ensure!(manager.show(host, "hand.service", "ActiveState")? == "active", "not awake: {woken:?}");
    // It is ready: a client is not a cold start.
    let client = site.client()?;
    echo(&client, b"hello")?;
    ensure!(bro(&["wake", "hand.service"])?.stdout.contains("already"), "woken twice");
    let refused = bro(&["sleep", "hand"])?;
    let address = client.local_addr()?.to_string();
    ensure!(refused.code == 1 && refused.stderr.contains(&address), "{refused:?}, not {address}");
    echo(&client, b"hello")?;
    let slept = bro(&["sleep", "--force", "hand"])?;
    ensure!(slept.success(), "{slept:?}");
    match (&client).read(&mut [0; 1]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => anyhow::bail!("instead of a reset the client saw {other:?}"),
    }
    site.await_container_gone()?;
    // Asleep, no client there: nothing to do. And without a forwarder the unit is stopped all the same.
    ensure!(bro(&["sleep", "hand"])?.stdout.contains("already"), "put to sleep twice");
    manager.systemctl(host, &["start", "hand.service"])?;
    ensure!(bro(&["sleep", "hand"])?.success(), "not without a forwarder");
    site.await_container_gone()?;
    // Units that no forwarder has to do with are not bro's to stop.
    let journald = match manager {
        Manager::System => "systemd-journald",
        Manager::User(_) => "dbus",
    };
    let others = bro(&["sleep", "--force", journald])?;
    ensure!(others.code == 4 && others.stderr.contains("is not activated"), "{others:?}");
    ensure!(manager.show(host, &format!("{journald}.service"), "ActiveState")? == "active", "stopped");
    for verb in ["wake", "sleep"] {
        let unknown = bro(&[verb, "nosuch"])?;
        ensure!(unknown.code == 4 && unknown.stderr.contains("nosuch"), "{unknown:?}");
    }
    manager.systemctl(host, &["stop", "hand-activator.service"]).map(drop)
}

/// A container that dies at every start: clients are reset at once, also when systemd has had enough of it, and forwarder and
/// socket live on.
pub fn crash_loop(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::busybox("exit 3", "");
    plan.container_unit = "StartLimitIntervalSec=6\nStartLimitBurst=2";
    plan.unit = "StartLimitIntervalSec=0";
    let site = Site::new(host, manager, "crashes", &plan)?;
    let mut forwarder = None;
    for attempt in 0..6 {
        let began = Instant::now();
        site.expect_reset()?;
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "attempt {attempt}: reset after {:?}",
            began.elapsed()
        );
        let pid = site.forwarder_show("MainPID")?;
        ensure!(
            *forwarder.get_or_insert(pid.clone()) == pid,
            "the forwarder was restarted: {}",
            site.journal()
        );
    }
    host.wait_until("systemd's limit in the log", PATIENCE, || {
        Ok(site.errors()?.iter().any(|error| error.contains("too often")))
    })
    .with_context(|| site.journals())?;
    ensure!(manager.show(host, &site.socket(), "ActiveState")? == "active", "the socket has failed");
    // When the container is mended and the limit's time is over, the next client is served.
    let mended = format!(
        "[Container]\nNetwork=none\n{}\n",
        Plan::busybox("exec nc -ll -p 7 -e /bin/cat", "").container
    );
    manager.quadlet(host, "crashes.container", &mended)?;
    manager.systemctl(host, &["daemon-reload"])?;
    host.wait_until("a client is served again", PATIENCE, || {
        std::thread::sleep(Duration::from_millis(300));
        Ok(ask(site.client()?, b"hello").is_ok_and(|answer| answer == b"hello"))
    })
}
