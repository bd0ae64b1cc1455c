//! Services that trust their own host, and clients in other containers and on this host: through bro they get what they get of the same
//! container behind `podman run --publish`, never more.

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::site::{INNER, PATIENCE, Plan, Site};
use bro_tests::host::{Host, Manager};

/// Whom containers know the host as.
const HOST: &str = "host.containers.internal";

/// The address of root's clients on Podman's bridge.
const ON_BRIDGE: &str = "10.88.0.77";

/// Where a client is.
#[derive(Debug, Clone, Copy)]
enum Client {
    /// On the host itself.
    Host,
    /// In a container of the same Podman, on this network.
    Container(&'static str),
}

impl Client {
    fn all(manager: Manager) -> &'static [Self] {
        match manager {
            Manager::System => &[Self::Host, Self::Container("podman")],
            Manager::User(_) => &[Self::Host, Self::Container("pasta"), Self::Container("podman")],
        }
    }

    /// What a shell script prints there; `@` in it is the host.
    fn sh(self, host: &Host, manager: Manager, image: &str, script: &str) -> Result<String> {
        let Self::Container(network) = self else {
            return host.sh(&format!("exec 2>&1; {}", script.replace('@', "127.0.0.1")));
        };
        let script = format!("exec 2>&1; {}", script.replace('@', HOST));
        let mut words = vec!["podman", "run", "--rm", "--pull=never", "--network", network];
        if manager == Manager::System {
            words.extend(["--ip", ON_BRIDGE]);
        }
        words.extend(["--entrypoint", "sh", image, "-c", &script]);
        manager.run(host, &words)
    }

    /// As whom a service without a network is to see it.
    fn seen(self, manager: Manager) -> &'static str {
        match (self, manager) {
            (Self::Host, _) => "169.254.1.2",
            (Self::Container(_), Manager::System) => ON_BRIDGE,
            // By pasta, which connects for it from the host's own address.
            (Self::Container(_), Manager::User(_)) => "192.0.2.1",
        }
    }
}

/// The networks that the services are on.
fn networks(manager: Manager) -> [&'static str; 2] {
    ["Network=none", if manager == Manager::System { "Network=podman" } else { "Network=pasta" }]
}

/// The same container as with bro, with its port published by Podman.
struct Published<'h> {
    host: &'h Host,
    manager: Manager,
    name: &'static str,
    port: u16,
}

impl<'h> Published<'h> {
    fn new(host: &'h Host, manager: Manager, name: &'static str, inner: u16, rest: &[&str]) -> Result<Self> {
        let published = Self { host, manager, name, port: host.free_port()? };
        let port = format!("{}:{inner}", published.port);
        let first = ["podman", "run", "--detach", "--rm", "--pull=never", "--name", name, "--publish", &port];
        manager.run(host, &[&first[..], rest].concat())?;
        Ok(published)
    }

    fn await_success(&self, words: &[&str]) -> Result<()> {
        let words = [&["podman", "exec", self.name][..], words].concat();
        self.host.wait_until(self.name, PATIENCE, || Ok(self.manager.try_run(self.host, &words)?.success()))
    }
}

impl Drop for Published<'_> {
    fn drop(&mut self) {
        self.manager.run(self.host, &["podman", "rm", "--force", "--time", "0", self.name]).ok();
    }
}

/// In the container of a site.
fn inside(site: &Site<'_>, words: &[&str]) -> Result<String> {
    let name = format!("systemd-{}", site.name);
    site.manager.run(site.host, &[&["podman", "exec", &name][..], words].concat())
}

/// As whom the service of a site is to see a client.
fn seen(site: &Site<'_>, network: &str, client: Client) -> Result<String> {
    if network == "Network=none" {
        return Ok(client.seen(site.manager).into());
    }
    let own = inside(site, &["hostname", "-i"])?;
    ensure!(!own.starts_with("127."), "the container's own address is {own}");
    Ok(own)
}

