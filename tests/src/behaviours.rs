//! What any relay must do: each behaviour is a function over a [`Rig`], so that the same ones run over every relay.
//!
//! Client and service are both in the test's hands, so what one has sent and the other has seen can be compared exactly.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_relay::relay::pipes::KEPT;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};

use crate::pattern::{Pattern, Rng};
use crate::peers::{Conn, End, PATIENCE};
use crate::process;
use crate::suite::{INTRODUCED, Rig};

pub use crate::aborts::*;
pub use crate::torture::mixed_torture;

pub(crate) const MIB: u64 = 1 << 20;
/// What the client sends, and what the service sends: never alike.
pub(crate) const UP: Pattern = Pattern(0x1111);
pub(crate) const DOWN: Pattern = Pattern(0x2222);
/// A sender that could not send for so long is stopped: on loopback everything that will move has moved.
pub(crate) const STUCK: Duration = Duration::from_millis(400);

/// Runs both at once and reports the first failure.
pub(crate) fn both<A: Send, B>(
    one: impl FnOnce() -> Result<A> + Send,
    other: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        let one = one.join().expect("the other side's thread does not panic");
        Ok((one?, other?))
    })
}

/// Both send at once, both read at once, both half-close when done.
pub fn both_ends_at_once(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    let size = 4 * MIB;
    let side = |conn: &Conn, sends: Pattern, reads: Pattern| {
        both(
            || {
                conn.pour(sends, 0, size)?;
                Ok(conn.close_writing()?)
            },
            || {
                conn.drink(reads, 0, size)?;
                conn.expect_eof()
            },
        )
    };
    both(|| side(&client, UP, DOWN).context("client"), || side(&service, DOWN, UP).context("service"))?;
    Ok(())
}

/// The client says that its request is complete by closing its writing side; the answer still comes, all of it.
pub fn answer_after_the_clients_half_close(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    client.pour(UP, 0, 100_000)?;
    client.close_writing()?;
    service.drink(UP, 0, 100_000)?;
    service.expect_eof()?;
    let size = 3 * MIB;
    both(
        move || {
            service.pour(DOWN, 0, size)?;
            drop(service);
            Ok(())
        },
        || client.drink(DOWN, 0, size),
    )?;
    client.expect_eof()
}

/// The service sends its greeting and closes; the client gets it to the last byte and then learns that nothing reads there any more.
pub fn service_closes_first(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    let size = 2 * MIB;
    both(
        move || {
            service.pour(DOWN, 0, size)?;
            drop(service);
            Ok(())
        },
        || client.drink(DOWN, 0, size),
    )?;
    client.expect_eof()?;
    client.expect_sending_fails()
}

/// The service closes its writing side only; what the client sends afterwards still arrives.
pub fn service_half_closes_first_and_reads_on(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    service.send(b"hello")?;
    service.close_writing()?;
    let mut greeting = [0; 5];
    client.recv_exact(&mut greeting)?;
    client.expect_eof()?;
    let size = 2 * MIB;
    both(
        move || {
            client.pour(UP, 0, size)?;
            drop(client);
            Ok(())
        },
        || service.drink(UP, 0, size),
    )?;
    service.expect_eof()
}

/// A connection without a byte is a connection too: both ends see the other's end, in its order.
pub fn nothing_is_sent_at_all(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    client.close_writing()?;
    service.expect_eof()?;
    ensure!(client.stays_silent(Duration::from_millis(50))?, "one half-close has closed both directions");
    service.close_writing()?;
    client.expect_eof()?;
    let (client, service) = rig.pair()?;
    drop(client);
    service.expect_eof()
}

/// The client sends and closes for good before the service has read anything: the service gets everything.
pub fn client_closes_with_bytes_still_under_way(rig: &Rig) -> Result<()> {
    for round in 0..5 {
        let (client, service) = rig.pair()?;
        let size = 100_000 + round;
        client.pour(UP, 0, size)?;
        drop(client);
        service.drink(UP, 0, size)?;
        service.expect_eof()?;
    }
    Ok(())
}

