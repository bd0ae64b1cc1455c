//! Is an address free to listen on, and if not: which process has it?

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use bro_relay::listener::SocketKind;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr, bind, setsockopt, socket, sockopt,
};

use crate::address::{External, ExternalSocket, SocketPlace};
use crate::installed::{Installed, InstalledPort};
use crate::systemd::scope::RuntimeScope;

/// Why systemd cannot listen there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AddressTrouble {
    /// Another process listens already.
    Taken(AddressHolder),
    /// This user may not.
    Forbidden(String),
    /// There is a file, or something else that is no socket: systemd would remove it.
    InTheWay(String),
}

/// The process that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddressHolder {
    /// Of which kind the socket is.
    pub kind: SocketKind,
    /// The address, as systemd would write it.
    pub address: String,
    /// `nginx (pid 77, unit nginx.service)`; none when it is hidden from this user.
    pub process: Option<String>,
    /// It is a service manager, which holds it for some socket unit.
    pub is_systemd: bool,
    /// The socket's user, where the kernel's table says so.
    pub user: Option<u32>,
    /// The kernel's table shows it; the table leaves out what is bound and not connected.
    pub is_seen: bool,
}

impl AddressHolder {
    /// The address, for people.
    fn shown(&self) -> String {
        let udp = self.kind == SocketKind::Datagram && self.address.parse::<SocketAddr>().is_ok();
        format!("{}{}", self.address, if udp { "/udp" } else { "" })
    }

    /// Which process has the address, and where to see more; `unit` is the socket unit, if it is known.
    pub fn who(&self, unit: Option<&str>) -> String {
        let address = &self.shown();
        match (unit, &self.process, self.user) {
            (Some(unit), _, _) => format!("by {unit} at {address}"),
            (None, Some(process), _) if self.is_systemd => {
                format!("by a socket unit at {address}, held by {process}; see `systemctl list-sockets`")
            }
            (None, Some(process), _) => format!("by {process} at {address}"),
            (None, None, _) if !self.is_seen => format!(
                "by a process that has bound {address} and does not listen, so that its owner cannot be seen"
            ),
            (None, None, user) => {
                let name = |uid: u32| {
                    let known = nix::unistd::User::from_uid(uid.into()).ok().flatten();
                    known.map_or_else(|| format!("user {uid}"), |user| user.name)
                };
                format!(
                    "by a process of {}'s at {address}; see `sudo ss --listening --processes --numeric`",
                    user.map_or_else(|| "another user".to_owned(), name)
                )
            }
        }
    }
}

/// Tries whether systemd could listen at each socket of `external`, and says of the first at which it could not.
pub(crate) fn look(external: &External) -> Option<AddressTrouble> {
    external.sockets().find_map(|socket| look_at(&socket))
}

/// Tries whether systemd could listen there: bind(2) without listen(2), so that no client is ever let in.
pub(crate) fn look_at(socket: &ExternalSocket) -> Option<AddressTrouble> {
    if let SocketPlace::Path(path) = &socket.place
        && let Some(what) = in_the_way_at(path)
    {
        return Some(AddressTrouble::InTheWay(what));
    }
    let kind = socket.kind;
    let error = match &socket.place {
        SocketPlace::Port(port) => try_ip(kind, (Ipv6Addr::UNSPECIFIED, *port).into(), false)
            // Without IPv6 systemd takes IPv4.
            .or_else(|error| {
                if error == Errno::EAFNOSUPPORT {
                    try_ip(kind, (Ipv4Addr::UNSPECIFIED, *port).into(), true)
                } else {
                    Err(error)
                }
            }),
        SocketPlace::Address(address) => try_ip(kind, *address, true),
        SocketPlace::Abstract(name) => try_abstract(kind, name),
        // systemd removes everything at the path, also a socket with a listener.
        SocketPlace::Path(path) if socket_at_path(path).is_some() => Err(Errno::EADDRINUSE),
        // No table of vsock's is at hand that would say who has it.
        SocketPlace::Path(_) | SocketPlace::Vsock(..) => Ok(()),
    }
    .err()?;
    match error {
        Errno::EADDRINUSE => Some(AddressTrouble::Taken(holder(socket))),
        Errno::EACCES => Some(AddressTrouble::Forbidden(forbidden(socket))),
        // Any other error (of an address that is not there yet) is for systemd to report.
        _ => None,
    }
}

