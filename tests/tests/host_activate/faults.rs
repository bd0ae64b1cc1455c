//! What may go wrong around an activated service, and what its clients see of it.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::site::{INNER, PATIENCE, Plan, Site, ask, echo, folder};
use bro_tests::host::{Host, Manager};

use crate::activated::{activate, expect_asleep, tree};

const IDLE: [&str; 2] = ["--exit-idle-time", "500ms"];

/// Two administrators, one wish: one service, and what one of them alone would have had.
pub fn twice_at_once(host: &Host, manager: Manager) -> Result<()> {
    Plan::service(manager, 0.0, "").write_quadlet(host, manager, "twice")?;
    let port = host.free_port()?;
    let words =
        format!("twice --external-port 127.0.0.1:{port} --internal-port {INNER} --exit-idle-time 500ms");
    let at_once = |words: &[String]| -> Result<Vec<bro_tests::host::Ran>> {
        std::thread::scope(|scope| {
            let running: Vec<_> =
                words.iter().map(|words| scope.spawn(move || activate(host, manager, words))).collect();
            running.into_iter().map(|one| one.join().expect("it does not panic")).collect()
        })
    };
    let before = tree(host, manager)?;
    let ran = at_once(&[words.clone(), words.clone(), words.clone()])?;
    ensure!(ran.iter().all(bro_tests::host::Ran::success), "{ran:?}");
    let activated = tree(host, manager)?;
    let answer = ask(host.connect(port)?, b"served")?;
    ensure!(answer == b"served", "{answer:?}");
    let hidden = activated.iter().filter(|line| line.contains(".bro-")).count();
    ensure!(hidden == 0, "something half-done is left: {activated:#?}");
    let ran = at_once(&["twice --remove".into(), words, "twice --remove".into()])?;
    ensure!(ran.iter().all(|ran| matches!(ran.code, 0 | 4)), "{ran:?}");
    let removed = activate(host, manager, "twice --remove")?;
    ensure!(matches!(removed.code, 0 | 4), "{removed:?}");
    manager.systemctl(host, &["stop", "twice.service"])?;
    ensure!(tree(host, manager)? == before, "something is left: {:#?}", tree(host, manager)?);
    Ok(())
}

/// SIGKILL may leave files that systemd has not taken up, or not all of what takes up a file: the next run does the rest.
pub fn killed(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "killed", &Plan::service(manager, 0.0, ""), &IDLE)?;
    let units = match manager {
        Manager::System => "/etc/systemd/system".to_owned(),
        Manager::User(user) => format!("/home/{user}/.config/systemd/user"),
    };
    let (first, second) = (site.port, host.free_port()?);
    let file = format!("{units}/{}", site.socket());
    let listens_at = |port: u16| -> Result<()> {
        let again = activate(host, manager, "killed")?;
        let expected = format!("{} listens at 0.0.0.0:{port}", site.socket());
        ensure!(again.success() && again.stdout.contains(&expected), "{again:?}");
        let answer = ask(host.connect(port)?, b"served").with_context(|| site.journals())?;
        ensure!(answer == b"served", "{answer:?}");
        let idle = activate(host, manager, "killed")?;
        ensure!(idle.success() && idle.stdout.contains("nothing to do"), "{idle:?}");
        Ok(())
    };
    // Before systemd was asked for anything.
    host.sh(&format!("sed -i s/{first}/{second}/ {file}"))?;
    listens_at(second)?;
    ensure!(host.connect(first).is_err(), "it listens where it did before, too");
    // systemd was told to read everything since, which makes no new socket.
    host.sh(&format!("cp -p {file} {units}/.{}.bro-old; sed -i s/{second}/{first}/ {file}", site.socket()))?;
    manager.systemctl(host, &["daemon-reload"])?;
    listens_at(first)?;
    // A socket that is as it should be, but for the next boot.
    host.sh(&format!("rm {units}/sockets.target.wants/{}", site.socket()))?;
    listens_at(first)?;
    manager.systemctl(host, &["is-enabled", &site.socket()])?;
    let left = tree(host, manager)?;
    ensure!(!left.iter().any(|line| line.contains(".bro-")), "something half-done is left: {left:#?}");
    Ok(())
}

