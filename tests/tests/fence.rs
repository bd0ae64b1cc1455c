//! The fence: a container that has sockets of the host's, by adoption or passed on, and is taken over, gets no further with them than its client. Each line of
//! SECURITY.md's table of what a container can do with such a socket is tried here, with and without.
//!
//! Needs: root, kernel BTF, cgroup v2; python3. Takes: seconds.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use bro_proc::cgroup;
use bro_tests::netns::Namespace;
use bro_tests::peers::{Family, PATIENCE, Place as _};
use bro_tests::process::eventually;
use bro_tests::tier::{Need, met};
use bro_user::commands::doctor::fence::listens_within;

const NEEDS: [Need; 3] = [Need::Root, Need::Bpf, Need::Program("python3", "python3")];

/// What an intruder in a container does with a socket of the host's that it has as descriptor 0. It says how each call came out.
const INTRUDER: &str = r#"
import ctypes, errno, fcntl, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
mine = socket.socket(fileno=0)
def dissolve():
    if libc.connect(0, bytes(16), 16): raise OSError(ctypes.get_errno(), "dissolve")
def read():
    return mine.recv(64).decode()
def interfaces():
    names = []
    for index in range(1, 64):
        # SIOCGIFNAME
        try: names.append(fcntl.ioctl(0, 0x8910, struct.pack("16sI20x", b"", index))[:16].rstrip(b"\0").decode())
        except OSError: pass
    return "+".join(names)
host, port = sys.argv[2], int(sys.argv[3])
steps = {
    "dissolve": dissolve,
    "connect": lambda: mine.connect((host, port)),
    "fastopen": lambda: mine.sendto(b"hello", 0x20000000, (host, port)),
    "bind": lambda: mine.bind((host, port)),
    "listen": lambda: mine.listen(1),
    "read": read,
    "peer": lambda: mine.getpeername()[0],
    "name": lambda: mine.getsockname()[1],
    "interfaces": interfaces,
    "accepted": lambda: mine.accept()[1][0],
}
for step in sys.argv[1].split(","):
    try: print(step, steps[step]() or "done", flush=True)
    except OSError as error: print(step, errno.errorcode.get(error.errno, error), flush=True)
"#;

/// The control group of a socket unit, and the calling thread in it, as systemd's helper that makes the unit's sockets.
struct Unit {
    group: PathBuf,
    parent: PathBuf,
}

impl Unit {
    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let parent = cgroup::of_self()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let group = parent.join(format!("bro-fence-{}-{number}.socket", std::process::id()));
        std::fs::create_dir(&group).with_context(|| format!("making {}", group.display()))?;
        let unit = Self { group, parent };
        std::fs::write(unit.group.join("cgroup.type"), "threaded").context("a threaded cgroup")?;
        Ok(unit)
    }

    fn within<T>(&self, what: impl FnOnce() -> Result<T>) -> Result<T> {
        enter(&self.group)?;
        let done = what();
        enter(&self.parent)?;
        done
    }

    /// `ExecStartPre=`, and then the listener.
    fn listen(&self, address: &str, fence: Option<&[&str]>) -> Result<TcpListener> {
        self.made(fence, || Ok(TcpListener::bind(address)?))
    }

    fn made<T>(&self, fence: Option<&[&str]>, make: impl FnOnce() -> Result<T>) -> Result<T> {
        self.within(|| {
            if let Some(options) = fence {
                let ran = Command::new(bro_tests::bro::binary()).arg("fence").args(options).output()?;
                ensure!(ran.status.success(), "bro fence: {}", String::from_utf8_lossy(&ran.stderr));
            }
            make()
        })
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        eventually(PATIENCE, || std::fs::remove_dir(&self.group).is_ok());
    }
}

fn enter(group: &Path) -> Result<()> {
    std::fs::write(group.join("cgroup.threads"), "0").context("entering a cgroup")
}

/// An intruder in a container without any network, which has been given this socket.
fn intruder(container: &Namespace, socket: OwnedFd, steps: &str, at: SocketAddr) -> Result<String> {
    let words = container.enter();
    let (program, rest) = words.split_first().context("a command")?;
    let ran = Command::new(program)
        .args(rest)
        .args(["python3", "-c", INTRUDER, steps, &at.ip().to_string(), &at.port().to_string()])
        .stdin(Stdio::from(socket))
        .output()?;
    ensure!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let said = String::from_utf8(ran.stdout)?;
    Ok(said.lines().collect::<Vec<_>>().join(", "))
}

