//! `--direct`: programs that take an activated socket over themselves, with nothing in between and with `Network=none`.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{PATIENCE, Plan, ask, folder};
use bro_tests::host::{Host, Manager};

use crate::activated::{activate, tree};

pub fn nginx(host: &Host, manager: Manager) -> Result<()> {
    manager.import_image(host, "nginx", "docker.io/library/nginx")?;
    let port = host.free_port()?;
    let files = folder(host, manager, "taken")?;
    let conf = format!(
        "pid /run/nginx.pid; error_log stderr; events {{}} http {{ access_log /dev/stdout; server {{ listen 127.0.0.1:{port}; \
         root /usr/share/nginx/html; }} }}"
    );
    host.write(&format!("{files}/nginx.conf"), conf)?;
    let plan = Plan::new(
        &format!("Image=docker.io/library/nginx\nVolume={files}/nginx.conf:/etc/nginx/nginx.conf:ro"),
        "",
        "",
    );
    plan.write_quadlet(host, manager, "taken")?;
    let before = tree(host, manager)?;
    let ran = activate(host, manager, &format!("taken --direct --external-port 127.0.0.1:{port}"))?;
    ensure!(ran.success(), "{ran:?}");
    ensure!(
        manager.show(host, "taken.service", "ActiveState")? == "inactive",
        "it runs before its first client"
    );
    for _ in 0..2 {
        let page = host.sh(&format!("curl --silent --fail --max-time 20 http://127.0.0.1:{port}/"));
        let page = page.with_context(|| manager.journal(host, "taken.service").unwrap_or_default())?;
        ensure!(page.contains("Welcome to nginx!"), "{page}");
        // It may answer before Podman has told systemd that it is ready.
        manager.wait_for(host, "taken.service", "ActiveState", "active", PATIENCE)?;
        let interfaces = manager.run(host, &["podman", "exec", "systemd-taken", "ip", "-o", "link"])?;
        ensure!(interfaces.lines().count() == 1 && interfaces.contains(": lo:"), "{interfaces}");
        let doctor = manager.try_run(host, &["bro", "doctor", "taken"])?;
        ensure!(doctor.success() && doctor.stdout.contains("systemd-taken has taken"), "{doctor:?}");
        let fenced = doctor.stdout.contains("around the sockets of taken.socket");
        ensure!(fenced == (manager == Manager::System), "{doctor:?}");
        // It is stopped as any container is, and its next client wakes it.
        manager.systemctl(host, &["stop", "taken.service"])?;
        ensure!(manager.show(host, "taken.socket", "ActiveState")? == "active", "the socket stopped with it");
    }
    // nginx lets go of what its configuration does not listen at.
    let other = host.free_port()?;
    let configured = host.run(&["cat", &format!("{files}/nginx.conf")])?;
    host.write(
        &format!("{files}/nginx.conf"),
        configured.replace(&format!(":{port};"), &format!(":{other};")),
    )?;
    manager.systemctl(host, &["start", "taken.service"])?;
    host.wait_until("doctor sees it", PATIENCE, || {
        let doctor = manager.try_run(host, &["bro", "doctor", "taken"])?;
        Ok(doctor.code == 1
            && doctor.stdout.contains(&format!("it listens at 127.0.0.1:{other}"))
            && doctor.stdout.contains(&format!("`listen 127.0.0.1:{port}`")))
    })?;
    let removed = activate(host, manager, "taken --remove")?;
    ensure!(removed.success(), "{removed:?}");
    ensure!(removed.stdout.contains("taken.service was stopped: it held the socket"), "{removed:?}");
    manager.systemctl(host, &["stop", "taken.service"])?;
    ensure!(
        tree(host, manager)? == before,
        "--remove left, or took, something:\n{:#?}",
        tree(host, manager)?
    );
    Ok(())
}

/// socat takes descriptor 3 and echoes.
fn echo(host: &Host, manager: Manager, external: &str, check: impl Fn() -> Result<Vec<u8>>) -> Result<()> {
    let plan =
        Plan::new("Image=docker.io/alpine/socat\nExec=ACCEPT-FD:3,fork EXEC:cat\nStopSignal=SIGKILL", "", "");
    plan.write_quadlet(host, manager, "echo")?;
    let ran = activate(host, manager, &format!("echo --direct --external-port {external}"))?;
    ensure!(ran.success(), "{ran:?}");
    for _ in 0..2 {
        let answer = check().with_context(|| manager.journal(host, "echo.service").unwrap_or_default())?;
        ensure!(answer == b"hello", "{answer:?}\n{}", manager.journal(host, "echo.service")?);
        manager.systemctl(host, &["stop", "echo.service"])?;
    }
    ensure!(activate(host, manager, "echo --remove")?.success());
    Ok(())
}

pub fn echo_over_tcp(host: &Host, manager: Manager) -> Result<()> {
    let port = host.free_port()?;
    echo(host, manager, &format!("127.0.0.1:{port}"), || ask(host.connect(port)?, b"hello"))
}

