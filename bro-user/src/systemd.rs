//! systemd as other processes see it: its managers over D-Bus, its unit files, the sockets it passes, what it is told.

pub mod calendar;
pub mod listen_fds;
pub mod manager;
pub mod notify;
pub(crate) mod own_unit;
pub mod progress;
pub mod restart;
pub mod run_command;
pub mod scope;
pub mod time_span;
pub mod unit_file;
