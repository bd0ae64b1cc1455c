//! Real programs: PostgreSQL with pgbench, redis with redis-benchmark, nginx with wrk.
//!
//! Each server runs three times: for contenders without a kernel lane, and one for each bro with lanes, whose programs take
//! every connection of a service into their care, also those that come through others.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::unistd::User;

use super::contenders::{self, Contender, Lanes, Running, Way};
use super::cpu::Meter;
use super::launch::{Launch, Launched, this_task};
use super::load::Figures;
use super::plan::Plan;
use super::scene::Scene;
use super::tools::{self, Missing};

/// How long anything may take that is not measured.
const START: Duration = Duration::from_secs(30);

/// One of the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Postgres,
    Redis,
    Nginx,
}

impl Program {
    pub const ALL: [Self; 3] = [Self::Postgres, Self::Redis, Self::Nginx];

    /// In JSON and for `--only`.
    pub fn key(self) -> &'static str {
        match self {
            Self::Postgres => "pgbench",
            Self::Redis => "redis",
            Self::Nginx => "wrk",
        }
    }

    /// What it takes, by program and package.
    fn needs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Postgres => {
                &[("initdb", "postgresql"), ("postgres", "postgresql"), ("pgbench", "postgresql")]
            }
            Self::Redis => &[("redis-server", "redis-server"), ("redis-benchmark", "redis-tools")],
            Self::Nginx => &[("nginx", "nginx"), ("wrk", "wrk")],
        }
    }

    /// What of it is not here.
    pub fn missing(self) -> Option<Missing> {
        let (program, package) = self.needs().iter().find(|(program, _)| tools::find(program).is_none())?;
        let why = format!("{program} is not installed: `sudo apt-get install {package}`");
        Some(Missing { name: self.key().to_owned(), why })
    }

    /// Versions of what is used.
    pub fn versions(self) -> Vec<String> {
        let mut found: Vec<String> = self
            .needs()
            .iter()
            .filter(|(program, _)| !program.starts_with("initdb"))
            .filter_map(|(program, _)| {
                let flag = if *program == "wrk" || *program == "nginx" { "-v" } else { "--version" };
                tools::version(&tools::find(program)?, flag)
            })
            .collect();
        found.dedup();
        found
    }

    /// The port of the instance that a contender is given.
    pub fn port(self, contender: &Contender) -> u16 {
        let first = match self {
            Self::Postgres => 5432,
            Self::Redis => 6379,
            Self::Nginx => 8080,
        };
        first + instance(contender)
    }

    /// What a client says first, and is answered, as [`super::poke`] wants it.
    pub fn greeting(self) -> &'static str {
        match self {
            // "May I speak TLS?", to which the answer is one letter.
            Self::Postgres => "hex:0000000804d2162f",
            Self::Redis => "PING\\r\\n",
            Self::Nginx => "GET / HTTP/1.1\\r\\nHost: bench\\r\\nConnection: close\\r\\n\\r\\n",
        }
    }

    /// Starts it as often as it takes.
    pub fn start(self, scene: &Scene) -> Result<Servers> {
        let servers = match self {
            Self::Postgres => postgres(scene),
            Self::Redis => redis(scene),
            Self::Nginx => nginx(scene),
        };
        servers.with_context(|| format!("starting what {} needs", self.key()))
    }

    /// Lets it be known: a kernel relay learns a service's kind on the first connections.
    pub fn warm(self, scene: &Scene, running: &Running) -> Result<()> {
        let args = ["poke".into(), running.address.to_string(), self.greeting().into(), "--times=3".into()];
        running.client(scene, &args, START).map(drop)
    }

    /// One round.
    pub fn measure(self, scene: &Scene, running: &Running, plan: &Plan) -> Result<Figures> {
        let super::stream::Address::Tcp(address) = &running.address else { return Ok(Figures::new()) };
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        let run = |program: &str, args: &[&str]| -> Result<(String, f64)> {
            let path = tools::find(program).context("a client program")?;
            let args: Vec<String> = args.iter().map(ToString::to_string).collect();
            let meter = Meter::start(running.group())?;
            let launch = Launch { inside: scene.inside(running.inside), ..Launch::default() };
            let said = launch
                .output(&path, &args, plan.program_limit())
                .with_context(|| format!("running {program}"))?;
            Ok((said, meter.stop()?.system))
        };
        let mut figures = Figures::new();
        match self {
            Self::Postgres => {
                let clients = 8;
                let (each, clients) = (plan.transactions.to_string(), clients.to_string());
                let common = [
                    "-n", "-S", "-h", &host, "-p", &port, "-U", "bench", "-j", "2", "-c", &clients, "-t",
                    &each,
                ];
                let (said, _) = run("pgbench", &[common.as_slice(), &["postgres"]].concat())?;
                figures.insert(
                    "pgbench.per_second".into(),
                    after(&said, "tps = ").context("no tps in its words")?,
                );
                if let Some(ms) = after(&said, "latency average = ") {
                    figures.insert("pgbench.mean".into(), ms / 1e3);
                }
            }
            Self::Redis => {
                for (name, pipeline, count) in
                    [("redis", "1", plan.redis_requests), ("redis-pipelined", "16", 16 * plan.redis_requests)]
                {
                    let total = count.to_string();
                    let args = [
                        "-h", &host, "-p", &port, "-c", "16", "-n", &total, "-P", pipeline, "-t", "get",
                        "--csv",
                    ];
                    let (said, cpu) = run("redis-benchmark", &args)?;
                    let line = said
                        .lines()
                        .find(|line| line.starts_with("\"GET\""))
                        .context("no GET in its words")?;
                    let fields: Vec<f64> = line
                        .split(',')
                        .skip(1)
                        .filter_map(|field| field.trim_matches('"').parse().ok())
                        .collect();
                    figures.insert(format!("{name}.per_second"), *fields.first().context("no rate")?);
                    if let Some(ms) = fields.get(5) {
                        figures.insert(format!("{name}.p99"), ms / 1e3);
                    }
                    figures.insert(format!("{name}.system_cpu_per_request"), cpu / f64::from(count));
                }
            }
            Self::Nginx => {
                let (seconds, url) = (format!("{}s", plan.wrk_seconds), format!("http://{host}:{port}/"));
                let (said, cpu) = run("wrk", &["-t1", "-c16", "--latency", "-d", &seconds, &url])?;
                ensure!(!said.contains("Socket errors"), "wrk met errors: {said}");
                figures.insert(
                    "wrk.per_second".into(),
                    after(&said, "Requests/sec:").context("no rate in its words")?,
                );
                let total =
                    said.lines().find(|line| line.contains(" requests in ")).and_then(|line| after(line, ""));
                if let Some(total) = total {
                    figures.insert("wrk.system_cpu_per_request".into(), cpu / total);
                }
                if let Some(p99) =
                    said.lines().find_map(|line| line.trim().strip_prefix("99%")).and_then(span)
                {
                    figures.insert("wrk.p99".into(), p99);
                }
            }
        }
        Ok(figures)
    }
}

