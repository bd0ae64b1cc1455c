//! Unmodified services behind the kernel relay: nginx, Redis, PostgreSQL and a blocking web server, each asked by its own
//! unmodified client. What they answer, and what reaches them, is compared byte by byte.
//!
//! Needs: root, kernel BTF, nginx, redis, PostgreSQL, busybox, curl. Takes: seconds.

mod runtimes;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use bro_ebpf::{kind, role};
use bro_tests::bro;
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::Namespace;
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Bound, Family, Here, Listener, PATIENCE};
use bro_tests::process::{self, NOBODY, Session};
use bro_tests::programs::Programs;
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, find_program, met};
use nix::unistd::chown;

const CURL: Need = Need::Program("curl", "curl");

/// A namespace with a free port for the service, and a forwarder in front of it. The fields end in this order.
struct Stand {
    forwarder: Forwarder,
    service: Option<Session>,
    /// None where `auto` is splice.
    programs: Option<Programs>,
    front: Listener,
    inside: u16,
    namespace: Namespace,
    scratch: Scratch,
}

impl Stand {
    fn new(by: fn(Setup, &Namespace) -> Setup) -> Result<Self> {
        Self::through("sockmap", by)
    }

    /// With this `--relay=`.
    fn through(relay: &str, by: fn(Setup, &Namespace) -> Setup) -> Result<Self> {
        let namespace = Namespace::new()?;
        let loopback = Family::Tcp4.loopback().context("TCP has one")?;
        let front = Listener::new(&Here, &loopback)?;
        // A port that is free in this namespace, where no other process takes any.
        let probe = Bound::new(&namespace, &loopback)?;
        let inside = probe.address().port().context("a TCP address")?;
        drop(probe);
        let setup = by(Setup::new().socket(&front), &namespace);
        let may_have = ["auto", "sockmap"].contains(&relay);
        let mut setup = setup.arg(format!("--relay={relay}"));
        if may_have {
            setup = setup.arg("--local-clients=on");
        }
        let forwarder = setup.arg(format!("127.0.0.1:{inside}")).start()?;
        let decided =
            |line: &str| line.contains("kernel relay loaded") || line.contains("without the kernel relay");
        let has_programs = may_have && forwarder.log().line(PATIENCE, decided)?.contains("loaded");
        let programs = if has_programs { Some(Programs::of(forwarder.pid())?) } else { None };
        Ok(Self { forwarder, service: None, programs, front, inside, namespace, scratch: Scratch::new()? })
    }

    /// Where clients find it.
    fn port(&self) -> u16 {
        self.front.address().port().expect("it listens on TCP")
    }

    fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port())
    }

    /// Starts `program` in the namespace.
    fn run(&mut self, program: &Path, arguments: &[String]) -> Result<()> {
        let mut command = Command::new(bro::helper());
        command.arg("launch").arg("--").args(self.namespace.enter()).arg(program).args(arguments);
        let log = File::create(self.scratch.join("service.log"))?;
        command.current_dir(self.scratch.path()).stdin(Stdio::null());
        self.service = Some(Session(command.stdout(log.try_clone()?).stderr(log).spawn()?));
        Ok(())
    }

    /// A file of `size` bytes, none of which could stand elsewhere.
    fn file(&self, name: &str, size: usize) -> Result<PathBuf> {
        let path = self.scratch.join(name);
        let mut bytes = vec![0; size];
        Pattern(size as u64).fill(0, &mut bytes);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    /// What the programs take the service for.
    fn is_fit(&self) -> Result<bool> {
        let watched = self.programs.as_ref().map_or(Ok(Vec::new()), Programs::watched)?;
        Ok(watched.iter().any(|watch| watch.role == role::SERVICE && watch.kind == kind::FIT))
    }

    /// Two requests, one after the other, the first of which wakes the service.
    fn warm_up(&self, request: impl Fn() -> Result<()>) -> Result<()> {
        for count in 1..=2 {
            request().context("a first request")?;
            self.forwarder.closings(count)?;
        }
        Ok(())
    }

    /// Every connection ended well, nothing is left in a map, and the kernel relay carried some of it.
    fn finish(self, lanes: bool) -> Result<()> {
        let total = self.forwarder.report()?.total;
        println!("carried: {total:?}");
        ensure!(!lanes || total.kernel > 0, "not one byte took a lane: {total:?}");
        if let Some(programs) = &self.programs {
            programs.expect_nothing_in_use()?;
        }
        ensure!(self.forwarder.log().complaints().is_empty(), "{:?}", self.forwarder.log().complaints());
        self.forwarder.stop()?;
        self.programs.map_or(Ok(()), |programs| programs.expect_gone())
    }
}

