//! Whose sockets the programs take hold of.

/// Ranges of user ids, first and last: the sockets of these users, and of no other, are hooked. Programs that were loaded for one
/// user find other users' sockets in the cgroup as well (`sudo`, a setuid program), and leave them alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Owners {
    ranges: [[u32; 2]; Self::MOST],
}

impl Owners {
    /// How many ranges there may be: the user's own id, and the user's ranges of subordinate ids.
    pub const MOST: usize = 8;
    /// A range that holds no user.
    const NONE: [u32; 2] = [1, 0];

    /// No user at all.
    pub const NO_USER: Self = Self { ranges: [Self::NONE; Self::MOST] };
    /// Everybody: for a forwarder that loads for itself, where the cgroup alone says whom it looks at.
    pub const EVERYBODY: Self = Self {
        ranges: [
            [0, u32::MAX],
            Self::NONE,
            Self::NONE,
            Self::NONE,
            Self::NONE,
            Self::NONE,
            Self::NONE,
            Self::NONE,
        ],
    };

    /// The user and as many of the ranges (first id and count) as there is room for.
    #[must_use]
    pub fn of(user: u32, subordinate: &[(u32, u32)]) -> Self {
        let mut owners = Self::NO_USER;
        owners.ranges[0] = [user, user];
        let counted = subordinate.iter().filter(|(first, count)| *first > 0 && *count > 0);
        for (range, (first, count)) in owners.ranges[1..].iter_mut().zip(counted) {
            *range = [*first, first.saturating_add(count - 1)];
        }
        owners
    }

    /// Whether no user is left out, so that no socket's owner needs to be looked up.
    #[inline(always)]
    #[must_use]
    pub const fn are_everybody(&self) -> bool {
        self.ranges[0][0] == 0 && self.ranges[0][1] == u32::MAX
    }

    /// Whether a socket of this user is one of theirs.
    #[inline(always)]
    #[must_use]
    pub fn hold(&self, user: u32) -> bool {
        // Without a loop that stops early: the programs have no branches to spare.
        self.ranges.iter().fold(false, |held, range| held | (range[0] <= user && user <= range[1]))
    }
}
