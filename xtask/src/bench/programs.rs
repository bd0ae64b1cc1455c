//! Programs of other projects: PostgreSQL with pgbench, redis with redis-benchmark, nginx with wrk and h2load, iperf3, sockperf.
//!
//! Each server runs once for each contender, so that none meets what another one's connections have left.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::unistd::User;

use super::contenders::{self, Running, Server};
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
    Http2,
    Iperf,
    Sockperf,
}

impl Program {
    pub const ALL: [Self; 6] =
        [Self::Postgres, Self::Redis, Self::Nginx, Self::Http2, Self::Iperf, Self::Sockperf];

    /// In JSON and for `--only`.
    pub fn key(self) -> &'static str {
        match self {
            Self::Postgres => "pgbench",
            Self::Redis => "redis",
            Self::Nginx => "wrk",
            Self::Http2 => "h2load",
            Self::Iperf => "iperf3",
            Self::Sockperf => "sockperf",
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
            Self::Http2 => &[("nginx", "nginx"), ("h2load", "nghttp2-client")],
            Self::Iperf => &[("iperf3", "iperf3")],
            Self::Sockperf => &[("sockperf", "sockperf")],
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
                let flag = match *program {
                    "wrk" | "nginx" => "-v",
                    _ => "--version",
                };
                tools::version(&tools::find(program)?, flag)
            })
            .collect();
        found.dedup();
        found
    }

    /// The port of the instance that a contender is given, by its place.
    pub fn port(self, place: usize) -> u16 {
        let first = match self {
            Self::Postgres => 5432,
            Self::Redis => 6379,
            Self::Nginx => 8080,
            Self::Http2 => 8280,
            Self::Iperf => 5201,
            Self::Sockperf => 11_111,
        };
        first + u16::try_from(place).unwrap_or(0)
    }

    /// What a client says first, and is answered, as [`super::poke`] wants it.
    pub fn greeting(self) -> &'static str {
        match self {
            // "May I speak TLS?", to which the answer is one letter.
            Self::Postgres => "hex:0000000804d2162f",
            Self::Redis => "PING\\r\\n",
            // The connection's preface and empty settings.
            Self::Http2 => "hex:505249202a20485454502f322e300d0a0d0a534d0d0a0d0a000000040000000000",
            // A test's name, 37 bytes; what follows is then missing.
            Self::Iperf => "hex:62726f2d62656e63682d62726f2d62656e63682d62726f2d62656e63682d62726f2d626f00",
            // A ping: its number, that it is a client's which wants an answer, and its length.
            Self::Sockperf => "hex:000000000000000100030000000e",
            Self::Nginx => "GET / HTTP/1.1\\r\\nHost: bench\\r\\nConnection: close\\r\\n\\r\\n",
        }
    }

    /// Starts it where and as each contender wants it.
    pub fn start(self, scene: &Scene, wanted: &[Option<Server>]) -> Result<Servers> {
        let wanted = wanted.iter().enumerate();
        let places: Vec<_> = wanted
            .filter_map(|(number, server)| Some(Place { scene, number, server: server.as_ref()? }))
            .collect();
        let servers = match self {
            Self::Postgres => postgres(scene, &places),
            Self::Redis => places.iter().map(redis).collect(),
            Self::Nginx | Self::Http2 => places.iter().map(|place| nginx(self, place)).collect(),
            Self::Iperf | Self::Sockperf => places.iter().map(|place| network_tool(self, place)).collect(),
        };
        let servers: Result<Vec<_>> = servers;
        servers.map(Servers).with_context(|| format!("starting what {} needs", self.key()))
    }

    /// A few words with it, so that everything is awake.
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
            let launch = Launch { inside: scene.clients(running.inside), ..Launch::default() };
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
                let common = ["-n", "-h", &host, "-p", &port, "-U", "bench", "-j", "2", "-c", &clients, "-t"];
                let fewer = (plan.transactions / 10).max(20).to_string();
                for (name, options, each) in [
                    ("pgbench", &["-S"][..], &each),
                    ("pgbench-tpcb", &["-b", "tpcb-like"], &fewer),
                    ("pgbench-connect", &["-S", "-C"], &fewer),
                ] {
                    let (said, _) = run("pgbench", &[&common[..], &[each], options, &["postgres"]].concat())?;
                    let rate = after(&said, "tps = ").context("no tps in its words")?;
                    figures.insert(format!("{name}.per_second"), rate);
                    if let Some(ms) = after(&said, "latency average = ") {
                        figures.insert(format!("{name}.mean"), ms / 1e3);
                    }
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
                let (said, _) =
                    run("wrk", &["-t1", "-c16", "-H", "Connection: close", "-d", &seconds, &url])?;
                let rate = after(&said, "Requests/sec:").context("no rate in its words")?;
                figures.insert("wrk-close.per_second".into(), rate);
            }
            Self::Http2 => {
                let (seconds, url) = (plan.wrk_seconds.to_string(), format!("http://{host}:{port}/"));
                let (said, _) = run("h2load", &["-t1", "-c16", "-m10", "-D", &seconds, &url])?;
                // "finished in 1.00s, 12345.67 req/s, 1.23MB/s"
                let line = said
                    .lines()
                    .find(|line| line.starts_with("finished in"))
                    .context("no rate in its words")?;
                let rate = line.split(", ").find_map(|part| part.strip_suffix(" req/s")?.parse().ok());
                figures.insert("h2load.per_second".into(), rate.context("no rate in its words")?);
            }
            Self::Iperf => {
                let seconds = plan.wrk_seconds.to_string();
                for (name, length) in [("iperf3-128k", "128K"), ("iperf3-1m", "1M")] {
                    for (way, options) in [("up", &[][..]), ("down", &["-R"])] {
                        let common = ["-c", &host, "-p", &port, "-t", &seconds, "-l", length, "-J"];
                        let (said, _) = run("iperf3", &[&common[..], options].concat())?;
                        let said: serde_json::Value = serde_json::from_str(&said)?;
                        let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
                        figures.insert(format!("{name}.{way}"), bits.context("no rate in its words")? / 8.0);
                    }
                }
            }
            Self::Sockperf => {
                let seconds = plan.wrk_seconds.to_string();
                let args = ["ping-pong", "--tcp", "-i", &host, "-p", &port, "-t", &seconds, "-m", "64"];
                let (said, _) = run("sockperf", &args)?;
                let usec = after(&said, "Summary: Latency is ").context("no latency in its words")?;
                figures.insert("sockperf.mean".into(), usec / 1e6);
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

/// Running servers; they end with this.
pub struct Servers(Vec<Launched>);

impl Servers {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// A server for one contender.
struct Place<'a> {
    scene: &'a Scene,
    /// The contender's number.
    number: usize,
    server: &'a Server,
}

impl Place<'_> {
    fn start(&self, program: &str, args: Vec<String>, user: Option<&str>, log: &str) -> Result<Launched> {
        let path = tools::find(program).with_context(|| format!("{program} is gone"))?;
        let filter = self.server.filter.clone();
        let launch =
            Launch { inside: self.scene.inside(self.server.inside), user, filter, ..Launch::default() };
        launch.start(&path, &args, &self.scene.folder.path(log))
    }

    /// Waits until the server answers, beside it.
    fn await_answer(&self, program: Program) -> Result<()> {
        let port = program.port(self.number);
        let args = ["bench".into(), "poke".into(), format!("127.0.0.1:{port}"), program.greeting().into()];
        self.beside().output(this_task(), &args, START).map(drop)
    }

    /// Where the server is.
    fn beside(&self) -> Launch<'static> {
        Launch { inside: self.scene.inside(self.server.inside), ..Launch::default() }
    }
}

