//! That this kernel cannot have the kernel relay, noted until the next boot: to find that out takes the verifier and a test, which
//! are more processor time than all the rest of a wake.

use std::io;

use bro_relay::read_bounded::{self, Link};

use crate::control_socket;

/// The longest note that is read.
const LONGEST: u64 = 1024;

/// Which kernel it is that the note is about, and which bro has tried it; the folder is gone with a reboot, but an image may have brought one along.
fn kernel() -> Option<String> {
    let name = nix::sys::utsname::uname().ok()?;
    let (release, version) = (name.release().to_string_lossy(), name.version().to_string_lossy());
    Some(format!("{release} {version}, as seen by bro {}", env!("CARGO_PKG_VERSION")))
}

fn file() -> std::path::PathBuf {
    control_socket::base_directory().join("fionread-lies")
}

/// Did a forwarder see that this kernel answers FIONREAD with 0 for hooked sockets?
#[must_use]
pub fn is_noted() -> bool {
    read_bounded::read(&file(), LONGEST, Link::Refuse).is_ok_and(|noted| Some(noted) == kernel())
}

/// Notes it for later forwarders. One that cannot be written costs them time.
pub fn note() {
    let write = || -> io::Result<()> {
        let kernel = kernel().ok_or(io::ErrorKind::Unsupported)?;
        std::fs::create_dir_all(control_socket::base_directory())?;
        std::fs::write(file(), kernel)
    };
    if let Err(error) = write() {
        tracing::debug!(%error, "the next forwarder tests the kernel relay again");
    }
}
