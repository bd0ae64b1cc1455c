//! What the relay process can no longer do, whoever gets hold of it: no capabilities, no new privileges, no file (landlock(7)), and
//! of the system calls only those that moving bytes between sockets takes (seccomp(2)). It can make no socket, connect none and
//! bind none, open and execute nothing, signal and trace nobody, and send no descriptor. What it needs of that kind other
//! processes do for it: the agents connect, to destinations that the control process has named, and the control process does the
//! rest.

use std::collections::BTreeMap;

use anyhow::Context as _;
use caps::CapSet;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetStatus, Scope,
};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// The newest Landlock that is asked for; older kernels give what they have.
const LANDLOCK: ABI = ABI::V6;

/// Enters the sandbox, for the calling thread and all it will start. Returns what this kernel does not offer.
///
/// # Errors
/// When something is refused that every kernel of ours has.
pub fn enter() -> anyhow::Result<Vec<String>> {
    nix::sys::prctl::set_no_new_privs().context("no_new_privs")?;
    drop_capabilities()?;
    let mut missing = Vec::new();
    missing.extend(restrict_files());
    missing.extend(filter_system_calls());
    Ok(missing)
}

fn drop_capabilities() -> anyhow::Result<()> {
    // The bounding set takes CAP_SETPCAP to lessen; without it there is nothing in it that could be had.
    caps::clear(None, CapSet::Bounding).ok();
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).with_context(|| format!("cannot give up the {set:?} capabilities"))?;
    }
    Ok(())
}

/// Landlock without a single rule: nothing of what it knows is allowed. Says what is missing.
fn restrict_files() -> Option<String> {
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|rules| rules.handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp))
        .and_then(|rules| rules.scope(Scope::AbstractUnixSocket | Scope::Signal))
        .and_then(landlock::Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self);
    match restricted {
        Ok(status) if status.ruleset == RulesetStatus::NotEnforced => {
            Some("this kernel has no Landlock, or it is switched off".into())
        }
        Ok(_) => None,
        Err(error) => Some(format!("Landlock: {error}")),
    }
}

fn filter_system_calls() -> Option<String> {
    let filter = filter().and_then(|filter| Ok(seccompiler::apply_filter(&filter)?));
    filter.err().map(|error| format!("no filter for system calls: {error:#}"))
}

/// What may be asked of bpf(2): to read and change the maps that are there.
const BPF_COMMANDS: [u64; 5] = [
    1,  // BPF_MAP_LOOKUP_ELEM
    2,  // BPF_MAP_UPDATE_ELEM
    3,  // BPF_MAP_DELETE_ELEM
    4,  // BPF_MAP_GET_NEXT_KEY
    15, // BPF_OBJ_GET_INFO_BY_FD
];

/// What may be asked of fcntl(2): nothing that sends signals (F_SETOWN) or takes leases.
const FCNTL_COMMANDS: [i32; 7] = [
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_SETPIPE_SZ,
    libc::F_GETPIPE_SZ,
];

fn filter() -> anyhow::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALWAYS.iter().map(|&call| (call, Vec::new())).collect();
    let mut allow = |call: libc::c_long, cases: &[(u8, SeccompCmpOp, u64)]| -> anyhow::Result<()> {
        let case = |(argument, is, value): &(u8, SeccompCmpOp, u64)| {
            let condition = SeccompCondition::new(*argument, SeccompCmpArgLen::Qword, is.clone(), *value)?;
            SeccompRule::new(vec![condition])
        };
        let _none = rules.insert(call, cases.iter().map(case).collect::<Result<_, _>>()?);
        Ok(())
    };
    let equals = |argument: u8, value: u64| (argument, SeccompCmpOp::Eq, value);
    let without = |argument: u8, bits: i32| (argument, SeccompCmpOp::MaskedEq(bits as u64), 0);
    // send(2) on what is connected: no address, so no way to anybody else.
    allow(libc::SYS_sendto, &[equals(4, 0)])?;
    allow(libc::SYS_bpf, &BPF_COMMANDS.map(|command| equals(0, command)))?;
    allow(libc::SYS_fcntl, &FCNTL_COMMANDS.map(|command| equals(1, command as u64)))?;
    // Nothing that is written can be run.
    allow(libc::SYS_mmap, &[without(2, libc::PROT_EXEC)])?;
    allow(libc::SYS_mprotect, &[without(2, libc::PROT_EXEC)])?;
    // abort(3): a signal to itself.
    allow(libc::SYS_tgkill, &[equals(0, u64::from(std::process::id()))])?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

/// What is allowed with any arguments. The kernel remembers which these are, so that they cost next to nothing
/// (`seccomp_cache_check_allow`): whatever is called per message has to be here.
const ALWAYS: &[libc::c_long] = &[
    // The event loop.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_ctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    // Connections.
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_close,
    // Their bytes, the log's, and what the other processes say.
    libc::SYS_splice,
    libc::SYS_pipe2,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    // Memory, time, and the end.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