/// Without one of its files it cannot be read back, and what systemd has of it goes all the same.
pub fn deleted_by_hand(host: &Host, manager: Manager) -> Result<()> {
    Plan::service(manager, 0.0, "").write_quadlet(host, manager, "partly")?;
    let units = match manager {
        Manager::System => "/etc/systemd/system".to_owned(),
        Manager::User(user) => format!("/home/{user}/.config/systemd/user"),
    };
    for file in ["partly-activator.service", "partly-activator.socket"] {
        let port = host.free_port()?;
        let words = format!("partly --external-port 127.0.0.1:{port} --internal-port {INNER}");
        let ran = activate(host, manager, &words)?;
        ensure!(ran.success(), "{ran:?}");
        host.sh(&format!("rm {units}/{file}"))?;
        let doctor = manager.try_run(host, &["bro", "doctor", "partly"])?;
        ensure!(doctor.code == 4 && doctor.stderr.contains(&format!("{file} is gone")), "{doctor:?}");
        // (A client would be waited for.)
        let socket = manager.show(host, "partly-activator.socket", "ActiveState")?;
        ensure!(socket == "active", "the socket is {socket}");
        let removed = activate(host, manager, "partly --remove")?;
        ensure!(removed.success(), "{removed:?}");
        ensure!(host.connect(port).is_err(), "systemd listens still");
        let left: Vec<String> =
            tree(host, manager)?.into_iter().filter(|line| line.contains("partly-activator")).collect();
        ensure!(left.is_empty(), "{left:#?}");
        let forwarder = manager.show(host, "partly-activator.service", "ActiveState")?;
        ensure!(forwarder == "inactive", "the forwarder is {forwarder}");
    }
    Ok(())
}

/// Told to stop while it waits for a forwarder that has a client, it leaves files and units as they were.
pub fn interrupted(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "cut", &Plan::service(manager, 0.0, ""), &IDLE)?;
    let before = tree(host, manager)?;
    let client = site.client()?;
    host.wait_until(
        "the client is served",
        PATIENCE,
        || Ok(site.forwarder_show("ActiveState")? == "active"),
    )?;
    let other = host.free_port()?;
    let external = format!("0.0.0.0:{other}");
    let words = ["timeout", "--preserve-status", "3", "bro", "activate", "cut", "--external-port", &external];
    let ran = manager.try_run(host, &words)?;
    drop(client);
    ensure!(ran.code == 1 && ran.stderr.contains("interrupted by SIGTERM; nothing was changed"), "{ran:?}");
    ensure!(tree(host, manager)? == before, "{:#?}", tree(host, manager)?);
    site.check_echo().with_context(|| site.journals())?;
    ensure!(host.connect(other).is_err(), "it listens at the new port");
    let again = activate(host, manager, "cut")?;
    ensure!(again.success() && again.stdout.contains("nothing to do"), "{again:?}");
    Ok(())
}

/// Who removes it under a client is told whom that waits for, and how to cut it short; doing so does.
pub fn removed_under_a_client(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::activated(host, manager, "leaving", &Plan::service(manager, 0.0, ""), &IDLE)?;
    let mut client = site.client()?;
    std::io::Write::write_all(&mut client, b"here")?;
    client.read_exact(&mut [0; 4])?;
    let user = if manager == Manager::System { "" } else { " --user" };
    let cut = format!("systemctl{user} kill --kill-whom=main {}", site.forwarder());
    let file = format!("{}/said", folder(host, manager, "leaving")?);
    let said = || std::fs::read_to_string(host.path(&file)).unwrap_or_default();
    let remove = format!("exec bro activate leaving --remove 2>{file}");
    let (removed, took) = std::thread::scope(|scope| -> Result<_> {
        let running = scope.spawn(|| manager.try_run(host, &["sh", "-c", &remove]));
        manager.wait_for(host, &site.forwarder(), "ActiveState", "deactivating", PATIENCE)?;
        host.wait_until("it says what it waits for", PATIENCE, || Ok(said().contains("1 connection left")))?;
        let began = Instant::now();
        manager.run(host, &cut.split(' ').collect::<Vec<_>>())?;
        Ok((running.join().expect("it does not panic")?, began.elapsed()))
    })
    .with_context(said)?;
    let said = said();
    ensure!(removed.success() && took < Duration::from_secs(20), "{took:?}: {removed:?} {said}");
    ensure!(said.contains("lets its clients finish"), "{said}");
    ensure!(said.contains(&cut), "no “{cut}” in: {said}");
    Ok(())
}

