//! `cargo xtask bench`: bro beside every other forwarder that is here, in one run on this machine, in rounds that take turns,
//! so that whatever else the machine does meanwhile hits all of them alike.
//!
//! A process in a network namespace stands for the container, as in `cargo xtask run`; the service in it, the load
//! generators and what systemd and podman would do are parts of this task. Every contender has a port of the service to
//! itself and stays up while the rounds go on.

mod awake;
mod check;
mod clock;
mod cold;
mod contenders;
mod cpu;
mod datagram_service;
mod datagrams;
mod environment;
mod launch;
mod load;
mod memory;
mod metrics;
mod plan;
mod poke;
mod programs;
mod report;
mod results;
mod scene;
mod service;
mod statistics;
mod stream;
mod tools;
mod wire;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;

use contenders::{Contender, Running, Server};
use environment::Environment;
use load::{Figures, Load};
use plan::{Clock, Plan};
use programs::Program;
use results::Results;
use scene::{Scene, port_of};
use tools::Missing;

/// `cargo xtask bench`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// Under three minutes on two cores; what does not fit is left out, and said so
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// More and longer rounds, for figures to publish
    #[arg(long)]
    full: bool,
    /// So many rounds of everything that is measured in rounds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    rounds: Option<u8>,
    /// Keep what earlier runs have left in the folder of --out of other workloads, for those who measure a few at a time
    #[arg(long)]
    add: bool,
    /// Clients on another host: a network namespace at the far end of a veth(4) pair. Takes root, and leaves out who has its
    /// clients in the container
    #[arg(long, conflicts_with_all = ["publish", "add"])]
    from_another_host: bool,
    /// Only these contenders and workloads, by the names that --list prints
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    only: Vec<String>,
    /// Print the names for --only, and what is missing here
    #[arg(long)]
    list: bool,
    /// Where results.json, report.md and the plots go
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    out: PathBuf,
    /// Also write the workspace's BENCHMARKS.md and its plots, which are checked in
    #[arg(long)]
    publish: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// The parts that a run starts as processes of their own.
#[derive(Debug, Subcommand)]
enum Part {
    /// Become a program, with a socket, in a namespace, as a user
    #[command(hide = true)]
    Launch(launch::Args),
    /// Serve
    #[command(hide = true)]
    Service(service::Args),
    /// Make load, and print the figures
    #[command(hide = true)]
    Load(load::Args),
    /// Serve datagrams
    #[command(hide = true)]
    DatagramService(datagram_service::Args),
    /// Make load of datagrams, and print the figures
    #[command(hide = true)]
    DatagramLoad(load::datagrams::Args),
    /// Speak to a service until it answers
    #[command(hide = true)]
    Poke(poke::Args),
    /// Try what a forwarder must get right
    #[command(hide = true)]
    Check(check::Args),
}

/// The workloads beside those of [`Load::TIMED`] and [`Program::ALL`].
const COLD: &str = "cold";
const IDLE: &str = "idle";
const CHECK: &str = "check";

/// The task, or one of its parts.
pub fn run(args: &Args) -> Result<()> {
    match &args.part {
        Some(Part::Launch(args)) => launch::main(args),
        Some(Part::Service(args)) => service::main(args),
        Some(Part::Load(args)) => load::main(args),
        Some(Part::DatagramService(args)) => datagram_service::main(args),
        Some(Part::DatagramLoad(args)) => load::datagrams::main(args),
        Some(Part::Poke(args)) => poke::main(args),
        Some(Part::Check(args)) => check::main(args),
        None if args.list => list(),
        None => bench(args),
    }
}

fn workloads() -> Vec<String> {
    let mut names = vec![COLD.to_owned(), IDLE.into(), CHECK.into()];
    names.extend(Load::TIMED.map(Load::name));
    names.push(datagrams::DATAGRAMS.into());
    names.extend(Program::ALL.map(|program| program.key().to_owned()));
    names
}

/// The workload whose figure has this name.
fn workload_of(figure: &str) -> Option<String> {
    let all = workloads().into_iter();
    all.filter(|workload| figure.starts_with(workload)).max_by_key(String::len)
}

fn list() -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    println!("contenders:");
    for contender in &contenders::ALL {
        let missing = contender
            .missing(root)
            .map_or_else(String::new, |missing| format!("   MISSING: {}", missing.why));
        println!("  {:22} {}{missing}", contender.key, contender.how);
    }
    println!("workloads: {}", workloads().join(", "));
    for missing in Program::ALL.into_iter().filter_map(Program::missing) {
        println!("  MISSING: {}: {}", missing.name, missing.why);
    }
    Ok(())
}

