//! Services that are reached over UDP, as `bro activate` sets them up: a name server that the first question wakes, TCP and UDP of one port, and
//! a range of ports.

use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{ACTIVATOR, PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};

use crate::activated::{activate, expect_asleep};

/// The address in every answer.
const ANSWER: [u8; 4] = [192, 0, 2, 53];

/// How long a client waits before it asks again, as resolvers do.
const AGAIN: Duration = Duration::from_secs(5);

/// A name server in a container.
fn plan(manager: Manager) -> Plan {
    let container = format!(
        "Rootfs={}:O\nTmpfs=/tmp\nStopSignal=SIGKILL\n\
         Exec=/usr/sbin/dnsmasq --no-daemon --conf-file=/dev/null --no-resolv --no-hosts --address=/test/192.0.2.53",
        manager.image()
    );
    Plan::new(&container, "", "")
}

/// The question for the address of `NAME.test` (RFC 1035).
fn question(id: u16) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3]);
    message.extend(b"www\x04test\x00\x00\x01\x00\x01");
    message
}

/// Asks over UDP.
fn ask(host: &Host, port: u16, id: u16) -> Result<()> {
    // Of a flow that ends soon, the answer of a server that has just begun on a busy machine may come too late.
    let answer = asked(host, port, &question(id), AGAIN)?;
    ensure!(answer.starts_with(&id.to_be_bytes()) && answer.ends_with(&ANSWER), "{answer:?}");
    Ok(())
}

/// What comes for one datagram: none is lost.
fn exchange(host: &Host, port: u16, bytes: &[u8]) -> Result<Vec<u8>> {
    asked(host, port, bytes, PATIENCE)
}

/// What comes for a datagram, which is sent again when nothing has come for so long.
fn asked(host: &Host, port: u16, bytes: &[u8], again: Duration) -> Result<Vec<u8>> {
    let client = host.in_network(|| Ok(UdpSocket::bind("127.0.0.1:0")?))?;
    client.connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(again))?;
    let (began, mut answer) = (Instant::now(), vec![0; 512]);
    loop {
        let _sent = client.send(bytes)?;
        match client.recv(&mut answer) {
            Ok(length) => {
                answer.truncate(length);
                return Ok(answer);
            }
            Err(error) if began.elapsed() >= PATIENCE => {
                return Err(error).with_context(|| format!("no answer from port {port}"));
            }
            Err(_) => {}
        }
    }
}

/// Asks over TCP.
fn ask_over_tcp(host: &Host, port: u16, id: u16) -> Result<()> {
    let mut client = host.connect(port)?;
    let question = question(id);
    client.write_all(&[&(question.len() as u16).to_be_bytes()[..], &question].concat())?;
    let mut length = [0; 2];
    client.read_exact(&mut length).context("no answer over TCP")?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    client.read_exact(&mut answer)?;
    ensure!(answer.ends_with(&ANSWER), "{answer:?}");
    Ok(())
}

fn site<'h>(host: &'h Host, manager: Manager, name: &str, port: u16) -> Site<'h> {
    Site { host, manager, front: manager, name: name.into(), port, suffix: ACTIVATOR }
}

