//! The harness: what every suite under `tests/tests/` stands on.

pub mod bro;
pub mod host;
pub mod tier;
