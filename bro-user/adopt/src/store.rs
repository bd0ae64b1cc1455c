//! The names of what the service manager keeps for an agent that ends.

use crate::receiver::Role;

/// The record of what is in flight.
pub const RECORD: &str = "adopt-record";

/// The most notification descriptors: one of each container, and one of each command that runs in it. What comes beyond waits at the
/// seccomp socket.
pub const MOST_NOTIFIERS: usize = 128;

/// The most descriptors that an agent stores: FileDescriptorStoreMax= has to allow for as many.
pub const MOST: usize = 1 + crate::receiver::MOST_ARRIVING + MOST_NOTIFIERS + crate::original::MOST;

/// What a stored descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`RECORD`].
    Record,
    /// A runtime's connection, by which a notification descriptor comes. That one has the same number.
    Arriving,
    /// A notification descriptor.
    Notifier(Role),
    /// A service's own socket.
    Original,
}

impl Kind {
    const NUMBERED: [(Self, &str); 4] = [
        (Self::Arriving, "adopt-arriving-"),
        (Self::Notifier(Role::Container), "adopt-container-"),
        (Self::Notifier(Role::Executed), "adopt-executed-"),
        (Self::Original, "adopt-original-"),
    ];

    /// By its name: kind and number. `None` of what an agent has not stored.
    #[must_use]
    pub fn of(name: &str) -> Option<(Self, u64)> {
        if name == RECORD {
            return Some((Self::Record, 0));
        }
        let numbered = |(kind, prefix): (Self, &str)| Some((kind, name.strip_prefix(prefix)?.parse().ok()?));
        Self::NUMBERED.into_iter().find_map(numbered)
    }

    /// Its name with this number.
    #[must_use]
    pub fn name(self, number: u64) -> String {
        let prefix = Self::NUMBERED.into_iter().find(|(kind, _)| *kind == self);
        prefix.map_or_else(|| RECORD.to_owned(), |(_, prefix)| format!("{prefix}{number}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_it_is() {
        let notifiers = [Role::Container, Role::Executed].map(Kind::Notifier);
        for kind in notifiers.into_iter().chain([Kind::Arriving, Kind::Original]) {
            assert_eq!(Kind::of(&kind.name(7)), Some((kind, 7)));
        }
        assert_eq!(Kind::of(&Kind::Record.name(0)), Some((Kind::Record, 0)));
        for other in ["seccomp", "adopt-original-", "adopt-original-x", "http"] {
            assert_eq!(Kind::of(other), None, "{other}");
        }
    }
}
