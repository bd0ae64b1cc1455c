//! What was sent before a reset arrives before it: over every relay, and over no relay at all, which says what is asked for.
//!
//! Only what the kernel has acknowledged to the sender counts: a reset throws away what the sender's own queue still holds.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::poll::PollFlags;

use crate::behaviours::{DOWN, MIB, STUCK, UP, both, buffers_bound};
use crate::pattern::Pattern;
use crate::peers::{Conn, End, PATIENCE, is_abort};
use crate::suite::Rig;

/// How a reader reads.
#[derive(Debug, Clone, Copy)]
enum Pace {
    /// As fast as it can.
    AtOnce,
    /// After so long.
    Late(Duration),
    /// 64 KiB every other millisecond, so some 30 MB/s at most.
    Slowly,
}

/// Reads to the end, at a pace: how much came, and how it ended.
fn read_all(reader: &Conn, pattern: Pattern, pace: Pace) -> Result<(u64, End)> {
    match pace {
        Pace::AtOnce => {}
        Pace::Late(after) => thread::sleep(after),
        Pace::Slowly => return read_slowly(reader, pattern),
    }
    reader.drink_to_end(pattern, 0)
}

fn read_slowly(reader: &Conn, pattern: Pattern) -> Result<(u64, End)> {
    let (mut buffer, mut at) = (vec![0; 64 * 1024], 0);
    loop {
        match reader.recv(&mut buffer) {
            Ok(0) => return Ok((at, End::Eof)),
            Ok(count) => {
                pattern.check(at, &buffer[..count])?;
                at += count as u64;
            }
            Err(error) if is_abort(&error) => return Ok((at, End::Aborted)),
            Err(error) => return Err(error).with_context(|| format!("after {at} bytes")),
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Checks that all has come, and after it an abort.
fn expect_all(rig: &Rig, (came, end): (u64, End), sent: u64) -> Result<()> {
    ensure!(came == sent, "{came} of {sent} bytes came before the reset ({end:?})");
    ensure!(end == End::Aborted || !rig.legs.tell_aborts(), "the reset has become a clean end");
    Ok(())
}

/// The service answers a request that it does not read to the end (413, a redirect, a failed log-in), and closes: its kernel
/// sends a reset. The client gets the whole answer.
pub fn early_answer_arrives_whole(rig: &Rig) -> Result<()> {
    for round in 0..40 {
        let (client, service) = rig.pair()?;
        let pace = if round % 4 == 3 { Pace::Slowly } else { Pace::Late(Duration::from_millis(round % 4)) };
        both(
            || {
                client.pour(UP, 0, 100_000)?;
                expect_all(rig, read_all(&client, DOWN, pace)?, MIB)
            },
            || answer_unread(service, MIB),
        )
        .with_context(|| format!("round {round}, {pace:?}"))?;
    }
    Ok(())
}

fn answer_unread(service: Conn, answer: u64) -> Result<()> {
    service.recv_exact(&mut [0; 10])?;
    service.pour(DOWN, 0, answer)?;
    service.wait_acknowledged()?;
    ensure!(!service.wait(PollFlags::POLLIN, PATIENCE)?.is_empty(), "the rest of the request never came");
    drop(service);
    Ok(())
}

/// A client that writes the whole of a large request before it reads anything gets such an answer, too.
pub fn early_answer_reaches_a_client_that_still_sends(rig: &Rig) -> Result<()> {
    if rig.forwarder().is_none() {
        // Without a forwarder nothing takes the rest of the request.
        return Ok(());
    }
    // As much as the queues between the two take: until it has reset, the service waits for its reader.
    let answer = if rig.legs.front.is_tcp() { 2 * MIB } else { 100_000 };
    for round in 0..5 {
        let (client, service) = rig.pair()?;
        both(
            || {
                match client.pour(UP, 0, 24 * MIB) {
                    // It has all of the answer by then, and was told of the reset.
                    Err(error) if error.downcast_ref().is_some_and(is_abort) => {}
                    sent => sent?,
                }
                let (came, _) = client.drink_to_end(DOWN, 0)?;
                ensure!(came == answer, "{came} bytes of {answer} came");
                Ok(())
            },
            || answer_unread(service, answer),
        )
        .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// The service sends 3 MiB, sees all of it acknowledged, and resets.
pub fn all_that_a_service_sent_before_its_reset_arrives(rig: &Rig) -> Result<()> {
    for (round, pace) in paces().enumerate() {
        let (client, service) = rig.pair()?;
        send_and_reset(rig, service, &client, DOWN, pace)
            .with_context(|| format!("round {round}, {pace:?}"))?;
    }
    Ok(())
}

/// The same of a client: an upload that is aborted.
pub fn all_that_a_client_sent_before_its_reset_arrives(rig: &Rig) -> Result<()> {
    for (round, pace) in paces().enumerate() {
        let (client, service) = rig.pair()?;
        send_and_reset(rig, client, &service, UP, pace)
            .with_context(|| format!("round {round}, {pace:?}"))?;
    }
    Ok(())
}

fn paces() -> impl Iterator<Item = Pace> {
    [Pace::AtOnce, Pace::Late(Duration::from_millis(30)), Pace::Slowly].into_iter().cycle().take(12)
}

fn send_and_reset(rig: &Rig, sender: Conn, reader: &Conn, pattern: Pattern, pace: Pace) -> Result<()> {
    let size = 3 * MIB;
    both(
        move || {
            sender.pour(pattern, 0, size)?;
            sender.wait_acknowledged()?;
            sender.abort()
        },
        || expect_all(rig, read_all(reader, pattern, pace)?, size),
    )?;
    Ok(())
}

/// A side that has finished sending and resets afterwards, with all of it still under way: the end comes in its place.
pub fn an_end_before_a_reset_is_an_end(rig: &Rig) -> Result<()> {
    for round in 0..6 {
        let (client, service) = rig.pair()?;
        let (sender, reader) = if round % 2 == 0 { (service, &client) } else { (client, &service) };
        let size = 3 * MIB;
        both(
            move || {
                sender.pour(DOWN, 0, size)?;
                sender.close_writing()?;
                sender.wait_acknowledged()?;
                sender.abort()
            },
            || {
                let (came, end) = read_all(reader, DOWN, Pace::Slowly)?;
                ensure!(came == size && end == End::Eof, "{came} of {size} bytes came, then {end:?}");
                Ok(())
            },
        )
        .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// Neither side reads until all queues are full both ways. Then one side resets: what it was told had arrived is read by the other.
pub fn a_reset_behind_full_queues(rig: &Rig) -> Result<()> {
    let bound = buffers_bound()?;
    for service_resets in [true, false] {
        let (client, service) = rig.pair()?;
        let (up, down) = both(
            || client.pour_until_stuck(UP, bound, STUCK),
            || service.pour_until_stuck(DOWN, bound, STUCK),
        )?;
        let (leaver, stayer, pattern, sent) =
            if service_resets { (service, client, DOWN, down) } else { (client, service, UP, up) };
        let acknowledged = sent - leaver.unacknowledged()?.min(sent);
        leaver.abort()?;
        let (came, end) = stayer.drink_to_end(pattern, 0)?;
        ensure!(
            (acknowledged..=sent).contains(&came),
            "{came} bytes came of {sent} sent, of which {acknowledged} were acknowledged"
        );
        ensure!(end == End::Aborted || !rig.legs.tell_aborts(), "a truncated stream has ended well");
    }
    Ok(())
}

/// The closing line of a reset says whose it was, and counts what was delivered before it.
pub fn closing_line_of_a_reset_counts_what_came_before(rig: &Rig) -> Result<()> {
    let Some(forwarder) = rig.forwarder() else { return Ok(()) };
    for (index, reason) in ["service-reset", "client-reset"].into_iter().enumerate() {
        let (client, service) = rig.pair()?;
        let (sender, reader) = if index == 0 { (service, client) } else { (client, service) };
        let by_reset = sender.family().is_tcp();
        send_and_reset(rig, sender, &reader, DOWN, Pace::Slowly)?;
        drop(reader);
        let closing = forwarder.closings(index + 1)?.remove(index);
        ensure!(closing.reason == reason || !by_reset, "{reason} expected: {closing:?}");
        let (there, back) = match index {
            0 => (closing.to_client, closing.to_service),
            _ => (closing.to_service, closing.to_client),
        };
        ensure!((there, back) == (3 * MIB, 0), "miscounted: {closing:?}");
    }
    Ok(())
}