/// The client goes away while the service sends without end: the service is told, and does not send for ever.
pub fn client_leaves_in_mid_download(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    both(
        move || {
            client.drink(DOWN, 0, MIB)?;
            drop(client);
            Ok(())
        },
        || {
            service.pour(DOWN, 0, MIB)?;
            service.expect_sending_fails()
        },
    )?;
    Ok(())
}

/// Expects what the other side's abort must look like to `conn`.
fn expect_abort(rig: &Rig, conn: &Conn) -> Result<()> {
    if rig.legs.tell_aborts() { conn.expect_abort() } else { conn.read_to_end().map(drop) }
}

/// A RST from the client reaches the service as a RST, at once and with nothing sent by the service.
pub fn client_abort_is_seen_as_an_abort(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    exchange(&client, &service)?;
    client.abort()?;
    expect_abort(rig, &service).context("service")
}

/// A RST from the service reaches the client as a RST.
pub fn service_abort_is_seen_as_an_abort(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    exchange(&client, &service)?;
    service.abort()?;
    expect_abort(rig, &client).context("client")
}

fn exchange(client: &Conn, service: &Conn) -> Result<()> {
    client.pour(UP, 0, 1000)?;
    service.drink(UP, 0, 1000)?;
    service.pour(DOWN, 0, 1000)?;
    client.drink(DOWN, 0, 1000)
}

/// How often what comes of a race is tried.
const RACES: u64 = 40;

/// A client that has half-closed and then aborts: a service that is still working on its answer is told.
pub fn client_abort_after_its_half_close(rig: &Rig) -> Result<()> {
    for round in 0..RACES {
        let (client, service) = rig.pair()?;
        // Some that a lane takes wherever it is open, and some that it does not take everywhere.
        let size = if round % 2 == 0 { 400 } else { 1000 };
        half_close_then_abort(client, &service, size).with_context(|| format!("service, round {round}"))?;
    }
    Ok(())
}

/// The same when the half-close is the first thing the relay sees of the client.
pub fn client_abort_after_a_half_close_that_came_first(rig: &Rig) -> Result<()> {
    let signal = |signal| rig.forwarder().map_or(Ok(()), |forwarder| forwarder.signal(signal));
    for _ in 0..3 {
        signal(Signal::SIGSTOP)?;
        let client = rig.connect()?;
        client.close_writing()?;
        signal(Signal::SIGCONT)?;
        let service = rig.accept()?;
        service.expect_eof()?;
        client.abort()?;
        expect_told(&service, rig.legs.tell_aborts()).context("service")?;
    }
    Ok(())
}

/// The same, the other way round.
pub fn service_abort_after_its_half_close(rig: &Rig) -> Result<()> {
    for round in 0..RACES {
        let (client, service) = rig.pair()?;
        half_close_then_abort(service, &client, 1000).with_context(|| format!("client, round {round}"))?;
    }
    Ok(())
}

fn half_close_then_abort(leaver: Conn, stayer: &Conn, size: u64) -> Result<()> {
    let by_reset = leaver.family().is_tcp();
    leaver.pour(UP, 0, size)?;
    leaver.close_writing()?;
    stayer.drink(UP, 0, size)?;
    stayer.expect_eof()?;
    leaver.abort()?;
    expect_told(stayer, by_reset)
}

fn expect_told(stayer: &Conn, by_reset: bool) -> Result<()> {
    if !by_reset {
        // Over unix nothing but the failing of the next bytes tells.
        return stayer.expect_sending_fails();
    }
    // Without sending: the side that stays is waiting, for a database say, and must be told nevertheless.
    let told = stayer.wait(PollFlags::POLLPRI, PATIENCE)?;
    ensure!(told.intersects(PollFlags::POLLHUP | PollFlags::POLLERR), "never told of the abort: {told:?}");
    Ok(())
}

