//! A user whose pipe quota is used up. A file of its own: the quota is the user's, so no other test may run meanwhile.
//!
//! Needs: a network namespace. Takes: seconds.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use bro_tests::bro;
use bro_tests::forwarder::Setup;
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Family, Here, Listener};
use bro_tests::process::NOBODY;
use bro_tests::scratch::Scratch;

/// A process that holds so many pipes that its user gets only crippled ones.
struct Eater(Child);

impl Eater {
    fn start(scratch: &Scratch) -> Result<Self> {
        let copy = bro::copy(&bro::helper(), scratch.path())?;
        let mut command = Command::new(&copy);
        if nix::unistd::geteuid().is_root() {
            command.arg("launch").arg(format!("uid={NOBODY}")).arg("--").arg(&copy);
        }
        let mut child = command.arg("eat-pipes").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let said = child.stdout.take().context("stdout is piped")?;
        let eater = Self(child);
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        let pipes: u32 = line.trim().parse().context("the helper that eats pipes has failed")?;
        ensure!(pipes > 1, "there was no quota left to begin with");
        Ok(eater)
    }
}

impl Drop for Eater {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn relays_by_copying(relay: &str) -> Result<()> {
    let scratch = Scratch::new()?;
    let address = Family::Tcp4.loopback().context("TCP has one")?;
    let (front, service) = (Listener::new(&Here, &address)?, Listener::new(&Here, &address)?);
    let mut setup =
        Setup::new().socket(&front).arg(format!("--relay={relay}")).arg(service.address().to_string());
    if nix::unistd::geteuid().is_root() {
        setup = setup.user(NOBODY);
    }
    let eater = Eater::start(&scratch)?;
    let forwarder = setup.start()?;
    let size = 3 << 20;
    for _ in 0..4 {
        let client = bro_tests::peers::Conn::new(&Here, front.address())?;
        let served = service.accept()?;
        std::thread::scope(|scope| {
            let sends = [(&client, Pattern(1)), (&served, Pattern(2))].map(|(conn, pattern)| {
                scope.spawn(move || {
                    conn.pour(pattern, 0, size)?;
                    Ok::<_, anyhow::Error>(conn.close_writing()?)
                })
            });
            let reads = [(&served, Pattern(1)), (&client, Pattern(2))].map(|(conn, pattern)| {
                scope.spawn(move || {
                    conn.drink(pattern, 0, size)?;
                    conn.expect_eof()
                })
            });
            sends.into_iter().chain(reads).try_for_each(|side| side.join().expect("no side panics"))
        })?;
    }
    drop(eater);
    let closings = forwarder.closings(4)?;
    ensure!(
        closings.iter().all(|closing| closing.relay == "copy" && closing.reason == "eof"),
        "{closings:?}"
    );
    ensure!(
        closings.iter().all(|closing| closing.to_client == size && closing.to_service == size),
        "{closings:?}"
    );
    let log = forwarder.stop()?;
    let told = log.complaints();
    ensure!(told.len() == 1 && told[0].contains("pipe"), "want it announced once: {:#?}", log.lines());
    Ok(())
}

/// One after the other: they share the quota.
#[test]
fn without_pipes_it_copies_and_says_so_once() -> Result<()> {
    relays_by_copying("auto").context("auto")?;
    relays_by_copying("splice").context("splice")
}