const fn socket_type(kind: SocketKind) -> SockType {
    match kind {
        SocketKind::Stream | SocketKind::Vsock => SockType::Stream,
        SocketKind::SeqPacket => SockType::SeqPacket,
        SocketKind::Datagram | SocketKind::UnixDatagram => SockType::Datagram,
    }
}

fn try_ip(kind: SocketKind, address: SocketAddr, v6_only: bool) -> nix::Result<()> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, socket_type(kind), SockFlag::SOCK_CLOEXEC, None)?;
    // With it two sockets for datagrams could have the port, and only one of them the datagrams.
    if kind != SocketKind::Datagram {
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    }
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &(v6_only && address.ip().is_unspecified()))?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))
}

fn try_abstract(kind: SocketKind, name: &str) -> nix::Result<()> {
    let socket = socket(AddressFamily::Unix, socket_type(kind), SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)
}

fn forbidden(socket: &ExternalSocket) -> String {
    let lowest = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap_or_default();
    let port = socket.place.port().unwrap_or_default();
    format!("an ordinary user may not listen on port {port}, only from {} on", lowest.trim())
}

/// What to do about a port on which an ordinary user may not listen.
pub(crate) fn instead(installed: &Installed, listener: &InstalledPort) -> String {
    let port = listener.external.ports().map_or(0, |ports| ports.first);
    let name = &installed.name;
    let sysctl = format!("`sudo sysctl net.ipv4.ip_unprivileged_port_start={port}`");
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
    match (&listener.internal, user) {
        // The container stays this user's; only the first port can be activated so, and others after it.
        (Some(target), Some(user)) if installed.scope == RuntimeScope::User && listener.service == *name => {
            format!(
                "choose another, or have the system listen for this user's container: `sudo bro activate {name} --system --run-as {} \
             --external-port {} --internal-port {target}`; or let every user listen there: {sysctl}",
                user.name, listener.external
            )
        }
        _ => format!("choose another, or let every user listen there: {sysctl}"),
    }
}

fn holder(socket: &ExternalSocket) -> AddressHolder {
    let kind = socket.kind;
    let Some(Socket { address, inode, user }) = found(socket) else {
        let address = socket.place.to_string();
        return AddressHolder { kind, address, process: None, is_systemd: false, user: None, is_seen: false };
    };
    let process = process_of(inode);
    AddressHolder {
        kind,
        address,
        is_systemd: process.as_ref().is_some_and(|(comm, _)| comm == "systemd"),
        process: process.map(|(comm, pid)| {
            let unit = unit_of(pid).map(|unit| format!(", {unit}")).unwrap_or_default();
            format!("{comm} (pid {pid}{unit})")
        }),
        user,
        is_seen: true,
    }
}

/// The inode number of the socket at this address.
pub(crate) fn inode_at(socket: &ExternalSocket) -> Option<u64> {
    found(socket).map(|socket| socket.inode)
}

/// How many clients wait at the TCP listener of that number to be accepted.
pub(crate) fn waiting(inode: u64) -> u32 {
    let text =
        ["/proc/net/tcp6", "/proc/net/tcp"].map(|table| std::fs::read_to_string(table).unwrap_or_default());
    let mut rows = text.iter().flat_map(|text| text.lines().skip(1).filter_map(row));
    rows.find(|row| row.inode == inode && row.listens).map_or(0, |row| row.waiting)
}

/// A socket that stands in the way.
#[derive(Debug)]
struct Socket {
    address: String,
    inode: u64,
    user: Option<u32>,
}

