//! Many connections of every kind at once: what each does follows from a seed that both of its ends know.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::pattern::{Pattern, Rng};
use crate::peers::{Conn, End, is_abort};
use crate::suite::Rig;

const CONNECTIONS: u64 = 96;
const AT_ONCE: u64 = 12;
const HEADER: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Each half-closes when it has sent everything.
    EachOnItsOwn,
    /// The service answers after it has seen the request's end.
    AnswerAfterRequest,
    /// The client sends after it has seen the end of what the service says.
    RequestAfterAnswer,
    /// The client aborts when it has sent everything.
    ClientAborts,
    /// The service aborts when it has sent everything.
    ServiceAborts,
}

#[derive(Debug, Clone)]
struct Plan {
    seed: u64,
    up: u64,
    down: u64,
    ending: Ending,
}

impl Plan {
    const fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        // A few bytes, around a segment, around a pipe, more than all buffers' first sizes.
        let up = HEADER + Self::size(&mut rng);
        let down = Self::size(&mut rng);
        let ending = match rng.within(0, 6) {
            0 | 1 => Ending::EachOnItsOwn,
            2 => Ending::AnswerAfterRequest,
            3 => Ending::RequestAfterAnswer,
            4 => Ending::ClientAborts,
            _ => Ending::ServiceAborts,
        };
        Self { seed, up, down, ending }
    }

    const fn size(rng: &mut Rng) -> u64 {
        match rng.within(0, 9) {
            0 => 0,
            1..=3 => rng.within(1, 200),
            4..=6 => rng.within(1, 70_000),
            7 | 8 => rng.within(1, 600_000),
            _ => rng.within(1, 3_000_000),
        }
    }

    const fn up_pattern(&self) -> Pattern {
        Pattern(self.seed ^ 1)
    }

    const fn down_pattern(&self) -> Pattern {
        Pattern(self.seed ^ 2)
    }
}

/// Sends in pieces with pauses; false when the other side's abort, if it may abort, has cut it short.
fn send(conn: &Conn, pattern: Pattern, from: u64, to: u64, may_be_cut: bool) -> Result<bool> {
    let mut rng = Rng::new(pattern.0 ^ from);
    let chunk = || {
        if rng.once_in(12) {
            thread::sleep(Duration::from_micros(rng.within(0, 2500)));
        }
        let most = if rng.once_in(3) { 300 } else { 120_000 };
        usize::try_from(rng.within(1, most)).expect("fits")
    };
    match conn.pour_chunks(pattern, from, to, chunk) {
        Ok(()) => Ok(true),
        Err(error) if may_be_cut && error.downcast_ref().is_some_and(is_abort) => Ok(false),
        Err(error) => Err(error),
    }
}

/// One side's sending: half-closes after the last byte, unless a side is going to abort instead.
fn say(conn: &Conn, pattern: Pattern, from: u64, to: u64, plan: &Plan, other_aborts: bool) -> Result<bool> {
    let all = send(conn, pattern, from, to, other_aborts)?;
    if !matches!(plan.ending, Ending::ClientAborts | Ending::ServiceAborts) {
        conn.close_writing()?;
    }
    Ok(all)
}

/// One side's reading: to the end, which must be where `to` is, or before it if the other side aborts.
fn hear(conn: &Conn, pattern: Pattern, from: u64, to: u64, other_aborts: bool) -> Result<End> {
    let (at, end) = conn.drink_to_end(pattern, from)?;
    ensure!(at <= to, "{at} bytes came of {to} sent");
    // What arrives before an abort is any prefix.
    ensure!(other_aborts || (at == to && end == End::Eof), "{at} of {to} bytes came, then {end:?}");
    Ok(end)
}

/// Says and hears at once. Of an abort, the kernel tells whichever of the two calls comes first, and only that one.
fn converse(
    rig: &Rig,
    other_aborts: bool,
    says: impl FnOnce() -> Result<bool> + Send,
    hears: impl FnOnce() -> Result<End>,
) -> Result<()> {
    let (said, heard) = thread::scope(|scope| {
        let says = scope.spawn(says);
        let heard = hears();
        (says.join().expect("the sending thread does not panic"), heard)
    });
    let (said_all, end) = (said?, heard?);
    let told = !said_all || end == End::Aborted || !rig.legs.tell_aborts();
    ensure!(!other_aborts || told, "an aborted stream ended with a clean EOF");
    Ok(())
}

fn client(rig: &Rig, plan: &Plan, conn: Conn) -> Result<()> {
    let service_aborts = plan.ending == Ending::ServiceAborts;
    conn.send(&plan.seed.to_le_bytes())?;
    // Known to the service before anything may abort.
    conn.recv_exact(&mut [0])?;
    let says = || say(&conn, plan.up_pattern(), HEADER, plan.up, plan, service_aborts);
    let hears = || hear(&conn, plan.down_pattern(), 0, plan.down, service_aborts);
    match plan.ending {
        Ending::RequestAfterAnswer => {
            hears()?;
            says().map(drop)
        }
        Ending::ClientAborts => {
            says()?;
            conn.abort()
        }
        _ => converse(rig, service_aborts, says, hears),
    }
}

fn service(rig: &Rig, conn: Conn) -> Result<()> {
    let mut seed = [0; 8];
    conn.recv_exact(&mut seed)?;
    let plan = Plan::new(u64::from_le_bytes(seed));
    conn.send(&[0])?;
    let client_aborts = plan.ending == Ending::ClientAborts;
    let says = || say(&conn, plan.down_pattern(), 0, plan.down, &plan, client_aborts);
    let hears = || hear(&conn, plan.up_pattern(), HEADER, plan.up, client_aborts);
    match plan.ending {
        Ending::AnswerAfterRequest => {
            hears()?;
            says().map(drop)
        }
        Ending::ServiceAborts => {
            says()?;
            conn.abort()
        }
        _ => converse(rig, client_aborts, says, hears),
    }
    .with_context(|| format!("service: {plan:?}"))
}

/// Connections of random sizes, pauses, half-closes and aborts, a dozen at once: no byte wrong, no hang, no false end.
pub fn mixed_torture(rig: &Rig) -> Result<()> {
    torture(rig, 0x0b50, CONNECTIONS)
}

/// The same with another seed and number of connections.
pub fn torture(rig: &Rig, seed: u64, connections: u64) -> Result<()> {
    thread::scope(|scope| {
        let services = scope.spawn(|| {
            thread::scope(|inner| {
                let all: Vec<_> = (0..connections)
                    .map(|_| rig.accept().map(|conn| inner.spawn(|| service(rig, conn))))
                    .collect::<Result<_>>()?;
                all.into_iter().try_for_each(|one| one.join().expect("a service does not panic"))
            })
        });
        let clients: Vec<_> = (0..AT_ONCE)
            .map(|lane| {
                scope.spawn(move || {
                    for index in (lane..connections).step_by(usize::try_from(AT_ONCE)?) {
                        let plan = Plan::new(Rng::new(seed + index).next());
                        let conn = rig.connect()?;
                        client(rig, &plan, conn).with_context(|| format!("client {index}: {plan:?}"))?;
                    }
                    Ok::<_, anyhow::Error>(())
                })
            })
            .collect();
        let clients: Vec<Result<()>> =
            clients.into_iter().map(|one| one.join().expect("a client does not panic")).collect();
        let services = services.join().expect("the service does not panic");
        clients.into_iter().collect::<Result<()>>()?;
        services
    })
}
