//! What the relay process can no longer do, whatever takes control of it: no capabilities, no new privileges, no file
//! (landlock(7)), and only those system calls that it takes to move bytes between sockets (seccomp(2)). It can make no socket, let
//! none listen, open and execute nothing, signal and trace no process, and send no descriptor. Other processes do for it what it
//! needs of that kind: the agents connect, to addresses that the control process has named, and the control process does the
//! rest.

pub mod new_calls;

mod options;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::RawFd;

use anyhow::Context as _;
use caps::CapSet;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, NetPort, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::sys::AddressBook;

/// The newest Landlock that is asked for; older kernels give what they have.
const LANDLOCK: ABI = ABI::V6;

/// Enters the sandbox, for the calling thread and all it will start; `addresses` is where the [`AddressBook`] is, `ports` are the
/// targets' ports, `listeners` the descriptors of the listeners, which other processes have too, and `binds` says whether
/// connections to the targets have clients' addresses. `datagrams`: some take datagrams; `answers_unix`: over unix sockets. Returns what
/// this kernel does not offer.
///
/// # Errors
/// When something is refused that every supported kernel has.
pub fn enter(
    addresses: Option<Range<u64>>,
    ports: impl IntoIterator<Item = u16>,
    listeners: Range<RawFd>,
    binds: bool,
    datagrams: bool,
    answers_unix: bool,
) -> anyhow::Result<Vec<String>> {
    nix::sys::prctl::set_no_new_privs().context("no_new_privs")?;
    drop_capabilities()?;
    let mut missing = Vec::new();
    missing.extend(restrict_files(ports, binds, answers_unix));
    missing.extend(filter_system_calls(addresses, listeners, binds, datagrams));
    Ok(missing)
}

fn drop_capabilities() -> anyhow::Result<()> {
    // To lessen the bounding set takes CAP_SETPCAP; without that, nothing in it could be had anyway.
    caps::clear(None, CapSet::Bounding).ok();
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).with_context(|| format!("cannot give up the {set:?} capabilities"))?;
    }
    Ok(())
}

/// Landlock with no rule but for the targets' ports: no file, no other port, no signal to another process. Says what is missing.
fn restrict_files(ports: impl IntoIterator<Item = u16>, binds: bool, answers_unix: bool) -> Option<String> {
    // An answer goes to the abstract name that its client is bound to.
    let scope = if answers_unix { Scope::Signal.into() } else { Scope::AbstractUnixSocket | Scope::Signal };
    // A client may have any port.
    let net = if binds { AccessNet::ConnectTcp.into() } else { AccessNet::BindTcp | AccessNet::ConnectTcp };
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|rules| rules.handle_access(net))
        .and_then(|rules| rules.scope(scope))
        .and_then(landlock::Ruleset::create)
        .and_then(|rules| {
            rules.add_rules(
                ports
                    .into_iter()
                    .map(|port| Ok::<_, RulesetError>(NetPort::new(port, AccessNet::ConnectTcp))),
            )
        })
        .and_then(landlock::RulesetCreated::restrict_self);
    match restricted {
        Ok(status) if status.ruleset == RulesetStatus::NotEnforced => {
            Some("this kernel has no Landlock, or it is switched off".into())
        }
        Ok(_) => None,
        Err(error) => Some(format!("Landlock: {error}")),
    }
}

fn filter_system_calls(
    addresses: Option<Range<u64>>,
    listeners: Range<RawFd>,
    binds: bool,
    datagrams: bool,
) -> Option<String> {
    let apply = |filter: anyhow::Result<BpfProgram>| Ok(seccompiler::apply_filter(&filter?)?);
    // The second one lets no other be added.
    let applied = apply(leave_alone(listeners.clone(), datagrams))
        .and_then(|()| apply(filter(addresses, binds, datagrams.then_some(listeners))));
    applied.err().map(|error: anyhow::Error| format!("no filter for system calls: {error:#}"))
}

/// Refuses whatever changes the listeners, for they are the service manager's as well: what is done to them outlasts this process,
/// and one that is shut down listens no more and could be connected, in the host's namespace. They have numbers in a row, so that
/// this costs little; a descriptor that is made later has another number for as long as they are open. A filter of its own, so that
/// the other filter's conditions do not have to be multiplied by it.
fn leave_alone(listeners: Range<RawFd>, datagrams: bool) -> anyhow::Result<BpfProgram> {
    let bound = |is, number: RawFd| SeccompCondition::new(0, SeccompCmpArgLen::Dword, is, number as u64);
    let one_of_them = || {
        SeccompRule::new(vec![
            bound(SeccompCmpOp::Ge, listeners.start)?,
            bound(SeccompCmpOp::Lt, listeners.end)?,
        ])
    };
    let calls =
        [libc::SYS_shutdown, libc::SYS_connect, libc::SYS_bind, libc::SYS_setsockopt, libc::SYS_fcntl];
    // Where datagrams may be sent from listeners, no other descriptor may come to have one's number.
    let calls = calls.into_iter().chain(datagrams.then_some(libc::SYS_close));
    let rules = calls.map(|call| Ok((call, vec![one_of_them()?])));
    let rules = rules.collect::<Result<_, seccompiler::BackendError>>()?;
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, refused, std::env::consts::ARCH.try_into()?)?;
    Ok(filter.try_into()?)
}

