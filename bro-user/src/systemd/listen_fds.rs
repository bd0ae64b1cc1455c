//! The listening sockets: those that systemd passed (sd_listen_fds(3)), or those that `--listen` asks for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use anyhow::{Context as _, bail};
use bro_relay::engine::datagrams;
use bro_relay::listener::{Listener, SocketKind};
use bro_relay::sys;
use bro_relay::target::{self, Target};
use nix::sys::socket;
use nix::sys::socket::{AddressFamily, SockType, SockaddrStorage, sockopt};

use crate::adopt::Adopt;
use crate::exit::Failure;

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START`).
pub const FIRST: RawFd = 3;

/// More sockets than any unit passes; a higher count is a broken environment.
const MOST: RawFd = 1024;

/// The backlog of a socket of our own, the same as systemd's default (`SOMAXCONN`, cut by net.core.somaxconn).
const BACKLOG: i32 = 4096;

/// `--listen [NAME=]ADDR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenSpec {
    name: Option<String>,
    target: Target,
}

/// Reads `--listen`. A port alone listens on every address, as in a socket unit; a name in front is what --target names.
///
/// # Errors
/// When the address is not one.
pub fn parse_listen(text: &str) -> Result<ListenSpec, target::InvalidTarget> {
    let (name, address) = match text.split_once('=') {
        Some((name, rest)) if !name.is_empty() && !name.contains(['/', ':', '[', '@']) => {
            (Some(name.to_owned()), rest)
        }
        _ => (None, text),
    };
    let is_path = address.starts_with(['/', '@']);
    let (of_inet, udp) = match address.strip_suffix("/udp").filter(|_| !is_path) {
        Some(address) => (address, true),
        None => (address, false),
    };
    let inet = |host, port| if udp { Target::Udp { host, port } } else { Target::Tcp { host, port } };
    // Port 0 is no target, but it is an address to listen on: the kernel chooses.
    if let Some((host, "0")) = of_inet.rsplit_once(':') {
        let Target::Tcp { host, .. } = format!("{host}:1").parse()? else {
            return Err(target::InvalidTarget::Host(text.into()));
        };
        return Ok(ListenSpec { name, target: inet(host, 0) });
    }
    let target = match of_inet.parse::<u16>() {
        Ok(port) => inet("::".into(), port),
        Err(_) => address.parse()?,
    };
    Ok(ListenSpec { name, target })
}

/// What sd_listen_fds(3) reads, as it stands in the environment.
#[derive(Debug, Default)]
pub struct Environment {
    /// `LISTEN_PID`
    pub pid: Option<String>,
    /// `LISTEN_FDS`
    pub fds: Option<String>,
    /// `LISTEN_FDNAMES`
    pub names: Option<String>,
}

impl Environment {
    /// Reads the three variables, and leaves them for the command that this process becomes.
    #[must_use]
    pub fn read() -> Self {
        let read = |name| std::env::var(name).ok();
        Self { pid: read("LISTEN_PID"), fds: read("LISTEN_FDS"), names: read("LISTEN_FDNAMES") }
    }

    /// Takes the three variables out of the environment, so that no child takes bro's sockets for its own.
    #[must_use]
    pub fn take() -> Self {
        let taken = Self::read();
        sys::unset_environment(&["LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"]);
        taken
    }

    /// The name of each passed descriptor, in order: empty when nothing was passed to this process.
    ///
    /// # Errors
    /// When the variables contradict each other, or name another process.
    pub fn passed_to(&self, me: u32) -> Result<Vec<String>, Failure> {
        self.passed(Some(me))
    }

