//! One container behind one forwarder: NAME.container (quadlet) with NAME-in.socket and NAME-in.service, as an administrator
//! would write them, or with NAME-activator.socket and NAME-activator.service, as `bro activate` does; under the system's
//! manager or a user's.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::{Host, Manager};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Where the suite's service (service.py) lies in the host.
const SERVICE: &str = "/srv/service.py";

/// What is waited for takes far less; a loaded machine may need long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What `bro activate` adds to the name of a quadlet.
pub const ACTIVATOR: &str = "activator";

/// The port that services listen on inside their containers.
pub const INNER: u16 = 7;

/// The parts of a set-up that cases differ in. `{name}` in them is the site's name.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `[Container]` of the quadlet.
    pub container: String,
    /// The line that gives it its network.
    pub network: &'static str,
    /// `[Unit]` of the quadlet.
    pub container_unit: &'static str,
    /// What follows `bro forward`.
    pub forward: String,
    /// `[Unit]` of the forwarder.
    pub unit: &'static str,
    /// `[Service]` of the forwarder.
    pub service: &'static str,
}

impl Plan {
    /// A container with these `[Container]` lines, started by the forwarder, whose service listens on `inner`.
    pub fn new(container: &str, options: &str, inner: impl std::fmt::Display) -> Self {
        Self {
            container: container.into(),
            network: "Network=none",
            container_unit: "",
            forward: format!("--unit {{name}}.service --container systemd-{{name}} {options} {inner}"),
            unit: "",
            service: "",
        }
    }

    /// The suite's own service, listening after `delay` seconds.
    pub fn service(manager: Manager, delay: f32, options: &str) -> Self {
        Self::new(&python(manager, delay), options, format_args!("127.0.0.1:{INNER}"))
    }

    /// Writes NAME.container. systemd does not know of it yet.
    pub fn write_quadlet(&self, host: &Host, manager: Manager, name: &str) -> Result<()> {
        let (container_unit, network, container) = (self.container_unit, self.network, &self.container);
        let quadlet = format!("[Unit]\n{container_unit}\n[Container]\n{network}\n{container}\n");
        manager.quadlet(host, &format!("{name}.container"), &quadlet.replace("{name}", name))
    }

    /// An echo service that begins to listen once the test has made a file, whose path is returned: for as long as it wants to look at
    /// clients that are held, however slow the machine is.
    pub fn gated(host: &Host, manager: Manager, name: &str, options: &str) -> Result<(Self, String)> {
        let folder = folder(host, manager, &format!("gate-{name}"))?;
        let gate = format!("{folder}/open");
        host.run(&["rm", "-f", &gate])?;
        let mut plan = Self::busybox(
            "until test -e /gate/open; do sleep 0.1; done; exec nc -ll -p 7 -e /bin/cat",
            options,
        );
        plan.container.push_str(&format!("\nVolume={folder}:/gate"));
        Ok((plan, gate))
    }

    /// Busybox running `script`.
    pub fn busybox(script: &str, options: &str) -> Self {
        let container = format!("Image=localhost/busybox\nStopSignal=SIGKILL\nExec=/bin/sh -c \"{script}\"");
        Self::new(&container, options, format_args!("127.0.0.1:{INNER}"))
    }
}

/// `[Container]` lines that run the suite's service.
pub fn python(manager: Manager, delay: f32) -> String {
    format!(
        "Rootfs={}:O\nVolume={SERVICE}:{SERVICE}:ro\nExec=/usr/bin/python3 {SERVICE} {INNER} {delay}",
        manager.image()
    )
}

/// Brings what all sites need into the host.
pub fn prepare(host: &Host) -> Result<()> {
    host.write(SERVICE, include_str!("../../host/service.py"))?;
    for manager in [Manager::System, Manager::User("test"), Manager::User("other")] {
        manager.import_busybox(host)?;
    }
    Ok(())
}

