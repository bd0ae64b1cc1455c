//! Thirty services that are woken in the same moment, against their being started by systemctl, in turn.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::bro;
use bro_tests::host::cases::note;
use bro_tests::host::{Host, Manager};

use crate::site::{INNER, PATIENCE, Plan, Site, folder};

const COUNT: usize = 30;

/// How often each of the two is measured, in turn.
const ROUNDS: usize = 3;

/// What waking them may take.
struct Bounds {
    /// So many times what starting them takes, by the medians. Measured: 1.2 to 1.5. Other suites run beside this one, and may be
    /// busier in one of the two.
    times: f64,
    /// The processor time of bro's own processes for each wake, the least of the rounds: a round among other suites takes more. Measured:
    /// 7 to 11 ms.
    own: Duration,
}

const BOUNDS: Bounds = Bounds { times: 2.5, own: Duration::from_millis(20) };

/// The same for a debug build, which takes several times the processor time.
const BOUNDS_DEBUG: Bounds = Bounds { times: 12.0, own: Duration::from_millis(120) };

/// What a forwarder says that has tried whether the kernel can have the kernel relay.
const LOOKED: &str = "tried whether this kernel can have the kernel relay";

/// Thirty web servers with the units that wake them, ordered and confined as `bro activate` orders and confines a forwarder's.
/// Dropping it stops them.
struct Crowd<'h> {
    host: &'h Host,
    manager: Manager,
    ports: Vec<u16>,
    /// Each service makes a file here once it listens.
    marks: PathBuf,
}

fn name(number: usize) -> String {
    format!("crowd{number:02}")
}

/// What the services' containers run. The web server goes into the background when it listens.
fn plan(marks: &str) -> Plan {
    let script = format!(
        "echo hello >/tmp/index.html; httpd -p {INNER} -h /tmp; touch /marks/{{name}}; exec sleep 1000000"
    );
    let mut plan = Plan::busybox(&script, "--exit-idle-time 10min");
    plan.container.push_str(&format!("\nVolume={marks}:/marks"));
    plan
}

impl<'h> Crowd<'h> {
    fn new(host: &'h Host, manager: Manager) -> Result<Self> {
        let marks = folder(host, manager, "crowd")?;
        let plan = plan(&marks);
        let confinement = confinement(host, manager, &plan)?;
        // All are bound at once, so that they differ.
        let ports = host.in_network(|| {
            let bound: Vec<_> = (0..COUNT)
                .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
                .collect::<std::io::Result<_>>()?;
            bound.iter().map(|socket| Ok(socket.local_addr()?.port())).collect()
        })?;
        let crowd = Self { host, manager, ports, marks: host.path(&marks) };
        for (number, port) in crowd.ports.iter().enumerate() {
            let name = name(number);
            plan.write_quadlet(host, manager, &name)?;
            let service = format!(
                "[Unit]\nAfter={name}.service\nStartLimitIntervalSec=0\n[Service]\nType=notify\nExecStart=/usr/local/bin/bro forward {}\nRuntimeDirectory=bro/%N\n\
                 {confinement}\n",
                plan.forward.replace("{name}", &name)
            );
            manager.unit(host, &format!("{name}-in.service"), &service)?;
            let bare = format!("[Service]\nType=exec\nExecStart=/bin/sleep infinity\n{confinement}\n");
            manager.unit(host, &format!("{name}-bare.service"), &bare)?;
            manager.unit(
                host,
                &format!("{name}-in.socket"),
                &format!("[Socket]\nListenStream=127.0.0.1:{port}\n"),
            )?;
        }
        manager.systemctl(host, &["daemon-reload"])?;
        crowd.systemctl(&["start"], &["-in.socket"])?;
        Ok(crowd)
    }

    /// One command for all of them.
    fn systemctl(&self, command: &[&str], suffixes: &[&str]) -> Result<String> {
        let units: Vec<String> = suffixes
            .iter()
            .flat_map(|suffix| (0..self.ports.len()).map(move |number| format!("{}{suffix}", name(number))))
            .collect();
        let words: Vec<&str> = command.iter().copied().chain(units.iter().map(String::as_str)).collect();
        self.manager.systemctl(self.host, &words)
    }