fn found(socket: &ExternalSocket) -> Option<Socket> {
    match &socket.place {
        SocketPlace::Path(path) => socket_at_path(path),
        SocketPlace::Abstract(name) => unix_socket(|bound| bound.strip_prefix('@') == Some(name)),
        SocketPlace::Port(port) => ip_socket(socket.kind, None, *port),
        SocketPlace::Address(address) => ip_socket(socket.kind, Some(address.ip()), address.port()),
        SocketPlace::Vsock(..) => None,
    }
}

/// The socket that stands in the way, at that address or any: a listener before a socket that has come of it, or has only bound the port.
fn ip_socket(kind: SocketKind, wanted: Option<IpAddr>, port: u16) -> Option<Socket> {
    let tables = if kind == SocketKind::Datagram {
        ["/proc/net/udp6", "/proc/net/udp"]
    } else {
        ["/proc/net/tcp6", "/proc/net/tcp"]
    };
    let mut best: Option<SocketRow> = None;
    for table in tables {
        let text = std::fs::read_to_string(table).unwrap_or_default();
        for row in text.lines().skip(1).filter_map(row) {
            // A socket that only waits for its time to pass has no owner.
            let is_it = row.inode != 0 && row.address.port() == port && in_the_way(wanted, row.address.ip());
            if is_it && best.is_none_or(|best| row.listens && !best.listens) {
                best = Some(row);
            }
        }
    }
    let SocketRow { address, inode, user, .. } = best?;
    Some(Socket { address: address.to_string(), inode, user: Some(user) })
}

fn in_the_way(wanted: Option<IpAddr>, other: IpAddr) -> bool {
    wanted.is_none_or(|ip| {
        ip == other
            || (other.is_unspecified() && (ip.is_ipv4() || other.is_ipv6()))
            || (ip.is_unspecified() && ip.is_ipv4() == other.is_ipv4())
    })
}

/// A line of /proc/net/tcp{,6} or udp{,6} (proc_net(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SocketRow {
    pub address: SocketAddr,
    /// Clients come there: it listens, or, of UDP, has no peer.
    pub listens: bool,
    /// How many bytes wait to be read; of a listener, how many clients to be accepted.
    pub waiting: u32,
    pub user: u32,
    pub inode: u64,
}

/// Reads one row.
pub(crate) fn row(line: &str) -> Option<SocketRow> {
    /// `TCP_LISTEN`, and `TCP_CLOSE`, which is the state of a UDP socket without a peer. Of a TCP socket the latter is in no table.
    const OPEN: [&str; 2] = ["0A", "07"];
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (ip, port) = fields.get(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of four bytes, each in this machine's order.
    let words: Vec<[u8; 4]> = (0..ip.len() / 8)
        .map(|word| u32::from_str_radix(ip.get(word * 8..word * 8 + 8)?, 16).ok().map(u32::to_ne_bytes))
        .collect::<Option<_>>()?;
    let ip: IpAddr = match words.as_slice() {
        [v4] => Ipv4Addr::from(*v4).into(),
        [_, _, _, _] => Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).ok()?).into(),
        _ => return None,
    };
    Some(SocketRow {
        address: SocketAddr::new(ip, port),
        listens: OPEN.contains(fields.get(3)?),
        waiting: u32::from_str_radix(fields.get(4)?.split_once(':')?.1, 16).ok()?,
        user: fields.get(7)?.parse().ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// What systemd would take away to listen at `path`, where that is nothing that it has left there itself.
fn in_the_way_at(path: &Path) -> Option<String> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    let kind = metadata.file_type();
    let what = if kind.is_socket() {
        return None;
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_file() {
        "a file"
    } else {
        "something that is no socket"
    };
    Some(format!(
        "there is {what} at {}, which systemd would remove to listen there; choose another path, or move it away",
        path.display()
    ))
}

/// The socket that is bound to this path, by whichever way to its directory it was bound.
fn socket_at_path(path: &Path) -> Option<Socket> {
    let place = |path: &Path| Some((path.parent()?.canonicalize().ok()?, path.file_name()?.to_owned()));
    let wanted = place(path);
    unix_socket(|bound| {
        let bound = Path::new(bound);
        bound == path
            || (bound.is_absolute()
                && bound.file_name() == path.file_name()
                && wanted.is_some()
                && place(bound) == wanted)
    })
}

/// The unix socket with a fitting name: the listener before its connections, which have its name.
fn unix_socket(fits: impl Fn(&str) -> bool) -> Option<Socket> {
    /// `__SO_ACCEPTCON`
    const LISTENS: &str = "00010000";
    let text = std::fs::read_to_string("/proc/net/unix").ok()?;
    let fitting = text.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let name = fields.get(7).filter(|name| fits(name))?;
        let socket = Socket { address: (*name).to_owned(), inode: fields.get(6)?.parse().ok()?, user: None };
        Some((*fields.get(3)? != LISTENS, socket))
    });
    fitting.min_by_key(|(connected, _)| *connected).map(|(_, socket)| socket)
}