/// PostgreSQL does not run as root.
fn database_user() -> Option<&'static str> {
    let root = nix::unistd::geteuid().is_root();
    root.then(|| if matches!(User::from_name("postgres"), Ok(Some(_))) { "postgres" } else { "nobody" })
}

fn postgres(scene: &Scene, places: &[Place<'_>]) -> Result<Vec<Launched>> {
    let user = database_user();
    let base = scene.folder.path("postgres");
    std::fs::create_dir(&base)?;
    std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o755))?;
    if let Some(user) = user.and_then(|name| User::from_name(name).ok()?) {
        chown(&base, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    }
    let data = |number: usize| base.join(number.to_string()).display().to_string();
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
    for place in places.iter().filter(|place| place.number != 0) {
        let copy = ["-a".to_owned(), data(0), data(place.number)];
        outside(&tools::find("cp").context("cp is gone")?, &copy)?;
    }
    let mut servers = Vec::new();
    for place in places {
        let number = place.number;
        let port = Program::Postgres.port(number).to_string();
        let mut args: Vec<String> = ["-D", &data(number), "-p", &port].map(str::to_owned).to_vec();
        for setting in [
            "listen_addresses=0.0.0.0",
            "unix_socket_directories=",
            "fsync=off",
            "max_connections=60",
            "shared_buffers=16MB",
            "autovacuum=off",
        ] {
            args.extend(["-c".to_owned(), setting.to_owned()]);
        }
        servers.push(place.start("postgres", args, user, &format!("postgres-{number}.log"))?);
        place.await_answer(Program::Postgres)?;
        let fill = ["-i", "-q", "-s", "1", "-h", "127.0.0.1", "-p", &port, "-U", "bench", "postgres"]
            .map(str::to_owned);
        place
            .beside()
            .output(&tools::find("pgbench").context("pgbench is gone")?, &fill, START)
            .context("filling the database")?;
    }
    Ok(servers)
}

fn redis(place: &Place<'_>) -> Result<Launched> {
    let port = Program::Redis.port(place.number).to_string();
    let folder = place.scene.folder.path("").display().to_string();
    let args = ["--port", &port, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    let args = [&args[..], &["--appendonly", "no", "--dir", &folder]].concat();
    let args = args.into_iter().map(str::to_owned).collect();
    let server = place.start("redis-server", args, None, &format!("redis-{}.log", place.number))?;
    place.await_answer(Program::Redis)?;
    Ok(server)
}

/// A server that comes with the client that measures.
fn network_tool(tool: Program, place: &Place<'_>) -> Result<Launched> {
    let port = tool.port(place.number).to_string();
    let (program, args) = match tool {
        Program::Sockperf => ("sockperf", ["sr", "--tcp", "-p", &port].to_vec()),
        _ => ("iperf3", ["-s", "-p", &port].to_vec()),
    };
    let args = args.into_iter().map(str::to_owned).collect();
    let server = place.start(program, args, None, &format!("{program}-{}.log", place.number))?;
    place.await_answer(tool)?;
    Ok(server)
}

/// An nginx of one process, as a service that is one has.
fn nginx(speaks: Program, place: &Place<'_>) -> Result<Launched> {
    let port = speaks.port(place.number);
    let folder = place.scene.folder.path(&format!("nginx-http-{port}"));
    std::fs::create_dir(&folder)?;
    let listen = format!("        listen {port}{};\n", if speaks == Program::Http2 { " http2" } else { "" });
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
    let server = place.start("nginx", args.to_vec(), None, &format!("nginx-http-{port}.log"))?;
    place.await_answer(speaks)?;
    Ok(server)
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
