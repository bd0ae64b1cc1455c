//! journald's native protocol over a connected socket, for the relay process. tracing-journald, which the control process uses, names
//! journald's address with every message, and a process that may name addresses may talk to anybody.

use std::fmt::{Debug, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Where journald listens (systemd-journald.service(8)).
const SOCKET: &str = "/run/systemd/journal/socket";

/// More than any line of ours, and less than a datagram takes.
const LONGEST: usize = 64 * 1024;

/// Sends each event to journald, with the fields that tracing-journald gives it.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
}

impl Journal {
    /// Connects.
    ///
    /// # Errors
    /// When there is no journald.
    pub fn connect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(SOCKET)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut message = Message(Vec::with_capacity(512));
        message.put(
            "PRIORITY",
            match *metadata.level() {
                Level::ERROR => "3",
                Level::WARN => "4",
                Level::INFO => "5",
                Level::DEBUG => "6",
                Level::TRACE => "7",
            },
        );
        message.put("SYSLOG_IDENTIFIER", "bro");
        message.put("TARGET", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            message.put("CODE_FILE", file);
            message.put("CODE_LINE", &line.to_string());
        }
        event.record(&mut message);
        // Like every other logger: a journal that does not keep up loses lines, it does not hold connections up.
        self.socket.send(&message.0[..message.0.len().min(LONGEST)]).ok();
    }
}

/// Fields as journald takes them: the name, a newline, the value's length as a little-endian 64-bit number, the value, a newline.
#[derive(Debug)]
struct Message(Vec<u8>);

impl Message {
    fn put(&mut self, name: &str, value: &str) {
        self.0.extend(name.bytes());
        self.0.push(b'\n');
        self.0.extend((value.len() as u64).to_le_bytes());
        self.0.extend(value.bytes());
        self.0.push(b'\n');
    }

    fn field(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.put("MESSAGE", value),
            name => self.put(&format!("BRO_{}", name.to_uppercase().replace('.', "_")), value),
        }
    }
}

impl Visit for Message {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.field(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        // Into memory: it cannot fail.
        write!(text, "{value:?}").ok();
        self.field(field, &text);
    }
}