fn finished(output: Output) -> Result<String> {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {out}{err}", output.status);
    Ok(out.into_owned())
}

fn curl() -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "40"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn expect_same(one: &Path, other: &Path) -> Result<()> {
    let (one, other) = (fs::read(one)?, fs::read(other).with_context(|| other.display().to_string())?);
    if one != other {
        let differ = one.iter().zip(&other).position(|(one, other)| one != other);
        bail!("{} bytes and {}, different at {differ:?}", one.len(), other.len());
    }
    Ok(())
}

fn download(stand: &Stand, name: &str, options: &[&str]) -> Result<()> {
    let to = stand.scratch.join(&format!("got-{name}"));
    finished(curl().args(options).arg("--output").arg(&to).arg(stand.url(name)).output()?)?;
    expect_same(&stand.scratch.join("www").join(name), &to)
}

/// nginx with one worker process, so that its memory of a connection is the one that all requests meet.
fn nginx(relay: &str, by: fn(Setup, &Namespace) -> Setup, sendfile: &str) -> Result<Stand> {
    let mut stand = Stand::through(relay, by)?;
    fs::create_dir(stand.scratch.join("www"))?;
    let (folder, port) = (stand.scratch.path().display().to_string(), stand.inside);
    let configuration = format!(
        "daemon off; worker_processes 1; user root root; pid {folder}/pid; error_log {folder}/error.log;\n\
         events {{ worker_connections 64; }}\n\
         http {{ access_log off; sendfile {sendfile}; client_max_body_size 0; client_body_timeout 10s;\n\
         client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fcgi;\n\
         uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n\
         server {{ listen 127.0.0.1:{port}; root {folder}/www; dav_methods PUT; }} }}\n"
    );
    let file = stand.scratch.join("nginx.conf");
    fs::write(&file, configuration)?;
    let program = find_program("nginx").context("nginx has gone")?;
    let error_log = format!("{folder}/error.log");
    stand.run(&program, &["-e".into(), error_log, "-c".into(), file.display().to_string()])?;
    stand.file("www/small", 300)?;
    stand.file("www/big", 20 << 20)?;
    stand.warm_up(|| download(&stand, "small", &[]))?;
    Ok(stand)
}

fn nginx_needs(test: &str) -> bool {
    met(test, &[Need::Root, Need::Bpf, Need::Program("nginx", "nginx"), CURL])
}

fn nginx_downloads(by: fn(Setup, &Namespace) -> Setup, sendfile: &str) -> Result<()> {
    let stand = nginx("sockmap", by, sendfile)?;
    download(&stand, "big", &[])?;
    // Several on one connection, and over HTTP/1.0, where the end of the connection is the end of the file.
    let (url, to) = (stand.url("small"), stand.scratch.join("many"));
    let many = curl().args([&url; 100]).stdout(File::create(&to)?).output()?;
    finished(many)?;
    ensure!(
        fs::metadata(&to)?.len() == 30_000,
        "{} bytes of a hundred small files",
        fs::metadata(&to)?.len()
    );
    download(&stand, "big", &["--http1.0"])?;
    stand.finish(true)
}

#[test]
fn nginx_sends_a_large_file_with_sendfile() -> Result<()> {
    if !nginx_needs("nginx_sends_a_large_file_with_sendfile") {
        return Ok(());
    }
    nginx_downloads(Setup::pid, "on")
}

#[test]
fn nginx_sends_a_large_file_without_sendfile() -> Result<()> {
    if !nginx_needs("nginx_sends_a_large_file_without_sendfile") {
        return Ok(());
    }
    nginx_downloads(Setup::netns, "off")
}

