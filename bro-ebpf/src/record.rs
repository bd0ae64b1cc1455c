//! The record of a lane, which the programs and the forwarder share through a memory-mapped array, and the counters.

use core::sync::atomic::AtomicU64;

/// Why a message was left to ordinary TCP. The value indexes [`Record::passed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// Bytes the sender passed before are still on their way through the forwarder.
    Order = 0,
    /// The target's room is used up.
    Credit = 1,
    /// The forwarder closed the lane.
    Off = 2,
    /// The socket has an upper-layer protocol (kernel TLS): the lane would carry its plaintext.
    Ulp = 3,
    /// The owner uses the socket in blocking mode.
    Blocking = 4,
    /// TCP's memory is under pressure on this host, so the target's send buffer may shrink at any time.
    Pressure = 5,
    /// The target left its map.
    Gone = 6,
    /// The sender is in bulk: it has sent much since it last read.
    Bulk = 7,
}

impl Reason {
    /// How many there are.
    pub const COUNT: usize = 8;
    /// All, in the order of [`Record::passed`].
    pub const ALL: [Self; Self::COUNT] = [
        Self::Order,
        Self::Credit,
        Self::Off,
        Self::Ulp,
        Self::Blocking,
        Self::Pressure,
        Self::Gone,
        Self::Bulk,
    ];

    /// The word for logs and status.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Credit => "credit",
            Self::Off => "off",
            Self::Ulp => "ulp",
            Self::Blocking => "blocking",
            Self::Pressure => "pressure",
            Self::Gone => "gone",
            Self::Bulk => "bulk",
        }
    }
}

/// One direction of one connection. All fields are 64 bits wide, the narrowest atomic a program has. The first cache line is the forwarder's to write (but for `notified`), the others the
/// program's, under the sender's socket lock.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Record {
    /// Payload bytes the forwarder itself has written to the target, in total since the sender was established. Stored
    /// only after the write succeeded.
    pub forwarded: AtomicU64,
    /// Socket memory that may be charged, in total.
    pub granted: AtomicU64,
    /// With less credit left than this the program sends an event.
    pub low: AtomicU64,
    /// How often the forwarder granted.
    pub grants: AtomicU64,
    /// Which use of this slot it is. A sender that still has an older number takes no notice of the record.
    pub serial: AtomicU64,
    /// The lane is open (1) or shut (0).
    pub on: AtomicU64,
    /// The program told of low credit (1); the forwarder clears it.
    pub notified: AtomicU64,
    /// Socket memory charged, in total.
    pub spent: AtomicU64,
    /// Payload bytes redirected.
    pub bytes: AtomicU64,
    /// Messages redirected.
    pub messages: AtomicU64,
    /// Messages passed, by [`Reason`].
    pub passed: [AtomicU64; Reason::COUNT],
    /// The last serial number that this slot had, so that the next user of it after a forwarder that died goes on from there. The
    /// forwarder's; the programs take no notice of it.
    pub last: AtomicU64,
    unused: [u64; 5],
}

const _: () = assert!(core::mem::size_of::<Record>() == 192);

/// What the programs count for all connections together. The value indexes the array of totals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Senders put into the senders' map.
    Hooked = 0,
    /// Senders the kernel refused there (map full, another's program, a socket with an upper-layer protocol).
    HookRefused = 1,
    /// Senders taken out of it at their half-close or close.
    Unhooked = 2,
    /// Sockets not hooked, or let go, because they are in blocking mode.
    Blocking = 3,
    /// Sockets not hooked because they ask for MSG_ZEROCOPY completions, which sockets in a map never get.
    Zerocopy = 4,
    /// Sockets not hooked because they sent data in their SYN.
    FastOpen = 5,
    /// Sockets noted as such that may come to be hooked.
    Watched = 6,
    /// Events that did not fit the ring buffer.
    EventsLost = 7,
    /// Sockets left alone because they are another user's than the set's.
    Foreign = 8,
}

impl Counter {
    /// How many there are.
    pub const COUNT: usize = 9;
}
