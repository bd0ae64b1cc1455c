//! Real services that trust their own host, or lock addresses out, set up as their packages and images set them up: through bro a client
//! gets what it gets over the network, never more, and no client pays for another.
//!
//! Needs: root, kernel BTF, nginx, redis, PostgreSQL, MariaDB, sshd, python3, ip. Takes: seconds.
#![allow(clippy::tests_outside_test_module, reason = "this is a test target")]

mod loopback_users;
mod mariadb;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::bro;
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::Namespace;
use bro_tests::peers::{Address, Conn, Listener, PATIENCE};
use bro_tests::process::{self, NOBODY, Session};
use bro_tests::scratch::Scratch;
use bro_tests::street::{Street, command};
use bro_tests::tier::{Need, find_program, met};
use nix::unistd::chown;

/// Where the services listen inside.
const INSIDE: u16 = 7000;

/// Each relay, as far as it can be had here.
fn relays() -> Vec<&'static [&'static str]> {
    let mut relays: Vec<&[&str]> = vec![&["--relay=splice"], &["--relay=copy"]];
    if met("the kernel relay in source_services", &[Need::Bpf]) {
        relays.push(&["--relay=sockmap"]);
        relays.push(&["--relay=sockmap", "--local-clients=on"]);
    }
    relays
}

/// A service in a namespace without a network, and two clients elsewhere, each with a cable to the street.
struct Stand {
    service: Option<Session>,
    namespace: Namespace,
    strangers: [Namespace; 2],
    street: Street,
    scratch: Scratch,
}

impl Stand {
    fn new() -> Result<Self> {
        let street = Street::new(&[])?;
        let strangers = [street.neighbour(1)?, street.neighbour(2)?];
        let scratch = Scratch::new()?;
        Ok(Self { service: None, namespace: Namespace::new()?, strangers, street, scratch })
    }

    /// Starts `words` in the namespace, as this user.
    fn serve(&mut self, uid: Option<u32>, words: &[String]) -> Result<()> {
        let mut service = Command::new(bro::helper());
        service.arg("launch").arg("--").args(self.namespace.enter());
        if let Some(uid) = uid {
            service
                .args(["setpriv", "--clear-groups"])
                .arg(format!("--reuid={uid}"))
                .arg(format!("--regid={uid}"));
        }
        let log = File::create(self.log())?;
        service.args(words).current_dir(self.scratch.path()).stdin(Stdio::null());
        self.service = Some(Session(service.stdout(log.try_clone()?).stderr(log).spawn()?));
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.scratch.join("service.log")
    }

    fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn forward(&self, options: &[&str]) -> Result<(Listener, Forwarder)> {
        self.forward_to(&format!("127.0.0.1:{INSIDE}"), options)
    }

    fn forward_to(&self, target: &str, options: &[&str]) -> Result<(Listener, Forwarder)> {
        let front = self.street.front("0.0.0.0:0")?;
        let setup = Setup::new().socket(&front).pid(&self.namespace).args(options.iter().copied());
        Ok((front, setup.arg(target).start()?))
    }

    /// A client's command, from this stranger, or (`None`) from the host that the socket is on.
    fn from(&self, stranger: Option<usize>, words: &[&str]) -> Command {
        let mut client = command(stranger.map_or(&self.street.namespace, |nth| &self.strangers[nth]), words);
        client.stdout(Stdio::piped()).stderr(Stdio::piped());
        client
    }
}

/// Where that one finds the street.
fn host(stranger: Option<usize>) -> String {
    stranger.map_or_else(|| "127.0.0.1".to_owned(), |nth| format!("10.66.{}.1", nth + 1))
}

/// As whom the service is to see it.
fn seen(stranger: Option<usize>) -> String {
    stranger.map_or_else(|| "169.254.1.2".to_owned(), |nth| format!("10.66.{}.2", nth + 1))
}

/// Two strangers, and a client on the very host.
const EVERYBODY: [Option<usize>; 3] = [Some(0), Some(1), None];

fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn port(front: &Listener) -> String {
    front.address().port().unwrap_or_default().to_string()
}