/// What of the names of `--only` is meant.
struct Choice {
    contenders: Vec<Contender>,
    workloads: Vec<String>,
}

impl Choice {
    fn of(only: &[String]) -> Result<Self> {
        let workloads = workloads();
        let known = |name: &String| {
            workloads.contains(name) || contenders::ALL.iter().any(|contender| contender.key == name)
        };
        if let Some(unknown) = only.iter().find(|name| !known(name)) {
            bail!("nothing is called {unknown}; `cargo xtask bench --list` prints the names");
        }
        let contenders: Vec<Contender> = contenders::ALL
            .into_iter()
            .filter(|contender| only.iter().any(|name| name == contender.key))
            .collect();
        let chosen: Vec<String> = workloads.iter().filter(|name| only.contains(name)).cloned().collect();
        Ok(Self {
            contenders: if contenders.is_empty() { contenders::ALL.to_vec() } else { contenders },
            workloads: if chosen.is_empty() { workloads } else { chosen },
        })
    }

    fn has(&self, workload: &str) -> bool {
        self.workloads.iter().any(|name| name == workload)
    }
}

/// What the phases share.
struct Bench {
    scene: Scene,
    plan: Plan,
    clock: Clock,
    present: Vec<Contender>,
    choice: Choice,
    results: Results,
}

fn bench(args: &Args) -> Result<()> {
    let plan = match (args.quick, args.full) {
        (true, _) => Plan::quick(),
        (_, true) => Plan::full(),
        _ => Plan::usual(),
    };
    let mut plan = match args.rounds {
        Some(rounds) => plan.with_rounds(rounds.into()),
        None => plan,
    };
    plan.from_another_host = args.from_another_host;
    let mut choice = Choice::of(&args.only)?;
    if plan.from_another_host {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "--from-another-host takes root, for the veth pair: `sudo --preserve-env=PATH,HOME cargo xtask bench --from-another-host`"
        );
        choice.contenders.retain(Contender::is_reached_from_outside);
        choice.workloads.retain(|workload| workload != COLD);
    }
    let earlier = if args.add { Some(report::Report::read(&args.out)?) } else { None };
    let bro = crate::program::bro()?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;

    let mut environment = Environment::before(&bro);
    let clock = Clock::start(&plan);
    let (present, mut missing) = sift(&choice, environment.root);
    for lack in &missing {
        say(&clock, &format!("missing: {}: {}", lack.name, lack.why));
    }
    let scene = Scene::set(bro, &present, plan.from_another_host)?;
    let mut bench = Bench { scene, plan, clock, present, choice, results: Results::default() };
    // One contender after the other is taken out here if it cannot be started at all.
    bench.try_everyone(&mut missing);
    ensure!(!bench.present.is_empty(), "there is nothing left to compare");
    bench.cold_starts();
    bench.idle();
    bench.rounds();
    bench.datagrams();
    bench.programs();
    let Bench { scene, plan, clock, present, results, choice } = bench;
    let versions = versions(&scene, &present);
    drop(scene);
    environment.after(clock.elapsed());

    let mut workloads = choice.workloads;
    workloads.retain(|workload| !missing.iter().any(|lack| lack.name == *workload));
    let runs = vec![report::Run { environment, plan, workloads }];
    let report = report::Report { runs, present, missing, versions, results };
    let report = match earlier {
        Some(earlier) => report.add_to(earlier)?,
        None => report,
    };
    report.write(&args.out)?;
    if args.publish {
        report.publish()?;
    }
    println!("{}", report.markdown());
    say(&clock, &format!("written to {}", args.out.display()));
    Ok(())
}

/// Who is here, and who and what is not.
fn sift(choice: &Choice, root: bool) -> (Vec<Contender>, Vec<Missing>) {
    let mut missing = Vec::new();
    let mut present = Vec::new();
    for contender in &choice.contenders {
        match contender.missing(root) {
            Some(lack) => missing.push(lack),
            None => present.push(contender.clone()),
        }
    }
    let programs = Program::ALL.into_iter().filter(|program| choice.has(program.key()));
    missing.extend(programs.filter_map(Program::missing));
    (present, missing)
}