/// As its official image sets it up: a client from 127.0.0.1 needs no password.
pub fn postgresql(host: &Host, manager: Manager) -> Result<()> {
    const IMAGE: &str = "docker.io/library/postgres";
    manager.import_image(host, "postgres", IMAGE)?;
    // With a wrong password, without one, and with the right one.
    let ask = |client: Client, port: u16| -> Result<String> {
        let script = format!(
            "for password in wrong '' secret; do PGPASSWORD=$password psql -w -U postgres -h @ -p {port} -Atc \
             'select inet_client_addr()' || true; done"
        );
        let said = client.sh(host, manager, IMAGE, &script)?;
        let lines: Vec<&str> = said.lines().collect();
        ensure!(
            lines.len() == 3
                && lines[0].contains("password authentication failed")
                && lines[1].contains("no password supplied"),
            "{client:?}: {said}"
        );
        Ok(lines[2].to_owned())
    };
    let published =
        Published::new(host, manager, "published-pg", 5432, &["--env=POSTGRES_PASSWORD=secret", IMAGE])?;
    published.await_success(&["pg_isready", "--quiet", "--host", "127.0.0.1"])?;
    for client in Client::all(manager) {
        ask(*client, published.port).context("behind --publish")?;
    }
    drop(published);
    for network in networks(manager) {
        let container = format!(
            "Image={IMAGE}\nEnvironment=POSTGRES_PASSWORD=secret\nHealthCmd=pg_isready --quiet --host 127.0.0.1\n\
             HealthInterval=disable"
        );
        let options = ["--internal-port", "5432", "--ready", "healthy", "--exit-idle-time", "1min"];
        let plan = Plan { network, ..Plan::new(&container, "", "") };
        let site = Site::activated(host, manager, "trusting", &plan, &options)?;
        for client in Client::all(manager) {
            let came = ask(*client, site.port).with_context(|| format!("{network}\n{}", site.journals()))?;
            let wanted = seen(&site, network, *client)?;
            ensure!(came == wanted, "{network}, {client:?}: it sees {came}, not {wanted}");
        }
        // It does trust its own host.
        let local = ["psql", "-w", "-U", "postgres", "-h", "127.0.0.1", "-Atc", "select 42"];
        ensure!(inside(&site, &local)? == "42");
    }
    Ok(())
}

/// In its protected mode it has loopback clients alone, since it has no password.
pub fn redis(host: &Host, manager: Manager) -> Result<()> {
    const IMAGE: &str = "docker.io/library/redis";
    const SERVER: [&str; 5] = ["redis-server", "--protected-mode", "yes", "--loglevel", "verbose"];
    manager.import_image(host, "redis", IMAGE)?;
    let expect_refused = |client: Client, port: u16| -> Result<()> {
        let script = format!("redis-cli -h @ -p {port} set a 1 || true");
        let said = client.sh(host, manager, IMAGE, &script)?;
        // It closes the connection without having read all of it, and the reset may overtake what it says.
        let refused = ["DENIED", "closed the connection", "reset by peer"];
        ensure!(refused.iter().any(|words| said.contains(words)), "{client:?}: {said}");
        Ok(())
    };
    let published =
        Published::new(host, manager, "published-redis", 6379, &[&[IMAGE][..], &SERVER].concat())?;
    published.await_success(&["redis-cli", "ping"])?;
    for client in Client::all(manager) {
        expect_refused(*client, published.port).context("behind --publish")?;
    }
    drop(published);
    for network in networks(manager) {
        let container = format!("Image={IMAGE}\nExec={}", SERVER.join(" "));
        let plan = Plan { network, ..Plan::new(&container, "", "") };
        let options = ["--internal-port", "6379", "--exit-idle-time", "1min"];
        let site = Site::activated(host, manager, "protected", &plan, &options)?;
        for client in Client::all(manager) {
            expect_refused(*client, site.port).with_context(|| format!("{network}\n{}", site.journals()))?;
            let wanted = format!("Accepted {}:", seen(&site, network, *client)?);
            let log = manager.run(host, &["podman", "logs", "systemd-protected"])?;
            let accepted = log.lines().rfind(|line| line.contains("Accepted"));
            ensure!(
                accepted.is_some_and(|line| line.contains(&wanted)),
                "{network}, {client:?}: it says {accepted:?}, not {wanted:?}"
            );
        }
        ensure!(inside(&site, &["redis-cli", "set", "a", "1"])? == "OK", "it does not trust its own host");
    }
    Ok(())
}