/// These hung: nginx asks FIONREAD when a request has filled its buffer, and some kernels say 0 of every hooked socket. With `auto`,
/// which is splice there.
#[test]
fn nginx_takes_uploads() -> Result<()> {
    if !nginx_needs("nginx_takes_uploads") {
        return Ok(());
    }
    let stand = nginx("auto", Setup::netns, "on")?;
    // Around what nginx's buffers hold, and far beyond.
    for size in [1, 700, 1000, 1100, 5000, 100_000, 3 << 20] {
        let from = stand.file("upload", size)?;
        for (nth, header) in ["Expect:", "Expect: 100-continue"].into_iter().enumerate() {
            let name = format!("put-{size}-{nth}");
            let mut upload = curl();
            upload.args(["--header", header, "--upload-file"]).arg(&from).arg(stand.url(&name));
            finished(upload.output()?).with_context(|| format!("{size} bytes with `{header}`"))?;
            expect_same(&from, &stand.scratch.join("www").join(name))?;
        }
    }
    // On one connection: what a first large request did to the socket must not hurt those after it.
    let (large, small) = (stand.file("large", 100_000)?, stand.file("little", 500)?);
    let mut upload = curl();
    for (nth, file) in [&small, &large, &small, &large].into_iter().enumerate() {
        upload.arg("--upload-file").arg(file).arg(stand.url(&format!("kept-{nth}")));
    }
    finished(upload.args(["--header", "Expect:"]).output()?).context("four uploads on one connection")?;
    for (nth, file) in [&small, &large, &small, &large].into_iter().enumerate() {
        expect_same(file, &stand.scratch.join("www").join(format!("kept-{nth}")))?;
    }
    stand.finish(false)
}

/// A cookie of 3000 bytes, over TCP and over a unix socket, and past bro within the namespace: each on connections that are kept, so
/// that they would be hooked if that were ever done.
#[test]
fn nginx_takes_large_cookies_wherever_they_come_from() -> Result<()> {
    if !nginx_needs("nginx_takes_large_cookies_wherever_they_come_from") {
        return Ok(());
    }
    let stand = nginx("auto", Setup::netns, "on")?;
    let cookie = format!("Cookie: c={}", "x".repeat(3000));
    let inside = format!("http://127.0.0.1:{}/small", stand.inside);
    let enter = stand.namespace.enter();
    for (through, url) in [(None, stand.url("small")), (Some(&enter), inside)] {
        let mut command = match through {
            None => curl(),
            Some(enter) => {
                let mut command = Command::new(bro::helper());
                command.arg("launch").arg("--").args(enter).arg("curl");
                command.args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "10"]);
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
                command
            }
        };
        for _ in 0..20 {
            command.args(["--next", "--silent", "--fail", "--max-time", "5", "--header", &cookie, &url]);
        }
        let said = command.output()?;
        let came = said.stdout.len();
        finished(said)?;
        ensure!(came == 20 * 300, "{came} bytes of twenty small files");
    }
    stand.finish(false)
}

#[test]
fn a_slow_reader_of_nginx_holds_no_other_up() -> Result<()> {
    if !nginx_needs("a_slow_reader_of_nginx_holds_no_other_up") {
        return Ok(());
    }
    let stand = nginx("sockmap", Setup::netns, "on")?;
    let slow = stand.scratch.join("slow");
    let mut reader = curl();
    reader.args(["--limit-rate", "5M", "--output"]).arg(&slow).arg(stand.url("big"));
    let mut reader = reader.spawn()?;
    // Three beside it, each with its own file to compare.
    let mut fast = Vec::new();
    for nth in 0..3 {
        let to = stand.scratch.join(&format!("fast-{nth}"));
        let child = curl().arg("--output").arg(&to).arg(stand.url("big")).spawn()?;
        fast.push((child, to));
    }
    let big = stand.scratch.join("www/big");
    let mut copies = Vec::new();
    for (child, to) in fast {
        finished(child.wait_with_output()?)?;
        copies.push(to);
    }
    ensure!(reader.try_wait()?.is_none(), "the slow reader was not slow");
    for to in copies {
        expect_same(&big, &to)?;
    }
    finished(reader.wait_with_output()?).context("the slow reader")?;
    expect_same(&big, &slow)?;
    stand.finish(false)
}