pub fn echo_over_unix(host: &Host, manager: Manager) -> Result<()> {
    let path = match manager {
        Manager::System => "/run/echo.sock".into(),
        Manager::User(user) => format!("/run/user/{}/echo.sock", host.uid(user)?),
    };
    echo(host, manager, &path, || {
        let mut client = UnixStream::connect(host.path(&path))?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.write_all(b"hello")?;
        client.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer)?;
        Ok(answer)
    })
}

/// A container that dies whenever it is started: more clients than any of systemd's limits allows are told at once, one start
/// each, the socket goes on listening, and the first client after it is well is served.
pub fn crash_loop(host: &Host, manager: Manager) -> Result<()> {
    const CLIENTS: usize = 25;
    let data = folder(host, manager, "falls")?;
    let script = "test -e /data/well || exit 3; exec socat ACCEPT-FD:3,fork EXEC:cat";
    let plan = Plan::new(
        &format!(
            "Image=docker.io/alpine/socat\nEntrypoint=/bin/sh\nExec=-c \"{script}\"\nStopSignal=SIGKILL\nVolume={data}:/data"
        ),
        "",
        "",
    );
    plan.write_quadlet(host, manager, "falls")?;
    let port = host.free_port()?;
    let ran = activate(host, manager, &format!("falls --direct --external-port 127.0.0.1:{port}"))?;
    ensure!(ran.success(), "{ran:?}");
    let listens = || -> Result<()> {
        let state = manager.show(host, "falls.socket", "ActiveState")?;
        ensure!(state == "active", "the socket is {state}: {}", manager.journal(host, "falls.socket")?);
        Ok(())
    };
    for client in 1..=CLIENTS {
        let mut stream = host.connect(port).with_context(|| format!("client {client}"))?;
        let began = Instant::now();
        stream.write_all(b"hello, service?").ok();
        match stream.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => {
                anyhow::bail!("client {client} saw {other:?}: {}", manager.journal(host, "falls.service")?)
            }
        }
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "client {client} was told after {:?}",
            began.elapsed()
        );
        listens()?;
    }
    // No client waits, so nothing is started any more.
    let starts = || -> Result<usize> {
        let journal = manager.journal(host, "falls.service")?;
        Ok(journal.lines().filter(|line| line.starts_with("Starting ")).count())
    };
    host.wait_until("the last start is over", PATIENCE, || {
        Ok(matches!(manager.show(host, "falls.service", "ActiveState")?.as_str(), "failed" | "inactive"))
    })?;
    let after = starts()?;
    ensure!((1..=CLIENTS).contains(&after), "{after} starts for {CLIENTS} clients");
    std::thread::sleep(Duration::from_secs(3));
    ensure!(starts()? == after, "it is started without a client");

    host.write(&format!("{data}/well"), "")?;
    let answer = ask(host.connect(port)?, b"hello");
    let answer = answer.with_context(|| manager.journal(host, "falls.service").unwrap_or_default())?;
    ensure!(answer == b"hello", "{answer:?}");
    listens()?;
    ensure!(activate(host, manager, "falls --remove")?.success());
    manager.systemctl(host, &["stop", "falls.service"])?;
    Ok(())
}

/// While the service is restarted, a new client waits and is served by its next run; while it is stopped, the client is told, and it
/// stays stopped until the next one comes.
pub fn client_while_restarting(host: &Host, manager: Manager) -> Result<()> {
    let data = folder(host, manager, "anew")?;
    // After the end of what listens it says so, and goes on until it is let go; for StopTimeout= at most.
    let script = "socat ACCEPT-FD:3,fork EXEC:cat & listening=$!\n\
                  last() { kill $listening; wait $listening; touch /data/deaf; until test -e /data/go; do sleep 0.1; done; exit 0; }\n\
                  trap last TERM; wait";
    host.write(&format!("{data}/run"), script)?;
    let plan = Plan::new(
        &format!(
            "Image=docker.io/alpine/socat\nEntrypoint=/bin/sh\nExec=/data/run\nStopTimeout=60\nVolume={data}:/data"
        ),
        "",
        "",
    );
    plan.write_quadlet(host, manager, "anew")?;
    let port = host.free_port()?;
    let ran = activate(host, manager, &format!("anew --direct --external-port 127.0.0.1:{port}"))?;
    ensure!(ran.success(), "{ran:?}");
    let journal = || manager.journal(host, "anew.service").unwrap_or_default();
    let (deaf, go) = (format!("{data}/deaf"), format!("{data}/go"));
    let late = |verb: &str| -> Result<std::net::TcpStream> {
        host.run(&["rm", "-f", &deaf, &go])?;
        let answer = ask(host.connect(port)?, b"early").with_context(journal)?;
        ensure!(answer == b"early", "{answer:?}");
        manager.wait_for(host, "anew.service", "ActiveState", "active", PATIENCE)?;
        manager.systemctl(host, &["--no-block", verb, "anew.service"])?;
        manager.wait_for(host, "anew.service", "ActiveState", "deactivating", PATIENCE)?;
        // Only when the old one has let go of it does a client find no listener.
        host.wait_until("nothing listens in the container", PATIENCE, || Ok(host.path(&deaf).exists()))
            .with_context(journal)?;
        let client = host.connect(port)?;
        let state = manager.show(host, "anew.service", "ActiveState")?;
        ensure!(state == "deactivating", "the client has come too late, it is {state}: {}", journal());
        host.write(&go, "")?;
        Ok(client)
    };
    let answer = ask(late("restart")?, b"late").with_context(journal)?;
    ensure!(answer == b"late", "{answer:?}: {}", journal());

    let mut turned_away = late("stop")?;
    turned_away.write_all(b"late").ok();
    match turned_away.read(&mut [0; 1]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => anyhow::bail!("while it was stopped a client saw {other:?}: {}", journal()),
    }
    // It is told at the end of the stop. A start for it would have served it.
    manager.wait_for(host, "anew.service", "ActiveState", "inactive", PATIENCE)?;
    let answer = ask(host.connect(port)?, b"next").with_context(journal)?;
    ensure!(answer == b"next", "{answer:?}");
    ensure!(activate(host, manager, "anew --remove")?.success());
    manager.systemctl(host, &["stop", "anew.service"])?;
    Ok(())
}

