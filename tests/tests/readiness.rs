//! `--ready=`: a service that listens and does not take clients yet is asked in its own protocol until it does (fakes, which count the
//! questions), and a real Redis that loads its data; PostgreSQL is in `postgres`. Seconds, without privileges.
//!
//! Needs: a network namespace, redis. Takes: seconds.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::bro;
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::Namespace;
use bro_tests::peers::{Address, Bound, Conn, Family, Here, Listener, PATIENCE};
use bro_tests::process::{self, Session};
use bro_tests::require_namespaces;
use bro_tests::scene::expect_relayed;
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, find_program, met};

/// How often a fake says that it is not ready.
const REFUSALS: usize = 3;

/// A namespace with a service that listens at this port, and a forwarder to it.
struct Stand {
    forwarder: Forwarder,
    front: Listener,
    service: Listener,
    _namespace: Namespace,
}

impl Stand {
    fn new(port: u16, options: &[&str]) -> Result<Self> {
        let namespace = Namespace::new()?;
        let service = Listener::new(&namespace, &inside(port))?;
        let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
        let port = service.address().port().context("a TCP address")?;
        let setup = Setup::new().socket(&front).netns(&namespace);
        let forwarder = setup.args(options).arg(format!("127.0.0.1:{port}")).start()?;
        Ok(Self { forwarder, front, service, _namespace: namespace })
    }

    /// The client that wakes the service.
    fn client(&self) -> Result<Conn> {
        Conn::new(&Here, self.front.address())
    }

    /// The next connection is one of bro's own, which asks: it is answered, and ended by bro.
    fn answer(&self, question: &[u8], answer: &[u8]) -> Result<()> {
        let asked = self.service.accept()?;
        let mut came = vec![0; question.len()];
        asked.recv_exact(&mut came)?;
        ensure!(came == question, "{} was asked", came.escape_ascii());
        asked.send(answer)?;
        asked.read_to_end()?;
        Ok(())
    }

    fn expect_served(self, client: Conn) -> Result<()> {
        let served = self.service.accept()?;
        expect_relayed(&client, &served)?;
        drop((client, served));
        self.forwarder.stop().map(drop)
    }
}