/// The quadlet goes while its socket listens: clients are told at once; when it is back, they are served.
pub fn quadlet_goes(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::service(manager, 0.0, "");
    let site = Site::activated(host, manager, "fleeting", &plan, &IDLE)?;
    site.check_echo()?;
    expect_asleep(&site)?;
    let file = match manager {
        Manager::System => "/etc/containers/systemd/fleeting.container".into(),
        Manager::User(user) => format!("/home/{user}/.config/containers/systemd/fleeting.container"),
    };
    host.run(&["mv", &file, &file.replace("fleeting", "renamed")])?;
    manager.systemctl(host, &["daemon-reload"])?;
    let began = Instant::now();
    site.expect_reset()?;
    ensure!(began.elapsed() < Duration::from_secs(10), "told after {:?}", began.elapsed());
    let errors = site.await_errors(1)?;
    ensure!(errors[0].contains("fleeting.service"), "{errors:#?}");
    ensure!(manager.show(host, &site.socket(), "ActiveState")? == "active", "the socket went along");

    host.run(&["mv", &file.replace("fleeting", "renamed"), &file])?;
    manager.systemctl(host, &["daemon-reload"])?;
    site.check_echo().with_context(|| site.journals())?;
    expect_asleep(&site)?;

    // What was written can be removed although its quadlet is no more.
    host.run(&["rm", &file])?;
    manager.systemctl(host, &["daemon-reload"])?;
    let removed = activate(host, manager, "fleeting --remove")?;
    ensure!(removed.success(), "{removed:?}");
    let left = tree(host, manager)?;
    ensure!(!left.iter().any(|line| line.contains("fleeting")), "{left:#?}");
    Ok(())
}

/// `systemctl stop` of the socket while clients are held for a service that starts: those are served still, no other is.
pub fn socket_stopped(host: &Host, manager: Manager) -> Result<()> {
    let (plan, gate) = Plan::gated(host, manager, "halted", "")?;
    let site = Site::activated(host, manager, "halted", &plan, &IDLE)?;
    let clients: Vec<TcpStream> = (0..5).map(|_| site.client()).collect::<Result<_>>()?;
    host.wait_until("the clients are held", PATIENCE, || {
        Ok(site.forwarder_show("StatusText")?.contains("5 clients waiting"))
    })?;
    manager.systemctl(host, &["stop", "--no-block", &site.socket()])?;
    host.write(&gate, "")?;
    for client in clients {
        client.set_read_timeout(Some(PATIENCE))?;
        let answer = ask(client, b"held").with_context(|| {
            let jobs = manager.systemctl(host, &["list-jobs"]).unwrap_or_default();
            format!("{jobs}\n{}", site.journals())
        })?;
        ensure!(answer == b"held", "{answer:?}\n{}", site.journals());
    }
    site.await_exit()?;
    ensure!(site.client().is_err(), "there is a listener although the socket is stopped");
    manager.systemctl(host, &["start", &site.socket()])?;
    site.check_echo().with_context(|| site.journals())?;
    expect_asleep(&site)
}

pub fn hundred_at_once(host: &Host, manager: Manager) -> Result<()> {
    const CLIENTS: usize = 100;
    let site = Site::activated(host, manager, "crowd", &Plan::service(manager, 0.3, ""), &IDLE)?;
    let began = Instant::now();
    let clients: Vec<TcpStream> = host.in_network(|| {
        (0..CLIENTS).map(|_| Ok(TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, site.port))?)).collect()
    })?;
    let connected = began.elapsed();
    for (number, client) in clients.into_iter().enumerate() {
        client.set_read_timeout(Some(PATIENCE))?;
        let question = format!("client {number}");
        let answer = ask(client, question.as_bytes()).with_context(|| site.journals())?;
        ensure!(answer == question.as_bytes(), "client {number} got {answer:?}");
    }
    note(&format!(
        "{manager:?}: {CLIENTS} clients connected in {connected:?}, answered in {:?}",
        began.elapsed()
    ));
    expect_asleep(&site)?;
    let ended = site.ended(CLIENTS)?;
    let cold = ended.iter().filter(|record| record.get("BRO_COLD_START_MS").is_some()).count();
    ensure!(cold == 1, "{cold} clients say that they woke the container");
    Ok(())
}

/// A container that dies whenever it is started, and that its unit starts again: every client is reset within the start
/// timeout, more of them than systemd's start limit allows starts; the activator stays, and serves once the container is well.
pub fn crash_loop(host: &Host, manager: Manager) -> Result<()> {
    let data = folder(host, manager, "loops")?;
    let mut plan = Plan::busybox("test -e /data/well || exit 3; exec nc -ll -p 7 -e /bin/cat", "");
    plan.container.push_str(&format!("\nVolume={data}:/data\n[Service]\nRestart=always\nRestartSec=100ms"));
    let site = Site::activated(host, manager, "loops", &plan, &["--start-timeout", "2s"])?;
    for client in 1..=7 {
        let began = Instant::now();
        site.expect_reset().with_context(|| format!("client {client}\n{}", site.journals()))?;
        let waited = began.elapsed();
        // Not at the end of the usual start timeout (90 s).
        ensure!(waited < Duration::from_secs(20), "client {client} was reset after {waited:?}");
        let socket = manager.show(host, &site.socket(), "ActiveState")?;
        ensure!(socket == "active", "after client {client} the socket is {socket}");
    }
    let forwarder = site.forwarder_show("MainPID")?;
    ensure!(forwarder != "0" && site.forwarder_show("NRestarts")? == "0", "{}", site.journals());
    host.write(&format!("{data}/well"), "")?;
    manager.systemctl(host, &["reset-failed", &site.unit()]).ok();
    site.check_echo().with_context(|| site.journals())?;
    ensure!(site.forwarder_show("MainPID")? == forwarder, "{}", site.journals());
    Ok(())
}