/// The number behind some words.
fn after(said: &str, words: &str) -> Option<f64> {
    let rest = &said[said.find(words)? + words.len()..];
    rest.split_whitespace().next()?.parse().ok()
}

/// `410.00us`, as wrk writes it.
fn span(text: &str) -> Option<f64> {
    let text = text.trim();
    [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)]
        .iter()
        .find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * factor))
}

/// Which instance a contender is given.
fn instance(contender: &Contender) -> u16 {
    match contender.way {
        Way::Bro { lanes: Lanes::Service, .. } => 1,
        Way::Bro { lanes: Lanes::Both, .. } => 2,
        _ => 0,
    }
}

/// Running servers; they end with this.
pub struct Servers(Vec<Launched>);

impl Servers {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

fn start(scene: &Scene, program: &str, args: Vec<String>, user: Option<&str>, log: &str) -> Result<Launched> {
    let path = tools::find(program).with_context(|| format!("{program} is gone"))?;
    let launch = Launch { inside: scene.inside(true), socket: None, user };
    launch.start(&path, &args, &scene.folder.path(log))
}

/// Waits until a server inside answers.
fn await_answer(scene: &Scene, port: u16, program: Program) -> Result<()> {
    let args = ["bench".into(), "poke".into(), format!("127.0.0.1:{port}"), program.greeting().into()];
    let launch = Launch { inside: scene.inside(true), ..Launch::default() };
    launch.output(this_task(), &args, START).map(drop)
}

/// PostgreSQL does not run as root.
fn database_user() -> Option<&'static str> {
    let root = nix::unistd::geteuid().is_root();
    root.then(|| if matches!(User::from_name("postgres"), Ok(Some(_))) { "postgres" } else { "nobody" })
}

