//! Podman seen from outside: quadlets, the containers that run, the network namespace of a rootless user.

pub mod container;
pub mod quadlet;
pub mod rootless_netns;