    /// As above; without `me`, a predecessor has passed them to the process that it started.
    fn passed(&self, me: Option<u32>) -> Result<Vec<String>, Failure> {
        let Some(fds) = &self.fds else { return Ok(Vec::new()) };
        let count: RawFd = match fds.parse() {
            Ok(count) if (0..=MOST).contains(&count) => count,
            _ => {
                return Err(Failure::NoSocket(format!(
                    "LISTEN_FDS is “{fds}”, not a number of sockets up to {MOST}"
                )));
            }
        };
        let Some(me) = me else { return self.names_of(count) };
        let Some(pid) = &self.pid else {
            return Err(Failure::NoSocket(
                "LISTEN_FDS is set without LISTEN_PID, so the sockets are not known to be ours".into(),
            ));
        };
        if pid.parse() != Ok(me) {
            return Err(Failure::NoSocket(format!(
                "LISTEN_PID is {pid}, and this is process {me}: the sockets were passed to another process (a wrapper \
                 that forks, such as `podman unshare`, loses them; start bro directly)"
            )));
        }
        self.names_of(count)
    }

    /// A name for each of `count` descriptors, as sd_listen_fds_with_names(3) has it: all of them are named, or none.
    fn names_of(&self, count: RawFd) -> Result<Vec<String>, Failure> {
        let count = usize::try_from(count).unwrap_or_default();
        let Some(names) = self.names.as_ref().filter(|_| count > 0) else {
            return Ok(vec!["unknown".to_owned(); count]);
        };
        let named: Vec<String> = names.split(':').map(str::to_owned).collect();
        if named.len() == count {
            return Ok(named);
        }
        Err(Failure::NoSocket(format!(
            "LISTEN_FDNAMES is “{names}”, which is {} for the {count} of LISTEN_FDS, so it is not known which socket is which",
            if named.len() == 1 { "one name".to_owned() } else { format!("{} names", named.len()) }
        )))
    }
}

/// The process that passed the sockets; it decides whether `LISTEN_PID` has to name this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// The service manager, which knows this process's number.
    Systemd,
    /// The predecessor of a reload, which does not know it.
    Predecessor,
}

/// A descriptor that systemd passed.
#[derive(Debug)]
pub struct Passed {
    descriptor: OwnedFd,
    number: RawFd,
    name: String,
}

impl Passed {
    /// Its FileDescriptorName=, or that of a stored one (FDNAME=).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor alone, close-on-exec from now on.
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn into_descriptor(self) -> nix::Result<OwnedFd> {
        use nix::fcntl::{FcntlArg, FdFlag, fcntl};
        let _zero = fcntl(&self.descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        Ok(self.descriptor)
    }
}

/// Takes what systemd passed to this process. To be called before anything else is opened: a number that is announced but not open
/// would go to a file of bro's own.
///
/// # Errors
/// When the environment is contradictory, or announces a descriptor that is not open.
pub fn take_passed(from: From) -> Result<Vec<Passed>, Failure> {
    let names = Environment::take().passed((from == From::Systemd).then(std::process::id))?;
    let adopt = |(number, name): (RawFd, String)| match sys::adopt(number) {
        Ok(descriptor) => Ok(Passed { descriptor, number, name }),
        Err(error) => Err(Failure::NoSocket(format!(
            "descriptor {number} ({name}) was announced in LISTEN_FDS but is not open: {error}"
        ))),
    };
    // All are checked before one is dropped because of another's error.
    let adopted: Vec<Result<Passed, Failure>> = (FIRST..).zip(names).map(adopt).collect();
    adopted.into_iter().collect()
}

/// The sockets to accept from: those passed, which a service may have too as far as `adopt` says so, and those of `--listen`.
///
/// # Errors
/// None at all, or one that is no listening stream socket.
pub fn listeners(passed: Vec<Passed>, specs: &[ListenSpec], adopt: Adopt) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::with_capacity(passed.len() + specs.len());
    for passed in passed {
        listeners.push(inherited(passed, adopt)?);
    }
    for spec in specs {
        listeners.push(bind(spec)?);
    }
    if listeners.is_empty() {
        bail!(Failure::NoSocket(
            "no socket was passed: start bro from a .socket unit (see systemd.socket(5)), by `systemd-socket-activate -l \
             PORT bro forward …`, or give --listen ADDR"
                .into()
        ));
    }
    Ok(listeners)
}

