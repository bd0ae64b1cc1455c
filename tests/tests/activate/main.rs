//! `bro activate` below another root (`--root`), where it does everything but talk to systemd: what it writes, what it refuses,
//! and that nothing is ever half-written. On a real systemd: the host suites.
//!
//! Needs: a network namespace, systemd-analyze. Takes: seconds.

mod atomic;
mod below;
mod golden;
mod no_manager;
mod refusals;
mod security;
mod tree;
mod verify;
