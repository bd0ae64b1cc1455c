//! System calls with whole words as arguments, in place of libc's own functions for them.
//!
//! The C ABI leaves the upper half of a register that holds an int undefined, and optimised callers leave old values there. Most of
//! glibc's functions pass the registers on as they are. The kernel looks at the lower half; but a seccomp filter compares all 64
//! bits, and systemd's `RestrictAddressFamilies=`, for one, then forbids what it should allow.
//!
//! So the program has these functions itself. A program's own symbols come before a shared library's, so that the standard library,
//! nix, tokio, zbus, aya and every other crate call these, unchanged. The types are those of libc's declarations, and what an
//! argument becomes follows from its type alone ([`Word`]). `tests/tests/words.rs` says what is left to glibc, and why; it looks at
//! what the built program still takes from there.
//!
//! Functions that C declares with `...` have fixed arguments here, which stable Rust can define: on these processors Linux passes
//! both kinds in the same registers.
#![allow(
    unsafe_code,
    reason = "these are libc's functions, which are unsafe to call and have no mangled name"
)]

use std::arch::asm;

use nix::libc::{
    self, c_char, c_int, c_long, c_uint, c_ulong, c_void, clockid_t, epoll_event, gid_t, id_t, idtype_t,
    iovec, mmsghdr, mode_t, msghdr, nfds_t, off_t, off64_t, pid_t, pollfd, rlimit, sighandler_t, siginfo_t,
    sigset_t, size_t, sockaddr, socklen_t, ssize_t, stat, stat64, statfs64, statx as statx_t, timespec,
    uid_t,
};

/// An argument as the kernel gets it: the whole of a register.
trait Word {
    fn word(self) -> usize;
}

impl Word for c_int {
    /// As C's conversion to a long: a negative number stays one.
    fn word(self) -> usize {
        self as isize as usize
    }
}

impl Word for c_uint {
    fn word(self) -> usize {
        self as usize
    }
}

impl Word for c_ulong {
    fn word(self) -> usize {
        self as usize
    }
}

impl Word for usize {
    fn word(self) -> usize {
        self
    }
}

impl Word for c_long {
    fn word(self) -> usize {
        self as usize
    }
}

impl<T> Word for *const T {
    fn word(self) -> usize {
        self as usize
    }
}

impl<T> Word for *mut T {
    fn word(self) -> usize {
        self as usize
    }
}

/// The system call itself. Arguments that are not given are zero.
///
/// # Safety
/// Those of the system call.
unsafe fn enter<const COUNT: usize>(number: c_long, given: [usize; COUNT]) -> isize {
    let word = |index: usize| given.get(index).copied().unwrap_or(0);
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the kernel's calling convention; it changes these registers and, as the caller answers for, memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") word(0),
            in("rsi") word(1),
            in("rdx") word(2),
            in("r10") word(3),
            in("r8") word(4),
            in("r9") word(5),
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the kernel's calling convention; it changes this register and, as the caller answers for, memory.
    unsafe {
        asm!(
            "svc 0",
            inlateout("x0") word(0) as isize => result,
            in("x1") word(1),
            in("x2") word(2),
            in("x3") word(3),
            in("x4") word(4),
            in("x5") word(5),
            in("x8") number,
            options(nostack)
        );
    }
    result
}

/// Turns the kernel's result into what libc's functions return.
fn finish(result: isize) -> isize {
    if !(-4095..0).contains(&result) {
        return result;
    }
    // SAFETY: this thread's own errno is always there.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; no other code refers to it now.
    unsafe { *errno = -result as c_int };
    -1
}

/// libc's functions: each with the number of its system call and the words for it, by default the function's own arguments.
macro_rules! calls {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty = $number:ident $(($($word:expr),*))?;)*) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($argument: $type),*) -> $result {
                let words = calls!(@words ($($argument),*) $(($($word),*))?);
                // SAFETY: the caller answers for what libc's function of this name asks.
                finish(unsafe { enter(libc::$number, words) }) as $result
            }
        )*
    };
    (@words $own:tt $named:tt) => { calls!(@words $named) };
    (@words ($($word:expr),*)) => { [$($word.word()),*] };
}

