//! System calls that came with Linux 5.1 and later, without those that a forwarder makes (seccomp(2)): the part of its service's
//! filter that the service manager cannot have cheaply. A manager's list of what is *allowed* takes libseccomp 4 ms at each start,
//! since a rule is made for each call that the manager knows; a list of what is *not* takes 0.5 ms, but leaves calls that are newer than the
//! manager. From number 424 on a call has the same number on every architecture, so that a few comparisons do for all of them.

use std::io;

use nix::libc;
use seccompiler::sock_filter;

/// The first number that all architectures share.
const FIRST: u32 = 424;

/// Those at or above it that the control process and its agents make, or the libraries that they are linked to.
const ALLOWED: [u32; 14] = [
    424, // pidfd_send_signal
    434, // pidfd_open
    435, // clone3
    436, // close_range
    437, // openat2
    438, // pidfd_getfd, which the service manager forbids where no socket is adopted
    439, // faccessat2
    441, // epoll_pwait2
    444, // landlock_create_ruleset
    445, // landlock_add_rule
    446, // landlock_restrict_self
    449, // futex_waitv
    452, // fchmodat2
    462, // mseal
];

/// Where the number of a call is in `seccomp_data`.
const NUMBER: u32 = 0;

/// Refuses the others, for the calling thread and all it will start, with ENOSYS: to a library that is as on an older kernel.
///
/// # Errors
/// prctl(2)'s and seccomp(2)'s; EACCES for a process that could still gain privileges by execve(2).
pub fn refuse() -> io::Result<()> {
    if !nix::sys::prctl::get_no_new_privs()? {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    seccompiler::apply_filter(&program()).map_err(io::Error::other)
}

fn program() -> Vec<sock_filter> {
    let instruction = |code: u32, jt, k| sock_filter { code: code as u16, jt, jf: 0, k };
    let answer = |k| instruction(libc::BPF_RET | libc::BPF_K, 0, k);
    let mut program = vec![instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, NUMBER)];
    // What is older is the service manager's part.
    program.push(instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, FIRST));
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    for (at, number) in ALLOWED.into_iter().enumerate() {
        // To the last instruction, over the comparisons that are left and the refusal.
        let over = u8::try_from(ALLOWED.len() - at).expect("there are few");
        program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, over, number));
    }
    program.push(answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()));
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program answers, for a call of this number.
    fn answer(number: u32) -> u32 {
        let program = program();
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let holds = match u32::from(code) {
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    assert_eq!(k, NUMBER);
                    loaded = number;
                    at += 1;
                    continue;
                }
                code if code == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => loaded >= k,
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => loaded == k,
                code => panic!("{code:#x}"),
            };
            at += 1 + usize::from(if holds { jt } else { jf });
        }
    }

    #[test]
    fn what_is_new_and_not_named_is_refused() {
        for number in (0..1000).chain([0x4000_0000, u32::MAX]) {
            let allowed = number < FIRST || ALLOWED.contains(&number);
            let wanted = if allowed {
                libc::SECCOMP_RET_ALLOW
            } else {
                libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()
            };
            assert_eq!(answer(number), wanted, "{number}");
        }
    }

    #[test]
    fn the_numbers_are_the_calls() {
        let named = [
            libc::SYS_pidfd_send_signal,
            libc::SYS_pidfd_open,
            libc::SYS_clone3,
            libc::SYS_close_range,
            libc::SYS_openat2,
            libc::SYS_pidfd_getfd,
            libc::SYS_faccessat2,
            libc::SYS_epoll_pwait2,
            libc::SYS_landlock_create_ruleset,
            libc::SYS_landlock_add_rule,
            libc::SYS_landlock_restrict_self,
            libc::SYS_futex_waitv,
            libc::SYS_fchmodat2,
            libc::SYS_mseal,
        ];
        assert_eq!(ALLOWED.map(i64::from), named);
    }
}
