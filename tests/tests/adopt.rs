//! Adoption: a service that was started under a seccomp profile which notifies listen(2) has the host's own listener from then on. No
//! Podman and no right is needed: the harness plays the OCI runtime and the service manager's store.
//!
//! Needs: a network namespace; python3, redis, nginx, PostgreSQL for one test each. Takes: seconds.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::adopt::{Adoption, Program, Tells, client, expect_greeted, kernel, told};
use bro_tests::peers::PATIENCE;
use bro_tests::process::{self, NOBODY};
use bro_tests::require_namespaces;
use bro_tests::tier::{Need, find_program, met};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, chown};

/// Where services listen, each in a namespace of its own.
const INSIDE: &str = "127.0.0.1:8080";

/// A listener of the host's, non-blocking as a forwarder has them.
fn listener(address: &str) -> Result<(TcpListener, OwnedFd)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let passed = listener.try_clone()?.into();
    Ok((listener, passed))
}

fn v4() -> Result<(TcpListener, Adoption)> {
    let (host, passed) = listener("127.0.0.1:0")?;
    Ok((host, Adoption::new(vec![(passed, INSIDE.into())])?))
}

/// A client inside the container reaches the service.
fn expect_greeted_inside(adoption: &Adoption, container: &Program, address: &str) -> Result<()> {
    let program = bro_tests::bro::adopt();
    let asks = adoption.executed(container, &[program.to_str().context("text")?, "ask", address])?;
    let said = asks.says("told")?;
    ensure!(said.len() > "told ".len(), "a client inside was told nothing");
    ensure!(asks.wait()?.success(), "a client inside");
    Ok(())
}

fn end(container: Program, agent: &Program) -> Result<()> {
    container.end()?;
    agent.says("Ended { listener: 0 }")?;
    Ok(())
}

#[test]
fn a_service_has_the_hosts_listener_and_its_clients_their_own_address() -> Result<()> {
    require_namespaces!();
    for (outside, target, place) in [
        ("127.0.0.1:0", INSIDE, "0.0.0.0:8080"),
        ("127.0.0.1:0", INSIDE, INSIDE),
        ("[::1]:0", "[::1]:8080", "[::]:8080"),
        // IPv6-only from a dual one; dual from an IPv4 one.
        ("[::1]:0", "[::1]:8080", "only[::]:8080"),
        ("127.0.0.1:0", INSIDE, "[::]:8080"),
    ] {
        let (host, passed) = listener(outside)?;
        let adoption = Adoption::new(vec![(passed, target.into())])?;
        let agent = adoption.agent(None)?;
        let early = client(&host)?;
        let service = adoption.service(&["plain", place])?;
        let flags = service.says("ready").with_context(|| place.to_owned())?;
        // Closed on exec and blocking, as the service made its own.
        ensure!(flags.ends_with("02000002"), "{place}: {flags}");
        agent.says("Adopted { listener: 0, options_refused: 0, inside: None }")?;
        let greeted = |client: TcpStream| {
            let (own, said) = (client.local_addr()?.to_string(), told(client)?);
            ensure!(said == own, "{place}: {own} was told {said:?}");
            Ok(())
        };
        greeted(early)?;
        greeted(client(&host)?)?;
        expect_greeted_inside(&adoption, &service, target)?;
        end(service, &agent)?;
        ensure!(adoption.stored() == ["adopt-record"], "{:?} stays in the store", adoption.stored());
    }
    Ok(())
}

#[test]
fn a_unix_socket_too() -> Result<()> {
    require_namespaces!();
    let folder = bro_tests::scratch::Scratch::new()?;
    let (outside, inside) = (folder.join("outside"), folder.join("inside"));
    let inside = inside.to_str().context("text")?;
    let adoption = Adoption::new(vec![(UnixListener::bind(&outside)?.into(), inside.into())])?;
    let agent = adoption.agent(None)?;
    let early = UnixStream::connect(&outside)?;
    let service = adoption.service(&["plain", inside])?;
    service.says("ready")?;
    agent.says("Adopted")?;
    // The path inside is the service's own, and leads to it still.
    for mut client in [early, UnixStream::connect(&outside)?, UnixStream::connect(inside)?] {
        client.set_read_timeout(Some(PATIENCE))?;
        let mut said = String::new();
        client.read_to_string(&mut said)?;
        ensure!(said == "unix", "{said:?}");
    }
    end(service, &agent)
}