/// A unit that ends without having said that it is ready (Result=protocol, as when Podman's word for its container is lost) is
/// started once more for its client, and not a third time.
pub fn readiness_lost(host: &Host, manager: Manager) -> Result<()> {
    let data = folder(host, manager, "lost")?;
    let (port, inner) = (host.free_port()?, host.free_port()?);
    let start = format!(
        "echo started >>{data}/starts; test $(wc -l <{data}/starts) -ge $(cat {data}/good) || exit 0; \
         systemd-notify --ready; exec busybox nc -ll -p {inner} -e /bin/cat"
    );
    let service = format!("[Service]\nType=notify\nNotifyAccess=all\nExecStart=/bin/sh -c '{start}'\n");
    let forwarder = format!(
        "[Service]\nType=notify\nRuntimeDirectory=bro/%N\nExecStart=/usr/local/bin/bro forward --unit lost.service \
         --exit-idle-time 500ms 127.0.0.1:{inner}\n"
    );
    manager.unit(host, "lost.service", &service.replace("$", "$$"))?;
    manager.unit(host, "lost-in.service", &forwarder)?;
    manager.unit(host, "lost-in.socket", &format!("[Socket]\nListenStream=127.0.0.1:{port}\n"))?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", "lost-in.socket"])?;
    let journal = || manager.journal(host, "lost-in.service").unwrap_or_default();
    let retries = || journal().lines().filter(|line| line.contains("Result=protocol")).count();
    let starts = || -> Result<usize> { Ok(host.run(&["cat", &format!("{data}/starts")])?.lines().count()) };

    // The second start is a good one.
    host.write(&format!("{data}/good"), "2")?;
    let answer = ask(host.connect(port)?, b"found").with_context(journal)?;
    ensure!(answer == b"found", "{answer:?}\n{}", journal());
    let retried = |times: usize| {
        host.wait_until(&format!("{times} retries in the log"), PATIENCE, || Ok(retries() >= times))
            .with_context(journal)
    };
    retried(1)?;
    ensure!(starts()? == 2 && retries() == 1, "{} starts: {}", starts()?, journal());
    manager.wait_for(host, "lost-in.service", "ActiveState", "inactive", PATIENCE)?;
    manager.wait_for(host, "lost.service", "ActiveState", "inactive", PATIENCE)?;

    // None is: the client is told after four.
    host.write(&format!("{data}/good"), "99")?;
    let mut client = host.connect(port)?;
    let seen = client.read(&mut [0; 1]);
    ensure!(seen.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "{}", journal());
    retried(4)?;
    ensure!(starts()? == 6 && retries() == 4, "{} starts: {}", starts()?, journal());
    manager.systemctl(host, &["stop", "lost-in.socket", "lost-in.service", "lost.service"])?;
    Ok(())
}

/// A new version of the container under a forwarder with a client: the next one sees the new version.
pub fn updated(host: &Host, manager: Manager) -> Result<()> {
    let plan = |answer: &str| Plan::busybox(&format!("exec nc -ll -p 7 -e /bin/echo {answer}"), "");
    let site = Site::activated(host, manager, "version", &plan("old"), &[])?;
    let answer = site.ask(b"")?;
    ensure!(answer == b"old\n", "{answer:?}");
    let forwarder = site.forwarder_show("MainPID")?;
    plan("new").write_quadlet(host, manager, "version")?;
    manager.systemctl(host, &["daemon-reload"])?;
    // Clients come all the time while it restarts: held, or served by either version.
    let restart = std::thread::scope(|scope| {
        let restarting = scope.spawn(|| manager.systemctl(host, &["restart", &site.unit()]));
        let mut answers = Vec::new();
        while !restarting.is_finished() {
            answers.push(site.ask(b"").unwrap_or_default());
        }
        restarting.join().expect("it does not panic").map(|_| answers)
    })?;
    ensure!(
        restart.iter().all(|answer| [&b"old\n"[..], b"new\n", b""].contains(&&answer[..])),
        "{restart:?}"
    );
    let answer = site.ask(b"").with_context(|| site.journals())?;
    ensure!(answer == b"new\n", "{answer:?}");
    ensure!(site.forwarder_show("MainPID")? == forwarder, "the forwarder was restarted: {}", site.journals());
    Ok(())
}