/// As of a name server: woken by a datagram, asked over TCP as well, idle, and woken again; and then over UDP alone, elsewhere.
pub fn name_server(host: &Host, manager: Manager) -> Result<()> {
    plan(manager).write_quadlet(host, manager, "names")?;
    let port = host.free_port()?;
    let options = "--internal-port 53 --exit-idle-time 500ms --flow-timeout 1s";
    let activated =
        activate(host, manager, &format!("names --external-port 127.0.0.1:{port}/tcp+udp {options}"))?;
    ensure!(activated.success() && activated.stderr.is_empty(), "{activated:?}");
    let names = site(host, manager, "names", port);
    expect_asleep(&names)?;
    ask(host, port, 1).with_context(|| names.journals())?;
    ask_over_tcp(host, port, 2).with_context(|| names.journals())?;
    expect_asleep(&names)?;
    ask(host, port, 3).with_context(|| names.journals())?;
    ensure!(names.errors()?.is_empty(), "{:?}", names.errors()?);
    // systemd has set what can be set of each, and complains of nothing.
    let complaints = manager.journal(host, &names.socket())?;
    ensure!(!complaints.contains("failed"), "{complaints}");

    let keep = activate(host, manager, "names --exit-idle-time 1min --flow-timeout 1min")?;
    ensure!(keep.success(), "{keep:?}");
    ask(host, port, 4).with_context(|| names.journals())?;
    let doctor = manager.try_run(host, &["bro", "doctor", "names"])?;
    let here = "listens at 127.0.0.1:53 and takes datagrams at 127.0.0.1:53/udp";
    ensure!(doctor.stdout.contains(here), "{doctor:?}");

    let moved = host.free_port()?;
    // A user's service cannot have what that takes.
    let tells = if manager == Manager::System { "--icmp-port-unreachable" } else { "" };
    let words = format!("names --external-port 127.0.0.1:{moved}/udp --exit-idle-time 500ms {tells}");
    let changed = activate(host, manager, &words)?;
    ensure!(changed.success(), "{changed:?}");
    ask(host, moved, 5).with_context(|| names.journals())?;
    ensure!(host.connect(moved).is_err() && host.connect(port).is_err(), "it listens over TCP still");
    let status = manager.try_run(host, &["bro", "status", "--json"])?;
    ensure!(status.stdout.contains(&format!("\"127.0.0.1:{moved}/udp\"")), "{status:?}");
    manager.run(host, &["bro", "sleep", "--force", "names"])?;
    if manager == Manager::System {
        expect_told(host, manager, "names", moved).with_context(|| names.journals())?;
    }
    let removed = activate(host, manager, "names --remove")?;
    ensure!(removed.success(), "{removed:?}");
    names.await_container_gone()
}

/// A client hears that its datagram was not received, for its service cannot be started.
fn expect_told(host: &Host, manager: Manager, name: &str, port: u16) -> Result<()> {
    let unit = format!("{name}.service");
    manager.systemctl(host, &["mask", "--runtime", &unit])?;
    let client = host.in_network(|| Ok(UdpSocket::bind("127.0.0.1:0")?))?;
    client.connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(PATIENCE))?;
    let _sent = client.send(&question(9))?;
    let heard = client.recv(&mut [0; 512]).map_err(|error| error.kind());
    manager.systemctl(host, &["unmask", "--runtime", &unit])?;
    ensure!(heard == Err(std::io::ErrorKind::ConnectionRefused), "{heard:?}");
    Ok(())
}

/// Asks from an address that no forwarder has.
fn ask_as_another(host: &Host, port: u16, id: u16) -> Result<()> {
    let client = host.in_network(|| Ok(UdpSocket::bind("127.0.0.5:0")?))?;
    client.connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(PATIENCE))?;
    let _sent = client.send(&question(id))?;
    let mut answer = [0; 512];
    let length = client.recv(&mut answer).context("no answer")?;
    ensure!(answer[..length].ends_with(&ANSWER), "{:?}", &answer[..length]);
    Ok(())
}

/// It has seen the client, and one inside finds it by the socket that it had made itself.
fn expect_adopted(namer: &Site<'_>) -> Result<()> {
    let inside = |command: &[&str]| {
        let words = [&["podman", "exec", "systemd-namer"], command].concat();
        namer.manager.run(namer.host, &words)
    };
    let said = inside(&["cat", "/tmp/queries"])?;
    ensure!(said.contains("query[A] www.test from 127.0.0.5"), "{said}");
    let hex: String = question(3).iter().map(|byte| format!("{byte:02x}")).collect();
    let asks = format!(
        "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(20); \
         s.sendto(bytes.fromhex('{hex}'),('127.0.0.1',53)); print(s.recv(512)[-4:].hex())"
    );
    let said = inside(&["python3", "-c", &asks])?;
    ensure!(said.trim() == "c0000235", "inside it is told {said}");
    let status = namer.manager.run(namer.host, &["bro", "status", "namer"])?;
    ensure!(status.contains("adopted since") && status.contains("last datagram"), "{status}");
    let doctor = namer.manager.try_run(namer.host, &["bro", "doctor", "namer"])?;
    ensure!(!doctor.stdout.contains("BAD"), "{doctor:?}");
    Ok(())
}

