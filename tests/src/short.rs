//! Very many short connections over both lanes, and what they must leave behind: nothing.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bro_ebpf::Counter;

use crate::forwarder::{Forwarder, Setup};
use crate::netns::Namespace;
use crate::peers::{Conn, End, Family, Here, Listener, PATIENCE};
use crate::programs::Programs;
use crate::sys::BpfObject;
use crate::{bro, process};

/// Clients at once.
const CLIENTS: usize = 4;
/// The forwarder's log is kept in memory and says a line a connection: it is forgotten each time after so many.
const FORGET: usize = 4_000;

/// A service in a process of its own, with sockets that the programs may hook.
struct Echo(Child);

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// What there is before and after.
#[derive(Debug, Clone, Copy)]
struct Held {
    descriptors: usize,
    memory_kib: u64,
    /// Sockets of the service (its listener is one).
    served: usize,
    programs: usize,
    links: usize,
    maps: usize,
}

impl Held {
    fn by(forwarder: &Forwarder, service: i32) -> Result<Self> {
        // Looked up anew each time.
        let programs = Programs::of(forwarder.pid())?;
        Ok(Self {
            descriptors: forwarder.descriptors()?,
            memory_kib: forwarder.memory_kib()?,
            served: process::sockets(service)?.len(),
            programs: programs.count(|object| matches!(object, BpfObject::Program(_))),
            links: programs.count(|object| matches!(object, BpfObject::Link(_))),
            maps: programs.count(|object| matches!(object, BpfObject::Map(_))),
        })
    }
}

/// `count` connections that end in every way, some after enough messages to be hooked at both ends; then nothing is left of
/// them in the maps, the forwarder, or the service.
pub fn leave_nothing(count: usize) -> Result<()> {
    let namespace = Namespace::new()?;
    let loopback = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, service) = (Listener::new(&Here, &loopback)?, Listener::new(&namespace, &loopback)?);
    let stdin = std::os::fd::AsFd::as_fd(&service).try_clone_to_owned()?;
    let echo = Command::new(bro::helper()).args(["echo", "nonblocking"]).stdin(Stdio::from(stdin)).spawn()?;
    let echo = Echo(echo);
    let setup = Setup::new().netns(&namespace).socket(&front);
    let setup = setup.args(["--relay=sockmap", "--local-clients=on", "--connections-max=64"]);
    let forwarder = setup.arg(service.address().to_string()).start()?;
    let programs = forwarder.kernel_relay()?;
    for nth in 0..40 {
        one(&front, nth)?;
    }
    at_rest(&forwarder, &programs)?;
    let service_pid = echo.0.id().cast_signed();
    let before = Held::by(&forwarder, service_pid)?;

    let (begin, next) = (Instant::now(), AtomicUsize::new(0));
    let client = || -> Result<()> {
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            if nth >= count {
                return Ok(());
            }
            one(&front, nth).with_context(|| format!("connection {nth}"))?;
            if nth.is_multiple_of(FORGET) {
                forwarder.log().forget();
            }
        }
    };
    thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_for_each(|client| client.join().expect("a client does not panic"))
    })?;
    let took = begin.elapsed();

    at_rest(&forwarder, &programs)?;
    let settled = || {
        Held::by(&forwarder, service_pid)
            .is_ok_and(|now| now.descriptors <= before.descriptors && now.served <= before.served)
    };
    ensure!(
        process::eventually(PATIENCE, settled),
        "{before:?} before, {:?} after",
        Held::by(&forwarder, service_pid)
    );
    let after = Held::by(&forwarder, service_pid)?;
    let total = forwarder.report()?.total;
    let counted = |counter| programs.total(counter);
    let (hooked, refused, unhooked) =
        (counted(Counter::Hooked)?, counted(Counter::HookRefused)?, counted(Counter::Unhooked)?);
    println!(
        "{count} connections in {:.1} s ({:.0} a second): {hooked} sockets hooked, {unhooked} let go, {refused} refused; \
         {total:?}; {before:?} before, {after:?} after; in the maps: {:?}",
        took.as_secs_f64(),
        count as f64 / took.as_secs_f64(),
        programs.in_use()?
    );
    ensure!(hooked > 0 && total.kernel > 0, "the lanes were not used");
    ensure!(refused == 0, "{refused} sockets were refused by the map: it is full of others");
    let same = (before.programs, before.links, before.maps) == (after.programs, after.links, after.maps);
    ensure!(same, "{before:?} before, {after:?} after");
    ensure!(after.memory_kib < before.memory_kib + 4096, "{before:?} before, {after:?} after");
    forwarder.stop()?;
    programs.expect_gone()
}

/// No connection is open, no socket in a map, no route.
fn at_rest(forwarder: &Forwarder, programs: &Programs) -> Result<()> {
    let none = || forwarder.report().is_ok_and(|report| report.total.open == 0);
    ensure!(process::eventually(PATIENCE, none), "open still: {:?}", forwarder.report()?.total);
    programs.expect_nothing_in_use()
}

/// One connection, of the kind that its number says.
fn one(front: &Listener, nth: usize) -> Result<()> {
    let client = Conn::new(&Here, front.address())?;
    let messages = if nth.is_multiple_of(4) { 5 } else { 1 };
    let mut echoed = [0; 16];
    for message in 0..messages {
        let text = format!("{nth:10}{message:6}");
        client.send(text.as_bytes())?;
        client.recv_exact(&mut echoed)?;
        ensure!(echoed == text.as_bytes(), "another answer came: {echoed:?}");
    }
    match nth % 5 {
        0 | 1 => drop(client),
        2 | 3 => {
            client.close_writing()?;
            let (rest, end) = client.read_to_end()?;
            ensure!(rest.is_empty() && end == End::Eof, "{rest:?}, {end:?}");
        }
        _ => client.abort()?,
    }
    Ok(())
}
