//! Name servers, asked over UDP and TCP (RFC 1035).

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{PATIENCE, Site};
use bro_tests::process::eventually;

use super::CLIENT;
use super::table::{connect, inside, log_file, logged};

/// The address of every name that the servers know.
const ANSWER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);

/// The question for the address of a name that was not asked for before, so that no line of before tells of it.
struct Question {
    name: String,
    message: Vec<u8>,
}

impl Question {
    /// For `zone` itself, or a name in it.
    fn new(zone: &str, fresh: bool) -> Self {
        static ASKED: AtomicU16 = AtomicU16::new(0);
        let id = ASKED.fetch_add(1, Ordering::Relaxed);
        let name = if fresh { format!("w{id}.{zone}") } else { zone.into() };
        let mut message = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.as_bytes());
        }
        message.extend([0, 0, 1, 0, 1]);
        Self { name, message }
    }

    /// The address in the first record of an answer to it.
    fn address(&self, answer: &[u8]) -> Result<Ipv4Addr> {
        let length = self.message.len();
        let ours =
            answer.get(..2) == self.message.get(..2) && answer.get(12..length) == self.message.get(12..);
        let good = ours && answer[2] & 0x80 != 0 && answer[3] & 0xf == 0;
        // The name as a pointer, A, IN, how long it holds, four bytes.
        let record = answer
            .get(length..length + 16)
            .filter(|record| good && record.starts_with(&[0xc0, 12, 0, 1, 0, 1]));
        let address = record.and_then(|record| record.last_chunk::<4>());
        address.map(|address| (*address).into()).with_context(|| format!("for {}: {answer:?}", self.name))
    }

    fn over_tcp(&self, mut client: TcpStream) -> Result<Ipv4Addr> {
        client.write_all(&[&(self.message.len() as u16).to_be_bytes()[..], &self.message].concat())?;
        let mut length = [0; 2];
        client.read_exact(&mut length).context("no answer over TCP")?;
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        client.read_exact(&mut answer)?;
        self.address(&answer)
    }

    /// Each datagram is answered, the one that wakes it too.
    fn over_udp(&self, site: &Site<'_>) -> Result<Ipv4Addr> {
        let client: IpAddr = CLIENT.parse()?;
        let socket = site.host.in_network(|| Ok(UdpSocket::bind((client, 0))?))?;
        socket.connect((client, site.port))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let asked = || -> Result<Vec<u8>> {
            let _all = socket.send(&self.message)?;
            let mut answer = vec![0; 512];
            let length = socket.recv(&mut answer).context("no answer over UDP")?;
            answer.truncate(length);
            Ok(answer)
        };
        let mut answer = asked()?;
        // named answers before it has read its zones, and says so: SERVFAIL.
        let fails = |answer: &[u8]| answer.get(3).is_some_and(|flags| flags & 0xf == 2);
        let served = eventually(PATIENCE, || {
            if fails(&answer) {
                answer = asked().unwrap_or_default();
            }
            !fails(&answer)
        });
        ensure!(served, "SERVFAIL for {PATIENCE:?}");
        self.address(&answer)
    }
}

/// One that answers with the address of its client.
pub(super) fn answering(site: &Site<'_>) -> Result<String> {
    let by_udp = Question::new("whom.test", false).over_udp(site)?;
    let by_tcp = Question::new("whom.test", false).over_tcp(connect(site)?)?;
    ensure!(by_udp == by_tcp, "{by_udp} over UDP, {by_tcp} over TCP");
    Ok(by_tcp.to_string())
}

/// One whose log, in this file, tells who has asked.
pub(super) fn logging(site: &Site<'_>, file: &str) -> Result<String> {
    let (by_udp, by_tcp) = (Question::new("whom.test", true), Question::new("whom.test", true));
    ensure!(by_udp.over_udp(site)? == ANSWER, "another address over UDP");
    ensure!(by_tcp.over_tcp(connect(site)?)? == ANSWER, "another address over TCP");
    let log = || log_file(site, file);
    Ok(logged(log, &by_udp.name)? + &logged(log, &by_tcp.name)?)
}

/// One inside finds it by the socket that it had made itself, and its clients are told of the port that they come to. One inside does not count: the
/// client that is returned keeps it awake.
pub(super) fn from_inside(site: &Site<'_>) -> Result<TcpStream> {
    let client = connect(site)?;
    let question = Question::new("ns.whom.test", false);
    let hex: String = question.message.iter().map(|byte| format!("{byte:02x}")).collect();
    let asks = format!(
        "/usr/bin/python3 -c \"import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(20); \
         s.sendto(bytes.fromhex('{hex}'),('127.0.0.1',53)); print(*s.recv(512))\""
    );
    let answer: Vec<u8> = inside(site, &asks)?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    ensure!(question.address(&answer).context("inside")? == ANSWER, "another address inside");
    let (said, place) = (site.journal(), format!("address=0.0.0.0:{}/udp", site.port));
    ensure!(said.contains(&place), "no {place}: {said}");
    Ok(client)
}

/// It answers where the connection's own address and port are those of one of its interfaces: so it is asked at 127.0.0.1, the only one that it has.
pub(super) fn dnsmasq(site: &Site<'_>) -> Result<String> {
    let question = Question::new("whom.test", true);
    let (from, to) = (format!("{CLIENT}:0").parse()?, format!("127.0.0.1:{}", site.port).parse()?);
    let answer = question.over_tcp(site.host.connect_between(from, to)?)?;
    ensure!(answer == ANSWER, "{answer}");
    logged(|| log_file(site, "dnsmasq"), &question.name)
}