/// Something on the host's loopback interface that only the host is to reach.
fn secret(address: &str) -> Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let at = listener.local_addr()?;
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let told = client.and_then(|mut client| client.write_all(b"the secret"));
            if told.is_err() {
                break;
            }
        }
    });
    Ok(at)
}

/// Both ends of a client's connection.
fn accepted(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    Ok((TcpStream::connect(listener.local_addr()?)?, listener.accept()?.0))
}

#[test]
fn a_socket_of_the_hosts_is_led_nowhere_else() -> Result<()> {
    if !met("a_socket_of_the_hosts_is_led_nowhere_else", &NEEDS) {
        return Ok(());
    }
    bro_sockmap::fence::check()?;
    let container = Namespace::new()?;
    for family in ["127.0.0.1:0", "[::1]:0"] {
        let secret = secret(family)?;
        // Some kernels (of two builds of Linux 6.18.44 one) let no socket listen that was connected, and none connect that has listened.
        let mut listens = "done";
        for fenced in [false, true] {
            let unit = Unit::new()?;
            let listener = unit.listen(family, fenced.then_some(&[]))?;
            ensure!(
                bro_sockmap::fence::stands(&unit.group)? == fenced,
                "{family} {fenced}: not as it stands"
            );
            let tries = |steps: &str, expected: [&str; 2]| -> Result<()> {
                let (client, served) = accepted(&listener)?;
                let said = intruder(&container, served.into(), steps, secret)?;
                // What a socket that was dissolved says to a reader is not the fence's.
                let as_expected = said.starts_with(expected[usize::from(fenced)]);
                ensure!(
                    as_expected && said.contains("secret") != fenced,
                    "{family} {fenced} {steps}: {said}"
                );
                drop(client);
                Ok(())
            };
            tries(
                "dissolve,connect,read",
                ["dissolve done, connect done, read the secret", "dissolve done, connect EPERM"],
            )?;
            tries(
                "dissolve,fastopen,read",
                ["dissolve done, fastopen 5, read the secret", "dissolve done, fastopen EPERM"],
            )?;
            // The secret's own port, which is another program's, as well as one that is free.
            let free = SocketAddr::new(secret.ip(), 0);
            let (client, served) = accepted(&listener)?;
            let said = intruder(&container, served.into(), "dissolve,bind,listen", free)?;
            if !fenced && said.ends_with("listen EINVAL") {
                listens = "EINVAL";
            }
            let bound = ["done", "EPERM"][usize::from(fenced)];
            let expected = format!("dissolve done, bind {bound}, listen {listens}");
            ensure!(said == expected, "{family} {fenced} bind: {said}, not {expected}");
            drop(client);
            // The service goes on as before.
            let (mut client, mut served) = accepted(&listener)?;
            client.write_all(b"question")?;
            let mut heard = [0; 8];
            served.read_exact(&mut heard)?;
            ensure!(&heard == b"question", "{heard:?}");
            // The listener too can be dissolved, which ends its listening, and led nowhere else.
            let duplicate = listener.try_clone()?.into();
            let said = intruder(&container, duplicate, "dissolve,connect", secret)?;
            let expected = match fenced {
                true => "EPERM",
                false if listens == "EINVAL" => "EINVAL",
                false => "done",
            };
            let expected = format!("dissolve done, connect {expected}");
            ensure!(said == expected, "{family} {fenced} listener: {said}, not {expected}");
        }
    }
    Ok(())
}

/// To one peer, whose datagrams alone it would have then.
#[test]
fn a_socket_for_datagrams_is_connected_to_no_peer() -> Result<()> {
    if !met("a_socket_for_datagrams_is_connected_to_no_peer", &NEEDS) {
        return Ok(());
    }
    let container = Namespace::new()?;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let peer = UdpSocket::bind(address)?.local_addr()?;
        for (fence, expected) in [(None, "connect done"), (Some(&[][..]), "connect EPERM")] {
            let unit = Unit::new()?;
            let socket = unit.made(fence, || Ok(UdpSocket::bind(address)?))?;
            let said = intruder(&container, socket.into(), "connect", peer)?;
            ensure!(said == expected, "{address}: {said}");
        }
    }
    Ok(())
}

