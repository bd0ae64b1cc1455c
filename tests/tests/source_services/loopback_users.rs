//! A broker whose user `guest` may connect from loopback alone, as RabbitMQ has it (`loopback_users`).

use std::net::Ipv6Addr;

use anyhow::{Result, ensure};
use bro_tests::peers::{Address, Conn, Listener};
use bro_tests::tier::{Need, met};

use super::{EVERYBODY, INSIDE, Stand, host, relays, seen};

/// Stands for RabbitMQ, which needs Erlang and some seconds. What is loopback is as in its `rabbit_net:is_loopback/1`; the protocol is
/// one line each way.
const BROKER: &str = r"import ipaddress, socket, sys
LOOPBACK = [ipaddress.ip_network(network) for network in ('127.0.0.0/8', '::1/128', '::ffff:127.0.0.0/104')]
listener = socket.create_server(('::', int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    client, (address, *_) = listener.accept()
    user = client.makefile().readline().strip()
    local = any(ipaddress.ip_address(address) in network for network in LOOPBACK)
    said = 'refused' if user == 'guest' and not local else 'granted'
    client.sendall(f'{said} {address}\n'.encode())
    client.close()
";

/// What the broker says to a user who connects from there.
fn log_in(stand: &Stand, front: &Listener, who: Option<usize>, user: &str) -> Result<String> {
    let to = format!("{}:{}", host(who), super::port(front));
    let place = who.map_or(&stand.street.namespace, |nth| &stand.strangers[nth]);
    let client = Conn::new(place, &Address::Tcp(to.parse()?))?;
    client.send(format!("{user}\n").as_bytes())?;
    Ok(String::from_utf8(client.read_to_end()?.0)?.trim().to_owned())
}

/// As whom the broker sees a client at its listener of both families: by IPv4, or by IPv6.
fn seen_by(target: &str, who: Option<usize>) -> String {
    let v4 = seen(who);
    match (target.starts_with('['), who) {
        (false, _) => format!("::ffff:{v4}"),
        (true, None) => "fd62:726f::2".into(),
        // RFC 6052.
        (true, Some(nth)) => {
            Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0x0a42, 0x0102 + 0x100 * nth as u16).to_string()
        }
    }
}

#[test]
fn loopback_users_are_refused_from_outside() -> Result<()> {
    let needs = [Need::Root, Need::Program("python3", "python3"), Need::Program("ip", "iproute2")];
    if !met("loopback_users_are_refused_from_outside", &needs) {
        return Ok(());
    }
    let mut stand = Stand::new()?;
    let program = stand.scratch.join("broker.py");
    std::fs::write(&program, BROKER)?;
    let words = ["python3".into(), program.display().to_string(), INSIDE.to_string()];
    stand.serve(None, &words)?;
    let (v4, v6) = (format!("127.0.0.1:{INSIDE}"), format!("[::1]:{INSIDE}"));
    let ways = relays().into_iter().map(|relay| (relay, &v4)).chain([(&["--relay=splice"][..], &v6)]);
    for (relay, target) in ways {
        let (front, forwarder) = stand.forward_to(target, relay)?;
        for who in EVERYBODY {
            let address = seen_by(target, who);
            for (user, wanted) in [("guest", "refused"), ("member", "granted")] {
                let said = log_in(&stand, &front, who, user)?;
                ensure!(said == format!("{wanted} {address}"), "{relay:?} {who:?} {user}: {said}");
            }
        }
        forwarder.stop()?;
    }
    // It does trust its own host, and that is what is granted by name.
    for target in [&v4, &v6] {
        let (front, forwarder) = stand.forward_to(target, &["--source=loopback"])?;
        let said = log_in(&stand, &front, Some(0), "guest")?;
        ensure!(said.starts_with("granted "), "{target}: {said}");
        forwarder.stop()?;
    }
    Ok(())
}