#[test]
fn a_service_of_another_family_keeps_its_own_socket() -> Result<()> {
    require_namespaces!();
    let (_host, passed) = listener("[::1]:0")?;
    let adoption = Adoption::new(vec![(passed, INSIDE.into())])?;
    let agent = adoption.agent(None)?;
    let service = adoption.service(&["plain", "0.0.0.0:8080"])?;
    agent.says("NotAdopted { listener: 0, why: Family }")?;
    service.says("ready")?;
    expect_greeted_inside(&adoption, &service, INSIDE)
}

#[test]
fn a_service_elsewhere_and_a_command_in_the_container_keep_theirs() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let other = adoption.service(&["plain", "0.0.0.0:8081"])?;
    other.says("ready")?;
    expect_greeted_inside(&adoption, &other, "127.0.0.1:8081")?;
    let program = bro_tests::bro::adopt();
    let program = program.to_str().context("text")?;
    let executed = adoption.executed(&other, &[program, "serve", "plain", INSIDE])?;
    executed.says("ready")?;
    ensure!(!agent.rest().iter().any(|line| line.contains("dopted")), "something was adopted");
    drop(host);
    Ok(())
}

#[test]
fn a_restart_takes_the_backlog() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let service = adoption.service(&["plain", INSIDE])?;
    service.says("ready")?;
    expect_greeted(client(&host)?)?;
    end(service, &agent)?;
    let waiting = (0..5).map(|_| client(&host)).collect::<Result<Vec<_>>>()?;
    let _next = adoption.service(&["plain", INSIDE])?;
    waiting.into_iter().try_for_each(expect_greeted)
}

#[test]
fn a_restart_inside_the_container_finds_its_address_free() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let program = bro_tests::bro::adopt();
    let program = program.to_str().context("text")?;
    let supervised = ["sh", "-c", r#"while :; do "$0" serve plain 127.0.0.1:8080; done"#, program];
    let container = adoption.container(&supervised)?;
    for _ in 0..3 {
        container.says("ready")?;
        agent.says("Adopted { listener: 0, options_refused: 0, inside: None }")?;
        expect_greeted(client(&host)?)?;
        expect_greeted_inside(&adoption, &container, INSIDE)?;
        let service = process::children(container.pid());
        ensure!(service.len() == 1, "{service:?}");
        kill(Pid::from_raw(service[0]), Signal::SIGKILL)?;
    }
    Ok(())
}

#[test]
fn options_are_carried_over_and_taken_back() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let look = |level, name| bro_adopt::socket::number(host.as_fd(), level, name);
    let all = || -> Result<[i32; 4]> {
        Ok([
            look(libc::SOL_TCP, libc::TCP_NODELAY)?,
            look(libc::SOL_SOCKET, libc::SO_KEEPALIVE)?,
            look(libc::SOL_TCP, libc::TCP_KEEPIDLE)?,
            look(libc::SOL_SOCKET, libc::SO_RCVBUF)?,
        ])
    };
    let before = all()?;
    let service = adoption.service(&["options", INSIDE])?;
    service.says("ready")?;
    let said = told(client(&host)?)?;
    let carried = Tells::BufferLocks.here()?;
    let buffer = if carried { 60_000 } else { before[3] };
    ensure!(said == format!("nodelay 1 keepalive 1 idle 77 buffer {buffer}"), "{said}");
    ensure!(all()? == [1, 1, 77, buffer], "{:?}", all()?);
    end(service, &agent)?;
    ensure!(all()? == before, "{:?} and not {before:?}", all()?);
    Ok(())
}