fn versions(scene: &Scene, present: &[Contender]) -> Vec<(String, String)> {
    let mut versions: Vec<(String, String)> = present
        .iter()
        .filter_map(|contender| Some((contender.label.to_owned(), contender.version(scene)?)))
        .collect();
    for program in Program::ALL.into_iter().filter(|program| program.missing().is_none()) {
        versions.push((program.key().to_owned(), program.versions().join("; ")));
    }
    versions
}

fn say(clock: &Clock, line: &str) {
    println!("[{:5.1} s] {line}", clock.elapsed().as_secs_f64());
}

impl Bench {
    /// Starts everyone once, and has each do what it must get right.
    fn try_everyone(&mut self, missing: &mut Vec<Missing>) {
        say(&self.clock, "correctness");
        for (place, contender) in std::mem::take(&mut self.present).into_iter().enumerate() {
            match contender.start(&self.scene, port_of(place)) {
                Ok(running) => {
                    if self.choice.has(CHECK) {
                        self.check(&contender, &running);
                    }
                    self.present.push(contender);
                }
                Err(error) => {
                    let why = format!("does not work here: {error:#}");
                    say(&self.clock, &format!("missing: {}: {why}", contender.label));
                    missing.push(Missing { name: contender.label.to_owned(), why });
                }
            }
        }
    }

    fn check(&mut self, contender: &Contender, running: &Running) {
        let said = running.client(&self.scene, &["check".into(), running.address.to_string()], check::LIMIT);
        match said.and_then(|said| Ok(serde_json::from_str(&said)?)) {
            Ok(verdicts) => drop(self.results.verdicts.insert(contender.key, verdicts)),
            Err(error) => self.results.fail(contender, CHECK, &error),
        }
    }

    fn cold_starts(&mut self) {
        if !self.choice.has(COLD) {
            return;
        }
        say(&self.clock, "cold starts");
        // No port of the service is used twice: a kernel relay would know it already.
        let mut ports = 20_000_u16..;
        let mut port = || ports.next().unwrap_or_default();
        for contender in self.present.clone().iter().filter(|contender| cold::takes_part(contender)) {
            if self.choice.has(CHECK) {
                // Held until the service listens, or sent away?
                let held = cold::start(&self.scene, contender, cold::Order::Together, port());
                let wrong = held.err().map(|error| format!("{error:#}"));
                let verdict = check::Verdict { case: "client before service".into(), wrong };
                self.results.verdicts.entry(contender.key).or_default().push(verdict);
            }
            for _ in 0..self.plan.cold_rounds {
                match cold::start(&self.scene, contender, cold::order_for(contender), port()) {
                    Ok(figures) => self.results.add(contender, figures),
                    Err(error) => {
                        self.results.fail(contender, COLD, &error);
                        break;
                    }
                }
            }
        }
    }

    /// Fresh processes: memory that a process had before would be used again, and not be counted.
    fn idle(&mut self) {
        if !self.choice.has(IDLE) {
            return;
        }
        for count in self.plan.idle.clone() {
            for round in 0..self.plan.idle_rounds {
                say(&self.clock, &format!("{count} idle connections, round {}", round + 1));
                for (place, contender) in self.present.clone().iter().enumerate() {
                    if self.results.has_failed(contender, &format!("idle{count}")) {
                        continue;
                    }
                    let figures = contender.start(&self.scene, port_of(place)).and_then(|running| {
                        self.load(
                            &running,
                            Load::Idle,
                            &[format!("--count={count}")],
                            self.plan.idle_limit(count),
                        )
                    });
                    match figures {
                        Ok(figures) => self.results.add(contender, figures),
                        Err(error) => self.results.fail(contender, &format!("idle{count}"), &error),
                    }
                }
            }
        }
    }

    fn load(&self, running: &Running, load: Load, options: &[String], limit: Duration) -> Result<Figures> {
        let mut args = vec!["load".to_owned(), load.name(), running.address.to_string()];
        args.push(format!("--seconds={}", self.plan.seconds));
        args.extend(running.group().map(|group| format!("--group={group}")));
        args.extend_from_slice(options);
        Ok(serde_json::from_str(&running.client(&self.scene, &args, limit)?)?)
    }

