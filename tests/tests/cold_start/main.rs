//! Clients that come before the service listens: held in order, connected the moment it listens, forgotten when they leave,
//! reset when it takes too long; and the namespace that is another one the next time. And how much of a cold start is bro's own.
//!
//! Needs: a network namespace; dbus-daemon; root for one test. Takes: 20 s.

mod agents;
mod conmon;
mod held;
mod manager;
mod namespaces;
mod own_part;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bro_tests::forwarder::{Forwarder, Setup};
use bro_tests::netns::{Namespace, Pinned};
use bro_tests::pattern::Pattern;
use bro_tests::peers::{Address, Bound, Conn, Family, Here, Listener, PATIENCE};
use bro_tests::process;
use bro_tests::require_namespaces;
use bro_tests::scene::{Scene, expect_relayed};
use bro_tests::tier::Need;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MOMENT: Duration = Duration::from_millis(300);