fn inside(port: u16) -> Address {
    Address::Tcp(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// What a PostgreSQL says that cannot take a client now, or whose rules refuse.
fn postgres_error(code: &str) -> Vec<u8> {
    let fields = format!("SFATAL\0VFATAL\0C{code}\0Msays so\0\0");
    let length = u32::try_from(fields.len() + 4).unwrap_or(0);
    [b"E".as_slice(), &length.to_be_bytes(), fields.as_bytes()].concat()
}

fn postgres_question() -> Vec<u8> {
    let said = b"user\0postgres\0database\0postgres\0application_name\0bro\0\0";
    let length = u32::try_from(said.len() + 8).unwrap_or(0);
    [&length.to_be_bytes()[..], &[0, 3, 0, 0], said].concat()
}

#[test]
fn a_client_is_connected_when_the_service_says_that_it_is_ready() -> Result<()> {
    require_namespaces!();
    let page = |host: &str| {
        let said = "User-Agent: bro\r\nConnection: close\r\n\r\n";
        format!("GET /health?deep HTTP/1.1\r\nHost: {host}\r\n{said}").into_bytes()
    };
    let (unavailable, missing) = (b"HTTP/1.1 503 Not Yet\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n\r\n");
    let greeting = [&[74, 0, 0, 0, 10][..], b"11.4.2-MariaDB\0"].concat();
    for (ready, question, refusal, answer) in [
        ("postgres", postgres_question(), postgres_error("57P03"), postgres_error("28000")),
        ("redis", b"PING\r\n".to_vec(), b"-LOADING Redis is loading\r\n".to_vec(), b"+PONG\r\n".to_vec()),
        ("mysql", Vec::new(), Vec::new(), greeting),
        ("http:/health?deep", page("localhost"), unavailable.to_vec(), missing.to_vec()),
        ("http://db.example/health?deep", page("db.example"), unavailable.to_vec(), missing.to_vec()),
    ] {
        (|| {
            let stand = Stand::new(0, &[&format!("--ready={ready}")])?;
            let client = stand.client()?;
            for _ in 0..REFUSALS {
                if refusal.is_empty() {
                    // It ends the connection without a word.
                    drop(stand.service.accept()?);
                } else {
                    stand.answer(&question, &refusal)?;
                }
            }
            stand.answer(&question, &answer)?;
            stand.expect_served(client)
        })()
        .context(ready)?;
    }
    Ok(())
}

/// It says that it is ready at another port than its clients come to.
#[test]
fn a_page_may_be_at_a_port_of_its_own() -> Result<()> {
    require_namespaces!();
    let namespace = Namespace::new()?;
    let [health, service] = [(); 2].map(|()| Listener::new(&namespace, &inside(0)));
    let (health, service) = (health?, service?);
    let ports = [&health, &service].map(|listener| listener.address().port().unwrap_or(0));
    let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
    let setup = Setup::new().socket(&front).netns(&namespace).arg(format!("--ready=http::{}/", ports[0]));
    let forwarder = setup.arg(format!("127.0.0.1:{}", ports[1])).start()?;
    let client = Conn::new(&Here, front.address())?;
    let asked = health.accept()?;
    ensure!(service.try_accept(Duration::from_millis(300))?.is_none(), "connected before it was ready");
    asked.send(b"HTTP/1.1 200 OK\r\n\r\n")?;
    let served = service.accept()?;
    expect_relayed(&client, &served)?;
    drop((client, served));
    forwarder.stop().map(drop)
}

#[test]
fn a_well_known_port_is_asked_without_being_told() -> Result<()> {
    require_namespaces!();
    let stand = Stand::new(5432, &[])?;
    let client = stand.client()?;
    stand.answer(&postgres_question(), &postgres_error("57P03"))?;
    stand.answer(&postgres_question(), b"R\0\0\0\x08\0\0\0\0")?;
    stand.expect_served(client)?;
    // Nothing is asked where that is not wanted.
    let stand = Stand::new(5432, &["--ready=listen"])?;
    let client = stand.client()?;
    stand.expect_served(client)
}

/// The port is only a number: what speaks another protocol there, or waits for its client to speak, is ready.
#[test]
fn another_service_at_a_well_known_port_is_ready() -> Result<()> {
    require_namespaces!();
    for answer in [Some(b"220 ready\r\n".as_slice()), None] {
        let stand = Stand::new(6379, &[])?;
        let client = stand.client()?;
        let begin = Instant::now();
        match answer {
            Some(answer) => stand.answer(b"PING\r\n", answer)?,
            // Asked in vain for a second.
            None => drop(stand.service.accept()?.read_to_end()?),
        }
        ensure!(begin.elapsed() < PATIENCE / 2, "asked for {:?}", begin.elapsed());
        stand.expect_served(client).with_context(|| format!("{answer:?}"))?;
    }
    Ok(())
}

/// Told which protocol it is, bro waits for it, as long as clients are held.
#[test]
fn what_was_asked_for_is_not_replaced_by_something_else() -> Result<()> {
    require_namespaces!();
    let stand = Stand::new(0, &["--ready=redis", "--start-timeout=2s"])?;
    let client = stand.client()?;
    stand.answer(b"PING\r\n", b"220 ready\r\n")?;
    stand.answer(b"PING\r\n", b"220 ready\r\n")?;
    client.expect_abort()?;
    let log = stand.forwarder.stop()?;
    let said = "did not answer PING as a Redis that has loaded its data within 2s";
    ensure!(log.lines().iter().any(|line| line.contains(said)), "{}", log.lines().join("\n"));
    Ok(())
}

#[test]
fn the_first_client_of_a_redis_that_loads_reads_no_loading() -> Result<()> {
    let mut needs = bro_tests::suite::namespace_needs();
    needs.extend([Need::Program("redis-server", "redis-server"), Need::Program("redis-cli", "redis-tools")]);
    if !met("the_first_client_of_a_redis_that_loads_reads_no_loading", &needs) {
        return Ok(());
    }
    let (namespace, scratch) = (Namespace::new()?, Scratch::new()?);
    let probe = Bound::new(&namespace, &inside(0))?;
    let inside = probe.address().port().context("a TCP address")?;
    drop(probe);
    let server = find_program("redis-server").context("redis-server has gone")?;
    let redis = |options: &[&str]| -> Result<Session> {
        let mut command = Command::new(bro::helper());
        command.arg("launch").arg("--").args(namespace.enter()).arg(&server);
        command.args(["--bind", "127.0.0.1", "--port", &inside.to_string(), "--save", ""]);
        command.args(options).current_dir(scratch.path());
        Ok(Session(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
    };
    let forwarder = |ready: &str| -> Result<(Forwarder, String)> {
        let front = Listener::new(&Here, &Family::Tcp4.loopback().context("TCP has one")?)?;
        let setup = Setup::new().socket(&front).netns(&namespace).arg(format!("--ready={ready}"));
        let forwarder = setup.arg("--source=loopback").arg(format!("127.0.0.1:{inside}")).start()?;
        Ok((forwarder, front.address().port().context("a TCP address")?.to_string()))
    };
    let ask = |port: &str, words: &[&str]| -> Result<String> {
        let output = Command::new("redis-cli").args(["-p", port]).args(words).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let (listens, unready) = forwarder("listen")?;
    let first = redis(&["--enable-debug-command", "yes"])?;
    for words in [&["debug", "populate", "20000"][..], &["set", "key", "value"], &["save"]] {
        let said = ask(&unready, words)?;
        ensure!(said == "OK", "{words:?}: {said}");
    }
    drop(first);
    ensure!(
        process::eventually(PATIENCE, || Conn::new(&namespace, &self::inside(inside)).is_err()),
        "it listens on"
    );
    // Each key takes so many microseconds to load, and questions are answered in between.
    let _again = redis(&["--key-load-delay", "100", "--loading-process-events-interval-bytes", "1024"])?;
    let said = ask(&unready, &["get", "key"])?;
    ensure!(said.starts_with("LOADING"), "{said}");
    let (says, ready) = forwarder("redis")?;
    let said = ask(&ready, &["get", "key"])?;
    ensure!(said == "value", "{said}");
    listens.stop()?;
    says.stop().map(drop)
}
