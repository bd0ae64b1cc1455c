//! What is counted of datagrams: how many went which way, and why others did not.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// Why a datagram was not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// More wait for the service than there is room for, and this one had waited for longest.
    Queue,
    /// Its flow gave up its place while it waited.
    Evicted,
    /// The service could not be started, or not in time.
    StartFailed,
    /// The service sleeps, and its client is none that wakes it (`--wake-ignore`).
    WakeIgnored,
    /// The forwarder is leaving.
    Leaving,
    /// Nothing was bound at the target (any more).
    Refused,
    /// The buffer towards the service was full.
    ServiceBuffer,
    /// The buffer towards clients was full.
    ClientBuffer,
    /// It is longer than its way is wide.
    TooLong,
    /// There was no descriptor for a flow.
    Descriptors,
    /// The kernel would not send it.
    Unsendable,
}

impl Dropped {
    /// All reasons.
    pub const ALL: [Self; Self::WORDS.len()] = [
        Self::Queue,
        Self::Evicted,
        Self::StartFailed,
        Self::WakeIgnored,
        Self::Leaving,
        Self::Refused,
        Self::ServiceBuffer,
        Self::ClientBuffer,
        Self::TooLong,
        Self::Descriptors,
        Self::Unsendable,
    ];

    /// The same, as the figures name them.
    pub const WORDS: [&'static str; 11] = [
        "queue",
        "evicted",
        "start-failed",
        "wake-ignored",
        "leaving",
        "refused",
        "service-buffer",
        "client-buffer",
        "too-long",
        "descriptors",
        "unsendable",
    ];

    /// Its word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        Self::WORDS[self as usize]
    }
}

/// Datagrams and their bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// How many.
    pub datagrams: u64,
    /// What they carried, in bytes.
    pub bytes: u64,
}

impl Amounts {
    /// So many more, of so many bytes in all.
    pub const fn add_several(&mut self, datagrams: u64, bytes: u64) {
        self.datagrams += datagrams;
        self.bytes += bytes;
    }
}

impl AddAssign for Amounts {
    fn add_assign(&mut self, other: Self) {
        self.datagrams = self.datagrams.saturating_add(other.datagrams);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// Datagrams that were dropped, by why. Only a reason of bro's own is one, whatever the relay process says.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<String, u64>", into = "BTreeMap<&'static str, u64>")]
pub struct DropCounts([u64; Dropped::WORDS.len()]);

impl DropCounts {
    /// So many more.
    pub const fn add(&mut self, why: Dropped, count: u64) {
        self.0[why as usize] += count;
    }

    /// Every reason with how many there were.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Dropped::WORDS.into_iter().zip(self.0)
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl From<BTreeMap<String, u64>> for DropCounts {
    fn from(said: BTreeMap<String, u64>) -> Self {
        Self(Dropped::WORDS.map(|word| said.get(word).copied().unwrap_or(0)))
    }
}

impl From<DropCounts> for BTreeMap<&'static str, u64> {
    fn from(dropped: DropCounts) -> Self {
        dropped.each().filter(|(_, count)| *count > 0).collect()
    }
}

/// A listener's figures of datagrams.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatagramTally {
    /// Flows since the start.
    pub flows: u64,
    /// Flows now, waiting ones included.
    pub open: u64,
    /// Flows that wait for the service now.
    pub held: u64,
    /// Flows that gave up their place to another one.
    pub evicted: u64,
    /// What clients sent and the service was sent.
    pub to_service: Amounts,
    /// What the service sent and clients were sent.
    pub to_clients: Amounts,
    /// What was not passed on.
    pub dropped: DropCounts,
}

impl DatagramTally {
    /// Is there nothing to tell?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Without the figures of this moment.
    #[must_use]
    pub const fn lasting(self) -> Self {
        Self { open: 0, held: 0, ..self }
    }
}

impl AddAssign<&Self> for DatagramTally {
    fn add_assign(&mut self, other: &Self) {
        self.flows += other.flows;
        self.open += other.open;
        self.held += other.held;
        self.evicted += other.evicted;
        self.to_service += other.to_service;
        self.to_clients += other.to_clients;
        for (mine, its) in self.dropped.0.iter_mut().zip(other.dropped.0) {
            *mine = mine.saturating_add(its);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_word_and_its_count() {
        let mut tally = DatagramTally::default();
        tally.dropped.add(Dropped::Unsendable, 2);
        tally.dropped.add(Dropped::Queue, 1);
        let mut twice = tally;
        twice += &tally;
        let json = serde_json::to_value(twice).unwrap();
        assert_eq!(json["dropped"], serde_json::json!({ "queue": 2, "unsendable": 4 }));
        assert_eq!(serde_json::from_value::<DatagramTally>(json).unwrap(), twice);
        assert_eq!((Dropped::Queue.word(), Dropped::Unsendable.word()), ("queue", "unsendable"));
        assert!(Dropped::ALL.into_iter().enumerate().all(|(number, why)| why as usize == number));
        assert_eq!(serde_json::from_str::<DropCounts>(r#"{"x":7}"#).unwrap().total(), 0);
    }
}
