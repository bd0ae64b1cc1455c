//! Does the service listen where its clients are connected to?

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bro_relay::netns::identity::{self, Identity};
use bro_relay::netns::wire::Address;
use bro_relay::target::Target;
use nix::errno::Errno;
use nix::libc;

use super::podman::{self, PodmanAnswer};
use super::{Check, direct};
use crate::installed::{Adoption, Installed, InstalledPort, Mode};
use crate::netns::agent_process::SpareAgent;
use crate::netns::sock_diag::{ListeningSocket, Table};
use crate::netns::{self, Namespace, NetnsRef};
use crate::podman::container;
use crate::systemd::manager::SystemdManager;
use crate::systemd::scope::RuntimeScope;

pub(super) const NAME: &str = "listens";

/// `bus` is the container's service manager, if it answers; `container` is the quadlet's own name.
pub(super) async fn check(
    installed: &Installed,
    listener: &InstalledPort,
    container: Option<&str>,
    bus: Option<&SystemdManager>,
) -> Check {
    let forwarder = match &installed.mode {
        // An adopted service's own socket listens on, for clients inside.
        Mode::Forward(forwarder) | Mode::Adopt(Adoption { forwarder, .. }) => forwarder,
        Mode::Direct(takeover) => return direct::check(installed, takeover.way, listener, container).await,
    };
    let Some(internal) = &listener.internal else {
        return Check::bad(
            NAME,
            format!("{} does not say where the service listens", listener.socket.name),
            lead_to(installed, listener, "PORT"),
        );
    };
    let Some(container) = &forwarder.container else {
        return Check::ok(NAME, format!("{internal} is in no container of its own, so it was not checked"));
    };
    let pid = match running(installed, container) {
        Some(pid) => pid,
        None if is_active(installed, bus).await => match podmans(installed, container).await {
            Ok(pid) => pid,
            Err(check) => return check,
        },
        None => {
            return Check::ok(
                NAME,
                format!("{container} is asleep, so {internal} was not checked (--wake looks)"),
            );
        }
    };
    if let Some(bus) = bus
        && bus.is_frozen(&installed.unit).await.unwrap_or(false)
    {
        return Check::ok(
            NAME,
            format!(
                "{container} is frozen, so {internal} was not checked; the next client has it go on (--wake looks)"
            ),
        );
    }
    if is_paused(pid) {
        return Check::bad(
            NAME,
            format!("{container} is paused, so nothing answers at {internal}"),
            format!("`podman unpause {container}`"),
        );
    }
    let wish = forwarder.options.unix_identity();
    match internal.first() {
        Target::Tcp { .. } | Target::Udp { .. } => ip(installed, listener, container, pid).await,
        Target::Datagrams(_) => Check::ok(NAME, format!("{internal} takes datagrams, so it was not checked")),
        Target::Unix(_) | Target::Abstract(_) if listener.takes_datagrams() => {
            Check::ok(NAME, format!("{internal} takes datagrams, so it was not checked"))
        }
        Target::Unix(path) => unix(installed, container, pid, Address::Inside(path.clone()), wish).await,
        Target::Abstract(name) => {
            unix(installed, container, pid, Address::Abstract(name.clone().into_bytes()), wish).await
        }
    }
}

