//! HAProxy on either side, and nginx behind.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::Setup;
use bro_tests::peers::{Address, Bound, Conn, Family, Here, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::scratch::Scratch;
use bro_tests::tier::{Need, find_program, met};

/// A program that ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn run(program: &str, arguments: &[&str], folder: &Path) -> Result<Program> {
    let found = find_program(program).with_context(|| format!("{program} has gone"))?;
    let log = std::fs::File::create(folder.join(format!("{program}.log")))?;
    let mut command = Command::new(found);
    command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Program(command.spawn()?))
}

fn loopback() -> Result<Address> {
    Family::Tcp4.loopback().context("TCP has one")
}

/// A port that is free at the moment.
fn port() -> Result<u16> {
    Bound::new(&Here, &loopback()?)?.address().port().context("a TCP address")
}

fn connect(port: u16) -> Result<Conn> {
    let address: Address = Address::Tcp(([127, 0, 0, 1], port).into());
    let there = || Conn::new(&Here, &address).is_ok();
    ensure!(process::eventually(Duration::from_secs(10), there), "there is no listener at {port}");
    Conn::new(&Here, &address)
}

const DEFAULTS: &str =
    "defaults\n mode tcp\n timeout connect 10s\n timeout client 10s\n timeout server 10s\n";

/// HAProxy in front introduces its client, bro says it on, HAProxy behind believes it and says it to the service.
#[test]
fn an_address_survives_haproxy_on_either_side() -> Result<()> {
    if !met("an_address_survives_haproxy_on_either_side", &[Need::Program("haproxy", "haproxy")]) {
        return Ok(());
    }
    for (first, version, last) in
        [("send-proxy", "v2", "send-proxy-v2"), ("send-proxy-v2", "v1", "send-proxy")]
    {
        let scratch = Scratch::new()?;
        let (front, back) = (port()?, port()?);
        let service = Listener::new(&Here, &loopback()?)?;
        let listener = Listener::new(&Here, &loopback()?)?;
        let (bro, inside) = (listener.address().to_string(), service.address().to_string());
        let config = format!(
            "{DEFAULTS}listen first\n bind 127.0.0.1:{front}\n server bro {bro} {first}\nlisten last\n bind 127.0.0.1:{back} \
             accept-proxy\n server service {inside} {last}\n"
        );
        std::fs::write(scratch.join("haproxy.cfg"), config)?;
        let path = scratch.join("haproxy.cfg").display().to_string();
        let haproxy = run("haproxy", &["-db", "-f", &path], scratch.path())?;
        let forwarder = Setup::new()
            .socket(&listener)
            .args(["--relay=splice", "--accept-proxy", "--trusted=127.0.0.1"])
            .arg(format!("--proxy-protocol={version}"))
            .arg(format!("127.0.0.1:{back}"))
            .start()?;
        let client = connect(front)?;
        client.send(b"ping")?;
        let own = client.address()?.to_string();
        // The client that only looked whether there is a listener has come through as well.
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            ensure!(std::time::Instant::now() < deadline, "the client's own connection never came");
            let accepted = service.accept()?;
            let mut bytes = [0; 107];
            let count = if last == "send-proxy" {
                accepted.recv(&mut bytes)?
            } else {
                accepted.recv(&mut bytes[..28])?
            };
            let (source, port) = own.split_once(':').context("an address")?;
            let is_ours = if last == "send-proxy" {
                let line = String::from_utf8_lossy(&bytes[..count]).into_owned();
                line.starts_with(&format!("PROXY TCP4 {source} 127.0.0.1 {port} {front}\r\n"))
            } else {
                bytes[24..26] == port.parse::<u16>()?.to_be_bytes() && bytes[16..20] == [127, 0, 0, 1]
            };
            if is_ours {
                break;
            }
        }
        drop(client);
        let seen = |line: &str| line.contains("connection closed") && line.contains(&format!("peer={own}"));
        forwarder.log().line(PATIENCE, seen)?;
        forwarder.stop()?;
        drop(haproxy);
    }
    Ok(())
}

/// nginx wants the header of every connection, and logs whom it names.
#[test]
fn nginx_logs_the_client_that_it_is_told_of() -> Result<()> {
    if !met("nginx_logs_the_client_that_it_is_told_of", &[Need::Program("nginx", "nginx-light")]) {
        return Ok(());
    }
    for version in ["v1", "v2"] {
        let scratch = Scratch::new()?;
        let (inside, listener) = (port()?, Listener::new(&Here, &loopback()?)?);
        let folder = scratch.path().display();
        let config = format!(
            "daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n\
             http {{ log_format who '$proxy_protocol_addr:$proxy_protocol_port'; access_log {folder}/access.log who;\n\
             client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;\n\
             scgi_temp_path {folder}/s; server {{ listen 127.0.0.1:{inside} proxy_protocol; return 200 hello; }} }}"
        );
        std::fs::write(scratch.join("nginx.conf"), config)?;
        let path = scratch.join("nginx.conf").display().to_string();
        let nginx = run("nginx", &["-c", &path], scratch.path())?;
        let forwarder = Setup::new()
            .socket(&listener)
            .args(["--accept-proxy", "--trusted=127.0.0.1"])
            .arg(format!("--proxy-protocol={version}"))
            .arg(format!("127.0.0.1:{inside}"))
            .start()?;
        for last in 1..=3 {
            let client = Conn::new(&Here, listener.address())?;
            client.send(format!("PROXY TCP4 198.51.100.{last} 203.0.113.1 4711 443\r\n").as_bytes())?;
            client.send(b"GET / HTTP/1.0\r\n\r\n")?;
            let (answer, _) = client.read_to_end()?;
            ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        }
        let logged = || std::fs::read_to_string(scratch.join("access.log")).unwrap_or_default();
        let expected = "198.51.100.1:4711\n198.51.100.2:4711\n198.51.100.3:4711\n";
        ensure!(process::eventually(PATIENCE, || logged() == expected), "{}", logged());
        forwarder.stop()?;
        drop(nginx);
    }
    Ok(())
}
