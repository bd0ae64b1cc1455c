//! What touches clients' bytes: the engine and its relays, in a process that has no rights ([`process`], [`sandbox`]), and the
//! [agent](netns::agent) that makes sockets in a container's network namespace.
//!
//! It waits in one epoll of its own: neither tokio nor D-Bus nor a command line is in here, and `Cargo.toml` keeps it so. Start
//! reading at [`engine`] (one thread, every connection) and [`connection`] (one client's story).

pub mod ancillary;
pub mod connection;
pub mod counters;
pub mod engine;
pub mod flows;
pub mod listener;
pub mod netns;
pub mod peer;
pub mod process;
pub mod proxy_protocol;
pub mod rate;
pub mod read_bounded;
pub mod relay;
pub mod sandbox;
pub mod sockaddr;
pub mod source;
pub mod stats;
pub mod sys;
pub mod target;
pub mod unreachable;