/// As the official image's entrypoint sets it up: a client from 127.0.0.1 needs no password.
#[test]
fn postgresql_asks_everybody_for_the_password() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Program("initdb", "postgresql"),
        Need::Program("psql", "postgresql-client"),
        Need::Program("ip", "iproute2"),
    ];
    if !met("postgresql_asks_everybody_for_the_password", &needs) {
        return Ok(());
    }
    let mut stand = Stand::new()?;
    let initdb = fs::canonicalize(find_program("initdb").context("initdb has gone")?)?;
    let programs = initdb.parent().context("a program is in a folder")?;
    let (data, password) = (stand.scratch.join("data"), stand.scratch.join("password"));
    fs::create_dir(&data)?;
    fs::write(&password, "secret\n")?;
    chown(&data, Some(NOBODY.into()), Some(NOBODY.into()))?;
    let mut make = Command::new("setpriv");
    make.args(["--clear-groups", &format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}")]).arg(&initdb);
    make.arg("--pgdata").arg(&data).arg("--pwfile").arg(&password).args(["--username=postgres", "--no-sync"]);
    let made = make.env("LC_ALL", "C").current_dir(stand.scratch.path()).output()?;
    ensure!(made.status.success(), "{}", both(&made));
    let rules = data.join("pg_hba.conf");
    let before = fs::read_to_string(&rules)?;
    ensure!(before.contains("127.0.0.1/32            trust"), "not as the image sets it up: {before}");
    fs::write(&rules, before + "host all all all scram-sha-256\n")?;
    let words = [
        programs.join("postgres").display().to_string(),
        format!("-D{}", data.display()),
        format!("-cunix_socket_directories={}", data.display()),
        format!("-cport={INSIDE}"),
        "-clisten_addresses=*".into(),
        "-cfsync=off".into(),
    ];
    stand.serve(Some(NOBODY), &words)?;
    // Readiness by the table of listeners may come before recovery has ended.
    let is_ready = || stand.said().contains("ready to accept connections");
    ensure!(process::eventually(PATIENCE, is_ready), "{}", stand.said());
    for relay in relays() {
        let (front, forwarder) = stand.forward(relay)?;
        for who in EVERYBODY {
            let ask = |password: Option<&str>| {
                let (host, port) = (format!("--host={}", host(who)), format!("--port={}", port(&front)));
                let query = "select inet_client_addr()";
                let mut psql =
                    stand.from(who, &["psql", "-w", "-U", "postgres", &host, &port, "-Atc", query]);
                psql.env_remove("PGPASSWORD").env("PGPASSFILE", "/dev/null").env("PGCONNECT_TIMEOUT", "20");
                if let Some(password) = password {
                    psql.env("PGPASSWORD", password);
                }
                psql.output().map(|output| both(&output))
            };
            let wrong = ask(Some("wrong"))?;
            ensure!(wrong.contains("password authentication failed"), "{relay:?} {who:?}: {wrong}");
            let none = ask(None)?;
            ensure!(none.contains("no password supplied"), "{relay:?} {who:?}: {none}");
            let right = ask(Some("secret"))?;
            ensure!(right.trim() == seen(who), "{relay:?} {who:?}: {right}");
        }
        forwarder.stop()?;
    }
    Ok(())
}

#[test]
fn redis_keeps_its_protected_mode() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Program("redis-server", "redis-server"),
        Need::Program("redis-cli", "redis-tools"),
        Need::Program("ip", "iproute2"),
    ];
    if !met("redis_keeps_its_protected_mode", &needs) {
        return Ok(());
    }
    let inside = INSIDE.to_string();
    let program = find_program("redis-server").context("redis-server has gone")?.display().to_string();
    // With a password the protected mode lets strangers in who know it, and they can ask who they are.
    for password in [None, Some("secret")] {
        let mut stand = Stand::new()?;
        let mut words = vec![program.clone()];
        words.extend(
            ["--bind", "*", "--port", &inside, "--save", "", "--protected-mode", "yes"].map(Into::into),
        );
        words.extend(password.into_iter().flat_map(|password| ["--requirepass".into(), password.into()]));
        stand.serve(None, &words)?;
        for relay in relays() {
            let (front, forwarder) = stand.forward(relay)?;
            for who in EVERYBODY {
                let port = port(&front);
                let mut words = vec!["redis-cli", "-p", &port];
                let host = host(who);
                words.extend(["-h", &host]);
                match password {
                    None => words.extend(["set", "a", "1"]),
                    Some(password) => words.extend(["-a", password, "--no-auth-warning", "client", "list"]),
                }
                let said = both(&stand.from(who, &words).output()?);
                match password {
                    None => ensure!(said.contains("DENIED"), "{relay:?} {who:?}: {said}"),
                    Some(_) => {
                        let wanted = format!("addr={}:", seen(who));
                        ensure!(said.contains(&wanted), "{relay:?} {who:?}: {said}");
                    }
                }
            }
            forwarder.stop()?;
        }
    }
    Ok(())
}

