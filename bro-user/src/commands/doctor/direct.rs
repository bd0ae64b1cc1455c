//! With `--direct`: has the container's own program taken the socket over? systemd holds it in any case, so that clients of a
//! program that listens elsewhere wait for ever.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bro_relay::listener::SocketKind;

use super::Check;
use super::listens::{NAME, activate, is_paused, listeners, running, written};
use crate::installed::{Installed, InstalledPort, Way};
use crate::port_owner;

/// How long a working program may leave a client waiting.
const MOMENT: Duration = Duration::from_secs(1);

/// `way` is how the program finds its sockets; `container` is the quadlet's own name.
pub(super) async fn check(
    installed: &Installed,
    way: Way,
    listener: &InstalledPort,
    container: Option<&str>,
) -> Check {
    let (name, address) = (&installed.name, listener.external.to_string());
    let Some(container) = container else {
        return Check::ok(
            NAME,
            format!("the container takes {address} over itself, which could not be checked"),
        );
    };
    let Some(pid) = running(installed, container) else {
        return Check::ok(NAME, format!("{container} is asleep; it takes {address} over itself"));
    };
    if is_paused(pid) {
        return Check::bad(
            NAME,
            format!("{container} is paused, so nothing answers at {address}"),
            format!("`podman unpause {container}`"),
        );
    }
    let sockets = listener.external.sockets().map(|socket| (port_owner::inode_at(&socket), socket.kind));
    let there: Vec<(u64, SocketKind)> = sockets.filter_map(|(inode, kind)| Some((inode?, kind))).collect();
    if there.is_empty() {
        return Check::ok(NAME, format!("nothing listens at {address}, so there is nothing to take over"));
    }
    let mend = match way {
        Way::Nginx => {
            format!("`listen {}` in nginx's configuration has to be exactly that", as_nginx(&address))
        }
        Way::ListenFds => format!(
            "the program has to take over LISTEN_FDS (sd_listen_fds(3)); if it is an nginx whose Image= does not say so: \
             `{} {name} --direct=nginx`",
            activate(installed)
        ),
    };
    let elsewhere = match listeners(pid).await {
        Ok(found) if !found.is_empty() => format!("; it listens at {}", written(&found)),
        _ => String::new(),
    };
    let members = members(pid);
    let mut clients = 0;
    for (inode, kind) in there {
        match hold(&members, inode) {
            // A process that has it open may only have inherited it. Nothing waits to be accepted where there are datagrams.
            Some(true) if kind == SocketKind::Stream => clients += left_waiting(inode).await,
            Some(true) => {}
            None => {
                return Check::ok(
                    NAME,
                    format!(
                        "the container takes {address} over itself; that was not checked, for want of the right to"
                    ),
                );
            }
            Some(false) => {
                return Check::bad(
                    NAME,
                    format!("{container} runs, and no process in it has taken {address} over{elsewhere}"),
                    mend,
                );
            }
        }
    }
    match clients {
        0 => Check::ok(NAME, format!("{container} has taken {address} over")),
        1 => Check::bad(
            NAME,
            format!("{container} runs and has {address}, and a client waits there to be accepted{elsewhere}"),
            mend,
        ),
        clients => Check::bad(
            NAME,
            format!(
                "{container} runs and has {address}, and {clients} clients wait there to be accepted{elsewhere}"
            ),
            mend,
        ),
    }
}

/// How many clients wait unaccepted, although there was time.
async fn left_waiting(inode: u64) -> u32 {
    if port_owner::waiting(inode) == 0 {
        return 0;
    }
    tokio::time::sleep(MOMENT).await;
    port_owner::waiting(inode)
}

/// As nginx writes it.
fn as_nginx(address: &str) -> String {
    if address.starts_with('/') { format!("unix:{address}") } else { address.to_owned() }
}

/// The processes of the container that `pid` belongs to: those below its cgroup, or in its own process namespace.
fn members(pid: i32) -> Vec<PathBuf> {
    let cgroup = |process: &Path| bro_proc::cgroup::shown(process).map(PathBuf::from);
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/pid")).ok();
    let main = PathBuf::from(format!("/proc/{pid}"));
    let own_cgroup = cgroup(&main).filter(|path| path != Path::new("/"));
    // With the host's, every process would be in it.
    let own_namespace =
        namespace(&main).filter(|own| namespace(Path::new("/proc/self")).as_ref() != Some(own));
    bro_proc::processes()
        .map(|(_, process)| process)
        .filter(|process| {
            *process == main
                || own_cgroup
                    .as_ref()
                    .is_some_and(|own| cgroup(process).is_some_and(|path| path.starts_with(own)))
                || (own_namespace.is_some() && namespace(process) == own_namespace)
        })
        .collect()
}

/// Does one of them have the socket open? None where bro may not look.
fn hold(processes: &[PathBuf], inode: u64) -> Option<bool> {
    let held: Vec<bool> =
        processes.iter().filter_map(|process| port_owner::holds(process, inode).ok()).collect();
    (!held.is_empty()).then(|| held.contains(&true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_who_has_a_socket_open() {
        let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let external = crate::address::ExternalSocket {
            kind: SocketKind::Stream,
            place: crate::address::SocketPlace::Address(listening.local_addr().unwrap()),
        };
        let inode = port_owner::inode_at(&external).unwrap();
        let me = PathBuf::from(format!("/proc/{}", std::process::id()));
        assert!(members(std::process::id() as i32).contains(&me));
        assert_eq!(hold(std::slice::from_ref(&me), inode), Some(true));
        assert_eq!(hold(&[me], inode + 1_000_000), Some(false));
        assert_eq!(hold(&["/proc/0".into()], inode), None);
        assert_eq!(port_owner::waiting(inode), 0);
        let _clients =
            [(); 2].map(|()| std::net::TcpStream::connect(listening.local_addr().unwrap()).unwrap());
        assert_eq!(port_owner::waiting(inode), 2);
        drop(listening);
        assert_eq!(port_owner::inode_at(&external), None);
    }

    #[test]
    fn a_unix_socket_is_written_as_nginx_has_it() {
        assert_eq!(as_nginx("/run/web.sock"), "unix:/run/web.sock");
        assert_eq!(as_nginx("0.0.0.0:8080"), "0.0.0.0:8080");
    }
}
