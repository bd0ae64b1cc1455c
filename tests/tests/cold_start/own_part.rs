//! bro's own part of an adopted service's cold start, as `cargo xtask bench` has it ("the forwarder's own"): from the service's listen(2) to the client's
//! answer. Beside it what bro computes before it gives the order, in which the container's start has not begun. With Podman's own socket
//! activation nothing would be done in either.

use super::*;

use std::io::Read as _;
use std::net::{TcpListener, TcpStream};

use bro_tests::adopt::{Adoption, Profile};
use bro_tests::adopt_reports::{eventually, is_adopted};
use bro_tests::bro;
use bro_tests::process::monotonic;

use super::manager::Manager;

/// Where the service listens, in its namespace.
const INSIDE: &str = "127.0.0.1:8080";

/// The least of so many is what bro takes: what others do on the machine at the same time is no part of it.
const TRIES: usize = 10;

/// From listen(2) to the answer.
const OWN_PART: Duration = Duration::from_millis(2);

/// Before the order, in the thread that gives it: mostly to be executed, and page faults. Seen: 4 ms; a page fault of a virtual machine may take several
/// times as long, and other suites run beside this one.
const COMPUTED: Duration = Duration::from_millis(12);

/// A debug build computes longer.
const DEBUG: u32 = 5;

/// How long it took.
#[derive(Debug, Clone, Copy)]
struct OwnPart {
    /// From execve(2) to systemd's hearing of the order, by the clock: with what the bus and its other side take for the questions before it.
    until_ordered: Duration,
    /// Of that, by the processor, in the thread that gives the order.
    computed: Duration,
    /// From just before the service's listen(2) to the client's answer: with the service's own accept(2) and write(2).
    until_answered: Duration,
}

impl OwnPart {
    /// The least of each, since they have nothing to do with each other.
    fn least(self, other: Self) -> Self {
        Self {
            until_ordered: self.until_ordered.min(other.until_ordered),
            computed: self.computed.min(other.computed),
            until_answered: self.until_answered.min(other.until_answered),
        }
    }

    /// systemd starts the forwarder for a client that waits, the forwarder has it start the service, and that gets the client.
    fn measured() -> Result<Self> {
        let (manager, namespace) = (Manager::new()?, Namespace::new()?);
        let host = TcpListener::bind("127.0.0.1:0")?;
        let adoption = Adoption::new(vec![(host.try_clone()?.into(), INSIDE.into())])?;
        let mut client = TcpStream::connect(host.local_addr()?)?;
        client.set_read_timeout(Some(PATIENCE))?;
        let answered = std::thread::spawn(move || -> Result<Duration> {
            ensure!(client.read(&mut [0; 64])? > 0, "the client got no answer");
            monotonic()
        });
        let clock = adoption.scratch.join("clock");
        let setup = manager.known_to(adoption.forwarder(&namespace)?);
        let forwarder = setup.launch(format!("clock={}", clock.display())).start()?;
        let order = manager.order()?;
        let before = std::fs::read_to_string(&clock)?;
        let (executed, computed) = before.split_once(' ').context("two numbers")?;
        let service = adoption.service_in(&namespace, Profile::Notifies, &["timed", INSIDE])?;
        let listens = service.says("listens ")?;
        let answered = answered.join().expect("the client does not panic")?;
        eventually(&forwarder, is_adopted)?;
        ensure!(forwarder.report()?.total.accepted == 0, "the client was relayed");
        forwarder.stop()?;
        let nanoseconds = |text: &str| Ok::<_, anyhow::Error>(Duration::from_nanos(text.parse()?));
        Ok(Self {
            until_ordered: order.at.saturating_sub(nanoseconds(executed)?),
            computed: order.computed.saturating_sub(nanoseconds(computed)?),
            until_answered: answered.saturating_sub(nanoseconds(listens.trim_start_matches("listens "))?),
        })
    }
}

#[test]
fn bros_own_part_is_small() -> Result<()> {
    require_namespaces!();
    if !bro_tests::tier::met("bros_own_part_is_small", &[Manager::NEED]) {
        return Ok(());
    }
    let mut all = OwnPart::measured()?;
    for _ in 1..TRIES {
        all = all.least(OwnPart::measured()?);
    }
    let OwnPart { until_ordered, computed, until_answered } = all;
    println!(
        "the least of {TRIES}: {until_ordered:?} until the order, of which bro computed {computed:?}; {until_answered:?} from listen(2) to the answer"
    );
    let slower = if bro::is_packaged() { 1 } else { DEBUG };
    ensure!(
        until_answered <= OWN_PART * slower,
        "{until_answered:?} of bro's own, at most {OWN_PART:?}: {all:?}"
    );
    ensure!(computed <= COMPUTED * slower, "{computed:?} before the order, at most {COMPUTED:?}: {all:?}");
    Ok(())
}
