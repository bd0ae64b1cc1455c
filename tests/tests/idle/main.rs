//! When a service is woken and when it may sleep again: `--wake-on=data`, `--wake-ignore`, `--idle-by=bytes`, `--idle-ignore`, `--idle-below`, `--min-uptime`, `--keep-awake`, who is busy, and
//! waking and sleeping by hand.
//!
//! Needs: a network namespace; root for one test. Takes: seconds.

mod busy;
mod by_bytes;
mod by_hand;
mod ignored;
mod keep_awake;
mod often;
mod too_little;
mod wake_on_data;

use std::time::Duration;

use bro_tests::forwarder::Forwarder;

/// Long enough for what is going to happen to have happened.
const MOMENT: Duration = Duration::from_millis(300);

/// How often a service was woken for a first client.
fn wakes(forwarder: &Forwarder) -> usize {
    forwarder.log().lines().iter().filter(|line| line.contains("waking the service")).count()
}