/// Does the kernel's table have what clients are led to: something that listens, or has a socket for datagrams?
async fn ip(installed: &Installed, listener: &InstalledPort, container: &str, pid: i32) -> Check {
    let targets = listener.targets();
    let (datagrams, streams): (Vec<&Target>, Vec<&Target>) =
        targets.iter().partition(|target| matches!(target, Target::Udp { .. }));
    let mut there = Vec::new();
    for (targets, verb) in [(streams, "listens"), (datagrams, "takes datagrams")] {
        let (Some(first), Some(last)) = (targets.first(), targets.last()) else { continue };
        let wanted: Option<Vec<SocketAddr>> = targets.iter().map(|target| address(target)).collect();
        let Some(wanted) = wanted else {
            return Check::ok(NAME, format!("{first} has a name, so it was not checked"));
        };
        let found = match verb {
            "listens" => listeners(pid).await,
            _ => datagram_sockets(pid).await,
        };
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                return Check::bad(
                    NAME,
                    format!("cannot look into {container}: {error:#}"),
                    "see `bro doctor`",
                );
            }
        };
        let served = |address: &&SocketAddr| found.iter().any(|socket| socket.serves(**address));
        match wanted.iter().filter(served).count() {
            0 => return nothing(installed, listener, (container, verb), first, &found),
            all if all == wanted.len() && all == 1 => there.push(format!("{verb} at {first}")),
            // A service may open the ports of a range as it needs them.
            some => there.push(format!("{verb} at {some} of {} ports from {first} to {last}", wanted.len())),
        }
    }
    Check::ok(NAME, format!("{container} {}", there.join(" and ")))
}

/// The check of a port where nothing is.
fn nothing(
    installed: &Installed,
    listener: &InstalledPort,
    (container, verb): (&str, &str),
    target: &Target,
    found: &[ListeningSocket],
) -> Check {
    let port = address(target).map_or(0, |address| address.port());
    let (there, fix) = match nearest(found, port) {
        None => (format!("nothing {verb} there at all"), "see the service's own log".to_owned()),
        Some(best) => (
            format!("it {verb} at {}", written(found)),
            format!("`{}`, or change the service", lead_to(installed, listener, &internal_port(best))),
        ),
    };
    Check::bad(NAME, format!("nothing {verb} at {target} in {container}; {there}"), fix)
}

/// The address of a target that is no name.
fn address(target: &Target) -> Option<SocketAddr> {
    let (Target::Tcp { host, port } | Target::Udp { host, port }) = target else { return None };
    let ip = if host == "localhost" { Some(Ipv4Addr::LOCALHOST.into()) } else { host.parse().ok() };
    ip.map(|ip: IpAddr| SocketAddr::new(ip, *port))
}

/// Does the unix socket take a connection of the user that the forwarder connects as?
async fn unix(installed: &Installed, container: &str, pid: i32, address: Address, wish: Identity) -> Check {
    let at = match &address {
        Address::Inside(path) | Address::Unix(path) => path.display().to_string(),
        Address::Abstract(name) => format!("@{}", String::from_utf8_lossy(name)),
        Address::Tcp(address) => address.to_string(),
        Address::Udp(address) => format!("{address}/udp"),
        Address::Datagrams(_) => return Check::ok(NAME, "it takes datagrams, so it was not checked"),
    };
    let connecting = async {
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = libc::O_PATH | libc::O_DIRECTORY;
        let mut opening = std::fs::OpenOptions::new();
        let root = opening.read(true).custom_flags(path).open(format!("/proc/{pid}/root"))?;
        let netns = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
        let process = netns::folder_of(pid.unsigned_abs())?;
        let namespace =
            Namespace::enter(netns.into(), process, Some(root.into()), wish, &SpareAgent::default()).await?;
        anyhow::Ok(namespace.dial(address).await?)
    };
    match connecting.await {
        Ok(Ok(_)) => {
            Check::ok(NAME, format!("{container} listens at {at}, and lets the forwarder's clients in"))
        }
        Ok(Err(Errno::EACCES)) => Check::bad(
            NAME,
            format!(
                "{container} does not let the user in at {at} as whom the forwarder connects (--unix-identity={wish})"
            ),
            format!(
                "open the socket and the folders above it to that user, or `{} {} --unix-identity=UID:GID`",
                activate(installed),
                installed.name
            ),
        ),
        Ok(Err(errno)) => Check::bad(
            NAME,
            format!("nothing listens at {at} in {container}: {}", errno.desc()),
            "see the service's own log",
        ),
        Err(error) => {
            let sentence = error
                .downcast_ref::<std::io::Error>()
                .and_then(|error| identity::refusal(bro_relay::sys::errno_of(error), wish));
            let finding = sentence.unwrap_or_else(|| format!("cannot look into {container}: {error:#}"));
            Check::bad(NAME, finding, "see `bro doctor`")
        }
    }
}

