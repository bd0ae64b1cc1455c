//! What a connection's sides have acknowledged, as far as it was looked at (`--user-timeout`).

use std::time::Instant;

/// What is known of a connection's acknowledgements.
#[derive(Debug, Clone, Copy, Default)]
pub struct Acknowledged {
    /// What had been sent when it was looked at last.
    pub sent: Amount,
    /// All of that was acknowledged.
    pub settled: bool,
    /// Since when each side has answered nothing of it.
    pub since: [Option<Instant>; 2],
}

/// How much has been sent to each side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Bytes to the client, and to the service.
    pub bytes: (u64, u64),
    /// Whether each direction has ended.
    pub ends: [bool; 2],
}
