//! Has systemd taken up what a socket's file says? A run of bro that was killed may have written the file and done no more.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use super::InstalledPort;
use crate::address::{ExternalSocket, SocketPlace};
use crate::systemd::manager::{LiveAddress, SocketState, SystemdManager};

/// How a socket unit's state compares with its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It listens as the file says.
    TakenUp,
    /// The file has changed since systemd read it, but not in what the kernel's socket is made of.
    Unread,
    /// It does not listen, will not listen after the next boot, or listens otherwise.
    Deaf,
}

/// `unfinished` are the files that a run was working on when it was killed: their state is unknown.
pub(crate) async fn of(
    systemd: &SystemdManager,
    listener: &InstalledPort,
    unfinished: &[PathBuf],
) -> Standing {
    let unit = &listener.socket.name;
    if unfinished.contains(&listener.socket.file)
        || !systemd.is_active(unit).await
        || !systemd.is_enabled(unit).await
        || !systemd.live(unit).await.is_ok_and(|live| serves(listener, &live))
    {
        return Standing::Deaf;
    }
    if systemd.needs_reload(unit).await { Standing::Unread } else { Standing::TakenUp }
}

/// Is it what the file says? Where an administrator's drop-in has the last word, the file cannot tell.
fn serves(listener: &InstalledPort, live: &SocketState) -> bool {
    live.has_drop_ins
        || (listens_there(listener, live)
            && listener.backlog.is_none_or(|backlog| backlog == live.backlog)
            && listener.device.as_deref().unwrap_or_default() == live.device)
}

/// Does it listen everywhere where the file has its clients connect? It may also listen elsewhere.
pub(crate) fn listens_there(listener: &InstalledPort, live: &SocketState) -> bool {
    listener.external.sockets().all(|socket| live.listen.iter().any(|there| is_at(&socket, there)))
}

/// Is it this one, as systemd writes it?
fn is_at(socket: &ExternalSocket, live: &LiveAddress) -> bool {
    let written = &live.address;
    let any = |ip: IpAddr, port: u16| written.parse() == Ok(SocketAddr::new(ip, port));
    let same_place = match &socket.place {
        // Without IPv6 systemd takes IPv4.
        SocketPlace::Port(port) => {
            any(Ipv6Addr::UNSPECIFIED.into(), *port) || any(Ipv4Addr::UNSPECIFIED.into(), *port)
        }
        SocketPlace::Address(address) => written.parse() == Ok(*address),
        SocketPlace::Vsock(..) | SocketPlace::Path(_) | SocketPlace::Abstract(_) => {
            *written == socket.place.to_string()
        }
    };
    live.kind == Some(socket.kind) && same_place
}

#[cfg(test)]
mod tests {
    use bro_relay::listener::SocketKind;

    use super::*;
    use crate::installed::example::port;

    fn listener(address: &str) -> InstalledPort {
        port(address, None)
    }

    fn live(address: &str) -> SocketState {
        live_as(SocketKind::Stream, address)
    }

    fn live_as(kind: SocketKind, address: &str) -> SocketState {
        SocketState {
            listen: vec![LiveAddress { kind: Some(kind), address: address.into() }],
            backlog: 4096,
            device: String::new(),
            has_drop_ins: false,
        }
    }

    #[test]
    fn a_socket_of_another_address_or_make_is_not_what_the_file_says() {
        for (file, systemds) in [
            ("8080", "[::]:8080"),
            ("8080", "0.0.0.0:8080"),
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("[::1]:80", "[::1]:80"),
            ("/run/web.sock", "/run/web.sock"),
            ("@web", "@web"),
        ] {
            assert!(serves(&listener(file), &live(systemds)), "{file}");
            assert!(!serves(&listener(file), &live("[::]:9090")), "{file}");
        }
        let mut device = listener("80");
        device.device = Some("lo".into());
        assert!(!serves(&device, &live("[::]:80")));
        assert!(!serves(&listener("80"), &SocketState { device: "lo".into(), ..live("[::]:80") }));
        let mut backlog = listener("80");
        backlog.backlog = Some(5);
        assert!(!serves(&backlog, &live("[::]:80")));
        assert!(serves(&backlog, &SocketState { backlog: 5, ..live("[::]:80") }));
        let datagrams = live_as(SocketKind::Datagram, "[::]:53");
        assert!(serves(&listener("53/udp"), &datagrams) && !serves(&listener("53/udp"), &live("[::]:53")));
        // Every one of them has to be there.
        let both = SocketState { listen: [datagrams.listen, live("[::]:53").listen].concat(), ..live("") };
        assert!(serves(&listener("53/tcp+udp"), &both) && !serves(&listener("53-54"), &both));
        assert!(serves(&listener("vsock::7"), &live_as(SocketKind::Vsock, "vsock::7")));
        assert!(serves(&listener("seqpacket:/run/x"), &live_as(SocketKind::SeqPacket, "/run/x")));
        // A drop-in may change any of that.
        assert!(serves(&backlog, &SocketState { has_drop_ins: true, ..live("[::]:9090") }));
    }
}