/// No pointer.
const NULL: usize = 0;
/// How large the kernel's signal mask is.
const MASK: usize = 8;
/// The current folder.
const HERE: c_int = libc::AT_FDCWD;

calls! {
    // Sockets.
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int = SYS_socket;
    fn socketpair(domain: c_int, kind: c_int, protocol: c_int, pair: *mut c_int) -> c_int = SYS_socketpair;
    fn bind(socket: c_int, address: *const sockaddr, length: socklen_t) -> c_int = SYS_bind;
    fn listen(socket: c_int, backlog: c_int) -> c_int = SYS_listen;
    fn connect(socket: c_int, address: *const sockaddr, length: socklen_t) -> c_int = SYS_connect;
    fn accept4(socket: c_int, address: *mut sockaddr, length: *mut socklen_t, flags: c_int) -> c_int = SYS_accept4;
    fn shutdown(socket: c_int, how: c_int) -> c_int = SYS_shutdown;
    fn getsockname(socket: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int = SYS_getsockname;
    fn getpeername(socket: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int = SYS_getpeername;
    fn getsockopt(socket: c_int, level: c_int, name: c_int, value: *mut c_void, length: *mut socklen_t) -> c_int
        = SYS_getsockopt;
    fn setsockopt(socket: c_int, level: c_int, name: c_int, value: *const c_void, length: socklen_t) -> c_int
        = SYS_setsockopt;
    fn send(socket: c_int, bytes: *const c_void, length: size_t, flags: c_int) -> ssize_t
        = SYS_sendto(socket, bytes, length, flags, NULL, NULL);
    fn sendto(
        socket: c_int, bytes: *const c_void, length: size_t, flags: c_int, to: *const sockaddr, size: socklen_t
    ) -> ssize_t = SYS_sendto;
    fn sendmsg(socket: c_int, message: *const msghdr, flags: c_int) -> ssize_t = SYS_sendmsg;
    fn sendmmsg(socket: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int = SYS_sendmmsg;
    fn recv(socket: c_int, bytes: *mut c_void, length: size_t, flags: c_int) -> ssize_t
        = SYS_recvfrom(socket, bytes, length, flags, NULL, NULL);
    fn recvfrom(
        socket: c_int, bytes: *mut c_void, length: size_t, flags: c_int, from: *mut sockaddr, size: *mut socklen_t
    ) -> ssize_t = SYS_recvfrom;
    fn recvmsg(socket: c_int, message: *mut msghdr, flags: c_int) -> ssize_t = SYS_recvmsg;
    fn recvmmsg(
        socket: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int, patience: *mut timespec
    ) -> c_int = SYS_recvmmsg;

    // Descriptors, and waiting for them. Where a processor lacks the older call, the newer one that does the same.
    fn close(file: c_int) -> c_int = SYS_close;
    fn dup(file: c_int) -> c_int = SYS_dup;
    fn pipe2(pair: *mut c_int, flags: c_int) -> c_int = SYS_pipe2;
    fn read(file: c_int, bytes: *mut c_void, length: size_t) -> ssize_t = SYS_read;
    fn write(file: c_int, bytes: *const c_void, length: size_t) -> ssize_t = SYS_write;
    fn writev(file: c_int, parts: *const iovec, count: c_int) -> ssize_t = SYS_writev;
    fn splice(
        from: c_int, start: *mut off64_t, to: c_int, begin: *mut off64_t, length: size_t, flags: c_uint
    ) -> ssize_t = SYS_splice;
    fn eventfd(count: c_uint, flags: c_int) -> c_int = SYS_eventfd2;
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int = SYS_memfd_create;
    fn inotify_init1(flags: c_int) -> c_int = SYS_inotify_init1;
    fn inotify_add_watch(inotify: c_int, path: *const c_char, mask: c_uint) -> c_int = SYS_inotify_add_watch;
    fn epoll_create1(flags: c_int) -> c_int = SYS_epoll_create1;
    fn epoll_ctl(epoll: c_int, what: c_int, file: c_int, event: *mut epoll_event) -> c_int = SYS_epoll_ctl;
    fn epoll_wait(epoll: c_int, events: *mut epoll_event, most: c_int, timeout: c_int) -> c_int
        = SYS_epoll_pwait(epoll, events, most, timeout, NULL, MASK);

    // Files.
    fn lseek64(file: c_int, by: off64_t, from: c_int) -> off64_t = SYS_lseek;
    fn ftruncate(file: c_int, length: off_t) -> c_int = SYS_ftruncate;
    fn ftruncate64(file: c_int, length: off64_t) -> c_int = SYS_ftruncate;
    fn fsync(file: c_int) -> c_int = SYS_fsync;
    fn flock(file: c_int, how: c_int) -> c_int = SYS_flock;
    fn fstat(file: c_int, about: *mut stat) -> c_int = SYS_fstat;
    fn fstat64(file: c_int, about: *mut stat64) -> c_int = SYS_fstat;
    fn fstatfs64(file: c_int, about: *mut statfs64) -> c_int = SYS_fstatfs;
    fn fstatat(folder: c_int, path: *const c_char, about: *mut stat, flags: c_int) -> c_int = SYS_newfstatat;
    fn fstatat64(folder: c_int, path: *const c_char, about: *mut stat64, flags: c_int) -> c_int = SYS_newfstatat;
    fn statx(folder: c_int, path: *const c_char, flags: c_int, mask: c_uint, about: *mut statx_t) -> c_int = SYS_statx;
    fn fchmod(file: c_int, mode: mode_t) -> c_int = SYS_fchmod;
    fn chmod(path: *const c_char, mode: mode_t) -> c_int = SYS_fchmodat(HERE, path, mode);
    fn chown(path: *const c_char, user: uid_t, group: gid_t) -> c_int = SYS_fchownat(HERE, path, user, group, NULL);
    fn lchown(path: *const c_char, user: uid_t, group: gid_t) -> c_int
        = SYS_fchownat(HERE, path, user, group, libc::AT_SYMLINK_NOFOLLOW);
    fn mkdir(path: *const c_char, mode: mode_t) -> c_int = SYS_mkdirat(HERE, path, mode);
    fn linkat(folder: c_int, path: *const c_char, to: c_int, name: *const c_char, flags: c_int) -> c_int = SYS_linkat;
    fn renameat2(folder: c_int, path: *const c_char, to: c_int, name: *const c_char, flags: c_uint) -> c_int
        = SYS_renameat2;

    // Processes.
    fn kill(process: pid_t, signal: c_int) -> c_int = SYS_kill;
    fn waitpid(process: pid_t, status: *mut c_int, options: c_int) -> pid_t
        = SYS_wait4(process, status, options, NULL);
    fn waitid(kind: idtype_t, id: id_t, about: *mut siginfo_t, options: c_int) -> c_int
        = SYS_waitid(kind, id, about, options, NULL);
    fn setpgid(process: pid_t, group: pid_t) -> c_int = SYS_setpgid;
    fn getgroups(count: c_int, groups: *mut gid_t) -> c_int = SYS_getgroups;
    fn setns(namespace: c_int, kind: c_int) -> c_int = SYS_setns;
    fn unshare(what: c_int) -> c_int = SYS_unshare;
    fn process_vm_readv(
        process: pid_t, to: *const iovec, to_count: c_ulong, from: *const iovec, from_count: c_ulong, flags: c_ulong
    ) -> ssize_t = SYS_process_vm_readv;
    // For the calling thread alone, where glibc includes all threads: the calling process has no other (`netns/identity.rs`).
    fn setresuid(real: uid_t, effective: uid_t, saved: uid_t) -> c_int = SYS_setresuid;
    fn setresgid(real: gid_t, effective: gid_t, saved: gid_t) -> c_int = SYS_setresgid;
    fn getrlimit(resource: c_uint, limit: *mut rlimit) -> c_int = SYS_prlimit64(NULL, resource, NULL, limit);
    fn setrlimit(resource: c_uint, limit: *const rlimit) -> c_int = SYS_prlimit64(NULL, resource, limit, NULL);
    fn getrandom(bytes: *mut c_void, length: size_t, flags: c_uint) -> ssize_t = SYS_getrandom;

    // Memory.
    fn mmap(start: *mut c_void, length: size_t, protection: c_int, flags: c_int, file: c_int, from: off_t)
        -> *mut c_void = SYS_mmap;
    fn mmap64(start: *mut c_void, length: size_t, protection: c_int, flags: c_int, file: c_int, from: off64_t)
        -> *mut c_void = SYS_mmap;
    fn mprotect(start: *mut c_void, length: size_t, protection: c_int) -> c_int = SYS_mprotect;

    // Declared with `...`.
    fn open(path: *const c_char, flags: c_int, mode: usize) -> c_int
        = SYS_openat(HERE, path, flags, mode_for(flags, mode));
    fn open64(path: *const c_char, flags: c_int, mode: usize) -> c_int
        = SYS_openat(HERE, path, flags, mode_for(flags, mode));
    fn openat(folder: c_int, path: *const c_char, flags: c_int, mode: usize) -> c_int
        = SYS_openat(folder, path, flags, mode_for(flags, mode));
    fn fcntl(file: c_int, command: c_int, argument: usize) -> c_int
        = SYS_fcntl(file, command, argument_of(command, argument));
    fn ioctl(file: c_int, request: c_ulong, argument: usize) -> c_int = SYS_ioctl(file, request as c_uint, argument);
    fn prctl(option: c_int, first: usize, second: usize, third: usize, fourth: usize) -> c_int
        = SYS_prctl(option, first, second, third, fourth);
}

/// The third argument of open(2), which is given only where a file may be made.
fn mode_for(flags: c_int, mode: usize) -> mode_t {
    if flags & (libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY) != 0 { mode as mode_t } else { 0 }
}

/// The third argument of fcntl(2): nothing, an int, or a pointer.
fn argument_of(command: c_int, argument: usize) -> usize {
    match command {
        libc::F_GETFD | libc::F_GETFL | libc::F_GETPIPE_SZ | libc::F_GET_SEALS => 0,
        libc::F_DUPFD
        | libc::F_DUPFD_CLOEXEC
        | libc::F_SETFD
        | libc::F_SETFL
        | libc::F_SETPIPE_SZ
        | libc::F_ADD_SEALS => (argument as c_int).word(),
        _ => argument,
    }
}

/// syscall(2): the number says what its arguments are.
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    number: c_long,
    first: usize,
    second: usize,
    third: usize,
    fourth: usize,
    fifth: usize,
    sixth: usize,
) -> c_long {
    let words = widened(number, [first, second, third, fourth, fifth, sixth]);
    // SAFETY: the caller answers for what this system call asks.
    finish(unsafe { enter(number, words) }) as c_long
}

/// The calls that bro and its libraries make by number, the most frequent first: which arguments are an `i`nt, an `u`nsigned int,
/// or a `w`hole word.
const BY_NUMBER: &[(c_long, &[u8])] = &[
    (libc::SYS_futex, b"wiuwwu"),
    (libc::SYS_bpf, b"iwu"),
    (libc::SYS_pidfd_open, b"iu"),
    (libc::SYS_pidfd_send_signal, b"iiwu"),
    (libc::SYS_openat2, b"iwww"),
    (libc::SYS_statx, b"iwiuw"),
    (libc::SYS_memfd_create, b"wu"),
    (libc::SYS_perf_event_open, b"wiiiw"),
    (libc::SYS_landlock_create_ruleset, b"wwu"),
    (libc::SYS_landlock_add_rule, b"iiwu"),
    (libc::SYS_landlock_restrict_self, b"iu"),
    (libc::SYS_seccomp, b"uuw"),
    (libc::SYS_copy_file_range, b"iwiwwu"),
    (libc::SYS_getrandom, b"wwu"),
    (libc::SYS_close_range, b"uuu"),
    (libc::SYS_renameat2, b"iwiwu"),
    (libc::SYS_faccessat2, b"iwii"),
];

fn widened(number: c_long, mut words: [usize; 6]) -> [usize; 6] {
    let kinds = BY_NUMBER.iter().find(|(of, _)| *of == number).map_or(&b""[..], |(_, kinds)| kinds);
    for (word, kind) in words.iter_mut().zip(kinds) {
        *word = match kind {
            b'i' => (*word as c_int).word(),
            b'u' => (*word as c_uint).word(),
            _ => *word,
        };
    }
    words
}

/// poll(2), by the call that every processor has.
#[unsafe(no_mangle)]
unsafe extern "C" fn poll(files: *mut pollfd, count: nfds_t, milliseconds: c_int) -> c_int {
    let mut limit = timespec {
        tv_sec: (milliseconds / 1000).into(),
        tv_nsec: c_long::from(milliseconds % 1000) * 1_000_000,
    };
    let limit: *mut timespec = if milliseconds < 0 { std::ptr::null_mut() } else { &raw mut limit };
    let words = [files.word(), count.word(), limit.word(), NULL, MASK];
    // SAFETY: the caller answers for the list; the time is valid, or there is none.
    finish(unsafe { enter(libc::SYS_ppoll, words) }) as c_int
}

/// dup2(2), by the call that every processor has, and that refuses to do nothing.
#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(from: c_int, to: c_int) -> c_int {
    let (number, words) = if from == to {
        (libc::SYS_fcntl, [from.word(), libc::F_GETFD.word(), 0])
    } else {
        (libc::SYS_dup3, [from.word(), to.word(), 0])
    };
    // SAFETY: no memory is involved.
    let result = finish(unsafe { enter(number, words) });
    if result < 0 { -1 } else { to }
}

/// clock_nanosleep(2), which returns what is wrong and leaves errno alone.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_nanosleep(
    clock: clockid_t,
    flags: c_int,
    span: *const timespec,
    rest: *mut timespec,
) -> c_int {
    let words = [clock.word(), flags.word(), span.word(), rest.word()];
    // SAFETY: the caller answers for the times.
    -unsafe { enter(libc::SYS_clock_nanosleep, words) } as c_int
}

