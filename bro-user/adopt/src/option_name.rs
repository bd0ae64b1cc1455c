//! What options of sockets are called.

use serde::{Deserialize, Serialize};

/// An option by level and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    pub(crate) level: i32,
    pub(crate) name: i32,
}

/// The option of this level and name.
#[must_use]
pub const fn at(level: i32, name: i32) -> Name {
    Name { level, name }
}
