//! NAME-activator.socket, or NAME.socket with `--direct`: systemd.socket(5).

use std::fmt::Write as _;
use std::path::Path;

use bro_relay::listener::SocketKind;

use crate::address::External;
use crate::adopt::Adopt;
use crate::installed::{Installed, InstalledPort, Mode, SECTION, SocketFence, SocketNames};
use crate::systemd::unit_file::quote_word;

pub(super) fn text(installed: &Installed, listener: &InstalledPort, root: Option<&Path>) -> String {
    let mut text = super::heading(installed, Some(&listener.socket.name));
    let unit = &installed.unit;
    let wakes = installed.runner();
    // Writing to a String cannot fail.
    write!(text, "[Unit]\nDescription=Clients of {unit} at {}\n", listener.external).ok();
    if let Some(timer) = installed.timer().filter(|_| installed.kept_awake().is_some())
        && listener.service == installed.name
    {
        writeln!(text, "# The forwarder is started at the times of --keep-awake too.\nWants={timer}").ok();
    }
    text.push_str("\n[Socket]\n");
    if let Some(SocketFence { program, told: SocketNames { this_host, ports } }) = &listener.fence {
        let program = quote_word(&program.display().to_string());
        text.push_str("# What is in the container leads a socket of this one nowhere else. Without that it does not listen.\n");
        if *this_host {
            text.push_str("# Clients of this host are not clients of the container's own: as behind a forwarder it sees them by 169.254.1.2 or fd62:726f::2.\n");
        }
        if !ports.is_empty() {
            text.push_str("# The service sees the port that it listens at inside.\n");
        }
        let this_host = if *this_host { " --this-host" } else { "" };
        let ports: String =
            ports.iter().map(|(outside, inside)| format!(" --port={outside}:{inside}")).collect();
        writeln!(text, "ExecStartPre={program} fence{this_host}{ports}").ok();
    }
    for line in listening(listener) {
        writeln!(text, "{line}").ok();
    }
    writeln!(text, "FileDescriptorName={}\nService={wakes}", listener.service).ok();
    if let Some(backlog) = listener.backlog {
        writeln!(text, "Backlog={backlog}").ok();
    }
    if let Some(device) = &listener.device {
        writeln!(text, "BindToDevice={device}").ok();
    }
    text.push_str(
        "# However often clients come: no limit is to end the listening.\nTriggerLimitIntervalSec=0\n",
    );
    let what = installed.adoption().map_or(Adopt::Off, |adoption| adoption.what);
    if what.offers(SocketKind::Datagram) && listener.external.is_udp() {
        text.push_str("# The kernel notes where a datagram came in as it comes: the service finds that beside the first one too.\nPassPacketInfo=yes\n");
    }
    let direct = match installed.mode {
        Mode::Direct(_) => true,
        Mode::Forward(_) | Mode::Adopt(_) => false,
    };
    if direct {
        // Else systemd would start the service for them again and again, at once, and never tell them.
        text.push_str("# Whom a service that has ended did not accept is told so: the connection is closed.\nFlushPending=yes\n");
    }
    text.push_str("\n[Install]\nWantedBy=sockets.target\n\n");
    writeln!(text, "[{SECTION}]\nName={}\nExternal={}", installed.name, listener.external).ok();
    if let Some(target) = &listener.internal {
        writeln!(text, "Internal={target}").ok();
    }
    if direct && listener.service == installed.name {
        for (key, value) in super::notes(installed, root) {
            writeln!(text, "{key}={value}").ok();
        }
    }
    text
}

/// Where, and what goes with it.
fn listening(listener: &InstalledPort) -> Vec<String> {
    let external = &listener.external;
    let listen = external.sockets().map(|socket| {
        let directive = match socket.kind {
            SocketKind::Stream | SocketKind::Vsock => "ListenStream",
            SocketKind::SeqPacket => "ListenSequentialPacket",
            SocketKind::Datagram | SocketKind::UnixDatagram => "ListenDatagram",
        };
        format!("{directive}={}", socket.place)
    });
    let mut lines: Vec<String> = listen.collect();
    let mut say = |line: &str| lines.push(line.to_owned());
    match external {
        // By default sysctl net.ipv6.bindv6only decides whether IPv4 clients are served too.
        External::Ports(_) => say("BindIPv6Only=both"),
        External::At(..) | External::Vsock { .. } | External::Path(..) | External::Abstract(..) => {}
    }
    // systemd would complain of each socket for datagrams, which cannot have it.
    if external.is_tcp() && !external.is_udp() {
        say("NoDelay=yes");
    }
    match external {
        External::At(ip, _) if ip.is_ipv6() && ip.is_unspecified() => say("BindIPv6Only=ipv6-only"),
        External::At(ip, _) if !ip.is_unspecified() && !ip.is_loopback() => {
            say("# The address may come later than the sockets do at boot.");
            say("FreeBind=yes");
        }
        External::Path(..) => say("RemoveOnStop=yes"),
        External::Ports(_) | External::At(..) | External::Vsock { .. } | External::Abstract(..) => {}
    }
    lines
}