/// What may be asked of bpf(2): to read and change the maps that are there, and to run the program that hooks a client.
const BPF_COMMANDS: [u64; 6] = [
    1,  // BPF_MAP_LOOKUP_ELEM
    2,  // BPF_MAP_UPDATE_ELEM
    3,  // BPF_MAP_DELETE_ELEM
    4,  // BPF_MAP_GET_NEXT_KEY
    10, // BPF_PROG_TEST_RUN
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

fn filter(
    addresses: Option<Range<u64>>,
    binds: bool,
    datagrams: Option<Range<RawFd>>,
) -> anyhow::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALWAYS.iter().map(|&call| (call, Vec::new())).collect();
    // Each case is a list of conditions that all have to hold.
    let mut allow = |call: libc::c_long, cases: Vec<Vec<Condition>>| -> anyhow::Result<()> {
        let condition =
            |(argument, is, value, length): Condition| SeccompCondition::new(argument, length, is, value);
        let case = |conditions: Vec<Condition>| {
            SeccompRule::new(conditions.into_iter().map(condition).collect::<Result<_, _>>()?)
        };
        let _none = rules.insert(call, cases.into_iter().map(case).collect::<Result<_, _>>()?);
        Ok(())
    };
    let whole = SeccompCmpArgLen::Qword;
    let equals = |argument: u8, value: u64| (argument, SeccompCmpOp::Eq, value, whole.clone());
    // Of an int the kernel looks at the lower half alone, and a caller may leave anything in the upper one.
    let int = |argument: u8, value: i32| {
        (argument, SeccompCmpOp::Eq, u64::from(value.cast_unsigned()), SeccompCmpArgLen::Dword)
    };
    let without = |argument: u8, bits: i32| (argument, SeccompCmpOp::MaskedEq(bits as u64), 0, whole.clone());
    // send(2) on what is connected: no address, so no way to any other peer.
    allow(libc::SYS_sendto, vec![vec![equals(4, 0)]])?;
    allow(libc::SYS_bpf, BPF_COMMANDS.map(|command| vec![equals(0, command)]).into())?;
    allow(libc::SYS_fcntl, FCNTL_COMMANDS.map(|command| vec![int(1, command)]).into())?;
    for (call, options) in [(libc::SYS_setsockopt, options::SET), (libc::SYS_getsockopt, options::GET)] {
        allow(call, options.iter().map(|&(level, name)| vec![int(1, level), int(2, name)]).collect())?;
    }
    // Nothing that is written can be run, and the addresses, which are below all other memory, stay as they are.
    let end = addresses.as_ref().map_or(0, |addresses| addresses.end);
    let above = (0, SeccompCmpOp::Ge, end, whole.clone());
    allow(libc::SYS_mmap, vec![vec![without(2, libc::PROT_EXEC), without(3, libc::MAP_FIXED)]])?;
    allow(libc::SYS_mprotect, vec![vec![without(2, libc::PROT_EXEC), above.clone()]])?;
    allow(libc::SYS_mremap, vec![vec![above.clone(), without(3, !libc::MREMAP_MAYMOVE)]])?;
    for call in [libc::SYS_munmap, libc::SYS_madvise] {
        allow(call, vec![vec![above.clone()]])?;
    }
    if let Some(addresses) = addresses {
        // An address as a whole, and not what lies between two.
        let aligned = (
            1,
            SeccompCmpOp::MaskedEq(AddressBook::ROOM as u64 - 1),
            addresses.start % AddressBook::ROOM as u64,
            whole.clone(),
        );
        let from = (1, SeccompCmpOp::Ge, addresses.start, whole.clone());
        let until = (1, SeccompCmpOp::Lt, addresses.end, whole.clone());
        allow(libc::SYS_connect, vec![vec![aligned, from, until]])?;
    }
    if let Some(listeners) = datagrams {
        // Answers to clients, from the sockets that they wrote to, which are not connected. The filter does not see the address.
        let bound = |is, number: RawFd| (0, is, number as u64, SeccompCmpArgLen::Dword);
        let one_of_them =
            vec![bound(SeccompCmpOp::Ge, listeners.start), bound(SeccompCmpOp::Lt, listeners.end)];
        allow(libc::SYS_sendmmsg, vec![one_of_them])?;
        allow(libc::SYS_recvmmsg, Vec::new())?;
    }
    if binds {
        // The filter does not see the address. listen(2) is not allowed, so that nothing comes in there.
        let lengths = [size_of::<libc::sockaddr_in>(), size_of::<libc::sockaddr_in6>()];
        allow(libc::SYS_bind, lengths.map(|length| vec![int(2, length as i32)]).into())?;
    }
    // abort(3): a signal to itself.
    allow(libc::SYS_tgkill, vec![vec![equals(0, u64::from(std::process::id()))]])?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

/// The number of an argument, how it is compared, with what, and how much of it.
type Condition = (u8, SeccompCmpOp, u64, SeccompCmpArgLen);

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
