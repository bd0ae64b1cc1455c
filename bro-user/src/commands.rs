//! The subcommands, each in a file of its name; `cli` has their options.

pub mod activate;
pub mod after_upgrade;
pub mod doctor;
pub mod fence;
pub mod forward;
pub mod helper;
pub mod loader;
pub mod metrics;
pub mod oci_runtime;
pub mod status;
pub mod top;
pub mod wake_sleep;
