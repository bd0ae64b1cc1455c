//! Cold starts: nothing runs but the listening socket; a client connects, and the time until its first byte is split by who
//! has it. All times are of one clock, taken where things happen: in the client, in systemd's stand-in, in the service.

use std::os::fd::AsFd as _;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags};

use super::contenders::{AdoptedStart, Contender, Way, bro_args, expect_adopted};
use super::launch::Launch;
use super::load::{self, Figures};
use super::scene::Scene;
use super::stream::{Address, wait_for};
use super::{clock, service, tools};
use crate::run::process::Lines;

const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// Of the service, as of a container that has something to do before it listens.
const STARTUP_MS: u64 = 50;

/// Who of the contenders is started by a socket.
pub fn takes_part(contender: &Contender) -> bool {
    matches!(contender.way, Way::Bro { inside: false, .. } | Way::Adopted | Way::Proxyd)
}

/// When the service is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Together with the forwarder, which has to hold the client.
    Together,
    /// Before the forwarder, which is started when the service listens: `After=` a unit that notifies.
    First,
}

/// bro needs no order; systemd-socket-proxyd does.
pub fn order_for(contender: &Contender) -> Order {
    if contender.way == Way::Proxyd { Order::First } else { Order::Together }
}

/// One cold start; `port` has not been used before.
pub fn start(scene: &Scene, contender: &Contender, order: Order, port: u16) -> Result<Figures> {
    let socket = service::bound(&Address::Tcp(([127, 0, 0, 1], 0).into()))?;
    let address = Address::Tcp(super::contenders::local_address(&socket)?);
    let target = format!("127.0.0.1:{port}");
    let (sender, answers) = channel();
    // The client is a thread; the processes are started by this one, which they must not outlive.
    std::thread::spawn(move || {
        let began = clock::now();
        let answer = load::ping(&address);
        sender.send((began, clock::now(), answer)).ok();
    });
    wait_for(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], ANSWERS_WITHIN)
        .context("no client came")?;
    let activated = clock::now();

    let log = |name: &str| scene.folder.path(&format!("cold-{port}-{name}.log"));
    let forwarder = || {
        let socket = Some(socket.try_clone()?);
        match contender.way {
            Way::Bro { options, .. } => {
                let mut args = bro_args(scene, options);
                // As it is by default: who insists has the first client wait until the kernel relay is loaded and tested.
                args.iter_mut()
                    .filter(|arg| *arg == "--relay=sockmap")
                    .for_each(|arg| *arg = "--relay=auto".into());
                args.push(target.clone());
                Launch { socket, ..Launch::default() }.start(&scene.bro, &args, &log("forwarder"))
            }
            Way::Proxyd => {
                let program =
                    tools::find("systemd-socket-proxyd").context("systemd-socket-proxyd is gone")?;
                let launch = Launch { socket, inside: scene.inside(true), ..Launch::default() };
                launch.start(&program, std::slice::from_ref(&target), &log("forwarder"))
            }
            _ => bail!("{} is not started by a socket", contender.label),
        }
    };
    let starting = || {
        let launch = Launch { inside: scene.inside(true), ..Launch::default() };
        Scene::starting_service(launch, vec![target.clone()], STARTUP_MS, &log("service"))
    };
    let (_forwarder, _service, listening, lines) = match order {
        Order::Together if contender.way == Way::Adopted => {
            let starts = AdoptedStart { scene, target, startup_ms: STARTUP_MS };
            let (forwarder, (service, lines)) =
                starts.both(socket.try_clone()?, &log("forwarder"), &log("service"))?;
            let listening = stamp(&lines, "listening")?;
            (forwarder, service, listening, lines)
        }
        Order::Together => {
            let forwarder = forwarder()?;
            let (service, lines) = starting()?;
            let listening = stamp(&lines, "listening")?;
            (forwarder, service, listening, lines)
        }
        Order::First => {
            let (service, lines) = starting()?;
            let listening = stamp(&lines, "listening")?;
            (forwarder()?, service, listening, lines)
        }
    };
    let (began, answered, answer) =
        answers.recv_timeout(ANSWERS_WITHIN).context("the client got no answer")?;
    answer.context("the client that came while the service was not listening yet")?;
    if contender.way == Way::Adopted {
        expect_adopted(&log("forwarder"))?;
    }
    let accepted = stamp(&lines, "accepted")?;
    let between = |from: u64, to: u64| (to as f64 - from as f64) / 1e9;
    Ok([
        ("cold.systemd", between(began, activated)),
        ("cold.container", between(activated, listening)),
        ("cold.readiness", between(listening, accepted)),
        ("cold.relay", between(accepted, answered)),
        ("cold.total", between(began, answered)),
        ("cold.own", between(listening, answered)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into())
}

/// The time behind a word that the service prints.
fn stamp(lines: &Lines, word: &str) -> Result<u64> {
    let line = lines.until(ANSWERS_WITHIN, &mut Vec::new(), |line| line.starts_with(word));
    let line = line.with_context(|| format!("the service was to say that it is {word}"))?;
    line.split(' ').nth(1).and_then(|time| time.parse().ok()).context("a time")
}
