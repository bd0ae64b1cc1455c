//! A seccomp filter that kills whatever makes a system call with an undefined upper half of an argument: as any filter may that
//! compares whole words.

use std::collections::BTreeMap;

use anyhow::Result;
use nix::libc::{self, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    sock_filter,
};

/// The system calls that have arguments of 32 bits, as the kernel or libc declares them: the number, and which arguments.
#[must_use]
pub fn calls() -> BTreeMap<&'static str, (c_long, &'static [usize])> {
    let all = EVERYWHERE.iter().chain(OLDER);
    all.flat_map(|(arguments, calls)| calls.iter().map(|(name, call)| (*name, (*call, *arguments)))).collect()
}

/// Lets this process and all that come of it live only while the upper half of such an argument is zero or, of a negative number,
/// all ones. New privileges are out of its reach as well, as seccomp(2) wants it.
pub fn be_strict() -> Result<()> {
    Ok(seccompiler::apply_filter(&filter())?)
}

/// Takes one protocol of AF_NETLINK from this process and all that come of it, as a kernel does that was built without it.
pub fn lack_netlink(protocol: u64) -> Result<()> {
    let is = |argument, value: i32| {
        let value = u64::from(value.cast_unsigned());
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let rule = SeccompRule::new(vec![is(0, libc::AF_NETLINK)?, is(2, i32::try_from(protocol)?)?])?;
    let filter = SeccompFilter::new(
        [(libc::SYS_socket, vec![rule])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPROTONOSUPPORT.cast_unsigned()),
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?)
}

/// For each group of arguments: whose they are, and then the check.
fn filter() -> BpfProgram {
    let mut program = vec![load(0)];
    for (arguments, calls) in EVERYWHERE.iter().chain(OLDER) {
        let calls = calls.iter().map(|(_, call)| *call).filter(|call| *call != libc::SYS_fcntl);
        let mut checks = Vec::new();
        for argument in *arguments {
            check(*argument, &mut checks);
        }
        of(&calls.collect::<Vec<_>>(), checks, &mut program);
    }
    let mut checks = Vec::new();
    check(0, &mut checks);
    check(1, &mut checks);
    number_of_fcntl(&mut checks);
    of(&[libc::SYS_fcntl], checks, &mut program);
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program
}

/// Lets the checks be for these calls, and all others pass by.
fn of(calls: &[c_long], mut checks: BpfProgram, program: &mut BpfProgram) {
    checks.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    for (index, call) in calls.iter().enumerate() {
        // Two instructions each, since a condition reaches no further than 255.
        let to_checks = 2 * (calls.len() - index - 1) + 1;
        program.push(jump(libc::BPF_JEQ, *call as u32, 0, 1));
        program.push(statement(libc::BPF_JMP | libc::BPF_JA, to_checks as u32));
    }
    program.push(statement(libc::BPF_JMP | libc::BPF_JA, checks.len() as u32));
    program.extend(checks);
}

/// Goes on behind itself, or kills.
fn check(argument: usize, program: &mut BpfProgram) {
    // struct seccomp_data: the number, the architecture, the place, the arguments; lower halves first on these processors.
    let lower = 16 + 8 * argument as u32;
    program.extend([
        load(lower + 4),
        jump(libc::BPF_JEQ, 0, 4, 0),
        jump(libc::BPF_JEQ, u32::MAX, 0, 2),
        load(lower),
        jump(libc::BPF_JSET, 1 << 31, 1, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS),
    ]);
}

/// The third argument of fcntl(2), which is an int for some commands.
fn number_of_fcntl(program: &mut BpfProgram) {
    let commands = [libc::F_DUPFD, libc::F_SETFD, libc::F_SETFL, libc::F_DUPFD_CLOEXEC, libc::F_SETPIPE_SZ];
    let mut checks = Vec::new();
    check(2, &mut checks);
    program.push(load(16 + 8));
    for (index, command) in commands.iter().enumerate() {
        let to_checks = commands.len() - index;
        program.push(jump(libc::BPF_JEQ, *command as u32, to_checks as u8, 0));
    }
    program.push(statement(libc::BPF_JMP | libc::BPF_JA, checks.len() as u32));
    program.extend(checks);
}

const fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

const fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

const fn jump(how: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | how | libc::BPF_K) as u16, jt, jf, k }
}

