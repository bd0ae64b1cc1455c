//! The fence, as units put it up: what gets systemd's listener, or a client of it, leads neither elsewhere.

use std::net::TcpListener;

use anyhow::{Result, ensure};
use bro_tests::host::site::PATIENCE;
use bro_tests::host::{Host, Manager};

/// A service that was taken over: it leads its first client's socket to the port that it is told, then the listener, and writes down how that came out. It
/// writes to the home directory of the user that it runs as.
const INTRUDER: &str = r#"
import ctypes, errno, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def led(which, port):
    libc.connect(which.fileno(), bytes(16), 16)
    try: which.connect(("127.0.0.1", port)); return "connected"
    except OSError as error: return errno.errorcode[error.errno]
listener = socket.socket(fileno=3)
listener.setblocking(True)
client, address = listener.accept()
port = int(sys.argv[1])
said = f"{address[0]} {led(client, port)} {led(listener, port)}"
with open(sys.argv[2] + "-new", "w") as file: file.write(said)
os.rename(sys.argv[2] + "-new", sys.argv[2])
"#;

/// What an intruder with a unit's sockets came to: the address by which it saw its client, and how leading each elsewhere ended.
fn intruder(host: &Host, manager: Manager, name: &str, socket: &str, file: &str) -> Result<String> {
    let secret = host.in_network(|| Ok(TcpListener::bind("127.0.0.1:0")?))?;
    let (port, hidden) = (host.free_port()?, secret.local_addr()?.port());
    host.write("/srv/intruder.py", INTRUDER)?;
    manager.unit(
        host,
        &format!("{name}.socket"),
        &format!("[Socket]\nListenStream=127.0.0.1:{port}\n{socket}\n"),
    )?;
    let command = format!("/usr/bin/python3 /srv/intruder.py {hidden} {file}");
    manager.unit(host, &format!("{name}.service"), &format!("[Service]\nExecStart={command}\n"))?;
    manager.systemctl(host, &["daemon-reload"])?;
    host.run(&["rm", "-f", file])?;
    manager.systemctl(host, &["start", &format!("{name}.socket")])?;
    let client = host.connect(port)?;
    host.wait_until("what the intruder says", PATIENCE, || Ok(host.path(file).exists()))?;
    let said = std::fs::read_to_string(host.path(file))?;
    drop(client);
    manager.systemctl(host, &["stop", &format!("{name}.socket"), &format!("{name}.service")])?;
    Ok(said)
}

/// Without a fence both are led elsewhere, or the client alone: some kernels let no socket connect that has listened.
fn are_led(said: &str) -> bool {
    ["127.0.0.1 connected connected", "127.0.0.1 connected EINVAL"].contains(&said)
}

pub fn of_a_socket_unit(host: &Host) -> Result<()> {
    let of = |name: &str, lines: &str| intruder(host, Manager::System, name, lines, "/run/intruder");
    let without = of("open", "")?;
    ensure!(are_led(&without), "{without}");
    // Again and again: the control group is another one each time, and the fence is there once.
    for turn in 0..3 {
        let fenced = of("fenced", "ExecStartPre=/usr/bin/bro fence --this-host")?;
        ensure!(fenced == "169.254.1.2 EPERM EPERM", "{turn}: {fenced}");
    }
    // One without a fence does not listen.
    let port = host.free_port()?;
    let unit = format!(
        "[Socket]\nListenStream=127.0.0.1:{port}\nExecStartPre=/usr/bin/bro fence\nCapabilityBoundingSet=\n"
    );
    Manager::System.unit(host, "unfenced.socket", &unit)?;
    Manager::System.unit(host, "unfenced.service", "[Service]\nExecStart=/bin/true\n")?;
    host.run(&["systemctl", "daemon-reload"])?;
    ensure!(!host.try_run(&["systemctl", "start", "unfenced.socket"])?.success(), "it listens");
    let journal = Manager::System.journal(host, "unfenced.socket")?;
    ensure!(journal.contains("bro: not permitted to load BPF programs: a fence takes CAP_BPF"), "{journal}");
    Ok(())
}