    fn rounds(&mut self) {
        let loads: Vec<Load> = Load::TIMED.into_iter().filter(|load| self.choice.has(&load.name())).collect();
        if loads.is_empty() {
            return;
        }
        let mut up = Vec::new();
        for (place, contender) in self.present.clone().into_iter().enumerate() {
            match contender.start(&self.scene, port_of(place)) {
                Ok(running) => up.push((contender, running)),
                Err(error) => self.results.fail(&contender, "every load", &error),
            }
        }
        let names = loads.iter().map(|load| load.name()).collect::<Vec<_>>().join(" ");
        let mut longest = Duration::ZERO;
        for round in 0..self.plan.rounds {
            if round > 0 && !self.clock.fits(longest, 0.66) {
                let (left, all) = (self.plan.rounds - round, self.plan.rounds);
                self.results.left_out.push(format!("{left} of {all} rounds of {names}"));
                break;
            }
            let begin = Instant::now();
            for &load in &loads {
                say(&self.clock, &format!("round {} of {}: {}", round + 1, self.plan.rounds, load.name()));
                for place in 0..up.len() {
                    // Each round begins with another one.
                    let (contender, running) = &up[(place + round) % up.len()];
                    // What did not work will not, and costs the whole limit each time.
                    if self.results.has_failed(contender, &load.name()) {
                        continue;
                    }
                    match self.load(running, load, &[], self.plan.load_limit()) {
                        Ok(figures) => self.results.add(contender, figures),
                        Err(error) => self.results.fail(contender, &load.name(), &error),
                    }
                }
            }
            longest = longest.max(begin.elapsed());
        }
        self.note_moved(&up, &names);
    }

    /// How each bro moved the bytes.
    fn note_moved(&mut self, up: &[(Contender, Running)], what: &str) {
        for (contender, running) in up {
            if let Some(moved) = running.moved() {
                self.results.moved.entry(contender.key).or_default().push((what.to_owned(), moved));
            }
        }
    }

    fn programs(&mut self) {
        let programs: Vec<Program> = Program::ALL
            .into_iter()
            .filter(|program| self.choice.has(program.key()) && program.missing().is_none())
            .collect();
        for (number, &program) in programs.iter().enumerate() {
            say(&self.clock, &format!("{}: starting its server", program.key()));
            let up_to = 0.66 + 0.34 * (number + 1) as f64 / programs.len() as f64;
            if let Err(error) = self.program(program, up_to) {
                let everyone = self.present.first().cloned();
                if let Some(contender) = everyone {
                    self.results.fail(&Contender { label: "everyone", ..contender }, program.key(), &error);
                }
            }
        }
    }

    fn program(&mut self, program: Program, up_to: f64) -> Result<()> {
        let started = self.present.iter().enumerate();
        let wanted = started.map(|(place, contender)| contender.server(&self.scene, program.port(place)));
        let mut wanted = wanted.collect::<Result<Vec<_>>>()?;
        let servers = program.start(&self.scene, &wanted)?;
        let mut up = Vec::new();
        for (place, contender) in self.present.clone().into_iter().enumerate() {
            let Some(server) = wanted[place].take() else { continue };
            match self.start_for(&contender, place, program, server) {
                Ok(running) => up.push((contender, running)),
                Err(error) => self.results.fail(&contender, program.key(), &error),
            }
        }
        let mut longest = Duration::ZERO;
        for round in 0..self.plan.program_rounds {
            if round > 0 && !self.clock.fits(longest, up_to) {
                let left = self.plan.program_rounds - round;
                self.results.left_out.push(format!(
                    "{left} of {} rounds of {}",
                    self.plan.program_rounds,
                    program.key()
                ));
                break;
            }
            say(
                &self.clock,
                &format!("{}: round {} of {}", program.key(), round + 1, self.plan.program_rounds),
            );
            let begin = Instant::now();
            for place in 0..up.len() {
                let (contender, running) = &up[(place + round) % up.len()];
                if self.results.has_failed(contender, program.key()) {
                    continue;
                }
                match program.measure(&self.scene, running, &self.plan) {
                    Ok(figures) => self.results.add(contender, figures),
                    Err(error) => self.results.fail(contender, program.key(), &error),
                }
            }
            longest = longest.max(begin.elapsed());
        }
        self.note_moved(&up, program.key());
        drop(up);
        ensure!(servers.count() > 0, "no server was started");
        Ok(())
    }

    fn start_for(
        &self,
        contender: &Contender,
        place: usize,
        program: Program,
        server: Server,
    ) -> Result<Running> {
        let running = contender.start_for(&self.scene, program.port(place), program, server)?;
        program.warm(&self.scene, &running)?;
        Ok(running)
    }
}
