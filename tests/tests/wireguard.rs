//! WireGuard through a forwarder, both ends by a library that speaks it for real: the handshake wakes the service, packets and keepalives both
//! ways, new keys, and a client that goes on from another address under the same keys.
//!
//! Needs: a network namespace. Takes: a second.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, bail, ensure};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use bro_tests::peers::PATIENCE;
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::udp::UdpScene;

/// The first byte of a message says what it is.
const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 4;

/// What a message is longer than the packet that it carries.
const OVERHEAD: usize = 32;

/// Bare headers, one odd byte, what fits an Ethernet frame, and more.
const LENGTHS: [usize; 6] = [20, 21, 576, 1280, 1420, 8000];

/// A keepalive, to the library: what carries no packet.
const KEEPALIVE: &[u8] = &[];

/// One end of a tunnel, at a socket of its own.
struct End {
    tunnel: Tunn,
    socket: UdpSocket,
    /// Where the other end is: where its last message came from that was genuine.
    peer: SocketAddr,
    /// What came, each by its first byte.
    heard: Vec<u8>,
    /// Which keys the last message with a packet was under.
    keys: u32,
    sent: Amount,
    received: Amount,
}

#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
struct Amount {
    datagrams: u64,
    bytes: u64,
}

impl Amount {
    fn add(&mut self, length: usize) {
        self.datagrams += 1;
        self.bytes += length as u64;
    }
}

impl End {
    fn new(own: u8, other: u8, socket: UdpSocket, peer: SocketAddr) -> Result<Self> {
        let secret = |seed| StaticSecret::from([seed; 32]);
        let tunnel =
            Tunn::new(secret(own), PublicKey::from(&secret(other)), Some([7; 32]), None, own.into(), None);
        socket.set_read_timeout(Some(PATIENCE))?;
        let (sent, received) = Default::default();
        Ok(Self { tunnel, socket, peer, heard: Vec::new(), keys: 0, sent, received })
    }

    fn write(&mut self, message: &[u8]) -> Result<()> {
        let _sent = self.socket.send_to(message, self.peer)?;
        self.sent.add(message.len());
        Ok(())
    }

    /// Sends a packet through the tunnel, or, where there are no keys yet, asks for some.
    fn send(&mut self, packet: &[u8]) -> Result<()> {
        // A handshake's message is longer than an empty packet's.
        let mut room = vec![0; packet.len() + OVERHEAD + 148];
        let TunnResult::WriteToNetwork(message) = self.tunnel.encapsulate(packet, &mut room) else {
            bail!("there is nothing to send")
        };
        let message = message.to_vec();
        self.write(&message)
    }

    /// Asks for new keys, as is done every two minutes.
    fn renew(&mut self) -> Result<()> {
        let mut room = [0; 148];
        let TunnResult::WriteToNetwork(message) = self.tunnel.format_handshake_initiation(&mut room, true)
        else {
            bail!("there is nothing to send")
        };
        let message = message.to_vec();
        self.write(&message)
    }

    /// Takes the next message, and answers it as the protocol has it; returns the packet that it carries, if it does.
    fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        let (mut message, mut room) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        let (length, from) = self.socket.recv_from(&mut message).context("no message comes")?;
        let message = &message[..length];
        self.received.add(length);
        self.heard.extend(message.first());
        if let ([DATA, ..], Some(keys)) = (message, message.get(4..8).and_then(<[u8]>::first_chunk)) {
            self.keys = u32::from_le_bytes(*keys);
        }
        let mut rest = message;
        loop {
            let answer = match self.tunnel.decapsulate(Some(from.ip()), rest, &mut room) {
                TunnResult::Done => None,
                TunnResult::WriteToNetwork(answer) => Some(answer.to_vec()),
                TunnResult::WriteToTunnelV4(packet, _) => {
                    self.peer = from;
                    return Ok(Some(packet.to_vec()));
                }
                other => bail!("of a message of {length} bytes: {other:?}"),
            };
            self.peer = from;
            let Some(answer) = answer else { return Ok(None) };
            self.write(&answer)?;
            // What has waited for the keys.
            rest = &[];
        }
    }

    fn expect(&mut self, packet: &[u8]) -> Result<()> {
        let came = self.receive()?.context("a message without a packet")?;
        ensure!(came == packet, "{} bytes came for {}, or others", came.len(), packet.len());
        Ok(())
    }

    fn expect_none(&mut self) -> Result<()> {
        let came = self.receive()?;
        ensure!(came.is_none(), "{came:?}");
        Ok(())
    }
}

