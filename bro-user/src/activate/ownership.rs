//! Which start of a unit was a forwarder's, so that the container is put to sleep again also by a forwarder that was itself
//! restarted meanwhile. A small file beside the status sockets: gone with a reboot, as the container is.

use std::path::PathBuf;

fn file(unit: &str) -> PathBuf {
    crate::status::base_directory().join(format!("started-{unit}"))
}

/// Notes that this run of the unit (its InvocationID, systemd.exec(5)) was started by a forwarder.
pub fn remember(unit: &str, invocation: &str) {
    let path = file(unit);
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&path, invocation));
    if let Err(error) = written {
        tracing::debug!(%error, "a forwarder that takes over from this one will not stop {unit}");
    }
}

/// Was this run of the unit started by a forwarder?
#[must_use]
pub fn is_ours(unit: &str, invocation: &str) -> bool {
    !invocation.is_empty() && std::fs::read_to_string(file(unit)).is_ok_and(|noted| noted == invocation)
}

/// It has been stopped.
pub fn forget(unit: &str) {
    std::fs::remove_file(file(unit)).ok();
}