/// The most that all buffers between a sender and a reader who does not read may take.
pub(crate) fn buffers_bound() -> Result<u64> {
    let most = |name: &str| -> Result<u64> {
        let values = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"))?;
        Ok(values.split_whitespace().last().context("three values")?.parse()?)
    };
    // Two legs, each with a send and a receive buffer, and the relay's own (a pipe holds at most 1 MiB).
    Ok(2 * (most("tcp_rmem")? + most("tcp_wmem")?) + 4 * MIB)
}

/// The client aborts while its bytes are stuck on their way: the service gets a prefix, and never a clean end.
pub fn client_abort_under_back_pressure(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    abort_while_stuck(rig, client, &service, UP).context("service")
}

/// The service aborts while its bytes are stuck on their way.
pub fn service_abort_under_back_pressure(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    abort_while_stuck(rig, service, &client, DOWN).context("client")
}

fn abort_while_stuck(rig: &Rig, sender: Conn, reader: &Conn, pattern: Pattern) -> Result<()> {
    let sent = sender.pour_until_stuck(pattern, buffers_bound()?, STUCK)?;
    sender.abort()?;
    let (came, end) = reader.drink_to_end(pattern, 0)?;
    ensure!(came <= sent, "{came} bytes came of {sent} sent");
    if rig.legs.tell_aborts() {
        ensure!(end == End::Aborted, "a truncated stream ({came} of {sent} bytes) ended with a clean EOF");
    }
    Ok(())
}

/// The service sends to a client that does not read: the sender is stopped, memory stays bounded, then everything arrives.
pub fn client_that_never_reads_then_reads_everything(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    never_read_then_read(rig, &service, &client, DOWN)
}

/// The client sends to a service that does not read.
pub fn service_that_never_reads_then_reads_everything(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    never_read_then_read(rig, &client, &service, UP)
}

fn never_read_then_read(rig: &Rig, sender: &Conn, reader: &Conn, pattern: Pattern) -> Result<()> {
    let before = memory(rig)?;
    let stuck_at = sender.pour_until_stuck(pattern, buffers_bound()?, STUCK)?;
    expect_calm(rig, before)?;
    // A second connection is not held up by the first.
    let (other_client, other_service) = rig.pair()?;
    exchange(&other_client, &other_service).context("a second connection beside the stuck one")?;

    let rest = stuck_at + 2 * MIB;
    both(
        || {
            sender.pour(pattern, stuck_at, rest)?;
            Ok(sender.close_writing()?)
        },
        || {
            reader.drink(pattern, 0, rest)?;
            reader.expect_eof()
        },
    )?;
    Ok(())
}

/// Both send until both are stuck; then both read everything.
pub fn no_side_reads_in_either_direction(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    let before = memory(rig)?;
    let bound = buffers_bound()?;
    let (up, down) =
        both(|| client.pour_until_stuck(UP, bound, STUCK), || service.pour_until_stuck(DOWN, bound, STUCK))?;
    expect_calm(rig, before)?;
    let side = |conn: &Conn, sends: Pattern, from: u64, reads: Pattern, expects: u64| {
        both(
            || {
                conn.pour(sends, from, from + MIB)?;
                Ok(conn.close_writing()?)
            },
            || {
                conn.drink(reads, 0, expects + MIB)?;
                conn.expect_eof()
            },
        )
    };
    both(
        || side(&client, UP, up, DOWN, down).context("client"),
        || side(&service, DOWN, down, UP, up).context("service"),
    )?;
    Ok(())
}

fn memory(rig: &Rig) -> Result<u64> {
    rig.forwarder().map_or(Ok(0), |forwarder| forwarder.memory_kib())
}

/// While a connection is stuck the forwarder neither works nor grows.
fn expect_calm(rig: &Rig, before_kib: u64) -> Result<()> {
    let Some(forwarder) = rig.forwarder() else { return Ok(()) };
    let grown = forwarder.memory_kib()?.saturating_sub(before_kib);
    ensure!(grown < 4096, "one stuck connection has cost {grown} KiB of the forwarder's memory");
    forwarder.expect_no_spin(Duration::from_millis(400))
}

