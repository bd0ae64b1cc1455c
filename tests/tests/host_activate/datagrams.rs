//! Services that are reached over UDP, as `bro activate` sets them up: a name server that the first question wakes, TCP and UDP of one port, and
//! a range of ports.

use std::io::{Read as _, Write as _};
use std::net::UdpSocket;

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{ACTIVATOR, PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};

use crate::activated::{activate, expect_asleep};

/// The address in every answer.
const ANSWER: [u8; 4] = [192, 0, 2, 53];

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

/// Asks over UDP, once: no datagram is lost.
fn ask(host: &Host, port: u16, id: u16) -> Result<()> {
    let answer = exchange(host, port, &question(id))?;
    ensure!(answer.starts_with(&id.to_be_bytes()) && answer.ends_with(&ANSWER), "{answer:?}");
    Ok(())
}

/// What comes for one datagram.
fn exchange(host: &Host, port: u16, bytes: &[u8]) -> Result<Vec<u8>> {
    let client = host.in_network(|| Ok(UdpSocket::bind("127.0.0.1:0")?))?;
    client.connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(PATIENCE))?;
    let _sent = client.send(bytes)?;
    let mut answer = vec![0; 512];
    let length = client.recv(&mut answer).with_context(|| format!("no answer from port {port}"))?;
    answer.truncate(length);
    Ok(answer)
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
    let options = "--internal-port 53 --exit-idle-time 500ms --flow-timeout 500ms";
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
    let changed = activate(
        host,
        manager,
        &format!("names --external-port 127.0.0.1:{moved}/udp --exit-idle-time 500ms"),
    )?;
    ensure!(changed.success(), "{changed:?}");
    ask(host, moved, 5).with_context(|| names.journals())?;
    ensure!(host.connect(moved).is_err() && host.connect(port).is_err(), "it listens over TCP still");
    let status = manager.try_run(host, &["bro", "status", "--json"])?;
    ensure!(status.stdout.contains(&format!("\"127.0.0.1:{moved}/udp\"")), "{status:?}");
    manager.run(host, &["bro", "sleep", "--force", "names"])?;
    let removed = activate(host, manager, "names --remove")?;
    ensure!(removed.success(), "{removed:?}");
    names.await_container_gone()
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
    let (script, first) = match manager {
        Manager::System => ("/srv/which.py", 21_000),
        Manager::User(_) => ("/srv/which-of-a-user.py", 22_000),
    };
    host.write(script, WHICH)?;
    let container = format!(
        "Rootfs={}:O\nVolume={script}:/srv/which.py:ro\nStopSignal=SIGKILL\nExec=/usr/bin/python3 /srv/which.py",
        manager.image()
    );
    Plan::new(&container, "", "").write_quadlet(host, manager, "ranged")?;
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

/// The port of name servers, for an ordinary user's container.
pub fn of_a_user(host: &Host) -> Result<()> {
    let manager = Manager::User("test");
    plan(manager).write_quadlet(host, manager, "resolver")?;
    let words = "resolver --system --run-as test --external-port 127.0.0.1:53/udp --exit-idle-time 1min";
    let activated = activate(host, Manager::System, words)?;
    ensure!(activated.success(), "{activated:?}");
    let mut resolver = site(host, manager, "resolver", 53);
    resolver.front = Manager::System;
    let asked = ask(host, 53, 7).with_context(|| resolver.journals());
    let removed = activate(host, Manager::System, "resolver --system --remove")?;
    asked?;
    ensure!(removed.success(), "{removed:?}");
    manager.systemctl(host, &["stop", "resolver.service"])?;
    Ok(())
}