#[test]
fn redis_answers_its_benchmark() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Bpf,
        Need::Program("redis-server", "redis-server"),
        Need::Program("redis-benchmark", "redis-tools"),
        Need::Program("redis-cli", "redis-tools"),
    ];
    if !met("redis_answers_its_benchmark", &needs) {
        return Ok(());
    }
    let mut stand = Stand::new(Setup::pid)?;
    let inside = stand.inside.to_string();
    let arguments = [
        "--bind",
        "127.0.0.1",
        "--port",
        &inside,
        "--save",
        "",
        "--appendonly",
        "no",
        "--protected-mode",
        "no",
    ];
    let program = find_program("redis-server").context("redis-server has gone")?;
    stand.run(&program, &arguments.map(Into::into))?;
    let port = stand.port().to_string();
    let cli = || {
        let mut command = Command::new("redis-cli");
        command.args(["-h", "127.0.0.1", "-p", &port]).stdin(Stdio::null());
        command
    };
    stand.warm_up(|| {
        let answer = finished(cli().arg("PING").output()?)?;
        ensure!(answer.trim() == "PONG", "{answer}");
        Ok(())
    })?;
    // Pipelined and not, small values and such as do not fit one segment of most networks.
    for options in [
        &["-t", "ping,set,get,incr"][..],
        &["-t", "set,get", "-P", "16"],
        &["-t", "set,get,lrange_100", "-d", "5000"],
        &["-t", "set,get", "-d", "3000", "-P", "16"],
    ] {
        let mut command = Command::new("timeout");
        command.args(["40", "redis-benchmark", "-h", "127.0.0.1", "-p", &port]);
        let report = finished(command.args(["-q", "-n", "2000", "-c", "8"]).args(options).output()?)
            .with_context(|| format!("redis-benchmark {options:?}"))?;
        ensure!(report.contains("SET") && report.contains("GET"), "{report}");
        ensure!(!report.to_lowercase().contains("error"), "{report}");
    }
    // Byte by byte.
    let value = stand.file("value", 300_000)?;
    // redis-cli connects without blocking and then turns to blocking: it must be left alone.
    for _ in 0..20 {
        finished(cli().args(["-x", "SET", "value"]).stdin(File::open(&value)?).output()?)?;
    }
    let got = cli().args(["--raw", "GET", "value"]).output()?;
    // redis-cli ends what it prints with a newline.
    ensure!(got.stdout.strip_suffix(b"\n") == Some(&fs::read(&value)?[..]), "another value came back");
    stand.finish(true)
}

