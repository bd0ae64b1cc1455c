//! What in the machine's log is a complaint.

/// Beginnings and parts of what Linux says when something is wrong with itself.
const KERNEL: &[&str] = &[
    "WARNING:",
    "BUG:",
    "BUG ",
    "Oops",
    "general protection fault",
    "Call Trace:",
    "kernel panic",
    "Kernel panic",
    "blocked for more than",
    "refcount_t:",
    "UBSAN:",
    "KASAN:",
    "page allocation failure",
    "Out of memory:",
    "segfault at",
    "traps:",
    "EXT4-fs error",
];

/// What it says when a processor did not get on: in an emulator that is the outer machine's load.
const SLOWNESS: &[&str] =
    &["detected stalls", "self-detected stall", "rcu_preempt kthread starved", "soft lockup"];

/// The lines in which the kernel complains: of itself, of a program that died of a signal, of an access that AppArmor has denied, of
/// a system call that a filter has killed for. Those about processors that came to a halt are left out, with the backtraces that
/// follow them: the outer machine's load does that.
#[must_use]
pub fn complaints(log: &str) -> Vec<&str> {
    let mut slow = false;
    let mut found = Vec::new();
    for line in log.lines() {
        let has = |parts: &[&str]| parts.iter().any(|part| line.contains(part));
        if has(SLOWNESS) {
            slow = true;
        } else if has(&["Call Trace:"]) && slow {
            slow = false;
        } else if has(KERNEL) || has(&["apparmor=\"DENIED\"", "type=1326"]) {
            found.push(line);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::complaints;

    #[test]
    fn a_log_tells_what_is_wrong_from_what_is_not() {
        let log = "\
            systemd 257 running in system mode (+PAM +AUDIT +SELINUX +APPARMOR +SECCOMP)\n\
            Linux version 6.12.117+deb13-amd64\n\
            audit: type=1400 audit(1.0:2): apparmor=\"STATUS\" operation=\"profile_load\" name=\"crun\"\n\
            audit: type=1400 audit(1.0:3): apparmor=\"ALLOWED\" operation=\"open\" profile=\"ping\"\n\
            audit: type=1400 audit(1.0:4): apparmor=\"DENIED\" operation=\"open\" profile=\"ping\"\n\
            rcu: INFO: rcu_preempt self-detected stall on CPU\n\
            Call Trace:\n\
            WARNING: CPU: 0 PID: 7 at net/core/skmsg.c:1\n\
            Call Trace:\n\
            audit: type=1326 audit(1.0:5): auid=4294967295 pid=9 comm=\"bro\" sig=31 syscall=41\n\
            bro[9]: segfault at 0 ip 0\n\
            watchdog: BUG: soft lockup - CPU#0 stuck for 26s!\n";
        let said: Vec<&str> = complaints(log).iter().map(|line| &line[..12.min(line.len())]).collect();
        assert_eq!(
            said,
            ["audit: type=", "WARNING: CPU", "Call Trace:", "audit: type=", "bro[9]: segf"],
            "{log}"
        );
    }
}
