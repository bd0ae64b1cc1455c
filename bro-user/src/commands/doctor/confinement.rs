//! Can the forwarder do all steps of a wake within its unit's confinement? systemd makes a unit with the same directives to
//! try them. That shows whatever forbids a step: a directive of the unit or of a drop-in, AppArmor, SELinux.

pub(super) mod trial;

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use trial::{Circumstances, TrialStep, Tried};
use zbus::Variant;

use super::hints::ManagerOwner;
use super::{Check, listens};
use crate::installed::{Forwarder, Installed};
use crate::run_as::Gaining;
use crate::systemd::manager::SystemdManager;
use crate::systemd::manager::{Ended, Properties};
use crate::systemd::scope::RuntimeScope;
use crate::targets::TargetRange;

const NAME: &str = "confinement";

/// How long all steps may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The most that is read of what was tried.
const LONGEST: u64 = 64 * 1024;

/// For how many seconds a namespace stands in for a container's: longer than it is looked at.
const STANDS: &str = "30";

/// How long it may take to appear.
const APPEARS: Duration = Duration::from_secs(5);

const CLONE_NEWUSER: u64 = 0x1000_0000;
const CLONE_NEWNET: u64 = 0x4000_0000;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

/// `service` is the forwarder's unit. None where there is nothing to try: another check says what is wrong.
pub(super) async fn check(installed: &Installed, service: &str, systemd: &SystemdManager) -> Option<Check> {
    if systemd.known(service).await.ok()?.load != "loaded" {
        return None;
    }
    if installed.scope == RuntimeScope::System && !nix::unistd::geteuid().is_root() {
        return Some(Check::ok(
            NAME,
            format!("not tried: only root may (`sudo bro doctor {}`)", installed.name),
        ));
    }
    let forwarder = installed.forwarder()?;
    let program = &forwarder.program;
    // Another check tells of that.
    if !program.is_file() {
        return None;
    }
    let confines = match systemd.properties(service).await {
        Ok(confines) => confines,
        Err(error) => {
            return Some(Check::bad(
                NAME,
                format!("systemd does not tell how {service} is confined: {error:#}"),
                format!("see `{} status {service}`", ManagerOwner::front(installed).systemctl()),
            ));
        }
    };
    let container = forwarder.container.as_deref();
    let stand_in = match container.map(|container| listens::running(installed, container)) {
        Some(None) => StandIn::make(installed),
        Some(Some(_)) | None => None,
    };
    let running = container.and_then(|container| listens::running(installed, container));
    let pid = stand_in.as_ref().map(StandIn::pid).or(running);
    let words = words(installed, forwarder, &program.display().to_string(), pid);
    Some(match within(systemd, &words, &confines).await {
        Ok((ended, said)) => {
            let (circumstances, tried) = trial::read(&said);
            judge(installed, service, &confines, &ended, (&circumstances, &tried), &words).await
        }
        Err(error) => Check::bad(
            NAME,
            format!("systemd does not try what a wake takes within the confinement of {service}: {error:#}"),
            format!("see `{} cat {service}`", ManagerOwner::front(installed).systemctl()),
        ),
    })
}

/// The command that tries the steps.
fn words(installed: &Installed, forwarder: &Forwarder, program: &str, pid: Option<i32>) -> Vec<String> {
    let mut words = vec![program.to_owned(), "try-wake".to_owned()];
    words.extend(pid.map(|pid| format!("--pid={pid}")));
    // The ports of a range need the same.
    let targets =
        installed.listeners.iter().filter_map(|listener| listener.internal.as_ref().map(TargetRange::first));
    words.extend(targets.map(|target| format!("--target={target}")));
    let relay = forwarder.options.may_use_kernel_relay();
    let loads = installed.scope == RuntimeScope::System && installed.run_as.is_none();
    let user = installed.run_as.as_ref().map_or_else(|| nix::unistd::geteuid().as_raw(), |owner| owner.uid);
    // An ordinary user's forwarder opens what bro loader has left, if that is there.
    let opens = || std::path::Path::new(&format!("/run/bro/bpf/{user}")).exists();
    if relay && (loads || opens()) {
        words.push("--bpf".to_owned());
    }
    words
}

