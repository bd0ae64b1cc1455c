//! The harness: what every suite under `tests/tests/` stands on.

pub mod aborts;
pub mod activation;
pub mod adopt;
pub mod adopt_reports;
pub mod behaviours;
pub mod bro;
mod debian;
pub mod emulator;
pub mod forwarder;
#[cfg(target_arch = "x86_64")]
pub mod hijack;
pub mod host;
mod kept;
pub mod loader;
pub mod log;
pub mod netns;
pub mod notify;
pub mod pattern;
pub mod peers;
pub mod process;
pub mod programs;
pub mod pty;
pub mod scene;
pub mod scratch;
pub mod short;
pub mod street;
pub mod suite;
pub mod sys;
pub mod tier;
pub mod torture;
pub mod transcript;
pub mod udp;
pub mod vm;
pub mod vsock;
pub mod words;
