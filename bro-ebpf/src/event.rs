//! What the programs tell the forwarder through the ring buffer.

use crate::keys::Flow;

/// An event as it lies in the ring buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct RawEvent {
    /// Which event: the constants of this type.
    pub what: u32,
    /// The record's index.
    pub record: u32,
    /// The record's serial number.
    pub serial: u32,
    /// The watched port.
    pub port: u32,
    /// The namespace's cookie.
    pub netns: u64,
    /// The sender's socket cookie.
    pub socket: u64,
}

impl RawEvent {
    /// [`Event::LowCredit`].
    pub const LOW_CREDIT: u32 = 1;
    /// [`Event::BlockingSender`].
    pub const BLOCKING_SENDER: u32 = 2;
    /// [`Event::Listening`].
    pub const LISTENING: u32 = 3;
    /// [`Event::Learned`]; `record` holds the kind.
    pub const LEARNED: u32 = 4;
    /// [`Event::Proved`]; the event is a [`RawProved`].
    pub const PROVED: u32 = 5;
}

/// [`Event::Proved`] as it lies in the ring buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct RawProved {
    /// What all events have.
    pub event: RawEvent,
    /// The sender's addresses.
    pub flow: Flow,
}

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A lane's credit is running out: measure the target's room and grant anew.
    LowCredit {
        /// The record's index.
        record: u32,
        /// Its serial number; an event of an earlier use of the slot is to be ignored.
        serial: u32,
    },
    /// A hooked socket is in blocking mode: take it out of the senders' map. Its service counts as blocking already.
    BlockingSender {
        /// The key in the senders' map.
        socket: u64,
        /// The namespace's cookie.
        netns: u64,
        /// The watched port.
        port: u16,
    },
    /// A sender that has a lane was non-blocking both times that it was looked at after it had sent something: it may be hooked.
    Proved {
        /// The record's index.
        record: u32,
        /// Its serial number.
        serial: u32,
        /// The sender's socket cookie.
        socket: u64,
        /// Its addresses.
        flow: Flow,
    },
    /// Something listens at a watched port.
    Listening {
        /// The namespace's cookie.
        netns: u64,
        /// The port.
        port: u16,
    },
    /// The kind of a service became known.
    Learned {
        /// The namespace's cookie.
        netns: u64,
        /// The port.
        port: u16,
        /// One of [`crate::kind`].
        kind: u32,
    },
}

impl Event {
    /// Reads an event from the ring buffer's bytes; `None` for what no version of the programs sends.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let long = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let (record, serial, port) = (word(4)?, word(8)?, u16::try_from(word(12)?).ok()?);
        let (netns, socket) = (long(16)?, long(24)?);
        match word(0)? {
            RawEvent::LOW_CREDIT => Some(Self::LowCredit { record, serial }),
            RawEvent::BLOCKING_SENDER => Some(Self::BlockingSender { socket, netns, port }),
            RawEvent::LISTENING => Some(Self::Listening { netns, port }),
            RawEvent::LEARNED => Some(Self::Learned { netns, port, kind: record }),
            RawEvent::PROVED => {
                let address = |at: usize| bytes.get(at..at + 16)?.try_into().ok();
                let port = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
                let flow = Flow::new(long(32)?, address(40)?, port(72)?, address(56)?, port(74)?);
                Some(Self::Proved { record, serial, socket, flow })
            }
            _ => None,
        }
    }
}