/// killpg(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn killpg(group: pid_t, signal: c_int) -> c_int {
    if group < 0 {
        return finish(-(libc::EINVAL as isize)) as c_int;
    }
    // SAFETY: no memory is involved.
    finish(unsafe { enter(libc::SYS_kill, [(-group).word(), signal.word()]) }) as c_int
}

/// isatty(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn isatty(file: c_int) -> c_int {
    // More than any processor's kernel writes about a terminal.
    let mut about = [0_u64; 16];
    let words = [file.word(), libc::TCGETS as usize, about.as_mut_ptr().word()];
    // SAFETY: there is room for what the kernel writes.
    c_int::from(finish(unsafe { enter(libc::SYS_ioctl, words) }) == 0)
}

/// _exit(2).
#[unsafe(no_mangle)]
unsafe extern "C" fn _exit(status: c_int) -> ! {
    loop {
        // SAFETY: ends the process.
        let _never = unsafe { enter(libc::SYS_exit_group, [status.word()]) };
    }
}

/// Functions of glibc's that are more than a system call, by their second names, and declared so that they get whole words.
mod glibc {
    use super::{c_char, c_int, c_long, sighandler_t, sigset_t};
    use nix::libc::sigaction;

    unsafe extern "C" {
        pub(super) fn __sigaction(signal: c_long, new: *const sigaction, old: *mut sigaction) -> c_int;
        pub(super) fn ssignal(signal: c_long, handler: sighandler_t) -> sighandler_t;
        pub(super) fn sigprocmask(how: c_long, new: *const sigset_t, old: *mut sigset_t) -> c_int;
        pub(super) fn euidaccess(path: *const c_char, mode: c_long) -> c_int;
    }
}