fn inherited(passed: Passed, adopt: Adopt) -> anyhow::Result<Listener> {
    let Passed { descriptor: socket, number, name } = passed;
    let refuse = |why: String| Failure::NoSocket(format!("descriptor {number} ({name}) {why}"));
    let kind =
        socket::getsockopt(&socket, sockopt::SockType).map_err(|_| refuse("is not a socket".into()))?;
    if kind == SockType::Datagram {
        return for_datagrams(socket, name.clone(), adopt, &refuse);
    }
    if !matches!(kind, SockType::Stream | SockType::SeqPacket) {
        bail!(refuse(format!(
            "is of type {kind:?}: use ListenStream= with a TCP, unix or vsock address, ListenSequentialPacket= with a unix one, or ListenDatagram= with a UDP \
             or unix address"
        )));
    }
    if !socket::getsockopt(&socket, sockopt::AcceptConn)? {
        bail!(refuse(
            "does not listen: set Accept=no in the .socket unit, so that bro gets the listening socket"
                .into()
        ));
    }
    let address: SockaddrStorage = socket::getsockname(socket.as_raw_fd())?;
    let kind = match (socket::SockaddrLike::family(&address), kind) {
        (Some(AddressFamily::Unix), SockType::SeqPacket) => SocketKind::SeqPacket,
        (Some(AddressFamily::Inet | AddressFamily::Inet6 | AddressFamily::Unix), SockType::Stream) => {
            SocketKind::Stream
        }
        (Some(AddressFamily::Vsock), SockType::Stream) => SocketKind::Vsock,
        (Some(AddressFamily::Vsock), _) => bail!(refuse(
            "takes messages over vsock: bro forwards its streams (ListenStream=vsock:CID:PORT), and messages of unix sockets"
                .into()
        )),
        (family, _) => bail!(refuse(format!(
            "is of family {family:?}: bro forwards TCP over IPv4 or IPv6, and unix and vsock streams"
        ))),
    };
    let listener = if adopt.offers(kind) { Listener::shared } else { Listener::passed };
    Ok(listener(socket, name, &address)?)
}

/// A socket for datagrams, which has nothing to accept.
fn for_datagrams(
    socket: OwnedFd,
    name: String,
    adopt: Adopt,
    refuse: &dyn Fn(String) -> Failure,
) -> anyhow::Result<Listener> {
    let address: SockaddrStorage = socket::getsockname(socket.as_raw_fd())?;
    let kind = match socket::SockaddrLike::family(&address) {
        Some(AddressFamily::Inet | AddressFamily::Inet6) => SocketKind::Datagram,
        Some(AddressFamily::Unix) => SocketKind::UnixDatagram,
        family => bail!(refuse(format!(
            "takes datagrams and is of family {family:?}: bro forwards datagrams over UDP and unix sockets"
        ))),
    };
    if socket::getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok() {
        bail!(refuse("is connected to one peer, and so is no socket for clients".into()));
    }
    // A service may have it already, and what comes beside its datagrams is for that one to choose.
    if adopt.offers(kind) {
        return Ok(Listener::shared(socket, name, &address)?);
    }
    datagrams::prepare(&socket)?;
    Ok(Listener::passed(socket, name, &address)?)
}

fn bind(spec: &ListenSpec) -> anyhow::Result<Listener> {
    let name = spec.name.clone().unwrap_or_else(|| "listen".into());
    let (socket, unlink) = match &spec.target {
        Target::Tcp { host, port } => {
            let socket = bind_inet(host, *port, SockType::Stream);
            (socket.with_context(|| format!("cannot listen on {}", spec.target))?, None)
        }
        Target::Udp { host, port } => {
            let socket = bind_inet(host, *port, SockType::Datagram);
            let socket = socket.with_context(|| format!("cannot listen on {}", spec.target))?;
            datagrams::prepare(&socket)?;
            (socket, None)
        }
        Target::Unix(path) => {
            let listener = std::os::unix::net::UnixListener::bind(path)
                .with_context(|| format!("cannot listen on {}", path.display()))?;
            (listener.into(), Some(path.clone()))
        }
        Target::Abstract(name) => {
            use std::os::linux::net::SocketAddrExt as _;
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
            let listener = std::os::unix::net::UnixListener::bind_addr(&address);
            (listener.with_context(|| format!("cannot listen on @{name}"))?.into(), None)
        }
        Target::Datagrams(_) => unreachable!("--listen has no word for one"),
    };
    Ok(Listener::own(socket, name, unlink)?)
}

