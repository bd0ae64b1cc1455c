//! `cargo xtask run`: the main job on this host, as an ordinary user or as root, with nothing but this binary and bro.
//!
//! The task plays systemd, a process in a namespace plays the container, and a client in this process plays the world.
//! Everything printed was measured in the run that prints it.

mod adoption;
mod client;
mod compare;
mod keep;
pub mod namespace;
pub mod process;
pub mod runtime;
mod service;
mod stream;
mod systemd;

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;
use nix::sys::signal::SigSet;

use client::Answer;
use namespace::{Container, SERVICE};
use systemd::{Forwarder, Socket};

/// `cargo xtask run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stay up until Ctrl-C, for a browser or curl
    #[arg(long)]
    keep: bool,
}

/// The parts that `run` starts as processes of their own.
#[derive(Debug, Subcommand)]
pub enum Part {
    /// Hold a namespace, and start things in it as stdin says
    Container,
    /// Serve HTTP
    Service { addresses: Vec<String> },
    /// Become the service in the namespaces of a process, as an OCI runtime with bro's seccomp profile makes a container
    Runtime { container: i32, listener_path: String, address: String },
    /// Measure, and print the figures
    Client { address: String },
    /// Become the program that systemd would start with the socket that is stdin
    Forwarder {
        /// Stdout is the socket at a seccomp profile's listenerPath
        #[arg(long)]
        adopt: bool,
        #[arg(last = true)]
        command: Vec<String>,
    },
}

/// One of the parts.
pub fn part(part: Part) -> Result<()> {
    // `--keep` blocks signals in the task; its parts have inherited that, and systemd's programs would not.
    SigSet::empty().thread_set_mask().context("cannot unblock signals")?;
    match part {
        Part::Container => namespace::main(),
        Part::Service { addresses } => service::main(&addresses),
        Part::Client { address } => client::main(&address),
        Part::Forwarder { adopt, command } => systemd::become_forwarder(adopt, &command),
        Part::Runtime { container, listener_path, address } => {
            adoption::main(container, &listener_path, &address)
        }
    }
}

/// The task.
pub fn run(args: &Args) -> Result<()> {
    let interrupts = if args.keep { Some(keep::Interrupts::catch()?) } else { None };
    let bro = crate::program::bro()?;

    let mut container = Container::create()?;
    let socket = Socket::listen()?;
    let kind = if container.rootless { "user and network namespaces" } else { "a network namespace" };
    println!("bro         {}", bro.display());
    println!(
        "container   process {}, {kind} of its own: lo only, and nothing listens there",
        container.pid()
    );
    println!("socket      {}, held open as systemd holds it; no forwarder runs", socket.address);
    println!();

    let forwarder = tell_first_connection(&bro, &mut container, &socket, args)?;
    println!();
    let adopted = adoption::tell(&bro, &container);
    println!();
    compare::table(&bro, &mut container, adopted)?;
    println!();

    match interrupts {
        Some(interrupts) => keep::stay_up(&bro, &mut container, &socket, forwarder, &interrupts),
        None => forwarder.end(),
    }
}

/// The first client finds only the socket there, and gets its answer all the same.
fn tell_first_connection(
    bro: &Path,
    container: &mut Container,
    socket: &Socket,
    args: &Args,
) -> Result<Forwarder> {
    let mut forward = vec!["--relay=auto".to_owned()];
    if args.keep {
        forward.push(format!("--exit-idle-time={}s", keep::IDLE.as_secs()));
    }
    let line = forward_line(container, &forward, SERVICE);
    let activate = || socket.activate(bro, &line, None);
    let (mut woken, ()) = wake(socket, activate, || container.start_service())?;
    let ms = |since_request: Duration| format!("{:8.1} ms", since_request.as_secs_f64() * 1e3);
    println!("client      GET http://{}/", socket.address);
    println!("{}   systemd's part sees the client, and starts bro and the service:", ms(woken.activated));
    println!("{:8}      bro {}", "", line.join(" "));
    println!("{}   the service listens on {SERVICE} in its namespace", ms(woken.listening));
    let Answer { status, page, .. } = &woken.answer;
    println!("{}   the client has its answer: {status}, {} bytes, as sent", ms(woken.answered), page.len());

    let end = woken.forwarder.next_end()?;
    println!();
    let held = end.get("cold_start_ms");
    println!(
        "cold start  {} for the client; bro itself held it for {held} ms of that",
        ms(woken.answered).trim()
    );
    println!("relay       {}: {}", end.get("relay"), compare::why(end.get("relay")));
    if let Some(said) = woken.forwarder.on_the_kernel_relay() {
        println!("            bro says: {said}");
    }
    println!(
        "bytes       {} to the service, {} to the client; the connection ended by {}",
        end.get("to_service"),
        end.get("to_client"),
        end.get("reason")
    );
    Ok(woken.forwarder)
}

/// The command line of `bro forward` for this container.
fn forward_line(container: &Container, options: &[String], target: &str) -> Vec<String> {
    let mut line = vec!["forward".to_owned(), format!("--pid={}", container.pid())];
    line.extend(["--start-timeout=20s".into(), "--drain-timeout=2s".into()]);
    line.extend_from_slice(options);
    line.push(target.into());
    line
}

/// How a first connection went; times count from the client's connect().
struct Woken {
    forwarder: Forwarder,
    activated: Duration,
    listening: Duration,
    answered: Duration,
    answer: Answer,
}

/// Lets a client connect to `socket`, and does for it what systemd does: it starts bro, and the service, which listens when its start returns.
fn wake<S>(
    socket: &Socket,
    activate: impl FnOnce() -> Result<Forwarder>,
    start_service: impl FnOnce() -> Result<S>,
) -> Result<(Woken, S)> {
    let address = socket.address.to_string();
    let (sender, answers) = channel();
    // The client is a thread; the processes are started by this one, which they must not outlive.
    std::thread::spawn(move || {
        let begin = Instant::now();
        let answer = client::get_page(&address);
        sender.send((begin, begin.elapsed(), answer)).ok();
    });
    socket.wait_for_client(Duration::from_secs(10))?;
    let activated = Instant::now();
    let mut forwarder = activate()?;
    let service = start_service()?;
    let listening = Instant::now();

    let (begin, answered, answer) = loop {
        match answers.recv_timeout(Duration::from_millis(100)) {
            Ok(answer) => break answer,
            Err(RecvTimeoutError::Timeout) => {
                ensure!(!forwarder.has_exited()?, "bro gave up: {}", forwarder.story());
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the client broke"),
        }
    };
    let answer =
        answer.with_context(|| format!("the client got no answer; bro's log: {}", forwarder.story()))?;
    ensure!(answer.page == service::PAGE, "the client got another page than the service sent");
    let (activated, listening) = (activated.duration_since(begin), listening.duration_since(begin));
    Ok((Woken { forwarder, activated, listening, answered, answer }, service))
}