/// Thousands of 1-byte sends in each direction, in the order sent.
pub fn one_byte_at_a_time(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    let size = 4000;
    let side = |conn: &Conn, sends: Pattern, reads: Pattern| {
        both(
            || {
                conn.pour_chunks(sends, 0, size, || 1)?;
                Ok(conn.close_writing()?)
            },
            || {
                conn.drink(reads, 0, size)?;
                conn.expect_eof()
            },
        )
    };
    both(|| side(&client, UP, DOWN).context("client"), || side(&service, DOWN, UP).context("service"))?;

    let (client, service) = rig.pair()?;
    for at in 0..1000 {
        client.pour(UP, at, at + 1)?;
        service.drink(UP, at, at + 1)?;
        service.pour(DOWN, at, at + 1)?;
        client.drink(DOWN, at, at + 1)?;
    }
    Ok(())
}

/// A request in two small writes is answered at once, each time: no leg waits for an acknowledgement (TCP_NODELAY).
pub fn small_writes_are_not_delayed(rig: &Rig) -> Result<()> {
    if let Some(forwarder) = rig.forwarder() {
        let (client, service) = rig.pair()?;
        exchange(&client, &service)?;
        let mut legs = 0;
        for socket in process::sockets(forwarder.relay())? {
            let connected = crate::peers::Address::of_peer(std::os::fd::AsFd::as_fd(&socket));
            if connected.is_ok_and(|peer| peer.family().is_tcp()) {
                use nix::sys::socket::getsockopt;
                ensure!(getsockopt(&socket, sockopt::TcpNoDelay)?, "a leg without TCP_NODELAY");
                ensure!(getsockopt(&socket, sockopt::KeepAlive)?, "a leg without keepalive");
                legs += 1;
            }
        }
        let tcp_legs = usize::from(rig.legs.front.is_tcp()) + usize::from(rig.legs.back.is_tcp());
        ensure!(legs >= tcp_legs, "only {legs} of {tcp_legs} TCP legs found");
    }
    let (client, service) = rig.pair()?;
    let begin = Instant::now();
    let rounds = 100;
    for at in (0..rounds * 10).step_by(10) {
        client.pour(UP, at, at + 4)?;
        client.pour(UP, at + 4, at + 10)?;
        service.drink(UP, at, at + 10)?;
        service.pour(DOWN, at, at + 4)?;
        service.pour(DOWN, at + 4, at + 10)?;
        client.drink(DOWN, at, at + 10)?;
    }
    // A delayed acknowledgement takes 40 ms; a hundred rounds without one take some ten.
    ensure!(begin.elapsed() < Duration::from_millis(2000), "{rounds} rounds took {:?}", begin.elapsed());
    Ok(())
}

/// Twelve megabytes each way at once, in pieces of any size, with pauses on all sides.
pub fn megabytes_with_pauses(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    let size = 12 * MIB;
    let send = |conn: &Conn, pattern: Pattern| -> Result<()> {
        let mut rng = Rng::new(pattern.0);
        let chunk = || {
            if rng.once_in(16) {
                thread::sleep(Duration::from_micros(rng.within(0, 4000)));
            }
            // Mostly pieces around the sizes of segments and pipes, now and then a tiny one.
            let most = if rng.once_in(4) { 100 } else { 200_000 };
            usize::try_from(rng.within(1, most)).expect("fits")
        };
        conn.pour_chunks(pattern, 0, size, chunk)?;
        Ok(conn.close_writing()?)
    };
    let read = |conn: &Conn, pattern: Pattern| -> Result<()> {
        let mut rng = Rng::new(!pattern.0);
        let mut at = 0;
        while at < size {
            if rng.once_in(24) {
                thread::sleep(Duration::from_micros(rng.within(0, 3000)));
            }
            let next = (at + rng.within(1, 150_000)).min(size);
            conn.drink(pattern, at, next)?;
            at = next;
        }
        conn.expect_eof()
    };
    both(
        || both(|| send(&client, UP), || read(&client, DOWN)).context("client"),
        || both(|| send(&service, DOWN), || read(&service, UP)).context("service"),
    )?;
    Ok(())
}

