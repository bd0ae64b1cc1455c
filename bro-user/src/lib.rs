//! bro: start any container on its first connection, relay it without losing a byte, and get out of the way.
//!
//! The library behind the `bro` binary, so that tests and fuzzers reach its parts. Start reading at [`commands::forward`] (one
//! forwarder's life); ARCHITECTURE.md is the map.

pub mod address;
pub mod cli;
pub mod commands;
pub mod control_socket;
pub mod exit;
pub mod fallback;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod installed;
mod last_words;
pub mod ledger;
pub mod logging;
pub mod metrics;
pub mod netns;
mod paths;
pub mod podman;
mod port_owner;
mod rate;
mod relay_handle;
pub mod run_as;
pub mod service;
pub mod sys;
pub mod systemd;
pub mod targets;
mod unassigned_address;
pub mod units;
