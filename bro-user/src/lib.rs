//! bro: start any container on its first connection, relay it without losing a byte, and get out of the way.
//!
//! The library behind the `bro` binary, so that tests and fuzzers reach its parts. Start reading at [`commands::forward`] (one
//! forwarder's life); ARCHITECTURE.md is the map.

pub mod address;
pub mod cli;
pub mod commands;
pub mod connection;
pub mod control_socket;
pub mod engine;
pub mod exit;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod installed;
pub mod logging;
pub mod netns;
pub mod podman;
mod port_owner;
pub mod proxy_protocol;
pub mod rate;
mod read_bounded;
pub mod relay;
pub mod run_as;
pub mod sandbox;
pub mod service;
pub mod sockaddr;
pub mod source;
pub mod stats;
pub mod sys;
pub mod systemd;
pub mod target;
pub mod units;