/// Which arguments, and of which calls.
type Group = (&'static [usize], &'static [(&'static str, c_long)]);

macro_rules! calls {
    ([$($argument:literal),+] $($name:ident)+) => {
        (&[$($argument),+], &[$((stringify!($name), libc::$name)),+])
    };
}

/// On every processor. Of mmap(2), mprotect(2) and close_range(2) it is libc that has ints. What futex(2) has at its end
/// is there for few of its operations, and glibc then leaves it as it was.
const EVERYWHERE: &[Group] = &[
    calls!([0]
        SYS_accept SYS_clock_adjtime SYS_clock_getres SYS_clock_gettime SYS_clock_settime SYS_close SYS_dup
        SYS_epoll_create1 SYS_exit SYS_exit_group SYS_fchdir SYS_fdatasync SYS_fgetxattr SYS_flistxattr
        SYS_fremovexattr SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_get_robust_list SYS_getgroups SYS_getitimer
        SYS_getpeername SYS_getpgid SYS_getrlimit SYS_getrusage SYS_getsid SYS_getsockname SYS_inotify_init1
        SYS_io_setup SYS_io_uring_setup SYS_keyctl SYS_memfd_secret SYS_migrate_pages SYS_mlockall SYS_mq_getsetattr
        SYS_mq_notify SYS_mq_timedreceive SYS_openat2 SYS_personality SYS_pkey_free SYS_prctl SYS_pread64
        SYS_process_vm_readv SYS_process_vm_writev SYS_pselect6 SYS_pwrite64 SYS_read SYS_readahead SYS_rt_sigaction
        SYS_rt_sigprocmask SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_sched_getparam
        SYS_sched_getscheduler SYS_sched_rr_get_interval SYS_sched_setparam SYS_set_mempolicy SYS_setfsgid
        SYS_setfsuid SYS_setgid SYS_setgroups SYS_setitimer SYS_setrlimit SYS_setuid SYS_syncfs SYS_timer_create
        SYS_timer_delete SYS_timer_getoverrun SYS_timer_gettime SYS_timerfd_gettime SYS_umask SYS_userfaultfd
        SYS_write),
    calls!([0, 1]
        SYS_clock_nanosleep SYS_eventfd2 SYS_fallocate SYS_fanotify_init SYS_fchmod SYS_fcntl SYS_flock
        SYS_getpriority SYS_inotify_rm_watch SYS_ioctl SYS_ioprio_get SYS_kill SYS_landlock_restrict_self SYS_listen
        SYS_msgctl SYS_msgget SYS_pidfd_open SYS_prlimit64 SYS_process_mrelease SYS_rt_sigqueueinfo
        SYS_sched_getaffinity SYS_sched_setaffinity SYS_sched_setscheduler SYS_seccomp SYS_sendfile SYS_setns
        SYS_setpgid SYS_setregid SYS_setreuid SYS_shmctl SYS_shutdown SYS_timer_settime SYS_timerfd_create
        SYS_timerfd_settime SYS_tkill),
    calls!([0, 1, 2]
        SYS_close_range SYS_dup3 SYS_epoll_ctl SYS_fchown SYS_fsmount SYS_getsockopt SYS_ioprio_set SYS_kcmp
        SYS_membarrier SYS_pidfd_getfd SYS_quotactl_fd SYS_reboot SYS_rt_tgsigqueueinfo SYS_semctl SYS_semget
        SYS_setpriority SYS_setresgid SYS_setresuid SYS_socket SYS_socketpair SYS_tgkill),
    calls!([0, 1, 2, 3]
        SYS_io_uring_enter),
    calls!([0, 1, 2, 4]
        SYS_setsockopt),
    calls!([0, 1, 3]
        SYS_fanotify_mark SYS_io_uring_register SYS_landlock_add_rule SYS_pidfd_send_signal SYS_tee SYS_waitid),
    calls!([0, 1, 4]
        SYS_fsconfig),
    calls!([0, 2]
        SYS_bind SYS_bpf SYS_connect SYS_epoll_pwait2 SYS_faccessat SYS_fchmodat SYS_fspick SYS_getdents64
        SYS_inotify_add_watch SYS_lseek SYS_mkdirat SYS_mount_setattr SYS_open_by_handle_at SYS_open_tree SYS_quotactl
        SYS_recvmsg SYS_renameat SYS_sched_setattr SYS_semop SYS_semtimedop SYS_sendmsg SYS_shmat SYS_shmget
        SYS_syslog SYS_unlinkat SYS_wait4),
    calls!([0, 2, 3]
        SYS_epoll_pwait SYS_faccessat2 SYS_mknodat SYS_openat SYS_recvmmsg SYS_sched_getattr SYS_sendmmsg SYS_statx),
    calls!([0, 2, 3, 4]
        SYS_fchownat),
    calls!([0, 2, 4]
        SYS_linkat SYS_move_mount SYS_renameat2),
    calls!([0, 2, 5]
        SYS_copy_file_range SYS_splice),
    calls!([0, 3]
        SYS_accept4 SYS_fadvise64 SYS_mq_timedsend SYS_msgsnd SYS_newfstatat SYS_readlinkat SYS_recvfrom SYS_signalfd4
        SYS_sync_file_range SYS_utimensat SYS_vmsplice),
    calls!([0, 3, 4]
        SYS_process_madvise),
    calls!([0, 3, 5]
        SYS_sendto),
    calls!([0, 4]
        SYS_execveat SYS_fsetxattr SYS_msgrcv SYS_name_to_handle_at),
    calls!([0, 5]
        SYS_move_pages),
    calls!([1]
        SYS_fsopen SYS_memfd_create SYS_pipe2 SYS_ppoll SYS_setdomainname SYS_sethostname SYS_swapon SYS_symlinkat
        SYS_umount2),
    calls!([1, 2]
        SYS_futex SYS_mq_open),
    calls!([1, 2, 3]
        SYS_perf_event_open SYS_rseq),
    calls!([1, 2, 4]
        SYS_futex_waitv),
    calls!([2]
        SYS_getrandom SYS_landlock_create_ruleset SYS_madvise SYS_mlock2 SYS_mprotect SYS_msync),
    calls!([2, 3, 4]
        SYS_mmap),
    calls!([3]
        SYS_pkey_mprotect SYS_request_key),
    calls!([4]
        SYS_add_key SYS_lsetxattr SYS_setxattr),
    calls!([5]
        SYS_mbind SYS_preadv2 SYS_pwritev2),
];

/// The older calls that not every processor has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[Group] = &[
    calls!([0]
        SYS_alarm SYS_arch_prctl SYS_epoll_create SYS_eventfd SYS_futimesat SYS_iopl SYS_modify_ldt SYS_select
        SYS_signalfd SYS_sysfs SYS_ustat),
    calls!([0, 1]
        SYS_dup2),
    calls!([0, 2]
        SYS_getdents),
    calls!([0, 2, 3]
        SYS_epoll_wait SYS_fchmodat2),
    calls!([1]
        SYS_access SYS_chmod SYS_creat SYS_mkdir),
    calls!([1, 2]
        SYS_chown SYS_lchown SYS_mknod SYS_open SYS_poll),
    calls!([2]
        SYS_ioperm SYS_readlink),
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[Group] = &[];