/// A set-up that is installed, with its socket listening. Dropping it stops it, and undoes `bro activate`.
#[derive(Debug)]
pub struct Site<'h> {
    /// Where it is.
    pub host: &'h Host,
    /// Whose container it is.
    pub manager: Manager,
    /// What the container is called.
    pub name: String,
    /// Where clients go.
    pub port: u16,
    /// Forwarder and socket are the system's even where the container is a user's.
    pub front: Manager,
    /// What their names end in.
    pub suffix: &'static str,
}

impl<'h> Site<'h> {
    /// Writes the three units and starts the socket.
    pub fn new(host: &'h Host, manager: Manager, name: &str, plan: &Plan) -> Result<Self> {
        Self::with_front(host, manager, manager, name, plan)
    }

    /// As `new`, with forwarder and socket under another manager than the container.
    pub fn with_front(
        host: &'h Host,
        manager: Manager,
        front: Manager,
        name: &str,
        plan: &Plan,
    ) -> Result<Self> {
        let site = Self { host, manager, name: name.into(), port: host.free_port()?, front, suffix: "in" };
        plan.write_quadlet(host, manager, name)?;
        // WatchdogSec= everywhere: a forwarder that stops answering for a second anywhere fails its case. No start limit, as in the units
        // that `bro activate` writes: systemd counts a start that has to wait for the end of the run before once more.
        let service = format!(
            "[Unit]\nStartLimitIntervalSec=0\n{}\n[Service]\nType=notify\nExecStart=/usr/local/bin/bro forward {}\nWatchdogSec=3s\n{}\n",
            plan.unit, plan.forward, plan.service
        );
        front.unit(host, &site.forwarder(), &service.replace("{name}", name))?;
        let socket =
            format!("[Socket]\nListenStream=0.0.0.0:{}\n[Install]\nWantedBy=sockets.target\n", site.port);
        front.unit(host, &site.socket(), &socket)?;
        manager.systemctl(host, &["daemon-reload"])?;
        if front != manager {
            front.systemctl(host, &["daemon-reload"])?;
        }
        front.systemctl(host, &["start", &site.socket()])?;
        Ok(site)
    }

    /// Writes the quadlet and has `bro activate` do the rest, for a service that listens on [`INNER`] unless `options` say
    /// otherwise. What `plan` says of the forwarder is not used.
    pub fn activated(
        host: &'h Host,
        manager: Manager,
        name: &str,
        plan: &Plan,
        options: &[&str],
    ) -> Result<Self> {
        plan.write_quadlet(host, manager, name)?;
        let site = Self {
            host,
            manager,
            name: name.into(),
            port: host.free_port()?,
            front: manager,
            suffix: ACTIVATOR,
        };
        let (external, inner) = (format!("0.0.0.0:{}", site.port), INNER.to_string());
        let mut args = vec!["bro", "activate", name, "--external-port", &external];
        if !options.contains(&"--internal-port") {
            args.extend(["--internal-port", &inner]);
        }
        args.extend(options);
        manager.run(host, &args)?;
        Ok(site)
    }

    /// The container's unit.
    pub fn unit(&self) -> String {
        format!("{}.service", self.name)
    }

    /// The forwarder's unit.
    pub fn forwarder(&self) -> String {
        format!("{}-{}.service", self.name, self.suffix)
    }

    /// The socket's unit.
    pub fn socket(&self) -> String {
        format!("{}-{}.socket", self.name, self.suffix)
    }

    /// A connected client.
    pub fn client(&self) -> Result<TcpStream> {
        self.host.connect(self.port)
    }

    /// Puts other lines into the socket's unit, and starts it anew.
    pub fn change_socket(&self, lines: &str) -> Result<()> {
        self.front.systemctl(self.host, &["stop", &self.socket()])?;
        self.front.unit(self.host, &self.socket(), &format!("[Socket]\n{lines}\n"))?;
        self.front.systemctl(self.host, &["daemon-reload"])?;
        self.front.systemctl(self.host, &["start", &self.socket()])?;
        Ok(())
    }

