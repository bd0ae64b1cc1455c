//! What goes wrong around the kernel relay: killed forwarders, services and clients, namespaces that go and come, users who
//! may not have it, services that must not be hooked, and readers who do not read.
//!
//! Needs: root, kernel BTF, python3. Takes: seconds.

mod blocking;
mod bytes;
mod killed;
mod namespaces;
mod users;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_ebpf::{kind, role};
use bro_tests::bro;
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::{Namespace, Pinned};
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Address, Conn, End, Family, Here, Listener, PATIENCE};
use bro_tests::process::{self, NOBODY};
use bro_tests::programs::Programs;
use bro_tests::scene::{expect_relayed, talk_until};
use bro_tests::scratch::Scratch;
use bro_tests::short;
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::tier::{Need, met};
use nix::sys::signal::Signal;

const UP: Pattern = Pattern(0x5151);
const DOWN: Pattern = Pattern(0x6262);
const MIB: u64 = 1 << 20;
/// More than all buffers between two ends on loopback hold.
const BOUND: u64 = 128 * MIB;
const STUCK: Duration = Duration::from_millis(400);

fn rig() -> Result<Rig> {
    Rig::new(Lane::BothLanes, Legs::TCP4)
}

fn forwarder(rig: &Rig) -> Result<&Forwarder> {
    rig.forwarder().context("the lane has one")
}

fn programs(rig: &Rig) -> Result<Programs> {
    Programs::of(forwarder(rig)?.pid())
}

fn kernel_bytes(forwarder: &Forwarder) -> Result<u64> {
    Ok(forwarder.report()?.total.kernel)
}

/// A connection both ends of which are hooked.
fn talking(rig: &Rig) -> Result<(Conn, Conn)> {
    let programs = programs(rig)?;
    let (client, service) = rig.pair()?;
    talk_until(&client, &service, || programs.hooked().is_ok_and(|now| now == 2))?;
    Ok((client, service))
}

/// A connection through whose lane the service's bytes have begun to go, with more stuck on their way: how many were sent.
fn in_mid_stream(rig: &Rig) -> Result<(Conn, Conn, u64)> {
    let (client, service) = talking(rig)?;
    service.pour(UP, 0, 20_000)?;
    client.drink(UP, 0, 20_000)?;
    let sent = service.pour_until_stuck(DOWN, BOUND, STUCK)?;
    Ok((client, service, sent))
}

/// The client got a prefix of what was sent, in order, and then an end of some kind.
fn expect_cut(client: &Conn, sent: u64) -> Result<End> {
    let (came, end) = client.drink_to_end(DOWN, 0)?;
    ensure!(came <= sent, "{came} bytes came of {sent} sent");
    Ok(end)
}

/// One connection after the other until one was hooked: the first shows what the service is.
fn warm(forwarder: &Forwarder, front: &Listener, service: &Listener, count: usize) -> Result<()> {
    for nth in 1..=count {
        let client = Conn::new(&Here, front.address())?;
        let served = service.accept()?;
        expect_relayed(&client, &served)?;
        drop((client, served));
        forwarder.closings(nth)?;
    }
    Ok(())
}