#[test]
fn some_things_no_fence_hinders() -> Result<()> {
    if !met("some_things_no_fence_hinders", &NEEDS) {
        return Ok(());
    }
    let container = Namespace::new()?;
    let unit = Unit::new()?;
    let listener = unit.listen("127.0.0.1:0", Some(&[]))?;
    let at = listener.local_addr()?;
    // The names of the host's interfaces, from a container that has one alone.
    let (_client, served) = accepted(&listener)?;
    let said = intruder(&container, served.into(), "interfaces", at)?;
    let here: Vec<String> = nix::ifaddrs::getifaddrs()?
        .map(|interface| interface.interface_name)
        .filter(|name| name != "lo")
        .collect();
    ensure!(
        here.iter().all(|name| said.contains(name.as_str())) && said.contains("lo"),
        "{said} of {here:?}"
    );
    // The end of the listening.
    let said = intruder(&container, listener.try_clone()?.into(), "dissolve", at)?;
    let refused =
        TcpStream::connect(at).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
    ensure!(said == "dissolve done" && refused, "{said}, and it still listens");
    Ok(())
}

#[test]
fn a_unix_socket_is_not_dissolved() -> Result<()> {
    if !met("a_unix_socket_is_not_dissolved", &NEEDS) {
        return Ok(());
    }
    let (container, folder) = (Namespace::new()?, bro_tests::scratch::Scratch::new()?);
    let listener = std::os::unix::net::UnixListener::bind(folder.join("service"))?;
    let (_client, (served, _)) =
        (std::os::unix::net::UnixStream::connect(folder.join("service"))?, listener.accept()?);
    for socket in [served.into(), listener.into()] {
        let said = intruder(&container, socket, "dissolve", SocketAddr::from(([127, 0, 0, 1], 0)))?;
        ensure!(said == "dissolve EINVAL", "{said}");
    }
    Ok(())
}

#[test]
fn a_container_behind_a_forwarder_has_no_such_socket() -> Result<()> {
    if !met("a_container_behind_a_forwarder_has_no_such_socket", &NEEDS) {
        return Ok(());
    }
    let (container, secret) = (Namespace::new()?, secret("127.0.0.1:0")?);
    // What its service has is made there, on both sides of the connection.
    let own = container.socket(Family::Tcp4)?;
    nix::fcntl::fcntl(&own, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
    let said = intruder(&container, own, "dissolve,connect,interfaces", secret)?;
    ensure!(said == "dissolve done, connect ECONNREFUSED, interfaces lo", "{said}");
    Ok(())
}

#[test]
fn what_the_unit_does_itself_is_not_fenced() -> Result<()> {
    if !met("what_the_unit_does_itself_is_not_fenced", &NEEDS) {
        return Ok(());
    }
    let unit = Unit::new()?;
    let listener = unit.listen("127.0.0.1:0", Some(&[]))?;
    let to = listener.local_addr()?;
    let made = unit.within(|| Ok(TcpStream::connect(to)?))?;
    drop(made);
    // Twice is no harm, and another's sockets are none of this unit's.
    let again = unit.listen("127.0.0.1:0", Some(&["--this-host"]))?;
    ensure!(accepted(&again).is_ok(), "a client of this host's");
    Ok(())
}

#[test]
fn a_client_of_this_host_is_no_client_of_the_services_own_host() -> Result<()> {
    if !met("a_client_of_this_host_is_no_client_of_the_services_own_host", &NEEDS) {
        return Ok(());
    }
    let container = Namespace::new()?;
    for (address, to, as_it_is, told) in [
        ("127.0.0.1:0", "127.0.0.1", "127.0.0.1", "169.254.1.2"),
        ("0.0.0.0:0", "127.0.0.7", "127.0.0.1", "169.254.1.2"),
        ("[::1]:0", "::1", "::1", "fd62:726f::2"),
        ("[::]:0", "127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.1.2"),
    ] {
        for (fence, expected) in [(vec![], as_it_is), (vec!["--this-host"], told)] {
            let unit = Unit::new()?;
            let listener = unit.listen(address, Some(&fence))?;
            let at = SocketAddr::new(to.parse()?, listener.local_addr()?.port());
            let (client, (served, from)) = (TcpStream::connect(at)?, listener.accept()?);
            ensure!(from.ip().to_string() == expected, "{address}: {from} by accept");
            ensure!(from.port() == client.local_addr()?.port(), "{address}: the port is the client's");
            let (waits, duplicate) = (TcpStream::connect(at)?, listener.try_clone()?);
            let said = intruder(&container, served.into(), "peer", at)?;
            let accepts = intruder(&container, duplicate.into(), "accepted", at)?;
            ensure!(said == format!("peer {expected}"), "{address}: {said}");
            ensure!(accepts == format!("accepted {expected}"), "{address}: {accepts}");
            drop(waits);
        }
    }
    Ok(())
}

#[test]
fn the_external_port_is_the_internal_one_to_the_service() -> Result<()> {
    if !met("the_external_port_is_the_internal_one_to_the_service", &NEEDS) {
        return Ok(());
    }
    let container = Namespace::new()?;
    for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
        // A port that is free, given to the fence before it is listened at: a second attempt where another program takes it meanwhile.
        let free = TcpListener::bind(address)?.local_addr()?;
        let unit = Unit::new()?;
        let options = [format!("--port={}:80", free.port()), format!("--port={}:81", free.port() ^ 1)];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let listener = unit.listen(&free.to_string(), Some(&options))?;
        let said = intruder(&container, listener.try_clone()?.into(), "name", free)?;
        ensure!(said == "name 80", "{address}: {said}");
        // It is told to all, and bro knows better.
        let known = bro_adopt::bound::place(listener.as_fd());
        ensure!(
            listener.local_addr()?.port() == 80 && known == Some(bro_adopt::socket::Place::Tcp(free)),
            "{known:?}"
        );
        let to = SocketAddr::new(
            if address == "[::1]:0" { "::1".parse()? } else { "127.0.0.1".parse()? },
            free.port(),
        );
        let (_client, (served, _)) = (TcpStream::connect(to)?, listener.accept()?);
        let said = intruder(&container, served.into(), "name", free)?;
        ensure!(said == "name 80", "{address}: {said}");
    }
    Ok(())
}