#[test]
fn a_container_that_ends_while_there_is_no_agent_leaves_no_option() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(Some("Answered(Listen)"))?;
    let look = |level, name| bro_adopt::socket::number(host.as_fd(), level, name);
    let idle = look(libc::SOL_TCP, libc::TCP_KEEPIDLE)?;
    let service = adoption.service(&["options", INSIDE])?;
    service.says("ready")?;
    agent.wait()?;
    ensure!(look(libc::SOL_TCP, libc::TCP_KEEPIDLE)? == 77, "it has its options");
    kill(Pid::from_raw(service.pid()), Signal::SIGKILL)?;
    service.wait()?;
    let next = adoption.agent(None)?;
    next.says("Ended { listener: 0 }")?;
    ensure!(look(libc::SOL_TCP, libc::TCP_KEEPIDLE)? == idle, "an option stays");
    let flags = nix::fcntl::fcntl(&host, nix::fcntl::FcntlArg::F_GETFL)?;
    ensure!(flags & libc::O_NONBLOCK != 0, "the listener stays blocking");
    Ok(())
}

#[test]
fn workers_that_listen_at_what_they_have_inherited_share_the_hosts_listener() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let service = adoption.service(&["workers", INSIDE])?;
    for _ in 0..2 {
        let flags = service.says("ready")?;
        ensure!(flags.ends_with("02000002"), "{flags}");
        agent.says("Adopted { listener: 0, options_refused: 0, inside: None }")?;
    }
    for _ in 0..20 {
        expect_greeted(client(&host)?)?;
    }
    expect_greeted_inside(&adoption, &service, INSIDE)
}

#[test]
fn what_is_watched_before_it_listens_is_watched_after() -> Result<()> {
    require_namespaces!();
    for kind in ["epoll", "epoll-edge"] {
        let (host, adoption) = v4()?;
        let agent = adoption.agent(None)?;
        let early = client(&host)?;
        let service = adoption.service(&[kind, INSIDE])?;
        service.says("ready").with_context(|| kind.to_owned())?;
        agent.says("Adopted")?;
        expect_greeted(early).with_context(|| kind.to_owned())?;
        for _ in 0..3 {
            expect_greeted(client(&host)?).with_context(|| kind.to_owned())?;
        }
        expect_greeted_inside(&adoption, &service, INSIDE)?;
    }
    Ok(())
}

#[test]
fn a_service_that_shuts_its_listener_down_leaves_the_hosts_listening() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let mut service = adoption.service(&["shut", INSIDE])?;
    service.says("ready")?;
    agent.says("Adopted")?;
    let client = client(&host)?;
    service.says("accepted")?;
    ensure!(told(client)?.is_empty(), "it says nothing");
    service.input.as_mut().context("an input")?.write_all(b"now\n")?;
    service.says("shutdown Ok(())")?;
    // The thread that waited in accept(2) is woken, and its next one fails as natively.
    service.says("accept EINVAL")?;
    agent.says("GivenBack { listener: 0 }")?;
    end(service, &agent)?;
    let waiting = self::client(&host)?;
    let _next = adoption.service(&["plain", INSIDE])?;
    expect_greeted(waiting)
}

#[test]
fn connections_are_shut_down_for_any_process_and_thread_that_comes_and_goes() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let service = adoption.service(&["callers", INSIDE])?;
    service.says("ready")?;
    agent.says("Adopted")?;
    service.says("each its own")?;
    expect_greeted(client(&host)?)?;
    end(service, &agent)
}

#[test]
fn calls_that_mean_nothing_fail_as_they_would_without_an_agent() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let _agent = adoption.agent(None)?;
    let service = adoption.service(&["lies", INSIDE])?;
    for expected in [
        "listen at nothing: EBADF",
        "listen at a file: ENOTSOCK",
        "listen at datagrams: EOPNOTSUPP",
        "listen unbound: 0",
        "bind at no address: EINVAL",
        "shutdown of nothing: EBADF",
        "shutdown of a file: ENOTSOCK",
        "shutdown in no way: EINVAL",
        "shutdown of datagrams: ENOTCONN",
    ] {
        let line = service.line(|_| true)?;
        ensure!(line == expected, "{line}, and not {expected}");
    }
    service.says("ready")?;
    expect_greeted(client(&host)?)
}