#[test]
fn postgresql_answers_pgbench_and_large_queries() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Bpf,
        Need::Program("initdb", "postgresql"),
        Need::Program("psql", "postgresql-client"),
        Need::Program("pgbench", "postgresql-contrib"),
    ];
    if !met("postgresql_answers_pgbench_and_large_queries", &needs) {
        return Ok(());
    }
    let mut stand = Stand::new(Setup::netns)?;
    let programs = fs::canonicalize(find_program("initdb").context("initdb has gone")?)?;
    let programs = programs.parent().context("a program is in a folder")?;
    let data = stand.scratch.join("data");
    fs::create_dir(&data)?;
    chown(&data, Some(NOBODY.into()), Some(NOBODY.into()))?;
    let setpriv = find_program("setpriv").context("setpriv is part of util-linux")?;
    let nobody = ["--clear-groups".into(), format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
    let mut initdb = Command::new(&setpriv);
    initdb.args(&nobody).arg(programs.join("initdb")).arg("--pgdata").arg(&data);
    initdb.args(["--no-sync", "--auth=trust", "--username=test", "--no-instructions", "--locale=C"]);
    finished(initdb.current_dir(stand.scratch.path()).output()?).context("initdb")?;
    // initdb trusts 127.0.0.1, and clients of this host come from another address.
    let rules = data.join("pg_hba.conf");
    let known = fs::read_to_string(&rules)?;
    fs::write(&rules, known + "host all all 169.254.1.2/32 trust\n")?;

    let mut arguments = nobody.to_vec();
    arguments.extend([
        programs.join("postgres").display().to_string(),
        "-D".into(),
        data.display().to_string(),
        format!("-cunix_socket_directories={}", data.display()),
        format!("-cport={}", stand.inside),
        "-clisten_addresses=127.0.0.1".into(),
        "-cfsync=off".into(),
        "-cmax_connections=20".into(),
        "-cshared_buffers=16MB".into(),
    ]);
    stand.run(&setpriv, &arguments)?;
    // It listens before it has recovered, and turns away who comes too early; its own socket tells.
    let is_ready = || {
        let mut command = Command::new(programs.join("pg_isready"));
        command.arg("--quiet").arg(format!("--host={}", data.display()));
        command.arg(format!("--port={}", stand.inside)).status().is_ok_and(|status| status.success())
    };
    ensure!(process::eventually(PATIENCE, is_ready), "PostgreSQL does not become ready");

    let client = |program: &str| {
        let mut command = Command::new(find_program(program).expect("it was there a moment ago"));
        command.args(["--host=127.0.0.1", "--username=test", &format!("--port={}", stand.port())]);
        command.env("PGCONNECT_TIMEOUT", "30").env("PGDATABASE", "postgres").stdin(Stdio::null());
        command
    };
    let query = |text: &str| {
        finished(client("psql").args(["--no-align", "--tuples-only", "--command", text]).output()?)
    };
    stand.warm_up(|| query("SELECT 1").map(drop))?;
    finished(client("pgbench").args(["--initialize", "--quiet", "--scale=1"]).output()?)
        .context("pgbench -i")?;
    for protocol in ["simple", "extended", "prepared"] {
        let run = ["--select-only", "--client=8", "--transactions=200", "--no-vacuum"];
        let mut pgbench = client("pgbench");
        let report = finished(pgbench.args(run).arg(format!("--protocol={protocol}")).output()?)?;
        ensure!(report.contains("processed: 1600/1600"), "{protocol}: {report}");
    }
    // The server says what the sum of what it sent must be.
    let rows = "SELECT md5(i::text) || repeat('x', 40) AS line FROM generate_series(1, 120000) i";
    let all = query(rows)?;
    fs::write(stand.scratch.join("rows"), all.trim_end())?;
    let sum = finished(Command::new("md5sum").arg(stand.scratch.join("rows")).output()?)?;
    let wanted = query(&format!("SELECT md5(string_agg(line, chr(10))) FROM ({rows}) AS lines"))?;
    ensure!(sum.split_whitespace().next() == Some(wanted.trim()), "{sum} came, {wanted} was sent");
    // And towards it, a query of a megabyte.
    let long = stand.scratch.join("long.sql");
    fs::write(&long, format!("SELECT length('{}');\n", "y".repeat(1_000_000)))?;
    let length = finished(client("psql").args(["-At", "-f"]).arg(&long).output()?)?;
    ensure!(length.trim() == "1000000", "{length}");
    stand.finish(true)
}

/// It blocks in its own send and receive calls: such services are left alone, since a lane would show them EAGAIN.
#[test]
fn a_blocking_server_is_left_alone_and_served_well() -> Result<()> {
    let needs = [Need::Root, Need::Bpf, CURL, Need::Program("busybox", "busybox")];
    if !met("a_blocking_server_is_left_alone_and_served_well", &needs) {
        return Ok(());
    }
    let mut stand = Stand::new(Setup::pid)?;
    fs::create_dir(stand.scratch.join("www"))?;
    stand.file("www/small", 300)?;
    stand.file("www/big", 20 << 20)?;
    let www = stand.scratch.join("www").display().to_string();
    let address = format!("127.0.0.1:{}", stand.inside);
    let program = find_program("busybox").context("busybox has gone")?;
    stand.run(&program, &["httpd".into(), "-f".into(), "-p".into(), address, "-h".into(), www])?;
    stand.warm_up(|| download(&stand, "small", &[]))?;
    for _ in 0..3 {
        download(&stand, "big", &[])?;
    }
    ensure!(!stand.is_fit()?, "a blocking service was taken for another");
    stand.finish(false)
}