/// An urgent byte is an ordinary byte in its place: it is neither lost nor does it stop or spin the relay.
pub fn urgent_byte_arrives_in_its_place(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    for (sender, reader) in [(&client, &service), (&service, &client)] {
        // For the last hop where there is no relay; a relay's own last hop carries no urgent mark.
        setsockopt(reader, sockopt::OobInline, &true)?;
        sender.send(b"abc")?;
        sender.send_urgent(b'!')?;
        sender.send(b"def")?;
        let mut came = [0; 7];
        reader.recv_exact(&mut came)?;
        ensure!(&came == b"abc!def", "came: {:?}", String::from_utf8_lossy(&came));
        // As the last byte for a while, which is how telnet and rlogin send it.
        sender.send_urgent(b'?')?;
        let mut came = [0];
        reader.recv_exact(&mut came)?;
        ensure!(came == *b"?", "came: {came:?}");
        if let Some(forwarder) = rig.forwarder() {
            forwarder.expect_no_spin(Duration::from_millis(300))?;
        }
    }
    exchange(&client, &service)?;
    // As the very last byte, with the end of the stream behind it: both are there before the relay looks again.
    let (client, service) = rig.pair()?;
    setsockopt(&service, sockopt::OobInline, &true)?;
    exchange(&client, &service)?;
    rig.forwarder().map_or(Ok(()), |forwarder| forwarder.signal(Signal::SIGSTOP))?;
    client.send(b"abc")?;
    client.send_urgent(b'!')?;
    client.close_writing()?;
    rig.forwarder().map_or(Ok(()), |forwarder| forwarder.signal(Signal::SIGCONT))?;
    let (came, end) = service.read_to_end()?;
    ensure!(came == b"abc!" && end == End::Eof, "came: {:?}, {end:?}", String::from_utf8_lossy(&came));
    Ok(())
}

/// Urgent bytes now and then within a stream of megabytes change nothing about the stream.
pub fn urgent_byte_in_mid_stream(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    for (sender, reader) in [(&client, &service), (&service, &client)] {
        setsockopt(reader, sockopt::OobInline, &true)?;
        let (pieces, piece) = (40, 50_000);
        both(
            || {
                for index in 0..pieces {
                    let from = index * (piece + 1);
                    sender.pour(UP, from, from + piece)?;
                    let mut byte = [0];
                    UP.fill(from + piece, &mut byte);
                    send_urgent_when_it_fits(sender, byte[0])?;
                }
                Ok(sender.close_writing()?)
            },
            || {
                reader.drink(UP, 0, pieces * (piece + 1))?;
                reader.expect_eof()
            },
        )?;
    }
    Ok(())
}

fn send_urgent_when_it_fits(sender: &Conn, byte: u8) -> Result<()> {
    ensure!(!sender.wait(PollFlags::POLLOUT, PATIENCE)?.is_empty(), "no room for the urgent byte");
    sender.send_urgent(byte)
}

/// The service's and the client's ends of `count` connections, each of which has carried bytes.
fn many(rig: &Rig, count: usize) -> Result<Vec<(Conn, Conn)>> {
    (0..count)
        .map(|_| {
            let pair = rig.pair()?;
            exchange(&pair.0, &pair.1)?;
            Ok(pair)
        })
        .collect()
}

/// Connections that rest hold no pipe and next to no memory, and still work.
pub fn idle_connections_cost_little(rig: &Rig) -> Result<()> {
    const COUNT: usize = 200;
    // The first ones bring the allocator and the pipe pool to their working size.
    let warm = many(rig, 20)?;
    let Some(forwarder) = rig.forwarder() else { return Ok(()) };
    let before = forwarder.memory_kib()?;
    let resting = many(rig, COUNT)?;
    let grown = forwarder.memory_kib()?.saturating_sub(before);
    ensure!(grown <= 4 * COUNT as u64, "{COUNT} idle connections cost {grown} KiB");
    let pipes = process::pipe_ends(forwarder.relay())?;
    ensure!(pipes < COUNT / 2, "{pipes} pipe ends are held while {COUNT} connections rest");
    for (client, service) in warm.iter().chain(&resting) {
        client.send(b"still there?")?;
        service.recv_exact(&mut [0; 12])?;
    }
    Ok(())
}