/// `allow 127.0.0.1; deny all`, the access log, and a limit for each address.
#[test]
fn nginx_tells_clients_apart() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Program("nginx", "nginx"),
        Need::Program("curl", "curl"),
        Need::Program("ip", "iproute2"),
    ];
    if !met("nginx_tells_clients_apart", &needs) {
        return Ok(());
    }
    let mut stand = Stand::new()?;
    let folder = stand.scratch.path().display().to_string();
    let configuration = format!(
        "daemon off; worker_processes 1; user root root; pid {folder}/pid; error_log {folder}/error.log;\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log {folder}/access.log; limit_req_zone $binary_remote_addr zone=each:1m rate=1r/s;\n\
         client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fcgi;\n\
         uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n\
         server {{ listen {INSIDE}; listen [::]:{INSIDE}; root {folder}/www;\n\
         location /own {{ allow 127.0.0.1; allow ::1; deny all; }}\n\
         location /few {{ limit_req zone=each burst=2 nodelay; }} }} }}\n"
    );
    fs::create_dir(stand.scratch.join("www"))?;
    for name in ["own", "few", "all"] {
        fs::write(stand.scratch.join("www").join(name), "here you are\n")?;
    }
    let file = stand.scratch.join("nginx.conf");
    fs::write(&file, configuration)?;
    let program = find_program("nginx").context("nginx has gone")?.display().to_string();
    let error_log = format!("{folder}/error.log");
    stand.serve(None, &[program, "-e".into(), error_log, "-c".into(), file.display().to_string()])?;
    for relay in relays() {
        let (front, forwarder) = stand.forward(relay)?;
        let ask = |who: Option<usize>, name: &str| -> Result<String> {
            let url = format!("http://{}:{}/{name}", host(who), port(&front));
            let words = [
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "--noproxy",
                "*",
                "--max-time",
                "20",
                &url,
            ];
            Ok(both(&stand.from(who, &words).output()?))
        };
        for who in EVERYBODY {
            fs::write(stand.scratch.join("access.log"), "")?;
            ensure!(ask(who, "all")? == "200", "{relay:?} {who:?}");
            let own = ask(who, "own")?;
            ensure!(own == "403", "{relay:?} {who:?} is a local one: {own}");
            let noted = || fs::read_to_string(stand.scratch.join("access.log")).unwrap_or_default();
            ensure!(process::eventually(PATIENCE, || noted().lines().count() == 2), "{}", noted());
            ensure!(noted().lines().all(|line| line.starts_with(&format!("{} ", seen(who)))), "{}", noted());
        }
        // The limit lets three by at once, and then one a second. One takes far more, beside whom the other is served.
        let greedy: Vec<String> = (0..12).map(|_| ask(Some(0), "few")).collect::<Result<_>>()?;
        ensure!(greedy.iter().any(|code| code == "503"), "{relay:?}: no client was limited: {greedy:?}");
        let other = ask(Some(1), "few")?;
        ensure!(other == "200", "{relay:?}: the other pays for it: {other}");
        forwarder.stop()?;
        // What both may take is whole again before the next.
        std::thread::sleep(Duration::from_secs(3));
    }
    Ok(())
}

/// `PerSourceMaxStartups`: a client that does not log in fills what is its own.
#[test]
fn sshd_locks_out_one_and_serves_the_other() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Program("sshd", "openssh-server"),
        Need::Program("ssh-keygen", "openssh-client"),
        Need::Program("ip", "iproute2"),
    ];
    if !met("sshd_locks_out_one_and_serves_the_other", &needs) {
        return Ok(());
    }
    let mut stand = Stand::new()?;
    let key = stand.scratch.join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).output()?;
    ensure!(made.status.success(), "{}", both(&made));
    // Where its package has it made at boot.
    fs::create_dir_all("/run/sshd")?;
    let configuration = format!(
        "Port {INSIDE}\nHostKey {}\nUsePAM no\nPidFile none\nLogLevel VERBOSE\nMaxStartups 100\nPerSourceMaxStartups 3\n",
        key.display()
    );
    let file = stand.scratch.join("sshd_config");
    fs::write(&file, configuration)?;
    let program = find_program("sshd").context("sshd has gone")?.display().to_string();
    stand.serve(None, &[program, "-D".into(), "-e".into(), "-f".into(), file.display().to_string()])?;
    for relay in relays() {
        let (front, forwarder) = stand.forward(relay)?;
        let connect = |who: usize| {
            let to = format!("{}:{}", host(Some(who)), port(&front));
            Conn::new(&stand.strangers[who], &Address::Tcp(to.parse()?))
        };
        // They say nothing. Each one's greeting is waited for, so that they are counted in this order.
        // Who is let in is greeted by its name; others are told so, or not at all.
        let greeted = |client: &Conn| {
            let mut greeting = [0; 4];
            client.recv_exact(&mut greeting).is_ok() && &greeting == b"SSH-"
        };
        let many: Vec<Conn> = (0..8).map(|_| connect(0)).collect::<Result<_>>()?;
        let let_in = many.iter().filter(|client| greeted(client)).count();
        ensure!(let_in == 3, "{relay:?}: {let_in} of 8 were let in\n{}", stand.said());
        let other = connect(1)?;
        let mut greeting = [0; 4];
        other.recv_exact(&mut greeting).with_context(|| format!("{relay:?}: the other pays for it"))?;
        ensure!(&greeting == b"SSH-", "{greeting:?}");
        for who in [0, 1] {
            let noted = || stand.said().contains(&format!("Connection from {} port", seen(Some(who))));
            ensure!(process::eventually(PATIENCE, noted), "{}", stand.said());
        }
        drop((many, other));
        forwarder.stop()?;
        // Until they are all forgotten.
        let last = || {
            let Ok((front, forwarder)) = stand.forward(&["--relay=splice"]) else { return false };
            let to = format!("{}:{}", host(Some(0)), port(&front)).parse();
            let there = to.is_ok_and(|to| {
                Conn::new(&stand.strangers[0], &Address::Tcp(to)).is_ok_and(|client| greeted(&client))
            });
            forwarder.stop().is_ok() && there
        };
        ensure!(process::eventually(PATIENCE, last), "{}", stand.said());
    }
    Ok(())
}
