//! What the kernel relay's programs say of single sockets (aya-log): the expected lines where they are asked for, no line and no
//! instruction where they are not, and every byte exact either way.
//!
//! Needs: root, kernel BTF. Takes: seconds.

use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, ensure};
use bro_sockmap::{Config, Kernel};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Address, Conn, Family, Here, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::suite::{Lane, Legs, Rig};
use bro_tests::sys::{self, BpfObject};

const UP: Pattern = Pattern(0x7171);
const DOWN: Pattern = Pattern(0x8282);
/// What all lines of the programs have, and no other.
const MARK: &str = " netns ";

fn port(listener: &Listener) -> Result<String> {
    match listener.address() {
        Address::Tcp(address) => Ok(address.port().to_string()),
        other => anyhow::bail!("{other} has no port"),
    }
}

/// Requests and answers over a connection of its own, most of which take a lane.
fn exchange(client: &Conn, served: &Conn) -> Result<()> {
    for at in 0..20 {
        client.pour(UP, at * 100, (at + 1) * 100)?;
        served.drink(UP, at * 100, (at + 1) * 100)?;
        served.pour(DOWN, at * 500, (at + 1) * 500)?;
        client.drink(DOWN, at * 500, (at + 1) * 500)?;
    }
    Ok(())
}

fn started(filter: &str) -> Result<(Forwarder, Listener, Listener)> {
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (service, front) = (Listener::new(&Here, &loopback)?, Listener::new(&Here, &loopback)?);
    let setup = Setup::new().args(["--relay=sockmap", "--local-clients=on"]).env("BRO_LOG", filter);
    let forwarder = setup.socket(&front).arg(service.address().to_string()).start()?;
    let _programs = forwarder.kernel_relay()?;
    Ok((forwarder, service, front))
}

fn one_after_the_other(front: &Listener, service: &Listener, count: usize) -> Result<()> {
    for _ in 0..count {
        let client = Conn::new(&Here, front.address())?;
        let served = service.accept()?;
        exchange(&client, &served)?;
        // The service first, so that it is seen to let go at its half-close.
        served.close_writing()?;
        client.expect_eof()?;
    }
    Ok(())
}

#[test]
fn what_becomes_of_a_socket_is_in_the_log() -> Result<()> {
    bro_tests::require_bpf!();
    let (forwarder, service, front) = started("info,bro_ebpf=trace")?;
    let (at_service, at_front) = (format!(" port {} ", port(&service)?), format!(" peer {} ", port(&front)?));
    let says = |what: &str, at: &str| {
        let said = |line: &str| line.contains("TRACE") && line.contains(what) && line.contains(at);
        forwarder.log().line(PATIENCE, said).with_context(|| what.to_owned())
    };
    one_after_the_other(&front, &service, 1)?;
    says("seen, it has to prove itself", &at_service)?;
    says("proved to be a non-blocking one: ", &at_service)?;
    forwarder.closings(1)?;
    one_after_the_other(&front, &service, 2)?;
    forwarder.closings(3)?;
    says("hooked: ", &at_service)?;
    says("let go: ", &at_service)?;
    says("seen, it has to prove itself", &at_front)?;
    says("proved to be a non-blocking one: ", &at_front)?;
    says("hooked: ", &at_front)?;

    let address = service.address().clone();
    drop(service);
    let _again = Listener::new(&Here, &address)?;
    says("the service listens", &at_service)?;
    ensure!(forwarder.report()?.total.kernel > 1000, "no lane: {:?}", forwarder.report()?.total);
    let log = forwarder.stop()?;
    ensure!(log.complaints().is_empty(), "{:?}", log.complaints());
    Ok(())
}

#[test]
fn who_asks_for_every_step_gets_these_too_and_no_other_does() -> Result<()> {
    bro_tests::require_bpf!();
    for (option, wanted) in [(None, false), (Some("-v"), false), (Some("-vv"), true)] {
        let rig = Rig::with(Lane::BothLanes, Legs::TCP4, |setup| setup.args(option))?;
        let (client, served) = rig.pair()?;
        exchange(&client, &served)?;
        let forwarder = rig.forwarder().context("the lane has one")?;
        ensure!(process::eventually(PATIENCE, || forwarder
            .report()
            .is_ok_and(|report| report.total.kernel > 1000)));
        let hooked = |line: &str| line.contains("hooked: ") && line.contains(MARK);
        if wanted {
            forwarder.log().line(PATIENCE, hooked)?;
        }
        drop((client, served));
        forwarder.closing()?;
        ensure!(wanted || !forwarder.log().lines().iter().any(|line| line.contains(MARK)), "{option:?}");
        rig.finish()?;
    }
    Ok(())
}

/// The lines go through memory that is soon full: what does not fit is lost, and no connection waits for it.
#[test]
fn thousands_of_lines_stop_no_connection() -> Result<()> {
    bro_tests::require_bpf!();
    let rig = Rig::with(Lane::BothLanes, Legs::TCP4, |setup| setup.env("BRO_LOG", "info,bro_ebpf=trace"))?;
    for _ in 0..1000 {
        let (client, served) = rig.pair()?;
        client.pour(UP, 0, 10)?;
        served.drink(UP, 0, 10)?;
        served.pour(DOWN, 0, 10)?;
        client.drink(DOWN, 0, 10)?;
    }
    rig.finish()
}

/// The level is a constant of the programs, so that what is never said is not even asked about.
#[test]
fn programs_that_say_nothing_have_no_instruction_for_it() -> Result<()> {
    bro_tests::require_bpf!();
    let sizes = |trace: bool| -> Result<[usize; 3]> {
        let kernel =
            Kernel::load(&Config { connections: 4, hook_blocking: false, bear_fionread: true, trace })?;
        let mut sizes = [0; 3];
        for (size, id) in sizes.iter_mut().zip(kernel.program_ids()?) {
            *size = sys::bpf_program_size(sys::bpf_object(BpfObject::Program(id))?.as_fd())?;
        }
        Ok(sizes)
    };
    let ([send, watch, hook], [send_on, watch_on, hook_on]) = (sizes(false)?, sizes(true)?);
    ensure!(send > 0 && send == send_on, "bro_send has something to say: {send} and {send_on} bytes");
    // The function that writes a line is some 5,000 bytes of instructions. Without it there is no more left than where it would begin.
    let least = 4_000;
    ensure!(watch_on > watch + least, "bro_watch: {watch} bytes without, {watch_on} with");
    ensure!(hook_on > hook + least, "bro_hook: {hook} bytes without, {hook_on} with");
    ensure!(hook < 3_600, "bro_hook: {hook} bytes although it has nothing to say");
    Ok(())
}