    /// What comes back for `request`: sent, half-closed, read to the end.
    pub fn ask(&self, request: &[u8]) -> Result<Vec<u8>> {
        ask(self.client()?, request)
    }

    /// Which run of the service answers, and when it began to listen (CLOCK_MONOTONIC).
    pub fn who(&self) -> Result<(String, u64)> {
        let answer = String::from_utf8(self.ask(b"who")?)?;
        let (run, listening) =
            answer.split_once(' ').with_context(|| format!("the service said “{answer}”"))?;
        Ok((run.into(), listening.parse()?))
    }

    /// Echoes some kilobytes.
    pub fn check_echo(&self) -> Result<()> {
        let sent: Vec<u8> = (0..100_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        // A reader is needed meanwhile: more than the sockets' buffers hold would block both ways.
        let client = self.client()?;
        let writing = client.try_clone()?;
        let received = std::thread::scope(|scope| {
            let sent = &sent;
            let writer = scope.spawn(move || send(writing, sent));
            let received = read_all(client);
            writer.join().expect("the writer does not panic").and(received)
        })?;
        ensure!(received == sent, "sent {} bytes, {} others came back", sent.len(), received.len());
        Ok(())
    }

    /// The connection is reset, without a byte before that.
    pub fn expect_reset(&self) -> Result<()> {
        let was_reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
        // A reset may be there before connect(2) has returned, or before a word is said.
        let mut client = match self.client() {
            Err(error) if error.downcast_ref().is_some_and(was_reset) => return Ok(()),
            client => client?,
        };
        let seen = client.write_all(b"hello, service?").and_then(|()| client.read(&mut [0; 1]));
        match seen {
            Err(error) if was_reset(&error) => Ok(()),
            other => anyhow::bail!("instead of a reset the client saw {other:?}"),
        }
    }

    /// Waits for the forwarder's idle exit, and sees that it was a good one.
    pub fn await_exit(&self) -> Result<()> {
        self.front.wait_for(self.host, &self.forwarder(), "ActiveState", "inactive", PATIENCE)?;
        let status = self.front.show(self.host, &self.forwarder(), "ExecMainStatus")?;
        let result = self.front.show(self.host, &self.forwarder(), "Result")?;
        ensure!(
            status == "0" && result == "success",
            "bro exited with {status} ({result}): {}",
            self.journal()
        );
        Ok(())
    }

    /// The container's unit is stopped, and podman knows no such container any more.
    pub fn await_container_gone(&self) -> Result<()> {
        // A container that had to be killed leaves its unit "failed"; it is gone all the same.
        self.manager.await_end(self.host, &self.unit(), PATIENCE)?;
        let exists = ["podman", "container", "exists", &format!("systemd-{}", self.name)].map(str::to_owned);
        let exists: Vec<&str> = exists.iter().map(String::as_str).collect();
        ensure!(!self.manager.try_run(self.host, &exists)?.success(), "the container is still there");
        Ok(())
    }

    /// A client that has had something back and stays: as long as it does, nothing goes to sleep.
    pub fn held(&self) -> Result<TcpStream> {
        let client = self.client()?;
        echo(&client, b"held").with_context(|| self.journals())?;
        Ok(client)
    }

    /// One property of the forwarder's unit.
    pub fn forwarder_show(&self, property: &str) -> Result<String> {
        self.front.show(self.host, &self.forwarder(), property)
    }

    /// What the forwarder logged.
    pub fn journal(&self) -> String {
        self.front.journal(self.host, &self.forwarder()).unwrap_or_else(|error| format!("{error:#}"))
    }

    /// What both the forwarder and the container logged, the end of it.
    pub fn journals(&self) -> String {
        let container = self.manager.journal(self.host, &self.unit());
        let container = container.unwrap_or_else(|error| format!("{error:#}"));
        let tail = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(30)..].join("\n")
        };
        format!("-- forwarder\n{}\n-- container\n{}", tail(&self.journal()), tail(&container))
    }

    /// The forwarder's records of ended connections; waits until there are `count`.
    pub fn ended(&self, count: usize) -> Result<Vec<Value>> {
        let mut ended = Vec::new();
        self.host
            .wait_until(&format!("{count} lines about ended connections"), PATIENCE, || {
                ended = self.front.journal_records(self.host, &self.forwarder())?;
                ended.retain(|record| record.get("BRO_DURATION_MS").is_some());
                Ok(ended.len() >= count)
            })
            .with_context(|| self.journal())?;
        ensure!(
            ended.len() == count,
            "{} connections ended instead of {count}: {}",
            ended.len(),
            self.journal()
        );
        Ok(ended)
    }

    /// What the forwarder logged as errors: waits until there are `count`, and more there must not be.
    pub fn await_errors(&self, count: usize) -> Result<Vec<String>> {
        let mut errors = Vec::new();
        self.host
            .wait_until(&format!("{count} errors in the log"), PATIENCE, || {
                errors = self.errors()?;
                Ok(errors.len() >= count)
            })
            .with_context(|| self.journal())?;
        ensure!(errors.len() == count, "{count} errors, one line each, not: {errors:#?}");
        Ok(errors)
    }

    /// What the forwarder logged as errors, one sentence each.
    pub fn errors(&self) -> Result<Vec<String>> {
        let records = self.front.journal_records(self.host, &self.forwarder())?;
        // PRIORITY 3 is "error"; systemd's own records about the unit have another comm.
        let errors =
            records.iter().filter(|record| text(record, "PRIORITY") == "3" && text(record, "_COMM") == "bro");
        Ok(errors.map(|record| text(record, "MESSAGE")).collect())
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        let (socket, forwarder, unit) = (self.socket(), self.forwarder(), self.unit());
        self.front.systemctl(self.host, &["stop", &socket, &forwarder]).ok();
        self.manager.systemctl(self.host, &["stop", &unit]).ok();
        if self.suffix == ACTIVATOR {
            self.manager.run(self.host, &["bro", "activate", &self.name, "--remove"]).ok();
        }
    }
}