/// A packet of IPv4 of this length.
fn packet(length: usize, seed: usize) -> Result<Vec<u8>> {
    let mut packet = vec![0x45, 0];
    packet.extend(u16::try_from(length)?.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend((packet.len()..length).map(|at| (at * 31 + seed) as u8));
    Ok(packet)
}

/// Packets both ways, in bursts, as they are and in order.
fn exchange(client: &mut End, server: &mut End, seed: usize) -> Result<()> {
    for (number, length) in LENGTHS.into_iter().enumerate() {
        let packets: Vec<Vec<u8>> =
            (0..8).map(|of| packet(length, seed + number * 8 + of)).collect::<Result<_>>()?;
        for packet in &packets {
            client.send(packet)?;
        }
        for packet in &packets {
            server.expect(packet).with_context(|| format!("to the service, {length}"))?;
        }
        for packet in &packets {
            server.send(packet)?;
        }
        for packet in &packets {
            client.expect(packet).with_context(|| format!("to the client, {length}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_tunnel_is_woken_renewed_and_taken_along() -> Result<()> {
    require_namespaces!();
    let scene = UdpScene::at("0.0.0.0:0".parse()?, false)?;
    let forwarder = scene.setup()?.start()?;
    let tally = || anyhow::Ok(forwarder.report()?.total.datagrams);
    let front = bro_tests::udp::loopback(false, scene.address()?.port());
    let mut client = End::new(1, 2, UdpSocket::bind("127.0.0.1:0")?, front)?;

    // The first datagram is the handshake's, and waits for the service.
    let first = packet(100, 0)?;
    client.send(&first)?;
    let waits = || tally().is_ok_and(|tally| tally.held == 1);
    ensure!(process::eventually(PATIENCE, waits), "{:?}", tally()?);
    let mut server = End::new(2, 1, scene.service()?, front)?;
    server.expect_none().context("the handshake")?;
    let before = server.peer;
    client.expect_none().context("its answer")?;
    server.expect_none().context("the keepalive that confirms it")?;
    server.expect(&first).context("what has waited for keys")?;
    ensure!(server.heard == [INITIATION, DATA, DATA] && client.heard == [RESPONSE], "{:?}", server.heard);

    exchange(&mut client, &mut server, 100)?;
    for _ in 0..2 {
        client.send(KEEPALIVE)?;
        server.expect_none()?;
        server.send(KEEPALIVE)?;
        client.expect_none()?;
    }

    let keys = (client.keys, server.keys);
    client.renew()?;
    server.expect_none().context("the second handshake")?;
    client.expect_none()?;
    server.expect_none()?;
    exchange(&mut client, &mut server, 200)?;
    ensure!(client.keys != keys.0 && server.keys != keys.1, "no new keys");
    ensure!(server.peer == before, "{} was {before}", server.peer);

    // As a phone that goes from one network to another: no handshake, and the service goes after it.
    let keys = (client.keys, server.keys);
    client.socket = UdpSocket::bind("127.0.0.3:0")?;
    client.socket.set_read_timeout(Some(PATIENCE))?;
    exchange(&mut client, &mut server, 300)?;
    ensure!((client.keys, server.keys) == keys, "other keys");
    ensure!(server.peer != before, "the service sees the client where it was: {before}");

    let tally = tally()?;
    ensure!(tally.flows == 2 && tally.dropped.total() == 0, "{tally:?}");
    for (passed, sent, received) in
        [(tally.to_service, client.sent, server.received), (tally.to_clients, server.sent, client.received)]
    {
        let passed = Amount { datagrams: passed.datagrams, bytes: passed.bytes };
        ensure!(passed == sent && sent == received, "{passed:?} of {sent:?}, {received:?} came");
    }
    forwarder.expect_no_panic()
}
