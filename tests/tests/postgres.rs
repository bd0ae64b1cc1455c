//! Real PostgreSQL, asleep in a namespace behind the real `systemd-socket-activate`: the first `psql` wakes it and succeeds.
//!
//! Needs: root, PostgreSQL, systemd-socket-activate. Takes: seconds.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::activation::{PACKAGE, start, wait_until_activated};
use bro_tests::bro;
use bro_tests::forwarder::Setup;
use bro_tests::netns::{Namespace, Owner};
use bro_tests::peers::{Bound, Family, Here, Listener};
use bro_tests::process::{self, NOBODY};
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, find_program, met};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, chown};

/// A database cluster in a folder, whose server a test starts when it wants.
struct Cluster {
    programs: PathBuf,
    scratch: Scratch,
}

impl Cluster {
    fn new() -> Result<Self> {
        Self::trusting("--auth=trust", "test")
    }

    /// One with such a rule of whom it trusts, whose superuser has this name.
    fn trusting(rule: &str, superuser: &str) -> Result<Self> {
        // initdb is on no user's PATH; the servers' own programs are beside it.
        let initdb = find_program("initdb").context("initdb has gone")?;
        let programs =
            std::fs::canonicalize(initdb)?.parent().context("a program is in a folder")?.to_owned();
        let cluster = Self { programs, scratch: Scratch::new()? };
        std::fs::create_dir(cluster.data())?;
        if Uid::effective().is_root() {
            chown(&cluster.data(), Some(NOBODY.into()), Some(NOBODY.into()))?;
        }
        let mut command = cluster.as_ordinary_user(&[]);
        command.arg(cluster.programs.join("initdb")).arg("--pgdata").arg(cluster.data());
        let options = [
            "--no-sync",
            rule,
            &format!("--username={superuser}"),
            "--no-instructions",
            "--locale=C",
            "--encoding=UTF8",
        ];
        finished(command.args(options).output()?).context("initdb")?;
        // initdb trusts 127.0.0.1, and clients of this host come from another address. The folder's owner may be another user.
        let rules = cluster.data().join("pg_hba.conf");
        let known = std::fs::read_to_string(&rules)?;
        std::fs::write(&rules, known + "host all all 169.254.1.2/32 trust\n")?;
        Ok(cluster)
    }

    fn data(&self) -> PathBuf {
        self.scratch.join("data")
    }

    /// `peer launch ENTER`, and then whatever is added, as a user whom PostgreSQL accepts.
    fn as_ordinary_user(&self, enter: &[String]) -> Command {
        let mut command = Command::new(bro::helper());
        command.arg("launch").arg("--").args(enter).current_dir(self.scratch.path());
        if enter.is_empty() {
            command.arg("env");
        }
        if Uid::effective().is_root() {
            command.args(["setpriv", "--clear-groups"]);
            command.arg(format!("--reuid={NOBODY}")).arg(format!("--regid={NOBODY}"));
        }
        command
    }

    fn start(&self, namespace: &Namespace, port: u16, options: &[&str]) -> Result<Server> {
        let mut command = self.as_ordinary_user(&namespace.enter());
        command.arg(self.programs.join("postgres")).arg("-D").arg(self.data());
        // On the host's file system, where `pg_isready` finds it without entering the namespace.
        command.arg(format!("-cunix_socket_directories={}", self.data().display()));
        command.arg(format!("-cport={port}")).args([
            "-clisten_addresses=127.0.0.1",
            "-cfsync=off",
            "-cmax_connections=20",
            "-cshared_buffers=16MB",
        ]);
        command.args(options);
        let log = std::fs::File::create(self.scratch.join("log"))?;
        Ok(Server(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?))
    }
}

/// A namespace, and a port that is free in it, where no other program takes any.
fn place() -> Result<(Namespace, u16)> {
    // An ordinary user is himself in the namespace: PostgreSQL refuses a user namespace's root as well.
    let owner = if Uid::effective().is_root() { Owner::Usual } else { Owner::KeepId };
    let namespace = Namespace::owned_by(owner)?;
    let probe = Bound::new(&namespace, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let port = probe.address().port().context("a TCP address")?;
    Ok((namespace, port))
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Immediate shutdown: the server ends its own processes, which are in sessions of their own.
        let pid = self.0.id().cast_signed();
        kill(Pid::from_raw(pid), Signal::SIGQUIT).ok();
        if !process::ends(pid, Duration::from_secs(5)).unwrap_or(false) {
            self.0.kill().ok();
        }
        self.0.wait().ok();
    }
}

