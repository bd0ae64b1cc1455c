//! Which service manager: the system's or a user's.

use serde::{Deserialize, Serialize};

/// A service manager, by its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeScope {
    /// The system's.
    System,
    /// This user's.
    User,
}

impl RuntimeScope {
    /// `--system`, `--user`, or that of the user that runs bro.
    #[must_use]
    pub fn choose(system: bool, user: bool) -> Self {
        if system || (!user && nix::unistd::geteuid().is_root()) { Self::System } else { Self::User }
    }

    /// The command that shows a unit's log, but for the unit.
    #[must_use]
    pub const fn journal(self) -> &'static str {
        match self {
            Self::System => "journalctl --unit",
            Self::User => "journalctl --user --unit",
        }
    }
}