/// Connections that come and go in every way leave no descriptor behind.
pub fn descriptors_return_to_the_start(rig: &Rig) -> Result<()> {
    let Some(forwarder) = rig.forwarder() else {
        // Without a forwarder there is none that could leave one.
        return Ok(());
    };
    drop(many(rig, 30)?);
    forwarder.closings(30)?;
    // The pool keeps a few empty pipes, as many as were wanted at the same time so far: these are not of any connection.
    let start = forwarder.descriptors_and_pipes()?.0;
    let rested =
        || forwarder.descriptors_and_pipes().is_ok_and(|(others, pipes)| others <= start && pipes <= KEPT);
    for round in 0..300 {
        let (client, service) = rig.pair()?;
        match round % 5 {
            0 => exchange(&client, &service)?,
            1 => client.abort()?,
            2 => service.abort()?,
            3 => client.pour(UP, 0, 70_000)?,
            _ => client.close_writing()?,
        }
    }
    ensure!(
        process::eventually(PATIENCE, rested),
        "{start} descriptors and up to {KEPT} pipes before; now {:?}",
        forwarder.descriptors_and_pipes()?
    );
    Ok(())
}

/// The closing line says how many bytes went each way, between whom, and how it ended.
pub fn closing_line_counts_every_byte(rig: &Rig) -> Result<()> {
    let (client, service) = rig.pair()?;
    let address = client.address();
    both(
        || {
            client.pour(UP, 0, 123_456)?;
            client.close_writing()?;
            client.drink(DOWN, 0, 654_321)?;
            client.expect_eof()
        },
        || {
            service.drink(UP, 0, 123_456)?;
            service.expect_eof()?;
            service.pour(DOWN, 0, 654_321)?;
            Ok(service.close_writing()?)
        },
    )?;
    drop((client, service));
    let Some(forwarder) = rig.forwarder() else { return Ok(()) };
    let closing = forwarder.closing()?;
    ensure!((closing.to_service, closing.to_client) == (123_456, 654_321), "miscounted: {closing:?}");
    ensure!(closing.reason == "eof", "not an ordinary end: {closing:?}");
    ensure!(closing.target == rig.service().address().to_string(), "another target: {closing:?}");
    if rig.legs.front.is_tcp() {
        let peer = if rig.is_introduced() { INTRODUCED.into() } else { address?.to_string() };
        ensure!(closing.peer == peer, "another peer: {closing:?}");
    }
    ensure!(closing.duration_ms < 20_000, "an impossible duration: {closing:?}");
    ensure!(closing.cold_start_ms.is_some() || rig.is_warm(), "the first connection woke the service");
    // Aborts are told apart by who aborted.
    for (index, reason) in [(1, "client-reset"), (2, "service-reset")] {
        let (client, service) = rig.pair()?;
        exchange(&client, &service)?;
        let (leaver, stayer) = if index == 1 { (client, service) } else { (service, client) };
        leaver.abort()?;
        stayer.read_to_end().map(drop).or_else(ignore_abort)?;
        drop(stayer);
        let closing = forwarder.closings(index + 1)?.remove(index);
        let leaves_over_tcp = if index == 1 { rig.legs.front } else { rig.legs.back }.is_tcp();
        ensure!(closing.reason == reason || !leaves_over_tcp, "{reason} expected: {closing:?}");
        ensure!((closing.to_service, closing.to_client) == (1000, 1000), "miscounted: {closing:?}");
    }
    Ok(())
}

fn ignore_abort(error: anyhow::Error) -> Result<()> {
    match error.downcast_ref::<io::Error>() {
        Some(cause) if crate::peers::is_abort(cause) => Ok(()),
        _ => Err(error),
    }
}