fn bind_inet(host: &str, port: u16, kind: SockType) -> anyhow::Result<OwnedFd> {
    use std::net::ToSocketAddrs as _;
    let mut addresses = (host, port).to_socket_addrs()?;
    let mut address = addresses.next().context("the name has no address")?;
    // A host without IPv6 still gets its listener for “a port on every address”.
    if host == "::" && sys::socket(nix::libc::AF_INET6, nix::libc::SOCK_STREAM, 0).is_err() {
        address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    }
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket::socket(family, kind, socket::SockFlag::SOCK_CLOEXEC, None)?;
    if kind == SockType::Datagram {
        // Without SO_REUSEADDR, with which two programs could have the port, and one of them the datagrams.
        socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        return Ok(socket);
    }
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    socket::listen(&socket.as_fd(), socket::Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn environment(pid: &str, fds: &str, names: Option<&str>) -> Environment {
        Environment { pid: Some(pid.into()), fds: Some(fds.into()), names: names.map(Into::into) }
    }

    #[test]
    fn names_follow_the_descriptors() {
        assert_eq!(environment("7", "2", Some("http:admin")).passed_to(7).unwrap(), ["http", "admin"]);
        assert_eq!(environment("7", "2", None).passed_to(7).unwrap(), ["unknown", "unknown"]);
        assert_eq!(environment("7", "2", Some("http:")).passed_to(7).unwrap(), ["http", ""]);
        assert!(Environment::default().passed_to(7).unwrap().is_empty());
        assert!(environment("7", "0", Some("http")).passed_to(7).unwrap().is_empty());
    }

    #[test]
    fn refuses_names_for_another_number_of_descriptors() {
        for (count, names) in [("2", "http"), ("1", "http:admin"), ("1", "http:"), ("2", "")] {
            let passed = environment("7", count, Some(names)).passed_to(7);
            assert!(matches!(passed, Err(Failure::NoSocket(_))), "{count} {names:?}: {passed:?}");
        }
    }

    #[test]
    fn refuses_the_sockets_of_another_process() {
        assert!(matches!(environment("8", "1", None).passed_to(7), Err(Failure::NoSocket(_))));
        assert!(matches!(environment("", "1", None).passed_to(7), Err(Failure::NoSocket(_))));
        assert!(matches!(environment("7", "-1", None).passed_to(7), Err(Failure::NoSocket(_))));
        let without_pid = Environment { pid: None, fds: Some("1".into()), names: None };
        assert!(matches!(without_pid.passed_to(7), Err(Failure::NoSocket(_))));
    }

    #[test]
    fn reads_listen_addresses() {
        let parsed = parse_listen("web=127.0.0.1:0").unwrap();
        assert_eq!(parsed.name.as_deref(), Some("web"));
        assert_eq!(parsed.target, Target::Tcp { host: "127.0.0.1".into(), port: 0 });
        assert_eq!(parse_listen("8080").unwrap().target, Target::Tcp { host: "::".into(), port: 8080 });
        let udp = |host: &str, port| Target::Udp { host: host.into(), port };
        assert_eq!(parse_listen("53/udp").unwrap().target, udp("::", 53));
        assert_eq!(parse_listen("dns=127.0.0.1:0/udp").unwrap().target, udp("127.0.0.1", 0));
        assert_eq!(parse_listen("/run/0/udp").unwrap().target, Target::Unix("/run/0/udp".into()));
        assert_eq!(parse_listen("/run/a=b").unwrap().target, Target::Unix("/run/a=b".into()));
        assert!(parse_listen("127.0.0.1:http").is_err());
    }

    proptest! {
        #[test]
        fn environments_never_panic(pid in "\\PC{0,8}", fds in "\\PC{0,8}", names in "\\PC{0,16}") {
            environment(&pid, &fds, Some(&names)).passed_to(1).ok();
        }
    }
}
