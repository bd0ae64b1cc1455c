//! Users: whose manager is commanded, and whose containers may be entered.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::{Host, Manager};

use crate::failures::{forward, one_sentence};
use crate::site::{INNER, PATIENCE, Plan, Site, text};

/// The port may be below 1024 and the socket the system's, while forwarder and container are an ordinary user's.
pub fn bus_without_environment(host: &Host) -> Result<()> {
    let (user, system) = (Manager::User("test"), Manager::System);
    for (name, scope) in [("plain", ""), ("asked", "--user ")] {
        let mut plan = Plan::service(user, 0.2, &format!("{scope}--exit-idle-time 500ms"));
        plan.service =
            "User=test\nNoNewPrivileges=yes\nUnsetEnvironment=XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS";
        let site = Site::with_front(host, user, system, name, &plan)?;
        for _ in 0..2 {
            site.check_echo().map_err(|error| error.context(site.journal()))?;
            site.await_exit()?;
            site.await_container_gone()?;
        }
    }
    Ok(())
}

pub fn another_users(host: &Host) -> Result<()> {
    let other = Manager::User("other");
    let theirs = Site::new(host, other, "theirs", &Plan::busybox("exec nc -ll -p 7 -e /bin/cat", ""))?;
    theirs.check_echo()?;
    let test = Manager::User("test");
    let pid = other.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", "systemd-theirs"])?;
    // The container is not in this user's Podman: to them it does not exist.
    one_sentence(&forward(host, test, &["--container", "systemd-theirs"])?, 4)?;
    // The process is there for all to see.
    one_sentence(&forward(host, test, &["--pid", &pid])?, 5)?;
    one_sentence(&forward(host, test, &["--pid", "1"])?, 5)?;
    host.sh("ip netns add roots")?;
    let namespace = forward(host, test, &["--netns", "/run/netns/roots"]);
    host.sh("ip netns delete roots")?;
    one_sentence(&namespace?, 5)
}

/// Root may forward into any user's container, by its process.
pub fn roots_forwarder(host: &Host) -> Result<()> {
    let user = Manager::User("test");
    let target = Site::new(host, user, "users", &Plan::service(user, 0.0, ""))?;
    target.check_echo()?;
    let pid = user.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", "systemd-users"])?;
    let forward = format!("--pid {pid} --exit-idle-time 300ms 127.0.0.1:{INNER}");
    let site = Site::new(host, Manager::System, "roots", &Plan { forward, ..Plan::busybox("exit 1", "") })?;
    site.check_echo()?;
    site.await_exit()
}

/// A container's own files cannot send the forwarder to a socket of the host.
pub fn symlink_in_the_container(host: &Host) -> Result<()> {
    let system = Manager::System;
    host.run(&[
        "systemd-run",
        "--unit",
        "secret",
        "socat",
        "UNIX-LISTEN:/run/secret.sock,fork",
        "EXEC:echo secret",
    ])?;
    host.wait_until("the host's socket", PATIENCE, || Ok(host.path("/run/secret.sock").exists()))?;
    for link in ["/run/secret.sock", "../../../../../../run/secret.sock", "/proc/1/root/run/secret.sock"] {
        let script = format!("ln -s {link} /tmp/link.sock; exec sleep 1000");
        let mut plan = Plan::busybox(&script, "--start-timeout 2s");
        plan.forward = plan.forward.replace(&format!("127.0.0.1:{INNER}"), "/tmp/link.sock");
        let site = Site::new(host, system, "link", &plan)?;
        site.expect_reset().map_err(|error| error.context(link))?;
    }
    host.run(&["systemctl", "stop", "secret"])?;
    Ok(())
}

/// A process with the name and the command line of the container's conmon must not get the container's clients, even if it hides whose
/// it is as far as a process can: neither an ordinary user's those of root's container, nor one of the container's own owner, in the
/// host's process namespace (root of a container with `PodmanArgs=--pid=host`, say), for it is not in the unit's cgroup.
pub fn false_conmon(host: &Host) -> Result<()> {
    host.write("/home/test/conmon.py", FALSE_CONMON)?;
    for manager in [Manager::System, Manager::User("test")] {
        let impostor = "exec -a conmon python3 /home/test/conmon.py -n systemd-victim -p /home/test/pid";
        let mut impostor = host.command(Some("test"), &["bash", "-c", impostor])?.spawn()?;
        let result = (|| {
            host.wait_until("the impostor", PATIENCE, || Ok(host.path("/home/test/pid").exists()))?;
            let site = Site::new(host, manager, "victim", &Plan::service(manager, 0.3, ""))?;
            site.check_echo().with_context(|| format!("{manager:?}"))
        })();
        host.sh("kill $(cat /home/test/pid); rm /home/test/pid")?;
        impostor.wait()?;
        result?;
    }
    Ok(())
}

const FALSE_CONMON: &str = r#"
import ctypes, fcntl, os, socket, struct
libc = ctypes.CDLL(None)
libc.prctl(15, b"conmon", 0, 0, 0)  # PR_SET_NAME
libc.prctl(4, 0, 0, 0, 0)           # PR_SET_DUMPABLE
child = os.fork()
if child == 0:
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    up = struct.pack("16sh14x", b"lo", 1)  # IFF_UP
    fcntl.ioctl(socket.socket(), 0x8914, up)  # SIOCSIFFLAGS
    listener = socket.create_server(("127.0.0.1", 7))
    with open("/home/test/pid.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename("/home/test/pid.new", "/home/test/pid")
    while True:
        client, _ = listener.accept()
        client.sendall(b"hijacked")
        client.close()
os.wait()
"#;

pub fn systems_manager(host: &Host) -> Result<()> {
    let test = Manager::User("test");
    let site = Site::new(host, test, "system", &Plan::busybox("exec nc -ll -p 7 -e /bin/cat", "--system"))?;
    site.expect_reset()?;
    ensure!(text(&site.ended(1)?[0], "BRO_REASON") == "start-failed", "{}", site.journal());
    site.await_errors(1)?;
    Ok(())
}