fn finished(output: Output) -> Result<String> {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {out}{err}", output.status);
    Ok(out.into_owned())
}

fn client(program: &Path, port: u16) -> Command {
    let mut command = Command::new(program);
    command.args(["--host=127.0.0.1", "--username=test", &format!("--port={port}")]);
    command.env("PGCONNECT_TIMEOUT", "30").env("PGDATABASE", "postgres");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn the_first_psql_wakes_postgresql_and_pgbench_runs_through() -> Result<()> {
    let mut needs = bro_tests::suite::namespace_needs();
    needs.extend([
        Need::Program(PACKAGE.0, PACKAGE.1),
        Need::Program("initdb", "postgresql"),
        Need::Program("psql", "postgresql-client"),
        Need::Program("pgbench", "postgresql-contrib"),
    ]);
    if !met("the_first_psql_wakes_postgresql_and_pgbench_runs_through", &needs) {
        return Ok(());
    }
    let [psql, pgbench] =
        ["psql", "pgbench"].map(|name| find_program(name).expect("it was there a moment ago"));
    let cluster = Cluster::new()?;
    let (namespace, inside) = place()?;
    // A listening server may still be recovering, and says so to its clients: readiness is what pg_isready says.
    let is_ready = cluster.programs.join("pg_isready");
    let is_ready =
        format!("{} --quiet --host={} --port={inside}", is_ready.display(), cluster.data().display());
    let arguments = [
        "--netns".into(),
        namespace.path().display().to_string(),
        format!("--ready=exec:{is_ready}"),
        "--exit-idle-time=2s".into(),
        format!("127.0.0.1:{inside}"),
    ];
    let front = Family::Tcp4.loopback().context("TCP has one")?;
    let (mut forwarder, addresses) = start(&[front], &[], &arguments)?;
    let port = addresses[0].port().context("a TCP address")?;

    let first =
        client(&psql, port).args(["--no-align", "--tuples-only", "--command=SELECT 6 * 7"]).spawn()?;
    wait_until_activated(&forwarder)?;
    let server = cluster.start(&namespace, inside, &[])?;
    let answer = finished(first.wait_with_output()?).context("the psql that woke it")?;
    ensure!(answer.trim() == "42", "psql says {answer:?}");
    ensure!(forwarder.closing()?.cold_start_ms.is_some(), "{:?}", forwarder.closing());

    finished(client(&pgbench, port).args(["--initialize", "--quiet", "--scale=2"]).output()?)
        .context("pgbench -i")?;
    let run = ["--client=8", "--jobs=2", "--transactions=150", "--no-vacuum"];
    let report = finished(client(&pgbench, port).args(run).output()?).context("pgbench")?;
    ensure!(report.contains("processed: 1200/1200"), "{report}");
    let run = ["--select-only", "--connect", "--client=4", "--transactions=50", "--no-vacuum"];
    let report =
        finished(client(&pgbench, port).args(run).output()?).context("pgbench, a connection each time")?;
    ensure!(report.contains("processed: 200/200"), "{report}");
    // A result of megabytes, and a COPY towards the server.
    let big = "SELECT md5(string_agg(i::text, ',')) FROM generate_series(1, 100000) i";
    let rows = "COPY (SELECT i, repeat('x', 100) FROM generate_series(1, 100000) i) TO STDOUT";
    let out =
        finished(client(&psql, port).args(["--no-align", "--tuples-only", "-c", big, "-c", rows]).output()?)?;
    ensure!(out.lines().count() == 100_001, "{} lines came", out.lines().count());

    let closings = forwarder.closings(200)?;
    ensure!(
        closings.iter().all(|closing| closing.reason == "eof"),
        "{:?}",
        closings.iter().find(|closing| closing.reason != "eof")
    );
    forwarder.expect_exit(0).context("idle exit")?;
    drop(server);
    Ok(())
}

/// It listens from its first moment on, and says for seconds that it is starting up.
#[test]
fn the_first_psql_waits_for_a_postgresql_that_recovers() -> Result<()> {
    let mut needs = bro_tests::suite::namespace_needs();
    needs.extend([Need::Program("initdb", "postgresql"), Need::Program("psql", "postgresql-client")]);
    if !met("the_first_psql_waits_for_a_postgresql_that_recovers", &needs) {
        return Ok(());
    }
    let psql = find_program("psql").expect("it was there a moment ago");
    let cluster = Cluster::new()?;
    let (namespace, inside) = place()?;
    // Each file that it asks an archive for takes a second, and is not there.
    std::fs::write(cluster.data().join("recovery.signal"), "")?;
    let server =
        cluster.start(&namespace, inside, &["-chot_standby=off", "-crestore_command=sleep 1; false"])?;
    for (ready, is_well) in [("listen", false), ("postgres", true)] {
        let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
        let setup = Setup::new().socket(&front).netns(&namespace).arg(format!("--ready={ready}"));
        let forwarder = setup.arg(format!("127.0.0.1:{inside}")).start()?;
        let port = front.address().port().context("a TCP address")?;
        let output =
            client(&psql, port).args(["--no-align", "--tuples-only", "--command=SELECT 6 * 7"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if is_well {
            ensure!(output.stdout == b"42\n", "{output:?}");
        } else {
            ensure!(said.contains("starting up") || said.contains("not accepting"), "{output:?}");
        }
        forwarder.stop()?;
    }
    drop(server);
    Ok(())
}

/// `peer` trusts the user at the other end of the unix socket, and root has a role of that name. A client over TCP is not root by coming
/// through root's forwarder, unless that is asked for.
#[test]
fn a_client_over_tcp_is_no_peer_of_postgresqls() -> Result<()> {
    let needs =
        [Need::Root, Need::Program("initdb", "postgresql"), Need::Program("psql", "postgresql-client")];
    if !met("a_client_over_tcp_is_no_peer_of_postgresqls", &needs) {
        return Ok(());
    }
    let psql = find_program("psql").expect("it was there a moment ago");
    let cluster = Cluster::trusting("--auth=peer", "root")?;
    // The folder of the data is closed to others; the socket is to be reached.
    let folder = cluster.scratch.join("run");
    std::fs::create_dir(&folder)?;
    chown(&folder, Some(NOBODY.into()), Some(NOBODY.into()))?;
    let mut command = cluster.as_ordinary_user(&[]);
    command.arg(cluster.programs.join("postgres")).arg("-D").arg(cluster.data());
    command.arg(format!("-cunix_socket_directories={}", folder.display()));
    command.args(["-clisten_addresses=", "-cport=5432", "-cfsync=off", "-cshared_buffers=16MB"]);
    let log = std::fs::File::create(cluster.scratch.join("log"))?;
    let server = Server(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?);
    let socket = folder.join(".s.PGSQL.5432");
    ensure!(process::eventually(Duration::from_secs(20), || socket.exists()), "PostgreSQL does not listen");
    for identity in ["unused", "forwarder"] {
        let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
        let port = front.address().port().context("a TCP address")?;
        let forwarder = Setup::new()
            .socket(&front)
            .arg(&socket)
            .args([format!("--unix-identity={identity}"), "--relay=splice".into()])
            .start()?;
        let mut asked = Command::new(&psql);
        asked.args(["--host=127.0.0.1", "--username=root", "--no-password", &format!("--port={port}")]);
        asked.args(["--no-align", "--tuples-only", "--command=SELECT current_user", "postgres"]);
        let output = asked.env("PGCONNECT_TIMEOUT", "30").env_remove("PGPASSWORD").output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if identity == "forwarder" {
            ensure!(output.status.success() && output.stdout == b"root\n", "{output:?}");
        } else {
            ensure!(!output.status.success() && said.contains("Peer authentication failed"), "{output:?}");
        }
        forwarder.stop()?;
    }
    drop(server);
    Ok(())
}