/// Runs it within the confinement; how it ended, and its output.
async fn within(
    systemd: &SystemdManager,
    words: &[String],
    confines: &Properties,
) -> anyhow::Result<(Ended, String)> {
    let (from, to) = std::io::pipe()?;
    let run = systemd.run_confined(words, confines, OwnedFd::from(to), LIMIT);
    // The manager has a limit too; this one is for a silent manager.
    let ended = tokio::time::timeout(LIMIT + Duration::from_secs(5), run).await??;
    Ok((ended, heard(from)?))
}

/// All that was written: the writer has ended, and with it all that it had started.
fn heard(from: std::io::PipeReader) -> anyhow::Result<String> {
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    let _zero = nix::fcntl::fcntl(&from, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    let mut bytes = Vec::new();
    match from.take(LONGEST).read_to_end(&mut bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error.into()),
        _ => {}
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The same outside, as the same user.
async fn outside(installed: &Installed, words: &[String]) -> Vec<Tried> {
    let (program, arguments) = (&words[0], &words[1..]);
    let mut command: tokio::process::Command = match installed.run_as.as_ref().filter(|owner| !owner.is_me())
    {
        Some(owner) => owner.command(Gaining::Forbidden, program).into(),
        None => tokio::process::Command::new(program),
    };
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    match tokio::time::timeout(LIMIT, command.output()).await {
        Ok(Ok(output)) => trial::read(&String::from_utf8_lossy(&output.stdout)).1,
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

/// A namespace that stands in for that of a container that does not run. Ends when dropped, and by itself.
struct StandIn(Child);

impl StandIn {
    /// None where no namespace can be made; then the own one is used.
    fn make(installed: &Installed) -> Option<Self> {
        let mut command = match (&installed.run_as, installed.scope) {
            (Some(owner), _) if !owner.is_me() => rootless(owner.command(Gaining::Forbidden, "unshare")),
            (None, RuntimeScope::System) => Command::new("unshare"),
            _ => rootless(Command::new("unshare")),
        };
        command.args(["--net", "--", "sh", "-c", "echo; exec sleep \"$0\"", STANDS]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let mut stand_in = Self(child);
        // It says when it is there, or ends. A user's stand-in may do neither.
        let mut said = stand_in.0.stdout.take()?;
        let mut polled = [PollFd::new(said.as_fd(), PollFlags::POLLIN)];
        let soon = PollTimeout::try_from(APPEARS).ok()?;
        let there = poll(&mut polled, soon).ok()? == 1 && said.read(&mut [0]).ok()? == 1;
        there.then_some(stand_in)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

/// In a user namespace of that user, as a rootless container is.
fn rootless(mut command: Command) -> Command {
    command.arg("--user");
    command
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The result, as a finding.
async fn judge(
    installed: &Installed,
    service: &str,
    confines: &Properties,
    ended: &Ended,
    (circumstances, tried): (&Circumstances, &[Tried]),
    words: &[String],
) -> Check {
    let systemctl = ManagerOwner::front(installed).systemctl();
    let done = ended.result == "success";
    let Some(last) = tried.last() else {
        return not_begun(installed, service, ended, &systemctl);
    };
    let failed = tried.iter().find(|tried| tried.error.is_some());
    let (step, why) = match failed {
        Some(Tried { step, error }) => (*step, error.clone().unwrap_or_default()),
        None if done => {
            return Check::ok(NAME, format!("within that of {service} a wake can do all that it takes"));
        }
        // It was ended during the next step.
        None => (next(last.step, words), how(ended)),
    };
    let finding = format!("within the confinement of {service} a wake cannot {step}: {why}");
    let less = step == TrialStep::Bpf
        && !installed.forwarder().is_some_and(|forwarder| forwarder.options.needs_kernel_relay());
    let check = |finding: String, fix: String| {
        if less { Check::less(NAME, finding, fix) } else { Check::bad(NAME, finding, fix) }
    };
    if let Some(Culprit { directive, forbids, line }) = culprit(step, installed, &Confines::of(confines)) {
        return check(
            format!("{finding}; its {directive}= forbids {forbids}"),
            format!("`{systemctl} edit {service}`, and there below [Service]: {line}"),
        );
    }
    let control = outside(installed, words).await;
    if let Some(error) =
        control.iter().find(|tried| tried.step == step).and_then(|tried| tried.error.as_ref())
    {
        return check(
            format!(
                "a wake cannot {step}: {why}; it is not the confinement of {service}: outside of it, {error}"
            ),
            "see `bro doctor`, which looks at what this host can do".to_owned(),
        );
    }
    let label = match circumstances.label.as_str() {
        "" | "unconfined" => "no security module confines it by a label".to_owned(),
        label => format!("a security module takes it for “{label}”"),
    };
    check(
        format!("{finding}; outside of it that works, and {label}"),
        format!(
            "`journalctl --dmesg --grep DENIED` and `ausearch -m avc -ts recent` show what AppArmor and SELinux have forbidden, `{systemctl} cat {service}` all directives"
        ),
    )
}

/// Nothing was tried: the program did not get that far.
fn not_begun(installed: &Installed, service: &str, ended: &Ended, systemctl: &str) -> Check {
    /// clap's status if it does not know the command.
    const USAGE: i32 = 2;
    if (ended.code, ended.status) == (1, USAGE) {
        let program = installed
            .forwarder()
            .map(|forwarder| forwarder.program.display().to_string())
            .unwrap_or_default();
        return Check::less(
            NAME,
            format!("not tried: {program}, which {service} runs, is another version of bro, and cannot"),
            format!(
                "`{} {}` writes the unit anew, with the program that is asked now",
                listens::activate(installed),
                installed.name
            ),
        );
    }
    Check::bad(
        NAME,
        format!("nothing can run within the confinement of {service}: {}", how(ended)),
        format!("see `{systemctl} cat {service}`: {}", setting_up(ended.status)),
    )
}

/// The step after this one.
fn next(step: TrialStep, words: &[String]) -> TrialStep {
    let unix = || words.iter().any(|word| word.starts_with("--target=/") || word.starts_with("--target=@"));
    match step {
        TrialStep::Bpf => TrialStep::Find,
        TrialStep::Find => TrialStep::Enter,
        TrialStep::Enter if unix() => TrialStep::Unix,
        TrialStep::Enter | TrialStep::Unix => TrialStep::Inet,
        TrialStep::Inet | TrialStep::Inet6 | TrialStep::Table => TrialStep::Table,
    }
}

/// How a program ended, in words.
fn how(ended: &Ended) -> String {
    const EXITED: i32 = 1;
    match (ended.result.as_str(), ended.code) {
        ("timeout", _) => format!("it took more than {LIMIT:?}"),
        (_, EXITED) => format!("exit status {}", ended.status),
        (_, 2..) => {
            let signal = nix::sys::signal::Signal::try_from(ended.status);
            signal.map_or_else(
                |_| format!("signal {}", ended.status),
                |signal| format!("it was ended by {signal}"),
            )
        }
        (result, _) => result.to_owned(),
    }
}

/// What systemd could not do before it executed the program (systemd.exec(5), “process exit codes”).
const fn setting_up(status: i32) -> &'static str {
    match status {
        203 => "the program cannot be executed",
        216 | 217 => "User= or Group=",
        218 => "CapabilityBoundingSet=",
        225 | 226 => "what needs a namespace of its own (Private…=, Protect…=, …Paths=)",
        227 => "NoNewPrivileges=",
        228 => "the filters of system calls (SystemCall…=, Restrict…=)",
        229 => "SELinuxContext=",
        231 => "AppArmorProfile=",
        _ => "one of its directives",
    }
}

/// A list that allows its entries, or forbids them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Filter {
    allows: bool,
    listed: Vec<String>,
}

impl Filter {
    fn of(value: Option<&Variant<'_>>) -> Self {
        let Some(Variant::Structure(parts)) = value else { return Self::default() };
        let [Variant::Bool(allows), Variant::Array(listed)] = parts.fields() else { return Self::default() };
        let listed = listed.iter().filter_map(|word| match word {
            // With the error that it is refused with, if it has its own.
            Variant::Str(word) => Some(word.split(':').next().unwrap_or_default().to_owned()),
            _ => None,
        });
        Self { allows: *allows, listed: listed.collect() }
    }

    fn forbids(&self, word: &str) -> bool {
        self.listed.iter().any(|listed| listed == word) != self.allows
    }
}

/// The parts of the confinement that may forbid a step by name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Confines {
    families: Filter,
    calls: Filter,
    namespaces: u64,
    capabilities: u64,
    private_users: bool,
}

impl Confines {
    fn of(properties: &Properties) -> Self {
        let get = |name: &str| properties.get(name).map(|value| &**value);
        let bits = |name: &str| if let Some(Variant::U64(bits)) = get(name) { *bits } else { u64::MAX };
        Self {
            families: Filter::of(get("RestrictAddressFamilies")),
            calls: Filter::of(get("SystemCallFilter")),
            namespaces: bits("RestrictNamespaces"),
            capabilities: bits("CapabilityBoundingSet"),
            private_users: matches!(get("PrivateUsers"), Some(Variant::Bool(true))),
        }
    }
}

/// What forbids a step.
#[derive(Debug, PartialEq, Eq)]
struct Culprit {
    directive: &'static str,
    forbids: String,
    /// The line that mends it.
    line: String,
}

/// The directive that forbids the step, as far as that can be told.
fn culprit(step: TrialStep, installed: &Installed, confines: &Confines) -> Option<Culprit> {
    let is = |directive, what: &str| Culprit {
        directive,
        forbids: what.to_owned(),
        line: format!("{directive}={what}"),
    };
    let rootful = installed.scope == RuntimeScope::System && installed.run_as.is_none();
    let (family, calls): (Option<&str>, &[&str]) = match step {
        TrialStep::Find => (None, &["pidfd_open"]),
        TrialStep::Enter => (Some("AF_UNIX"), &["socketpair", "execve", "setns", "sendmsg", "recvmsg"]),
        TrialStep::Inet => (Some("AF_INET"), &["socket"]),
        TrialStep::Inet6 => (Some("AF_INET6"), &["socket"]),
        TrialStep::Unix => (Some("AF_UNIX"), &["socket"]),
        TrialStep::Table => (Some("AF_NETLINK"), &["socket", "sendto", "recvfrom"]),
        TrialStep::Bpf => (None, &["bpf"]),
    };
    if let Some(family) = family.filter(|family| confines.families.forbids(family)) {
        return Some(is("RestrictAddressFamilies", family));
    }
    if let Some(call) = calls.iter().find(|call| confines.calls.forbids(call)) {
        return Some(is("SystemCallFilter", call));
    }
    let lacks = |capability: u32| rootful && confines.capabilities & (1 << capability) == 0;
    match step {
        TrialStep::Find if lacks(CAP_SYS_PTRACE) => Some(is("CapabilityBoundingSet", "CAP_SYS_PTRACE")),
        TrialStep::Enter if confines.namespaces & CLONE_NEWNET == 0 => Some(is("RestrictNamespaces", "net")),
        TrialStep::Enter if !rootful && confines.namespaces & CLONE_NEWUSER == 0 => {
            Some(is("RestrictNamespaces", "user"))
        }
        TrialStep::Enter if lacks(CAP_SYS_ADMIN) => Some(is("CapabilityBoundingSet", "CAP_SYS_ADMIN")),
        TrialStep::Find | TrialStep::Enter if confines.private_users => Some(Culprit {
            directive: "PrivateUsers",
            forbids: "to enter any namespace that is not its own".to_owned(),
            line: "PrivateUsers=no".to_owned(),
        }),
        TrialStep::Bpf if lacks(CAP_BPF) => {
            Some(is("CapabilityBoundingSet", "CAP_BPF CAP_NET_ADMIN CAP_PERFMON"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::installed::example;

    fn list(allows: bool, listed: &[&str]) -> Variant<'static> {
        Variant::from((allows, listed.iter().map(|&word| word.to_owned()).collect::<Vec<String>>()))
    }

    fn confines(properties: &[(&str, Variant<'static>)]) -> Confines {
        let owned = properties
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.try_to_owned().expect("it holds no descriptor")));
        Confines::of(&owned.collect())
    }

    /// The culprit named for a step that fails, of a system's service or a user's.
    fn named(
        scope: RuntimeScope,
        step: TrialStep,
        properties: &[(&str, Variant<'static>)],
    ) -> Option<String> {
        let mut web = example::forwarded(Some("systemd-web"), &[]);
        web.scope = scope;
        culprit(step, &web, &confines(properties)).map(|culprit| culprit.line)
    }

    #[test]
    fn a_directive_that_forbids_a_step_is_named() {
        use RuntimeScope::{System, User};
        const UNIX: &[&str] = &["AF_UNIX", "AF_INET"];
        let bits = Variant::from;
        let cases: [(RuntimeScope, TrialStep, &str, Variant<'static>, Option<&str>); 14] = [
            (
                User,
                TrialStep::Table,
                "RestrictAddressFamilies",
                list(true, UNIX),
                Some("RestrictAddressFamilies=AF_NETLINK"),
            ),
            (
                User,
                TrialStep::Inet6,
                "RestrictAddressFamilies",
                list(true, UNIX),
                Some("RestrictAddressFamilies=AF_INET6"),
            ),
            (User, TrialStep::Inet, "RestrictAddressFamilies", list(true, UNIX), None),
            (
                User,
                TrialStep::Inet,
                "RestrictAddressFamilies",
                list(false, UNIX),
                Some("RestrictAddressFamilies=AF_INET"),
            ),
            (
                User,
                TrialStep::Table,
                "RestrictAddressFamilies",
                list(true, &[]),
                Some("RestrictAddressFamilies=AF_NETLINK"),
            ),
            (
                User,
                TrialStep::Enter,
                "SystemCallFilter",
                list(false, &["setns:EPERM"]),
                Some("SystemCallFilter=setns"),
            ),
            (
                System,
                TrialStep::Bpf,
                "SystemCallFilter",
                list(true, &["socket"]),
                Some("SystemCallFilter=bpf"),
            ),
            (System, TrialStep::Enter, "RestrictNamespaces", bits(CLONE_NEWNET), None),
            (
                User,
                TrialStep::Enter,
                "RestrictNamespaces",
                bits(CLONE_NEWNET),
                Some("RestrictNamespaces=user"),
            ),
            (
                User,
                TrialStep::Enter,
                "RestrictNamespaces",
                bits(CLONE_NEWUSER),
                Some("RestrictNamespaces=net"),
            ),
            (
                System,
                TrialStep::Enter,
                "CapabilityBoundingSet",
                bits(0_u64),
                Some("CapabilityBoundingSet=CAP_SYS_ADMIN"),
            ),
            (
                System,
                TrialStep::Find,
                "CapabilityBoundingSet",
                bits(0_u64),
                Some("CapabilityBoundingSet=CAP_SYS_PTRACE"),
            ),
            // A user's forwarder needs none for its own container.
            (User, TrialStep::Enter, "CapabilityBoundingSet", bits(0_u64), None),
            (User, TrialStep::Enter, "PrivateUsers", Variant::from(true), Some("PrivateUsers=no")),
        ];
        for (scope, step, property, value, line) in cases {
            let found = named(scope, step, &[(property, value.try_clone().expect("no descriptor"))]);
            assert_eq!(found.as_deref(), line, "{scope:?} {step:?} {property} {value:?}");
        }
        for step in [
            TrialStep::Find,
            TrialStep::Enter,
            TrialStep::Inet,
            TrialStep::Inet6,
            TrialStep::Unix,
            TrialStep::Table,
            TrialStep::Bpf,
        ] {
            assert_eq!(named(System, step, &[]), None, "{step:?}");
        }
    }

    #[test]
    fn who_is_ended_in_the_midst_of_a_step_has_said_the_one_before() {
        let words = |target: &str| ["bro", "try-wake", target].map(str::to_owned);
        assert_eq!(next(TrialStep::Enter, &words("--target=127.0.0.1:80")), TrialStep::Inet);
        assert_eq!(next(TrialStep::Enter, &words("--target=/run/x")), TrialStep::Unix);
        assert_eq!(next(TrialStep::Inet, &words("--target=127.0.0.1:80")), TrialStep::Table);
        let ended = |result: &str, code, status| Ended { result: result.to_owned(), code, status };
        assert_eq!(how(&ended("core-dump", 3, 31)), "it was ended by SIGSYS");
        assert_eq!(how(&ended("exit-code", 1, 226)), "exit status 226");
        assert_eq!(how(&ended("timeout", 2, 9)), "it took more than 10s");
    }
}