/// i386 has other numbers for the same calls. A kernel without it kills what asks.
#[cfg(target_arch = "x86_64")]
#[test]
fn calls_of_another_architecture_adopt_nothing_and_end_nothing() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let service = adoption.service(&["foreign", INSIDE])?;
    let Ok(first) = service.says("listen ") else {
        ensure!(!service.wait()?.success(), "it said nothing");
        return Ok(());
    };
    ensure!(first == "listen 0", "{first}");
    let line = service.says("shutdown ")?;
    // The second listen(2) was of this machine's architecture, so what is shut down would have been the host's listener.
    ensure!(line == format!("shutdown {}", -libc::ENOSYS), "{line}");
    service.says("ready")?;
    agent.says("Adopted")?;
    expect_greeted(client(&host)?)
}

#[test]
fn a_flood_of_calls_keeps_no_client_waiting() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    // Before Linux 5.19 the newest call is handed out first (“seccomp: Use FIFO semantics to order notifications”), so that a container which floods keeps its own older ones waiting.
    let kind = if kernel()? >= (5, 19) { "flood" } else { "flood-later" };
    let service = adoption.service(&[kind, INSIDE])?;
    service.says("ready")?;
    agent.says("Adopted")?;
    for _ in 0..50 {
        expect_greeted(client(&host)?)?;
    }
    expect_greeted_inside(&adoption, &service, INSIDE)?;
    let memory = process::memory_kib(agent.pid())?;
    ensure!(memory < 4096, "the agent has {memory} KiB");
    end(service, &agent)
}

#[test]
fn a_damaged_listener_is_handed_to_no_service() -> Result<()> {
    require_namespaces!();
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&host), nix::sys::socket::Shutdown::Both)?;
    let service = adoption.service(&["plain", INSIDE])?;
    agent.says("NotAdopted { listener: 0, why: Damaged(NotListening) }")?;
    service.says("ready")?;
    expect_greeted_inside(&adoption, &service, INSIDE)
}

/// The calls of a container whose agent is killed wait for the next one, which answers what its predecessor had in hands.
#[test]
fn an_agent_may_be_killed_at_every_step() -> Result<()> {
    require_namespaces!();
    for step in [
        "Connected",
        "Introduced",
        "Received(Bind)",
        "Decided(Bind)",
        "Answered(Bind)",
        "Received(Listen)",
        "Carried",
        "Watched",
        "Kept",
        "Replaced",
        "Decided(Listen)",
        "Answered(Listen)",
    ] {
        for kind in ["plain", "epoll"] {
            let (host, adoption) = v4()?;
            let first = adoption.agent(Some(step))?;
            let service = adoption.service(&[kind, INSIDE])?;
            first.wait()?;
            let early = client(&host)?;
            let next = adoption.agent(None)?;
            let with = || format!("{kind} and an agent that was killed at {step}");
            service.says("ready").with_context(with)?;
            expect_greeted(early).with_context(with)?;
            expect_greeted(client(&host)?).with_context(with)?;
            expect_greeted_inside(&adoption, &service, INSIDE).with_context(with)?;
            end(service, &next).with_context(with)?;
            let _after = adoption.service(&[kind, INSIDE])?;
            expect_greeted(client(&host)?).with_context(with)?;
        }
    }
    Ok(())
}

#[test]
fn an_agent_may_be_killed_while_a_service_shuts_its_listener_down() -> Result<()> {
    require_namespaces!();
    for step in ["Received(Shutdown)", "Decided(Shutdown)", "Answered(Shutdown)"] {
        let (host, adoption) = v4()?;
        let first = adoption.agent(Some(step))?;
        let mut service = adoption.service(&["shut", INSIDE])?;
        service.says("ready")?;
        service.input.as_mut().context("an input")?.write_all(b"now\n")?;
        first.wait()?;
        let _next = adoption.agent(None)?;
        service.says("shutdown Ok(())").with_context(|| step.to_owned())?;
        service.says("accept EINVAL").with_context(|| step.to_owned())?;
        ensure!(
            bro_adopt::socket::number(host.as_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? == 1,
            "{step}: the host's listener has ended"
        );
    }
    Ok(())
}

fn program(name: &str) -> Result<String> {
    let found = find_program(name).with_context(|| name.to_owned())?;
    Ok(found.to_str().context("text")?.to_owned())
}

fn needs(more: &[Need]) -> bool {
    let mut needs = bro_tests::suite::namespace_needs();
    needs.extend(more);
    met(std::thread::current().name().unwrap_or("?"), &needs)
}

/// Asks over HTTP, on a connection of its own.
fn asked(host: &TcpListener, path: &str) -> Result<String> {
    let mut client = client(host)?;
    client.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes())?;
    told(client)
}