/// The name server has systemd's socket for UDP and sees its clients, sleeps, and is woken again by a datagram that it receives itself; over TCP it is forwarded to.
pub fn adopted(host: &Host, manager: Manager) -> Result<()> {
    let given = plan(manager);
    let plan = Plan {
        container: given
            .container
            .replace("--no-daemon", "--no-daemon --log-queries --log-facility=/tmp/queries"),
        ..given
    };
    plan.write_quadlet(host, manager, "namer")?;
    let port = host.free_port()?;
    let options = "--internal-port 53 --exit-idle-time 2s --flow-timeout 500ms --adopt=udp";
    let activated =
        activate(host, manager, &format!("namer --external-port 127.0.0.1:{port}/tcp+udp {options}"))?;
    ensure!(activated.success(), "{activated:?}");
    let namer = site(host, manager, "namer", port);
    expect_asleep(&namer)?;
    ask_as_another(host, port, 1).with_context(|| namer.journals())?;
    expect_adopted(&namer).with_context(|| namer.journals())?;
    expect_asleep(&namer)?;
    ask_as_another(host, port, 2).with_context(|| namer.journals())?;
    ask_over_tcp(host, port, 3).with_context(|| namer.journals())?;
    ensure!(namer.errors()?.is_empty(), "{:?}", namer.errors()?);
    manager.run(host, &["bro", "sleep", "--force", "namer"])?;
    let removed = activate(host, manager, "namer --remove")?;
    ensure!(removed.success(), "{removed:?}");
    namer.await_container_gone()
}

/// Says at which port it was asked.
const WHICH: &str = r"import select,socket
def bound(port):
    s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('127.0.0.1',port)); return s
all=[bound(port) for port in range(700,703)]
while True:
    for s in select.select(all,[],[])[0]:
        _,client=s.recvfrom(2048); s.sendto(b'%d'%s.getsockname()[1],client)
";

/// Each port of a range leads to its own, and a datagram at any of them wakes the service.
pub fn range(host: &Host, manager: Manager) -> Result<()> {
    let first = if manager == Manager::System { 21_000 } else { 22_000 };
    scripted(host, manager, "ranged", WHICH)?;
    let ports = format!("{first}-{}/udp", first + 2);
    let activated = activate(
        host,
        manager,
        &format!("ranged --external-port 127.0.0.1:{ports} --internal-port 700 --exit-idle-time 1min"),
    )?;
    ensure!(activated.success() && activated.stderr.is_empty(), "{activated:?}");
    let ranged = site(host, manager, "ranged", first);
    for number in [2, 0, 1] {
        let answer = exchange(host, first + number, b"which").with_context(|| ranged.journals())?;
        ensure!(answer == (700 + number).to_string().as_bytes(), "{number}: {answer:?}");
    }
    let doctor = manager.try_run(host, &["bro", "doctor", "ranged"])?;
    let here = "takes datagrams at 3 of 3 ports from 127.0.0.1:700/udp to 127.0.0.1:702/udp";
    ensure!(doctor.stdout.contains(here), "{doctor:?}");
    manager.run(host, &["bro", "sleep", "--force", "ranged"])?;
    let removed = activate(host, manager, "ranged --remove")?;
    ensure!(removed.success(), "{removed:?}");
    ranged.await_container_gone()
}

/// Takes what systemd passes: a socket for datagrams.
const PASSED: &str = r"import socket
s=socket.socket(fileno=3)
while True:
    data,client=s.recvfrom(2048); s.sendto(b'passed '+data,client)
";

/// Keeps messages apart.
const MESSAGES: &str = r"import os,socket
s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.bind('/tmp/in.sock'); os.chmod('/tmp/in.sock',0o666); s.listen()
while True:
    c,_=s.accept()
    while data:=c.recv(2048): c.send(b'%d '%len(data)+data)
    c.close()
