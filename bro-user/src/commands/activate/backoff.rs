//! How soon systemd restarts a forwarder that has failed.

use std::path::Path;

/// The version that brought RestartSteps= and RestartMaxDelaySec= (systemd.service(5)).
const STEPS: u32 = 254;

/// Does the service manager that will read the units know of steps? The version in an image's tree is unknown; a manager that does
/// not know of steps would complain of each unit at each start.
pub(super) fn has_steps(root: Option<&Path>) -> bool {
    root.is_none() && version().is_some_and(|version| version >= STEPS)
}

/// The version of the installed systemd.
fn version() -> Option<u32> {
    let output = std::process::Command::new("systemctl").arg("--version").output().ok()?;
    number(&String::from_utf8_lossy(&output.stdout))
}

/// `systemd 257 (257.9-1~deb13u1)`, and then a line of features.
fn number(text: &str) -> Option<u32> {
    let word = text.strip_prefix("systemd ")?.split_whitespace().next()?;
    word.split(|end: char| !end.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        assert_eq!(number("systemd 257 (257.9-1~deb13u1)\n+PAM"), Some(257));
        assert_eq!(number("systemd 254~rc1 (254~rc1)"), Some(254));
        assert_eq!(number("systemd v252"), None);
        assert_eq!(number("busybox"), None);
        assert!(!has_steps(Some(Path::new("/srv/image"))));
    }
}