/// Has the process of this directory in /proc the socket open?
///
/// # Errors
/// When that is hidden from this user.
pub(crate) fn holds(process: &Path, inode: u64) -> std::io::Result<bool> {
    let wanted = format!("socket:[{inode}]");
    let is_it = |path: &Path| std::fs::read_link(path).is_ok_and(|link| link.as_os_str() == wanted.as_str());
    Ok(std::fs::read_dir(process.join("fd"))?.flatten().any(|descriptor| is_it(&descriptor.path())))
}

/// Name and id of a process that has the socket open, as far as this user can see.
fn process_of(inode: u64) -> Option<(String, i32)> {
    let mut holders = Vec::new();
    for (pid, process) in bro_proc::processes() {
        if holds(&process, inode).unwrap_or(false) {
            let comm = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            holders.push((comm.trim().to_owned(), pid));
        }
    }
    // A service manager holds a socket for the service that it started with it; the manager is not the one to complain to.
    holders.sort_by_key(|(comm, pid)| (comm != "systemd", *pid));
    holders.into_iter().next()
}

/// The unit that a process belongs to, from its cgroup (systemd's naming).
fn unit_of(pid: i32) -> Option<String> {
    let path = bro_proc::cgroup::shown(Path::new(&format!("/proc/{pid}")))?;
    let unit = path.rsplit('/').find(|part| part.ends_with(".service") || part.ends_with(".scope"))?;
    (unit != "init.scope").then(|| format!("of {unit}"))
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt as _;

    use super::*;

    fn at(address: SocketAddr) -> External {
        address.to_string().parse().unwrap()
    }

    #[test]
    fn a_port_of_udp_is_another_than_that_of_tcp() {
        // At an address of its own, where no other test takes the port of TCP.
        let bound = std::net::UdpSocket::bind("127.0.0.3:0").unwrap();
        let address = bound.local_addr().unwrap();
        let udp = |text: String| format!("{text}/udp").parse().unwrap();
        for wanted in [udp(address.to_string()), udp(address.port().to_string())] {
            let Some(AddressTrouble::Taken(holder)) = look(&wanted) else { panic!("{wanted} is taken") };
            assert!(holder.is_seen && holder.who(None).ends_with(&format!("at {address}/udp")), "{holder:?}");
            assert!(holder.process.unwrap().contains(&format!("pid {}", std::process::id())));
        }
        assert_eq!(look(&udp(format!("127.0.0.2:{}", address.port()))), None);
        assert_eq!(look(&at(address)), None);
    }

    #[test]
    fn finds_this_process_as_the_owner() {
        let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listening.local_addr().unwrap();
        let Some(AddressTrouble::Taken(holder)) = look(&at(address)) else { panic!("{address} is taken") };
        assert_eq!(holder.address, address.to_string());
        assert!(
            holder.process.as_ref().unwrap().contains(&format!("pid {}", std::process::id())),
            "{holder:?}"
        );
        // The same port of every address is taken too; that of another address is not.
        assert!(matches!(look(&address.port().to_string().parse().unwrap()), Some(AddressTrouble::Taken(_))));
        assert_eq!(look(&at(([127, 0, 0, 2], address.port()).into())), None);
        drop(listening);
        assert_eq!(look(&at(address)), None);
    }

    #[test]
    fn finds_unix_sockets() {
        let name = format!("bro-taken-{}", std::process::id());
        let external = External::Abstract(SocketKind::Stream, name.clone());
        assert_eq!(look(&external), None);
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let listening = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
        let Some(AddressTrouble::Taken(holder)) = look(&external) else { panic!("{name} is taken") };
        assert!(holder.process.is_some());
        drop(listening);
    }

    #[test]
    fn a_path_is_the_same_by_another_way_and_no_file_is_given_away() {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("bro-taken-XXXXXX")).unwrap();
        let at = |name: &str| External::Path(SocketKind::Stream, folder.join(name));
        std::fs::create_dir(folder.join("run")).unwrap();
        std::os::unix::fs::symlink("run", folder.join("var-run")).unwrap();
        let listening = std::os::unix::net::UnixListener::bind(folder.join("run/x.sock")).unwrap();
        for way in ["run/x.sock", "var-run/x.sock"] {
            let Some(AddressTrouble::Taken(holder)) = look(&at(way)) else { panic!("{way} is taken") };
            // The address as it was bound: systemd is asked for that one.
            assert_eq!(holder.address, folder.join("run/x.sock").display().to_string());
        }
        drop(listening);
        // What is left of it is systemd's to remove.
        assert_eq!(look(&at("run/x.sock")), None);
        assert_eq!(look(&at("run/other.sock")), None);
        std::fs::write(folder.join("precious"), "x").unwrap();
        for (name, what) in [("precious", "a file"), ("run", "a directory"), ("var-run", "a symbolic link")] {
            let Some(AddressTrouble::InTheWay(why)) = look(&at(name)) else { panic!("{name} is in the way") };
            assert!(why.contains(what), "{why}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn reads_the_kernels_tables() {
        let line = "   1: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000002 00:00000000 00000000  1000        0 4711 1 0 100 0 0 10 0";
        let SocketRow { address, listens, waiting, user, inode } = row(line).unwrap();
        assert_eq!((listens, waiting, user, inode), (true, 2, 1000, 4711));
        assert_eq!(address.port(), 8080);
        #[cfg(target_endian = "little")]
        assert_eq!(address.ip(), Ipv6Addr::LOCALHOST);
        assert_eq!(row("nonsense"), None);
    }

    #[test]
    fn says_whose_it_is_as_far_as_it_is_known() {
        let holder = AddressHolder {
            kind: SocketKind::Stream,
            address: "127.0.0.1:80".into(),
            process: None,
            is_systemd: false,
            user: Some(0),
            is_seen: true,
        };
        assert!(holder.who(None).contains("a process of root's"), "{}", holder.who(None));
        assert_eq!(holder.who(Some("web.socket")), "by web.socket at 127.0.0.1:80");
        let unknown = AddressHolder { user: None, ..holder.clone() };
        assert!(unknown.who(None).starts_with("by a process of another user's at "), "{}", unknown.who(None));
        let unseen = AddressHolder { user: None, is_seen: false, ..holder };
        assert!(unseen.who(None).contains("does not listen"), "{}", unseen.who(None));
    }

    /// A socket that a process has only bound itself is not another user's; nor is one that is connected.
    #[test]
    fn a_socket_that_does_not_listen_is_not_another_users() {
        let bound = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(bound.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
        let name: nix::sys::socket::SockaddrIn = nix::sys::socket::getsockname(bound.as_raw_fd()).unwrap();
        let address = at(([127, 0, 0, 1], name.port()).into());
        let Some(AddressTrouble::Taken(holder)) = look(&address) else { panic!("{address} is taken") };
        assert!(!holder.is_seen && holder.who(None).contains("does not listen"), "{holder:?}");
        let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listening.local_addr().unwrap()).unwrap();
        let address = at(client.local_addr().unwrap());
        let Some(AddressTrouble::Taken(holder)) = look(&address) else { panic!("{address} is taken") };
        assert!(holder.process.unwrap().contains(&format!("pid {}", std::process::id())));
    }
}