";

/// A container whose program is a script of Python, which this manager's host file holds.
fn scripted(host: &Host, manager: Manager, name: &str, script: &str) -> Result<()> {
    let file = match manager {
        Manager::System => format!("/srv/{name}.py"),
        Manager::User(user) => format!("/srv/{name}-of-{user}.py"),
    };
    host.write(&file, script)?;
    let container = format!(
        "Rootfs={}:O\nVolume={file}:/srv/script.py:ro\nTmpfs=/tmp\nStopSignal=SIGKILL\nExec=/usr/bin/python3 /srv/script.py",
        manager.image()
    );
    Plan::new(&container, "", "").write_quadlet(host, manager, name)
}

/// The container's program takes a socket for datagrams over; and messages over a unix socket are forwarded as they are.
pub fn passed_and_messages(host: &Host, manager: Manager) -> Result<()> {
    scripted(host, manager, "passed", PASSED)?;
    let port = host.free_port()?;
    let activated =
        activate(host, manager, &format!("passed --direct --external-port 127.0.0.1:{port}/udp"))?;
    ensure!(activated.success() && activated.stderr.contains("can send datagrams from it"), "{activated:?}");
    let answer = exchange(host, port, b"word").context("the first datagram wakes it, and is kept")?;
    ensure!(answer == b"passed word", "{answer:?}");
    let doctor = manager.try_run(host, &["bro", "doctor", "passed"])?;
    ensure!(doctor.stdout.contains(&format!("has taken 127.0.0.1:{port}/udp over")), "{doctor:?}");
    let removed = activate(host, manager, "passed --remove")?;
    ensure!(removed.success(), "{removed:?}");

    scripted(host, manager, "messages", MESSAGES)?;
    let socket = match manager {
        Manager::System => "/run/messages.sock".to_owned(),
        Manager::User(user) => format!("/run/user/{}/messages.sock", host.uid(user)?),
    };
    let words = format!("messages --external-port seqpacket:{socket} --internal-port /tmp/in.sock");
    let activated = activate(host, manager, &words)?;
    ensure!(activated.success() && activated.stderr.is_empty(), "{activated:?}");
    let client = format!(
        "import socket; s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET); s.settimeout(20); s.connect('{socket}')\n\
         for data in (b'one',b'two!'): s.send(data)\nprint(s.recv(99),s.recv(99))"
    );
    let said = manager.run(host, &["python3", "-c", &client])?;
    ensure!(said.trim() == "b'3 one' b'4 two!'", "{said}");
    let doctor = manager.try_run(host, &["bro", "doctor", "messages"])?;
    ensure!(doctor.stdout.contains("listens at /tmp/in.sock, and lets"), "{doctor:?}");
    manager.run(host, &["bro", "sleep", "--force", "messages"])?;
    let removed = activate(host, manager, "messages --remove")?;
    ensure!(removed.success(), "{removed:?}");
    Ok(())
}

/// The port of name servers, for an ordinary user's container.
pub fn of_a_user(host: &Host) -> Result<()> {
    let manager = Manager::User("test");
    plan(manager).write_quadlet(host, manager, "resolver")?;
    let words = "resolver --system --run-as test --external-port 127.0.0.1:53/udp --exit-idle-time 1min --icmp-port-unreachable";
    let activated = activate(host, Manager::System, words)?;
    ensure!(activated.success(), "{activated:?}");
    let mut resolver = site(host, manager, "resolver", 53);
    resolver.front = Manager::System;
    let asked = ask(host, 53, 7).with_context(|| resolver.journals());
    manager.systemctl(host, &["stop", "resolver.service"])?;
    let told = expect_told(host, manager, "resolver", 53).with_context(|| resolver.journals());
    let removed = activate(host, Manager::System, "resolver --system --remove")?;
    asked?;
    told?;
    ensure!(removed.success(), "{removed:?}");
    Ok(())
}
