//! What a process does with signals, by its proc_pid_status(5).

/// Does it ignore this signal?
#[must_use]
pub fn ignores(status: &str, signal: i32) -> bool {
    is_in(status, "SigIgn:", signal)
}

/// Has it a handler for this signal, or does it wait for it with sigwait(3) or signalfd(2)? The first process of a process namespace hears no other
/// of its user's signals (pid_namespaces(7)). What is blocked is its first thread's.
#[must_use]
pub fn heeds(status: &str, signal: i32) -> bool {
    is_in(status, "SigCgt:", signal) || is_in(status, "SigBlk:", signal)
}

/// A mask in hexadecimal, the lowest bit for signal 1.
fn is_in(status: &str, mask: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix(mask));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    u32::try_from(signal - 1).is_ok_and(|bit| mask.checked_shr(bit).is_some_and(|rest| rest & 1 == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str =
        "Name:\tbro\nSigBlk:\t0000000200000000\nSigIgn:\t0000000000001001\nSigCgt:\t8000000000000002\n";

    #[test]
    fn each_mask_is_read() {
        assert!(ignores(STATUS, 1) && ignores(STATUS, 13));
        assert!(!ignores(STATUS, 2) && !ignores(STATUS, 15) && !ignores("", 1));
        assert!(heeds(STATUS, 2) && heeds(STATUS, 34) && heeds(STATUS, 64));
        for other in [-1, 0, 1, 15, 65, 1000] {
            assert!(!heeds(STATUS, other), "{other}");
        }
    }
}