/// The container's process, found without Podman.
pub(super) fn running(installed: &Installed, container: &str) -> Option<i32> {
    match &installed.run_as {
        Some(owner) => container::running_of(owner, container),
        None => container::running(container),
    }
}

async fn is_active(installed: &Installed, bus: Option<&SystemdManager>) -> bool {
    match bus {
        Some(bus) => bus.active_state(&installed.unit).await.is_ok_and(|state| state == "active"),
        None => false,
    }
}

/// The unit is active, and no container of that name shows: what Podman says.
async fn podmans(installed: &Installed, container: &str) -> Result<i32, Check> {
    let (unit, owner) = (&installed.unit, installed.run_as.as_ref());
    let inspect = ["container", "inspect", "--format", "{{.State.Pid}}", "--", container];
    let answer = podman::ask(owner, &inspect).await;
    if let PodmanAnswer::Yes(pid) = &answer
        && let Some(pid) = pid.parse().ok().filter(|pid| *pid > 0)
    {
        return Ok(pid);
    }
    let take = |other: &str| format!("`{} {} --container {other}`", activate(installed), installed.name);
    let mend = format!("`podman ps` shows the names; {} takes another", take("NAME"));
    if let Some(trouble) = answer.trouble() {
        return Err(Check::bad(
            NAME,
            format!("{unit} is active, no container {container} is seen, and {trouble}"),
            mend,
        ));
    }
    let names = match podman::ask(owner, &["ps", "--format", "{{.Names}}"]).await {
        PodmanAnswer::Yes(names) => names,
        _ => String::new(),
    };
    let names: Vec<&str> = names.lines().filter(|name| !name.is_empty()).collect();
    let others = if names.is_empty() { String::new() } else { format!("; there run {}", names.join(", ")) };
    let mend = match names[..] {
        [only] => format!("{} takes that one", take(only)),
        _ => mend,
    };
    Err(Check::bad(
        NAME,
        format!("{unit} is active, and no container {container} runs, so no client is connected{others}"),
        mend,
    ))
}

/// `podman pause` freezes the container's cgroup (cgroup.events of version 2).
pub(super) fn is_paused(pid: i32) -> bool {
    let cgroup = bro_proc::cgroup::of_process(pid.unsigned_abs());
    let events = cgroup.and_then(|cgroup| std::fs::read_to_string(cgroup.join("cgroup.events")));
    events.is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
}

/// All listeners in the container's network namespace.
pub(super) async fn listeners(pid: i32) -> anyhow::Result<Vec<ListeningSocket>> {
    Ok(table(pid).await?.listeners()?)
}

/// All sockets there that take any client's datagrams of UDP.
pub(super) async fn datagram_sockets(pid: i32) -> anyhow::Result<Vec<ListeningSocket>> {
    Ok(table(pid).await?.datagram_sockets()?)
}

async fn table(pid: i32) -> anyhow::Result<Table> {
    let netns = OwnedFd::from(std::fs::File::open(format!("/proc/{pid}/ns/net"))?);
    let place = NetnsRef::Entered(Arc::new(Namespace::look_into(netns).await?));
    Ok(Table::open(&place).await?)
}

/// Their addresses.
pub(super) fn written(found: &[ListeningSocket]) -> String {
    let mut all: Vec<String> = found.iter().map(|listening| listening.address.to_string()).collect();
    all.sort();
    all.dedup();
    all.join(", ")
}