    /// Stops forwarders and services.
    fn asleep(&self) -> Result<()> {
        self.systemctl(&["stop"], &["-in.service", ".service"])?;
        // A client that is killed has failed.
        self.systemctl(&["reset-failed"], &[".service"]).ok();
        for number in 0..self.ports.len() {
            std::fs::remove_file(self.marks.join(name(number))).ok();
        }
        Ok(())
    }

    /// How long `systemctl start` takes until all of them listen.
    fn start(&self) -> Result<Duration> {
        let began = Instant::now();
        self.systemctl(&["start", "--no-block"], &[".service"])?;
        self.host.wait_until("thirty listeners", PATIENCE, || {
            Ok((0..self.ports.len()).all(|number| self.marks.join(name(number)).exists()))
        })?;
        Ok(began.elapsed())
    }

    /// How long it takes until a client of each has its answer, all of which come in the same moment; and the median of it.
    fn wake(&self) -> Result<(Duration, Duration)> {
        let began = Instant::now();
        let clients: Vec<TcpStream> = self.host.in_network(|| {
            let connect = |port: &u16| {
                let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?;
                client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
                Ok(client)
            };
            self.ports.iter().map(connect).collect()
        })?;
        let answered = std::thread::scope(|scope| {
            let readers: Vec<_> = clients
                .into_iter()
                .enumerate()
                .map(|(number, client)| scope.spawn(move || answer(number, client).map(|()| began.elapsed())))
                .collect();
            readers
                .into_iter()
                .map(|reader| reader.join().expect("the reader does not panic"))
                .collect::<Result<Vec<Duration>>>()
        });
        let mut answered = answered.with_context(|| self.complaints())?;
        answered.sort_unstable();
        Ok((answered[answered.len() - 1], answered[answered.len() / 2]))
    }

    /// The processor time that each of the services with this end of their names has used so far, on average, with what systemd did
    /// to confine it.
    fn time_of(&self, suffix: &str) -> Result<Duration> {
        let shown = self.systemctl(&["show", "--property=ControlGroup", "--value"], &[suffix])?;
        let mut total = 0;
        let mut count = 0;
        for cgroup in shown.lines().filter(|line| !line.is_empty()) {
            let figures =
                std::fs::read_to_string(self.host.path(&format!("/sys/fs/cgroup{cgroup}/cpu.stat")))?;
            let used = figures.lines().find_map(|line| line.strip_prefix("usage_usec "));
            total += used.context("no usage_usec")?.parse::<u64>()?;
            count += 1;
        }
        ensure!(count == self.ports.len() as u64, "{count} of {suffix} run: {shown}");
        Ok(Duration::from_micros(total / count))
    }

    /// What systemd's own part of that is, for another program that is confined as a forwarder is.
    fn time_of_systemd(&self) -> Result<Duration> {
        self.systemctl(&["start"], &["-bare.service"])?;
        let time = self.time_of("-bare.service");
        self.systemctl(&["stop"], &["-bare.service"])?;
        time
    }

    /// How many forwarders have tried whether the kernel can have the kernel relay.
    fn looks(&self) -> Result<usize> {
        let said = (0..self.ports.len())
            .map(|number| self.manager.journal(self.host, &format!("{}-in.service", name(number))));
        Ok(said.collect::<Result<Vec<String>>>()?.iter().filter(|said| said.contains(LOOKED)).count())
    }

    /// The errors of the forwarders, and the end of what the first of them said.
    fn complaints(&self) -> String {
        let said = (0..self.ports.len()).map(|number| {
            let journal = self.manager.journal(self.host, &format!("{}-in.service", name(number)));
            journal.unwrap_or_else(|error| format!("{error:#}"))
        });
        said.filter(|said| said.contains("ERROR") || said.contains("cannot")).take(3).collect()
    }
}