fn postgres(scene: &Scene) -> Result<Servers> {
    let user = database_user();
    let base = scene.folder.path("postgres");
    std::fs::create_dir(&base)?;
    std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o755))?;
    if let Some(user) = user.and_then(|name| User::from_name(name).ok()?) {
        chown(&base, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    }
    let data = |number: u16| base.join(number.to_string()).display().to_string();
    let outside =
        |program: &Path, args: &[String]| Launch { user, ..Launch::default() }.output(program, args, START);
    let initdb = tools::find("initdb").context("initdb is gone")?;
    let args =
        ["-D", &data(0), "-A", "trust", "-U", "bench", "-N", "--locale=C", "-E", "UTF8"].map(str::to_owned);
    outside(&initdb, &args).context("initdb")?;
    // Some contenders come from another address; the namespace has no way in.
    let rules = base.join("0/pg_hba.conf");
    let known = std::fs::read_to_string(&rules)?;
    std::fs::write(&rules, known + "host all all 0.0.0.0/0 trust\n")?;
    for number in 1..3 {
        let copy = ["-a".to_owned(), data(0), data(number)];
        outside(&tools::find("cp").context("cp is gone")?, &copy)?;
    }
    let mut servers = Vec::new();
    for number in 0..3 {
        let port = (5432 + number).to_string();
        let mut args: Vec<String> = ["-D", &data(number), "-p", &port].map(str::to_owned).to_vec();
        for setting in [
            "listen_addresses=0.0.0.0",
            "unix_socket_directories=",
            "fsync=off",
            "max_connections=60",
            "shared_buffers=32MB",
            "autovacuum=off",
        ] {
            args.extend(["-c".to_owned(), setting.to_owned()]);
        }
        servers.push(start(scene, "postgres", args, user, &format!("postgres-{number}.log"))?);
        await_answer(scene, 5432 + number, Program::Postgres)?;
        let fill = ["-i", "-q", "-s", "1", "-h", "127.0.0.1", "-p", &port, "-U", "bench", "postgres"]
            .map(str::to_owned);
        let launch = Launch { inside: scene.inside(true), ..Launch::default() };
        launch
            .output(&tools::find("pgbench").context("pgbench is gone")?, &fill, START)
            .context("filling the database")?;
    }
    Ok(Servers(servers))
}

fn redis(scene: &Scene) -> Result<Servers> {
    let mut servers = Vec::new();
    for number in 0..3 {
        let port = (6379 + number).to_string();
        let folder = scene.folder.path("").display().to_string();
        let args = [
            "--port",
            &port,
            "--bind",
            "0.0.0.0",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            &folder,
        ];
        servers.push(start(
            scene,
            "redis-server",
            args.map(str::to_owned).to_vec(),
            None,
            &format!("redis-{number}.log"),
        )?);
        await_answer(scene, 6379 + number, Program::Redis)?;
    }
    Ok(Servers(servers))
}

/// One nginx with three ports, which are three services to a kernel relay.
fn nginx(scene: &Scene) -> Result<Servers> {
    let folder = scene.folder.path("nginx-http");
    std::fs::create_dir(&folder)?;
    let listen: String = (8080..8083).map(|port| format!("        listen {port};\n")).collect();
    let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|name| format!("    {name}_temp_path {};\n", folder.join(name).display()))
        .collect();
    let config = format!(
        "{}worker_processes 1;\nhttp {{\n    access_log off;\n    keepalive_requests 1000000000;\n{paths}    server {{\n{listen}        \
         location / {{ return 200 \"{}\\n\"; }}\n    }}\n}}\n",
        contenders::nginx_head(&folder.join("pid")),
        "It works. ".repeat(10),
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, config)?;
    let log = folder.join("error.log").display().to_string();
    let args = ["-e", &log, "-c", &file.display().to_string()].map(str::to_owned);
    let server = start(scene, "nginx", args.to_vec(), None, "nginx-http.log")?;
    await_answer(scene, 8080, Program::Nginx)?;
    Ok(Servers(vec![server]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_words_are_understood() {
        assert_eq!(after("latency average = 0.325 ms\ntps = 24612.4 (without)", "tps = "), Some(24612.4));
        assert_eq!(after("  63600 requests in 1.00s, 14MB read", ""), Some(63600.0));
        assert_eq!(span(" 410.00us"), Some(410.0 * 1e-6));
        assert_eq!(span("1.5ms"), Some(1.5e-3));
    }
}
