//! What stands for systemd: a message bus of the test's own (dbus-daemon(1)), and on it a service manager that knows one unit and can start it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

use bro_tests::forwarder::Setup;
use bro_tests::process::{first_thread_time, monotonic};
use bro_tests::scratch::Scratch;
use futures_lite::StreamExt as _;
use zbus::message::Type;
use zbus::{Connection, Message, MessageStream, OwnedObjectPath, Variant};

const OBJECT: &str = "/org/freedesktop/systemd1/unit/a";
const MANAGER: &str = "/org/freedesktop/systemd1";
const JOB: &str = "/org/freedesktop/systemd1/job/7";

/// `(ssssssouso)`, as ListUnitsByNames answers.
type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// An order to start the unit.
#[derive(Debug, Clone, Copy)]
pub struct StartOrder {
    /// When it came.
    pub at: Duration,
    /// The processor time that the caller's first thread, which gives the order, had had by then.
    pub computed: Duration,
}

/// The bus, and the service manager on it.
#[derive(Debug)]
pub struct Manager {
    daemon: Child,
    scratch: Scratch,
    unit: String,
    orders: Receiver<StartOrder>,
}

impl Manager {
    /// The program that it needs.
    pub const NEED: Need = Need::Program("dbus-daemon", "dbus-daemon");

    /// With the unit asleep.
    pub fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let settings = scratch.join("bus.conf");
        let all = r#"<allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/>"#;
        let policy = format!(r#"<policy context="default">{all}</policy>"#);
        let listen = format!("<listen>{}</listen>", address(scratch.path()));
        std::fs::write(&settings, format!("<busconfig>{listen}<auth>EXTERNAL</auth>{policy}</busconfig>"))?;
        let daemon = Command::new("dbus-daemon")
            .args(["--nofork", "--nopidfile", "--nosyslog", "--config-file"])
            .arg(&settings)
            .stdin(Stdio::null())
            // It says that it may not raise its limit on descriptors.
            .stderr(Stdio::null())
            .spawn()
            .context("starting dbus-daemon")?;
        // No other test has a folder of this name, so no forwarder of another's has this unit.
        let name = scratch.path().file_name().and_then(|name| name.to_str()).context("text")?;
        let unit = format!("{name}.service");
        let (ordered, orders) = channel();
        let (ready, is_ready) = channel();
        let systemd = Systemd { unit: unit.clone(), ordered, is_started: false };
        let address = address(scratch.path());
        let manager = Self { daemon, scratch, unit, orders };
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            // It ends with the bus.
            runtime.block_on(systemd.answer(&address, &ready))
        });
        is_ready.recv_timeout(PATIENCE).context("the stand-in for systemd is not on its bus")?;
        Ok(manager)
    }

    /// Has the forwarder find it.
    pub fn known_to(&self, setup: Setup) -> Setup {
        let address = address(self.scratch.path());
        // The first is root's, the second an ordinary user's.
        let setup = setup.env("DBUS_SYSTEM_BUS_ADDRESS", &address).env("DBUS_SESSION_BUS_ADDRESS", &address);
        setup.env("XDG_RUNTIME_DIR", self.scratch.path()).arg("--unit").arg(&self.unit)
    }

    /// The next order to start the unit.
    pub fn order(&self) -> Result<StartOrder> {
        self.orders.recv_timeout(PATIENCE).context("systemd was not told to start the unit")
    }

    /// What forwarders leave for their successors.
    fn forget_unit(&self) {
        // An ordinary user's are in the folder that goes with this value.
        for entry in std::fs::read_dir("/run/bro").into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(&self.unit) {
                std::fs::remove_file(entry.path()).ok();
            }
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.daemon.kill().ok();
        self.daemon.wait().ok();
        self.forget_unit();
    }
}

fn address(folder: &Path) -> String {
    format!("unix:path={}", folder.join("bus").display())
}

async fn connect(address: &str) -> Result<Connection> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let connected = zbus::connection::Builder::address(address).build().await;
        match connected {
            Ok(connection) => return Ok(connection),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// The service manager.
struct Systemd {
    unit: String,
    ordered: Sender<StartOrder>,
    is_started: bool,
}

impl Systemd {
    async fn answer(mut self, address: &str, ready: &Sender<()>) -> Result<()> {
        let bus = connect(address).await?;
        let mut calls = MessageStream::from(&bus);
        bus.request_name("org.freedesktop.systemd1").await?;
        ready.send(())?;
        while let Some(call) = calls.next().await {
            let call = call?;
            if call.message_type() != Type::MethodCall {
                continue;
            }
            let header = call.header();
            match header.member().map(|member| member.as_str()) {
                Some("Subscribe") => bus.reply(&header, &()).await?,
                Some("LoadUnit") => bus.reply(&header, &path(OBJECT)?).await?,
                Some("ListUnitsByNames") => bus.reply(&header, &vec![self.listed()?]).await?,
                Some("Get") => match self.property(&call)? {
                    Some(value) => bus.reply(&header, &value).await?,
                    None => unknown(&bus, &call).await?,
                },
                Some("StartUnit") => self.start(&bus, &call).await?,
                _ => unknown(&bus, &call).await?,
            }
        }
        Ok(())
    }

    async fn start(&mut self, bus: &Connection, call: &Message) -> Result<()> {
        let at = monotonic()?;
        let header = call.header();
        let caller = header.sender().context("the bus says who calls")?.to_owned();
        let caller =
            zbus::fdo::DBusProxy::new(bus).await?.get_connection_unix_process_id(caller.into()).await?;
        let computed = first_thread_time(caller.cast_signed())?;
        self.ordered.send(StartOrder { at, computed })?;
        self.is_started = true;
        bus.reply(&header, &path(JOB)?).await?;
        let of_job = (7_u32, path(JOB)?, &self.unit, "done");
        let interface = "org.freedesktop.systemd1.Manager";
        Ok(bus.emit_signal(None::<&str>, MANAGER, interface, "JobRemoved", &of_job).await?)
    }

    const fn state(&self) -> &'static str {
        if self.is_started { "active" } else { "inactive" }
    }

    fn listed(&self) -> Result<Listed> {
        let (none, state, below) = (String::new, self.state().to_owned(), "dead".to_owned());
        let job = path("/")?;
        Ok((self.unit.clone(), none(), "loaded".into(), state, below, none(), path(OBJECT)?, 0, none(), job))
    }

    /// One of the unit's properties, for which Get asks.
    fn property(&self, call: &Message) -> Result<Option<Variant<'static>>> {
        let body = call.body();
        let (_, name): (&str, &str) = body.deserialize()?;
        Ok(match name {
            "ActiveState" => Some(Variant::from(self.state())),
            "InvocationID" => Some(Variant::from(if self.is_started { vec![7_u8; 16] } else { Vec::new() })),
            "NRestarts" => Some(Variant::from(0_u32)),
            _ => None,
        })
    }
}

async fn unknown(bus: &Connection, call: &Message) -> Result<()> {
    let what = "it only stands for systemd";
    Ok(bus.reply_error(&call.header(), "org.freedesktop.DBus.Error.UnknownMethod", &what).await?)
}

fn path(of: &str) -> Result<OwnedObjectPath> {
    Ok(OwnedObjectPath::try_from(of)?)
}
