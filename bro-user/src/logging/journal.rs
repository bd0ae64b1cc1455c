//! journald's native protocol over a connected socket. A process that names journald's address with every message, as
//! tracing-journald does, may talk to any process, and the relay process may not. Besides, a person reads more than the bare
//! sentence here.

use std::fmt::{Debug, Write as _};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::exit::on_one_line;
use crate::sys;

/// Where journald listens (systemd-journald.service(8)).
const SOCKET: &str = "/run/systemd/journal/socket";

/// More than any line of ours, and less than a datagram takes.
const LONGEST: usize = 64 * 1024;

/// Sends each event to journald, with its fields as BRO_….
#[derive(Debug, Clone)]
pub struct Journal {
    /// Forked processes have it as well.
    socket: Arc<UnixDatagram>,
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
        Ok(Self { socket: Arc::new(socket) })
    }

    /// Waits until all that was sent has been read and dealt with, or for as long as is given.
    pub fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        // journald takes one datagram after the other, and makes nothing of an empty one: when that is read, the ones before are dealt with.
        if self.socket.send(&[]).is_err() {
            return;
        }
        while sys::unread(self.socket.as_fd()).is_ok_and(|bytes| bytes > 0) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut message =
            Message { bytes: Vec::with_capacity(512), text: String::new(), fields: String::new() };
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
        message.put_text();
        // Like every other logger: a journal that does not keep up loses lines, it does not hold connections up.
        self.socket.send(&message.bytes[..message.bytes.len().min(LONGEST)]).ok();
    }
}

/// Fields as journald takes them: the name, a newline, the value's length as a little-endian 64-bit number, the value, a newline.
/// What a person reads, MESSAGE, is what stands on standard error elsewhere: the sentence and the fields.
#[derive(Debug)]
struct Message {
    bytes: Vec<u8>,
    text: String,
    fields: String,
}

impl Message {
    fn put(&mut self, name: &str, value: &str) {
        self.bytes.extend(name.bytes());
        self.bytes.push(b'\n');
        self.bytes.extend((value.len() as u64).to_le_bytes());
        self.bytes.extend(value.bytes());
        self.bytes.push(b'\n');
    }

    fn field(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.text),
            name => {
                self.put(&format!("BRO_{}", name.to_uppercase().replace('.', "_")), value);
                // Writing to a String cannot fail.
                write!(self.fields, " {name}={}", on_one_line(value)).ok();
            }
        }
    }

    fn put_text(&mut self) {
        let text = std::mem::take(&mut self.text) + &self.fields;
        self.put("MESSAGE", &text);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_waited_for_until_it_is_read_and_no_longer_than_is_given() {
        let (ours, journald) = UnixDatagram::pair().unwrap();
        let journal = Journal { socket: Arc::new(ours) };
        journal.socket.send(b"a line").unwrap();
        let began = Instant::now();
        journal.flush(Duration::from_millis(20));
        assert!(began.elapsed() >= Duration::from_millis(20));
        let reader = std::thread::spawn(move || {
            let mut lengths = Vec::new();
            for _ in 0..3 {
                lengths.push(journald.recv(&mut [0; 16]).unwrap());
            }
            (lengths, journald)
        });
        journal.flush(Duration::from_secs(60));
        let (lengths, _journald) = reader.join().unwrap();
        assert_eq!(lengths, [6, 0, 0]);
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
