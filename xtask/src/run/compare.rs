//! The relays beside each other and beside a direct connection, in rounds that take turns, so that whatever else the host
//! does meanwhile hits all of them alike.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::adoption::{self, Adopted};
use super::client::{self, Figures, median};
use super::namespace::{Container, service_for};
use super::systemd::{Forwarder, Socket};

const ROUNDS: usize = 5;

/// A way to relay that the table shows. A new one needs a line in [`RELAYS`], nothing else.
struct Relay {
    /// As `relay=` in bro's log names it.
    name: &'static str,
    label: &'static str,
    options: &'static [&'static str],
    needs_root: bool,
    /// What it is, in words for a reader who sees it for the first time.
    means: &'static str,
}

const RELAYS: &[Relay] = &[
    Relay {
        name: "sockmap",
        label: "bro, sockmap",
        options: &["--relay=sockmap"],
        needs_root: true,
        means: "what the service sends goes straight into the client's connection, kernel-side",
    },
    Relay {
        name: "sockmap",
        label: "bro, sockmap both ways",
        options: &["--relay=sockmap", "--local-clients=on"],
        needs_root: true,
        means: "the same for what clients on this host send",
    },
    Relay {
        name: "splice",
        label: "bro, splice",
        options: &["--relay=splice"],
        needs_root: false,
        means: "splice(2) through a pipe, no byte enters bro's memory",
    },
    Relay {
        name: "copy",
        label: "bro, copy",
        options: &["--relay=copy"],
        needs_root: false,
        means: "recv and send through a buffer of bro's",
    },
];

/// What the relay of this name is.
pub fn why(name: &str) -> &'static str {
    RELAYS.iter().find(|relay| relay.name == name).map_or("(new to this task)", |relay| relay.means)
}

/// A contender, and what came of it.
struct Row {
    label: &'static str,
    through: Through,
    rounds: Vec<Figures>,
}

enum Through {
    /// The client inside the namespace, at the service itself.
    Nothing,
    /// The client outside, at this socket; the forwarder lives as long as the row.
    Bro(Socket, Forwarder),
    /// The same, and the service has the socket.
    Adopted(Adopted),
}

impl Through {
    /// Where clients outside connect.
    fn outside(&self) -> Option<String> {
        match self {
            Self::Nothing => None,
            Self::Bro(socket, _) => Some(socket.address.to_string()),
            Self::Adopted(adopted) => Some(adopted.address().to_string()),
        }
    }

    fn moved(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Bro(_, forwarder) => forwarder.shares().unwrap_or_default(),
            Self::Adopted(_) => "none by bro".into(),
        }
    }
}

/// Measures and prints.
pub fn table(bro: &Path, container: &mut Container, adopted: Option<Adopted>) -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let (shown, left_out): (Vec<&Relay>, Vec<&Relay>) =
        RELAYS.iter().partition(|relay| root || !relay.needs_root);

    let mut rows = vec![Row { label: "direct, both inside", through: Through::Nothing, rounds: Vec::new() }];
    let mut failures = Vec::new();
    for (number, relay) in shown.into_iter().enumerate() {
        let socket = Socket::listen()?;
        // Number 0 is the direct connection's.
        let target = service_for(number + 1);
        let options: Vec<String> = relay.options.iter().map(ToString::to_string).collect();
        let line = super::forward_line(container, &options, &target);
        match super::wake(&socket, || socket.activate(bro, &line, None), || container.start_service()) {
            Ok((woken, ())) => {
                let through = Through::Bro(socket, woken.forwarder);
                rows.push(Row { label: relay.label, through, rounds: Vec::new() });
            }
            Err(error) => failures.push(format!("{}: not to be had here: {error:#}", relay.label)),
        }
    }
    if let Some(adopted) = adopted {
        rows.push(Row { label: adoption::LABEL, through: Through::Adopted(adopted), rounds: Vec::new() });
    }
    for _ in 0..ROUNDS {
        for row in &mut rows {
            row.rounds.push(match row.through.outside() {
                None => container.measure_inside(&service_for(0))?,
                Some(address) => client::measure(&address)?,
            });
        }
    }
    print(&rows);
    for line in failures {
        println!("{line}");
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("Medians of {ROUNDS} rounds of this run on {cores} cores; every byte was compared.");
    for relay in &left_out {
        println!("As root also {}: {}.", relay.label, relay.means);
    }
    if !left_out.is_empty() {
        println!("  {}", as_root(bro));
    }
    Ok(())
}

fn print(rows: &[Row]) {
    let rate = |row: &Row| median(row.rounds.iter().map(|f| f.bytes_per_second).collect(), f64::total_cmp);
    let trip = |row: &Row| median(row.rounds.iter().map(|f| f.round_trip).collect(), Duration::cmp);
    let micros = |row: &Row| trip(row).as_secs_f64() * 1e6;

    let download = format!("download {} MiB", client::BULK >> 20);
    println!(
        "{:22} {download:>18}   {:>9}   {:>15}   {:>9}   bytes moved",
        "", "of direct", "round trip 64 B", "of direct"
    );
    let direct = &rows[0];
    for row in rows {
        println!(
            "{:22} {:>12.2} GiB/s   {:>9.2}   {:>12.1} µs   {:>9.2}   {}",
            row.label,
            rate(row) / f64::from(1 << 30),
            rate(row) / rate(direct),
            micros(row),
            micros(row) / micros(direct),
            row.through.moved(),
        );
    }
}

/// How to run this very build as root, without a root-owned file in the target folder.
fn as_root(bro: &Path) -> String {
    let task =
        std::env::current_exe().map_or_else(|_| "target/debug/xtask".into(), |p| p.display().to_string());
    format!("sudo BRO_BIN={} {task} run", bro.display())
}