/// sigaction(2): glibc's, which adds the code by which a handler returns.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: the same function by its other name, with the caller's own arguments.
    unsafe { glibc::__sigaction(signal.into(), new, old) }
}

/// signal(2), likewise.
#[unsafe(no_mangle)]
unsafe extern "C" fn signal(signal: c_int, handler: sighandler_t) -> sighandler_t {
    // SAFETY: the same function by its other name, with the caller's own arguments.
    unsafe { glibc::ssignal(signal.into(), handler) }
}

/// pthread_sigmask(3): glibc's, which keeps its own signals out of it.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_sigmask(how: c_int, new: *const sigset_t, old: *mut sigset_t) -> c_int {
    // SAFETY: on Linux the same function but for how it says what is wrong, with the caller's own arguments.
    if unsafe { glibc::sigprocmask(how.into(), new, old) } == 0 {
        return 0;
    }
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

/// eaccess(3): glibc's.
#[unsafe(no_mangle)]
unsafe extern "C" fn eaccess(path: *const c_char, mode: c_int) -> c_int {
    // SAFETY: the same function by its other name, with the caller's own arguments.
    unsafe { glibc::euidaccess(path, mode.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an optimised caller may leave above an int.
    const LEFT: usize = 0x7_0000_0000;

    #[test]
    fn a_number_is_a_whole_word() {
        assert_eq!((4_i32.word(), (-1_i32).word()), (4, usize::MAX));
        assert_eq!((u32::MAX.word(), (-1_i64).word()), (0xffff_ffff, usize::MAX));
    }

    #[test]
    fn what_is_asked_for_by_number_leaves_nothing_undefined() {
        let given = [LEFT | 5; 6];
        assert_eq!(widened(libc::SYS_pidfd_open, given)[..2], [5, 5]);
        assert_eq!(widened(libc::SYS_bpf, given)[..3], [5, LEFT | 5, 5]);
        assert_eq!(widened(libc::SYS_openat2, [LEFT | libc::AT_FDCWD as u32 as usize; 6])[0], HERE.word());
        assert_eq!(widened(libc::SYS_getpid, given), given);
    }

    #[test]
    fn what_no_caller_has_to_give_is_zero() {
        assert_eq!(mode_for(libc::O_RDONLY | libc::O_DIRECTORY, LEFT | 7), 0);
        assert_eq!(mode_for(libc::O_CREAT, LEFT | 0o600), 0o600);
        assert_eq!(mode_for(libc::O_TMPFILE, LEFT | 0o600), 0o600);
        assert_eq!(argument_of(libc::F_GETFL, LEFT), 0);
        assert_eq!(argument_of(libc::F_SETFL, LEFT | 4), 4);
        assert_eq!(argument_of(libc::F_SETLK, LEFT | 4), LEFT | 4);
    }

    /// This test's own program has them too.
    #[test]
    fn they_do_what_glibcs_do() {
        use std::io::{Error, Read as _, Seek as _, Write as _};
        // SAFETY: a plain number that is no descriptor.
        let result = unsafe { close(-1) };
        assert_eq!((result, Error::last_os_error().raw_os_error()), (-1, Some(libc::EBADF)));
        for (number, result) in [(2, 2), (-1, -1)] {
            // SAFETY: plain numbers, and the same one twice changes nothing.
            let same = unsafe { dup2(number, number) };
            assert_eq!(same, result);
        }
        // SAFETY: an empty list.
        let waited = unsafe { poll(std::ptr::null_mut(), 0, 1) };
        assert_eq!(waited, 0);
        // SAFETY: a plain number.
        let terminal = unsafe { isatty(-1) };
        assert_eq!(terminal, 0);
        let path = std::env::temp_dir().join(format!("bro-words-{}", std::process::id()));
        let mut file =
            std::fs::File::options().read(true).write(true).create_new(true).open(&path).expect("a file");
        std::fs::remove_file(&path).expect("it was made");
        file.write_all(b"whole words").expect("there is room");
        file.seek(std::io::SeekFrom::Start(6)).expect("it is a file");
        let mut text = String::new();
        let _length = file.read_to_string(&mut text).expect("it was written");
        assert_eq!((text.as_str(), file.metadata().expect("it is open").len()), ("words", 11));
        let status = std::process::Command::new("sh").args(["-c", "exit 7"]).status().expect("a shell");
        assert_eq!(status.code(), Some(7));
    }
}
