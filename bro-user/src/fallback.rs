//! Why a socket that a service was to have itself (`--adopt`) is relayed, in a word: for metrics, the ledger and `bro status`.

use serde::{Deserialize, Serialize};

/// The reason in a word, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FallbackKind {
    /// The container was created without the profile.
    NoProfile,
    /// No socket of the service fits.
    NoneFits,
    /// It did not listen in time.
    StartTimeout,
    /// Its socket is of another family.
    Family,
    /// The listener is damaged.
    Damaged,
    /// The kernel refused a step.
    Refused,
    /// The kernel does not tell of clients that the service would accept itself.
    Uncountable,
    /// It is of a kind that no service gets.
    Kind,
}

impl FallbackKind {
    /// All of them, with their words.
    pub const ALL: [(Self, &str); 8] = [
        (Self::NoProfile, "no-profile"),
        (Self::NoneFits, "none-fits"),
        (Self::StartTimeout, "start-timeout"),
        (Self::Family, "family"),
        (Self::Damaged, "damaged"),
        (Self::Refused, "refused"),
        (Self::Uncountable, "uncountable"),
        (Self::Kind, "kind"),
    ];
}

impl FallbackKind {
    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, word)| word)
    }
}
