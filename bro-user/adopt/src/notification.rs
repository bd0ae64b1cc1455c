//! A system call that a container waits in: which one it is, and what it can be answered (seccomp_unotify(2)).

use nix::errno::Errno;
use nix::libc;

pub use crate::sys::Raw;

/// The calls that the profile notifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// bind(2): an address may be wanted that a kept original still has.
    Bind,
    /// listen(2): the moment of adoption.
    Listen,
    /// shutdown(2) with another `how` than SHUT_WR.
    Shutdown,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bind, Self::Listen, Self::Shutdown];

    /// Its name (syscalls(2)).
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Listen => "listen",
            Self::Shutdown => "shutdown",
        }
    }

    /// Its number in this program's own architecture.
    #[must_use]
    pub const fn number(self) -> libc::c_long {
        match self {
            Self::Bind => libc::SYS_bind,
            Self::Listen => libc::SYS_listen,
            Self::Shutdown => libc::SYS_shutdown,
        }
    }
}

/// What a notified number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meant {
    /// One of the calls, of this machine's own architecture.
    Call(Call),
    /// Another call: nothing that this agent decides about.
    Other,
    /// A call of another architecture than this program's (i386 on `x86_64`), where the same number is another call.
    Foreign,
}

/// AUDIT_ARCH_… (linux/audit.h) of this program, and its numbers of the calls.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xC000_00B7;
/// No known one: nothing is ever adopted.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURE: u32 = 0;

/// The x32 calls of `x86_64` have its architecture, and this bit in their numbers (asm/unistd.h, __X32_SYSCALL_BIT).
const X32: i32 = 0x4000_0000;

impl Meant {
    /// By architecture and number.
    #[must_use]
    pub fn of(notification: &Raw) -> Self {
        if notification.arch != ARCHITECTURE || notification.number & X32 != 0 {
            return Self::Foreign;
        }
        let number = libc::c_long::from(notification.number);
        Call::ALL.into_iter().find(|call| call.number() == number).map_or(Self::Other, Self::Call)
    }
}

/// What the caller gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The kernel makes the call itself (SECCOMP_USER_NOTIF_FLAG_CONTINUE, Linux 5.5). It reads its arguments again, so never for a call that
    /// must not be made.
    Continue,
    /// 0, without the call.
    Done,
    /// This error, without the call.
    Failed(Errno),
}

impl Answer {
    /// As the kernel takes it: error and flags.
    #[must_use]
    pub const fn words(self) -> (i32, u32) {
        match self {
            Self::Continue => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
            Self::Done => (0, 0),
            Self::Failed(errno) => (-(errno as i32), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meant(arch: u32, number: i32) -> Meant {
        Meant::of(&Raw { id: 1, thread: 1, arch, number, arguments: [0; 6] })
    }

    #[test]
    fn a_number_means_something_in_its_own_architecture_alone() {
        const I386: u32 = 0x4000_0003;
        let listen = i32::try_from(libc::SYS_listen).unwrap();
        assert_eq!(meant(ARCHITECTURE, listen), Meant::Call(Call::Listen));
        assert_eq!(meant(ARCHITECTURE, listen | X32), Meant::Foreign);
        assert_eq!(meant(ARCHITECTURE, -1), Meant::Foreign);
        assert_eq!(meant(ARCHITECTURE, 0), Meant::Other);
        // 363 is i386's own listen, and the others are what this machine calls so.
        for number in [363, listen] {
            assert_eq!(meant(I386, number), Meant::Foreign);
        }
    }

    #[test]
    fn an_error_is_negative_and_only_a_continued_call_has_a_flag() {
        assert_eq!(Answer::Continue.words(), (0, 1));
        assert_eq!(Answer::Done.words(), (0, 0));
        assert_eq!(Answer::Failed(Errno::EBADF).words(), (-9, 0));
    }
}
