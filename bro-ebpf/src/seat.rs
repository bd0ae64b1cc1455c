//! Seats: several forwarders of one user share one set of programs and maps, each with its own part of the records and a ring
//! buffer of its own.

/// How many seats a set has. A forwarder that loads for itself has the first.
pub const SEATS: usize = 16;

/// Whose record this is, where each seat has so many of them.
#[inline(always)]
#[must_use]
pub const fn seat_of(record: u32, each: u32) -> u32 {
    match record.checked_div(each) {
        Some(seat) => seat,
        None => 0,
    }
}

/// What the loader writes down for the forwarders that use the set: indices of the array `ABOUT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum About {
    /// Which programs these are; 0 while the set is being made.
    Version = 0,
    /// How many records each seat has.
    Records = 1,
    /// Whether this kernel says 0 when a hooked socket's owner asks how much waits to be read.
    FionreadLies = 2,
    /// Whether the self-test could not hook a client.
    NoClients = 3,
}

impl About {
    /// How many there are.
    pub const COUNT: usize = 4;
}
