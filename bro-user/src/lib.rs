//! bro: start any container on its first connection, relay it without losing a byte, and get out of the way.
//!
//! The library behind the `bro` binary, so that tests and fuzzers reach its parts. Start reading at [`forward`] (one
//! forwarder's life) and [`engine`] (one thread, one epoll, every connection); ARCHITECTURE.md is the map.

pub mod activate;
pub mod activated;
pub mod activation;
mod bounded;
pub mod capabilities;
pub mod cli;
pub mod connection;
pub mod control;
pub mod doctor;
pub mod engine;
pub mod exit;
pub mod failed_wake;
pub mod forward;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod hand;
pub mod handover;
pub mod helper;
pub mod inhibit;
pub mod kernel;
pub mod life;
pub mod listen;
pub mod loader;
pub mod logging;
pub mod netns;
pub mod owner;
pub mod proxy_protocol;
pub mod quadlet;
pub mod rate;
pub mod relay;
pub mod sandbox;
pub mod sockaddr;
pub mod source;
pub mod stats;
pub mod status;
pub mod sys;
pub mod target;
pub mod timespan;
pub mod unit_file;
pub mod units;
pub mod upgrade;
pub mod wakes;