/// Without root: the OCI runtime of the container restricts it, by Landlock.
pub fn of_a_container(host: &Host) -> Result<()> {
    for manager in [Manager::User("test"), Manager::System] {
        let hidden = host.in_network(|| Ok(TcpListener::bind("127.0.0.1:0")?))?;
        let port = hidden.local_addr()?.port();
        // nc ends with the connection.
        std::thread::spawn(move || hidden.incoming().map(drop).last());
        let folder = if manager == Manager::System { "/run/fence" } else { "/home/test/fence" };
        let link = |ports: &str| -> Result<String> {
            let runtime = format!("{folder}/tcp-{ports}/crun");
            let script = format!("mkdir -p {folder}/tcp-{ports} && ln -sfn /usr/bin/bro {runtime}");
            manager.run(host, &["sh", "-euc", &script])?;
            Ok(runtime)
        };
        // With the host's network a container is where a socket of the host's would lead it.
        let run = |runtime: &str, script: &str| {
            let image = "localhost/busybox";
            let words =
                ["podman", "--runtime", runtime, "run", "--rm", "--network=host", image, "sh", "-c", script];
            manager.try_run(host, &words)
        };
        let connect = format!("nc -w 2 127.0.0.1 {port} </dev/null && echo connected");
        for (runtime, connects) in
            [("crun".to_owned(), true), (link("none")?, false), (link(&format!("1,{port}"))?, true)]
        {
            let ran = run(&runtime, &connect)?;
            ensure!(ran.stdout.contains("connected") == connects, "{runtime}: {ran:?}");
            ensure!(connects || ran.stderr.contains("Permission denied"), "{runtime}: {ran:?}");
        }
        // Commands that are executed inside run, and are not restricted.
        let runtime = link("none")?;
        let words = [
            "podman",
            "--runtime",
            &runtime,
            "run",
            "--rm",
            "--detach",
            "--name=fence",
            "--network=host",
            "localhost/busybox",
            "sleep",
            "60",
        ];
        manager.run(host, &words)?;
        let ran = manager.try_run(host, &["podman", "exec", "fence", "sh", "-c", &connect])?;
        ensure!(ran.stdout.contains("connected"), "{ran:?}");
        manager.run(host, &["podman", "rm", "--force", "--time=0", "fence"])?;
    }
    Ok(())
}

pub fn of_a_user(host: &Host) -> Result<()> {
    let user = Manager::User("test");
    let unit = format!("bro-fence@{}.service", host.uid("test")?);
    let of = |name: &str| intruder(host, user, name, "", "/home/test/intruder");
    let without = of("open")?;
    ensure!(are_led(&without), "{without}");
    host.run(&["systemctl", "start", &unit])?;
    let fenced = of("fenced")?;
    ensure!(fenced == "127.0.0.1 EPERM EPERM", "{fenced}: {}", Manager::System.journal(host, &unit)?);
    // Its other programs connect as before.
    let port = host.in_network(|| Ok(TcpListener::bind("127.0.0.1:0")?))?;
    let script =
        format!("import socket; socket.create_connection(('127.0.0.1', {}))", port.local_addr()?.port());
    user.run(host, &["systemd-run", "--user", "--wait", "--quiet", "/usr/bin/python3", "-c", &script])?;
    // The manager's next life begins without one, and gets it by the unit alone.
    host.run(&["systemctl", "enable", &unit])?;
    host.run(&["systemctl", "restart", &format!("user@{}.service", host.uid("test")?)])?;
    Manager::System.wait_for(host, &unit, "ActiveState", "active", PATIENCE)?;
    let fenced = of("fenced")?;
    ensure!(fenced == "127.0.0.1 EPERM EPERM", "{fenced}: {}", Manager::System.journal(host, &unit)?);
    host.run(&["systemctl", "disable", "--now", &unit])?;
    Ok(())
}
