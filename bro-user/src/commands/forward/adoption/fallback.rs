//! Why a listener is relayed although it was to be adopted.

use std::time::Duration;

use bro_adopt::Misfit;
use bro_adopt::health::Damage;
use serde::{Deserialize, Serialize};

/// The reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fallback {
    /// A service listens, and no runtime has sent a notification descriptor.
    #[error(
        "the container has no seccomp profile of bro's: its runtime did not connect to the socket “seccomp”"
    )]
    NoProfile,
    /// A service listens, and not with a listen(2) of the container's own processes that this one could answer.
    #[error("the service listens at no socket that this one fits")]
    NoneFits,
    /// Nothing listens.
    #[error("the service did not listen within {} (--start-timeout)", crate::systemd::time_span::roughly(*.0))]
    StartTimeout(Duration),
    /// It listens at one that does not fit.
    #[error("{1}")]
    Misfit(FallbackKind, String),
    /// The listener is broken.
    #[error("{0}; restart its socket unit while no client is connected")]
    Damaged(#[from] Damage),
}

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
}

impl FallbackKind {
    /// All of them, with their words.
    pub const ALL: [(Self, &str); 6] = [
        (Self::NoProfile, "no-profile"),
        (Self::NoneFits, "none-fits"),
        (Self::StartTimeout, "start-timeout"),
        (Self::Family, "family"),
        (Self::Damaged, "damaged"),
        (Self::Refused, "refused"),
    ];
}

impl Fallback {
    pub(super) const fn kind(&self) -> FallbackKind {
        match self {
            Self::NoProfile => FallbackKind::NoProfile,
            Self::NoneFits => FallbackKind::NoneFits,
            Self::StartTimeout(_) => FallbackKind::StartTimeout,
            Self::Misfit(kind, _) => *kind,
            Self::Damaged(_) => FallbackKind::Damaged,
        }
    }
}

impl From<&Misfit> for Fallback {
    fn from(misfit: &Misfit) -> Self {
        let kind = match misfit {
            Misfit::Damaged(damage) => return Self::Damaged(*damage),
            Misfit::Relayed => FallbackKind::NoneFits,
            Misfit::Family => FallbackKind::Family,
            Misfit::Options(_) | Misfit::Epoll(_) | Misfit::Replacing(_) => FallbackKind::Refused,
        };
        Self::Misfit(kind, misfit.to_string())
    }
}

impl FallbackKind {
    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, word)| word)
    }
}