/// A client that comes while the idle container is being stopped is served afterwards.
pub fn client_while_stopping(host: &Host, manager: Manager) -> Result<()> {
    let mut plan = Plan::busybox("trap '' TERM; nc -ll -p 7 -e /bin/cat; exit", "");
    plan.container = plan.container.replace("StopSignal=SIGKILL", "StopTimeout=2");
    let site = Site::activated(host, manager, "leaving", &plan, &IDLE)?;
    site.check_echo()?;
    manager.wait_for(host, &site.unit(), "ActiveState", "deactivating", PATIENCE)?;
    site.check_echo().with_context(|| site.journals())?;
    site.await_exit()?;
    site.await_container_gone()
}

/// Another forwarder of the same container has a client: the idle one leaves it running.
pub fn two_activators(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan::service(manager, 0.0, "");
    let site = Site::activated(host, manager, "common", &plan, &["--exit-idle-time", "400ms"])?;
    let port = host.free_port()?;
    manager.unit(host, "common-too.socket", &format!("[Socket]\nListenStream=127.0.0.1:{port}\n"))?;
    let forward =
        format!("--unit common.service --container systemd-common --exit-idle-time 400ms 127.0.0.1:{INNER}");
    let service = format!(
        "[Service]\nType=notify\nExecStart=/usr/local/bin/bro forward {forward}\nRuntimeDirectory=bro/%N\n"
    );
    manager.unit(host, "common-too.service", &service)?;
    manager.systemctl(host, &["daemon-reload"])?;
    manager.systemctl(host, &["start", "common-too.socket"])?;

    let first = site.held()?;
    let (run, _) = site.who()?;
    let client = host.connect(port)?;
    echo(&client, b"held").with_context(|| site.journals())?;
    drop(first);
    client.set_read_timeout(Some(Duration::from_millis(1500)))?;
    // The one that woke it leaves; the container stays for the other's client.
    site.await_exit()?;
    match (&client).read(&mut [0; 1]) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
        other => anyhow::bail!("the other forwarder's client saw {other:?}\n{}", site.journals()),
    }
    ensure!(site.who()?.0 == run, "the container was restarted");
    drop(client);
    manager.wait_for(host, "common-too.service", "ActiveState", "inactive", PATIENCE)?;
    expect_asleep(&site)?;
    manager.systemctl(host, &["stop", "common-too.socket"])?;
    Ok(())
}

/// The disk fills up after any one of the files: nothing is left of the others, and once there is room it works.
pub fn disk_full(host: &Host) -> Result<()> {
    let other = Manager::User("other");
    Plan::service(other, 0.0, "").write_quadlet(host, other, "full")?;
    let folder = "/home/other/.config/systemd/user";
    other.unit(host, "there.target", "[Unit]\n")?;
    let uid = host.uid("other")?;
    let port = host.free_port()?;
    let words =
        format!("full --external-port 127.0.0.1:{port} --internal-port {INNER} --exit-idle-time 500ms");
    // Room for so many files of one page each.
    for room in 0..2 {
        host.sh(&format!(
            "mount -t tmpfs -o size=64k,mode=755,uid={uid},gid={uid} small {folder}; \
             dd if=/dev/zero of={folder}/.filler bs=4096 count={} 2>/dev/null; chown other:other {folder}/.filler",
            16 - room
        ))?;
        let before = tree(host, other)?;
        let ran = activate(host, other, &words)?;
        let after = tree(host, other)?;
        ensure!(ran.code == 1 && ran.stderr.contains("No space left"), "room for {room}: {ran:?}");
        ensure!(after == before, "room for {room}: something is left: {after:#?}");
        ensure!(host.connect(port).is_err(), "room for {room}: there is a listener");
        host.sh(&format!("rm {folder}/.filler"))?;
        if room == 1 {
            let ran = activate(host, other, &words)?;
            ensure!(ran.success(), "{ran:?}");
            ensure!(ask(host.connect(port)?, b"room")? == b"room");
            ensure!(activate(host, other, "full --remove")?.success());
            other.systemctl(host, &["stop", "full.service"])?;
        }
        host.sh(&format!("umount -l {folder}"))?;
    }
    Ok(())
}