/// With `--restrict-network` the container, and Podman with it, has nothing but the socket that was passed.
pub fn restricted(host: &Host, manager: Manager) -> Result<()> {
    let plan =
        Plan::new("Image=docker.io/alpine/socat\nExec=ACCEPT-FD:3,fork EXEC:cat\nStopSignal=SIGKILL", "", "");
    plan.write_quadlet(host, manager, "bound")?;
    let before = tree(host, manager)?;
    let port = host.free_port()?;
    let words = format!("bound --direct --restrict-network --external-port 127.0.0.1:{port}");
    let ran = activate(host, manager, &words)?;
    ensure!(ran.success(), "{ran:?}");
    // As after a boot: there is no user namespace of Podman's yet, and the unit may not make one.
    if manager != Manager::System {
        manager.run(host, &["podman", "system", "migrate"])?;
    }
    for _ in 0..2 {
        let answer = ask(host.connect(port)?, b"hello");
        let answer = answer.with_context(|| manager.journal(host, "bound.service").unwrap_or_default())?;
        ensure!(answer == b"hello", "{answer:?}\n{}", manager.journal(host, "bound.service")?);
        // It may answer before Podman has told systemd that it is ready, and which process is the main one.
        manager.wait_for(host, "bound.service", "ActiveState", "active", PATIENCE)?;
        let conmon = manager.show(host, "bound.service", "MainPID")?;
        let status = std::fs::read_to_string(host.path(&format!("/proc/{conmon}/status")));
        let status = status.with_context(|| {
            format!("process {conmon}\n{}", manager.journal(host, "bound.service").unwrap_or_default())
        })?;
        // As with Network=none.
        let main =
            manager.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", "systemd-bound"])?;
        let interfaces = std::fs::read_to_string(host.path(&format!("/proc/{main}/net/dev")));
        let interfaces = interfaces.with_context(|| format!("process {main}"))?;
        let interfaces: Vec<&str> =
            interfaces.lines().skip(2).filter_map(|line| line.split(':').next()).collect();
        ensure!(interfaces.iter().all(|name| name.trim() == "lo") && interfaces.len() == 1, "{interfaces:?}");
        ensure!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
        manager.systemctl(host, &["stop", "bound.service"])?;
    }
    let families = manager.show(host, "bound.service", "RestrictAddressFamilies")?;
    // What the kernel says to a process that tries, in the unit's place.
    let systemd_run = ["systemd-run", "--user", "--quiet", "--wait", "--pipe"];
    let run = systemd_run.into_iter().filter(|word| *word != "--user" || manager != Manager::System);
    let restricted = format!("RestrictAddressFamilies={families}");
    let attempt = "import socket\ntry: socket.socket(socket.AF_INET)\nexcept OSError as e: print(e.errno)";
    let run: Vec<&str> = run.chain(["-p", &restricted, "python3", "-c", attempt]).collect();
    let refused = manager.run(host, &run)?;
    ensure!(refused == nix::libc::EAFNOSUPPORT.to_string(), "{refused}");
    let mut families: Vec<&str> = families.split(' ').collect();
    families.sort_unstable();
    ensure!(families == ["AF_NETLINK", "AF_UNIX"], "{families:?}");
    let command = manager.show(host, "bound.service", "ExecStart")?;
    ensure!(command.contains("--pull never"), "{command}");
    let removed = activate(host, manager, "bound --remove")?;
    ensure!(removed.success(), "{removed:?}");
    manager.systemctl(host, &["stop", "bound.service"])?;
    ensure!(
        tree(host, manager)? == before,
        "--remove left, or took, something:\n{:#?}",
        tree(host, manager)?
    );
    Ok(())
}