fn write(adoption: &Adoption, name: &str, text: &str) -> Result<String> {
    let path = adoption.scratch.join(name);
    std::fs::write(&path, text)?;
    Ok(path.to_str().context("text")?.to_owned())
}

#[test]
fn pythons_web_server() -> Result<()> {
    if !needs(&[Need::Program("python3", "python3")]) {
        return Ok(());
    }
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let service =
        adoption.container(&[&program("python3")?, "-m", "http.server", "--bind", "127.0.0.1", "8080"])?;
    let answer = asked(&host, "/")?;
    ensure!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    agent.says("Adopted")?;
    end(service, &agent)
}

#[test]
fn redis_answers_and_restarts() -> Result<()> {
    if !needs(&[Need::Program("redis-server", "redis-server")]) {
        return Ok(());
    }
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let arguments = ["--port", "8080", "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"];
    for _ in 0..2 {
        let mut client = client(&host)?;
        let own = client.local_addr()?;
        let service = adoption.container(&[&[program("redis-server")?.as_str()], &arguments[..]].concat())?;
        client.write_all(b"CLIENT INFO\r\nQUIT\r\n")?;
        let said = told(client)?;
        ensure!(said.contains(&format!("addr={own} ")), "{said}");
        agent.says("Adopted")?;
        end(service, &agent)?;
    }
    Ok(())
}

/// Its clients of before are served, and the next one would wait for ever.
#[test]
fn redis_that_goes_to_another_port_has_given_the_listener_up() -> Result<()> {
    if !needs(&[Need::Program("redis-server", "redis-server")]) {
        return Ok(());
    }
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let redis = [&program("redis-server")?, "--port", "8080", "--bind", "127.0.0.1", "--save", ""];
    let mut first = client(&host)?;
    let _service = adoption.container(&redis)?;
    agent.says("Adopted")?;
    let mut tell = |command: &str| -> Result<()> {
        first.write_all(command.as_bytes())?;
        let mut said = [0; 5];
        first.read_exact(&mut said)?;
        ensure!(&said == b"+OK\r\n", "{command}: {}", String::from_utf8_lossy(&said));
        Ok(())
    };
    tell("CONFIG SET port 8081\r\n")?;
    let mut waiting = client(&host)?;
    agent.says("Closed { listener: 0 }")?;
    // The address inside is free again.
    tell("CONFIG SET port 8080\r\n")?;
    agent.says("Adopted { listener: 0, options_refused: 0, inside: None }")?;
    waiting.write_all(b"QUIT\r\n")?;
    ensure!(told(waiting)? == "+OK\r\n");
    Ok(())
}

#[test]
fn nginx_reloads_under_its_clients() -> Result<()> {
    if !needs(&[Need::Program("nginx", "nginx")]) {
        return Ok(());
    }
    let (host, adoption) = v4()?;
    let agent = adoption.agent(None)?;
    let text = "daemon off; worker_processes 2; pid nginx.pid; error_log stderr; events {} http { access_log off; \
        client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t; \
        server { listen 8080 reuseport; return 200 \"$remote_addr:$remote_port\"; } }";
    let configuration = write(&adoption, "nginx.conf", text)?;
    let prefix = adoption.scratch.path().to_str().context("text")?.to_owned();
    let global = if Uid::effective().is_root() { "user root;" } else { "" };
    let nginx = program("nginx")?;
    let service =
        adoption.container(&[&nginx, "-e", "stderr", "-p", &prefix, "-c", &configuration, "-g", global])?;
    let ask = || {
        let mut client = client(&host)?;
        let own = client.local_addr()?.to_string();
        client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let answer = told(client)?;
        ensure!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(&own), "{own}: {answer}");
        Ok(())
    };
    ask()?;
    agent.says("Adopted")?;
    let workers = process::children(service.pid());
    kill(Pid::from_raw(service.pid()), Signal::SIGHUP)?;
    let replaced = || workers.iter().all(|worker| !process::children(service.pid()).contains(worker));
    ensure!(process::eventually(PATIENCE, || ask().is_ok() && replaced()), "the workers stay");
    ask()?;
    end(service, &agent)
}