/// A folder of its owner's for a container's volume.
pub fn folder(host: &Host, manager: Manager, name: &str) -> Result<String> {
    let folder = match manager {
        Manager::System => format!("/srv/{name}"),
        Manager::User(user) => format!("/home/{user}/{name}"),
    };
    host.write(&format!("{folder}/there"), "")?;
    Ok(folder)
}

/// A field of a journal record.
pub fn text(record: &Value, field: &str) -> String {
    record.get(field).and_then(Value::as_str).unwrap_or_default().into()
}

/// Sends `request`, half-closes, reads to the end.
pub fn ask(client: TcpStream, request: &[u8]) -> Result<Vec<u8>> {
    send(client.try_clone()?, request)?;
    read_all(client)
}

/// Sends `text` and has it back; the connection stays open.
pub fn echo(mut client: &TcpStream, text: &[u8]) -> Result<()> {
    client.write_all(text).context("cannot send")?;
    let mut back = vec![0; text.len()];
    client.read_exact(&mut back).context("nothing comes back")?;
    ensure!(back == text, "{back:?} came back for {text:?}");
    Ok(())
}

fn send(mut client: TcpStream, request: &[u8]) -> Result<()> {
    client.write_all(request).context("cannot send")?;
    client.shutdown(Shutdown::Write).context("cannot half-close")?;
    Ok(())
}

fn read_all(mut client: TcpStream) -> Result<Vec<u8>> {
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).with_context(|| format!("after {} bytes of the answer", answer.len()))?;
    Ok(answer)
}
