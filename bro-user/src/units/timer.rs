//! NAME-activator.timer: starts the forwarder when a time of `--keep-awake` begins (systemd.timer(5)).

use std::fmt::Write as _;

use crate::installed::{Installed, SECTION};
use crate::systemd::calendar::DailySpans;

pub(super) fn text(installed: &Installed, spans: &DailySpans) -> String {
    let timer = installed.timer().unwrap_or_default();
    let mut text = super::heading(installed, Some(&timer));
    let (unit, service) = (&installed.unit, installed.service().unwrap_or_default());
    let first = installed.listeners.first().map(|listener| listener.socket.name.as_str()).unwrap_or_default();
    // Writing to a String cannot fail.
    write!(
        text,
        "[Unit]\n\
         Description=Times at which {unit} is kept awake\n\
         # It comes and goes with the listening.\n\
         PartOf={first}\n\
         \n\
         [Timer]\n\
         Unit={service}\n\
         # Also in the middle of such a time, after a boot: the forwarder finds out where it is.\n\
         OnActiveSec=0\n"
    )
    .ok();
    for span in &spans.0 {
        writeln!(text, "OnCalendar={}", span.begins()).ok();
    }
    write!(text, "AccuracySec=1s\n\n[{SECTION}]\nName={}\n", installed.name).ok();
    text
}