#[test]
fn postgresql_over_tcp_and_its_unix_socket() -> Result<()> {
    let server = [Need::Program("initdb", "postgresql"), Need::Program("psql", "postgresql-client")];
    if !needs(&[&server[..], &[Need::Program("setpriv", "util-linux")]].concat()) {
        return Ok(());
    }
    let root = Uid::effective().is_root();
    let folder = bro_tests::scratch::Scratch::new()?;
    let (data, inside) = (folder.join("data"), folder.join("inside"));
    for directory in [&data, &inside] {
        std::fs::create_dir(directory)?;
        if root {
            chown(directory, Some(NOBODY.into()), Some(NOBODY.into()))?;
        }
    }
    let (host, tcp) = listener("127.0.0.1:0")?;
    let outside = folder.join(".s.PGSQL.5432");
    let unix = UnixListener::bind(&outside)?;
    std::fs::set_permissions(&outside, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let path = inside.join(".s.PGSQL.5432").to_str().context("text")?.to_owned();
    let listeners = vec![(tcp, "127.0.0.1:5432".to_owned()), (unix.into(), path)];
    let adoption = Adoption::as_user(listeners, root.then_some(NOBODY))?;

    // The server's own programs are beside it, and its link is elsewhere.
    let initdb = std::fs::canonicalize(program("initdb")?)?;
    let programs = initdb.parent().context("a folder")?;
    let mut command = Command::new(if root { "setpriv" } else { "env" });
    if root {
        command.args(["--clear-groups", &format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}")]);
    }
    command.arg(&initdb).arg("--pgdata").arg(&data).current_dir(folder.path());
    command.args(["--no-sync", "--auth=trust", "--username=test", "--no-instructions", "--locale=C"]);
    let made = command.output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    let agent = adoption.agent(None)?;
    let postgres = programs.join("postgres");
    let directory = format!("-cunix_socket_directories={}", inside.display());
    let service = adoption.container(&[
        postgres.to_str().context("text")?,
        "-D",
        data.to_str().context("text")?,
        &directory,
        "-clisten_addresses=127.0.0.1",
        "-cport=5432",
        "-cfsync=off",
        "-cshared_buffers=16MB",
        "-cdynamic_shared_memory_type=mmap",
    ])?;
    // In the order in which PostgreSQL opens them.
    agent.says("Adopted { listener: 0")?;
    agent.says("Adopted { listener: 1")?;
    let ask = |at: &str, port: u16| -> Result<String> {
        let mut command = Command::new(programs.join("psql"));
        command.args([
            "--no-psqlrc",
            "-At",
            "-h",
            at,
            "-U",
            "test",
            "-d",
            "postgres",
            "-p",
            &port.to_string(),
        ]);
        command.args([
            "-c",
            "select coalesce(host(client_addr), 'unix') from pg_stat_activity where pid = pg_backend_pid()",
        ]);
        let output = command.env("PGCONNECT_TIMEOUT", "20").stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let ready = || ask("127.0.0.1", host.local_addr().map_or(0, |address| address.port())).is_ok();
    ensure!(process::eventually(PATIENCE, ready), "it does not accept clients");
    let over_tcp = ask("127.0.0.1", host.local_addr()?.port())?;
    let over_unix = ask(folder.path().to_str().context("text")?, 5432)?;
    let natively = ask(inside.to_str().context("text")?, 5432)?;
    ensure!(
        [&*over_tcp, &*over_unix, &*natively] == ["127.0.0.1", "unix", "unix"],
        "{over_tcp} {over_unix} {natively}"
    );
    kill(Pid::from_raw(service.pid()), Signal::SIGQUIT)?;
    ensure!(process::ends(service.pid(), Duration::from_secs(20))?, "PostgreSQL goes on");
    agent.says("Ended { listener: 0 }")?;
    agent.says("Ended { listener: 1 }")?;
    Ok(())
}