impl Drop for Crowd<'_> {
    fn drop(&mut self) {
        self.systemctl(&["stop"], &["-in.socket", "-in.service", ".service"]).ok();
        self.systemctl(&["reset-failed"], &[".service"]).ok();
        let folder = self.manager.unit_folder();
        for number in 0..self.ports.len() {
            let name = name(number);
            let files = [
                self.manager.quadlet_path(&format!("{name}.container")),
                format!("{folder}/{name}-in.service"),
                format!("{folder}/{name}-bare.service"),
                format!("{folder}/{name}-in.socket"),
            ];
            for file in files {
                std::fs::remove_file(self.host.path(&file)).ok();
            }
        }
    }
}

/// The lines of `[Service]` by which `bro activate` confines the forwarder of such a service.
fn confinement(host: &Host, manager: Manager, plan: &Plan) -> Result<String> {
    let site = Site::activated(host, manager, "crowded", plan, &[])?;
    let unit = manager.systemctl(host, &["cat", &site.forwarder()])?;
    let from = unit.find("# It does without").context("no confinement")?;
    let lines = unit[from..].split("\n[").next().unwrap_or_default();
    ensure!(lines.contains("\nSystemCallFilter="), "{unit}");
    Ok(lines.to_owned())
}

fn answer(number: usize, mut client: TcpStream) -> Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    client.read_to_string(&mut answer).with_context(|| format!("the client of {}", name(number)))?;
    ensure!(answer.starts_with("HTTP/1.") && answer.ends_with("hello\n"), "{}: {answer:?}", name(number));
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

pub fn woken_at_once(host: &Host, manager: Manager) -> Result<()> {
    let crowd = Crowd::new(host, manager)?;
    // Once before that counts, since what comes first finds nothing in memory. Then both begin just after thirty were stopped.
    let _first = crowd.start()?;
    let (mut started, mut woken, mut medians, mut forwarders) = (vec![], vec![], vec![], vec![]);
    let mut looks = 0;
    for round in 0..ROUNDS {
        crowd.asleep()?;
        if manager == Manager::System && round == 0 {
            // As on a host that has just booted: none of the forwarders before has left word of what the kernel can.
            std::fs::remove_file(host.path("/run/bro/fionread")).ok();
        }
        let (last, middle) = crowd.wake()?;
        woken.push(last);
        medians.push(middle);
        forwarders.push(crowd.time_of("-in.service")?);
        if round == 0 {
            // None where the programs cannot be loaded at all: a user's forwarder has no right to that.
            looks = crowd.looks()?;
        }
        crowd.asleep()?;
        started.push(crowd.start()?);
    }
    crowd.asleep()?;
    let systemds = crowd.time_of_systemd()?;
    let own = forwarders.iter().min().context("no round")?.saturating_sub(systemds);
    let (started, woken) = (median(started), median(woken));
    let times = woken.as_secs_f64() / started.as_secs_f64();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    note(&format!(
        "{manager:?}: {COUNT} services, the last listens {:.2} s after `systemctl start`; woken at once, the last answers after {:.2} s \
         ({times:.2} times; median {:.2} s), medians of {ROUNDS}; at {:.1} ms of processor time for each forwarder, systemd's part of which \
         is {:.1} ms",
        started.as_secs_f64(),
        woken.as_secs_f64(),
        median(medians).as_secs_f64(),
        milliseconds(median(forwarders)),
        milliseconds(systemds),
    ));
    ensure!(looks <= 1, "{looks} forwarders have tried the kernel at once");
    let bounds = if bro::is_packaged() { BOUNDS } else { BOUNDS_DEBUG };
    ensure!(
        times <= bounds.times,
        "woken at once they take {times:.2} times as long as started: {woken:?}, not {started:?}"
    );
    ensure!(
        own <= bounds.own,
        "each forwarder takes {own:?} of processor time, beside systemd's {systemds:?}"
    );
    Ok(())
}