/// The listener that is most likely meant: at the same port, else the first.
fn nearest(found: &[ListeningSocket], port: u16) -> Option<ListeningSocket> {
    let by = |listening: &ListeningSocket| (listening.address.port() != port, listening.address.to_string());
    found.iter().copied().min_by_key(by)
}

/// The `--internal-port` that leads clients to this listener: a port alone means 127.0.0.1.
fn internal_port(listening: ListeningSocket) -> String {
    let port = listening.address.port();
    if listening.serves((Ipv4Addr::LOCALHOST, port).into()) {
        return port.to_string();
    }
    match listening.address.ip() {
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port).to_string()
        }
        IpAddr::V6(ip) => SocketAddr::new(ip.to_canonical(), port).to_string(),
        IpAddr::V4(_) => listening.address.to_string(),
    }
}

/// `bro activate`, with sudo where it is needed.
pub(super) fn activate(installed: &Installed) -> &'static str {
    if installed.scope == RuntimeScope::System && !nix::unistd::geteuid().is_root() {
        "sudo bro activate"
    } else {
        "bro activate"
    }
}

/// The command line that leads this port's clients to another address of the service.
fn lead_to(installed: &Installed, listener: &InstalledPort, internal: &str) -> String {
    format!("{} --internal-port {internal}", anew(installed, listener))
}

/// The command line that activates this port as before.
pub(super) fn anew(installed: &Installed, listener: &InstalledPort) -> String {
    let service = service_name(installed, listener);
    format!("{} {}{service} --external-port {}", activate(installed), installed.name, listener.external)
}

/// The option that names a port; without it, the first one is meant.
pub(super) fn service_name(installed: &Installed, listener: &InstalledPort) -> String {
    match &listener.service {
        service if *service == installed.name => String::new(),
        service => format!(" --service-name {service}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::installed::example;

    fn listening(address: &str, v6_only: bool) -> ListeningSocket {
        ListeningSocket { address: address.parse().unwrap(), v6_only, group: None }
    }

    #[test]
    fn the_way_to_mend_a_port_is_that_ports() {
        let mut listener = example::port("8080", Some("127.0.0.1:80"));
        let installed = example::forwarded(None, &[]);
        assert_eq!(
            lead_to(&installed, &listener, "81"),
            "bro activate web --external-port 8080 --internal-port 81"
        );
        listener.service = "metrics".into();
        assert_eq!(
            lead_to(&installed, &listener, "[::1]:81"),
            "bro activate web --service-name metrics --external-port 8080 --internal-port [::1]:81"
        );
    }

    #[test]
    fn what_is_advised_leads_to_who_listens() {
        for (address, v6_only, advised) in [
            ("127.0.0.1:81", false, "81"),
            ("0.0.0.0:81", false, "81"),
            ("[::]:81", false, "81"),
            ("[::]:81", true, "[::1]:81"),
            ("[::1]:81", false, "[::1]:81"),
            ("10.88.0.5:80", false, "10.88.0.5:80"),
            ("127.0.0.2:80", false, "127.0.0.2:80"),
            ("[::ffff:10.1.2.3]:80", false, "10.1.2.3:80"),
            ("[fd00::2]:80", false, "[fd00::2]:80"),
        ] {
            let there = listening(address, v6_only);
            assert_eq!(internal_port(there), advised, "{address}");
            let target: SocketAddr =
                advised.parse().unwrap_or_else(|_| (Ipv4Addr::LOCALHOST, advised.parse().unwrap()).into());
            assert!(there.serves(target), "{address}");
            assert!(advised.parse::<crate::address::Internal>().is_ok(), "{advised}");
        }
    }

    #[test]
    fn the_same_port_elsewhere_is_nearer_than_another() {
        let found = [listening("127.0.0.1:22", false), listening("[::1]:80", false)];
        assert_eq!(nearest(&found, 80), Some(found[1]));
        assert_eq!(nearest(&found, 81), Some(found[0]));
        assert_eq!(nearest(&[], 81), None);
    }
}
