//! Waking a container on its first connection, and letting it sleep again.

use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bro_tests::host::cases::note;
use bro_tests::host::{Host, Manager};
use nix::time::{ClockId, clock_gettime};

use crate::site::{INNER, PATIENCE, Plan, Site, ask, python, text};

pub fn wakes_sleeps_and_wakes(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "wake", &Plan::service(manager, 0.3, "--exit-idle-time 700ms"))?;
    for round in 1..=2 {
        ensure!(site.forwarder_show("ActiveState")? == "inactive", "a forwarder runs without a client");
        let began = Instant::now();
        let (_, listening) = site.who()?;
        let cold = began.elapsed();
        let since_listening =
            Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?) - Duration::from_nanos(listening);
        note(&format!(
            "{manager:?} round {round}: first answer after {} ms (300 ms of it the service's own sleep), \
             {:.1} ms after it listened",
            cold.as_millis(),
            since_listening.as_secs_f64() * 1e3,
        ));
        site.check_echo()?;
        site.await_exit()?;
        site.await_container_gone()?;

        let ended = site.ended(2 * round)?;
        let (woke, echoed) = (&ended[2 * round - 2], &ended[2 * round - 1]);
        for record in [woke, echoed] {
            ensure!(text(record, "BRO_REASON") == "eof", "{record}");
            // As root the kernel relay may be had, though not yet for the service's first connection.
            let relay = text(record, "BRO_RELAY");
            ensure!(relay == "splice" || manager == Manager::System && relay == "sockmap", "{record}");
            ensure!(text(record, "BRO_PEER").starts_with("127.0.0.1:"), "{record}");
            ensure!(text(record, "BRO_TARGET") == format!("127.0.0.1:{INNER}"), "{record}");
        }
        let cold_start: u64 = text(woke, "BRO_COLD_START_MS").parse()?;
        ensure!(
            (300..=cold.as_millis() as u64 + 1).contains(&cold_start),
            "cold start: {cold_start} ms of {cold:?}"
        );
        ensure!(echoed.get("BRO_COLD_START_MS").is_none(), "only who wakes has a cold start: {echoed}");
        ensure!(
            text(echoed, "BRO_TO_SERVICE") == "100000" && text(echoed, "BRO_TO_CLIENT") == "100000",
            "{echoed}"
        );
    }
    ensure!(site.errors()?.is_empty(), "errors were logged: {:?}", site.errors()?);
    Ok(())
}

pub fn leaves_running_what_ran(host: &Host, manager: Manager) -> Result<()> {
    let site = Site::new(host, manager, "ran", &Plan::service(manager, 0.0, "--exit-idle-time 300ms"))?;
    manager.systemctl(host, &["start", "ran.service"])?;
    site.check_echo()?;
    site.await_exit()?;
    ensure!(
        manager.show(host, "ran.service", "ActiveState")? == "active",
        "bro stopped what it had not started"
    );
    Ok(())
}

pub fn started_by_dependencies(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan {
        container_unit: "StopWhenUnneeded=yes",
        unit: "Requires={name}.service\nAfter={name}.service",
        forward: format!("--container systemd-{{name}} --exit-idle-time 500ms 127.0.0.1:{INNER}"),
        ..Plan::service(manager, 0.5, "")
    };
    let site = Site::new(host, manager, "required", &plan)?;
    for _ in 0..2 {
        site.check_echo()?;
        site.await_exit()?;
        site.await_container_gone()?;
    }
    Ok(())
}

pub fn hundred_clients(host: &Host, manager: Manager) -> Result<()> {
    const CLIENTS: usize = 100;
    let site = Site::new(host, manager, "hundred", &Plan::service(manager, 0.5, "--exit-idle-time 1s"))?;
    let began = Instant::now();
    let clients: Vec<TcpStream> = host.in_network(|| {
        (0..CLIENTS).map(|_| Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, site.port))?)).collect()
    })?;
    let connected = began.elapsed();
    let mut answered = 0;
    for (number, client) in clients.into_iter().enumerate() {
        client.set_read_timeout(Some(PATIENCE))?;
        let question = format!("client {number}");
        answered += usize::from(ask(client, question.as_bytes())? == question.as_bytes());
    }
    ensure!(answered == CLIENTS, "{answered} of {CLIENTS} were answered");
    note(&format!(
        "{manager:?}: {CLIENTS} clients connected within {connected:?}, answered in {:?}",
        began.elapsed()
    ));
    site.await_exit()?;
    let ended = site.ended(CLIENTS)?;
    let cold = ended.iter().filter(|record| record.get("BRO_COLD_START_MS").is_some()).count();
    ensure!(cold == 1, "{cold} clients say that they woke the container");
    let starts =
        manager.journal(host, "hundred.service")?.lines().filter(|line| line.starts_with("Started ")).count();
    ensure!(starts == 1, "the container was started {starts} times");
    Ok(())
}

/// The forwarder leaves, its container is being stopped, and a client comes: at whatever moment, it is served.
pub fn clients_around_idle_exit(host: &Host, manager: Manager) -> Result<()> {
    let plan = Plan {
        // The container's own limit is in force: that it is woken often is no failure.
        unit: "StartLimitIntervalSec=0",
        ..Plan::service(manager, 0.0, "--exit-idle-time 100ms")
    };
    let site = Site::new(host, manager, "around", &plan)?;
    site.change_socket(&format!(
        "ListenStream=0.0.0.0:{}\nTriggerLimitIntervalSec=0\nPollLimitIntervalSec=0",
        site.port
    ))?;
    // From well before the exit over every phase of it (exit, container stopping, both gone) to well after it.
    for step in 0..40u32 {
        site.who().map_err(|error| error.context(format!("client {step} (pauses of {} ms)", step * 15)))?;
        std::thread::sleep(Duration::from_millis(u64::from(step * 15)));
    }
    site.await_exit()?;
    site.ended(40)?;
    Ok(())
}

pub fn other_readiness(host: &Host, manager: Manager) -> Result<()> {
    // It listens at once; that it is ready is another thing.
    let late = "(sleep 1; touch /tmp/ready) & exec nc -ll -p 7 -e /bin/cat";
    let mut healthy = Plan::busybox(late, "--ready healthy --exit-idle-time 300ms");
    healthy.container.push_str("\nHealthCmd=/bin/test -e /tmp/ready\nHealthInterval=disable");
    let exec = "--ready \"exec:podman exec systemd-{name} /bin/test -e /tmp/ready\" --exit-idle-time 300ms";
    let plans = [("healthy", healthy), ("exec", Plan::busybox(late, exec))];
    for (name, plan) in plans {
        let site = Site::new(host, manager, name, &plan)?;
        let began = Instant::now();
        site.check_echo().map_err(|error| error.context(name))?;
        ensure!(
            began.elapsed() >= Duration::from_secs(1),
            "{name}: served {:?} after the start",
            began.elapsed()
        );
        site.await_exit()?;
    }
    let connect = Plan::new(
        &python(manager, 0.5),
        "--ready connect --exit-idle-time 300ms",
        format_args!("127.0.0.1:{INNER}"),
    );
    let site = Site::new(host, manager, "connect", &connect)?;
    site.check_echo()?;
    site.await_exit()
}