/// A systemd that makes the listener itself, in its own control group, as it does without a BPF firewall.
#[test]
fn a_fence_around_nothing_is_told_from_one_around_the_listener() -> Result<()> {
    if !met("a_fence_around_nothing_is_told_from_one_around_the_listener", &NEEDS) {
        return Ok(());
    }
    let container = Namespace::new()?;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let secret = secret(address)?;
        let unit = Unit::new()?;
        let within = unit.listen(address, Some(&[]))?;
        let elsewhere = TcpListener::bind(address)?;
        for (listener, stands, expected) in [
            (&within, true, "dissolve done, connect EPERM"),
            (&elsewhere, false, "dissolve done, connect done"),
        ] {
            let at = listener.local_addr()?;
            let said = listens_within((Some(at.ip()), at.port()), &unit.group);
            ensure!(said == Some(stands), "{at}: {said:?}");
            ensure!(listens_within((None, at.port()), &unit.group) == Some(stands), "{at} by its port");
            let (_client, served) = accepted(listener)?;
            let said = intruder(&container, served.into(), "dissolve,connect", secret)?;
            ensure!(said == expected, "{at}: {said}");
        }
        let free = TcpListener::bind(address)?.local_addr()?;
        ensure!(listens_within((Some(free.ip()), free.port()), &unit.group).is_none(), "nothing listens");
    }
    Ok(())
}

#[test]
fn it_is_put_up_nowhere_else() -> Result<()> {
    if !met("it_is_put_up_nowhere_else", &NEEDS) {
        return Ok(());
    }
    for (options, says, code) in [
        (vec![], "bro: bro fence runs as ExecStartPre= of a socket unit", 2),
        (vec!["--user", "4000001"], "bro: the service manager of the user 4000001 does not run", 4),
        (vec!["--port", "80"], "bro: invalid value '80' for '--port <EXTERNAL:INTERNAL>': two ports", 2),
    ] {
        let ran = Command::new(bro_tests::bro::binary()).arg("fence").args(&options).output()?;
        let said = String::from_utf8_lossy(&ran.stderr);
        ensure!(
            ran.status.code() == Some(code) && said.starts_with(says),
            "{options:?}: {} {said}",
            ran.status
        );
    }
    Ok(())
}