/// Says to each client who it is.
const WHOM: &str = r"import socket,sys
s=socket.create_server(('127.0.0.1',int(sys.argv[1])))
while True:
    c,a=s.accept(); c.sendall(a[0].encode()); c.close()
";

/// A forwarder that finds its target by this option, at a port of its own. Dropping it stops it.
struct Found<'h> {
    host: &'h Host,
    manager: Manager,
    port: u16,
}

impl<'h> Found<'h> {
    const UNIT: &'static str = "found";

    fn new(host: &'h Host, manager: Manager, option: [&str; 2], inner: &str) -> Result<Self> {
        let found = Self { host, manager, port: host.free_port()? };
        let scope = if manager == Manager::System { "--system" } else { "--user" };
        let (unit, listen) = (format!("--unit={}", Self::UNIT), format!("0.0.0.0:{}", found.port));
        let transient = ["systemd-run", scope, "--quiet", "--collect", "--service-type=notify", &unit];
        let target = format!("127.0.0.1:{inner}");
        let forward = ["/usr/local/bin/bro", "forward", "--listen", &listen, option[0], option[1], &target];
        manager.run(host, &[&transient[..], &forward].concat())?;
        Ok(found)
    }
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        self.manager.systemctl(self.host, &["stop", Self::UNIT]).ok();
    }
}

/// A client on the host's loopback interface and one on its network, through the forwarder of a container, of a process and of a
/// namespace: which of these it is makes no difference, and none is ever seen as a local one.
pub fn by_place(host: &Host, manager: Manager) -> Result<()> {
    host.write("/srv/whom.py", WHOM)?;
    let ask = |port: u16| -> Result<[String; 2]> {
        let one = |ip: &str| host.sh(&format!("timeout 20 socat -u TCP:{ip}:{port} -"));
        Ok([one("127.0.0.1")?, one("192.0.2.1")?])
    };
    for network in networks(manager).into_iter().chain(["Network=host"]) {
        // On the host's network others may have the usual one.
        let inner = if network == "Network=host" { host.free_port()? } else { INNER }.to_string();
        let container = format!(
            "Rootfs={}:O\nVolume=/srv/whom.py:/srv/whom.py:ro\nStopSignal=SIGKILL\n\
             Exec=/usr/bin/python3 /srv/whom.py {inner}",
            manager.image()
        );
        let plan = Plan { network, ..Plan::new(&container, "", "") };
        let options = ["--internal-port", &inner, "--exit-idle-time", "1min"];
        let site = Site::activated(host, manager, "whom", &plan, &options)?;
        let came = ask(site.port).with_context(|| format!("{network}\n{}", site.journals()))?;
        let wanted = match network {
            "Network=none" => ["169.254.1.2".to_owned(), "192.0.2.1".to_owned()],
            "Network=host" => {
                let own = host.run(&["hostname", "-I"])?;
                ensure!(own.split_whitespace().any(|ip| ip == came[0]), "{network}: {came:?} of {own}");
                [came[0].clone(), came[0].clone()]
            }
            _ => {
                let own = seen(&site, network, Client::Host)?;
                [own.clone(), own]
            }
        };
        ensure!(came == wanted && !came[0].starts_with("127."), "{network}: {came:?}, not {wanted:?}");
        let pid = manager.run(host, &["podman", "inspect", "--format", "{{.State.Pid}}", "systemd-whom"])?;
        for option in [["--pid", &pid], ["--netns", &format!("/proc/{pid}/ns/net")]] {
            let found = Found::new(host, manager, option, &inner)?;
            let came = ask(found.port).with_context(|| format!("{network}, {option:?}"))?;
            ensure!(came == wanted, "{network}, {option:?}: {came:?}, not {wanted:?}");
        }
    }
    Ok(())
}
